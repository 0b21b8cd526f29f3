"""The runs that a search with a budget is made of.

A run is a generator of chunks, each of them one compiled call, so that whoever takes
them can stop when the budget is spent.
"""

import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from pranam_optax._pranam import Coupling
from pranam_optax._tree import PyTree
from pranam_optax.fitting._coordinates import Coordinates
from pranam_optax.fitting._coupled import (
    Problem,
    Release,
    Start,
    advance,
    begin_at,
    make_method,
    pick,
    refine,
    spread_out,
    within,
)
from pranam_optax.fitting._evolve import Population, begin_population, evolve
from pranam_optax.fitting._polish import (
    PATIENCE,
    Descents,
    Polish,
    begin_descents,
    descend,
    stops_anywhere,
    typical_slope,
    unrefined,
)
from pranam_optax.fitting._sweep import STEP_COST, Line, sweep
from pranam_optax.fitting._trace import call

# Descents at a time.
LANES = 8
# Beyond so many parameters a covariance is too large to learn.
LARGEST_COVARIANCE = 256
# Steps of a compiled call, between which the budget is looked at.
_CHUNK = 50
# The first coupled run has this part of `num_steps`; each has twice those before.
_FIRST_PART = 8
# The first population is so many times the usual size: descents serve small ones.
_FIRST_POPULATION = 6
# Candidates nearer than this in their coordinates are copies of each other.
_COPIES = 1e-2
# A descent or population is given up that would need more than so many chunks like its
# last to win.
_HORIZON = 20
# Recombination: how many of the lowest points may be moved, steps of a descent, and
# cycles without gain after which it ends.
_BASES = 8
_SHORT = 16
_STALLED = 16
# Descents agree if their values differ by so many roundings.
_CONVERGED = 100


class Budget(NamedTuple):
    """When a search ends: at the first that is reached; None for no limit."""

    max_evaluations: int | None = None
    time_limit: float | None = None
    target: float | None = None


class Settings(NamedTuple):
    """Of the coupled runs and of the polish; see `minimize`."""

    num_replicas: int
    num_steps: int
    optimizer: optax.GradientTransformation | None
    coupling: Coupling | Release
    polish: Polish | None


class Chunk(NamedTuple):
    """What a compiled call did.

    Attributes:
      evaluations: made until each of its steps, `[steps]`.
      values: the lowest of each step.
      z: points that it ended at, stacked.
      point_values: the values there.
      gradients: whether evaluations were made with their gradients.
    """

    evaluations: np.ndarray
    values: np.ndarray
    z: PyTree
    point_values: np.ndarray
    gradients: bool = True

    @classmethod
    def single(
        cls, num: int, z: PyTree, values: np.ndarray, gradients: bool
    ) -> "Chunk":
        """One step of so many evaluations."""
        lowest = np.array([np.fmin.reduce(values)])
        return cls(np.array([num]), lowest, z, values, gradients)


class Search:
    """What all runs share: the problem, the budget, and what was found and spent."""

    def __init__(
        self,
        problem: Problem,
        draw: Partial,
        start: Start,
        settings: Settings,
        budget: Budget,
        began: float,
    ):
        self.problem, self.draw, self.settings = problem, draw, settings
        self.coordinates, self.budget, self.began = start.coordinates, budget, began
        self.unit, self.num_params = float(problem.unit), num_params(start.z)
        self.num_evaluations = self.num_gradients = 0
        self.speeds: dict[str, float] = {}
        self.z, self.value, self.lowest = pick(start.z, 0), np.inf, np.inf
        self.found: list[tuple[PyTree, np.ndarray]] = []
        self.history: list[np.ndarray] = []
        self.start_values = start.values * problem.unit
        # The user's start, if there is one, is the first.
        self.first = pick(start.z, np.arange(LANES))
        values = np.asarray(start.values)
        order = np.argsort(~np.isfinite(values), kind="stable")[:LANES]
        self.record(Chunk.single(len(values), self.first, values[order], False))
        self.slope = call(_slope, problem.fun, self.coordinates, self.first)
        self.record(Chunk.single(LANES, self.first, values[order], True))

    @property
    def cost(self) -> int:
        """What was spent, if a gradient costs as much as a value."""
        return self.num_evaluations + self.num_gradients

    @property
    def ended(self) -> str | None:
        """What ended the search."""
        limit, seconds, target = self.budget
        if target is not None and self.value * self.unit <= target:
            return "target reached"
        if limit is not None and self.num_evaluations >= limit:
            return "max_evaluations spent"
        if seconds is not None and time.monotonic() - self.began >= seconds:
            return "time_limit reached"
        return None

    def remaining(self, kind: str) -> float:
        """Evaluations that the budget still allows."""
        limit, seconds, _ = self.budget
        left = np.inf if limit is None else limit - self.num_evaluations
        if seconds is not None and kind in self.speeds:
            left_s = seconds - (time.monotonic() - self.began)
            left = min(left, self.speeds[kind] * left_s)
        return max(left, 0.0)

    def rows(self, kind: str, size: int) -> int:
        """How many steps of so many evaluations a chunk may have, at least one."""
        return int(max(1, min(_CHUNK, self.remaining(kind) // size)))

    def record(self, chunk: Chunk) -> None:
        """Adds what a chunk spent, and its lowest point if it is the lowest of all."""
        lowest = np.fmin.accumulate(np.fmin(chunk.values, self.lowest))
        self.lowest = lowest[-1]
        gradients = chunk.evaluations * chunk.gradients
        made = self.num_evaluations + chunk.evaluations
        columns = made, self.num_gradients + gradients, lowest
        self.history.append(np.stack(columns, axis=1))
        self.num_evaluations += int(chunk.evaluations[-1])
        self.num_gradients += int(gradients[-1])
        best = np.argmin(np.nan_to_num(chunk.point_values, nan=np.inf, neginf=-np.inf))
        if chunk.point_values[best] < self.value:
            self.value = float(chunk.point_values[best])
            self.z = pick(chunk.z, best)

    def starts(self, key: jax.Array, num: int) -> Chunk:
        """Random points."""
        keys = jax.random.split(key, num)
        z, values = call(_draw, self.problem.fun, self.draw, self.coordinates, keys)
        return Chunk.single(num, z, np.asarray(values), False)


def num_params(z: PyTree) -> int:
    """Number of parameters of one of the stacked models."""
    return sum(x.size // len(x) for x in jax.tree.leaves(z))


def _first_size(n: int) -> int:
    return _FIRST_POPULATION * (4 + int(3 * np.log(n)))


def first_cost(search: Search, kind: str) -> int:
    """What the first run of a kind costs, about."""
    if kind == "independent":
        return 0
    if kind == "evolution":
        return _first_size(search.num_params) * _CHUNK
    if kind == "sweep":
        return search.num_params * STEP_COST
    settings = search.settings
    return 2 * settings.num_replicas * settings.num_steps // _FIRST_PART


def independent(
    search: Search, key: jax.Array, count: int
) -> Generator[Chunk, None, None]:
    """Descents from the lowest of random points."""
    if count == 0:
        yield from _descents(search, search.first)
        return
    for start_key in jax.random.split(key, 2 ** min(count, 8)):
        chunk = search.starts(start_key, 4 * LANES)
        yield chunk
        lowest = np.argsort(chunk.point_values, kind="stable")  # NaN last
        yield from _descents(search, pick(chunk.z, lowest[:LANES]))


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
    empty = jnp.zeros((_CHUNK, num_replicas), carry.best_values.dtype)
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
    pool = _Pool(carry.best_z, np.asarray(carry.best_values))
    if continues(count) and search.found:
        pool.add(*join(search.found))
    if settings.polish is not None:
        yield from _recombine(search, pool, jax.random.fold_in(key, 1), total)
    yield from _descents(search, pick(pool.z, pool.distinct(LANES)))


def evolution(
    search: Search, key: jax.Array, count: int
) -> Generator[Chunk, None, None]:
    """A population, twice as large each time.

    Now and then its lowest point and its mean descend. It ends when they only lead to
    one minimum any more: what is left to it is slow convergence.
    """
    n = search.num_params
    size = _first_size(n) * 2 ** min(count, 12)
    start_key, key = jax.random.split(key)
    chunk = search.starts(start_key, 1)
    yield chunk
    population = call(_first_population, key, search.coordinates, pick(chunk.z, 0))
    eps = float(jnp.finfo(population.mean.dtype).eps)
    patience = 2 + -(-30 * n // (size * _CHUNK))
    record: list[float] = []
    end: Chunk | None = None
    step = 0
    while True:
        num, began = search.rows("evolution", size), time.monotonic()
        population, history, z, values = call(
            _evolve,
            search.problem.fun,
            search.coordinates,
            population,
            jnp.zeros(size),
            step + jnp.arange(_CHUNK),
            num,
        )
        values = np.asarray(values)
        lowest = np.append(np.asarray(history)[:num], np.fmin.reduce(values))
        search.speeds["evolution"] = num * size / (time.monotonic() - began)
        made = np.append(size * (1 + np.arange(num)), size * num + 2)
        yield Chunk(made, lowest, z, values, False)
        step += num
        before, end = end, None
        for end in _descents(search, z):
            yield end
        if before and end and _in_one_minimum(search, before, end):
            break
        record.append(float(population.value))
        width = float(population.sigma * jnp.max(population.axes[1]))
        if not width > eps**0.75:
            break
        if len(record) > patience:
            gain = record[-patience - 1] - record[-1]
            hopeless = record[-1] - _HORIZON * gain > search.value
            if hopeless or not gain > 10 * eps * abs(record[-1]):
                break


def sweeps(search: Search, key: jax.Array, count: int) -> Generator[Chunk, None, None]:
    """Searches along each parameter in turn, twice as many sweeps each time.

    After each sweep the point descends. It ends when that gains nothing any more.
    """
    start_key, key = jax.random.split(key)
    chunk = search.starts(start_key, 4 * LANES)
    yield chunk
    best = np.argsort(chunk.point_values, kind="stable")[0]  # NaN last
    for sweep_key in jax.random.split(key, 2 ** min(count, 8)):
        z, value = pick(chunk.z, best), chunk.point_values[best]
        line = call(_begin_sweep, search.coordinates, z, value)
        order = np.asarray(jax.random.permutation(sweep_key, search.num_params))
        step = 0
        while step < len(order):
            num = min(search.rows("sweep", STEP_COST), len(order) - step)
            began = time.monotonic()
            padded = np.resize(order[step : step + num], min(_CHUNK, len(order)))
            line, history, z, values = call(
                _sweep,
                search.problem.fun,
                search.coordinates,
                line,
                jax.random.fold_in(sweep_key, step),
                padded,
                num,
            )
            search.speeds["sweep"] = num * STEP_COST / (time.monotonic() - began)
            made = STEP_COST * (1 + np.arange(num))
            values = np.asarray(values)
            lowest = np.append(np.asarray(history)[:num], values)
            chunk = Chunk(np.append(made, made[-1] + 1), lowest, z, values, False)
            yield chunk
            step += num
        swept = chunk.z
        for chunk in _descents(search, swept):
            yield chunk
        best = 0  # of the lanes, the one that is used
        if not chunk.point_values[best] < value:
            return


class _Pool:
    """The lowest distinct points of a run: the replicas, and what came of them."""

    def __init__(self, z: PyTree, values: np.ndarray):
        self.z, self.values, self.size = z, values, len(values)
        self.first = z

    def distinct(self, num: int) -> np.ndarray:
        return _distinct(self.z, self.values, num)

    def add(self, z: PyTree, values: np.ndarray) -> bool:
        """Whether any of these points is lower than others and no copy of one."""
        z, values = join([(self.z, self.values), (z, values)])
        chosen = _distinct(z, values, self.size)
        padded = chosen[np.arange(self.size) % len(chosen)]
        self.z = pick(z, padded)
        self.values = np.where(
            np.arange(self.size) < len(chosen), values[padded], np.inf
        )
        return bool(np.any(chosen >= self.size))


def _recombine(
    search: Search, pool: _Pool, key: jax.Array, num_cycles: int
) -> Generator[Chunk, None, None]:
    """Descents from good points moved by the difference of two others.

    Where the minima form a lattice, or where the function is a sum over parameters, the
    differences between minima lead from one to the next.
    """
    idle = 0
    for cycle in range(num_cycles):
        z, values = call(
            _trials,
            search.problem.fun,
            search.coordinates,
            pool.z,
            pool.values,
            pool.first,
            jax.random.fold_in(key, cycle),
        )
        values = np.asarray(values)
        yield Chunk.single(pool.size, z, values, False)
        for chunk in _descents(search, z, max_chunks=1):
            yield chunk
        idle = 0 if pool.add(chunk.z, chunk.point_values) else idle + 1
        if idle == _STALLED:
            return


def _descents(
    search: Search, z: PyTree, max_chunks: int | None = None
) -> Generator[Chunk, None, None]:
    """Descents from at most as many points as there are lanes.

    One ends when it has converged, or when it cannot win any more.
    """
    polish, problem = search.settings.polish, search.problem
    if polish is None:
        return
    num = len(jax.tree.leaves(z)[0])
    lanes, usable = pick(z, np.arange(LANES) % num), np.arange(LANES) < num
    args = problem.fun, search.coordinates
    if not stops_anywhere(polish):
        polished, ends = call(
            *(refine, problem, search.coordinates, Partial(polish)),
            *(unrefined(lanes), np.arange(LANES)),
        )
        values = np.where(usable, ends, np.nan)
        search.found.append((polished.params, values))
        total = int(np.asarray(polished.num_evaluations)[usable].sum()) + num
        yield Chunk.single(total, polished.params, values, True)
        return

    def values_of(descents: Descents) -> np.ndarray:
        return np.where(usable, np.asarray(descents.values) * slope, np.nan)

    slope = float(search.slope)
    descents = call(_begin_descents, *args, lanes, search.slope, usable)
    values = values_of(descents)
    steps = np.arange(_CHUNK if max_chunks is None else _SHORT)
    chunks = 0
    try:
        yield Chunk.single(num, lanes, values, True)
        while np.any(np.asarray(descents.active)) and chunks != max_chunks:
            began, before, chunks = time.monotonic(), values, chunks + 1
            left = search.remaining("independent")
            descents, history = call(
                _descend, *args, descents, search.slope, steps, left
            )
            values, history = values_of(descents), np.asarray(history)
            history = history[~np.isnan(history[:, 0])]
            if not len(history):
                break
            search.speeds["independent"] = history[-1, 0] / (time.monotonic() - began)
            yield Chunk(history[:, 0], history[:, 1], descents.params, values)
            hopeless = values - _HORIZON * (before - values) > search.value
            idle = np.where(hopeless, PATIENCE, np.asarray(descents.idle))
            descents = descents._replace(idle=jnp.asarray(idle, descents.idle.dtype))
    finally:
        if max_chunks is None:
            search.found.append((descents.params, values))


def join(points: Sequence[tuple[PyTree, np.ndarray]]) -> tuple[PyTree, np.ndarray]:
    """Stacked points and their values, one after the other."""
    z, values = zip(*points, strict=True)
    return jax.tree.map(lambda *x: np.concatenate(x), *z), np.concatenate(values)


def _in_one_minimum(search: Search, *ends: Chunk) -> bool:
    """Whether all of these descents have converged to the same point."""
    z, values = join([(end.z, end.point_values) for end in ends])
    size = float(search.slope) + abs(np.fmin.reduce(values))
    limit = _CONVERGED * np.finfo(search.slope.dtype).eps * size
    converged = np.fmax.reduce(values) - np.fmin.reduce(values) <= limit
    return bool(converged) and len(_distinct(z, values, 2)) == 1


def _distinct(z: PyTree, values: np.ndarray, num: int) -> np.ndarray:
    """Where the lowest points are, without copies of each other, the lowest first."""
    points = np.concatenate(
        [np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(z)], axis=1
    )
    chosen: list[int] = []
    for i in np.argsort(values, kind="stable"):
        if not np.isfinite(values[i]) or len(chosen) == num:
            break
        distance = np.abs(points[chosen] - points[i]).max(axis=1, initial=0.0)
        if np.all(distance > _COPIES):
            chosen.append(int(i))
    return np.array(chosen or [0])


# Compiled parts


def _slope(fun: Partial, coordinates: Coordinates, z: PyTree) -> jax.Array:
    return typical_slope(within(fun, coordinates), z)


def _draw(
    fun: Partial, draw: Partial, coordinates: Coordinates, keys: jax.Array
) -> tuple[PyTree, jax.Array]:
    z = jax.vmap(lambda key: coordinates.from_params(draw(key)))(keys)
    return z, jax.vmap(within(fun, coordinates))(z)


def _begin_descents(
    fun: Partial, coordinates: Coordinates, z: PyTree, unit: jax.Array, usable: Any
) -> Descents:
    descents = begin_descents(within(fun, coordinates), z, unit)
    return descents._replace(idle=jnp.where(usable, descents.idle, PATIENCE))


def _descend(
    fun: Partial,
    coordinates: Coordinates,
    descents: Descents,
    unit: jax.Array,
    *limits: Any,
) -> tuple[Descents, jax.Array]:
    return descend(within(fun, coordinates), descents, unit, *limits)


def _to_row(coordinates: Coordinates, z: PyTree) -> jax.Array:
    """Params as one vector, in units of their scale: straight, unlike coordinates."""
    return _in_scales(coordinates, coordinates.to_params(z))


def _in_scales(coordinates: Coordinates, params: PyTree) -> jax.Array:
    scaled = jax.tree.map(lambda x, s: x.astype(s.dtype) / s, params, coordinates.scale)
    return ravel_pytree(scaled)[0]


def _from_row(coordinates: Coordinates, row: jax.Array) -> PyTree:
    """The nearest params in the box."""
    x = ravel_pytree(coordinates.scale)[1](row)
    return jax.tree.map(
        lambda x, s, low, high: jnp.clip((x * s).astype(low.dtype), low, high),
        *(x, coordinates.scale, *coordinates.bounds),
    )


def _from_rows(coordinates: Coordinates, rows: jax.Array) -> PyTree:
    """Stacked coordinates."""
    return jax.vmap(lambda row: coordinates.from_params(_from_row(coordinates, row)))(
        rows
    )


def _first_population(
    key: jax.Array, coordinates: Coordinates, z: PyTree
) -> Population:
    return begin_population(key, _to_row(coordinates, z))


def _evolve(
    fun: Partial,
    coordinates: Coordinates,
    population: Population,
    empty: jax.Array,
    generations: jax.Array,
    num: jax.Array,
) -> tuple[Population, jax.Array, PyTree, jax.Array]:
    """Generations, and as stacked coordinates the lowest point and the mean."""
    low, high = (_in_scales(coordinates, side) for side in coordinates.bounds)
    population, history = evolve(
        lambda row: fun(_from_row(coordinates, row)),
        lambda row: jnp.clip(row, low, high),
        population,
        len(empty),
        generations,
        num,
    )
    rows = jnp.stack([population.lowest, population.mean])
    z = _from_rows(coordinates, rows)
    return population, history, z, jax.vmap(within(fun, coordinates))(z)


def _begin_sweep(coordinates: Coordinates, z: PyTree, value: jax.Array) -> Line:
    row = _to_row(coordinates, z)
    return Line(row, value.astype(row.dtype))


def _sweep(
    fun: Partial,
    coordinates: Coordinates,
    line: Line,
    key: jax.Array,
    order: jax.Array,
    num: jax.Array,
) -> tuple[Line, jax.Array, PyTree, jax.Array]:
    """Steps, and as stacked coordinates the point where they end."""
    low, high = (_in_scales(coordinates, side) for side in coordinates.bounds)
    line, history = sweep(
        lambda row: fun(_from_row(coordinates, row)), (low, high), line, key, order, num
    )
    z = _from_rows(coordinates, line.row[None])
    return line, history, z, jax.vmap(within(fun, coordinates))(z)


def _trials(
    fun: Partial,
    coordinates: Coordinates,
    pool: PyTree,
    pool_values: jax.Array,
    replicas: PyTree,
    key: jax.Array,
) -> tuple[PyTree, jax.Array]:
    """The lowest of points `base + mask * (a - b)`, and their values.

    Half of the trials take the difference of two points of the pool, half a random part
    of the difference of two replicas, which stay apart when the pool has converged.
    """
    flat, first = (
        jax.vmap(lambda z: _to_row(coordinates, z))(z) for z in (pool, replicas)
    )
    num = jnp.maximum(jnp.sum(jnp.isfinite(pool_values)), 1)
    keys = jax.random.split(key, 5)

    def some(key: jax.Array, points: jax.Array, limit: jax.Array | int) -> jax.Array:
        return points[jax.random.randint(key, (len(flat),), 0, limit)]

    base = some(keys[0], flat, jnp.minimum(_BASES, num))
    whole = some(keys[1], flat, num) - some(keys[2], flat, num)
    apart = some(keys[1], first, len(first)) - some(keys[2], first, len(first))
    part = jax.random.uniform(keys[3], (len(flat), 1), flat.dtype)
    mask = jax.random.uniform(keys[4], flat.shape, flat.dtype) < part
    even = jnp.arange(len(flat))[:, None] % 2 == 0
    difference = jnp.where(even, whole, jnp.where(mask, apart, 0.0))
    trials = base + difference
    z = _from_rows(coordinates, trials)
    values = jax.vmap(within(fun, coordinates))(z)
    nearest = jax.lax.map(
        lambda row: jnp.min(jnp.max(jnp.abs(row[None] - flat), axis=1)), trials
    )
    values = jnp.where(nearest > _COPIES, values, jnp.inf)
    chosen = jnp.argsort(values)[:LANES]
    return pick(z, chosen), values[chosen]
