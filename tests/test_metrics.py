"""What to watch, against NumPy."""

import functools

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
    make_both,
    make_gradients,
    make_params,
    refused,
    rows,
    scaled,
    spoil,
    spread,
)

R = 7
PLANE = pranam_optax.mlp_embedding((2,))
LINK = pranam_optax.pranam(PLANE)
VALUES = jnp.arange(R) ** 2 / 10

metrics_of = jax.jit(functools.partial(pranam_optax.replica_metrics, embedding=PLANE))


@functools.cache
def state_for():
    return jax.jit(LINK.init)(make_params(R, 2))


def effective_rank(weights):
    values = np.linalg.svd(weights - weights.mean(axis=0), compute_uv=False)
    p = values[values > 1e-6 * values[0]] / values.sum()
    return np.exp(-np.sum(p * np.log(p)))


@pytest.mark.parametrize("broken", [None, 3])
def test_metrics_against_numpy(broken):
    params, grads = make_both(R)
    state = state_for()._replace(nonfinite=jnp.array([0, 0, 2, 0, 1, 0, 0]))
    keep = np.arange(R) != broken
    if broken is not None:
        grads = spoil(grads, broken, jnp.inf)
    nested = (optax.EmptyState(), {"link": state})
    metrics = metrics_of(params, nested, VALUES, grads)

    weights, gradients = as_matrix(params)[keep], as_matrix(grads)[keep]
    losses = np.asarray(VALUES)[keep]
    units = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    pulls = weights - as_matrix(PLANE.apply(state.phi))[keep]
    cosines, lengths = units @ units.T, np.linalg.norm(pulls, axis=1)
    expected = {
        "dead": int(broken is not None),
        "duplicates": 0,
        "spread": spread(rows(params, keep)),
        "effective_rank": effective_rank(weights),
        "loss_mean": losses.mean(),
        "loss_std": losses.std(),
        "loss_min": losses.min(),
        "loss_max": losses.max(),
        "gradient_rms": np.sqrt(np.mean(gradients**2)),
        "gradient_cosine": cosines[~np.eye(len(cosines), dtype=bool)].mean(),
        "embedding_distance": np.sqrt(np.mean(pulls**2)),
        "nonfinite": 3,
        "pull_cosine": np.mean(np.sum(units * pulls, axis=1) / lengths),
    }
    assert_close(metrics, expected, 1e-4, 1e-6)


def test_masked_leaves_have_no_part_in_the_pull():
    params, grads = make_both(R)
    masked = optax.masked(LINK, {"w": True, "b": False})
    state = jax.jit(masked.init)(make_params(R, 2))
    whole = metrics_of(params, state, None, grads)
    inner = state.inner_state  # without the places of masked leaves
    phi = inner.phi
    phi = phi._replace(heads={"w": phi.heads["w"]}, bias={"w": phi.bias["w"]})
    params, grads = ({"w": tree["w"]} for tree in (params, grads))
    part = metrics_of(params, inner._replace(phi=phi), None, grads)
    for name in ("embedding_distance", "pull_cosine"):
        assert_close(whole[name], part[name], 1e-5)
    assert whole["spread"] != part["spread"]  # of all leaves


def test_mixed_dtypes(x64):
    @jax.jit
    def metrics(params):
        state, values = LINK.init(params), jnp.arange(R, dtype=jnp.float32)
        return metrics_of(params, state, values, make_gradients(params))

    wide = make_params(R, dtype=jnp.float64)
    expected = metrics(wide)
    assert expected["embedding_distance"].dtype == jnp.float64
    narrow = wide | {"w": wide["w"].astype(jnp.bfloat16)}
    assert_close(metrics(narrow), expected, 0.05, 0.01)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_effective_rank_counts_equal_directions(rank):
    weights = np.zeros((8, 20), np.float32)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    basis -= basis.mean(axis=0)
    for i in range(rank):
        weights += np.outer(np.linalg.qr(basis)[0][:, i], 5 * np.eye(20)[i])
    metrics = metrics_of(jnp.asarray(weights))
    expected = effective_rank(weights) if rank else 0
    assert_close(metrics["effective_rank"], expected, 1e-3)
    assert metrics["duplicates"] == (0 if rank else 7)
    assert metrics.keys() == {"dead", "duplicates", "spread", "effective_rank"}


def test_where_none_is_alive_there_is_nothing_to_tell():
    params, grads = scaled(jnp.nan, make_both(R))
    metrics = metrics_of(params, state_for(), VALUES, grads)
    counts = {"dead": R, "duplicates": 0, "nonfinite": 0}
    assert_equal(metrics, dict.fromkeys(metrics, np.nan) | counts)


def test_errors():
    params = make_params(R)

    def raises(match, *args):
        fun = functools.partial(pranam_optax.replica_metrics, embedding=PLANE)
        refused(match, fun, params, *args)

    raises(r"values has shape \(3,\), expected \(7,\)", None, jnp.zeros(3))
    raises("grads has 4 replicas, params has 7", None, None, make_params(4))
    raises("one embedding, found 0", optax.adam(1.0).init(params))
    state = jax.jit(LINK.init)({"v": params["w"]})
    raises(r"\['v'\] of shape \(7, 3, 2\)", state)
