"""Making replicas, their gradients, and picking one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pranam_optax
from conftest import assert_close, assert_equal, make_params, refused, rows

R = 4


def init(key):
    w_key, b_key = jax.random.split(key)
    return {"w": jax.random.normal(w_key, (3, 2)), "b": jax.random.normal(b_key, ())}


def loss(params, x, y, weight=1.0):
    prediction = x @ params["w"] + params["b"]
    return weight * jnp.mean((prediction - y) ** 2)


def loss_and_aux(params, x, y, weight=1.0):
    return loss(params, x, y, weight), {"x": x, "b": params["b"]}


def data(n):
    rng = np.random.default_rng(7)
    return tuple(jnp.asarray(rng.normal(size=(n, k)), jnp.float32) for k in (3, 2))


def test_replicate_initialises_each_replica_from_its_own_key():
    compiled = jax.jit(init)
    for key in (3, jax.random.key(3), jax.random.PRNGKey(3)):
        params = pranam_optax.replicate(init, key, R)
        for r, key in enumerate(jax.random.split(jax.random.key(3), R)):
            expected = compiled(key)
            assert_close(rows(params, r), expected, 1e-6)


@pytest.mark.parametrize("num_replicas", [0, -1, 2.0, True])
def test_replicate_refuses_other_numbers(num_replicas):
    message = "num_replicas must be a positive int"
    refused(message, pranam_optax.replicate, init, 0, num_replicas)


def test_replicate_takes_integers_of_numpy():
    params = pranam_optax.replicate(init, 3, np.int64(R))
    assert params["b"].shape == (R,)


@pytest.mark.parametrize("batch", ["shared", "split"])
def test_gradients_equal_a_loop_over_replicas(batch):
    params, (x, y) = make_params(R), data(2 * R)
    grad_fn = pranam_optax.replica_value_and_grad(
        loss_and_aux, has_aux=True, batch=batch
    )
    (values, aux), grads = jax.jit(grad_fn)(params, x, y, weight=2.0)
    one = jax.jit(jax.value_and_grad(loss))
    assert values.shape == (R,)
    for r in range(R):
        part = slice(2 * r, 2 * r + 2) if batch == "split" else slice(None)
        value, grad = one(rows(params, r), x[part], y[part], 2.0)
        assert_close(values[r], value, 1e-6)
        assert_close(rows(grads, r), grad, 1e-5)
        assert_equal(aux["x"][r], x[part])
    assert_equal(aux["b"], params["b"])

    plain = pranam_optax.replica_value_and_grad(loss, batch=batch)
    expected = jax.jit(plain)(params, x, y, weight=2.0)
    assert_close([values, grads], list(expected), 1e-6)


def test_batch_errors():
    params = make_params(R)

    split = pranam_optax.replica_value_and_grad(loss, batch="split")

    def raises(match, params, *args):
        refused(match, split, params, *args)

    raises(r"argument\[0\] has shape \(6, 3\)", params, *data(6))
    raises(r"argument\[1\] has shape \(\)", params, data(8)[0], 0.0)
    one = {"w": jnp.ones((3, 2)), "b": jnp.ones(())}
    raises(r"params\['b'\] has shape \(\) and no replica", one, *data(8))
    message = "batch must be 'shared' or 'split', got 'x'"
    refused(message, pranam_optax.replica_value_and_grad, loss, batch="x")


@pytest.mark.parametrize("index", [2, -2, np.int64(2), np.int32(-2)])
def test_select_replica(index):
    params = make_params(R)
    expected = rows(params, 2)
    assert_equal(pranam_optax.select_replica(params, index), expected)
    host = jax.tree.map(np.asarray, params)
    traced = jax.jit(lambda i: pranam_optax.select_replica(host, i))
    assert_equal(traced(index), expected)


@pytest.mark.parametrize("index", [4, -5, np.int64(4), np.int32(-5)])
def test_select_replica_out_of_range(index):
    params, message = make_params(R), f"replica {index} of 4"
    refused(message, pranam_optax.select_replica, params, index, error=IndexError)


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
    params = make_params(3)
    for given in (values, jnp.array(values)):
        found = pranam_optax.best_replica(params, given)
        assert_equal(found, rows(params, best))


def test_best_replica_needs_one_value_per_replica():
    message, params = r"values has shape \(2,\), expected \(3,\)", jnp.zeros((3, 2))
    refused(message, pranam_optax.best_replica, params, jnp.zeros(2))
