"""Other methods on the same fits: SciPy's, and Levenberg-Marquardt from many starts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import scipy.optimize

Residuals = Callable[[jax.Array], jax.Array]


class Starts(NamedTuple):
    """Levenberg-Marquardt from independent random starts.

    Attributes:
      params: where each start ended, `[starts, num_params]`.
      values: sums of squares there, `[starts]`.
      num_steps: evaluations of residuals and Jacobian that each took, `[starts]`.
    """

    params: np.ndarray
    values: np.ndarray
    num_steps: np.ndarray

    def success_at(self, hits: np.ndarray, num_evaluations: float) -> float:
        """Chance that at least one start of as many as the budget pays for is a hit."""
        starts = num_evaluations / self.num_steps.mean()
        return float(1 - (1 - hits.mean()) ** starts)


def multi_start(
    residuals: Residuals,
    low: np.ndarray,
    high: np.ndarray,
    *,
    num_starts: int,
    max_steps: int,
    seed: int,
) -> Starts:
    """Levenberg-Marquardt from uniform starts."""
    keys = jax.random.split(jax.random.key(seed), num_starts)
    draw = jax.vmap(lambda key: jax.random.uniform(key, low.shape, low.dtype))
    starts = low + (high - low) * np.asarray(draw(keys))
    return refine(residuals, low, high, starts, max_steps=max_steps)


def refine(
    residuals: Residuals,
    low: np.ndarray,
    high: np.ndarray,
    starts: np.ndarray,
    *,
    max_steps: int,
) -> Starts:
    """Levenberg-Marquardt, in the coordinates and with the solver that `fit` uses."""
    center, half = (low + high) / 2, (high - low) / 2
    solver: Any = optimistix.LevenbergMarquardt(
        rtol=1e-11, atol=1e-14, linear_solver=lineax.Normal(lineax.Cholesky())
    )

    def to_params(z: jax.Array) -> jax.Array:
        return center + half * jnp.sin(z)

    @jax.jit
    @jax.vmap
    def run(start: jax.Array) -> Any:
        # On a bound itself the sine is stationary.
        u = jnp.clip((start - center) / half, -0.999, 0.999)
        solution: Any = optimistix.least_squares(
            lambda z, _: residuals(to_params(z)),
            solver,
            jnp.arcsin(u),
            max_steps=max_steps,
            throw=False,
        )
        b = to_params(solution.value)
        return b, jnp.sum(residuals(b) ** 2), solution.stats["num_steps"]

    return Starts(*map(np.asarray, run(starts)))


def polish(residuals: Residuals, b: np.ndarray) -> np.ndarray:
    """SciPy's Levenberg-Marquardt, from where another method ended."""
    with np.errstate(all="ignore"):
        jacobian = jax.jit(jax.jacfwd(residuals))
        try:
            found = scipy.optimize.least_squares(
                jax.jit(residuals), b, jac=jacobian, method="lm", x_scale="jac",
                ftol=1e-14, xtol=1e-14, gtol=1e-14,
            )  # fmt: skip
        except ValueError:  # not finite at the start
            return b
    return np.asarray(found.x)


def differential_evolution(
    residuals: Residuals,
    low: np.ndarray,
    high: np.ndarray,
    *,
    num_evaluations: int,
    seed: int,
) -> tuple[np.ndarray, int]:
    """SciPy's, vectorised, with the population size of its default."""

    @jax.jit
    def values(points: jax.Array) -> jax.Array:
        rss = jax.vmap(lambda b: jnp.sum(residuals(b) ** 2))(points.T)
        return jnp.where(jnp.isfinite(rss), rss, 1e300)

    population = 15 * len(low)
    found = scipy.optimize.differential_evolution(
        lambda points: np.asarray(values(points)),
        np.stack([low, high], axis=1),
        rng=seed,
        vectorized=True,
        updating="deferred",
        polish=False,
        tol=0,
        maxiter=max(num_evaluations // population - 1, 1),
    )
    return np.asarray(found.x), int(found.nfev)


def dual_annealing(
    residuals: Residuals,
    low: np.ndarray,
    high: np.ndarray,
    *,
    num_evaluations: int,
    seed: int,
) -> tuple[np.ndarray, int]:
    """SciPy's, whose local searches are given the gradient; it counts as well."""
    count = 0

    def rss(b: jax.Array) -> jax.Array:
        return jnp.sum(residuals(b) ** 2)

    @jax.jit
    def value(b: jax.Array) -> jax.Array:
        value = rss(b)
        return jnp.where(jnp.isfinite(value), value, jnp.finfo(value.dtype).max)

    grad = jax.jit(jax.grad(rss))

    def fun(b: np.ndarray) -> float:
        nonlocal count
        count += 1
        return float(value(b))

    def jac(b: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return np.nan_to_num(grad(b), nan=0.0, posinf=0.0, neginf=0.0)

    def stop(b: np.ndarray, value: float, context: int) -> bool:
        return count >= num_evaluations

    with np.errstate(all="ignore"):
        found = scipy.optimize.dual_annealing(
            fun,
            np.stack([low, high], axis=1),
            rng=seed,
            maxiter=num_evaluations,
            maxfun=num_evaluations,
            callback=stop,
            minimizer_kwargs={
                "method": "L-BFGS-B",
                "jac": jac,
                "bounds": np.stack([low, high], axis=1),
            },
        )
    return np.asarray(found.x), count
