"""Restarted replicas: which, from where, and what of the others must not change."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax
from conftest import (
    assert_close,
    assert_equal,
    assert_stable,
    bumpy_gradient,
    make_params,
    refused,
    rows,
    spoil,
)

R = 6
PLANE = pranam_optax.mlp_embedding((3,))
VALUES = jnp.arange(R, 0, -1.0)  # the last replica is the best
TX = optax.chain(pranam_optax.pranam(PLANE), optax.adam(1e-2))


def numbered(tree):
    """Numbers that differ from row to row, in place of moments and counters."""
    return jax.tree.map(
        lambda x: x + jnp.asarray(np.arange(x.size).reshape(x.shape), x.dtype), tree
    )


revive = jax.jit(functools.partial(pranam_optax.revive_replicas, embedding=PLANE))


@pytest.fixture(scope="module")
def trained():
    """Params of replicas and a state in which all rows differ."""
    params = make_params(R)
    return params, numbered(jax.jit(TX.init)(params))


def per_replica_parts(state):
    """Everything in the state of TX that has one row per replica."""
    link, (adam, _) = state
    return link.phi.table, adam.mu, adam.nu


def changed_rows(x, y):
    different = np.asarray(x) != np.asarray(y)
    return np.flatnonzero(different.any(axis=tuple(range(1, different.ndim))))


@pytest.mark.parametrize("values", [None, VALUES])
def test_only_the_dead_and_the_duplicates_change(trained, values):
    params, state = trained
    params = spoil(spoil(params, 1, jnp.nan), 3, 1e25)  # too large to be squared
    params = rows(params, [0, 1, 2, 3, 2, 5])
    new, new_state = revive(params, state, 0, values=values)
    assert_stable((params, state), (new, new_state))
    chex.assert_tree_all_finite((new, new_state))
    restarted, kept = [1, 3, 4], [0, 2, 5]
    assert_equal(rows(new, kept), rows(params, kept))
    for y in jax.tree.leaves(new):
        assert len(np.unique(np.asarray(y), axis=0)) == R
    parts, new_parts = map(per_replica_parts, (state, new_state))
    for x, y in zip(*map(jax.tree.leaves, (parts, new_parts)), strict=True):
        assert_equal(changed_rows(x, y), restarted)
    # The heads and counters are as they were.
    phi, new_phi = (s[0].phi for s in (state, new_state))
    assert_equal(new_phi._replace(table=None), phi._replace(table=None))
    assert_equal(new_state[0].nonfinite, state[0].nonfinite)
    assert_equal(new_state[1][0].count, state[1][0].count)
    # The restarted replicas are rows of the embedding.
    assert_close(rows(new, restarted), rows(PLANE.apply(new_phi), restarted), 1e-5)
    # Nothing is left to restart.
    assert_equal(revive(new, new_state, 1, values=values), (new, new_state))


def test_the_best_lends_its_code_and_its_moments(trained):
    params, state = trained
    values = VALUES.at[0].set(-jnp.inf).at[5].set(jnp.nan)
    # 0 and 5 are dead too: their losses are not finite. So 4 is the best.
    dead = spoil(params, 1, jnp.nan)
    new, new_state = revive(dead, state, 0, values=values, noise=0.0)
    parts, new_parts = map(per_replica_parts, (state, new_state))
    assert_equal(new_parts, rows(parts, [4, 4, 2, 3, 4, 4]))
    # Without noise the weights are the row of the embedding, not the replica itself.
    output = PLANE.apply(state[0].phi)
    assert_close(rows(new, 1), rows(output, 4), 1e-5, 1e-5)


def test_without_losses_the_source_is_any_of_the_living(trained):
    params, state = trained
    params = spoil(params, [1, 3, 4], jnp.nan)
    sources = set()
    for seed in range(20):
        _, new_state = revive(params, state, seed, values=None, noise=0.0)
        table = np.asarray(new_state[0].phi.table)
        equal = np.all(table[1] == table, axis=1)
        sources |= set(np.flatnonzero(equal)) - {1, 3, 4}
    assert sources == {0, 2, 5}


def test_the_noise_has_the_spread_of_the_living_codes(trained):
    params, state = trained
    params = spoil(params, [1, 3], jnp.nan)
    table = np.asarray(state[0].phi.table)

    @jax.jit
    @jax.vmap
    def codes(key):
        _, new_state = revive(params, state, key, values=VALUES, noise=0.5)
        return new_state[0].phi.table

    drawn = np.asarray(codes(jax.random.split(jax.random.key(0), 4000)))
    noise = drawn[:, [1, 3]] - table[5]
    spread = table[[0, 2, 4, 5]].std(axis=0)
    assert_close(noise.std(axis=(0, 1)), 0.5 * spread, 0.05)
    assert np.all(np.abs(noise.mean(axis=(0, 1))) < 0.02 * spread)
    # Two replicas get noise of their own.
    assert abs(np.corrcoef(noise[:, 0, 0], noise[:, 1, 0])[0, 1]) < 0.05


def test_one_survivor_is_enough(trained):
    params, state = trained
    params = spoil(params, np.arange(1, R), jnp.nan)
    new, new_state = revive(params, state, 0, values=None)
    chex.assert_tree_all_finite(new)
    assert_equal(rows(new, 0), rows(params, 0))
    assert len(np.unique(np.asarray(new["b"]))) == R
    # The codes no longer tell a spread of the living: that of all takes its place.
    table = np.asarray(state[0].phi.table)
    moved = np.asarray(new_state[0].phi.table)[1:] - table[0]
    size = np.sqrt(np.mean(moved**2)) / np.sqrt(np.mean(table**2))
    assert 0.3 < size < 3


def test_without_a_survivor_nothing_changes(trained):
    params, state = trained
    dead = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    assert_equal(revive(dead, state, 0, values=VALUES), (dead, state))
    everyone = jnp.full(R, jnp.nan)
    assert_equal(revive(params, state, 0, values=everyone), trained)


@pytest.mark.parametrize(("ulps", "restarted"), [(0.5, [2]), (8.0, [])])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_to_rounding_is_a_duplicate_and_close_is_not(dtype, ulps, restarted):
    params = rows(make_params(R, dtype=dtype), [0, 1, 0, 3, 4, 5])
    state = jax.jit(TX.init)(params)
    near = np.array(params["w"], np.float32)
    near[2, 0, 0] += ulps * float(jnp.finfo(dtype).eps) * np.max(np.abs(near[0]))
    twin = {**params, "w": jnp.asarray(near, dtype)}
    new, _ = revive(twin, state, 0, values=VALUES)
    chex.assert_trees_all_equal_dtypes(new, twin)
    assert_equal(changed_rows(new["w"], twin["w"]), restarted)


def test_moments_with_nan_are_healed(optax_promotion):
    """Adam before pranam has seen the NaN; it would never forget it."""
    link = pranam_optax.pranam(PLANE)
    tx = optax.chain(optax.scale_by_adam(), link, optax.scale(-1e-2))
    params, update = make_params(R), jax.jit(tx.update)
    dead = spoil(params, 1, jnp.nan)
    _, state = update(dead, jax.jit(tx.init)(params), params)
    assert not jnp.all(jnp.isfinite(state[0].mu["w"]))
    new, state = revive(dead, state, 0, values=VALUES)
    chex.assert_tree_all_finite((new, state))
    updates, state = update(new, state, new)
    chex.assert_tree_all_finite((updates, state))
    assert all(jnp.any(u[1] != 0) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    "make",
    [
        lambda link: optax.MultiSteps(optax.chain(link, optax.sgd(0.1, 0.9)), 2),
        lambda link: optax.chain(
            optax.masked(link, {"w": True, "b": False}), optax.adam(0.1)
        ),
        lambda link: optax.partition(
            {"a": optax.chain(link, optax.adam(0.1)), "b": optax.adam(0.2)},
            {"w": "a", "b": "b"},
        ),
    ],
    ids=["MultiSteps", "masked", "partition"],
)
def test_wrapped_states(make):
    params = make_params(R)
    state = numbered(jax.jit(make(pranam_optax.pranam(PLANE)).init)(params))
    dead = jax.tree.map(lambda x: x.at[2].set(jnp.nan), params)
    new, new_state = revive(dead, state, 0, values=VALUES)
    assert_stable((params, state), (new, new_state))
    chex.assert_tree_all_finite((new, new_state))
    changed = 0
    before, after = map(jax.tree.leaves, ((dead, state), (new, new_state)))
    for x, y in zip(before, after, strict=True):
        if x.shape[:1] == (R,):
            assert set(changed_rows(x, y)) <= {2}
            changed += 2 in changed_rows(x, y)
        else:
            assert_equal(x, y)
    # Both weights, the code, and the optimizer's rows.
    assert changed >= 4


def test_reparametrize():
    tx = pranam_optax.reparametrize(optax.adam(1e-2), PLANE)
    params = make_params(R)
    state = numbered(jax.jit(tx.init)(params))
    new, new_state = revive(spoil(params, 2, jnp.nan), state, 0, values=VALUES)
    mu, new_mu = (s.inner[0].mu for s in (state, new_state))
    assert_equal(new_mu.table, rows(mu.table, [0, 1, 5, 3, 4, 5]))
    assert_equal(new_mu.heads, mu.heads)
    output = PLANE.apply(new_state.phi)
    assert_close(rows(new, 2), rows(output, 2), 1e-5)


def test_a_revived_replica_learns_like_the_others(optax_promotion):
    @jax.jit
    def step(params, state):
        updates, state = TX.update(bumpy_gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    params = make_params(R)
    params, state = step(params, jax.jit(TX.init)(params))
    before, state = revive(spoil(params, 2, jnp.nan), state, 0, values=VALUES)
    params = before
    for _ in range(5):
        params, state = step(params, state)
    assert_equal(state[0].nonfinite, np.zeros(R))
    moved = np.abs(np.asarray(params["w"] - before["w"])).mean(axis=(1, 2))
    assert 0.2 < moved[2] / np.delete(moved, 2).mean() < 5


def test_donated_and_with_a_key_array(trained):
    params, state = trained
    dead = spoil(params, 2, jnp.nan)
    expected = revive(dead, state, 3, values=VALUES)
    fun = functools.partial(pranam_optax.revive_replicas, embedding=PLANE)
    donated = jax.jit(fun, donate_argnums=(0, 1))
    copies = jax.tree.map(lambda x: jnp.array(np.array(x)), (dead, state))
    key = jax.random.key(3)
    assert_equal(donated(*copies, key, values=VALUES), expected)


def test_errors_say_what_is_wrong(trained):
    params, state = trained

    def raises(match, params, state, embedding=PLANE, values=None):
        given = {"embedding": embedding, "values": values}
        refused(match, pranam_optax.revive_replicas, params, state, 0, **given)

    raises("a state with one embedding, found 0", params, optax.sgd(0.1).init(params))
    raises("a state with one embedding, found 2", params, (state, state))
    raises("params has 5 replicas, but .* for 6", rows(params, slice(5)), state)
    two = jnp.ones(2)
    raises(r"values has shape \(2,\), expected \(6,\)", params, state, values=two)
    scalar = params | {"c": jnp.ones(())}
    raises(r"\['c'\] has shape \(\) and no replica axis", scalar, state)
    other = {**params, "w": params["w"][:, :1]}
    raises(r"params\['w'\] .*\(6, 1, 2\)", other, state)
    mean = pranam_optax.Embedding(lambda key, params: jnp.zeros(2), lambda phi: phi)
    state = pranam_optax.pranam(mean).init(two)
    raises(r"phi.table of shape \[R, K\]; phi is a ", two, state, mean)
