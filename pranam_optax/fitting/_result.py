"""What `minimize` and `fit` found."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pranam_optax._tree import PyTree
from pranam_optax.fitting._plot import plot_result
from pranam_optax.fitting._report import (
    Report,
    add_axis,
    as_matrix,
    check_single,
    each,
    parameter_names,
    to_arrays,
    to_html,
    to_lists,
    to_text,
)

# Replicas share a minimum if their values agree to this part of the value's size, or to
# rounding of the values at the starts, and their params to this part of the scale.
_VALUE_TOLERANCE = 1e-5
_PARAMS_TOLERANCE = 1e-2
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
      kind: "coupled", "evolution", "sweep" or "independent"; "continued" if coupled
        replicas were joined with what other runs had found.
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
        points = as_matrix(replica_params) / as_matrix(add_axis(self.scale))
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

    def to_dict(self) -> Any:
        """Plain Python, for JSON: what was found, without the history.

        Of a batch, a list of as many dicts.
        """
        if np.ndim(self.value):
            return each(self, MinimizeResult.to_dict)
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
            "replica_params": to_lists(self.replica_params),
            "replica_values": to_lists(self.replica_values),
            "scale": to_lists(self.scale),
            "start_values": to_lists(self.start_values),
            "unbounded": bool(self.unbounded),
            "checked": self.checked,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "MinimizeResult":
        """The result of which this is what `to_dict` returned, such as from JSON."""
        values = to_arrays(saved["replica_values"])
        return cls(
            **{
                name: to_arrays(saved[name])
                for name in ("params", "value", "replica_params", "scale")
            },
            replica_values=values,
            history=jnp.zeros((0, 1 if saved["runs"] else len(values)), values.dtype),
            start_values=to_arrays(saved["start_values"]),
            num_evaluations=jnp.asarray(saved["num_evaluations"]),
            unbounded=jnp.asarray(saved["unbounded"]),
            evaluations=jnp.zeros((0, 2), int) if saved["runs"] else None,
            runs=tuple(Run(**run) for run in saved["runs"]),
            ended=saved["ended"],
            checked=saved["checked"],
        )

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
        matrix = as_matrix(self.replica_params)[order]
        columns: dict[str, list[Any]] = {
            "replica": order.tolist(),
            "value": np.asarray(self.replica_values)[order].tolist(),
            "minimum": [minimum_of.get(r, -1) for r in order.tolist()],
        }
        for name, column in zip(
            parameter_names(self.params), matrix.T.tolist(), strict=True
        ):
            columns[f"params.{name}" if name in columns else name] = column
        return columns

    def plot(self) -> Any:
        """Value over evaluations, and sorted final values, as a Matplotlib figure."""
        check_single(self.value)
        return plot_result(self)

    def _report(self) -> "Report":
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
        names = parameter_names(self.params)
        cells = [f"{x:.8g}" for x in as_matrix(add_axis(self.params))[0]]
        return Report(summary, {"parameter": names, "value": cells})

    def __repr__(self) -> str:
        return to_text(self)

    def _repr_html_(self) -> str:
        return to_html(self)
