"""Elastic averaging: its equations, the replicas it leaves out, what it accepts."""

import functools
import pickle
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType

import pranam_optax
from conftest import (
    as_matrix,
    assert_same_bits,
    assert_stable,
    make_gradients,
    make_params,
    shard,
    spoil,
    spread,
    without,
)
from pranam_optax import elastic_averaging

R = 6
PLANE = pranam_optax.mlp_embedding((2,))


@functools.cache
def programs(embedding=None, every=1):
    """`init` and `update(updates, state, params, strength)`, compiled once."""

    def update(updates, state, params, strength):
        tx = elastic_averaging(strength, embedding, every=every)
        return tx.update(updates, state, params)

    init = elastic_averaging(embedding=embedding, every=every).init
    return jax.jit(init), jax.jit(update)


def pull_together(params, updates, strength, **options):
    """Updates and state of one step."""
    init, update = programs(**options)
    return update(updates, init(params), params, strength)


def moved(params, updates):
    return as_matrix(params) + as_matrix(updates)


# The equations


def test_a_step_by_hand():
    params = jnp.array([[0.0, 1.0], [4.0, 1.0], [2.0, 4.0]])
    updates = jnp.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    # V is (1, 1), (5, 1), (1, 4), with the mean (7/3, 2).
    found, state = pull_together(params, updates, 0.3)
    np.testing.assert_allclose(
        found, [[1.4, 0.3], [0.2, 0.3], [-0.6, -0.6]], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(state.phi.bias, [7 / 3, 2], rtol=1e-6)
    assert state.count == 1 and not state.nonfinite.any()


@pytest.mark.parametrize("strength", [0.1, 1.0, np.linspace(0, 0.5, R)])
def test_width_zero_is_elastic_averaging_sgd(strength):
    params, updates = make_params(), make_gradients(make_params())
    found, _ = pull_together(params, updates, jnp.asarray(strength, jnp.float32))
    v = moved(params, updates)
    expected = as_matrix(updates) - np.reshape(strength, (-1, 1)) * (v - v.mean(axis=0))
    np.testing.assert_allclose(as_matrix(found), expected, rtol=1e-5, atol=1e-6)


def test_any_embedding_takes_the_projection_step_of_pranam():
    params, updates = make_params(), make_gradients(make_params())
    found, state = pull_together(params, updates, 0.3, embedding=PLANE)
    # With a step size of 0 the target of pranam is where the replicas are.
    v = jax.tree.map(jnp.add, params, updates)
    link = pranam_optax.pranam(PLANE, step_size=0.0)
    start = programs(PLANE)[0](params)
    _, reference = jax.jit(link.update)(updates, pranam_optax.PranamState(*start), v)
    for x, y in zip(*map(jax.tree.leaves, (state.phi, reference.phi)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    pull = as_matrix(v) - as_matrix(PLANE.apply(state.phi))
    expected = as_matrix(updates) - 0.3 * pull
    np.testing.assert_allclose(as_matrix(found), expected, rtol=1e-4, atol=1e-5)


def test_strength_zero_changes_no_bit():
    params, updates = make_params(), make_gradients(make_params())
    updates["b"] = updates["b"].at[0].set(-0.0)
    found, _ = pull_together(params, updates, 0.0)
    assert_same_bits(found, updates)
    some = jnp.asarray(np.arange(R) % 2, jnp.float32)
    found, _ = pull_together(params, updates, some)
    assert_same_bits(found["w"][::2], updates["w"][::2])
    assert not np.any(np.asarray(found["w"][1::2]) == np.asarray(updates["w"][1::2]))


def test_schedules_see_the_count_and_are_clipped():
    params, updates = make_params(), make_gradients(make_params())
    strengths = jnp.array([2.0, 0.2, -0.2])  # clipped to 1, 0.2, 0
    tx = elastic_averaging(lambda count: strengths[count])
    state, update = tx.init(params), jax.jit(tx.update)
    before = spread(jax.tree.map(jnp.add, params, updates))
    for kept in (0.0, 0.8, 1.0):
        found, state = update(updates, state, params)
        after = spread(jax.tree.map(jnp.add, params, found))
        np.testing.assert_allclose(after, kept * before, rtol=1e-5, atol=1e-6)
    assert_same_bits(found, updates)


def test_every_kth_step_only():
    params, updates = make_params(), make_gradients(make_params())
    init, update = programs(every=3)
    once, _ = pull_together(params, updates, 0.5)
    state = init(params)
    for step in range(1, 7):
        before = state
        found, state = update(updates, state, params, 0.5)
        assert_stable(before, state)
        if step % 3:
            assert_same_bits((found, state.phi), (updates, before.phi))
        else:
            np.testing.assert_allclose(as_matrix(found), as_matrix(once), rtol=1e-5)


@pytest.mark.optimized
def test_nothing_is_communicated_between_meetings():
    def text(every):
        params = shard(make_params(8), jax.make_mesh((4,), ("replicas",)))
        tx = elastic_averaging(every=every)
        state = jax.jit(tx.init)(params)
        return jax.jit(tx.update).lower(params, state, params).compile().as_text()

    assert "all-reduce" in text(1)
    seldom = text(16)
    assert "all-reduce" in seldom
    entry = re.search(r"\nENTRY .*?\n}", seldom, re.DOTALL).group()
    assert "all-reduce" not in entry and "all-gather" not in entry


@hypothesis.given(
    num_replicas=st.sampled_from([1, 2, 7]),
    strength=st.floats(0, 1, width=32),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_the_mean_stays_and_the_spread_shrinks(num_replicas, strength, seed, scale):
    params = make_params(num_replicas, seed)
    updates = make_gradients(params, seed + 1)
    params, updates = jax.tree.map(lambda x: scale * x, (params, updates))
    found, _ = pull_together(params, updates, strength)
    v, w = moved(params, updates), moved(params, found)
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * scale}
    np.testing.assert_allclose(w.mean(axis=0), v.mean(axis=0), **tolerance)
    distances = (1 - strength) * (v - v.mean(axis=0))
    np.testing.assert_allclose(w - w.mean(axis=0), distances, **tolerance)


def test_replicas_of_one_bowl_end_as_one_model():
    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda x: x - jnp.arange(8.0).reshape(4, 2), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    tx = optax.chain(optax.sgd(0.1), elastic_averaging(0.5))
    params = {"w": jnp.zeros((4, 2))}
    carry = params, tx.init(params)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 200))(carry)
    average = pranam_optax.average_replicas(params)
    np.testing.assert_allclose(average["w"], [3, 4], rtol=1e-4)  # of the four targets


# Replicas that are left out


@pytest.mark.parametrize("embedding", [None, PLANE])
@pytest.mark.parametrize("where", ["params", "updates"])
def test_garbage_in_one_replica_changes_no_bit_of_another(embedding, where):
    params, updates = make_params(), make_gradients(make_params())
    runs = []
    for garbage in (np.nan, np.inf, -np.inf, 1e30):
        trees = {"params": params, "updates": updates}
        trees[where] = spoil(trees[where], 2, garbage)
        init, update = programs(embedding)
        state = init(params)
        for _ in range(3):
            found, state = update(trees["updates"], state, trees["params"], 0.3)
        assert not np.any(as_matrix(found)[2])
        np.testing.assert_array_equal(state.nonfinite, [0, 0, 3, 0, 0, 0])
        runs.append((found, state))
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


def test_a_dead_replica_might_as_well_not_be_there():
    params, updates = make_params(), make_gradients(make_params())
    dead = spoil(params, 2, np.nan)
    found, state = pull_together(dead, updates, 0.3)
    others, alone = pull_together(without(params, 2), without(updates, 2), 0.3)
    np.testing.assert_allclose(
        as_matrix(without(found, 2)), as_matrix(others), rtol=1e-5, atol=1e-6
    )
    for x, y in zip(
        *map(jax.tree.leaves, (state.phi.bias, alone.phi.bias)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_with_nobody_alive_nothing_moves():
    params = jax.tree.map(lambda x: x * jnp.nan, make_params())
    init, update = programs()
    state = init(make_params())
    found, new = update(make_params(), state, params, 0.3)
    assert not np.any(as_matrix(found))
    assert_same_bits(new.phi, state.phi)


def test_a_strength_that_is_not_finite_leaves_its_replica_out():
    params, updates = make_params(), make_gradients(make_params())
    strength = jnp.full(R, 0.3).at[1].set(jnp.nan)
    found, state = pull_together(params, updates, strength)
    assert not np.any(as_matrix(found)[1]) and np.all(np.isfinite(as_matrix(found)))
    np.testing.assert_array_equal(state.nonfinite, [0, 1, 0, 0, 0, 0])


# What it accepts


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    params, updates = make_params(dtype=dtype), make_gradients(make_params(dtype=dtype))
    found, state = pull_together(params, updates, 1.0)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state.phi)} == {jnp.dtype(jnp.float32)}
    v = moved(params, updates)
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        moved(params, found), np.tile(v.mean(axis=0), (R, 1)), atol=4 * tolerance
    )


def test_mixed_dtypes_and_updates_wider_than_weights(x64):
    params = {**make_params(), "b": make_params(dtype=jnp.float64)["b"]}
    params["w"] = params["w"].astype(jnp.bfloat16)
    updates = jax.tree.map(lambda x: x.astype(jnp.float32), make_gradients(params))
    tx = elastic_averaging(0.3)
    found, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    v = moved(params, updates)
    expected = as_matrix(updates) - 0.3 * (v - v.mean(axis=0))
    np.testing.assert_allclose(as_matrix(found), expected, rtol=1e-4, atol=1e-5)


def test_updates_in_half_precision_do_not_overflow():
    params = jnp.array([[6e4], [-6e4]], jnp.float16)
    found, _ = pull_together(params, -params, 0.5)
    assert np.all(np.isfinite(found)) and found.dtype == jnp.float16


@pytest.mark.parametrize(
    ("axis_type", "embedding", "every", "model_axis"),
    [
        (AxisType.Auto, None, 2, None),
        (AxisType.Explicit, None, 1, "model"),
        (AxisType.Explicit, PLANE, 2, None),
    ],
)
def test_sharded_replicas(axis_type, embedding, every, model_axis):
    mesh = jax.make_mesh((2, 2), ("replicas", "model"), axis_types=(axis_type,) * 2)
    tx = elastic_averaging(0.3, embedding, every=every)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(params)
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    def run(params):
        states = [(params, jax.jit(tx.init)(params))]
        for _ in range(2):
            states.append(step(*states[-1]))
        assert_stable(states[0], states[-1])
        return states[-1]

    params = make_params(8)
    (expected, _), (found, _) = run(params), run(shard(params, mesh, model_axis))
    assert len(traces) == 2  # one for each
    np.testing.assert_allclose(
        as_matrix(found), as_matrix(expected), rtol=1e-4, atol=1e-5
    )


def test_the_state_is_arrays():
    params = make_params()
    tx = elastic_averaging(0.3, PLANE, every=2)
    state = jax.eval_shape(tx.init, params)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))
    state = programs(PLANE)[0](params)
    assert_same_bits(pickle.loads(pickle.dumps(state)), state)
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    assert_same_bits(restored, state)
    assert tx.init({}).nonfinite.shape == (0,)  # as optax.tree.map_params asks


def test_strength_can_be_injected_and_other_arguments_pass():
    inject = optax.inject_hyperparams(elastic_averaging, static_args=("every", "key"))
    tx, params = inject(strength=0.3), make_params()
    updates = make_gradients(params)
    state = tx.init(params)
    state.hyperparams["strength"] = jnp.asarray(0.5)
    found, _ = jax.jit(tx.update)(updates, state, params, value=1.0, other=None)
    expected, _ = pull_together(params, updates, 0.5)
    np.testing.assert_allclose(as_matrix(found), as_matrix(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "strength must be .* got 1.5", {"strength": 1.5}),
        (ValueError, "strength must be .* got -0.1", {"strength": -0.1}),
        (ValueError, "strength must be .* got nan", {"strength": np.nan}),
        (ValueError, "strength must be .*one such number", {"strength": "strong"}),
        (ValueError, "every must be a positive int, got 0", {"every": 0}),
        (ValueError, "every must be a positive int, got 1.5", {"every": 1.5}),
        (TypeError, "embedding must be an Embedding", {"embedding": 4}),
    ],
)
def test_arguments_that_make_no_sense(error, message, arguments):
    with pytest.raises(error, match=message):
        elastic_averaging(**arguments)


def test_errors_of_update():
    params = make_params()
    tx = elastic_averaging()
    state = tx.init(params)
    with pytest.raises(
        ValueError, match="elastic_averaging needs the replicas' params"
    ):
        tx.update(params, state)
    with pytest.raises(ValueError, match="params has 5 replicas, but the state was"):
        tx.update(without(params, 0), state, without(params, 0))
    with pytest.raises(ValueError, match=r"updates\['b'\] is missing"):
        tx.update({"w": params["w"]}, state, params)
    with pytest.raises(TypeError, match="must be the ElasticAveragingState"):
        tx.update(params, optax.EmptyState(), params)
    with pytest.raises(ValueError, match=r"strength has shape \(3,\), expected"):
        elastic_averaging(np.full(3, 0.1)).update(params, state, params)
    with pytest.raises(ValueError, match="no replica axis"):
        tx.init({"w": jnp.asarray(1.0)})
    with pytest.raises(TypeError, match="floating-point"):
        tx.init({"w": jnp.arange(3)})


# average_replicas


def test_the_average_of_the_living():
    params = spoil(make_params(), 2, np.nan)
    found = pranam_optax.average_replicas(params)
    expected = as_matrix(without(params, 2)).mean(axis=0)
    np.testing.assert_allclose(
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)]), expected, 1e-5
    )
    weights = np.array([0, 1, 5, 0, 3, 0])
    found = jax.jit(pranam_optax.average_replicas)(params, weights)
    expected = as_matrix(params)[[1, 4]].T @ [0.25, 0.75]
    np.testing.assert_allclose(
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)]), expected, 1e-5
    )


def test_an_average_of_nobody_is_nan():
    params = make_params(dtype=jnp.bfloat16)
    found = pranam_optax.average_replicas(params, np.zeros(R))
    assert found["w"].dtype == jnp.bfloat16 and found["w"].shape == (3, 2)
    assert all(np.all(np.isnan(x.astype(float))) for x in jax.tree.leaves(found))


def test_metrics_tell_whether_replicas_share_a_basin():
    params, values = make_params(), jnp.array([1.0, 2.0, jnp.nan, 3.0, 2.0, 2.0])
    metrics = pranam_optax.replica_metrics(params, values=values, average_value=7.0)
    np.testing.assert_allclose(metrics["average_gap"], 5.0, rtol=1e-6)
    with pytest.raises(ValueError, match="average_value needs values"):
        pranam_optax.replica_metrics(params, average_value=7.0)


@pytest.mark.parametrize("weights", [np.ones(3), np.ones((R, 1))])
def test_weights_of_another_shape(weights):
    with pytest.raises(ValueError, match=r"weights has shape .* expected \(6,\)"):
        pranam_optax.average_replicas(make_params(), weights)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_weights_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="weights must be finite and >= 0"):
        pranam_optax.average_replicas(make_params(), np.array([bad, 1, 1, 1, 1, 1]))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_average_of_sharded_replicas(axis_type):
    mesh = jax.make_mesh((2, 2), ("replicas", "model"), axis_types=(axis_type,) * 2)
    params = make_params(8)
    found = pranam_optax.average_replicas(shard(params, mesh, "model"))
    expected = pranam_optax.average_replicas(params)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
