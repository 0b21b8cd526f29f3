r"""CMA-ES: replicas drawn from a normal distribution that follows the best of them.

Where gradients tell nothing (plateaus) or tell of ripples alone, the order of the
values still leads downhill. Each generation draws :math:`\lambda` points
:math:`z_i = m + \sigma y_i`, :math:`y_i \sim N(0, C)`, and with weights :math:`w_i` of
the best half, sorted by value,

.. math::
  m &\mathrel{+}= \sigma \bar y, \quad \bar y = \textstyle\sum_i w_i y_i \\
  p_\sigma &= (1 - c_\sigma) p_\sigma
    + \sqrt{c_\sigma (2 - c_\sigma) \mu} \, C^{-1/2} \bar y \\
  p_c &= (1 - c_c) p_c + h \sqrt{c_c (2 - c_c) \mu} \, \bar y \\
  C &= (1 - c_1 - c_\mu) C + c_1 p_c p_c^T + c_\mu \textstyle\sum_i w_i y_i y_i^T \\
  \sigma &\mathrel{\times}= \exp \big(\tfrac{c_\sigma}{d_\sigma}
    (|p_\sigma| / E|N(0, I)| - 1)\big)

In a box, a point outside is evaluated at the nearest one inside, :math:`\Pi z`, and
sorted by :math:`f(\Pi z) + q |z - \Pi z|^2 / \sigma^2`, with q the distance between the
quartiles of the generation's values.

References:
  N. Hansen, `The CMA evolution strategy: A tutorial
  <https://arxiv.org/abs/1604.00772>`_, 2016: the equations and their constants.
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
    HORIZON,
    Chunk,
    Search,
    at_rows,
    descend_from,
    distinct,
    from_row,
    in_scales,
    join,
    to_row,
)
from pranam_optax.fitting._trace import call

# Standard deviation of the first generation, in scales of the coordinates.
_SIGMA = 0.4
# The first population is so many times the usual size: descents serve small ones.
_FIRST_POPULATION = 6
# Descents agree if their values differ by so many roundings.
_CONVERGED = 100


class Population(NamedTuple):
    """The distribution of the next generation, and the lowest point of all before.

    Attributes:
      key: of the next draws.
      mean: m, `[n]`.
      sigma: its scale.
      covariance: C, `[n, n]`.
      axes: C's square root, `B D` with eigenvectors B and roots D of eigenvalues.
      step_path: the path of the mean, in units of the distribution.
      path: the path of the mean.
      lowest: the lowest point seen.
      value: the value there.
    """

    key: jax.Array
    mean: jax.Array
    sigma: jax.Array
    covariance: jax.Array
    axes: tuple[jax.Array, jax.Array]
    step_path: jax.Array
    path: jax.Array
    lowest: jax.Array
    value: jax.Array


def begin_population(
    key: jax.Array, mean: jax.Array, sigma: jax.Array | float = _SIGMA
) -> Population:
    """A round population."""
    n, dtype = len(mean), mean.dtype
    eye, zero, one = jnp.eye(n, dtype=dtype), jnp.zeros_like(mean), jnp.ones_like(mean)
    sigma, value = jnp.asarray(sigma, dtype), jnp.asarray(jnp.inf, dtype)
    return Population(key, mean, sigma, eye, (eye, one), zero, zero, mean, value)


def evolve(
    fun: Callable[[jax.Array], jax.Array],
    project: Callable[[jax.Array], jax.Array],
    population: Population,
    size: int,
    generations: jax.Array,
    num_generations: jax.Array | int,
) -> tuple[Population, jax.Array]:
    """At most `len(generations)` generations of `size` points each.

    Args:
      fun: of a point `[n]` in the box.
      project: the nearest point in the box.
      population: where it begins.
      size: lambda.
      generations: their numbers, from 0 for the first of all.
      num_generations: how many of them to run.

    Returns:
      The population, and the lowest value of each generation; NaN for those not run.
    """
    n, dtype = len(population.mean), population.mean.dtype
    # The constants of the tutorial, named as there.
    weights = np.log((size + 1) / 2) - np.log(np.arange(1, size + 1))
    weights = np.maximum(weights, 0) / np.maximum(weights, 0).sum()
    mu = 1 / np.sum(weights**2)
    c_sigma = (mu + 2) / (n + mu + 5)
    d_sigma = 1 + 2 * max(0.0, ((mu - 1) / (n + 1)) ** 0.5 - 1) + c_sigma
    c_c = (4 + mu / n) / (n + 4 + 2 * mu / n)
    c_1 = 2 / ((n + 1.3) ** 2 + mu)
    c_mu = min(1 - c_1, 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
    length = n**0.5 * (1 - 1 / (4 * n) + 1 / (21 * n**2))
    # Generations between two decompositions of C.
    pause = max(1, int(1 / (c_1 + c_mu) / n / 10))
    w = jnp.asarray(weights, dtype)

    def generation(
        i: jax.Array, carry: tuple[Population, jax.Array]
    ) -> tuple[Population, jax.Array]:
        old, history = carry
        basis, roots = old.axes
        key, draw = jax.random.split(old.key)
        y = (jax.random.normal(draw, (size, n), dtype) * roots[None]) @ basis.T
        points = old.mean[None] + old.sigma * y
        inside = jax.vmap(project)(points)
        values = jax.vmap(fun)(inside)
        quartiles = jnp.nanpercentile(values, jnp.array([25.0, 75.0]).astype(dtype))
        outside = jnp.sum(jnp.square((points - inside) / old.sigma), axis=1)
        order = jnp.argsort(values + (quartiles[1] - quartiles[0]) * outside)
        y = y[order]
        step = w @ y

        mean = old.mean + old.sigma * step
        white = basis @ ((basis.T @ step) / roots)
        step_path = (1 - c_sigma) * old.step_path
        step_path += (c_sigma * (2 - c_sigma) * mu) ** 0.5 * white
        ratio = jnp.linalg.norm(step_path) / length
        age = 1 + generations[i].astype(dtype)
        started = 1 - (1 - c_sigma) ** (2 * age)
        h = ratio < (1.4 + 2 / (n + 1)) * jnp.sqrt(started)
        path = (1 - c_c) * old.path
        path += jnp.where(h, (c_c * (2 - c_c) * mu) ** 0.5, 0.0) * step
        keep = 1 - c_1 - c_mu + jnp.where(h, 0.0, c_1 * c_c * (2 - c_c))
        covariance = (
            keep * old.covariance
            + c_1 * path[:, None] * path[None]
            + c_mu * (y.T * w[None]) @ y
        )
        rise = jnp.minimum(1.0, c_sigma / d_sigma * (ratio - 1))
        axes = jax.lax.cond(
            generations[i] % pause == 0, _axes, lambda _: old.axes, covariance
        )
        first = jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
        best = values[first]
        lower = best < old.value
        new = Population(
            key,
            mean,
            old.sigma * jnp.exp(rise),
            covariance,
            axes,
            step_path,
            path,
            jnp.where(lower, inside[first], old.lowest),
            jnp.where(lower, best, old.value),
        )
        return new, history.at[i].set(best)

    empty = jnp.full(len(generations), jnp.nan, dtype)
    return jax.lax.fori_loop(0, num_generations, generation, (population, empty))


def _axes(covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors, and the square roots of the eigenvalues."""
    values, vectors = jnp.linalg.eigh((covariance + covariance.T) / 2)
    tiny = jnp.finfo(values.dtype).eps ** 2 * values[-1]
    return vectors, jnp.sqrt(jnp.maximum(values, tiny))


# The run


def first_size(n: int) -> int:
    return _FIRST_POPULATION * (4 + int(3 * np.log(n)))


def evolution(
    search: Search, key: jax.Array, count: int
) -> Generator[Chunk, None, None]:
    """A population, twice as large each time.

    Now and then its lowest point and its mean descend. It ends when they only lead to
    one minimum any more: what is left to it is slow convergence.
    """
    n = search.num_params
    size = first_size(n) * 2 ** min(count, 12)
    start_key, key = jax.random.split(key)
    chunk = search.starts(start_key, 1)
    yield chunk
    population = call(_first_population, key, search.coordinates, pick(chunk.z, 0))
    eps = float(jnp.finfo(population.mean.dtype).eps)
    patience = 2 + -(-30 * n // (size * CHUNK))
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
            step + jnp.arange(CHUNK),
            num,
        )
        values = np.asarray(values)
        lowest = np.append(np.asarray(history)[:num], np.fmin.reduce(values))
        search.speeds["evolution"] = num * size / (time.monotonic() - began)
        made = np.append(size * (1 + np.arange(num)), size * num + 2)
        yield Chunk(made, lowest, z, values, False)
        step += num
        before, end = end, None
        for end in descend_from(search, z):
            yield end
        if before and end and _in_one_minimum(search, before, end):
            break
        record.append(float(population.value))
        width = float(population.sigma * jnp.max(population.axes[1]))
        if not width > eps**0.75:
            break
        if len(record) > patience:
            gain = record[-patience - 1] - record[-1]
            hopeless = record[-1] - HORIZON * gain > search.value
            if hopeless or not gain > 10 * eps * abs(record[-1]):
                break


def _in_one_minimum(search: Search, *ends: Chunk) -> bool:
    """Whether all of these descents have converged to the same point."""
    z, values = join([(end.z, end.point_values) for end in ends])
    size = float(search.slope) + abs(np.fmin.reduce(values))
    limit = _CONVERGED * np.finfo(search.slope.dtype).eps * size
    converged = np.fmax.reduce(values) - np.fmin.reduce(values) <= limit
    return bool(converged) and len(distinct(z, values, 2)) == 1


def _first_population(
    key: jax.Array, coordinates: Coordinates, z: PyTree
) -> Population:
    return begin_population(key, to_row(coordinates, z))


def _evolve(
    fun: Partial,
    coordinates: Coordinates,
    population: Population,
    empty: jax.Array,
    generations: jax.Array,
    num: jax.Array,
) -> tuple[Population, jax.Array, PyTree, jax.Array]:
    """Generations, and as stacked coordinates the lowest point and the mean."""
    low, high = (in_scales(coordinates, side) for side in coordinates.bounds)
    population, history = evolve(
        lambda row: fun(from_row(coordinates, row)),
        lambda row: jnp.clip(row, low, high),
        population,
        len(empty),
        generations,
        num,
    )
    rows = jnp.stack([population.lowest, population.mean])
    return population, history, *at_rows(fun, coordinates, rows)
