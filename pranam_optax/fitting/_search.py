"""What the runs of a search with a budget share: what is left, and what was found.

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
    pick,
    refine,
    within,
)
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
from pranam_optax.fitting._trace import call

# Descents at a time.
LANES = 8
# Steps of a compiled call, between which the budget is looked at, and of a short one.
CHUNK = 50
_SHORT = 16
# A descent or population is given up that would need more than so many chunks like its
# last to win.
HORIZON = 20
# Candidates nearer than this in their coordinates are copies of each other.
COPIES = 1e-2


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
        return int(max(1, min(CHUNK, self.remaining(kind) // size)))

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


def descend_from(
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
    steps = np.arange(CHUNK if max_chunks is None else _SHORT)
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
            hopeless = values - HORIZON * (before - values) > search.value
            idle = np.where(hopeless, PATIENCE, np.asarray(descents.idle))
            descents = descents._replace(idle=jnp.asarray(idle, descents.idle.dtype))
    finally:
        if max_chunks is None:
            search.found.append((descents.params, values))


def join(points: Sequence[tuple[PyTree, np.ndarray]]) -> tuple[PyTree, np.ndarray]:
    """Stacked points and their values, one after the other."""
    z, values = zip(*points, strict=True)
    return jax.tree.map(lambda *x: np.concatenate(x), *z), np.concatenate(values)


def distinct(z: PyTree, values: np.ndarray, num: int) -> np.ndarray:
    """Where the lowest points are, without copies of each other, the lowest first."""
    points = np.concatenate(
        [np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(z)], axis=1
    )
    chosen: list[int] = []
    for i in np.argsort(values, kind="stable"):
        if not np.isfinite(values[i]) or len(chosen) == num:
            break
        distance = np.abs(points[chosen] - points[i]).max(axis=1, initial=0.0)
        if np.all(distance > COPIES):
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


def to_row(coordinates: Coordinates, z: PyTree) -> jax.Array:
    """Params as one vector, in units of their scale: straight, unlike coordinates."""
    return in_scales(coordinates, coordinates.to_params(z))


def in_scales(coordinates: Coordinates, params: PyTree) -> jax.Array:
    scaled = jax.tree.map(lambda x, s: x.astype(s.dtype) / s, params, coordinates.scale)
    return ravel_pytree(scaled)[0]


def from_row(coordinates: Coordinates, row: jax.Array) -> PyTree:
    """The nearest params in the box."""
    x = ravel_pytree(coordinates.scale)[1](row)
    return jax.tree.map(
        lambda x, s, low, high: jnp.clip((x * s).astype(low.dtype), low, high),
        *(x, coordinates.scale, *coordinates.bounds),
    )


def at_rows(
    fun: Partial, coordinates: Coordinates, rows: jax.Array
) -> tuple[PyTree, jax.Array]:
    """Rows as stacked coordinates, and the values there."""
    z = jax.vmap(lambda row: coordinates.from_params(from_row(coordinates, row)))(rows)
    return z, jax.vmap(within(fun, coordinates))(z)
