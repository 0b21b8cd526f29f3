r"""Confidence intervals by profile: one parameter held, all others fitted anew.

With the least chi-square where a parameter is t, less that of the fit, in units of the
noise,

.. math:: d(t) = \sqrt{(\chi^2_\min(t) - \chi^2) / s^2},

which is linear in t on either side for a linear model, the ends of an interval solve
:math:`d(t) = q`. All ends are searched for at once.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from pranam_optax._tree import PyTree
from pranam_optax.fitting._coordinates import Bounds, Coordinates, make_coordinates
from pranam_optax.fitting._coupled import add_axis, pick
from pranam_optax.fitting._polish import second_order
from pranam_optax.fitting._trace import call

# How often an interval is doubled before it is said to have no end.
_DOUBLINGS = 30
# How far below that of the fit, in units of the noise, a chi-square is another minimum.
_LOWER = 0.01


def profile(
    residuals: Partial,
    params: PyTree,
    bounds: Bounds,
    covariance: jax.Array,
    noise: jax.Array,
    *,
    entries: np.ndarray,
    quantile: float,
) -> tuple[np.ndarray, bool]:
    """The ends of the intervals of some entries of the params.

    Args:
      residuals: of one model's params.
      params: the best.
      bounds: of the params.
      covariance: of their entries.
      noise: variance of the residuals.
      entries: of the params, as numbers in their covariance.
      quantile: q.

    Returns:
      The ends, `[2, entries]`, and whether a chi-square below the best one was met.
    """
    from scipy.optimize import elementwise

    coordinates = make_coordinates(add_axis(params), bounds)
    start, low, high = (
        np.asarray(ravel_pytree(tree)[0], np.float64) for tree in (params, *bounds)
    )
    which = np.concatenate([entries, entries])
    sign = np.repeat([-1.0, 1.0], len(entries))
    center, limit = start[which], np.where(sign < 0, low[which], high[which])
    matrix = np.asarray(covariance, np.float64)
    errors = np.sqrt(np.diagonal(matrix))[which]
    # How the other params follow; where that is unknown, not at all.
    with np.errstate(all="ignore"):
        follow = np.nan_to_num(matrix[which] / np.square(errors)[:, None], posinf=0.0)
    follow[np.arange(len(which)), which] = 1.0
    known = np.isfinite(errors) & (errors > 0)
    unit = np.where(known, quantile * errors, np.abs(center) + (center == 0))
    tolerance = float(jnp.finfo(jnp.asarray(noise).dtype).eps) ** 0.5
    lowest = 0.0

    def place(u: np.ndarray, end: np.ndarray) -> np.ndarray:
        return center[end] + sign[end] * u * unit[end]

    def excess(u: np.ndarray, end: np.ndarray) -> np.ndarray:
        """d(t) - q, u units from the best value of each end."""
        nonlocal lowest
        depths = []
        for i in range(0, len(u), len(which)):  # of one length: compiled once
            some = np.resize(end[i : i + len(which)], len(which))
            t = place(np.resize(u[i : i + len(which)], len(which)), some)
            guess = start + (t - center[some])[:, None] * follow[some]
            guess = np.clip(guess, low, high)
            fixed = guess, which[some], t
            depths.append(call(_depths, residuals, coordinates, params, noise, fixed))
        depth = np.concatenate(depths)[: len(u)].astype(np.float64)
        lowest = min(lowest, float(np.nanmin(depth)))
        return np.sqrt(np.maximum(depth, 0.0)) - quantile

    room = np.abs(limit - center) / unit
    ends = np.where(np.isfinite(limit), limit, sign * np.inf)
    open_ = np.flatnonzero((room > 0) & (errors > 0))
    ends[errors == 0] = center[errors == 0]
    bracket = elementwise.bracket_root(
        excess,
        np.zeros(len(open_)),
        np.minimum(room[open_], 1.0),
        xmin=0.0,
        xmax=room[open_],
        args=(open_,),
        maxiter=_DOUBLINGS,
    )
    found = np.flatnonzero(bracket.success)
    root = elementwise.find_root(
        excess,
        tuple(side[found] for side in bracket.bracket),
        args=(open_[found],),
        tolerances={"xatol": tolerance, "fatol": tolerance},
    )
    ends[open_[found]] = place(root.x, open_[found])
    return ends.reshape(2, -1), lowest < -_LOWER


def _depths(
    residuals: Partial,
    coordinates: Coordinates,
    params: PyTree,
    noise: jax.Array,
    fixed: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """d(t) squared, for several t: a first guess, which entry is held, and where."""
    best = jnp.sum(jnp.square(residuals(params)))
    flat, unravel = ravel_pytree(params)

    def one(guess: jax.Array, which: jax.Array, held: jax.Array) -> jax.Array:
        def at(z: PyTree) -> jax.Array:
            x = ravel_pytree(coordinates.to_params(z))[0]
            x = jnp.where(jnp.arange(len(flat)) == which, held.astype(x.dtype), x)
            return residuals(unravel(x))

        def fun(z: PyTree) -> jax.Array:
            return jnp.sum(jnp.square(at(z)))

        z = coordinates.from_params(unravel(guess.astype(flat.dtype)))
        refined = second_order()(fun, at, add_axis(z))
        # The guess may be on a bound, which coordinates do not reach.
        there = unravel(guess.astype(flat.dtype))
        return jnp.fmin(
            fun(pick(refined.params, 0)), jnp.sum(jnp.square(residuals(there)))
        )

    return (jax.vmap(one)(*fixed) - best) / noise
