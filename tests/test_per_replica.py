"""`per_replica`: what one replica does is no other's concern."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

import pranam_optax
from conftest import (
    assert_close,
    assert_equal,
    make_gradients,
    refused,
    rows,
    slow_unless,
)

R = 3
TRANSFORMATIONS = {
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 2),
    "clip_by_global_norm": optax.chain(
        optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)
    ),
    "dog": contrib.dog(1.0),
    "lbfgs": optax.lbfgs(),
    "mechanize": contrib.mechanize(optax.sgd(1.0)),
    "prodigy": contrib.prodigy(),
    "momo": contrib.momo(),
    "adafactor": optax.adafactor(0.1),
    "backtracking": optax.chain(
        optax.sgd(0.5), optax.scale_by_backtracking_linesearch(8)
    ),
    "galore": contrib.galore(0.1, rank=1),
    "muon": contrib.muon(0.1),
    "reduce_on_plateau": optax.chain(
        optax.sgd(0.1), contrib.reduce_on_plateau(patience=1)
    ),
    "schedule_free_adamw": contrib.schedule_free_adamw(0.1),
}
QUICK = ["apply_if_finite", "clip_by_global_norm", "dog", "lbfgs", "mechanize"]


def loss(params):
    return 3.0 + sum(jnp.sum(0.1 * x**2 + jnp.cos(x)) for x in jax.tree.leaves(params))


grad_fn = jax.jit(pranam_optax.replica_value_and_grad(loss))


@pytest.fixture
def params():
    shapes = {"w": (R, 2, 3), "b": (R, 3)}
    drawn = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return make_gradients(drawn)


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def without_keys(tree):
    def data(x):
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if key else x

    return jax.tree.map(data, tree)


def make_step(tx, value_and_grad, value_name, traces):
    @jax.jit
    def step(params, state):
        traces.append(value_name)
        value, grads = value_and_grad(params)
        given = {value_name: value, "grad": grads, "value_fn": loss}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("name", slow_unless(QUICK, TRANSFORMATIONS))
def test_equals_separate_runs(name, params, optax_promotion):
    """And the bits of one are the same with the others spoiled."""
    tx = TRANSFORMATIONS[name]
    together, alone = pranam_optax.per_replica(tx), optax.with_extra_args_support(tx)
    traces = []
    step = make_step(together, grad_fn, "values", traces)
    step_alone = make_step(alone, jax.value_and_grad(loss), "value", traces)

    def run(step, init, params):
        state = init(params)
        for _ in range(3):
            params, state = step(params, state)
        return params, without_keys(state)

    init_alone = jax.jit(alone.init)
    init = jax.jit(together.init)
    result = run(step, init, params)
    expected = stack([run(step_alone, init_alone, rows(params, r)) for r in range(R)])
    # XLA rounds differently in programs of other shapes, by an ulp here and there.
    assert_close(result, expected, 2e-5, 2e-6)
    chex.assert_trees_all_equal_dtypes(result, expected)

    factors = np.array([np.nan, 1, -3], np.float32)[:, None]
    spoiled = {"w": params["w"] * factors[..., None], "b": params["b"] * factors}
    spoiled = run(step, init, spoiled)
    assert_equal(rows(spoiled, 1), rows(result, 1))
    assert traces.count("values") == 1


def test_only_the_replica_that_is_not_finite_waits(params, optax_promotion):
    tx = pranam_optax.per_replica(optax.apply_if_finite(optax.sgd(0.1), 5))
    grads = jax.tree.map(lambda x: x.at[1].set(jnp.inf), params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_equal(state.notfinite_count, [0, 1, 0])
    for update, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        assert_close(update[::2], -0.1 * g[::2], 1e-6)
        assert_equal(update[1], 0.0)


def test_one_learning_rate_for_each_replica(params, optax_promotion):
    tx = pranam_optax.per_replica(optax.inject_hyperparams(optax.adam)(0.0))
    rates = jnp.array([0.1, 0.02, 0.3])
    state = optax.tree.set(jax.jit(tx.init)(params), learning_rate=rates)
    update, adam = jax.jit(tx.update), optax.scale_by_adam()
    expected_state = adam.init(params)
    for _ in range(2):
        updates, state = update(params, state, params)
        steps, expected_state = jax.jit(adam.update)(params, expected_state)
        assert_close(updates["b"], -rates[:, None] * steps["b"], 1e-5)
    assert_equal(state.hyperparams["learning_rate"], rates)


def test_what_each_replica_sees_of_the_keywords():
    seen = {}

    def update_fn(updates, state, params=None, **extra_args):
        assert params is None
        seen.update(extra_args)
        shift = extra_args["value"] + extra_args["shared"]
        return jax.tree.map(lambda u: u + shift, updates), state

    identity = optax.identity()
    tx = optax.GradientTransformationExtraArgs(identity.init, update_fn)
    tx = pranam_optax.per_replica(tx)
    grads = jnp.zeros((R, 2))
    partial = jax.tree_util.Partial(jnp.add, jnp.ones(7))
    updates, _ = tx.update(
        grads,
        tx.init(grads),
        values=jnp.array([1.0, 2.0, 3.0]),
        value=jnp.float32(99.0),
        shared=jnp.float32(10.0),
        grad={"a": jnp.ones((R, 4)), "b": None, "c": 2.5},
        value_fn=loss,
        partial=partial,
        name="text",
    )
    assert_equal(updates, [[11.0] * 2, [12.0] * 2, [13.0] * 2])
    assert "values" not in seen
    assert seen["value_fn"] is loss
    assert seen["partial"] is partial
    assert seen["name"] == "text"
    assert seen["value"].shape == ()
    assert seen["grad"]["a"].shape == (4,)
    assert seen["grad"]["b"] is None
    assert seen["grad"]["c"] == 2.5


def test_gradients_of_a_callable_model_are_no_function():
    class Model(NamedTuple):
        w: jax.Array

        def __call__(self, x):
            return self.w * x

    def update_fn(updates, state, params=None, *, grad):
        return jax.tree.map(lambda u, g: u + jnp.sum(g), updates, grad), state

    tx = optax.GradientTransformationExtraArgs(optax.identity().init, update_fn)
    model = Model(jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    tx = pranam_optax.per_replica(tx)
    updates, _ = tx.update(model, tx.init(model), grad=model)
    assert_equal(updates.w, [[4, 5], [10, 11], [16, 17]])


def test_keywords_that_the_transformation_does_not_know(params):
    tx = pranam_optax.per_replica(optax.scale(2.0))
    updates, _ = tx.update(params, tx.init(params), values=jnp.ones(R), other=loss)
    assert_equal(updates, jax.tree.map(lambda x: 2 * x, params))


def test_errors(params):
    tx = pranam_optax.per_replica(optax.adam(0.1))
    state = jax.jit(tx.init)(params)
    fewer, one = rows(params, slice(2)), jnp.ones(())
    refused(r"params\['b'\] has shape \(\) and no replica", tx.init, {"b": one})
    disagree = {"w": jnp.ones(2), "b": jnp.ones(3)}
    refused("leaves disagree on the number of replicas", tx.update, disagree, state)
    message, integers = "updates has dtype int32", jnp.ones(3, jnp.int32)
    refused(message, tx.update, integers, state, error=TypeError)

    def raises(match, grads, state, params, **keywords):
        refused(match, tx.update, grads, state, params, **keywords)

    message = r"values has shape \(2,\), expected \(3,\)"
    raises(message, params, state, params, values=jnp.ones(2))
    message, grad = r"grad\['w'\] has shape \(4, 2\), but updates", jnp.ones((4, 2))
    raises(message, params, state, params, grad={"w": grad})
    raises(r"params\['b'\] has shape \(3, 3\), but .* 2", fewer, state, params)
    raises(r"state\[0\]\.count has shape \(3,\), but", fewer, state, fewer)
    of_one = optax.adam(0.1).init(params)
    raises(r"state\[0\]\.count has shape \(\), but", params, of_one, params)


def test_a_new_state_keeps_signed_zeros_and_other_types():
    def init_fn(params):
        return {
            "zero": -jnp.zeros_like(params),
            "flag": jnp.array([True, False]),
            "count": jnp.uint8(7),
            "key": jax.random.key(3),
        }

    tx = optax.GradientTransformation(init_fn, optax.identity().update)
    state = pranam_optax.per_replica(tx).init(jnp.ones((R, 2)))
    assert np.all(np.signbit(state["zero"]))
    assert_equal(state["flag"], [[True, False]] * R)
    assert state["count"].dtype == jnp.uint8
    assert_equal(state["count"], [7] * R)
    assert jnp.all(state["key"] == jax.random.key(3))


@pytest.mark.parametrize(("name", "axis_type"), [("dog", "Auto"), ("adam", "Explicit")])
def test_replicas_stay_on_their_devices(name, axis_type):
    mesh = jax.make_mesh(
        (4,), ("replicas",), axis_types=(jax.sharding.AxisType[axis_type],)
    )
    sharding = NamedSharding(mesh, PartitionSpec("replicas"))
    params = jax.device_put(jnp.arange(24.0).reshape(8, 3), sharding)
    transformation = {"adam": optax.adam(0.1), "dog": contrib.dog(1.0)}[name]
    tx = pranam_optax.per_replica(transformation)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        step, traces = jax.jit(lambda *x: traces.append(x) or tx.update(*x)), []
        states = [jax.jit(tx.init)(params)]
        for _ in range(2):
            updates, state = step(params, states[-1], params)
            states.append(state)
        assert len(traces) == 1
        text = step.lower(params, state, params).compile().as_text()
    for x in jax.tree.leaves((states, updates)):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
