"""Results as text, HTML and plain Python."""

import html
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from pranam_optax._tree import PyTree
from pranam_optax.fitting._coordinates import is_numbers

_MAX_ROWS = 10


class Report(NamedTuple):
    """What a printed result says: labelled lines, and a table by columns."""

    summary: dict[str, str]
    table: dict[str, list[str]]

    def rows(self, most: int = _MAX_ROWS) -> list[tuple[str, ...]]:
        """The header, and as many rows as are shown."""
        rows = list(zip(*self.table.values(), strict=True))
        more = len(rows) - most
        if more > 0:
            rest = (f"... {more} more", *[""] * (len(self.table) - 1))
            rows = [*rows[:most], rest]
        return [tuple(self.table), *rows]


def to_text(result: Any) -> str:
    """The result as `print` shows it."""
    name = type(result).__name__
    if isinstance(result.value, jax.core.Tracer) or np.ndim(result.value):
        return f"{name}(batch of shape {jnp.shape(result.value)})"
    report = result._report()
    summary = [f"{label}: {text}" for label, text in report.summary.items()]
    return "\n  ".join([name, *summary, *aligned(report.rows())])


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows as lines, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def to_html(result: Any) -> str:
    """The result as a notebook shows it."""
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


def parameter_names(params: PyTree) -> list[str]:
    """A name for each entry of one model's params, in the order of its leaves."""
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        stem = keystr(path, simple=True, separator=".") or "x"
        shape = jnp.shape(leaf)
        names += [stem + (str(list(i)) if shape else "") for i in np.ndindex(shape)]
    return names


def add_axis(tree: PyTree) -> PyTree:
    """One model's params as stacked params of one replica, on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[None], tree)


def as_matrix(tree: PyTree) -> np.ndarray:
    """Stacked params as `[R, number of entries]`, on the host."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def to_lists(tree: PyTree) -> PyTree:
    """The tree with lists of numbers in place of arrays."""
    return jax.tree.map(lambda x: np.asarray(x).tolist(), tree)


def to_arrays(tree: PyTree) -> PyTree:
    """The tree that `to_lists` was given, with lists of numbers as arrays."""
    return jax.tree.map(lambda x: jnp.asarray(x, float), tree, is_leaf=is_numbers)


def each(results: Any, export: Callable[[Any], Any]) -> list[Any]:
    """The export of each result of a batch."""
    one = (
        jax.tree.map(lambda x, i=i: x[i], results) for i in range(len(results.value))
    )
    return [each(r, export) if np.ndim(r.value) else export(r) for r in one]


def check_single(value: jax.Array) -> None:
    """Checks that this is the value of one result."""
    if np.ndim(value):
        raise ValueError(
            f"this is a batch of results, of shape {np.shape(value)}; take one with "
            "jax.tree.map(lambda x: x[i], results)"
        )
