"""`weight_replicas`: the weights, their limits and bad losses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax

R = 4
VALUES = jnp.array([3.0, 1.0, 2.0, 6.0])


@pytest.fixture(scope="module")
def grads():
    key = jax.random.key(0)
    return {"w": jax.random.normal(key, (R, 3)), "b": jax.random.normal(key, (R,))}


@functools.partial(jax.jit, static_argnums=2)
def weighted_ones(values, temperature, dtype):
    grads = jnp.ones((len(values), 1), dtype)
    tx = pranam_optax.weight_replicas(temperature)
    return tx.update(grads, tx.init(grads), values=values)[0]


def weights(values, temperature=1.0, dtype=jnp.float32):
    """What a gradient of ones becomes."""
    updates = weighted_ones(values, temperature, dtype)
    assert updates.dtype == dtype
    return np.asarray(updates[:, 0], np.float64)


def expected_weights(values, temperature):
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    v = values[finite]
    softmin = np.exp(-(v - v.mean()) / v.std() / temperature)
    result = np.zeros(len(values))
    result[finite] = len(v) * softmin / softmin.sum()
    return result


@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(
    "values", [VALUES, VALUES.at[1].set(jnp.nan), VALUES.at[0].set(-jnp.inf)]
)
def test_weights_equal_the_formula(values, temperature):
    result = weights(values, temperature)
    expected = expected_weights(values, temperature)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-7)


def test_updates_are_the_weighted_gradients(grads):
    tx = pranam_optax.weight_replicas(1.0)
    state = tx.init(grads)
    updates, state = jax.jit(tx.update)(grads, state, values=VALUES, other=None)
    w = expected_weights(VALUES, 1.0)
    np.testing.assert_allclose(updates["w"], w[:, None] * grads["w"], rtol=1e-5)
    np.testing.assert_allclose(updates["b"], w * grads["b"], rtol=1e-5)
    assert state.count == 1


@pytest.mark.parametrize("num_replicas", [1, 3, 49])
@pytest.mark.parametrize("value", [0.0, -2.5, 3e38, 1e-38])
def test_equal_losses_change_nothing(num_replicas, value):
    np.testing.assert_array_equal(weights(jnp.full(num_replicas, value)), 1.0)


@pytest.mark.parametrize("factor", [1e-30, 1e37])
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_scale_and_offset_of_the_loss_do_not_matter(factor, offset):
    scaled = weights(factor * (VALUES + offset))
    np.testing.assert_allclose(scaled, weights(VALUES), rtol=1e-5)


def test_limits_of_the_temperature():
    np.testing.assert_array_equal(weights(VALUES, np.inf), 1.0)
    np.testing.assert_array_equal(weights(VALUES, 0.0), [0, R, 0, 0])
    np.testing.assert_array_equal(weights(VALUES, 1e-38), [0, R, 0, 0])
    np.testing.assert_array_equal(weights(VALUES.at[2].set(1.0), 0.0), [0, 2, 2, 0])
    np.testing.assert_array_equal(weights(jnp.ones(R), 0.0), 1.0)


def test_schedule_of_the_temperature(grads):
    tx = pranam_optax.weight_replicas(lambda count: 1.0 - count.astype(jnp.float32))
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(grads)
    for temperature in (1.0, 0.0, 0.0):  # the last one clipped
        updates, state = update(grads, state, values=VALUES)
        w = weights(VALUES, temperature)
        np.testing.assert_allclose(updates["b"], w * grads["b"], rtol=1e-6)
    assert state.count == 3


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_the_others_are_weighted_as_if_a_bad_replica_were_not_there(bad):
    spoiled = jnp.concatenate([VALUES[:2], jnp.array([bad]), VALUES[2:]])
    result = weights(spoiled)
    assert result[2] == 0.0
    np.testing.assert_allclose(np.delete(result, 2), weights(VALUES), rtol=1e-6)
    # The sums are over another number of terms; in place of the others, no bit changes.
    np.testing.assert_array_equal(result, weights(spoiled.at[2].set(jnp.nan)))


def test_no_finite_loss_at_all(grads):
    tx = pranam_optax.weight_replicas(1.0)
    spoiled = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads)
    for values in (jnp.full(R, jnp.nan), jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0])):
        updates, _ = jax.jit(tx.update)(spoiled, tx.init(grads), values=values)
        dead = ~jnp.isfinite(values)
        for update in jax.tree.leaves(updates):
            np.testing.assert_array_equal(update[dead], 0.0)
            assert jnp.all(jnp.isnan(update[~dead]))  # left for pranam to see


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    values = VALUES.astype(dtype)
    np.testing.assert_allclose(
        weights(values, dtype=dtype), expected_weights(VALUES, 1.0), rtol=1e-2
    )


def test_double_precision(x64):
    values = VALUES.astype(jnp.float64)
    np.testing.assert_allclose(
        weights(values, dtype=jnp.float64), expected_weights(VALUES, 1.0), rtol=1e-14
    )


def test_the_embedding_follows_the_better_replicas(grads):
    params = jax.tree.map(jnp.zeros_like, grads)
    pull_to_mean = pranam_optax.Embedding(
        init=lambda key, params: jax.tree.map(lambda x: x[0], params),
        apply=lambda phi: jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (R, *x.shape)), phi
        ),
    )
    tx = optax.chain(
        pranam_optax.weight_replicas(0.0), pranam_optax.pranam(pull_to_mean)
    )
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(grads, state, params, values=VALUES)
    best = pranam_optax.best_replica(grads, VALUES)
    for r in range(R):  # all move along the gradient of the best
        cosine = optax.tree.vdot(pranam_optax.select_replica(updates, r), best)
        norms = optax.tree.norm(pranam_optax.select_replica(updates, r))
        np.testing.assert_allclose(cosine / norms / optax.tree.norm(best), 1, rtol=1e-6)


def test_errors(grads):
    for temperature in (-1.0, np.nan, [1.0]):
        with pytest.raises(ValueError, match="temperature must be a number >= 0"):
            pranam_optax.weight_replicas(temperature)
    tx = pranam_optax.weight_replicas(1.0)
    state = tx.init(grads)
    with pytest.raises(ValueError, match=r"call tx.update\(.*values=values\)"):
        tx.update(grads, state)
    for values in (jnp.ones(3), jnp.ones((R, 1)), jnp.ones(())):
        with pytest.raises(ValueError, match=r"values has shape .* expected \(4,\)"):
            tx.update(grads, state, values=values)
    with pytest.raises(ValueError, match=r"params\['b'\] has shape \(3,\)"):
        tx.init({"a": jnp.ones(R), "b": jnp.ones(3)})
    with pytest.raises(TypeError, match="updates has dtype int32"):
        tx.update(jnp.ones(R, jnp.int32), state, values=VALUES)
