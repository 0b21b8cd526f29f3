"""Restarted replicas: which, from where, and what of the others must not change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax

R, K = 6, 3
TX = optax.chain(
    pranam_optax.pranam(
        pranam_optax.mlp_embedding((K,)), projection_optimizer=optax.adam(1e-2)
    ),
    optax.adam(1e-2),
)
VALUES = jnp.arange(R, 0, -1.0)  # the last replica is the best
revive = jax.jit(pranam_optax.revive_replicas)


def make_params(seed=0, dtype=jnp.float32):
    return pranam_optax.replicate(
        lambda key: {
            "w": jax.random.normal(key, (3, 2), dtype) + 1.0,
            "b": jax.random.normal(jax.random.fold_in(key, 1), (), dtype),
        },
        seed,
        R,
    )


def spoil(tree, replica, value):
    return {**tree, "w": tree["w"].at[replica, 1, 0].set(value)}


def rows(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


@jax.jit
def step(params, state):
    with jax.numpy_dtype_promotion("standard"):
        grads = jax.tree.map(lambda x: x + jnp.sin(5 * x), params)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state


@pytest.fixture(scope="module")
def trained():
    """Params and state after a few steps, so that all moments differ."""
    params = make_params()
    state = TX.init(params)
    for _ in range(3):
        params, state = step(params, state)
    return params, state


def per_replica_parts(state):
    """Everything in the state of TX that has one row per replica."""
    link, (adam, _) = state
    phi = link.embedding.args[0]
    projection = link.projection[0]
    return phi.table, projection.mu.table, projection.nu.table, adam.mu, adam.nu


@pytest.mark.parametrize("values", [None, VALUES])
def test_only_the_dead_and_the_duplicates_change(trained, values):
    params, state = trained
    params = spoil(spoil(params, 1, jnp.nan), 3, jnp.inf)
    params = jax.tree.map(lambda x: x.at[4].set(x[2]), params)
    new, new_state = revive(params, state, 0, values=values)
    living, restarted = np.array([0, 2, 5]), np.array([1, 3, 4])
    chex.assert_trees_all_equal(rows(new, living), rows(params, living))
    parts, new_parts = map(per_replica_parts, (state, new_state))
    chex.assert_trees_all_equal(rows(new_parts, living), rows(parts, living))
    np.testing.assert_array_equal(new_state[0].revived, [0, 1, 0, 1, 1, 0])
    chex.assert_tree_all_finite((new, new_state))
    # The trunk, heads, counters are as they were.
    phi, new_phi = (s[0].embedding.args[0] for s in (state, new_state))
    chex.assert_trees_all_equal(new_phi._replace(table=None), phi._replace(table=None))
    np.testing.assert_array_equal(new_state[0].nonfinite, state[0].nonfinite)
    # The restarted replicas are rows of the embedding, and all of them differ.
    output = pranam_optax.embedding_output(new_state)
    chex.assert_trees_all_close(rows(new, restarted), rows(output, restarted))
    assert len(np.unique(np.asarray(new["b"]))) == R
    # Nothing is left to restart.
    again = revive(new, new_state, 1, values=values)
    chex.assert_trees_all_equal(again, (new, new_state))


def test_the_best_lends_its_code_and_its_moments(trained):
    params, state = trained
    params = spoil(params, 1, jnp.nan)
    values = VALUES.at[0].set(-jnp.inf).at[5].set(jnp.nan)
    # 0 and 5 are dead too: their losses are not finite. So 4 is the best.
    new, new_state = revive(params, state, 0, values=values, noise=0.0)
    np.testing.assert_array_equal(new_state[0].revived, [1, 1, 0, 0, 0, 1])
    for part, new_part in zip(
        jax.tree.leaves(per_replica_parts(state)),
        jax.tree.leaves(per_replica_parts(new_state)),
        strict=True,
    ):
        for replica in (0, 1, 5):
            np.testing.assert_array_equal(new_part[replica], part[4])
    # Without noise the weights are the row of the embedding, not the replica itself.
    output = pranam_optax.embedding_output(state)
    chex.assert_trees_all_close(rows(new, 1), rows(output, 4), rtol=1e-6, atol=1e-6)


def test_without_losses_the_source_is_any_of_the_living(trained):
    params, state = trained
    params = spoil(params, np.array([1, 3, 4]), jnp.nan)
    sources = set()
    for seed in range(20):
        _, new_state = revive(params, state, seed, noise=0.0)
        table = np.asarray(new_state[0].embedding.args[0].table)
        equal = np.all(table[1] == table, axis=1)
        sources |= set(np.flatnonzero(equal)) - {1, 3, 4}
    assert sources == {0, 2, 5}


def test_the_noise_has_the_spread_of_the_living_codes(trained):
    params, state = trained
    params = spoil(params, np.array([1, 3]), jnp.nan)
    table = np.asarray(state[0].embedding.args[0].table)
    living = [0, 2, 4, 5]

    @jax.jit
    @jax.vmap
    def codes(key):
        _, new_state = pranam_optax.revive_replicas(
            params, state, key, values=VALUES, noise=0.5
        )
        return new_state[0].embedding.args[0].table

    drawn = np.asarray(codes(jax.random.split(jax.random.key(0), 4000)))
    noise = drawn[:, [1, 3]] - table[5]
    np.testing.assert_allclose(
        noise.std(axis=(0, 1)), 0.5 * table[living].std(axis=0), rtol=0.05
    )
    np.testing.assert_allclose(noise.mean(axis=(0, 1)), 0, atol=0.05)
    # Two replicas get noise of their own.
    assert abs(np.corrcoef(noise[:, 0, 0], noise[:, 1, 0])[0, 1]) < 0.05


def test_one_survivor_is_enough(trained):
    params, state = trained
    params = spoil(params, np.arange(1, R), jnp.nan)
    new, new_state = revive(params, state, 0)
    chex.assert_tree_all_finite(new)
    chex.assert_trees_all_equal(rows(new, 0), rows(params, 0))
    assert len(np.unique(np.asarray(new["b"]))) == R
    # The codes no longer tell a spread of the living: that of all takes its place.
    table = np.asarray(state[0].embedding.args[0].table)
    moved = np.asarray(new_state[0].embedding.args[0].table)[1:] - table[0]
    size = np.sqrt(np.mean(moved**2)) / np.sqrt(np.mean(table**2))
    assert 0.3 < size < 3


def test_identical_replicas_part():
    params = jax.tree.map(lambda x: jnp.repeat(x[:1], R, axis=0), make_params())
    new, state = revive(params, TX.init(params), 0)
    np.testing.assert_array_equal(state[0].revived, [0] + [1] * (R - 1))
    chex.assert_tree_all_finite(new)


def test_without_a_survivor_nothing_changes(trained):
    params, state = trained
    dead = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    chex.assert_trees_all_equal(revive(dead, state, 0), (dead, state))
    everyone = jnp.full(R, jnp.nan)
    chex.assert_trees_all_equal(revive(params, state, 0, values=everyone), trained)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_equal_to_rounding_is_a_duplicate_and_close_is_not(dtype):
    params = make_params(dtype=dtype)
    eps = float(jnp.finfo(dtype).eps)
    size = jnp.max(jnp.abs(params["w"][0]))
    for ulps, duplicate in [(0.5, True), (8.0, False)]:
        near = params["w"][0].at[0, 0].add((ulps * eps * size).astype(dtype))
        twin = {"w": params["w"].at[2].set(near), "b": params["b"]}
        twin["b"] = twin["b"].at[2].set(twin["b"][0])
        new, state = revive(twin, pranam_optax.pranam().init(twin), 0)
        np.testing.assert_array_equal(state.revived, [0, 0, duplicate, 0, 0, 0])
        chex.assert_trees_all_equal_dtypes(new, twin)


def test_weights_too_large_to_square_are_dead(trained):
    params, state = trained
    _, state = revive(spoil(params, 2, 1e25), state, 0)
    np.testing.assert_array_equal(state[0].revived, [0, 0, 1, 0, 0, 0])


def test_moments_with_nan_are_healed(optax_promotion):
    """Adam before pranam has seen the NaN; it would never forget it."""
    tx = optax.chain(optax.scale_by_adam(), pranam_optax.pranam(), optax.scale(-1e-2))
    params = make_params()
    update = jax.jit(tx.update)
    _, state = update(spoil(params, 1, jnp.nan), tx.init(params), params)
    assert not jnp.all(jnp.isfinite(state[0].mu["w"]))
    new, state = revive(spoil(params, 1, jnp.nan), state, 0)
    chex.assert_tree_all_finite((new, state))
    updates, state = update(new, state, new)
    chex.assert_tree_all_finite((updates, state))
    assert all(jnp.any(u[1] != 0) for u in jax.tree.leaves(updates))


def test_after_pranam_the_moments_stay_finite(optax_promotion):
    params, tx = make_params(), optax.chain(pranam_optax.pranam(), optax.adam(1e-2))
    state = tx.init(params)
    for bad in (jnp.nan, jnp.inf):
        grads = spoil(params, 1, bad)
        _, state = jax.jit(tx.update)(grads, state, spoil(params, 1, bad))
        chex.assert_tree_all_finite(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda link: optax.chain(optax.clip(1.0), optax.chain(link, optax.adam(0.1))),
        lambda link: optax.MultiSteps(optax.chain(link, optax.sgd(0.1, 0.9)), 2),
        lambda link: optax.apply_if_finite(optax.chain(link, optax.adam(0.1)), 3),
        lambda link: optax.chain(
            optax.masked(link, {"w": True, "b": False}), optax.adam(0.1)
        ),
        lambda link: optax.partition(
            {"a": optax.chain(link, optax.adam(0.1)), "b": optax.adam(0.2)},
            {"w": "a", "b": "b"},
        ),
    ],
    ids=["chain", "MultiSteps", "apply_if_finite", "masked", "partition"],
)
def test_wrapped_states(make, optax_promotion, assert_stable):
    params = make_params()
    tx = make(pranam_optax.pranam(pranam_optax.mlp_embedding((K,))))
    # Numbers that differ from row to row stand for moments.
    state = jax.tree.map(
        lambda x: x + jnp.arange(x.size).reshape(x.shape).astype(x.dtype),
        tx.init(params),
    )
    dead = jax.tree.map(lambda x: x.at[2].set(jnp.nan), params)
    new, new_state = revive(dead, state, 0, values=VALUES)
    assert_stable((params, state), (new, new_state))
    chex.assert_tree_all_finite((new, new_state))
    changed = 0
    for x, y in zip(
        jax.tree.leaves((params, state)),
        jax.tree.leaves((new, new_state)),
        strict=True,
    ):
        if x.shape[:1] == (R,):
            others = np.array([0, 1, 3, 4, 5])
            np.testing.assert_array_equal(x[others], y[others])
            changed += not np.array_equal(x[2], y[2])
        else:
            np.testing.assert_array_equal(x, y)
    # Both weights, the code, the counter, and the optimizer's rows.
    assert changed >= 5


def test_reparametrize(optax_promotion):
    tx = pranam_optax.reparametrize(optax.adam(1e-2))
    params = make_params()
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    new, new_state = revive(spoil(params, 2, jnp.nan), state, 0, values=VALUES)
    mu, new_mu = (s.inner[0].mu for s in (state, new_state))
    np.testing.assert_array_equal(new_mu.table[2], mu.table[R - 1])
    chex.assert_trees_all_equal(new_mu.heads, mu.heads)
    output = pranam_optax.embedding_output(new_state)
    chex.assert_trees_all_close(rows(new, 2), rows(output, 2))
    np.testing.assert_array_equal(new_state.revived, [0, 0, 1, 0, 0, 0])


def test_a_revived_replica_learns_like_the_others(trained):
    params, state = trained
    params, state = revive(spoil(params, 2, jnp.nan), state, 0, values=VALUES)
    before = params
    for _ in range(5):
        params, state = step(params, state)
    np.testing.assert_array_equal(state[0].nonfinite, np.zeros(R))
    moved = np.abs(np.asarray(params["w"] - before["w"])).mean(axis=(1, 2))
    assert 0.2 < moved[2] / np.delete(moved, 2).mean() < 5


def test_donated_and_with_a_key_array(trained):
    params, state = trained
    dead = spoil(params, 2, jnp.nan)
    expected = revive(dead, state, 3)
    donated = jax.jit(pranam_optax.revive_replicas, donate_argnums=(0, 1))
    copies = jax.tree.map(jnp.copy, (dead, state))
    chex.assert_trees_all_equal(donated(*copies, jax.random.key(3)), expected)


def test_errors_say_what_is_wrong(trained):
    params, state = trained
    with pytest.raises(ValueError, match=r"expected a state with one embedding"):
        pranam_optax.revive_replicas(params, optax.sgd(0.1).init(params), 0)
    with pytest.raises(ValueError, match=r"params has 5 replicas, but .* for 6"):
        pranam_optax.revive_replicas(rows(params, slice(5)), state, 0)
    with pytest.raises(ValueError, match=r"values has shape \(2,\), expected \(6,\)"):
        pranam_optax.revive_replicas(params, state, 0, values=jnp.ones(2))
    with pytest.raises(ValueError, match=r"\['c'\] has shape \(\) and no replica axis"):
        pranam_optax.revive_replicas({**params, "c": jnp.ones(())}, state, 0)
    mean = pranam_optax.Embedding(lambda key, params: jnp.zeros(2), lambda phi: phi)
    tx = pranam_optax.pranam(mean)
    with pytest.raises(ValueError, match=r"phi.table of shape \[R, K\]; phi is a "):
        pranam_optax.revive_replicas(jnp.ones(2), tx.init(jnp.ones(2)), 0)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_sharded_replicas(trained, axis_type):
    types = (jax.sharding.AxisType[axis_type],)
    mesh = jax.make_mesh((2,), ("replicas",), axis_types=types)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("replicas"))
    params = spoil(trained[0], 2, jnp.nan)
    expected = revive(params, trained[1], 0, values=VALUES)
    sharded = jax.device_put(params, sharding)
    with jax.set_mesh(mesh):
        new, state = revive(sharded, trained[1], 0, values=VALUES)
    chex.assert_trees_all_close((new, state), expected, rtol=1e-5, atol=1e-6)
    for leaf in jax.tree.leaves(new):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
