"""The tables of docs/elastic.md, out of what examples/benchmarks/elastic.py has run.

A rate is chosen on the tuning seeds, for each method and each number that is shown; the
tables show the report seeds (below 1000; from 2000 where those chose something), with
bootstrap intervals of 95 %.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

SOLVED = {"model": 1e-4, "function": 0.1}
FLOOR = 1e-10


class Cell(NamedTuple):
    """Numbers of the report seeds at the chosen rate."""

    values: np.ndarray
    rate: float
    at_edge: bool


class Table(NamedTuple):
    """All runs of a task."""

    rates: np.ndarray
    tuning: np.ndarray
    methods: dict[str, dict[str, np.ndarray]]

    def cell(self, method: str, measure: str, by: str | None = None) -> Cell:
        """`measure` at the rate whose loss, `by`, is lowest on the tuning seeds."""
        found = self.methods[method]
        losses = logs(found[by or measure][self.tuning])
        best = int(np.argmin(losses.mean(axis=0)))
        values = found[measure][~self.tuning, best]
        edge = best in (0, len(self.rates) - 1)
        return Cell(values, float(self.rates[best]), edge)


def logs(values: np.ndarray) -> np.ndarray:
    """Natural logarithms of losses; NaN is as bad as can be."""
    return np.log(np.clip(np.nan_to_num(values, nan=1e30, posinf=1e30), FLOOR, 1e30))


def load(results: dict[str, Any]) -> dict[str, Table]:
    return {
        name: Table(
            np.array(task["rates"]),
            np.array(task["seeds"]) // 1000 == 1,
            {
                method: {k: np.array(v, float) for k, v in found.items()}
                for method, found in task["methods"].items()
            },
        )
        for name, task in results["tasks"].items()
    }


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean and its bootstrap interval."""
    if np.ptp(values) == 0:
        middle = float(values[0])
        return middle, middle, middle
    found = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(0)
    )
    low, high = found.confidence_interval
    return float(values.mean()), float(low), float(high)


def ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean over seeds of theirs / ours, a pair per seed: above 1 we win."""
    middle, low, high = np.exp(interval(logs(theirs) - logs(ours)))
    return float(middle), float(low), float(high)


def show(numbers: Sequence[float], form: str = ".3g") -> str:
    middle, low, high = (format(x, form) for x in numbers)
    return f"{middle} ({low} to {high})"


def show_ratio(numbers: tuple[float, float, float]) -> str:
    """Bold where it is significantly better, with a dagger where it is worse."""
    text = show(numbers)
    if numbers[1] > 1:
        return f"**{text}**"
    return f"{text} †" if numbers[2] < 1 else text


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


# What is kept of each method's replicas, for networks in mini-batches: one model.
def kept(method: str) -> tuple[str, str]:
    if method.startswith(("independent", "pranam")):
        return "best", "best"
    return "average", "the average" if method.startswith("elastic") else "it"


def classifier(table: Table, against: str = "one model") -> None:
    rows = []
    reference = table.cell(against, "mean loss").values
    variants = [(m, *kept(m)) for m in table.methods]
    sixteen = [m for m in table.methods if "x steps" in m]
    variants += [(m, k, k) for m in sixteen for k in ("EMA", "SWA")]
    if "independent 16" in table.methods:
        variants.append(("independent 16", "soup", "greedy soup"))
    for method, part, name in variants:
        loss = table.cell(method, f"{part} loss")
        accuracy = table.cell(method, f"{part} accuracy", by=f"{part} loss")
        rate = f"{loss.rate:g}" + (" (edge)" if loss.at_edge else "")
        rows.append(
            (
                method,
                name,
                rate,
                show(interval(loss.values)),
                show(interval(100 * accuracy.values), ".2f"),
                show_ratio(ratio(loss.values, reference)),
            )
        )
    print_table(
        (
            "method",
            "kept",
            "rate",
            "train loss",
            "test accuracy, %",
            f"loss of {against} / loss",
        ),
        rows,
    )


def replicas(tables: dict[str, Table], names: Sequence[str], kind: str) -> None:
    """Mean and best replica of each method against the better of the independent."""
    for measure in ("mean loss", "best loss"):
        methods = [
            m
            for m in tables[names[0]].methods
            if m not in ("independent", "normalised")
        ]
        rows, better = [], {m: [] for m in methods}  # type: ignore[var-annotated]
        for name in names:
            table = tables[name]
            free = [table.cell(m, measure) for m in ("independent", "normalised")]
            first = min(free, key=lambda cell: float(logs(cell.values).mean()))
            row = [name, *(f"{np.exp(logs(c.values).mean()):.2g}" for c in free)]
            for method in methods:
                if method not in table.methods:
                    row.append("-")
                    continue
                cell = table.cell(method, measure)
                factor = ratio(cell.values, first.values)
                better[method].append(factor[0])
                row.append(show_ratio(factor))
            rows.append(row)
        means = [np.exp(np.mean(np.log(v))) if v else np.nan for v in better.values()]
        rows.append(["geometric mean", "", "", *(f"{x:.3g}" for x in means)])
        print(f"### {measure}: better of the independent / elastic\n")
        print_table((kind, "independent", "normalised", *methods), rows)
    print(f"### Share of runs whose best replica is below {SOLVED[kind]:g}\n")
    rows = []
    for name in names:
        table = tables[name]
        cells = [table.cell(m, "best loss").values for m in table.methods]
        rows.append([name, *(f"{np.mean(c < SOLVED[kind]):.2f}" for c in cells)])
    print_table((kind, *tables[names[0]].methods), rows)


def starting_rate(
    tables: dict[str, Table], picks: Sequence[tuple[str, str, str]]
) -> None:
    """Loss at one multiple of the spread over that at the tuned one."""
    rows = []
    for name, method, measure in picks:
        table = tables[name]
        if method not in table.methods:
            continue
        found = logs(table.methods[method][measure][~table.tuning]).mean(axis=0)
        tuned = float(logs(table.cell(method, measure).values).mean())
        row = [name, method]
        row += [
            f"{r:g}: {np.exp(x - tuned):.2g}"
            for r, x in zip(table.rates, found, strict=True)
        ]
        rows.append(row)
    width = max(map(len, rows), default=2) - 2
    print_table(("task", "method", *["rate: loss / tuned"] * width), rows)


def print_tables(results: dict[str, Any]) -> None:
    tables = load(results)
    for name in [k for k in tables if k.startswith("MNIST")]:
        print(f"## {name}\n")
        classifier(tables[name])
    functions = ["Schwefel", "Rastrigin", "Levy", "Styblinski-Tang", "Ackley"]
    functions += ["Griewank", "Michalewicz"]
    functions = [k for k in functions if k in tables]
    models = [k for k in tables if k not in functions and not k.startswith("MNIST")]
    for names, kind in ((models, "model"), (functions, "function")):
        if names:
            print(f"## {kind}s\n")
            replicas(tables, names, kind)
    picks = [
        *((k, "elastic 4", "average loss") for k in tables if k.startswith("MNIST")),
        *((k, "elastic 4, normalised", "average loss") for k in tables if "MNIST" in k),
        *((k, "elastic 0.01, 20%", "best loss") for k in models),
        *((k, "pranam", "best loss") for k in functions),
    ]
    if not any(2000 in task["seeds"] for task in results["tasks"].values()):
        print("## One rate for all\n")
        starting_rate(tables, picks)
