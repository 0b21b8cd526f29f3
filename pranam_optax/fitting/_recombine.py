"""Recombination: good points moved by the differences of others."""

from collections.abc import Generator

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from pranam_optax._tree import PyTree
from pranam_optax.fitting._coordinates import Coordinates
from pranam_optax.fitting._coupled import pick
from pranam_optax.fitting._search import (
    COPIES,
    LANES,
    Chunk,
    Search,
    at_rows,
    descend_from,
    distinct,
    join,
    to_row,
)
from pranam_optax.fitting._trace import call

# How many of the lowest points may be moved, and after how many cycles without gain it
# ends.
_BASES = 8
_STALLED = 16


class Pool:
    """The lowest distinct points of a run: the replicas, and what came of them."""

    def __init__(self, z: PyTree, values: np.ndarray):
        self.z, self.values, self.size = z, values, len(values)
        self.first = z

    def distinct(self, num: int) -> np.ndarray:
        return distinct(self.z, self.values, num)

    def add(self, z: PyTree, values: np.ndarray) -> bool:
        """Whether any of these points is lower than others and no copy of one."""
        z, values = join([(self.z, self.values), (z, values)])
        chosen = distinct(z, values, self.size)
        padded = chosen[np.arange(self.size) % len(chosen)]
        self.z = pick(z, padded)
        self.values = np.where(
            np.arange(self.size) < len(chosen), values[padded], np.inf
        )
        return bool(np.any(chosen >= self.size))


def recombine(
    search: Search, pool: Pool, key: jax.Array, num_cycles: int
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
        for chunk in descend_from(search, z, max_chunks=1):
            yield chunk
        idle = 0 if pool.add(chunk.z, chunk.point_values) else idle + 1
        if idle == _STALLED:
            return


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
        jax.vmap(lambda z: to_row(coordinates, z))(z) for z in (pool, replicas)
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
    z, values = at_rows(fun, coordinates, trials)
    nearest = jax.lax.map(
        lambda row: jnp.min(jnp.max(jnp.abs(row[None] - flat), axis=1)), trials
    )
    values = jnp.where(nearest > COPIES, values, jnp.inf)
    chosen = jnp.argsort(values)[:LANES]
    return pick(z, chosen), values[chosen]
