"""Residuals, and what least squares says of parameters and predictions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from pranam_optax._tree import PyTree, compute_dtype
from pranam_optax.fitting._coordinates import working_dtype
from pranam_optax.fitting._polish import Function, power_of_two


def spread(y: jax.Array) -> jax.Array:
    """The power of two next to the range of the data, or to their size."""
    y = y.astype(compute_dtype(y))
    spread, size = jnp.max(y) - jnp.min(y), jnp.max(jnp.abs(y))
    spread = jnp.where(spread > 0, spread, jnp.where(size > 0, size, 1.0))
    return power_of_two(spread)


def scaled_residuals(
    predict: Callable[[PyTree], jax.Array],
    y: jax.Array,
    sigma: jax.Array | None,
    unit: jax.Array,
) -> Callable[[PyTree], jax.Array]:
    """Predictions less data, over sigma and the unit, as a function of the params."""

    def residuals(params: PyTree) -> jax.Array:
        predictions = jnp.asarray(predict(params))
        if jnp.iscomplexobj(predictions):
            raise TypeError(
                f"model returns dtype {predictions.dtype}, expected real floats"
            )
        if predictions.shape != y.shape:
            raise ValueError(
                f"model returns shape {predictions.shape}, expected that of y, "
                f"{y.shape}"
            )
        dtype = compute_dtype(predictions, y)
        difference = predictions.astype(dtype) - y.astype(dtype)
        if sigma is not None:
            difference = difference / sigma.astype(dtype)
        return (difference / unit.astype(dtype)).astype(working_dtype())

    return residuals


def sum_of_squares(residuals: Function, params: PyTree, unit: jax.Array) -> jax.Array:
    """Chi-square, from residuals divided by the unit."""
    return jnp.sum(jnp.square(residuals(params) * unit))


def statistics(
    residuals: Function, complete: Partial, params: PyTree, unit: jax.Array, known: Any
) -> tuple[jax.Array, PyTree, jax.Array]:
    """Covariance, standard errors and chi-square, from residuals divided by the unit.

    `known` says whether the data's errors are; if not, the residuals tell their size.
    The errors are of all params, those that `complete` adds to the free ones too.
    """
    r = residuals(params)
    chi_square = jnp.sum(jnp.square(r))
    jacobian = matrix_of(jax.jacfwd(residuals)(params), r)
    spare = r.size - jacobian.shape[1]
    estimate = chi_square / spare if spare > 0 else jnp.inf
    variance = jnp.where(known, 1 / jnp.square(unit), estimate).astype(r.dtype)
    covariance, deviations = _inverse_gram(jacobian)
    covariance, deviations = variance * covariance, jnp.sqrt(variance) * deviations
    errors, every = _split(deviations, params), complete(params)
    if isinstance(every, dict) and len(every) > len(params):
        slopes = jax.jacfwd(complete)(params)
        errors |= {
            name: propagated(matrix_of(slopes[name], x), covariance).reshape(x.shape)
            for name, x in every.items()
            if name not in params
        }
    return covariance, errors, chi_square * jnp.square(unit)


def _split(row: jax.Array, params: PyTree) -> PyTree:
    """The entries of a row in the places of the params."""
    leaves = jax.tree.leaves(params)
    parts = jnp.split(row, np.cumsum([x.size for x in leaves])[:-1])
    shaped = [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), shaped)


def matrix_of(jacobian: PyTree, output: jax.Array) -> jax.Array:
    """The Jacobian of an array as a matrix: its entries, by those of the params."""
    columns = [
        j.reshape(output.size, -1).astype(output.dtype)
        for j in jax.tree.leaves(jacobian)
    ]
    return jnp.concatenate(columns, axis=1)


def propagated(jacobian: jax.Array, covariance: jax.Array) -> jax.Array:
    """Standard errors of what has this Jacobian; of what depends on nothing, zero."""
    known = jnp.isfinite(covariance)
    product = jnp.matmul(
        jacobian, jnp.where(known, covariance, 0.0), precision=jax.lax.Precision.HIGHEST
    )
    variance = jnp.sum(product * jacobian, axis=1)
    unknown = jnp.any((jacobian != 0) & ~jnp.diagonal(known)[None], axis=1)
    return jnp.where(unknown, jnp.inf, jnp.sqrt(jnp.maximum(variance, 0.0)))


def _inverse_gram(jacobian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of J'J, and the square roots of its diagonal.

    Infinite or NaN for params that J does not determine.
    """
    num, eps = jacobian.shape[1], jnp.finfo(jacobian.dtype).eps
    # Columns of one size: params of very different size stay apart from rounding.
    sizes = jnp.max(jnp.abs(jacobian), axis=0)
    sizes = jnp.where(sizes > 0, sizes, 1.0)
    triangle = jnp.linalg.qr(jacobian / sizes[None], mode="r")
    square = jnp.zeros((num, num), jacobian.dtype).at[: len(triangle)].set(triangle)
    _, values, rows = jnp.linalg.svd(square)
    lost = values <= 10 * num * eps * values[0]
    half = rows.T * jnp.where(lost, 0.0, 1 / jnp.where(lost, 1.0, values))[None]
    # Not from the diagonal, which may overflow where its root does not.
    roots = jnp.linalg.norm(half, axis=1) / sizes
    half = half / sizes[:, None]
    inverse = jnp.matmul(half, half.T, precision=jax.lax.Precision.HIGHEST)
    # The params in a direction that leaves the predictions as they are.
    free = jnp.sum(jnp.where(lost[:, None], jnp.square(rows), 0.0), axis=0) > eps**0.5
    unknown = jnp.where(jnp.eye(num, dtype=bool), jnp.inf, jnp.nan)
    return (
        jnp.where(free[:, None] | free[None], unknown, inverse),
        jnp.where(free, jnp.inf, roots),
    )
