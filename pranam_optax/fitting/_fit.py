"""`fit`: a model fitted to data, with the errors of its parameters."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pranam_optax._pranam import Coupling
from pranam_optax._sharding import with_auto_axes
from pranam_optax._tree import PyTree
from pranam_optax.fitting._constraints import (
    check_read,
    free_part,
    in_order,
    make_constraints,
    make_exchangeable,
)
from pranam_optax.fitting._coupled import Release
from pranam_optax.fitting._data import check_data
from pranam_optax.fitting._fit_result import FitResult
from pranam_optax.fitting._minimize import Callback, Options, make_starts, search
from pranam_optax.fitting._polish import Polish, needs_residuals, second_order
from pranam_optax.fitting._search import Budget
from pranam_optax.fitting._statistics import (
    scaled_residuals,
    spread,
    statistics,
    sum_of_squares,
)
from pranam_optax.fitting._trace import (
    as_partial,
    call,
    explained,
    trace,
    vector_function,
)

# Fits that need slow replicas succeed more often if these are pulled less (ENSO and
# Bennett5 of NIST). Rugged functions want all replicas coupled alike.
_RELEASE = Release(slowest=0.5)

Model = Callable[[PyTree, Any], jax.Array]
Loss = Callable[[jax.Array], jax.Array]


@with_auto_axes
def fit(
    model: Model,
    x: PyTree,
    y: Any,
    init: PyTree | Callable[[jax.Array], PyTree] | None = None,
    *,
    bounds: PyTree | None = None,
    shapes: PyTree | None = None,
    fixed: Mapping[str, Any] | None = None,
    exchangeable: Sequence[str] | Sequence[Sequence[str]] = (),
    sigma: Any = None,
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
        along axis 0; lists, and objects of pandas and xarray (of a data frame the model
        gets a dict of its columns).
      y: the data, `[n]` or `[n, ...]`.
      init: as in `minimize`; may be left out if the bounds are finite.
      bounds: as in `minimize`.
      shapes: as in `minimize`.
      fixed: params that are not fitted, if the params are a dict: a value by name, or a
        function of all params that have none. `init` and `bounds` need not have them.
      exchangeable: names of params whose entries along axis 0 belong to equal terms,
        such as `("center", "height")`; or several such groups. The terms are sorted by
        the first name, so that permuted ones are one minimum.
      sigma: standard deviations of the data, a number or an array that broadcasts to
        `y`; None if they are equal and unknown.
      loss: L, applied to each residual, such as `optax.losses.huber_loss`, against
        outliers; None for least squares.
      key: seed or PRNG key.
      num_replicas: as in `minimize`.
      num_steps: as in `minimize`.
      optimizer: as in `minimize`.
      coupling: as in `minimize`; the default begins at one for the fastest replica, and
        at a half for the slowest, unless there is an `optimizer`.
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
        another shape than `y`, `sigma` not positive, data that are not finite, names
        in `fixed` or `exchangeable` that cannot be used, or
        `fitting.levenberg_marquardt` with a `loss`.
      TypeError: for params, `y` or predictions that are not real, and for a model that
        uses NumPy, SciPy or conditions on its params; it names the line.
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
    release = _RELEASE if optimizer is None else Release()
    options = Options(
        key,
        num_replicas,
        num_steps,
        optimizer,
        release if coupling is None else coupling,
        polish,
        callback,
        progress,
        Budget(max_evaluations, time_limit, target),
        callback_every,
    )
    x, y, sigma = check_data(x, y, sigma)
    model, constraints = as_partial(model), make_constraints(fixed)
    starts = make_starts(
        free_part(init, constraints, "init"),
        free_part(bounds, constraints, "bounds"),
        free_part(shapes, constraints, "shapes"),
        key,
    )
    groups = make_exchangeable(exchangeable, starts.box)
    unit = call(spread, y if sigma is None else y / sigma)

    def predict(params: PyTree) -> jax.Array:
        return model(constraints.complete(params), x)

    scaled = scaled_residuals(predict, y, sigma, unit)
    with explained():
        check_read(lambda params: model(params, x), constraints, starts.box.low)
    residuals, failure = None, None
    if loss is None:
        try:
            with explained():
                residuals = vector_function(scaled, starts.box.low)
        except Exception as error:  # The sum may have a gradient, where its parts fail.
            if needs_residuals(polish):
                raise
            failure = error
        found = search(
            lambda p: jnp.sum(jnp.square(scaled(p))),
            residuals,
            starts,
            options,
            jnp.square(unit),
        )
    else:
        in_sigmas = scaled_residuals(predict, y, sigma, jnp.ones_like(unit))
        found = search(lambda p: jnp.sum(loss(in_sigmas(p))), None, starts, options)
    if groups:
        sort = functools.partial(in_order, groups=groups)
        found = dataclasses.replace(
            found,
            params=sort(found.params),
            replica_params=jax.vmap(sort)(found.replica_params),
        )
    covariance, errors, chi_square = None, None, None
    if residuals is not None:
        try:
            covariance, errors, chi_square = call(
                statistics,
                residuals,
                trace(constraints.complete, found.params),
                found.params,
                unit,
                sigma is not None,
            )
        except Exception as error:
            failure = error
    if failure is not None:
        warnings.warn(
            "the covariance could not be computed, so that the fit has no standard "
            f"errors: {type(failure).__name__}: {failure}",
            stacklevel=3,
        )
    if chi_square is None:
        square = trace(scaled, found.params)
        chi_square = call(sum_of_squares, square, found.params, unit)
    return FitResult(
        found,
        model,
        x,
        y,
        sigma,
        covariance,
        errors,
        chi_square,
        constraints,
        starts.box,
        y.size - sum(x.size for x in jax.tree.leaves(found.params)),
    )
