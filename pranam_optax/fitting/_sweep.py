r"""Coordinate search: one parameter at a time, over the whole of its range.

A function that is a sum over its parameters, or nearly one, has as many minima as there
are combinations of its parameters' own minima, but can be minimised in one sweep. Each
step takes one parameter :math:`x_i` of the point :math:`x` and evaluates

.. math::
  t_k = l_i + \frac{h_i - l_i}{K} (k + u), \quad k = 0 \ldots K - 1,
  \quad u \sim U(0, 1)

with the other parameters as they are, and then points between the neighbours of each of
the lowest of these that are lower than both neighbours. The parameter moves to the
lowest point of all.

References:
  P. Baudiš, P. Pošík, Global line search algorithm hybridized with quadratic
  interpolation and its extension to separable functions, GECCO 2015.
"""

import time
from collections.abc import Callable, Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from pranam_optax._tree import PyTree
from pranam_optax.fitting._coordinates import Coordinates
from pranam_optax.fitting._coupled import pick
from pranam_optax.fitting._search import (
    CHUNK,
    LANES,
    Chunk,
    Search,
    at_rows,
    descend_from,
    from_row,
    in_scales,
    to_row,
)
from pranam_optax.fitting._trace import call

# Points over the range, the minima among them that are looked at closely, and points
# for each of these.
_PROBES = 64
_MINIMA = 8
_ZOOM = 8
# Evaluations of a step.
STEP_COST = _PROBES + _MINIMA * _ZOOM
# The range of a parameter without bounds, in scales to each side.
_REACH = 4.0


class Line(NamedTuple):
    """Where a sweep has got to: a point `[n]` and the value there."""

    row: jax.Array
    value: jax.Array


def sweep(
    fun: Callable[[jax.Array], jax.Array],
    bounds: tuple[jax.Array, jax.Array],
    line: Line,
    key: jax.Array,
    order: jax.Array,
    num_steps: jax.Array | int,
) -> tuple[Line, jax.Array]:
    """At most `len(order)` steps.

    Args:
      fun: of a point `[n]` in the box.
      bounds: of the box, `[n]` each; infinite where there is none.
      line: where it begins.
      key: of the offsets.
      order: which parameter each step takes.
      num_steps: how many of them to take.

    Returns:
      Where it ends, and the value after each step; NaN for those not taken.
    """
    zoom = jnp.asarray(np.linspace(-1, 1, _ZOOM + 2)[1:-1], line.row.dtype)

    def step(j: jax.Array, carry: tuple[Line, jax.Array]) -> tuple[Line, jax.Array]:
        (row, value), history = carry
        i = order[j]
        low, high = _range(row[i], bounds[0][i], bounds[1][i])
        values = jax.vmap(lambda t: fun(row.at[i].set(t)))

        width = (high - low) / _PROBES
        offset = jax.random.uniform(jax.random.fold_in(key, j), (), row.dtype)
        probes = low + width * (jnp.arange(_PROBES, dtype=row.dtype) + offset)
        found = _finite(values(probes))
        padded = jnp.pad(found, 1, constant_values=jnp.inf)
        minimal = (found <= padded[:-2]) & (found <= padded[2:])
        chosen = jnp.argsort(jnp.where(minimal, found, jnp.inf))[:_MINIMA]
        near = probes[chosen][:, None] + width * zoom[None]
        near = jnp.clip(near.ravel(), low, high)

        t = jnp.concatenate([row[i][None], probes, near])
        found = jnp.concatenate([value[None], found, _finite(values(near))])
        best = jnp.argmin(found)
        moved = Line(row.at[i].set(t[best]), found[best])
        return moved, history.at[j].set(found[best])

    history = jnp.full(len(order), jnp.nan, line.value.dtype)
    return jax.lax.fori_loop(0, num_steps, step, (line, history))


def _range(x: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, ...]:
    """Of a parameter, with an end of its own for each bound that is missing."""
    has_low, has_high = jnp.isfinite(low), jnp.isfinite(high)
    below = jnp.where(has_high, high - 2 * _REACH, x - _REACH)
    above = jnp.where(has_low, low + 2 * _REACH, x + _REACH)
    return jnp.where(has_low, low, below), jnp.where(has_high, high, above)


def _finite(values: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(values), jnp.inf, values)


# The run


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
            padded = np.resize(order[step : step + num], min(CHUNK, len(order)))
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
        for chunk in descend_from(search, swept):
            yield chunk
        best = 0  # of the lanes, the one that is used
        if not chunk.point_values[best] < value:
            return


def _begin_sweep(coordinates: Coordinates, z: PyTree, value: jax.Array) -> Line:
    row = to_row(coordinates, z)
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
    low, high = (in_scales(coordinates, side) for side in coordinates.bounds)
    line, history = sweep(
        lambda row: fun(from_row(coordinates, row)), (low, high), line, key, order, num
    )
    return line, history, *at_rows(fun, coordinates, line.row[None])
