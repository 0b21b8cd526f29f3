"""What `fit` found, and what follows from it."""

import dataclasses
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from pranam_optax._tree import PyTree
from pranam_optax.fitting._constraints import Constraints
from pranam_optax.fitting._coordinates import Bounds
from pranam_optax.fitting._data import check_data, check_inputs, like
from pranam_optax.fitting._plot import plot_fit
from pranam_optax.fitting._profile import profile
from pranam_optax.fitting._report import (
    Report,
    add_axis,
    aligned,
    as_matrix,
    check_single,
    each,
    parameter_names,
    to_arrays,
    to_html,
    to_lists,
    to_text,
)
from pranam_optax.fitting._result import MinimizeResult
from pranam_optax.fitting._statistics import (
    matrix_of,
    propagated,
    scaled_residuals,
    spread,
)
from pranam_optax.fitting._trace import (
    as_partial,
    call,
    standard_promotion,
    vector_function,
)

# Correlations that a report lists, and those that `print` mentions.
_LISTED, _STRONG = 0.1, 0.9
# In parts of the scale: how near to a bound a parameter is said to be at it.
_BESIDE = 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class FitResult:
    """What `fit` found: the result of the search, and statistics.

    Attributes:
      search: the `MinimizeResult`, of the free params; its commonest attributes are
        properties here.
      model: the model; `result.predict(x)` applies it at the best params.
      x: the inputs.
      y: the data.
      sigma: standard deviations of the data, or None.
      covariance: of the entries of the free params in the order of their leaves,
        `[P, P]`; `names` has their names. None for another loss than least squares.
        Infinite or NaN where the data do not determine the params, or where a square is
        beyond the range of the dtype.
      standard_errors: like `params`, or None: the square roots of the covariance's
        diagonal, zero for params that are held, propagated for those that are tied.
      chi_square: sum of the squared residuals over sigma at the best params.
      constraints: the params that are not free.
      bounds: of the free params.
      degrees_of_freedom: number of data less the number of free parameters.
    """

    search: MinimizeResult
    model: Partial | None
    x: PyTree
    y: jax.Array | None
    sigma: jax.Array | None
    covariance: Any
    standard_errors: PyTree | None
    chi_square: jax.Array
    constraints: Constraints
    bounds: Bounds
    degrees_of_freedom: int = dataclasses.field(metadata={"static": True})

    value = property(lambda self: self.search.value)
    minima = property(lambda self: self.search.minima)
    confirmed = property(lambda self: self.search.confirmed)
    replica_params = property(lambda self: self.search.replica_params)
    replica_values = property(lambda self: self.search.replica_values)
    history = property(lambda self: self.search.history)
    num_evaluations = property(lambda self: self.search.num_evaluations)
    checked = property(lambda self: self.search.checked)

    # Parameters

    @property
    def params(self) -> PyTree:
        """The best params, those that are not free too."""
        if np.ndim(self.value):
            return jax.vmap(lambda r: r.params)(self)
        return self.constraints.complete(self.search.params)

    @property
    def names(self) -> list[str]:
        """A name for each entry of the free params, in the order of the covariance."""
        check_single(self.value)
        return parameter_names(self.search.params)

    @property
    def best_values(self) -> dict[str, float]:
        """The best params as floats, one for each entry, by name."""
        check_single(self.value)
        numbers = as_matrix(add_axis(self.params))[0].tolist()
        return dict(zip(parameter_names(self.params), numbers, strict=True))

    @property
    def correlations(self) -> jax.Array | None:
        """Covariances over the product of the standard errors, `[P, P]`."""
        if self.covariance is None:
            return None
        errors = jnp.sqrt(jnp.diagonal(self.covariance, axis1=-2, axis2=-1))
        return self.covariance / (errors[..., :, None] * errors[..., None, :])

    def confidence_interval(
        self, name: str | None = None, level: float = 0.95
    ) -> tuple[Any, Any]:
        r"""The interval of a parameter, by its profile: the other params fitted anew.

        Both ends :math:`t` solve, with :math:`\chi^2_\min(t)` the least chi-square
        where the parameter is :math:`t`, and the quantile :math:`q` of a normal
        distribution if `sigma` was given and of Student's t if not (:math:`q^2` is that
        of the F-test),

        .. math:: \chi^2_\min(t) - \chi^2 = q^2 s^2.

        Unlike the standard error it knows that the model is not linear. An end that the
        data do not determine is at the parameter's bound, or infinite.

        Args:
          name: of a free param; None if the params are one array.
          level: probability that the interval covers the true value.

        Returns:
          `(low, high)`, floats, or arrays of the shape of the param.

        Raises:
          ValueError: for params that are not free, another loss than least squares, a
            result of a batch, or one that was saved without its data.
        """
        check_single(self.value)
        leaf, entries = self._entries(name)
        residuals, unit = self._residual_function()
        (low, high), lower = profile(
            residuals,
            self.search.params,
            self.bounds,
            self.covariance,
            self._noise / jnp.square(unit),
            entries=entries,
            quantile=self._quantile(level),
        )
        if lower:
            warnings.warn(
                "the profile met a lower chi-square than that of the fit, which is not "
                "at the deepest minimum: fit again with more replicas, or a budget",
                stacklevel=2,
            )
        if not leaf.shape:
            return float(low[0]), float(high[0])
        return low.reshape(leaf.shape), high.reshape(leaf.shape)

    # Predictions

    def predict(self, x: PyTree) -> Any:
        """The model's output at the best params; a pandas series for pandas data."""
        check_single(self.value)
        return like(x, self._model()(self.params, check_inputs(x)))

    def confidence_band(self, x: PyTree, level: float = 0.95) -> tuple[Any, Any]:
        r"""The band that covers the true curve at each x with this probability.

        .. math:: m(p, x) \pm q \sqrt{j^T \mathrm{cov}(p)\, j}, \quad
          j = \partial m(p, x) / \partial p

        with the quantile q of Student's t, or of a normal distribution if `sigma` was
        given.

        Args:
          x: inputs, as for the model.
          level: the probability.

        Returns:
          `(low, high)`, each like the predictions.
        """
        predictions, errors = self._predict_with_errors(x)
        half = self._quantile(level) * errors
        return like(x, predictions - half), like(x, predictions + half)

    def prediction_band(
        self, x: PyTree, level: float = 0.95, sigma: Any = None
    ) -> tuple[Any, Any]:
        """The band that covers a new datum at each x with this probability.

        As `confidence_band`, with the variance of the datum added.

        Args:
          x: inputs, as for the model.
          level: the probability.
          sigma: standard deviation of the new data; by default as estimated from the
            residuals, or that of the data if it is one number.

        Returns:
          `(low, high)`, each like the predictions.
        """
        predictions, errors = self._predict_with_errors(x)
        if sigma is None:
            sigma = jnp.sqrt(self._noise)
            if self.sigma is not None:
                sigma = self.sigma.reshape(-1)[0]
                if bool(jnp.any(self.sigma != sigma)):
                    raise ValueError(
                        "the data have different sigmas: pass that of the new data as "
                        "sigma"
                    )
        noise = jnp.asarray(sigma, errors.dtype)
        half = self._quantile(level) * jnp.hypot(errors, noise)
        return like(x, predictions - half), like(x, predictions + half)

    @property
    def residuals(self) -> jax.Array:
        """y minus the model's predictions."""
        y = self._data()
        return y - self._model()(self.params, self.x)

    # How well it fits

    @property
    def reduced_chi_square(self) -> jax.Array:
        """Chi-square per degree of freedom."""
        spare = self.degrees_of_freedom
        return self.chi_square / spare if spare > 0 else jnp.nan * self.chi_square

    @property
    def aic(self) -> jax.Array:
        """Akaike's information criterion, up to a constant of the data.

        chi-square + 2 P if `sigma` was given, n log(chi-square / n) + 2 P if not.
        """
        return self._deviance + 2.0 * self._num_free

    @property
    def bic(self) -> jax.Array:
        """The Bayesian information criterion, as `aic` with P log n for 2 P."""
        return self._deviance + float(np.log(self._num_data)) * self._num_free

    @property
    def r_squared(self) -> jax.Array:
        """1 - chi-square over that of the best constant."""
        y = self._data()
        weights = jnp.ones_like(y) if self.sigma is None else 1 / jnp.square(self.sigma)
        mean = jnp.sum(weights * y) / jnp.sum(weights)
        return 1 - self.chi_square / jnp.sum(weights * jnp.square(y - mean))

    # Export

    def report(self) -> str:
        """All that was found as text, such as for a paper's supplement."""
        summary, _ = self._report()
        table = self._table()
        lines = aligned([*summary.items()])
        lines += ["", *aligned(Report(summary, table).rows(10**9))]
        pairs = self._correlated(_LISTED)
        if pairs:
            lines += ["", f"correlations of {_LISTED} and more"]
            lines += aligned([(a, b, f"{c:.3f}") for a, b, c in pairs])
        return "\n".join([f"Fit of {self._model_name()}", "", *lines])

    def to_dict(self, data: bool = False) -> Any:
        """Plain Python, for JSON: what was found, without the history.

        Of a batch, a list of as many dicts.

        Args:
          data: whether to add x, y and sigma.
        """
        if np.ndim(self.value):
            return each(self, lambda result: result.to_dict(data))
        exported = {
            "search": self.search.to_dict(),
            "params": to_lists(self.params),
            "value": float(self.value),
            "confirmed": self.confirmed,
            "chi_square": float(self.chi_square),
            "degrees_of_freedom": self.degrees_of_freedom,
            "held": to_lists(self.constraints.held),
            "tied": list(self.constraints.tied),
            "bounds": [to_lists(side) for side in self.bounds],
        }
        if self.covariance is not None:
            exported["standard_errors"] = to_lists(self.standard_errors)
            exported["covariance"] = to_lists(self.covariance)
        if data:
            exported["data"] = {
                "x": to_lists(self.x),
                "y": to_lists(self._data()),
                "sigma": self.sigma if self.sigma is None else to_lists(self.sigma),
            }
        return exported

    @classmethod
    def from_dict(
        cls,
        saved: dict[str, Any],
        model: Callable[..., Any] | None = None,
        *,
        tied: dict[str, Callable[..., Any]] | None = None,
    ) -> "FitResult":
        """The result of which `to_dict` is given, such as from JSON.

        Args:
          saved: what `to_dict` returned; its params are dicts, lists and numbers.
          model: the model, if the result is to predict; it is not saved.
          tied: the functions in `fixed`, if there were any; they are not saved.

        Raises:
          ValueError: if a function of `fixed` is missing.
        """
        ties = {name: f for name, f in (tied or {}).items() if name in saved["tied"]}
        missing = [name for name in saved["tied"] if name not in ties]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} was tied by a function in fixed, which is not "
                "saved: pass it as tied"
            )
        data = saved.get("data")
        x, y, sigma = (None, None, None) if data is None else check_data(**data)
        return cls(
            search=MinimizeResult.from_dict(saved["search"]),
            model=model and as_partial(model),
            x=x,
            y=y,
            sigma=sigma,
            covariance=to_arrays(saved.get("covariance")),
            standard_errors=to_arrays(saved.get("standard_errors")),
            chi_square=to_arrays(saved["chi_square"]),
            constraints=Constraints(
                to_arrays(saved["held"]), {k: as_partial(f) for k, f in ties.items()}
            ),
            bounds=Bounds(*(to_arrays(side) for side in saved["bounds"])),
            degrees_of_freedom=saved["degrees_of_freedom"],
        )

    def to_dataframe(self) -> Any:
        """One row for each parameter, as a data frame (needs pandas)."""
        import pandas

        check_single(self.value)
        columns: dict[str, Any] = {"value": list(self.best_values.values())}
        if self.standard_errors is not None:
            columns["standard_error"] = as_matrix(add_axis(self.standard_errors))[0]
        return pandas.DataFrame(columns, index=list(self.best_values))

    def table(self) -> dict[str, list[float]]:
        """One row per replica: see `MinimizeResult.table`."""
        return self.search.table()

    def plot(self) -> Any:
        """The search, minima, and the fit with residuals, as a Matplotlib figure."""
        check_single(self.value)
        return plot_fit(self)

    def __getstate__(self) -> dict[str, Any]:
        for fun in (self.model, *self.constraints.tied.values()):
            try:
                pickle.dumps(fun)
            except Exception as error:
                raise TypeError(
                    f"this FitResult holds the function {getattr(fun, 'func', fun)!r}, "
                    "which cannot be pickled: define it at the top level of a module, "
                    "or save result.to_dict()"
                ) from error
        return self.__dict__

    def __repr__(self) -> str:
        return to_text(self)

    def _repr_html_(self) -> str:
        return to_html(self)

    # Inside

    def _report(self) -> Report:
        summary, _ = self.search._report()
        summary["chi-square"] = f"{float(self.chi_square):.8g}"
        summary["degrees of freedom"] = str(self.degrees_of_freedom)
        if self.degrees_of_freedom > 0:
            summary["reduced chi-square"] = f"{float(self.reduced_chi_square):.6g}"
            summary["AIC, BIC"] = f"{float(self.aic):.6g}, {float(self.bic):.6g}"
        if self.y is not None:
            summary["R^2"] = f"{float(self.r_squared):.8g}"
        strong = [f"{a}, {b} {c:.3f}" for a, b, c in self._correlated(_STRONG)[:3]]
        if strong:
            summary["strong correlations"] = "; ".join(strong)
        table = self._table()
        table.pop("bounds")
        return Report(summary, table)

    def _table(self) -> dict[str, list[str]]:
        best = self.best_values
        names, numbers = list(best), list(best.values())
        table = {"parameter": names, "value": [f"{v:.8g}" for v in numbers]}
        low, high, scale = (
            dict(zip(self.names, as_matrix(add_axis(tree))[0], strict=True))
            for tree in (*self.bounds, self.search.scale)
        )
        held = parameter_names(self.constraints.held)
        notes = []
        for name, number in zip(names, numbers, strict=True):
            if name in scale:
                near = _BESIDE * scale[name]
                beside = number - low[name] < near or high[name] - number < near
                notes.append("at its bound" if beside else "")
            else:
                notes.append("held" if name in held else "tied")
        if self.standard_errors is not None:
            errors = as_matrix(add_axis(self.standard_errors))[0]
            table["standard error"] = [
                "" if note == "held" else f"{e:.3g}"
                for e, note in zip(errors, notes, strict=True)
            ]
        table["bounds"] = [
            f"{low[name]:.6g} to {high[name]:.6g}" if name in scale else ""
            for name in names
        ]
        if any(notes):
            table["note"] = notes
        return table

    def _correlated(self, least: float) -> list[tuple[str, str, float]]:
        """Pairs of parameters with a correlation of this size, the strongest first."""
        if self.covariance is None:
            return []
        with np.errstate(invalid="ignore"):
            matrix = np.triu(np.nan_to_num(np.asarray(self.correlations)), 1)
        pairs = np.argwhere(np.abs(matrix) >= least)
        names = self.names
        found = [(names[i], names[j], float(matrix[i, j])) for i, j in pairs]
        return sorted(found, key=lambda pair: -abs(pair[2]))

    def _model_name(self) -> str:
        if self.model is None:
            return "a model that was not saved"
        model: Any = self.model
        fun = model.func
        return getattr(fun, "__name__", type(fun).__name__)

    def _model(self) -> Partial:
        if self.model is None:
            raise ValueError("this result has no model: pass it to from_dict")
        return self.model

    def _data(self) -> jax.Array:
        if self.y is None:
            raise ValueError("this result was saved without data: to_dict(data=True)")
        check_single(self.value)
        return self.y

    @property
    def _num_free(self) -> int:
        check_single(self.value)
        return sum(x.size for x in jax.tree.leaves(self.search.params))

    @property
    def _num_data(self) -> int:
        return self.degrees_of_freedom + self._num_free

    @property
    def _noise(self) -> jax.Array:
        """Variance of the residuals over sigma: known, or estimated."""
        if self.sigma is not None:
            return jnp.ones_like(self.chi_square)
        return self.reduced_chi_square

    @property
    def _deviance(self) -> jax.Array:
        if self.sigma is not None:
            return self.chi_square
        return self._num_data * jnp.log(self.chi_square / self._num_data)

    def _quantile(self, level: float) -> float:
        """How many standard errors the two-sided interval of this level reaches."""
        import scipy.special  # not before it is needed: it is slow to import

        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level!r}")
        if self.covariance is None:
            raise ValueError("intervals need least squares: fit without a loss")
        if self.sigma is not None:
            return float(scipy.special.ndtri((1 + level) / 2))
        if self.degrees_of_freedom < 1:
            raise ValueError(
                "intervals need more data than parameters, or sigma; there are "
                f"{self._num_data} data and {self._num_free} parameters"
            )
        return float(scipy.special.stdtrit(self.degrees_of_freedom, (1 + level) / 2))

    def _entries(self, name: str | None) -> tuple[jax.Array, np.ndarray]:
        """A free param, and where its entries are in the covariance."""
        start, known = 0, []
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.search.params):
            known.append(jax.tree_util.keystr(path, simple=True, separator="."))
            if known[-1] == (name or ""):
                return leaf, np.arange(start, start + leaf.size)
            start += leaf.size
        free = ", ".join(known)
        raise ValueError(f"{name!r} is not one of the free parameters: {free}")

    def _residual_function(self) -> tuple[Partial, jax.Array]:
        model, y = self._model(), self._data()
        unit = call(spread, y if self.sigma is None else y / self.sigma)
        residuals = scaled_residuals(
            lambda free: model(self.constraints.complete(free), self.x),
            *(y, self.sigma, unit),
        )
        return vector_function(residuals, self.search.params), unit

    def _predict_with_errors(self, x: PyTree) -> tuple[jax.Array, jax.Array]:
        check_single(self.value)
        if self.covariance is None:
            raise ValueError("bands need least squares: fit without a loss")
        model, inputs, free = self._model(), check_inputs(x), self.search.params
        predict = vector_function(
            lambda free: jnp.asarray(model(self.constraints.complete(free), inputs)),
            free,
        )
        with standard_promotion():
            predictions = predict(free)
            jacobian = matrix_of(jax.jacfwd(predict)(free), predictions)
        errors = propagated(jacobian, self.covariance.astype(jacobian.dtype))
        return predictions, errors.reshape(predictions.shape)
