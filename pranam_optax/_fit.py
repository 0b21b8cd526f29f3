"""`fit`: a model fitted to data, with the errors of its parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial, keystr

from pranam_optax._coordinates import broadcasts_to
from pranam_optax._minimize import (
    Callback,
    as_partial,
    check_choice,
    make_method,
    search,
)
from pranam_optax._pranam import Coupling
from pranam_optax._result import MinimizeResult, add_axis, as_matrix, check_single
from pranam_optax._tree import PyTree

Model = Callable[[PyTree, Any], jax.Array]
Loss = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class FitResult(MinimizeResult):
    """What `fit` found; see also `MinimizeResult`.

    Attributes:
      model: the model; `result.predict(x)` applies it at the best params.
      x: the inputs.
      y: the data.
      sigma: standard deviations of the data, or None.
      covariance: of the entries of the params in the order of their leaves, `[P, P]`;
        None for another loss than least squares. Infinite or NaN where the data do
        not determine the params.
      standard_errors: like one model's params, or None: the square roots of the
        covariance's diagonal.
      chi_square: sum of the squared residuals over sigma at the best params.
    """

    model: Partial
    x: PyTree
    y: jax.Array
    sigma: jax.Array | None
    covariance: jax.Array | None
    standard_errors: PyTree | None
    chi_square: jax.Array

    def predict(self, x: PyTree) -> jax.Array:
        """The model's output at the best params."""
        check_single(self)
        return self.model(self.params, x)

    @property
    def residuals(self) -> jax.Array:
        """y minus the model's predictions."""
        return self.y - self.predict(self.x)

    @property
    def degrees_of_freedom(self) -> int:
        """Number of data less the number of fitted parameters."""
        check_single(self)
        return self.y.size - sum(x.size for x in jax.tree.leaves(self.params))

    def to_dict(self) -> dict[str, Any]:
        """Plain Python: what was found, without the data and the history."""
        errors = {}
        if self.covariance is not None:
            errors = {
                "standard_errors": jax.tree.map(
                    lambda x: np.asarray(x).tolist(), self.standard_errors
                ),
                "covariance": np.asarray(self.covariance).tolist(),
            }
        return super().to_dict() | {
            "chi_square": float(self.chi_square),
            "degrees_of_freedom": self.degrees_of_freedom,
            **errors,
        }

    def plot(self) -> Any:
        """Loss curves, the minima found, and the fit with residuals (matplotlib).

        Returns:
          The Matplotlib figure.
        """
        from pranam_optax._plot import plot_fit

        return plot_fit(self)

    def _summary(self) -> list[tuple[str, str]]:
        return [
            *super()._summary(),
            ("chi-square", f"{float(self.chi_square):.8g}"),
            ("degrees of freedom", str(self.degrees_of_freedom)),
        ]

    def _rows(self) -> list[tuple[str, ...]]:
        rows = super()._rows()
        if self.standard_errors is None:
            return rows
        errors = as_matrix(add_axis(self.standard_errors))[0]
        cells = ["standard error", *(f"{e:.3g}" for e in errors)]
        return [(*row, cell) for row, cell in zip(rows, cells, strict=True)]


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
    polish: Literal["auto", "lm", "lbfgs"] | None = "auto",
    polish_steps: int = 200,
    callback: Callback | None = None,
    progress: bool = False,
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
      polish: `"lm"`, Levenberg-Marquardt (needs optimistix, in the extra `fit`),
        `"lbfgs"` or None; "auto" is "lm" for least squares, else "lbfgs".
      polish_steps: as in `minimize`.
      callback: as in `minimize`.
      progress: as in `minimize`.

    Returns:
      A `FitResult`. In float64 (`jax.config.update("jax_enable_x64", True)`) params
      are good to 6 digits and more; in float32 standard errors are rough.

    Raises:
      ValueError: as `minimize`; for x and y of different length, predictions of
        another shape than `y`, `sigma` not positive, data that are not finite, or
        `polish="lm"` with a `loss`.
      TypeError: for params that are not real floats.
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
    check_choice(polish, ("auto", "lm", "lbfgs", None), "polish")
    if polish == "auto":
        polish = "lm" if loss is None else "lbfgs"
    if polish == "lm" and loss is not None:
        raise ValueError("polish='lm' is for least squares; with a loss use 'lbfgs'")
    method = make_method(num_replicas, num_steps, optimizer, polish, polish_steps)
    x, y, sigma = _check_data(x, y, sigma)
    model = as_partial(model)
    data = {"model": model, "x": x, "y": y, "sigma": sigma}
    residuals = Partial(_residuals, **data)
    fun = Partial(_objective, residuals=residuals, loss=loss and as_partial(loss))
    found = search(
        fun, residuals, init, key, method, coupling, bounds, callback, progress
    )
    covariance, errors, chi_square = _statistics(residuals, found.params, loss is None)
    return FitResult(
        **{f.name: getattr(found, f.name) for f in dataclasses.fields(found)},
        **data,
        covariance=covariance,
        standard_errors=errors,
        chi_square=chi_square,
    )


def _check_data(
    x: PyTree, y: jax.Array | np.ndarray, sigma: jax.Array | np.ndarray | float | None
) -> tuple[PyTree, jax.Array, jax.Array | None]:
    x, y = jax.tree.map(jnp.asarray, x), jnp.asarray(y)
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
    _check_finite(y, "y")
    if sigma is None:
        return x, y, None
    sigma = jnp.asarray(sigma, y.dtype)
    if not broadcasts_to(sigma.shape, y.shape):
        raise ValueError(
            f"sigma has shape {sigma.shape}, which does not broadcast to y's {y.shape}"
        )
    _check_finite(sigma, "sigma")
    if not isinstance(sigma, jax.core.Tracer) and not bool(jnp.all(sigma > 0)):
        raise ValueError(
            f"sigma must be positive, but its least entry is {float(sigma.min())}"
        )
    return x, y, jnp.broadcast_to(sigma, y.shape)


def _check_finite(x: jax.Array, name: str) -> None:
    if isinstance(x, jax.core.Tracer) or bool(jnp.all(jnp.isfinite(x))):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(x)))
    raise ValueError(
        f"{name} must be finite, but {len(bad)} of its {x.size} entries are not; the "
        f"first at index {tuple(bad[0].tolist())}"
    )


def _residuals(
    params: PyTree, *, model: Partial, x: PyTree, y: jax.Array, sigma: jax.Array | None
) -> jax.Array:
    predictions = jnp.asarray(model(params, x))
    if predictions.shape != y.shape:
        raise ValueError(
            f"model returns shape {predictions.shape}, expected that of y, {y.shape}"
        )
    residuals = predictions - y
    return residuals if sigma is None else residuals / sigma


def _objective(
    params: PyTree, *, residuals: Partial, loss: Partial | None
) -> jax.Array:
    r = residuals(params)
    return jnp.sum(jnp.square(r) if loss is None else loss(r))


@functools.partial(jax.jit, static_argnums=2)
def _statistics(
    residuals: Partial, params: PyTree, least_squares: bool
) -> tuple[jax.Array | None, PyTree | None, jax.Array]:
    """Covariance, standard errors and chi-square."""
    r = residuals(params)
    chi_square = jnp.sum(jnp.square(r))
    if not least_squares:
        return None, None, chi_square
    leaves, treedef = jax.tree.flatten(params)
    jacobian = jnp.concatenate(
        [j.reshape(r.size, -1) for j in jax.tree.leaves(jax.jacfwd(residuals)(params))],
        axis=1,
    )
    # Columns of norm 1: params of very different size stay apart from rounding.
    norms = jnp.linalg.norm(jacobian, axis=0)
    num_params = len(norms)
    if r.size < num_params:
        inverse = jnp.full((num_params, num_params), jnp.inf, r.dtype)
    else:
        triangle = jnp.linalg.qr(jacobian / norms[None], mode="r")
        inverse = (
            jax.scipy.linalg.solve_triangular(
                triangle, jnp.eye(num_params, dtype=r.dtype)
            )
            / norms[:, None]
        )
    # With sigma the data's errors are known; without, the residuals tell their size.
    known = residuals.keywords["sigma"] is not None
    spare = r.size - num_params
    variance = jnp.ones_like(chi_square)
    if not known:
        variance = chi_square / spare if spare > 0 else variance * jnp.inf
    covariance = variance * jnp.matmul(
        inverse, inverse.T, precision=jax.lax.Precision.HIGHEST
    )
    deviations = jnp.sqrt(jnp.diagonal(covariance))
    splits = np.cumsum([x.size for x in leaves])[:-1]
    errors = [
        e.reshape(x.shape)
        for e, x in zip(jnp.split(deviations, splits), leaves, strict=True)
    ]
    return covariance, jax.tree.unflatten(treedef, errors), chi_square
