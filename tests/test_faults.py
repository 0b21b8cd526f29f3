"""NaN and infinity at random steps, replicas and places: the others do not notice.

A scenario says which replicas fail when and where. It runs twice, with different
garbage in the same replicas: nothing else may differ by a bit. Then the dead are
restarted, and all must train on.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax
from conftest import assert_close, assert_equal, make_params, rows, slow_unless

R, T = 6, 8
GARBAGE = np.array([np.nan, np.inf, -np.inf], np.float32)
# Weights whose squares overflow are left out too; such gradients not by `pranam`.
WEIGHT_GARBAGE = np.append(GARBAGE, np.array([1e20, 1e25, -3e38], np.float32))
SIZE = 7  # weights of one replica


class Faults(NamedTuple):
    """What is written where: arrays of `[steps, replicas, weights]`, 0 for nothing."""

    loss: np.ndarray  # [steps, replicas]
    gradient: np.ndarray
    weight: np.ndarray


class Scenario(NamedTuple):
    """Which replica fails at which step: bool arrays of `[steps, replicas]`."""

    transient: np.ndarray
    fatal: np.ndarray

    def left_out(self):
        """In which steps each replica has to be left out."""
        return self.transient | np.logical_or.accumulate(self.fatal, axis=0)


def draw_scenario(rng):
    """Each replica fails fatally, transiently, both or not; sometimes all at once."""
    shape = (T, R)
    transient = rng.random(shape) < rng.choice([0.0, 0.1, 0.5])
    fatal = np.zeros(shape, bool)
    doomed = rng.choice(R, size=rng.integers(0, R), replace=False)  # at most R - 1
    fatal[rng.integers(0, T, len(doomed)), doomed] = True
    if rng.random() < 0.1:
        transient[rng.integers(T)] = True
    if rng.random() < 0.05:
        fatal[rng.integers(T)] = True
    return Scenario(transient, fatal)


def draw_faults(rng, scenario):
    """Garbage at random weights of the replicas that fail."""

    def spoil(where, garbage):
        hit = rng.random((T, R, SIZE)) < 0.3
        hit[..., 0] |= ~hit.any(axis=-1)
        hit &= where[..., None]
        return np.where(hit, rng.choice(garbage, hit.shape), 0).astype(np.float32)

    by_loss = scenario.transient & (rng.random((T, R)) < 0.5)
    loss = np.where(by_loss, rng.choice(GARBAGE, (T, R)), 0).astype(np.float32)
    gradient = spoil(scenario.transient & ~by_loss, GARBAGE)
    return Faults(loss, gradient, spoil(scenario.fatal, WEIGHT_GARBAGE))


def write(tree, garbage):
    """The tree with garbage, `[R, SIZE]`, where it is not 0."""
    garbage = {"w": garbage[:, 1:].reshape(-1, 3, 2), "b": garbage[:, 0]}
    return jax.tree.map(lambda x, g: jnp.where(g == 0, x, g), tree, garbage)


def loss_fn(params, fault):
    x = jnp.concatenate([params["w"].ravel(), params["b"][None]])
    loss = jnp.sum(x**2 - jnp.cos(3 * x))
    return jnp.where(fault == 0, loss, loss * fault)


ADAM, SGD = optax.adam(0.02), optax.sgd(0.02)  # SGD keeps no NaN in its state
LINEAR = pranam_optax.mlp_embedding()
TRANSFORMATIONS = {
    "pranam": optax.chain(pranam_optax.pranam(coupling=0.7), ADAM),
    "reparametrize": pranam_optax.reparametrize(ADAM),
    "elastic to the mean": optax.chain(SGD, pranam_optax.elastic_averaging(0.3)),
    "elastic": optax.chain(SGD, pranam_optax.elastic_averaging(0.3, LINEAR)),
}


@functools.cache
def programs(name):
    tx = TRANSFORMATIONS[name]

    def step(carry, faults):
        params, state = carry
        with jax.numpy_dtype_promotion("standard"):
            params = write(params, faults.weight)
            grads = jax.vmap(jax.grad(loss_fn))(params, faults.loss)
            grads = write(grads, faults.gradient)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return (params, state), (params, updates)

    def train(params, state, faults):
        return jax.lax.scan(step, (params, state), faults)

    return jax.jit(tx.init), jax.jit(train), jax.jit(pranam_optax.revive_replicas)


def no_faults(num_replicas):
    return Faults(
        np.zeros((T, num_replicas), np.float32),
        *np.zeros((2, T, num_replicas, SIZE), np.float32),
    )


def only(replicas, tree):
    """The rows of some replicas of the params, or of the state of a transformation."""

    def cut(path, x):
        kept = not any(getattr(key, "name", "") in ("heads", "bias") for key in path)
        return x[replicas] if kept and x.shape[:1] == (R,) else x

    return jax.tree_util.tree_map_with_path(cut, tree)


def assert_survived(name, scenario, faults, other_faults):
    init, train, revive = programs(name)
    params = make_params()
    state = init(params)
    left_out, dead = scenario.left_out(), scenario.fatal.any(axis=0)

    (final, state_a), (path, updates) = train(params, state, faults)
    (_, state_b), (other_path, _) = train(params, state, other_faults)

    # Other garbage, the same bits: all replicas that live, and the whole state.
    survivors = ~dead
    path, other_path = jax.tree.map(lambda x: x[:, survivors], (path, other_path))
    assert_equal((path, state_a), (other_path, state_b))
    chex.assert_tree_all_finite(path)
    chex.assert_tree_all_finite(state_a)
    assert_equal(optax.tree.get(state_a, "nonfinite"), left_out.sum(axis=0))
    # The update behind pranam is Adam's: its momentum moves on. That of the dead
    # and, all being out at the first step, of everybody is zero.
    if left_out[0].all():
        assert all(np.all(u[0] == 0) for u in jax.tree.leaves(updates))
    for replica in np.flatnonzero(left_out.all(axis=0)):
        assert all(np.all(u[:, replica] == 0) for u in jax.tree.leaves(updates))

    # Restart the dead; the living keep their bits and all train on.
    new, new_state = revive(final, state_a, 0, values=None)
    changed = (new["w"] != final["w"]) & np.isfinite(new["w"])
    restarted = np.any(changed, axis=(1, 2))
    np.testing.assert_array_equal(restarted, dead & ~dead.all(), err_msg=str(scenario))
    assert_equal(rows(final, survivors), rows(new, survivors))
    (last, last_state), _ = train(new, new_state, no_faults(R))
    chex.assert_tree_all_finite(last_state)
    if not dead.all():
        chex.assert_tree_all_finite((new, last))
    return int(dead.sum()), int(left_out.all(axis=1).any())


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("num_scenarios", slow_unless([5], [5, 100]))
def test_survivors_keep_their_bits(name, num_scenarios):
    rng = np.random.default_rng(num_scenarios)
    deaths = np.zeros(R + 1, int)
    blackouts = 0
    for _ in range(num_scenarios):
        scenario = draw_scenario(rng)
        faults, other_faults = (draw_faults(rng, scenario) for _ in range(2))
        dead, blackout = assert_survived(name, scenario, faults, other_faults)
        deaths[dead] += 1
        blackouts += blackout
    if num_scenarios >= 100:  # the draw covers everything from none to all
        assert np.all(deaths > 0), deaths
        assert blackouts > 0
    print(f"{name}: {num_scenarios} scenarios, deaths {deaths}, blackouts {blackouts}")


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("num_scenarios", slow_unless([1], [1, 10]))
def test_survivors_might_as_well_be_alone(name, num_scenarios):
    """After the deaths the run is that of the survivors' rows, to rounding."""
    init, train, _ = programs(name)
    rng = np.random.default_rng(0)
    for _ in range(num_scenarios):
        (params, state), _ = train(make_params(), init(make_params()), no_faults(R))
        survivors = np.sort(rng.choice(R, rng.integers(1, R), replace=False))
        dead = np.setdiff1d(np.arange(R), survivors)
        fatal = np.zeros((T, R), bool)
        fatal[0, dead] = True
        scenario = Scenario(np.zeros((T, R), bool), fatal)
        faults = draw_faults(rng, scenario)
        (together, _), _ = train(params, state, faults)
        carry = only(survivors, params), only(survivors, state)
        (alone, _), _ = train(*carry, no_faults(len(survivors)))
        assert_close(only(survivors, together), alone, 1e-3, 1e-4)
