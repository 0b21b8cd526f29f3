"""Optax's own checks of contributed optimizers, run on what this package exports.

`optax.contrib._common_test` is in Optax's wheel. Its tests are run as they are; the
adapter adds the replica axis to the problems that they solve.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import _common_test as common

import pranam_optax
from conftest import assert_close, make_mesh, make_params, refused, shard

pytestmark = pytest.mark.usefixtures("optax_promotion")

R = 4


# The transformations, as factories of hyperparameters


PLANE = pranam_optax.mlp_embedding((2,))


def pranam(learning_rate, coupling=0.5, step_size=6.0):
    link = pranam_optax.pranam(PLANE, coupling=coupling, step_size=step_size)
    return optax.chain(link, optax.adam(learning_rate))


def reparametrize(learning_rate):
    return pranam_optax.reparametrize(optax.adam(learning_rate), PLANE)


def elastic_averaging(learning_rate, strength=0.1):
    link = pranam_optax.elastic_averaging(strength)
    return optax.chain(optax.adam(learning_rate), link)


def per_replica(learning_rate, max_norm=1.0):
    tx = optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(learning_rate))
    return pranam_optax.per_replica(tx)


FACTORIES = {
    f.__name__: f for f in (pranam, reparametrize, elastic_averaging, per_replica)
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


CHECKS = [
    ("optimizers_accept_extra_args", {"wrap": False}),
    ("optimizers_can_be_wrapped_in_inject_hyperparams", {}),
    ("preserve_dtype", {"dtype": "bfloat16"}),
    ("gradient_accumulation", {"dtype": "bfloat16"}),
    ("state_shape_dtype_shard_stability", {"dtype": jnp.dtype("bfloat16")}),
]
SLOW_CHECKS = [
    ("preserve_dtype", {"dtype": "float32"}),
    ("gradient_accumulation", {"dtype": "float32"}),
    *(
        ("state_shape_dtype_shard_stability", {"dtype": jnp.dtype(dtype)})
        for dtype in ("float16", "float32", "float64")
    ),
    *(
        ("optimizers", {"dtype": "float32", "target": target})
        for target in SETUPS.values()
    ),
]


@pytest.mark.parametrize(
    ("test", "kwargs"),
    [*CHECKS, *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW_CHECKS)],
)
@every_factory
def test_checks_of_optax(test, kwargs, name, monkeypatch):
    monkeypatch.setattr(common, "_get_opt_factory", FACTORIES.__getitem__)
    for setup, stacked in SETUPS.items():
        monkeypatch.setattr(common, setup, stacked)
    rate = 1e-3 if (test, name) == ("optimizers", "pranam") else 1e-2
    given = {"opt_name": name, "opt_kwargs": {"learning_rate": rate}, **kwargs}
    unwrapped = getattr(common.ContribTest, f"test_{test}0").__wrapped__
    unwrapped(common.ContribTest(), wrapper_name=None, wrapper_kwargs=None, **given)


# After Optax's tests of its own optimizers (float64_test, sharding_test)


@functools.cache
def compiled(name):
    tx = FACTORIES[name](0.1)
    return jax.jit(tx.init), jax.jit(tx.update)


@every_factory
def test_init_is_abstract_and_takes_a_tree_without_leaves(name):
    tx, params = FACTORIES[name](0.1), make_params(R)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = compiled(name)[0](params)
    abstract = jax.eval_shape(tx.init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    # Optax calls `init` on a placeholder to find out what is like the params.
    mapped = optax.tree.map_params(tx, lambda x: jnp.zeros_like(x) + 7, state)
    for path, x in jax.tree_util.tree_leaves_with_path(mapped):
        like_params = re.search(r"\['[wb]'\]$", jax.tree_util.keystr(path))
        assert jnp.all(x == 7) if like_params else not jnp.any(x == 7)


@every_factory
def test_mixed_dtypes(name, x64):
    tx = FACTORIES[name](0.1)
    params = {**make_params(R), "b": make_params(R, dtype=jnp.float64)["b"]}

    def step(params):
        state = tx.init(params)
        updates, new_state = tx.update(params, state, params)
        return state, new_state, updates

    state, new_state, updates = jax.eval_shape(step, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@every_factory
def test_with_and_without_jit_agree(name):
    """Also on arrays of NumPy, in a precision that JAX has not got."""
    init, update = compiled(name)
    params = make_params(R)
    expected = update(params, init(params), params)
    params = {k: np.asarray(x, np.float64) for k, x in params.items()}
    actual = FACTORIES[name](0.1).update(params, init(params), params)
    chex.assert_trees_all_equal_dtypes(actual, expected)
    assert_close(actual, expected, 1e-4, 1e-5)


@every_factory
def test_sharded_steps_take_the_place_of_their_input(name):
    """The state shares no buffer with the params, and all stays where it is."""
    params, tx = make_params(R), FACTORIES[name](0.1)
    init, update = compiled(name)
    expected = params, init(params)
    for _ in range(2):
        updates, state = update(expected[0], expected[1], expected[0])
        expected = optax.apply_updates(expected[0], updates), state

    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        traces.append(params)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = shard(params, make_mesh("Auto", R, 1))
    start = params, init(params)
    first = step(*start)
    types = jax.eval_shape(lambda: first)
    shardings = jax.tree.map(lambda x: x.sharding, first)
    second = step(*first)
    assert len(traces) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(types, second)
    for x, place in zip(*map(jax.tree.leaves, (second, shardings)), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    for x in jax.tree.leaves(second[0]):
        assert x.sharding.shard_shape(x.shape)[0] == 1
    assert any(x.is_deleted() for x in jax.tree.leaves(start[1]))
    assert_close(second, expected, 1e-4, 1e-5)


# Errors, the same of all


LINKS = {
    "pranam": pranam_optax.pranam(),
    "pranam to the mean": pranam_optax.pranam(pranam_optax.mlp_embedding(())),
    "elastic_averaging": pranam_optax.elastic_averaging(),
    "reparametrize": pranam_optax.reparametrize(optax.sgd(0.1)),
}
every_link = pytest.mark.parametrize("name", LINKS)
W, B = np.ones((6, 3, 2), "f4"), np.ones(6, "f4")
GOOD, FOUR = {"w": W, "b": B}, {"w": W[:4], "b": B[:4]}
TURNED = {"w": W.reshape(6, 2, 3), "b": B}
DEEP = r"params\['deep'\]\[0\] has shape"
SHORT = {"a": W[:3], "b": {"c": W[:4]}}
DISAGREE = r"\['a'\] has shape \(3, 3, 2\), {0}\['b'\]\['c'\] has shape \(4, 3, 2\)"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"w": W, "deep": [B[0]]},
            r"params\['deep'\]\[0\] has shape \(\) and no replica",
        ),
        (
            {"w": W, "deep": [W[:0]]},
            r"params\['deep'\]\[0\] has shape \(0, 3, 2\) .* axis",
        ),
        (SHORT, "params" + DISAGREE.format("params")),
    ],
)
@every_link
def test_trees_without_replicas(name, tree, message):
    refused(message, LINKS[name].init, tree)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.bool_])
@every_link
def test_leaves_must_be_floating(name, dtype):
    tx, tree = LINKS[name], {"w": W, "b": B.astype(dtype)}
    state = jax.eval_shape(tx.init, GOOD)
    message = rf"\['b'\] has dtype {np.dtype(dtype).name} \(shape .* floating-point"
    refused("params" + message, tx.init, tree, error=TypeError)
    refused("updates" + message, tx.update, tree, state, GOOD, error=TypeError)


@pytest.mark.parametrize(
    ("grads", "params", "start", "message"),
    [
        (GOOD, None, GOOD, r"{} needs .* call tx.update\(grads, state, params\)"),
        ({}, {}, {}, "updates has no leaves; {} needs at least one"),
        (SHORT, GOOD, GOOD, "updates" + DISAGREE.format("updates")),
        ({"w": W}, GOOD, GOOD, r"updates\['b'\] is missing and params\['b'\]"),
        (GOOD | {"c": B}, GOOD, GOOD, r"has shape \(6,\) and params\['c'\] is missing"),
        (TURNED, GOOD, GOOD, r"updates\['w'\] has shape \(6, 2, 3\) and"),
        ([W, B], (W, B), GOOD, "same structure, but updates is PyTreeDef"),
        (GOOD, GOOD, FOUR, "params has 6 replicas, but the state .* 4"),
        # These would broadcast.
        (
            GOOD,
            GOOD,
            GOOD | {"w": W[:, :1]},
            r"makes params\['w'\] of shape \(6, 1, 2\), but .* has shape \(6, 3, 2\)",
        ),
        (GOOD, GOOD, {"w": W}, r"params\['b'\] has shape \(6,\) and .* missing"),
        (GOOD, GOOD, GOOD | {"c": B}, r"makes params\['c'\] .* missing"),
    ],
)
@every_link
def test_what_does_not_go_together(name, grads, params, start, message):
    tx = LINKS[name]
    state = jax.eval_shape(tx.init, start)
    refused(message.format(name.split()[0]), tx.update, grads, state, params)


@pytest.mark.parametrize("state", [None, {}, (optax.EmptyState(),)])
@every_link
def test_what_is_no_state(name, state):
    message = r"must be the {}State .*update\(grads, state, params"
    message = message.format(name.split()[0].title().replace("_", ""))
    refused(message, LINKS[name].update, GOOD, state, GOOD, error=TypeError)
