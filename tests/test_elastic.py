"""Elastic averaging: its equations, the replicas it leaves out, what it accepts."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax
from conftest import (
    as_matrix,
    assert_close,
    assert_equal,
    assert_same_bits,
    assert_stable,
    make_both,
    make_gradients,
    make_params,
    refused,
    scaled,
    shard,
    spoil,
    spread,
    without,
)
from pranam_optax import average_replicas, elastic_averaging

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
    assert_close(found, [[1.4, 0.3], [0.2, 0.3], [-0.6, -0.6]], 1e-6, 1e-6)
    assert_close(state.phi.bias, [7 / 3, 2], 1e-6)
    assert state.count == 1 and not state.nonfinite.any()


@pytest.mark.parametrize("strength", [0.1, 1.0, np.linspace(0, 0.5, R)])
def test_width_zero_is_elastic_averaging_sgd(strength):
    params, updates = make_both()
    found, _ = pull_together(params, updates, jnp.asarray(strength, jnp.float32))
    v = moved(params, updates)
    expected = as_matrix(updates) - np.reshape(strength, (-1, 1)) * (v - v.mean(axis=0))
    assert_close(as_matrix(found), expected, 1e-5, 1e-6)


def test_any_embedding_takes_the_projection_step_of_pranam():
    params, updates = make_both()
    found, state = pull_together(params, updates, 0.3, embedding=PLANE)
    # With a step size of 0 the target of pranam is where the replicas are.
    v = jax.tree.map(jnp.add, params, updates)
    link = pranam_optax.pranam(PLANE, step_size=0.0)
    start = programs(PLANE)[0](params)
    _, reference = jax.jit(link.update)(updates, pranam_optax.PranamState(*start), v)
    assert_close(state.phi, reference.phi, 1e-5, 1e-6)
    pull = as_matrix(v) - as_matrix(PLANE.apply(state.phi))
    assert_close(as_matrix(found), as_matrix(updates) - 0.3 * pull, 1e-4, 1e-5)


def test_the_mean_alone_is_where_its_projection_step_ends():
    """The default takes the mean; the same embedding by name takes the step."""
    params, updates = make_both()
    params = spoil(params, 2, jnp.nan)
    results = []
    for embedding in (None, pranam_optax.mlp_embedding(())):
        tx = pranam_optax.elastic_averaging(0.3, embedding)
        moved, state = tx.update(updates, tx.init(params), params)
        results.append((moved, state.phi.bias))
    assert_close(results[0], results[1], 1e-6, 1e-6)


def test_strength_zero_changes_no_bit():
    params, updates = make_both()
    updates["b"] = updates["b"].at[0].set(-0.0)
    found, _ = pull_together(params, updates, 0.0)
    assert_same_bits(found, updates)
    some = jnp.asarray(np.arange(R) % 2, jnp.float32)
    found, _ = pull_together(params, updates, some)
    assert_same_bits(found["w"][::2], updates["w"][::2])
    assert not np.any(np.asarray(found["w"][1::2]) == np.asarray(updates["w"][1::2]))


def test_schedules_see_the_count_and_are_clipped():
    params, updates = make_both()
    strengths = jnp.array([2.0, 0.2, -0.2])  # clipped to 1, 0.2, 0
    tx = elastic_averaging(lambda count: strengths[count])
    state, update = tx.init(params), jax.jit(tx.update)
    before = spread(jax.tree.map(jnp.add, params, updates))
    for kept in (0.0, 0.8, 1.0):
        found, state = update(updates, state, params)
        after = spread(jax.tree.map(jnp.add, params, found))
        assert_close(after, kept * before, 1e-5, 1e-6)
    assert_same_bits(found, updates)


def test_every_kth_step_only():
    params, updates = make_both()
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
            assert_close(found, once, 1e-5)


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
    params, updates = scaled(scale, make_both(num_replicas, seed))
    found, _ = pull_together(params, updates, strength)
    v, w = moved(params, updates), moved(params, found)
    assert_close(w.mean(axis=0), v.mean(axis=0), 1e-4, 1e-5 * scale)
    distances = (1 - strength) * (v - v.mean(axis=0))
    assert_close(w - w.mean(axis=0), distances, 1e-4, 1e-5 * scale)


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
    assert_close(average_replicas(params)["w"], [3, 4], 1e-4)  # of the four targets


# Replicas that are left out (see also test_faults)


@pytest.mark.parametrize("embedding", [None, PLANE])
def test_updates_that_cannot_be_squared_leave_their_replica_out(embedding):
    params, updates = make_both()
    dead, huge = (
        pull_together(params, spoil(updates, 2, garbage), 0.3, embedding=embedding)
        for garbage in (np.nan, 1e30)
    )
    assert_same_bits(huge, dead)
    assert not np.any(as_matrix(dead[0])[2])
    assert_equal(dead[1].nonfinite, [0, 0, 1, 0, 0, 0])


def test_a_dead_replica_might_as_well_not_be_there():
    params, updates = make_both()
    found, state = pull_together(spoil(params, 2, np.nan), updates, 0.3)
    others, alone = pull_together(without(params, 2), without(updates, 2), 0.3)
    assert_close(without(found, 2), others, 1e-5, 1e-6)
    assert_close(state.phi.bias, alone.phi.bias, 1e-5, 1e-6)


def test_with_nobody_alive_nothing_moves():
    init, update = programs()
    state = init(make_params())
    found, new = update(make_params(), state, scaled(jnp.nan, make_params()), 0.3)
    assert not np.any(as_matrix(found))
    assert_same_bits(new.phi, state.phi)


def test_a_strength_that_is_not_finite_leaves_its_replica_out():
    strength = jnp.full(R, 0.3).at[1].set(jnp.nan)
    found, state = pull_together(*make_both(), strength)
    assert not np.any(as_matrix(found)[1]) and np.all(np.isfinite(as_matrix(found)))
    assert_equal(state.nonfinite, [0, 1, 0, 0, 0, 0])


# What it accepts (see also test_contract and test_sharding)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    params, updates = make_both(dtype=dtype)
    found, state = pull_together(params, updates, 1.0)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state.phi)} == {jnp.dtype(jnp.float32)}
    mean = np.tile(moved(params, updates).mean(axis=0), (R, 1))
    atol = 16 * float(jnp.finfo(dtype).eps)
    assert_close(moved(params, found), mean, 1e-7, atol)


def test_mixed_dtypes_and_updates_wider_than_weights(x64):
    params = {**make_params(), "b": make_params(dtype=jnp.float64)["b"]}
    params["w"] = params["w"].astype(jnp.bfloat16)
    updates = jax.tree.map(lambda x: x.astype(jnp.float32), make_gradients(params))
    found, _ = pull_together(params, updates, 0.3)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    v = moved(params, updates)
    expected = as_matrix(updates) - 0.3 * (v - v.mean(axis=0))
    assert_close(as_matrix(found), expected, 1e-4, 1e-5)


def test_updates_in_half_precision_do_not_overflow():
    params = jnp.array([[6e4], [-6e4]], jnp.float16)
    found, _ = pull_together(params, -params, 0.5)
    assert np.all(np.isfinite(found)) and found.dtype == jnp.float16


def test_strength_can_be_injected_and_other_arguments_pass():
    inject = optax.inject_hyperparams(elastic_averaging, static_args=("every", "key"))
    tx, (params, updates) = inject(strength=0.3), make_both()
    state = tx.init(params)
    state.hyperparams["strength"] = jnp.asarray(0.5)
    found, _ = jax.jit(tx.update)(updates, state, params, value=1.0, other=None)
    assert_close(found, pull_together(params, updates, 0.5)[0], 1e-5)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("strength must be .* got 1.5", {"strength": 1.5}),
        ("strength must be .* got -0.1", {"strength": -0.1}),
        ("strength must be .* got nan", {"strength": np.nan}),
        ("strength must be .*one such number", {"strength": "strong"}),
        ("every must be a positive int, got 0", {"every": 0}),
        ("every must be a positive int, got 1.5", {"every": 1.5}),
    ],
)
def test_arguments_that_make_no_sense(message, arguments):
    refused(message, elastic_averaging, **arguments)


def test_errors():
    message = "embedding must be an Embedding"
    refused(message, elastic_averaging, embedding=4, error=TypeError)
    params, tx = make_params(), elastic_averaging(np.full(3, 0.1))
    message = r"strength has shape \(3,\), expected"
    refused(message, tx.update, params, tx.init(params), params)


# average_replicas


def test_the_average_of_the_living():
    params = spoil(make_params(), 2, np.nan)
    found = as_matrix(rows_of_one(average_replicas(params)))[0]
    assert_close(found, as_matrix(without(params, 2)).mean(axis=0), 1e-5)
    weights = np.array([0, 1, 5, 0, 3, 0])
    found = as_matrix(rows_of_one(jax.jit(average_replicas)(params, weights)))[0]
    assert_close(found, as_matrix(params)[[1, 4]].T @ [0.25, 0.75], 1e-5)


def rows_of_one(model):
    return jax.tree.map(lambda x: x[None], model)


def test_an_average_of_nobody_is_nan():
    params = make_params(dtype=jnp.bfloat16)
    found = average_replicas(params, np.zeros(R))
    assert found["w"].dtype == jnp.bfloat16 and found["w"].shape == (3, 2)
    assert all(np.all(np.isnan(x.astype(float))) for x in jax.tree.leaves(found))


def test_metrics_tell_whether_replicas_share_a_basin():
    params, values = make_params(), jnp.array([1.0, 2.0, jnp.nan, 3.0, 2.0, 2.0])
    metrics = pranam_optax.replica_metrics(params, values=values, average_value=7.0)
    assert_close(metrics["average_gap"], 5.0, 1e-6)
    message = "average_value needs values"
    refused(message, pranam_optax.replica_metrics, params, average_value=7.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        *((np.ones(n), r"weights has shape .* expected \(6,\)") for n in (3, (R, 1))),
        *(
            (np.array([bad, 1, 1, 1, 1, 1]), "weights must be finite and >= 0")
            for bad in (-1.0, np.nan, np.inf)
        ),
    ],
)
def test_weights_that_make_no_sense(weights, message):
    refused(message, average_replicas, make_params(), weights)
