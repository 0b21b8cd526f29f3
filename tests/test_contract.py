"""Optax's own checks of contributed optimizers, run on what this package exports.

`optax.contrib._common_test` is in Optax's wheel. Its tests are run as they are; the
adapter adds the replica axis to the problems that they solve.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import _common_test as common

import pranam_optax

pytestmark = pytest.mark.usefixtures("optax_promotion")

R = 4


# The transformations, as factories of hyperparameters


def pranam_sgd(learning_rate, coupling=0.5, step_size=6.0):
    link = pranam_optax.pranam(coupling=coupling, step_size=step_size)
    return optax.chain(link, optax.sgd(learning_rate))


def pranam_adam(learning_rate, coupling=0.5, step_size=6.0):
    link = pranam_optax.pranam(coupling=coupling, step_size=step_size)
    return optax.chain(link, optax.adam(learning_rate))


def reparametrize(learning_rate):
    return pranam_optax.reparametrize(optax.adam(learning_rate))


def with_values(tx):
    """Passes on losses, which the checks do not know of: those of ||params||^2."""

    def update_fn(updates, state, params=None, **extra_args):
        squares = [
            jnp.sum(jnp.square(x), axis=range(1, x.ndim))
            for x in jax.tree.leaves(params)
        ]
        values = sum(x.astype(jnp.float32) for x in squares)
        return tx.update(updates, state, params, values=values, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def weight_replicas(learning_rate, temperature=1.0):
    link = pranam_optax.weight_replicas(temperature)
    return with_values(optax.chain(link, optax.adam(learning_rate)))


def per_replica(learning_rate, max_norm=1.0):
    tx = optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(learning_rate))
    return pranam_optax.per_replica(tx)


FACTORIES = {
    f.__name__: f
    for f in (pranam_sgd, pranam_adam, reparametrize, weight_replicas, per_replica)
}
every_factory = pytest.mark.parametrize("name", FACTORIES)


def add_replica_axis(target):
    """R copies of a problem of Optax's, from different initial params."""

    def setup(dtype):
        params, solution, fun = target(dtype)
        offsets = jnp.arange(R, dtype=dtype) / R

        def stack(x):
            return x[None] + offsets.reshape(R, *(1,) * x.ndim)

        def total(params):
            return jnp.sum(jax.vmap(fun)(params))

        solution = jax.tree.map(lambda x: jnp.stack([x] * R), solution)
        return jax.tree.map(stack, params), solution, total

    return setup


SETUPS = {
    name: add_replica_axis(getattr(common, name))
    for name in (
        "_setup_parabola",
        "_setup_rosenbrock",
        "_setup_matrix_parabola",
        "_setup_mixed_tensor_target",
    )
}


@pytest.fixture
def check(monkeypatch):
    """`check(test, name, ...)`: runs a test of Optax's on one of the factories."""
    monkeypatch.setattr(common, "_get_opt_factory", FACTORIES.__getitem__)
    for setup, stacked in SETUPS.items():
        monkeypatch.setattr(common, setup, stacked)
    case = common.ContribTest()

    def run(test, name, wrapped=True, **kwargs):
        unwrapped = getattr(common.ContribTest, f"{test}0").__wrapped__
        kwargs = {"opt_kwargs": {"learning_rate": 1e-2}, **kwargs}
        none = {"wrapper_name": None, "wrapper_kwargs": None}
        unwrapped(case, opt_name=name, **none, **kwargs)

    return run


@every_factory
def test_extra_args(check, name):
    check("test_optimizers_accept_extra_args", name, wrap=False)


@every_factory
def test_inject_hyperparams(check, name):
    check("test_optimizers_can_be_wrapped_in_inject_hyperparams", name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@every_factory
def test_preserve_dtype(check, name, dtype):
    check("test_preserve_dtype", name, dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@every_factory
def test_gradient_accumulation(check, name, dtype):
    check("test_gradient_accumulation", name, dtype=dtype)


@pytest.mark.parametrize(
    "dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]
)
@every_factory
def test_state_stability(check, name, dtype):
    check("test_state_shape_dtype_shard_stability", name, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("target", SETUPS)
@every_factory
def test_map_params_and_convergence(check, name, target):
    rates = {"pranam_sgd": 1e-3, "pranam_adam": 1e-3}
    check(
        "test_optimizers",
        name,
        opt_kwargs={"learning_rate": rates.get(name, 1e-2)},
        target=SETUPS[target],
        dtype="float32",
    )
