"""Optax's own checks of contributed optimizers, run on what this package exports.

`optax.contrib._common_test` is in Optax's wheel. Its tests are run as they are; the
adapter adds the replica axis to the problems that they solve.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import _common_test as common

import pranam_optax

pytestmark = pytest.mark.usefixtures("optax_promotion")

R = 4


# The transformations, as factories of hyperparameters


EMBEDDING = pranam_optax.mlp_embedding((2,), warmup="none")  # quick to compile


def pranam_sgd(learning_rate, coupling=0.5, step_size=6.0):
    link = pranam_optax.pranam(EMBEDDING, coupling=coupling, step_size=step_size)
    return optax.chain(link, optax.sgd(learning_rate))


def pranam_adam(learning_rate, coupling=0.5, step_size=6.0):
    link = pranam_optax.pranam(EMBEDDING, coupling=coupling, step_size=step_size)
    return optax.chain(link, optax.adam(learning_rate))


def reparametrize(learning_rate):
    return pranam_optax.reparametrize(optax.adam(learning_rate), EMBEDDING)


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
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
DTYPES = ["bfloat16", slow("float32")]


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

    def run(test, name, **kwargs):
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


@pytest.mark.parametrize("dtype", DTYPES)
@every_factory
def test_preserve_dtype(check, name, dtype):
    check("test_preserve_dtype", name, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@every_factory
def test_gradient_accumulation(check, name, dtype):
    check("test_gradient_accumulation", name, dtype=dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, slow("float16"), slow("float64")])
@every_factory
def test_state_stability(check, name, dtype):
    check("test_state_shape_dtype_shard_stability", name, dtype=jnp.dtype(dtype))


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


# After Optax's tests of its own optimizers (float64_test, sharding_test)


def make_params(dtype=jnp.float32):
    w = jnp.arange(R * 6, dtype=jnp.float32).reshape(R, 2, 3)
    return {"w": jnp.cos(w), "b": jnp.sin(jnp.arange(R, dtype=dtype))}


@every_factory
def test_abstract_init(name):
    tx, params = FACTORIES[name](0.1), make_params()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    abstract = jax.eval_shape(tx.init, shapes)
    concrete = jax.jit(tx.init)(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, concrete)
    mapped = optax.tree.map_params(tx, lambda x: x, concrete)
    chex.assert_trees_all_equal(mapped, concrete)


@every_factory
def test_mixed_dtypes(name, x64):
    tx, params = FACTORIES[name](0.1), make_params(jnp.float64)

    def step(params):
        state = tx.init(params)
        updates, new_state = tx.update(params, state, params)
        return state, new_state, updates

    state, new_state, updates = jax.eval_shape(step, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert updates["b"].dtype == jnp.float64
    assert updates["w"].dtype == jnp.float32


@every_factory
def test_donation(name):
    """The state shares no buffer with the params, and takes its successor's place."""
    tx, params = FACTORIES[name](0.1), make_params()
    init = jax.jit(tx.init)
    expected = jax.jit(tx.update)(params, init(params), params)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    state = init(params)
    result = step(jax.tree.map(jnp.copy, params), state, params)
    chex.assert_trees_all_equal(result, expected)
    chex.assert_tree_all_finite(params)
    assert any(x.is_deleted() for x in jax.tree.leaves(state))


@every_factory
def test_sharding(name, assert_stable):
    """From init on each part of the state is where it stays."""
    mesh = jax.make_mesh((R,), ("replicas",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("replicas"))
    params = jax.device_put(make_params(), sharding)
    tx = FACTORIES[name](0.1)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    first = step(params, state)
    second = step(*first)
    assert_stable(first, second)
    for x in jax.tree.leaves(first[0]):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    if name == "per_replica":  # the others hold Optax's states, which begin on one
        assert_stable((params, state), first)
