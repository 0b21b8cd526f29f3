"""Replicas on the default mesh, whose axes are Explicit: the same numbers."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pranam_optax

R = 8


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("replicas", "model"))


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


def shard(tree, mesh):
    """Replicas along one axis of the mesh and the models along the other."""

    def place(x):
        spec = ("replicas", *(None,) * (x.ndim - 2), "model")
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, tree)


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2)


@jax.jit
def train(params, x):
    tx = pranam_optax.pranam()
    values, grads = pranam_optax.replica_value_and_grad(loss)(params, x)
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state, values, grads


READERS = {
    "best_replica": lambda params, _, values, __: pranam_optax.best_replica(
        params, values
    ),
    "select_replica": lambda params, *_: [
        pranam_optax.select_replica(params, index) for index in (-2, jnp.array(3))
    ],
    "embedding_output": lambda _, state, *__: pranam_optax.embedding_output(state),
    "replica_metrics": lambda *trained: pranam_optax.replica_metrics(
        *trained, updated=trained[1], coupling=ladder(), step_size=4.0
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_read_out(name, mesh, context, compiled):
    params, x = make_params(), jnp.ones((5, 3))
    expected = READERS[name](*train(params, x))
    trained = train(shard(params, mesh), x)
    with context():
        result = compiled(READERS[name])(*trained)
    chex.assert_trees_all_close(result, expected, rtol=1e-3, atol=1e-4)
    if name != "replica_metrics":
        for leaf in jax.tree.leaves(result):
            assert leaf.sharding.shard_shape(leaf.shape)[-1] == leaf.shape[-1] // 2


def test_output_of_any_embedding(mesh, context, compiled):
    embedding = pranam_optax.Embedding(
        init=lambda key, params: params, apply=lambda phi: jax.tree.map(jnp.sin, phi)
    )
    tx, params = pranam_optax.pranam(embedding), make_params()
    with context():
        state = tx.init(shard(params, mesh))
        output = compiled(pranam_optax.embedding_output)(state)
    chex.assert_trees_all_close(output, jax.tree.map(jnp.sin, params), rtol=1e-5)
    assert output["w"].sharding.shard_shape((R, 3, 2)) == (R // 2, 3, 2)


def test_split_batch(mesh, context):
    params, x = make_params(), jax.random.normal(jax.random.key(1), (2 * R, 3))
    grad_fn = jax.jit(pranam_optax.replica_value_and_grad(loss, batch="split"))
    expected = grad_fn(params, x)
    for place in (PartitionSpec(), PartitionSpec("replicas")):
        with context():
            spread = jax.device_put(x, NamedSharding(mesh, place))
            result = grad_fn(shard(params, mesh), spread)
        chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)


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
    sharded = shard([params, grads], mesh)
    with context():
        result = compiled(CASES[name]())(*sharded)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-4)
    for x in jax.tree.leaves(result):
        if x.shape[:1] == (R,):
            assert x.sharding.shard_shape(x.shape)[0] == R // 2
