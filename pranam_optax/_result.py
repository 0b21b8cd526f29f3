"""What a fit found."""

import dataclasses
import functools
import html
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from pranam_optax._tree import PyTree

# Replicas share a minimum if their values agree to this part of the value's size, or to
# rounding of the values at the starts, and their params to this part of the scale.
_VALUE_TOLERANCE = 1e-5
_PARAMS_TOLERANCE = 1e-2


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
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
      history: values of the replicas during the coupled phase, `[steps, R]`.
      start_values: values at all random starts tried, `[N]`; NaN or infinite where the
        start failed.
      num_evaluations: of `fun`, with or without its gradient or Jacobian.
    """

    params: PyTree
    value: jax.Array
    replica_params: PyTree
    replica_values: jax.Array
    scale: PyTree
    history: jax.Array
    start_values: jax.Array
    num_evaluations: jax.Array

    @functools.cached_property
    def minima(self) -> list[Minimum]:
        """The distinct minima, the deepest first.

        Two replicas share a minimum if their values agree (to 1e-5 of the value's size,
        or to rounding of the median value at the starts: the lowest value may be zero)
        and no parameter differs by more than 1 % of its `scale`.
        """
        check_single(self)
        values = np.asarray(self.replica_values)
        points = as_matrix(self.replica_params) / as_matrix(add_axis(self.scale))
        starts = np.abs(np.asarray(self.start_values, np.float64))
        finite = np.isfinite(starts)
        usual = np.median(starts[finite]) if finite.any() else 0.0
        rounding = jnp.finfo(values.dtype).eps * usual
        groups: list[list[int]] = []
        for r in np.argsort(values, kind="stable"):
            if not np.isfinite(values[r]):
                break
            for group in groups:
                first = group[0]
                near = np.max(np.abs(points[r] - points[first])) <= _PARAMS_TOLERANCE
                tolerance = max(_VALUE_TOLERANCE * abs(values[first]), rounding)
                if near and values[r] - values[first] <= tolerance:
                    group.append(int(r))
                    break
            else:
                groups.append([int(r)])
        return [
            Minimum(
                jax.tree.map(
                    lambda x, r=group[0]: np.asarray(x)[r], self.replica_params
                ),
                float(values[group[0]]),
                tuple(group),
            )
            for group in groups
        ]

    @property
    def confirmed(self) -> bool:
        """Whether at least two replicas ended in the best minimum.

        Coupled replicas are drawn together, so this is weak evidence: repeat with
        another `key`, and once with `coupling=0.0`, before you trust it.
        """
        return bool(self.minima) and self.minima[0].num_replicas > 1

    def to_dict(self) -> dict[str, Any]:
        """Plain Python and NumPy: what was found, without the history."""
        check_single(self)
        return {
            "params": jax.tree.map(_plain, self.params),
            "value": float(self.value),
            "confirmed": self.confirmed,
            "num_evaluations": int(self.num_evaluations),
            "minima": [
                {
                    "params": jax.tree.map(_plain, minimum.params),
                    "value": minimum.value,
                    "num_replicas": minimum.num_replicas,
                }
                for minimum in self.minima
            ],
        }

    def table(self) -> dict[str, list[float]]:
        """One row per replica, sorted by value, as columns.

        `pandas.DataFrame(result.table())` makes a data frame of it.
        """
        check_single(self)
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
        names = parameter_names(self.params)
        return columns | dict(zip(names, matrix.T.tolist(), strict=True))

    def plot(self) -> Any:
        """Loss curves and the minima found (needs matplotlib).

        Returns:
          The Matplotlib figure.
        """
        from pranam_optax._plot import plot_result

        return plot_result(self)

    def _summary(self) -> list[tuple[str, str]]:
        deepest = self.minima[0].num_replicas if self.minima else 0
        total = len(self.replica_values)
        return [
            ("value", f"{float(self.value):.8g}"),
            ("best minimum", f"found by {deepest} of {total} replicas"),
            ("distinct minima", str(len(self.minima))),
            ("evaluations", str(int(self.num_evaluations))),
        ]

    def _rows(self) -> list[tuple[str, ...]]:
        """Header and rows of the table of parameters."""
        best = as_matrix(add_axis(self.params))[0]
        names = parameter_names(self.params)
        rows = [(n, f"{x:.8g}") for n, x in zip(names, best, strict=True)]
        return [("parameter", "value"), *rows]

    def __repr__(self) -> str:
        name = type(self).__name__
        if isinstance(self.value, jax.core.Tracer) or np.ndim(self.value):
            return f"{name}(batch of shape {jnp.shape(self.value)})"
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{label}: {text}" for label, text in self._summary()] + [
            "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True))
            for row in _shorten(rows)
        ]
        return "\n  ".join([name, *(line.rstrip() for line in lines)])

    def _repr_html_(self) -> str:
        if np.ndim(self.value):
            return f"<code>{html.escape(repr(self))}</code>"
        header, *rows = _shorten(self._rows())

        def row(cells: tuple[str, ...], tag: str) -> str:
            inside = "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells)
            return f"<tr>{inside}</tr>"

        summary = "".join(row(pair, "td") for pair in self._summary())
        body = row(header, "th") + "".join(row(cells, "td") for cells in rows)
        return (
            f"<b>{type(self).__name__}</b><table>{summary}</table><table>{body}</table>"
        )


def parameter_names(params: PyTree) -> list[str]:
    """A name for each entry of one model's params, in the order of its leaves."""
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        stem = keystr(path, simple=True, separator=".") or "x"
        shape = jnp.shape(leaf)
        names += [
            stem + (str(list(index)) if shape else "") for index in np.ndindex(shape)
        ]
    return names


def _shorten(rows: list[tuple[str, ...]], limit: int = 30) -> list[tuple[str, ...]]:
    if len(rows) <= limit + 1:
        return rows
    rest = (f"... {len(rows) - 1 - limit} more", *("" for _ in rows[0][1:]))
    return [*rows[: limit + 1], rest]


def add_axis(tree: PyTree) -> PyTree:
    """One model's params as stacked params of one replica, on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[None], tree)


def as_matrix(tree: PyTree) -> np.ndarray:
    """Stacked params as `[R, number of entries]`, on the host."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def _plain(x: Any) -> Any:
    return np.asarray(x).tolist()


def check_single(result: MinimizeResult) -> None:
    if np.ndim(result.value):
        raise ValueError(
            f"this is a batch of results, of shape {np.shape(result.value)}; take one "
            "with jax.tree.map(lambda x: x[i], results)"
        )
