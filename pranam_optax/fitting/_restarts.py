"""A search with a budget: runs of several kinds, restarted until it is spent."""

import contextlib
import time
from collections.abc import Callable, Generator

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from pranam_optax._tree import PyTree
from pranam_optax.fitting._coordinates import Coordinates
from pranam_optax.fitting._coupled import (
    add_axis,
    advance,
    begin_at,
    falls,
    make_method,
    pick,
    spread_out,
    within,
)
from pranam_optax.fitting._evolve import evolution, first_size
from pranam_optax.fitting._recombine import Pool, recombine
from pranam_optax.fitting._result import CONTINUED, MinimizeResult, Run
from pranam_optax.fitting._search import CHUNK, LANES, Chunk, Search, descend_from, join
from pranam_optax.fitting._sweep import STEP_COST, sweeps
from pranam_optax.fitting._trace import call

# A kind of run gets so many times the budget of the next kind by the best value found.
_FAVOUR = 3
# Beyond so many parameters a covariance is too large to learn.
_LARGEST_COVARIANCE = 256
# The first coupled run has this part of `num_steps`; each has twice those before.
_FIRST_PART = 8
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
    if search.num_params > _LARGEST_COVARIANCE:
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


def first_cost(search: Search, kind: str) -> int:
    """What the first run of a kind costs, about."""
    if kind == "independent":
        return 0
    if kind == "evolution":
        return first_size(search.num_params) * CHUNK
    if kind == "sweep":
        return search.num_params * STEP_COST
    settings = search.settings
    return 2 * settings.num_replicas * settings.num_steps // _FIRST_PART


def independent(
    search: Search, key: jax.Array, count: int
) -> Generator[Chunk, None, None]:
    """Descents from the lowest of random points."""
    if count == 0:
        yield from descend_from(search, search.first)
        return
    for start_key in jax.random.split(key, 2 ** min(count, 8)):
        chunk = search.starts(start_key, 4 * LANES)
        yield chunk
        lowest = np.argsort(chunk.point_values, kind="stable")  # NaN last
        yield from descend_from(search, pick(chunk.z, lowest[:LANES]))


def continues(count: int) -> bool:
    """Whether a coupled run joins its replicas with what other runs have found."""
    return count % 2 == 1


def coupled(search: Search, key: jax.Array, count: int) -> Generator[Chunk, None, None]:
    """Coupled replicas, twice as many steps each time, and descents from the best."""
    settings = search.settings
    num_replicas = settings.num_replicas
    total = max(settings.num_steps * 2**count // _FIRST_PART, 1)
    start_key, key = jax.random.split(key)
    chunk = search.starts(start_key, num_replicas)
    yield chunk
    usable = np.flatnonzero(np.isfinite(chunk.point_values))
    usable = usable if len(usable) else np.array([0])
    z = pick(chunk.z, usable[np.arange(num_replicas) % len(usable)])
    z = spread_out(search.problem, z)
    params = search.coordinates.bounds.low
    method = make_method(
        params, key, num_replicas, total, settings.optimizer, settings.coupling
    )
    carry = call(begin_at, method, search.coordinates, z)
    empty = jnp.zeros((CHUNK, num_replicas), carry.best_values.dtype)
    step = 0
    while step < total:
        num = min(search.rows("coupled", num_replicas), total - step)
        began = time.monotonic()
        carry, history = call(
            advance, search.problem.fun, method, search.coordinates, carry, empty, num
        )
        lowest = np.fmin.reduce(np.asarray(history)[:num], axis=1)
        search.speeds["coupled"] = num * num_replicas / (time.monotonic() - began)
        evaluations = num_replicas * (1 + np.arange(num))
        yield Chunk(evaluations, lowest, carry.best_z, np.asarray(carry.best_values))
        step += num
    pool = Pool(carry.best_z, np.asarray(carry.best_values))
    if continues(count) and search.found:
        pool.add(*join(search.found))
    if settings.polish is not None:
        yield from recombine(search, pool, jax.random.fold_in(key, 1), total)
    yield from descend_from(search, pick(pool.z, pool.distinct(LANES)))


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
