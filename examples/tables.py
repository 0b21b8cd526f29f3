"""What the tables of the examples share: how often a method succeeds, and rows."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy.stats


def success_interval(successes: int, runs: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    test = scipy.stats.binomtest(successes, runs)
    low, high = test.proportion_ci(method="wilson")
    return float(low), float(high)


def success_cells(successes: int, runs: int) -> str:
    """Two cells of a table: how many, and the interval in percent."""
    low, high = success_interval(successes, runs)
    return f"{successes} of {runs} | {low:.0%} to {high:.0%}"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV, the keys of the first as names of the columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
