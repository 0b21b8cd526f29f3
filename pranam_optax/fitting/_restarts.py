"""A search with a budget: runs of several kinds, restarted until it is spent."""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from pranam_optax._tree import PyTree
from pranam_optax.fitting._coordinates import Coordinates
from pranam_optax.fitting._coupled import add_axis, falls, pick, within
from pranam_optax.fitting._result import CONTINUED, MinimizeResult, Run
from pranam_optax.fitting._runs import (
    LARGEST_COVARIANCE,
    Search,
    continues,
    coupled,
    evolution,
    first_cost,
    independent,
    join,
    sweeps,
)
from pranam_optax.fitting._trace import call

# A kind of run gets so many times the budget of the next kind by the best value found.
_FAVOUR = 3
# What is beside a bound, in scales.
_BESIDE = 1e-3


def restart(
    search: Search, key: jax.Array, watch: Callable[[Search], bool | None]
) -> MinimizeResult:
    """Runs until the budget is spent, or `watch` returns True after a chunk.

    The kinds of runs share the cost like 27 : 9 : 3 : 1, in the order of the best
    values that they have found so far. What the next run will cost counts too, so that
    a small budget goes to cheap runs.
    """
    kinds = {
        "independent": independent,
        "sweep": sweeps,
        "evolution": evolution,
        "coupled": coupled,
    }
    if search.num_params > LARGEST_COVARIANCE:
        del kinds["evolution"]
    if search.settings.polish is None:
        del kinds["independent"]
    costs, counts = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
    prices = {kind: first_cost(search, kind) for kind in kinds}
    lowest: dict[str, float] = {}
    runs: list[Run] = []
    ended = search.ended
    while ended is None:
        ranks = {
            k: sum(v < lowest.get(k, -np.inf) for v in lowest.values()) for k in kinds
        }
        kind = min(kinds, key=lambda k: (costs[k] + prices[k]) * _FAVOUR ** ranks[k])
        cost, before, value = search.cost, search.num_evaluations, np.inf
        run_key = jax.random.fold_in(key, len(runs))
        with contextlib.closing(kinds[kind](search, run_key, counts[kind])) as run:
            for chunk in run:
                search.record(chunk)
                value = np.fmin(value, np.fmin.reduce(chunk.values))
                ended = search.ended
                if ended is None and watch(search):
                    ended = "stopped by the callback"
                if ended is not None:
                    break
        cost = search.cost - cost
        costs[kind] += cost
        prices[kind] = 2 * cost  # the next one is twice as large
        joined = kind == "coupled" and continues(counts[kind])
        counts[kind] += 1
        lowest[kind] = np.fmin(lowest.get(kind, np.inf), value)
        made = search.num_evaluations - before
        runs.append(
            Run(CONTINUED if joined else kind, made, float(value) * search.unit)
        )
    return _gather(search, tuple(runs), ended)


def _gather(search: Search, runs: tuple[Run, ...], ended: str) -> MinimizeResult:
    """What all runs found, as a result."""
    problem, coordinates = search.problem, search.coordinates
    best_z = add_axis(search.z)
    z, values = join([(best_z, np.array([search.value])), *search.found])
    usable = np.flatnonzero(np.isfinite(values))
    usable = usable if len(usable) else np.array([0])
    params, values = call(_to_params, coordinates, pick(z, usable)), values[usable]
    best, count = int(np.argmin(values)), search.num_evaluations
    # Coordinates come near a bound and do not reach it: the user's start, and the best
    # params with entries beside a bound moved to it.
    snapped = call(_snap, coordinates, pick(params, best))
    for candidate in (problem.first, snapped):
        if candidate is None:
            continue
        value, count = float(call(_value, problem.fun, candidate)), count + 1
        if value < values[best]:
            values[best] = value
            params = jax.tree.map(lambda x, y: x.at[best].set(y), params, candidate)
    history = np.concatenate(search.history)
    in_units = jnp.asarray(values, search.slope.dtype) * problem.unit
    lowest = jnp.asarray(history[:, 2:], search.slope.dtype) * problem.unit
    return MinimizeResult(
        params=pick(params, best),
        value=in_units[best],
        replica_params=params,
        replica_values=in_units,
        scale=coordinates.scale,
        history=lowest,
        start_values=search.start_values,
        num_evaluations=jnp.asarray(count),
        unbounded=call(_falls, problem.fun, coordinates, search.z),
        evaluations=jnp.asarray(history[:, :2].astype(int)),
        runs=runs,
        ended=ended,
        checked=True,
    )


def _to_params(coordinates: Coordinates, z: PyTree) -> PyTree:
    return jax.vmap(coordinates.to_params)(z)


def _snap(coordinates: Coordinates, params: PyTree) -> PyTree:
    def snap(
        x: jax.Array, low: jax.Array, high: jax.Array, scale: jax.Array
    ) -> jax.Array:
        near = (_BESIDE * scale).astype(x.dtype)
        x = jnp.where(x - low < near, low, x)
        return jnp.where(high - x < near, high, x)

    return jax.tree.map(snap, params, *coordinates.bounds, coordinates.scale)


def _falls(fun: Partial, coordinates: Coordinates, z: PyTree) -> jax.Array:
    return falls(within(fun, coordinates), coordinates, z)


def _value(fun: Partial, params: PyTree) -> jax.Array:
    return fun(params)
