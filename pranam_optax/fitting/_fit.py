"""`fit`: a model fitted to data, with the errors of its parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial, keystr

from pranam_optax._pranam import Coupling
from pranam_optax._sharding import with_auto_axes
from pranam_optax._tree import PyTree, compute_dtype, is_traced
from pranam_optax.fitting._coordinates import broadcasts_to, working_dtype
from pranam_optax.fitting._minimize import Callback, Options, search
from pranam_optax.fitting._polish import Function, Polish, power_of_two, second_order
from pranam_optax.fitting._result import FitResult
from pranam_optax.fitting._runs import Budget
from pranam_optax.fitting._trace import as_partial, call, vector_function

Model = Callable[[PyTree, Any], jax.Array]
Loss = Callable[[jax.Array], jax.Array]

# How much of the range of the data may be lost when they are rounded to float32.
_ROUNDING = 1e-4


@with_auto_axes
def fit(
    model: Model,
    x: PyTree,
    y: jax.Array | np.ndarray,
    init: PyTree | Callable[[jax.Array], PyTree] | None = None,
    *,
    bounds: PyTree | None = None,
    sigma: jax.Array | np.ndarray | float | None = None,
    loss: Loss | None = None,
    key: int | jax.Array = 0,
    num_replicas: int = 64,
    num_steps: int = 1000,
    optimizer: optax.GradientTransformation | None = None,
    coupling: Coupling | None = None,
    polish: Polish | None = second_order(),  # noqa: B008
    callback: Callback | None = None,
    callback_every: int | None = None,
    progress: bool = False,
    max_evaluations: int | None = None,
    time_limit: float | None = None,
    target: float | None = None,
) -> FitResult:
    r"""Fits a model to data, from random starts, with the errors of its parameters.

    Minimises, with the residuals :math:`\rho_i = (m(p, x)_i - y_i) / \sigma_i`,

    .. math:: \chi^2(p) = \sum_i \rho_i^2 \quad \text{or} \quad \sum_i L(\rho_i)

    as `minimize` does, with Levenberg-Marquardt in place of L-BFGS for least squares.
    At the minimum, with the Jacobian :math:`J = \partial \rho / \partial p`,

    .. math:: \mathrm{cov}(p) = s^2 (J^T J)^{-1}, \quad s^2 = 1 \text{ or }
      \chi^2 / (n - P)

    where :math:`s^2 = 1` if `sigma` is given and the estimate from the residuals if
    not.

    Args:
      model: `model(params, x)`, the predictions, of the shape of `y`.
      x: the inputs: an array, or a pytree of arrays, with one entry per entry of `y`
        along axis 0.
      y: the data, `[n]` or `[n, ...]`.
      init: as in `minimize`; may be left out if the bounds are finite.
      bounds: as in `minimize`.
      sigma: standard deviations of the data, a number or an array that broadcasts to
        `y`; None if they are equal and unknown.
      loss: L, applied to each residual, such as `optax.losses.huber_loss`, against
        outliers; None for least squares.
      key: seed or PRNG key.
      num_replicas: as in `minimize`.
      num_steps: as in `minimize`.
      optimizer: as in `minimize`.
      coupling: as in `minimize`.
      polish: as in `minimize`; the default is Levenberg-Marquardt for least squares
        (needs optimistix, in the extra `fit`) and L-BFGS with a `loss`.
      callback: as in `minimize`.
      callback_every: as in `minimize`.
      progress: as in `minimize`.
      max_evaluations: as in `minimize`.
      time_limit: as in `minimize`.
      target: as in `minimize`: of chi-square, or of the sum of the losses.

    Returns:
      A `FitResult`. In float64 (`jax.config.update("jax_enable_x64", True)`) params
      are good to 6 digits and more; in float32 standard errors are rough.

    Raises:
      ValueError: as `minimize`; for x and y of different length, predictions of
        another shape than `y`, `sigma` not positive, data that are not finite, or
        `fitting.levenberg_marquardt` with a `loss`.
      TypeError: for params, `y` or predictions that are not real.
      ImportError: if `polish` needs optimistix and it is missing.

    Examples:
      >>> import jax.numpy as jnp, pranam_optax
      >>> def decay(p, t):
      ...     return p["a"] * jnp.exp(-p["rate"] * t)
      >>> t = jnp.linspace(0.0, 4.0, 30)
      >>> data = decay({"a": 3.0, "rate": 1.5}, t)
      >>> result = pranam_optax.fit(
      ...     decay, t, data, bounds={"a": (0, 100), "rate": (0, 100)},
      ...     num_replicas=16, num_steps=100)
      >>> print(f"{result.params['a']:.3f} {result.params['rate']:.3f}")
      3.000 1.500
    """
    options = Options(
        key,
        num_replicas,
        num_steps,
        optimizer,
        coupling,
        polish,
        callback,
        progress,
        Budget(max_evaluations, time_limit, target),
        callback_every,
    )
    x, y, sigma = _check_data(x, y, sigma)
    model = as_partial(model)
    unit = _spread(y if sigma is None else y / sigma)

    def residuals(params: PyTree) -> jax.Array:
        return _residuals(model, params, x, y, sigma)

    def scaled(params: PyTree) -> jax.Array:
        r = residuals(params)
        return (r / unit.astype(r.dtype)).astype(working_dtype())

    if loss is not None:
        found = search(
            lambda p: jnp.sum(loss(residuals(p))), None, init, bounds, options
        )
    else:
        found = search(
            lambda p: jnp.sum(jnp.square(scaled(p))),
            scaled,
            init,
            bounds,
            options,
            jnp.square(unit),
        )
    covariance, errors, chi_square = call(
        _statistics if loss is None else _chi_square,
        vector_function(scaled, found.params),
        found.params,
        unit,
        sigma is not None,
    )
    return FitResult(found, model, x, y, sigma, covariance, errors, chi_square)


def _check_data(
    x: PyTree, y: jax.Array | np.ndarray, sigma: jax.Array | np.ndarray | float | None
) -> tuple[PyTree, jax.Array, jax.Array | None]:
    x = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _to_array(leaf, f"x{keystr(path)}"), x
    )
    y = _to_array(y, "y")
    if jnp.iscomplexobj(y):
        raise TypeError(
            f"y has dtype {y.dtype}; stack its real and imaginary parts, and those of "
            "the model, along a new last axis"
        )
    if not jnp.issubdtype(y.dtype, jnp.floating):
        y = y.astype(float)
    if not y.ndim or not len(y):
        raise ValueError(f"y has shape {y.shape}; expected one or more data on axis 0")
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if leaf.shape[:1] != y.shape[:1]:
            raise ValueError(
                f"x{keystr(path)} has shape {leaf.shape} and y has shape {y.shape}; "
                "expected the same length along axis 0"
            )
        _check_entries(~jnp.isnan(leaf), f"x{keystr(path)}", "must not be NaN")
    _check_entries(jnp.isfinite(y), "y", "must be finite")
    if sigma is None:
        return x, y, None
    sigma = jnp.asarray(sigma, y.dtype)
    if not broadcasts_to(sigma.shape, y.shape):
        raise ValueError(
            f"sigma has shape {sigma.shape}, which does not broadcast to y's {y.shape}"
        )
    _check_entries(jnp.isfinite(sigma), "sigma", "must be finite")
    if not is_traced(sigma) and not bool(jnp.all(sigma > 0)):
        raise ValueError(
            f"sigma must be positive, but its least entry is {float(sigma.min())}"
        )
    return x, y, jnp.broadcast_to(sigma, y.shape)


def _to_array(x: Any, name: str) -> jax.Array:
    """An array of JAX, unless its dtypes cannot hold the data."""
    if isinstance(x, jax.Array):
        return x
    exact = np.asarray(x)
    dtype = jax.dtypes.canonicalize_dtype(exact.dtype)
    if jnp.issubdtype(dtype, jnp.integer) and np.any(exact.astype(dtype) != exact):
        dtype = jax.dtypes.canonicalize_dtype(np.float64)  # beyond int32
    array = exact.astype(dtype)
    if array.dtype != exact.dtype and array.size and np.isrealobj(exact):
        error = np.max(np.abs(array.astype(np.float64) - exact))
        if error > _ROUNDING * np.ptp(exact):
            raise ValueError(
                f"{name} lies between {exact.min()} and {exact.max()}, and {dtype} is "
                f"off by up to {error:.2g} there: subtract an offset, or enable "
                "jax_enable_x64"
            )
    return jnp.asarray(array)


def _check_entries(good: jax.Array, name: str, rule: str) -> None:
    if is_traced(good) or bool(jnp.all(good)):
        return
    bad = np.argwhere(~np.asarray(good))
    raise ValueError(
        f"{name} {rule}, but {len(bad)} of its {good.size} entries are not; the first "
        f"at index {tuple(bad[0].tolist())}"
    )


def _spread(y: jax.Array) -> jax.Array:
    """The power of two next to the range of the data, or to their size."""
    y = y.astype(compute_dtype(y))
    spread, size = jnp.max(y) - jnp.min(y), jnp.max(jnp.abs(y))
    spread = jnp.where(spread > 0, spread, jnp.where(size > 0, size, 1.0))
    return power_of_two(spread)


def _residuals(
    model: Partial, params: PyTree, x: PyTree, y: jax.Array, sigma: jax.Array | None
) -> jax.Array:
    predictions = jnp.asarray(model(params, x))
    if jnp.iscomplexobj(predictions):
        raise TypeError(
            f"model returns dtype {predictions.dtype}, expected real floats"
        )
    if predictions.shape != y.shape:
        raise ValueError(
            f"model returns shape {predictions.shape}, expected that of y, {y.shape}"
        )
    dtype = compute_dtype(predictions, y)
    residuals = predictions.astype(dtype) - y.astype(dtype)
    return residuals if sigma is None else residuals / sigma.astype(dtype)


def _chi_square(
    residuals: Function, params: PyTree, unit: jax.Array, known: bool
) -> tuple[None, None, jax.Array]:
    del known
    return None, None, jnp.sum(jnp.square(residuals(params) * unit))


def _statistics(
    residuals: Function, params: PyTree, unit: jax.Array, known: jax.Array
) -> tuple[jax.Array, PyTree, jax.Array]:
    """Covariance, standard errors and chi-square, from residuals divided by the unit.

    `known` says whether the data's errors are; if not, the residuals tell their size.
    """
    r = residuals(params)
    chi_square = jnp.sum(jnp.square(r))
    leaves, treedef = jax.tree.flatten(params)
    jacobian = jnp.concatenate(
        [
            j.reshape(r.size, -1).astype(r.dtype)
            for j in jax.tree.leaves(jax.jacfwd(residuals)(params))
        ],
        axis=1,
    )
    spare = r.size - jacobian.shape[1]
    estimate = chi_square / spare if spare > 0 else jnp.inf
    variance = jnp.where(known, 1 / jnp.square(unit), estimate).astype(r.dtype)
    covariance, deviations = _inverse_gram(jacobian)
    deviations = jnp.sqrt(variance) * deviations
    splits = np.cumsum([x.size for x in leaves])[:-1]
    errors = [
        e.reshape(x.shape)
        for e, x in zip(jnp.split(deviations, splits), leaves, strict=True)
    ]
    return (
        variance * covariance,
        jax.tree.unflatten(treedef, errors),
        chi_square * jnp.square(unit),
    )


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
