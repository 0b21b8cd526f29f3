"""Resampling: who moves, how far, what the optimizer keeps, and who is left alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax
from conftest import assert_close, assert_equal, make_params, refused, rows, spoil

R = 6
VALUES = jnp.array([5.0, 1.0, 3.0, 0.0, 4.0, 2.0])  # best first: 3, 1, 5, 2, 4, 0
GOALS = {2: 5, 4: 1, 0: 3}
resample = jax.jit(pranam_optax.resample_replicas, static_argnames="part")


@pytest.mark.parametrize("pull", [0.0, 0.25, 0.9, 1.0])
def test_the_worse_half_moves_to_the_better_one(pull):
    params = make_params()
    new, _ = resample(params, (), VALUES, pull=pull)
    for r in range(R):
        goal = GOALS.get(r, r)
        for name, x in params.items():
            expected = x[r] + pull * (x[goal] - x[r])
            assert_close(new[name][r], expected, 1e-5, 1e-6)
    assert_equal(rows(new, [1, 3, 5]), rows(params, [1, 3, 5]))
    if pull == 1:
        assert_equal(rows(new, [2, 4, 0]), rows(params, [5, 1, 3]))


@pytest.mark.parametrize(
    "part, moved", [(0.0, []), (0.1, []), (0.2, [0]), (0.34, [0, 4])]
)
def test_part_of_the_replicas(part, moved):
    params = make_params()
    new, _ = resample(params, (), VALUES, part=part)
    changed = np.flatnonzero(np.asarray(new["b"]) != params["b"])
    assert_equal(changed, moved)


def test_moments_are_those_of_the_better_replica():
    tx = optax.chain(pranam_optax.pranam(), optax.adam(0.1), optax.ema(0.9))
    # As many replicas as codes: heads have the shape of the params, and must not move.
    params, values = make_params(4), VALUES[:4]
    state = jax.tree.map(
        lambda x: jnp.asarray(np.arange(x.size).reshape(x.shape), x.dtype),
        jax.eval_shape(tx.init, params),
    )
    new, new_state = resample(params, state, values)
    goals = np.array([3, 1, 1, 3])  # best first: 3, 1, 2, 0
    for part in (lambda s: s[1][0].mu, lambda s: s[1][0].nu, lambda s: s[2].ema):
        assert_equal(part(new_state), rows(part(state), goals))
    assert_equal(new_state[1][0].count, state[1][0].count)
    assert_equal(new_state[0], state[0])
    chex.assert_trees_all_equal_shapes_and_dtypes((new, new_state), (params, state))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e30])
def test_the_dead_neither_move_nor_lead(bad):
    params = spoil(make_params(), 3, bad)  # the best
    values = VALUES.at[4].set(jnp.nan)
    new, _ = resample(params, (), values)
    # Of the living, best first: 1, 5, 2, 0.
    for r, goal in {0: 1, 2: 5}.items():
        expected = 0.1 * params["b"][r] + 0.9 * params["b"][goal]
        assert_close(new["b"][r], expected, 1e-5)
    still = [1, 3, 4, 5]
    assert_equal(rows(new, still), rows(params, still))

    nobody, _ = resample(params, (), jnp.full(R, jnp.nan))
    assert_equal(nobody, params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept(dtype):
    params = make_params(dtype=dtype)
    new, _ = resample(params, (), VALUES, pull=0.5)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, params)
    expected = 0.5 * params["b"][0] + 0.5 * params["b"][3]
    assert_close(new["b"][0], expected, 1e-2)


def test_values_may_be_a_list():
    params = make_params()
    found = pranam_optax.resample_replicas(params, (), VALUES.tolist())
    assert_close(found, resample(params, (), VALUES), 1e-6)


def test_errors_say_what_was_expected():
    params = make_params()

    def raises(match, params=params, values=VALUES, **kwargs):
        refused(match, pranam_optax.resample_replicas, params, (), values, **kwargs)

    raises(r"part must be in \[0, 0.5\], got 0.6", part=0.6)
    for pull in (1.5, -0.1, jnp.nan, jnp.array(2.0), jnp.ones(R)):
        raises(r"pull must be a number in \[0, 1\], got", pull=pull)
    raises(r"values has shape \(5,\), expected \(6,\)", values=VALUES[:5])
    raises("no replica axis", {"w": jnp.array(1.0)})
