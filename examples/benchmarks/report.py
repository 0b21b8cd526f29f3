"""Tables and figures of the study, from the cells that study.py computed.

    python examples/benchmarks/report.py study.json
    python examples/benchmarks/report.py study.json --ours resampled --output resampled
    python examples/benchmarks/report.py --quick

Writes study_tables.md and the figures study_*.png and study_*.svg.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from methods import MAIN_METHODS
from stats import (
    bootstrap_interval,
    geometric_mean,
    holm,
    log_floored,
    paired_p,
    profile,
)

CONTROLS = ("independent", "normalised")
FLOORS = {"multimodal": 1e-3, "unimodal": 1e-3, "model": 1e-10}
COLORS = dict(
    zip(
        MAIN_METHODS,
        ("silver", "tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple"),
        strict=True,
    )
)


class Cell(NamedTuple):
    """One problem, base optimizer and method.

    Attributes:
      mean: score, mean over replicas, one entry per seed.
      best: of the best replica.
      accuracy: on test data: mean over replicas and that of the best replica by
        score, each one entry per seed; or None.
      solved: part of the seeds on which the best replica solved the problem.
      means: loss curves of the mean over replicas, `[seed, point]`.
    """

    problem: str
    optimizer: str
    method: str
    kind: str
    rate: float
    at_edge: bool
    mean: np.ndarray
    best: np.ndarray
    accuracy: tuple[np.ndarray, np.ndarray] | None
    solved: float
    means: np.ndarray

    @property
    def floor(self) -> float:
        return FLOORS[self.kind]


def read(results: dict[str, Any]) -> dict[tuple[str, str, str], Cell]:
    cells = {}
    for name, raw in results.items():
        problem, optimizer, method = name.split(" | ")
        scores = np.array(raw["scores"], float)
        means = np.array(raw.get("means", []), float)
        # A replica that diverged has not left its start, as far as anyone can use it.
        start = means[:, :1] if means.size else np.inf
        filled = np.where(np.isfinite(scores), scores, start)
        accuracies = np.array(raw.get("accuracies", np.nan), float)
        accuracy = None
        if np.isfinite(accuracies).any():
            chosen = np.take_along_axis(accuracies, filled.argmin(axis=1)[:, None], 1)
            accuracy = accuracies.mean(axis=1), chosen[:, 0]
        cells[problem, optimizer, method] = Cell(
            problem,
            optimizer,
            method,
            raw["kind"],
            raw.get("rate", np.nan),
            raw.get("at_edge", False),
            filled.mean(axis=1),
            filled.min(axis=1),
            accuracy,
            float(np.mean(filled.min(axis=1) < raw["solved"])),
            means,
        )
    return cells


Cells = dict[tuple[str, str, str], Cell]


# A line of a table before it is laid out.
Record = dict[str, Any]


def pivot(
    records: Iterable[Record],
    index: Sequence[str],
    columns: str,
    show: Callable[[list[Record]], str],
) -> str:
    """A Markdown table of records.

    Args:
      records: what to show.
      index: fields that name a row; a row for each combination.
      columns: the field that names the column.
      show: the text of an entry, from the records of its row and column.
    """
    table: dict[tuple[str, ...], dict[str, list[Record]]] = {}
    names: dict[str, None] = {}
    for record in records:
        row = table.setdefault(tuple(record[field] for field in index), {})
        row.setdefault(record[columns], []).append(record)
        names[record[columns]] = None
    lines = [(*index, *names), ("---",) * (len(index) + len(names))]
    for key, row in table.items():
        lines.append((*key, *(show(row[n]) if n in row else "" for n in names)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def count(records: list[Record]) -> str:
    return str(len(records))


def only(field: str) -> Callable[[list[Record]], str]:
    """The field of the one record."""
    return lambda records: str(records[0][field])


def gain(records: list[Record]) -> str:
    """Geometric mean of the gains; a star where the one gain is significant."""
    value = np.exp(np.mean([np.log(record["gain"]) for record in records]))
    star = "*" if len(records) == 1 and records[0]["verdict"] != "equal" else ""
    return f"{value:.3g}{star}"


def number(x: float) -> str:
    return f"{x:.3g}" if np.isfinite(x) else "inf"


def interval(values: np.ndarray, digits: str = ".2g") -> str:
    if not np.isfinite(values).all():
        return number(values.mean())
    low, high = bootstrap_interval(values)
    return f"{values.mean():.3g} ({low:{digits}} to {high:{digits}})"


def score_records(cells: Cells) -> list[Record]:
    """Of each cell: mean (interval) / best replica / part of the seeds solved."""
    records = []
    for cell in cells.values():
        edge = "*" if cell.at_edge else ""
        score = f"{interval(cell.mean)} / {number(cell.best.mean())}"
        record = {
            "problem": cell.problem,
            "optimizer": cell.optimizer,
            "method": cell.method,
            "kind": cell.kind,
            "score": f"{score} / {cell.solved:.0%}{edge}",
            "median": number(max(float(np.median(cell.best)), cell.floor)),
        }
        if cell.accuracy is not None:
            mean, best = cell.accuracy
            record["accuracy"] = f"{interval(mean, '.4f')} / {best.mean():.4f}"
        records.append(record)
    return records


def compare(
    cells: Cells, ours: str, theirs: str | tuple[str, ...], what: str
) -> list[Record]:
    """All cells that both methods have; `what` is "mean" or "best".

    With several of them, "theirs" is in each cell the one with the lowest score. The
    gain is theirs over ours, a geometric mean over seeds of floored scores; p is
    adjusted after Holm for all cells of the comparison.
    """
    others = (theirs,) if isinstance(theirs, str) else theirs
    against = theirs if isinstance(theirs, str) else "the better control"
    records: list[Record] = []
    p_values = []
    for (problem, optimizer, method), cell in cells.items():
        rivals = [cells.get((problem, optimizer, other)) for other in others]
        if method != ours or None in rivals:
            continue
        # On the seeds that all have.
        scores = [getattr(c, what) for c in (cell, *rivals) if c is not None]
        our_values, *values = (x[: min(map(len, scores))] for x in scores)
        levels = [geometric_mean(v, cell.floor) for v in values]
        rival_values = values[int(np.argmin(levels))]
        p_values.append(paired_p(our_values, rival_values, cell.floor))
        records.append(
            {
                "problem": problem,
                "optimizer": optimizer,
                "kind": cell.kind,
                "against": against,
                "replicas": what,
                "comparison": f"{what}, against {against}",
                "gain": float(min(levels) / geometric_mean(our_values, cell.floor)),
            }
        )
    for record, p in zip(records, holm(p_values), strict=True):
        better = "better" if record["gain"] > 1 else "worse"
        record |= {"p": p, "verdict": "equal" if p >= 0.05 else better}
    return records


def tables(cells: Cells, ours: str = "pranam") -> dict[str, str]:
    """The tables of the report by their titles."""
    scores = score_records(cells)
    rivals = [m for m in dict.fromkeys(m for _, _, m in cells) if m != ours]
    versus = [
        record
        for theirs in rivals
        for what in ("mean", "best")
        for record in compare(cells, ours, theirs, what)
    ]
    gains = [
        record
        for theirs in ("independent", CONTROLS)
        for what in ("mean", "best")
        for record in compare(cells, ours, theirs, what)
    ]
    searched = {problem for problem, optimizer, _ in cells if optimizer == "-"}
    searches = [
        record
        for record in scores
        if record["problem"] in searched
        and (record["optimizer"] == "-" or record["method"] == ours)
        and record["optimizer"] in ("-", "Adam")
    ]
    accuracies = [record for record in scores if "accuracy" in record]
    cell = ("problem", "optimizer")
    return {
        f"{ours}: better, equal, worse": pivot(
            versus, ("against", "replicas", "kind"), "verdict", count
        ),
        f"{ours}: gains by kind": pivot(
            gains, ("kind", "optimizer"), "comparison", gain
        ),
        f"{ours}: gains": pivot(gains, cell, "comparison", gain),
        "Median of the best, with other optimizers": pivot(
            searches, ("problem",), "method", only("median")
        ),
        "Accuracy": pivot(accuracies, cell, "method", only("accuracy")),
        **{
            f"Scores, {kind}": pivot(
                [r for r in scores if r["kind"] == kind and r["optimizer"] != "-"],
                cell,
                "method",
                only("score"),
            )
            for kind in FLOORS
        },
    }


def draw_profiles(cells: Cells) -> Any:
    """Performance profiles: of the mean over replicas, and of the best."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    limits = np.logspace(0, 6, 200)
    keys = dict.fromkeys((p, o) for p, o, m in cells if m == "pranam")
    for ax, what in zip(axes, ("mean", "best"), strict=True):
        for method in MAIN_METHODS:
            ratios = []
            for problem, optimizer in keys:
                found = {m: cells.get((problem, optimizer, m)) for m in MAIN_METHODS}
                logs = {
                    m: log_floored(getattr(c, what), c.floor)
                    for m, c in found.items()
                    if c is not None
                }
                if method in logs:
                    num_seeds = min(map(len, logs.values()))
                    common = {m: x[:num_seeds] for m, x in logs.items()}
                    lowest = np.min(list(common.values()), axis=0)
                    ratios.append(10 ** (common[method] - lowest))
            if ratios:
                ax.semilogx(
                    limits,
                    profile(np.concatenate(ratios), limits),
                    color=COLORS[method],
                    label=f"{method} ({len(ratios)} cells)",
                )
        ax.set(
            title=f"{what} replica" if what == "best" else "mean over replicas",
            xlabel="score over the lowest of all methods",
            ylabel="part of the runs",
            ylim=(0, 1),
        )
        ax.legend()
    return figure


def draw_curves(cells: Cells, names: Sequence[str], optimizer: str = "Adam") -> Any:
    """Loss curves: geometric mean over seeds, bands from the least to the most."""
    import matplotlib.pyplot as plt

    shown = [n for n in names if (n, optimizer, "pranam") in cells]
    columns = min(len(shown), 3) or 1
    rows = -(-len(shown) // columns) or 1
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained"
    )
    for ax, name in zip(np.ravel(axes), shown, strict=False):
        for method in MAIN_METHODS:
            cell = cells.get((name, optimizer, method))
            if cell is None:
                continue
            x = np.linspace(0, 1, cell.means.shape[1])
            logs = log_floored(cell.means, 1e-12)
            color = COLORS[method]
            ax.semilogy(x, 10 ** logs.mean(axis=0), color=color, label=method)
            low, high = 10 ** logs.min(axis=0), 10 ** logs.max(axis=0)
            ax.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        ax.set(title=f"{name}, {optimizer}", xlabel="part of the run")
    np.ravel(axes)[0].legend(fontsize="small")
    np.ravel(axes)[0].set_ylabel("loss, mean over replicas")
    return figure


CURVES = (
    "Schwefel 30 rotated",
    "Rastrigin 30 rotated",
    "Levy 30 rotated",
    "tanh 4-5-1",
    "relu 5-6-6-1",
    "MNIST 10-10",
)


def write(cells: Cells, ours: str, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "profiles": draw_profiles(cells),
        "curves": draw_curves(cells, CURVES),
    }
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            # No date, so that the same results make the same file.
            figure.savefig(
                folder / f"study_{name}.{suffix}",
                dpi=100,
                metadata={"Date": None} if suffix == "svg" else None,
            )
    page = folder / "study_tables.md"
    page.write_text(
        "\n\n".join(
            f"## {title}\n\n{table}" for title, table in tables(cells, ours).items()
        )
        + "\n"
    )
    print(f"wrote {page} and {len(figures)} figures")


def invented() -> dict[str, Any]:
    """Results in which pranam is ten times better, to try the code."""
    rng = np.random.default_rng(0)
    results = {}
    for kind, problem in (
        ("multimodal", "Ackley 30 rotated"),
        ("unimodal", "sphere 30 rotated"),
        ("model", "tanh 4-5-1"),
    ):
        for method in ("independent", "normalised", "pranam", "quarter free"):
            level = 0.1 if method == "pranam" else 1.0
            results[f"{problem} | Adam | {method}"] = {
                "scores": (level * rng.uniform(0.9, 1.1, (5, 4))).tolist(),
                "means": (level * rng.uniform(0.9, 1.1, (5, 6))).tolist(),
                "rate": 0.1,
                "kind": kind,
                "solved": 0.1,
            }
    results["Ackley 30 rotated | - | CMA-ES"] = {
        "scores": [[0.5]] * 5,
        "kind": "multimodal",
        "solved": 0.1,
    }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--ours", default="pranam", help="the method to compare")
    parser.add_argument("--output", type=Path, default=Path("report"))
    parser.add_argument("--quick", action="store_true", help="invented results")
    args = parser.parse_args()
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            write(read(invented()), args.ours, Path(folder))
        return
    results: dict[str, Any] = {}
    for path in args.results:
        results |= json.loads(path.read_text())
    write(read(results), args.ours, args.output)


if __name__ == "__main__":
    main()
