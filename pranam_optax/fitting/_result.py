"""What `minimize` and `fit` found."""

import dataclasses
import functools
import html
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr

from pranam_optax._tree import PyTree
from pranam_optax.fitting._plot import plot_fit, plot_result

# Replicas share a minimum if their values agree to this part of the value's size, or to
# rounding of the values at the starts, and their params to this part of the scale.
_VALUE_TOLERANCE = 1e-5
_PARAMS_TOLERANCE = 1e-2
_MAX_ROWS = 10
# The kind of the runs that build on others.
CONTINUED = "continued"


class Minimum(NamedTuple):
    """A minimum that one or more replicas ended in.

    Attributes:
      params: one model's params, those of the lowest of these replicas.
      value: the value there.
      replicas: indices of the replicas, the lowest first.
    """

    params: PyTree
    value: float
    replicas: tuple[int, ...]

    @property
    def num_replicas(self) -> int:
        """How many replicas ended here."""
        return len(self.replicas)


class Run(NamedTuple):
    """One restart of a search with a budget.

    Attributes:
      kind: "coupled", "evolution" or "independent"; "continued" if coupled replicas
        were joined with what other runs had found.
      num_evaluations: what it has spent.
      value: the lowest value that it has seen.
    """

    kind: str
    num_evaluations: int
    value: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class MinimizeResult:
    """What `minimize` found: a pytree of arrays, which `jax.vmap` gives a batch axis.

    Of a batch of results, `jax.tree.map(lambda x: x[i], results)` is one.

    Attributes:
      params: the best params.
      value: the value there, a scalar.
      replica_params: params of all replicas at the end, stacked.
      replica_values: their values, `[R]`.
      scale: like one model's params, the unit of distance between minima: half the
        width of the bounds, or the spread of the starts.
      history: values of the replicas during the coupled phase, `[steps, R]`; with a
        budget the lowest value so far after each step of all runs, `[steps, 1]`.
      start_values: values at all random starts tried, `[N]`; NaN or infinite where the
        start failed.
      num_evaluations: of `fun`, with or without its gradient or Jacobian.
      evaluations: with a budget, of `fun` until each row of `history`, and of those the
        ones with gradient, `[steps, 2]`; else None.
      runs: with a budget, what each restart found.
      ended: with a budget, what ended the search.
      unbounded: whether the best params are far from the starts and the function is
        lower still twice as far, so that it may have no minimum.
      checked: whether starts, bounds and data were checked. Under `jax.jit` and
        `jax.vmap` they are not, and what cannot be used gives NaN.
    """

    params: PyTree
    value: jax.Array
    replica_params: PyTree
    replica_values: jax.Array
    scale: PyTree
    history: jax.Array
    start_values: jax.Array
    num_evaluations: jax.Array
    unbounded: jax.Array
    evaluations: jax.Array | None = None
    runs: tuple[Run, ...] = dataclasses.field(default=(), metadata={"static": True})
    ended: str | None = dataclasses.field(default=None, metadata={"static": True})
    checked: bool = dataclasses.field(default=False, metadata={"static": True})

    @functools.cached_property
    def minima(self) -> list[Minimum]:
        """The distinct minima, the deepest first.

        Two replicas share a minimum if their values agree (to 1e-5 of the value's size,
        or to rounding of the median value at the starts: the lowest value may be zero)
        and no parameter differs by more than 1 % of its `scale`.
        """
        check_single(self.value)
        replica_params = jax.tree.map(np.asarray, self.replica_params)
        values = np.asarray(self.replica_values, np.float64)
        points = _as_matrix(replica_params) / _as_matrix(_add_axis(self.scale))
        groups: list[list[int]] = []
        for r in np.argsort(values, kind="stable"):
            if not np.isfinite(values[r]):
                break
            # One comparison with the lowest of all groups at once.
            lowest = [group[0] for group in groups]
            tolerance = self._tolerance(values[lowest])
            distance = np.abs(points[r] - points[lowest]).max(axis=1, initial=0.0)
            same = (distance <= _PARAMS_TOLERANCE) & (
                values[r] - values[lowest] <= tolerance
            )
            if same.any():
                groups[np.argmax(same)].append(int(r))
            else:
                groups.append([int(r)])
        return [
            Minimum(
                jax.tree.map(lambda x, r=group[0]: x[r], replica_params),
                float(values[group[0]]),
                tuple(group),
            )
            for group in groups
        ]

    def _tolerance(self, values: np.ndarray) -> np.ndarray:
        """Within what values are equal."""
        starts = np.abs(np.asarray(self.start_values, np.float64))
        finite = np.isfinite(starts)
        usual = np.median(starts[finite]) if finite.any() else 0.0
        rounding = float(jnp.finfo(self.replica_values.dtype).eps) * usual
        return np.maximum(_VALUE_TOLERANCE * np.abs(values), rounding)

    def _reach(self, values: list[float]) -> np.ndarray:
        """Which of the values are the best one."""
        best = np.asarray(self.value, np.float64)
        return np.asarray(values, np.float64) - best <= self._tolerance(best)

    @property
    def restarts(self) -> dict[str, tuple[int, int]]:
        """How many runs of each kind reached the best value, and how many there were.

        Runs know nothing of each other, but for "continued" ones, so that this says how
        far to trust it. Empty without a budget.
        """
        reached = self._reach([run.value for run in self.runs])
        kinds = np.array([run.kind for run in self.runs])
        return {
            kind: (int(reached[kinds == kind].sum()), int((kinds == kind).sum()))
            for kind in dict.fromkeys(kinds.tolist())
        }

    @property
    def confirmed(self) -> bool:
        """Whether the best value was found more than once, and is a minimum.

        With a budget, by at least two runs that know nothing of each other. Without
        one, by at least two replicas in the same place; these are drawn together, so
        this is weak evidence: repeat with another `key`, or with a budget, before you
        trust it.
        """
        if self.runs:
            times = sum(
                n for kind, (n, _) in self.restarts.items() if kind != CONTINUED
            )
        else:
            times = self.minima[0].num_replicas if self.minima else 0
        return times > 1 and not bool(self.unbounded)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python and NumPy: what was found, without the history."""
        check_single(self.value)
        return {
            "params": to_lists(self.params),
            "value": float(self.value),
            "confirmed": self.confirmed,
            "num_evaluations": int(self.num_evaluations),
            "runs": [run._asdict() for run in self.runs],
            "ended": self.ended,
            "minima": [
                {
                    "params": to_lists(minimum.params),
                    "value": minimum.value,
                    "num_replicas": minimum.num_replicas,
                }
                for minimum in self.minima
            ],
        }

    def table(self) -> dict[str, list[float]]:
        """One row per replica, sorted by value, as columns.

        `pandas.DataFrame(result.table())` makes a data frame of it. A parameter called
        like another column gets the prefix "params.".
        """
        check_single(self.value)
        order = np.argsort(np.asarray(self.replica_values), kind="stable")
        minimum_of = {
            r: i for i, minimum in enumerate(self.minima) for r in minimum.replicas
        }
        matrix = _as_matrix(self.replica_params)[order]
        columns: dict[str, list[Any]] = {
            "replica": order.tolist(),
            "value": np.asarray(self.replica_values)[order].tolist(),
            "minimum": [minimum_of.get(r, -1) for r in order.tolist()],
        }
        for name, column in zip(
            _parameter_names(self.params), matrix.T.tolist(), strict=True
        ):
            columns[f"params.{name}" if name in columns else name] = column
        return columns

    def plot(self) -> Any:
        """Value over evaluations, and sorted final values, as a Matplotlib figure."""
        check_single(self.value)
        return plot_result(self)

    def _report(self) -> "_Report":
        values = [m.value for m in self.minima]
        arrangements = int(self._reach(values).sum())
        found_by = sum(m.num_replicas for m in self.minima[:arrangements])
        if self.runs:
            best = ", ".join(
                f"{reached} of {total} {kind}"
                for kind, (reached, total) in self.restarts.items()
            )
            best = f"reached by {best} runs"
        else:
            best = f"found by {found_by} of {len(self.replica_values)} replicas"
        if arrangements > 1:
            best += f", in {arrangements} arrangements"
        summary = {
            "value": f"{float(self.value):.8g}",
            "best value": best,
            "distinct minima": str(len(self.minima)),
            "evaluations": str(int(self.num_evaluations)),
        }
        if self.ended is not None:
            summary["ended"] = self.ended
        if self.unbounded:
            summary["warning"] = "the function falls without end towards these params"
        if not self.checked:
            summary["note"] = "found under jit or vmap, where values are not checked"
        names = _parameter_names(self.params)
        cells = [f"{x:.8g}" for x in _as_matrix(_add_axis(self.params))[0]]
        return _Report(summary, {"parameter": names, "value": cells})

    def __repr__(self) -> str:
        return _to_text(self)

    def _repr_html_(self) -> str:
        return _to_html(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class FitResult:
    """What `fit` found: the result of the search, and statistics.

    Attributes:
      search: the `MinimizeResult`; its commonest attributes are properties here.
      model: the model; `result.predict(x)` applies it at the best params.
      x: the inputs.
      y: the data.
      sigma: standard deviations of the data, or None.
      covariance: of the entries of the params in the order of their leaves, `[P, P]`;
        None for another loss than least squares. Infinite or NaN where the data do
        not determine the params, or where a square is beyond the range of the dtype.
      standard_errors: like one model's params, or None: the square roots of the
        covariance's diagonal.
      chi_square: sum of the squared residuals over sigma at the best params.
    """

    search: MinimizeResult
    model: Partial
    x: PyTree
    y: jax.Array
    sigma: jax.Array | None
    covariance: jax.Array | None
    standard_errors: PyTree | None
    chi_square: jax.Array

    params = property(lambda self: self.search.params)
    value = property(lambda self: self.search.value)
    minima = property(lambda self: self.search.minima)
    confirmed = property(lambda self: self.search.confirmed)
    replica_params = property(lambda self: self.search.replica_params)
    replica_values = property(lambda self: self.search.replica_values)
    history = property(lambda self: self.search.history)
    num_evaluations = property(lambda self: self.search.num_evaluations)
    checked = property(lambda self: self.search.checked)

    def predict(self, x: PyTree) -> jax.Array:
        """The model's output at the best params."""
        check_single(self.value)
        return self.model(self.params, x)

    @property
    def residuals(self) -> jax.Array:
        """y minus the model's predictions."""
        return self.y - self.predict(self.x)

    @property
    def degrees_of_freedom(self) -> int:
        """Number of data less the number of fitted parameters."""
        check_single(self.value)
        return self.y.size - sum(x.size for x in jax.tree.leaves(self.params))

    def to_dict(self) -> dict[str, Any]:
        """Plain Python: what was found, without the data and the history."""
        statistics = {
            "chi_square": float(self.chi_square),
            "degrees_of_freedom": self.degrees_of_freedom,
        }
        if self.covariance is not None:
            statistics["standard_errors"] = to_lists(self.standard_errors)
            statistics["covariance"] = to_lists(self.covariance)
        return self.search.to_dict() | statistics

    def table(self) -> dict[str, list[float]]:
        """One row per replica: see `MinimizeResult.table`."""
        return self.search.table()

    def plot(self) -> Any:
        """Loss curves, minima, and the fit with residuals, as a Matplotlib figure."""
        check_single(self.value)
        return plot_fit(self)

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.dumps(self.model)
        except Exception as error:
            raise TypeError(
                f"this FitResult holds the model {self.model.func!r}, which cannot be "
                "pickled: define the model at the top level of a module, or save "
                "result.search and result.to_dict()"
            ) from error
        return self.__dict__

    def _report(self) -> "_Report":
        summary, table = self.search._report()
        summary["chi-square"] = f"{float(self.chi_square):.8g}"
        summary["degrees of freedom"] = str(self.degrees_of_freedom)
        if self.standard_errors is not None:
            errors = _as_matrix(_add_axis(self.standard_errors))[0]
            table["standard error"] = [f"{e:.3g}" for e in errors]
        return _Report(summary, table)

    def __repr__(self) -> str:
        return _to_text(self)

    def _repr_html_(self) -> str:
        return _to_html(self)


class _Report(NamedTuple):
    """What a printed result says: labelled lines, and a table by columns."""

    summary: dict[str, str]
    table: dict[str, list[str]]

    def rows(self) -> list[tuple[str, ...]]:
        """The header, and as many rows as are shown."""
        rows = list(zip(*self.table.values(), strict=True))
        more = len(rows) - _MAX_ROWS
        if more > 0:
            rest = (f"... {more} more", *[""] * (len(self.table) - 1))
            rows = [*rows[:_MAX_ROWS], rest]
        return [tuple(self.table), *rows]


def _to_text(result: MinimizeResult | FitResult) -> str:
    name = type(result).__name__
    if isinstance(result.value, jax.core.Tracer) or np.ndim(result.value):
        return f"{name}(batch of shape {jnp.shape(result.value)})"
    report = result._report()
    rows = report.rows()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{label}: {text}" for label, text in report.summary.items()] + [
        "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n  ".join([name, *lines])


def _to_html(result: MinimizeResult | FitResult) -> str:
    if np.ndim(result.value):
        return f"<code>{html.escape(repr(result))}</code>"

    def table(rows: Any, tag: str = "td") -> str:
        cells = [[f"<{tag}>{html.escape(c)}</{tag}>" for c in row] for row in rows]
        return "".join(f"<tr>{''.join(row)}</tr>" for row in cells)

    report = result._report()
    header, *rows = report.rows()
    return (
        f"<b>{type(result).__name__}</b><table>{table(report.summary.items())}</table>"
        f"<table>{table([header], 'th')}{table(rows)}</table>"
    )


def _parameter_names(params: PyTree) -> list[str]:
    """A name for each entry of one model's params, in the order of its leaves."""
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        stem = keystr(path, simple=True, separator=".") or "x"
        shape = jnp.shape(leaf)
        names += [stem + (str(list(i)) if shape else "") for i in np.ndindex(shape)]
    return names


def _add_axis(tree: PyTree) -> PyTree:
    """One model's params as stacked params of one replica, on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[None], tree)


def _as_matrix(tree: PyTree) -> np.ndarray:
    """Stacked params as `[R, number of entries]`, on the host."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def to_lists(tree: PyTree) -> PyTree:
    """The tree with lists of numbers in place of arrays."""
    return jax.tree.map(lambda x: np.asarray(x).tolist(), tree)


def check_single(value: jax.Array) -> None:
    """Checks that this is the value of one result."""
    if np.ndim(value):
        raise ValueError(
            f"this is a batch of results, of shape {np.shape(value)}; take one with "
            "jax.tree.map(lambda x: x[i], results)"
        )
