"""What to watch, against NumPy and full Hessians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax

R = 7


def make(seed=0, num_replicas=R):
    def init(key):
        a, b = jax.random.split(key)
        return {"w": jax.random.normal(a, (4, 3)), "b": 3 + jax.random.normal(b, (2,))}

    return pranam_optax.replicate(init, seed, num_replicas)


def flat(tree):
    return np.concatenate(
        [np.asarray(x, float).reshape(len(x), -1) for x in jax.tree.leaves(tree)],
        axis=1,
    )


def effective_rank(weights):
    values = np.linalg.svd(weights - weights.mean(axis=0), compute_uv=False)
    p = values[values > 1e-6 * values[0]] / values.sum()
    return np.exp(-np.sum(p * np.log(p)))


@pytest.mark.parametrize("broken", [None, 3])
def test_metrics_against_numpy(broken):
    params, grads = make(0), make(1)
    values = jnp.arange(R) ** 2 / 10
    tx = optax.chain(pranam_optax.pranam(), optax.sgd(0.1))
    state = tx.init(make(2))
    keep = np.arange(R) != broken
    if broken is not None:
        grads["w"] = grads["w"].at[broken, 0, 0].set(jnp.inf)
    metrics = jax.jit(pranam_optax.replica_metrics)(params, state, values, grads)

    weights, gradients, losses = flat(params)[keep], flat(grads)[keep], values[keep]
    units = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    pulls = weights - flat(pranam_optax.embedding_output(state))[keep]
    cosines = units @ units.T
    expected = {
        "dead": int(broken is not None),
        "duplicates": 0,
        "spread": np.sqrt(np.mean((weights - weights.mean(axis=0)) ** 2)),
        "effective_rank": effective_rank(weights),
        "loss_mean": losses.mean(),
        "loss_std": losses.std(),
        "loss_min": losses.min(),
        "loss_max": losses.max(),
        "gradient_rms": np.sqrt(np.mean(gradients**2)),
        "gradient_cosine": cosines[~np.eye(len(cosines), dtype=bool)].mean(),
        "embedding_distance": np.sqrt(np.mean(pulls**2)),
        "nonfinite": 0,
        "revived": 0,
        "pull_cosine": np.mean(
            np.sum(units * pulls, axis=1) / np.linalg.norm(pulls, axis=1)
        ),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("broken", [None, 3])
def test_projection_against_numpy(broken):
    params, grads, step_size = make(0), make(1), 3.0
    couplings = jnp.linspace(0.0, 1.2, R)  # clipped to 1

    def coupling(count):
        return couplings / (1 + count.astype(jnp.float32))

    tx = pranam_optax.pranam(coupling=coupling, step_size=step_size)
    state = tx.init(params)
    _, state = tx.update(make(2), state, params)
    if broken is not None:
        grads["w"] = grads["w"].at[broken, 0, 0].set(jnp.inf)
    _, updated = tx.update(grads, state, params)

    @jax.jit
    def watch(params, state, grads, updated):
        return pranam_optax.replica_metrics(
            params,
            state,
            grads=grads,
            updated=updated,
            coupling=coupling,
            step_size=step_size,
        )

    metrics = watch(params, state, grads, updated)
    keep = np.arange(R) != broken
    weights, gradients = flat(params)[keep], flat(grads)[keep]
    spread = np.sqrt(np.mean((weights - weights.mean(axis=0)) ** 2))
    target = weights - step_size * spread * gradients / np.sqrt(np.mean(gradients**2))
    before, after = (
        flat(pranam_optax.embedding_output(s))[keep] for s in (state, updated)
    )
    projected = weights - after
    cosines = np.sum(gradients * projected, axis=1) / (
        np.linalg.norm(gradients, axis=1) * np.linalg.norm(projected, axis=1)
    )
    expected = {
        "coupling": np.mean(np.asarray(couplings)[keep] / 2),
        "projection_cosine": cosines.mean(),
        "projection_before": np.sum((before - target) ** 2) / 2,
        "projection_after": np.sum((after - target) ** 2) / 2,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    assert metrics["projection_after"] < metrics["projection_before"]


def test_masked_leaves_have_no_part_in_the_pull(optax_promotion):
    params, grads = make(0), make(1)
    tx = pranam_optax.pranam()
    masked = optax.masked(tx, {"w": True, "b": False})

    @functools.partial(jax.jit, static_argnums=0)
    def metrics(tx, params, start, grads):
        state = tx.init(start)
        updated = tx.update(grads, state, params)[1]
        return pranam_optax.replica_metrics(
            params, state, None, grads, updated=updated, step_size=4.0
        )

    whole = metrics(masked, params, make(2), grads)
    part = metrics(tx, *({"w": x["w"]} for x in (params, make(2), grads)))
    for name in (
        "embedding_distance",
        "pull_cosine",
        "projection_cosine",
        "projection_before",
        "projection_after",
    ):
        np.testing.assert_allclose(whole[name], part[name], rtol=1e-5)
    assert whole["spread"] != part["spread"]  # of all leaves


def test_mixed_dtypes(x64):
    dtypes = {"w": jnp.bfloat16, "b": jnp.float64}
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (make(0), make(1)))
    mixed = tuple({k: x.astype(dtypes[k]) for k, x in tree.items()} for tree in wide)
    found = []
    for params, grads in (wide, mixed):
        tx = pranam_optax.pranam(coupling=0.5)
        state = tx.init(params)
        _, updated = tx.update(grads, state, params)
        metrics = pranam_optax.replica_metrics(
            params,
            state,
            jnp.arange(R, dtype=jnp.float32),
            grads,
            updated=updated,
            coupling=0.5,
            step_size=4.0,
        )
        found.append(metrics)
    assert found[0]["projection_after"].dtype == jnp.float64
    for name, value in found[0].items():
        np.testing.assert_allclose(
            found[1][name], value, rtol=0.05, atol=0.01, err_msg=name
        )


def test_what_is_not_given_is_left_out():
    params, grads = make(0), make(1)
    state = pranam_optax.pranam().init(params)

    def names(*args, **keywords):
        return set(pranam_optax.replica_metrics(params, *args, **keywords))

    alone = names()
    assert names(coupling=2.0) - alone == {"coupling"}
    assert names(updated=state, step_size=4.0) == alone
    assert names(grads=grads, updated=state, step_size=4.0) - names(grads=grads) == {
        "projection_cosine"
    }
    assert names(coupling=2.0) == names(coupling=2.0, step_size=4.0)
    assert pranam_optax.replica_metrics(params, coupling=2.0)["coupling"] == 1


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_effective_rank_counts_equal_directions(rank):
    weights = np.zeros((8, 20), np.float32)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    basis -= basis.mean(axis=0)
    for i in range(rank):
        weights += np.outer(np.linalg.qr(basis)[0][:, i], 5 * np.eye(20)[i])
    metrics = pranam_optax.replica_metrics(jnp.asarray(weights))
    np.testing.assert_allclose(
        metrics["effective_rank"], effective_rank(weights) if rank else 0, rtol=1e-3
    )
    assert metrics["duplicates"] == (0 if rank else 7)


def test_all_dead():
    params = jax.tree.map(lambda x: x * jnp.nan, make())
    metrics = pranam_optax.replica_metrics(params, values=jnp.zeros(R), grads=make(1))
    assert metrics["dead"] == R
    assert metrics["spread"] == metrics["effective_rank"] == 0
    assert metrics["gradient_cosine"] == 0


def test_the_state_counts_what_was_left_out():
    params, grads = make(0), make(1)
    tx = pranam_optax.pranam()
    state = tx.init(params)
    grads["b"] = grads["b"].at[2].set(jnp.nan)
    for _ in range(2):
        _, state = tx.update(grads, state, params)
    assert pranam_optax.replica_metrics(params, state)["nonfinite"] == 2


def test_curvature_against_the_full_hessian():
    def fun(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"]) ** 2) + jnp.sum(params["b"] ** 4)

    params, x = make(), jax.random.normal(jax.random.key(3), (5, 4))
    found = jax.jit(pranam_optax.replica_curvature(fun))(params, x)
    for r in range(R):
        one = pranam_optax.select_replica(params, r)
        flattened, unflatten = jax.flatten_util.ravel_pytree(one)
        loss = lambda v: fun(unflatten(v), x)  # noqa: E731
        g, h = jax.grad(loss)(flattened), jax.hessian(loss)(flattened)
        np.testing.assert_allclose(found["slope"][r], g @ g, rtol=1e-4)
        np.testing.assert_allclose(found["curvature"][r], g @ h @ g, rtol=1e-4)


@pytest.mark.parametrize(
    ("activation", "slope"),
    [
        (jnp.tanh, lambda z: 1 - np.tanh(z) ** 2),
        (jax.nn.relu, lambda z: z > 0),
        (jax.nn.sigmoid, lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
    ],
)
@pytest.mark.parametrize("threshold", [0.05, 0.2])
def test_saturation_against_numpy(activation, slope, threshold):
    inputs = 2 * jax.random.normal(jax.random.key(0), (R, 50, 3))
    flat = slope(np.asarray(inputs, float)) < threshold
    np.testing.assert_allclose(
        pranam_optax.replica_saturation(activation, inputs, threshold=threshold),
        flat.mean(axis=(1, 2)),
        rtol=1e-6,
    )


def test_errors():
    params = make()
    with pytest.raises(ValueError, match=r"values has shape \(3,\), expected \(7,\)"):
        pranam_optax.replica_metrics(params, values=jnp.zeros(3))
    with pytest.raises(ValueError, match="grads has 4 replicas, params has 7"):
        pranam_optax.replica_metrics(params, grads=make(0, 4))
    with pytest.raises(ValueError, match="one embedding, found 0"):
        pranam_optax.replica_metrics(params, optax.adam(1.0).init(params))
    state = jax.eval_shape(pranam_optax.pranam().init, {"v": params["w"]})
    with pytest.raises(ValueError, match=r"makes a leaf \['v'\] of shape \(7, 4, 3\)"):
        jax.eval_shape(pranam_optax.replica_metrics, params, state)
    with pytest.raises(ValueError, match="no replica axis"):
        pranam_optax.replica_curvature(jnp.sum)(jnp.zeros([]))
    with pytest.raises(ValueError, match="no replica axis"):
        pranam_optax.replica_saturation(jnp.tanh, jnp.zeros([]))
    with pytest.raises(ValueError, match="needs the state's count"):
        pranam_optax.replica_metrics(params, coupling=optax.linear_schedule(1, 0, 9))
    with pytest.raises(ValueError, match=r"coupling has shape \(3,\)"):
        pranam_optax.replica_metrics(params, coupling=jnp.ones(3))
