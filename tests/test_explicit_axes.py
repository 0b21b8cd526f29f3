"""Replicas on the default mesh, whose axes are Explicit: the same numbers."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import pranam_optax

R = 8


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2,), ("replicas",))


@pytest.fixture(params=["alone", "set_mesh"])
def context(request, mesh):
    """With and without the mesh as the context's; returns what it is entered by."""
    if request.param == "alone":
        return contextlib.nullcontext
    return lambda: jax.set_mesh(mesh)


@pytest.fixture(params=["eager", "jit"])
def compiled(request):
    return jax.jit if request.param == "jit" else lambda fun: fun


def make_params(seed=0):
    return pranam_optax.replicate(
        lambda key: {
            "w": jax.random.normal(key, (3, 2)),
            "b": jax.random.normal(key, (2,)),
        },
        seed,
        R,
    )


def ladder():
    return jnp.linspace(0.0, 1.0, R)


def update(make):
    """An update by the transformation that `make` returns with its hyperparameters."""

    def prepare():
        tx, hyperparams = make()
        return lambda params, grads: tx.update(
            grads, tx.init(params), params, **hyperparams
        )

    return prepare


def falling_ladder():
    rungs = ladder()
    return lambda count: rungs / (1 + count.astype(jnp.float32))


def injected(**hyperparams):
    return optax.inject_hyperparams(
        pranam_optax.pranam,
        static_args=("projection_steps", "projection_every", "key"),
    )(**hyperparams)


def revive():
    key, noise = jax.random.key(1), jnp.asarray(0.5)
    values = jnp.where(ladder() > 0, ladder(), jnp.nan)  # the first is dead

    def run(params, grads):
        state = pranam_optax.pranam().init(params)
        return pranam_optax.revive_replicas(
            params, state, key, values=values, noise=noise
        )

    return run


def resample():
    values, pull = ladder(), jnp.asarray(0.9)
    return lambda params, grads: pranam_optax.resample_replicas(
        params, optax.trace(0.9).init(params), values, pull=pull
    )


CASES = {
    "ladder": update(lambda: (pranam_optax.pranam(coupling=ladder()), {})),
    "schedule": update(lambda: (pranam_optax.pranam(coupling=falling_ladder()), {})),
    "linear_schedule": update(
        lambda: (pranam_optax.pranam(coupling=optax.linear_schedule(0.5, 0.0, 9)), {})
    ),
    "step_size": update(lambda: (pranam_optax.pranam(step_size=jnp.asarray(2.0)), {})),
    "injected": update(lambda: (injected(coupling=0.5, step_size=2.0), {})),
    "reparametrize": update(
        lambda: (
            pranam_optax.reparametrize(optax.polyak_sgd()),
            {"value": jnp.asarray(2.0), "value_fn": jnp.sum, "other": [1, True]},
        )
    ),
    "revive": revive,
    "resample": resample,
}


@pytest.mark.parametrize("name", CASES)
def test_arrays_among_the_hyperparameters(
    name, mesh, context, compiled, optax_promotion
):
    params, grads = make_params(0), make_params(1)
    expected = CASES[name]()(params, grads)
    sharded = [pranam_optax.shard_replicas(x, mesh) for x in (params, grads)]
    with context():
        result = compiled(CASES[name]())(*sharded)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-4)
    for x in jax.tree.leaves(result):
        if x.shape[:1] == (R,):
            assert x.sharding.shard_shape(x.shape)[0] == R // 2
