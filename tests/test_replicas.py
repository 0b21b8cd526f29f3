import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pranam_optax


def init(key):
    w_key, b_key = jax.random.split(key)
    return {"w": jax.random.normal(w_key, (3, 2)), "b": jax.random.normal(b_key, ())}


def loss(params, x, y, weight=1.0):
    prediction = x @ params["w"] + params["b"]
    return weight * jnp.mean((prediction - y) ** 2)


def data(n):
    key = jax.random.key(7)
    return jax.random.normal(key, (n, 3)), jax.random.normal(key, (n, 2))


def test_replicate_initialises_each_replica_from_its_own_key():
    params = pranam_optax.replicate(init, 3, 4)
    for r, key in enumerate(jax.random.split(jax.random.key(3), 4)):
        chex.assert_trees_all_equal(
            pranam_optax.select_replica(params, r), jax.jit(init)(key)
        )


def test_replicate_takes_seeds_and_both_kinds_of_keys():
    by_seed = pranam_optax.replicate(init, 3, 4)
    chex.assert_trees_all_equal(
        by_seed, pranam_optax.replicate(init, jax.random.key(3), 4)
    )
    chex.assert_trees_all_equal(
        by_seed, pranam_optax.replicate(init, jax.random.PRNGKey(3), 4)
    )


@pytest.mark.parametrize("num_replicas", [0, -1, 2.0])
def test_replicate_refuses_other_numbers(num_replicas):
    with pytest.raises(ValueError, match="num_replicas must be a positive int"):
        pranam_optax.replicate(init, 0, num_replicas)


def test_shared_batch_equals_a_loop_over_replicas():
    params = pranam_optax.replicate(init, 0, 4)
    x, y = data(8)
    values, grads = pranam_optax.replica_value_and_grad(loss)(params, x, y, weight=2.0)
    assert values.shape == (4,)
    for r in range(4):
        value, grad = jax.value_and_grad(loss)(
            pranam_optax.select_replica(params, r), x, y, 2.0
        )
        np.testing.assert_allclose(values[r], value, rtol=1e-6)
        chex.assert_trees_all_close(
            pranam_optax.select_replica(grads, r), grad, rtol=1e-5
        )


def test_split_batch_gives_each_replica_its_part():
    params = pranam_optax.replicate(init, 0, 4)
    x, y = data(8)
    grad_fn = pranam_optax.replica_value_and_grad(loss, batch="split")
    values, grads = grad_fn(params, x, y, weight=2.0)
    for r in range(4):
        part = slice(2 * r, 2 * r + 2)
        value, grad = jax.value_and_grad(loss)(
            pranam_optax.select_replica(params, r), x[part], y[part], 2.0
        )
        np.testing.assert_allclose(values[r], value, rtol=1e-6)
        chex.assert_trees_all_close(
            pranam_optax.select_replica(grads, r), grad, rtol=1e-5
        )


@pytest.mark.parametrize("batch", ["shared", "split"])
def test_aux_gets_a_replica_axis(batch):
    def loss_and_aux(params, x, y):
        return loss(params, x, y), {"x": x, "b": params["b"]}

    params = pranam_optax.replicate(init, 0, 4)
    x, y = data(8)
    plain = pranam_optax.replica_value_and_grad(loss, batch=batch)
    with_aux = pranam_optax.replica_value_and_grad(
        loss_and_aux, has_aux=True, batch=batch
    )
    (values, aux), grads = with_aux(params, x, y)
    expected_values, expected_grads = plain(params, x, y)
    np.testing.assert_array_equal(values, expected_values)
    chex.assert_trees_all_equal(grads, expected_grads)
    np.testing.assert_array_equal(aux["b"], params["b"])
    assert aux["x"].shape == ((4, 8, 3) if batch == "shared" else (4, 2, 3))


def test_batch_errors():
    params = pranam_optax.replicate(init, 0, 4)
    split = pranam_optax.replica_value_and_grad(loss, batch="split")
    with pytest.raises(ValueError, match=r"argument\[0\] has shape \(6, 3\)"):
        split(params, *data(6))
    with pytest.raises(ValueError, match=r"argument\[1\] has shape \(\)"):
        split(params, data(8)[0], 0.0)
    with pytest.raises(ValueError, match="batch must be 'shared' or 'split', got 'x'"):
        pranam_optax.replica_value_and_grad(loss, batch="x")
    with pytest.raises(
        ValueError, match=r"params\['b'\] has shape \(\) and no replica"
    ):
        pranam_optax.replica_value_and_grad(loss)(init(jax.random.key(0)), *data(8))


def test_select_replica():
    params = pranam_optax.replicate(init, 0, 4)
    expected = jax.tree.map(lambda x: x[2], params)
    chex.assert_trees_all_equal(pranam_optax.select_replica(params, 2), expected)
    chex.assert_trees_all_equal(pranam_optax.select_replica(params, -2), expected)
    chex.assert_trees_all_equal(
        jax.jit(pranam_optax.select_replica)(params, jnp.asarray(2)), expected
    )
    host = jax.tree.map(np.asarray, params)
    chex.assert_trees_all_equal(
        jax.jit(lambda i: pranam_optax.select_replica(host, i))(2), expected
    )
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"replica {index} of 4"):
            pranam_optax.select_replica(params, index)


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([3.0, 1.0, 2.0], 1),
        ([np.nan, 5.0, 2.0], 2),
        ([np.nan, -np.nan, np.inf], 2),
        ([np.nan, 1e30, np.inf], 1),
        ([np.nan, np.nan, np.nan], 0),
        ([1.0, -np.inf, np.nan], 1),
    ],
)
def test_best_replica(values, best):
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    for fn in (pranam_optax.best_replica, jax.jit(pranam_optax.best_replica)):
        np.testing.assert_array_equal(
            fn(params, jnp.array(values))["w"], params["w"][best]
        )


def test_best_replica_needs_one_value_per_replica():
    with pytest.raises(ValueError, match=r"values has shape \(2,\), expected \(3,\)"):
        pranam_optax.best_replica(jnp.zeros((3, 2)), jnp.zeros(2))
