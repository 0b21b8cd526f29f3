"""Tables and figures of the study, from the cells that study.py computed.

    python examples/benchmarks/report.py study.json --double double.json
    python examples/benchmarks/report.py --quick

Writes study.md with its tables and the figures study_*.png and study_*.svg.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from blackbox import GRADIENT_PEERS
from methods import METHODS, coupled
from stats import (
    bootstrap_interval,
    geometric_mean,
    holm,
    log_floored,
    paired_p,
    profile,
)

import pranam_optax
from pranam_optax import problems

CONTROLS = ("independent", "normalised")
FLOORS = {"multimodal": 1e-3, "unimodal": 1e-3, "model": 1e-10}
COLORS = dict(
    zip(
        METHODS,
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


class Comparison(NamedTuple):
    """Ours against theirs in one cell.

    Attributes:
      gain: theirs over ours, geometric mean over seeds of floored scores.
      p: adjusted after Holm for all cells of the comparison.
    """

    problem: str
    optimizer: str
    kind: str
    gain: float
    p: float

    @property
    def verdict(self) -> str:
        if self.p >= 0.05:
            return "equal"
        return "better" if self.gain > 1 else "worse"


def compare(
    cells: Cells, ours: str, theirs: str | tuple[str, ...], what: str
) -> list[Comparison]:
    """All cells that both methods have; `what` is "mean" or "best".

    With several of them, "theirs" is in each cell the one with the lowest score.
    """
    others = (theirs,) if isinstance(theirs, str) else theirs
    pairs = []
    for (problem, optimizer, method), cell in cells.items():
        rivals = [cells.get((problem, optimizer, other)) for other in others]
        if method != ours or None in rivals:
            continue
        # On the seeds that all have.
        scores = [getattr(c, what) for c in (cell, *rivals) if c is not None]
        our_values, *values = (x[: min(map(len, scores))] for x in scores)
        levels = [geometric_mean(v, cell.floor) for v in values]
        rival_values = values[int(np.argmin(levels))]
        gain = min(levels) / geometric_mean(our_values, cell.floor)
        p = paired_p(our_values, rival_values, cell.floor)
        pairs.append(Comparison(problem, optimizer, cell.kind, gain, p))
    adjusted = holm([pair.p for pair in pairs])
    return [pair._replace(p=float(p)) for pair, p in zip(pairs, adjusted, strict=True)]


def lines_of(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number(x: float) -> str:
    return f"{x:.3g}" if np.isfinite(x) else "inf"


def verdict_table(cells: Cells, ours: str, rivals: Sequence[str]) -> str:
    """How many cells are better, equal and worse."""
    rows = []
    for theirs in rivals:
        for what in ("mean", "best"):
            comparisons = compare(cells, ours, theirs, what)
            for kind in FLOORS:
                verdicts = [c.verdict for c in comparisons if c.kind == kind]
                if verdicts:
                    counts = [
                        f"{verdicts.count(v)} ({verdicts.count(v) / len(verdicts):.0%})"
                        for v in ("better", "equal", "worse")
                    ]
                    rows.append((theirs, what, kind, str(len(verdicts)), *counts))
    header = ("against", "of the replicas", "problems", "cells")
    return lines_of((*header, "better", "no difference", "worse"), rows)


def verdict_lists(cells: Cells, ours: str, theirs: str) -> str:
    """Every cell with a significant difference, won or lost."""
    rows = []
    for what in ("mean", "best"):
        for c in compare(cells, ours, theirs, what):
            if c.verdict != "equal":
                gain = f"{c.gain:.3g}" if c.gain >= 1 else f"1 / {1 / c.gain:.3g}"
                p = f"{c.p:.1g}"
                rows.append((c.verdict, what, c.problem, c.optimizer, gain, p))
    rows.sort(key=lambda row: (row[0] == "better", row[1]))
    return lines_of(
        ("verdict", "of the replicas", "problem", "optimizer", "gain", "p"), rows
    )


def cell_table(cells: Cells, kind: str, methods: Sequence[str] = tuple(METHODS)) -> str:
    """Mean over replicas (interval) / best replica / part of the seeds solved."""
    rows = []
    keys = dict.fromkeys(
        (p, o) for (p, o, _), c in cells.items() if c.kind == kind and o != "-"
    )
    for problem, optimizer in keys:
        found = {m: cells.get((problem, optimizer, m)) for m in methods}
        lowest = min(c.mean.mean() for c in found.values() if c is not None)
        row = [problem, optimizer]
        for cell in found.values():
            if cell is None:
                row.append("")
                continue
            text = number(cell.mean.mean())
            if np.isfinite(cell.mean).all():
                low, high = bootstrap_interval(cell.mean)
                text += f" ({low:.2g} to {high:.2g})"
            if cell.mean.mean() == lowest:
                text = f"**{text}**"
            edge = "*" if cell.at_edge else ""
            best = number(cell.best.mean())
            row.append(f"{text} / {best} / {cell.solved:.0%}{edge}")
        rows.append(row)
    return lines_of(("problem", "optimizer", *methods), rows)


def accuracy_table(cells: Cells) -> str:
    rows = []
    for cell in cells.values():
        if cell.accuracy is not None:
            mean, best = cell.accuracy
            low, high = bootstrap_interval(mean)
            rows.append(
                (
                    cell.problem,
                    cell.optimizer,
                    cell.method,
                    number(cell.mean.mean()),
                    number(cell.best.mean()),
                    f"{mean.mean():.4f} ({low:.4f} to {high:.4f})",
                    f"{best.mean():.4f}",
                )
            )
    header = ("problem", "optimizer", "method", "train loss, mean", "best")
    return lines_of((*header, "test accuracy, mean", "of the best"), rows)


def gain_table(cells: Cells, ours: str) -> str:
    """Geometric means over problems of the gain, per optimizer."""
    rows = []
    groups = {
        **{
            f"{dim}-D multimodal": ("multimodal", f" {dim} rotated")
            for dim in (10, 30, 100)
        },
        **{
            f"{dim}-D multimodal, not rotated": ("multimodal", f" {dim}")
            for dim in (30, 1000)
        },
        "unimodal": ("unimodal", ""),
        "models": ("model", ""),
    }
    optimizers = dict.fromkeys(o for _, o, _ in cells if o != "-")
    for group, (kind, part) in groups.items():
        for optimizer in optimizers:
            row = [group, optimizer]
            count = 0
            for theirs in ("independent", CONTROLS):
                for what in ("mean", "best"):
                    gains = [
                        c.gain
                        for c in compare(cells, ours, theirs, what)
                        if (c.kind, c.optimizer) == (kind, optimizer)
                        and c.problem.endswith(part)
                    ]
                    if gains:
                        row.append(number(float(np.exp(np.mean(np.log(gains))))))
                        count = len(gains)
            if len(row) == 6:
                row.insert(2, str(count))
                rows.append(row)
    return lines_of(
        (
            "problems",
            "optimizer",
            "cells",
            "mean, against independent",
            "best, against independent",
            "mean, against the better control",
            "best, against the better control",
        ),
        rows,
    )


def share(comparisons: Sequence[Comparison], verdict: str) -> str:
    count = sum(c.verdict == verdict for c in comparisons)
    return f"{count} of {len(comparisons)} ({100 * count / len(comparisons):.3g}%)"


def median_gain(cells: Cells, problem: str, method: str, what: str) -> float:
    """Median over instances of the gain over the better control, with Adam."""
    ours = cells[problem, "Adam", method]
    controls = [getattr(cells[problem, "Adam", control], what) for control in CONTROLS]
    better = min(controls, key=lambda x: geometric_mean(x, ours.floor))
    logs = log_floored(better, ours.floor) - log_floored(
        getattr(ours, what), ours.floor
    )
    return float(10 ** np.median(logs))


def classifier_wins(
    cells: Cells, problem: str, method: str, what: str, index: int
) -> dict[str, bool]:
    """By optimizer: whether average loss and accuracy are better than independent."""
    wins = {}
    for (where, optimizer, name), ours in cells.items():
        theirs = cells.get((problem, optimizer, "independent"))
        if (where, name) != (problem, method) or theirs is None:
            continue
        if ours.accuracy is None or theirs.accuracy is None:
            continue
        lower = getattr(ours, what).mean() < getattr(theirs, what).mean()
        higher = ours.accuracy[index].mean() > theirs.accuracy[index].mean()
        wins[optimizer] = bool(lower and higher)
    return wins


def part_of_run(curves: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How much of the run passes before each curve `[seed, point]` meets its target.

    Infinite where it never does; at least the distance of two points.
    """
    num_points = curves.shape[1]
    met = curves <= targets[:, None]
    first = np.maximum(met.argmax(axis=1), 1) / (num_points - 1)
    return np.where(met.any(axis=1), first, np.inf)


class Race(NamedTuple):
    """Who reaches the final mean gap of independent replicas first.

    Attributes:
      gap: our final gap over theirs, geometric mean over seeds of floored gaps.
      evaluations: until our mean gap is as low as their final one, or below the floor,
        over those of theirs; median over seeds.
    """

    problem: str
    optimizer: str
    gap: float
    evaluations: float


def races(cells: Cells, ours: str, theirs: str) -> list[Race]:
    """Of all unimodal problems."""
    found = []
    for (problem, optimizer, method), our_cell in cells.items():
        rival = cells.get((problem, optimizer, theirs))
        if method != ours or our_cell.kind != "unimodal" or rival is None:
            continue
        floor = our_cell.floor
        targets = np.maximum(np.nan_to_num(rival.means[:, -1], nan=np.inf), floor)
        ratios = part_of_run(our_cell.means, targets) / part_of_run(
            rival.means, targets
        )
        gap = geometric_mean(our_cell.mean, floor) / geometric_mean(rival.mean, floor)
        found.append(Race(problem, optimizer, float(gap), float(np.median(ratios))))
    return found


def race_table(cells: Cells, ours: str, rivals: Sequence[str]) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for theirs in rivals:
        for race in races(cells, ours, theirs):
            row = rows.setdefault((race.problem, race.optimizer), [])
            row += [f"{race.gap:.2g}", f"{race.evaluations:.2g}"]
    header = [
        f"{what}, against {theirs}"
        for theirs in rivals
        for what in ("gap", "evaluations")
    ]
    whole = [(*key, *row) for key, row in rows.items() if len(row) == len(header)]
    return lines_of(("problem", "optimizer", *header), whole)


def step_cost(page: Path) -> str:
    """Time of a step in 1000-D over that of Adam alone, which speed.py measured."""
    if page.exists():
        for line in page.read_text().splitlines():
            if line.startswith("| function, 1000-D, R = 64 | step |"):
                return line.split(" | ")[4]
    return "unknown"


def dimension_table(cells: Cells, cost: str) -> str:
    """In 1000-D: gaps beside the cost of a step."""
    rows = []
    for problem in dict.fromkeys(p for p, _, _ in cells if p.endswith(" 1000")):
        for method in ("independent", "normalised", "pranam"):
            cell = cells.get((problem, "Adam", method))
            if cell is not None:
                low, high = bootstrap_interval(cell.mean)
                mean = f"{number(cell.mean.mean())} ({low:.3g} to {high:.3g})"
                best = number(cell.best.mean())
                relative = {"independent": "1", "pranam": cost}.get(method, "")
                rows.append((problem, method, mean, best, relative))
    header = ("problem", "method", "gap, mean", "gap, best", "time of a step")
    return lines_of(header, rows)


def preset_table(
    cells: Cells, ours: str, rivals: dict[str, str | tuple[str, ...]]
) -> str:
    """Gains of a preset over other methods; a star where they are significant."""
    found = {
        f"{what}, against {name}": {
            (c.problem, c.optimizer): c for c in compare(cells, ours, theirs, what)
        }
        for name, theirs in rivals.items()
        for what in ("mean", "best")
    }

    def gain(comparison: Comparison | None) -> str:
        if comparison is None:
            return ""
        star = "" if comparison.verdict == "equal" else "*"
        return f"{comparison.gain:.2g}{star}"

    keys = dict.fromkeys(key for column in found.values() for key in column)
    rows = [
        (*key, *(gain(column.get(key)) for column in found.values())) for key in keys
    ]
    return lines_of(("problem", "optimizer", *found), rows)


def target_table(cells: Cells, double: Cells) -> str:
    """What was aimed at, and what was measured."""
    rows: list[Sequence[str]] = []
    versus = {
        (method, what): compare(cells, method, "independent", what)
        for method in ("pranam", "resampled")
        for what in ("mean", "best")
    }
    for method, kind in product(("pranam", "resampled"), ("multimodal", "model")):
        mean, best = (
            [c for c in versus[method, what] if c.kind == kind]
            for what in ("mean", "best")
        )
        if mean:
            name = f"{kind} cells, {method} against independent"
            rows += [
                (f"{name}: mean better", "at least 85 %", share(mean, "better")),
                (f"{name}: mean worse", "at most 5 %", share(mean, "worse")),
                (f"{name}: best worse", "at most 5 %", share(best, "worse")),
            ]
    unimodal = [c for c in versus["pranam", "mean"] if c.kind == "unimodal"]
    if unimodal:
        worst = min(unimodal, key=lambda c: c.gain)
        where = f"{worst.problem}, {worst.optimizer}"
        rows.append(
            (
                "unimodal cells: gap over that of independent",
                "at most 1.5",
                f"at most {1 / worst.gain:.2g} ({where})",
            )
        )
        slowest = max(
            races(cells, "pranam", "independent"), key=lambda race: race.evaluations
        )
        where = f"{slowest.problem}, {slowest.optimizer}"
        rows.append(
            (
                "unimodal cells: evaluations to the final gap of independent, over "
                "those of independent",
                "at most 1.5",
                f"at most {slowest.evaluations:.2g} ({where})",
            )
        )
    for optimizer, (method, what) in product(
        ("Adam", "SGD", "Adagrad", "RMSProp"), versus
    ):
        logs = [
            np.log(c.gain)
            for c in versus[method, what]
            if (c.kind, c.optimizer) == ("multimodal", optimizer)
            and c.problem.endswith(" 30 rotated")
        ]
        if logs:
            least = {"mean": (50, 5), "best": (500, 10)}[what][optimizer != "Adam"]
            rows.append(
                (
                    f"30-D multimodal, {method}, {optimizer}: geometric mean of the "
                    f"gain, {what}",
                    f"at least {least}",
                    f"{np.exp(np.mean(logs)):.3g} ({len(logs)} functions)",
                )
            )
    for problem, method in product(
        dict.fromkeys(p for p, _, _ in cells), ("pranam", "quarter free, resampled")
    ):
        ours = cells.get((problem, "Adam", method))
        if ours is None or ours.kind != "model" or ours.accuracy is not None:
            continue
        if any((problem, "Adam", control) not in cells for control in CONTROLS):
            continue
        for what, aim in (("mean", "at least 5"), ("best", "at least 1")):
            gain = median_gain(cells, problem, method, what)
            name = f"{problem}, {method}: median gain over the better control, {what}"
            rows.append((name, aim, f"{gain:.2g}"))
    classified = dict.fromkeys(p for (p, _, _), c in cells.items() if c.accuracy)
    for problem, method in product(
        classified, ("pranam", "s1 r0.3", "s1 r0.3, resampled")
    ):
        for i, what in enumerate(("mean", "best")):
            wins = classifier_wins(cells, problem, method, what, i)
            if wins:
                name = f"{problem}, {method}: lower loss, higher accuracy, {what}"
                won = ", ".join(o for o, win in wins.items() if win) or "none"
                rows.append((name, "all optimizers", f"{won} (of {', '.join(wins)})"))
    for entries, condition in ((cells, ""), (double, ", gradients count twice")):
        for dim in (30, 100):
            peers = [
                medians
                for problem, medians in peer_medians(entries).items()
                if entries[problem, "Adam", "pranam"].kind == "multimodal"
                and f" {dim} " in problem
            ]
            if peers:
                count = sum(medians[0] == min(medians) for medians in peers)
                name = f"{dim}-D functions on which no peer has a lower median gap"
                measured = f"{count} of {len(peers)}"
                rows.append((name + condition, "at least half", measured))
    return lines_of(("", "aim", "measured"), rows)


def count_twice(cells: Cells, double: Cells) -> Cells:
    """`double`, whose gradients count twice, with the peers that need none."""
    return double | {
        key: cell
        for key, cell in cells.items()
        if key[1] == "-" and key[2] not in GRADIENT_PEERS
    }


def peer_names(cells: Cells) -> list[str]:
    return list(dict.fromkeys(m for _, o, m in cells if o == "-"))


def peer_medians(cells: Cells) -> dict[str, list[float]]:
    """Median over seeds of the lowest score, floored: ours, then each peer's.

    Of the functions that both have been run on.
    """
    medians = {}
    for problem in dict.fromkeys(p for p, o, _ in cells if o == "-"):
        keys = [("Adam", "pranam"), *(("-", peer) for peer in peer_names(cells))]
        found = [cells.get((problem, *key)) for key in keys]
        if found[0] is None:
            continue
        # Peers run on the first seeds only.
        num_seeds = min(len(c.best) for c in found if c is not None)
        medians[problem] = [
            np.inf
            if c is None
            else max(float(np.median(c.best[:num_seeds])), FLOORS["multimodal"])
            for c in found
        ]
    return medians


def peer_table(cells: Cells) -> str:
    """Median over seeds of the lowest score; the lowest median is bold."""
    rows = [
        [
            problem,
            *(
                ""
                if m == np.inf
                else f"**{m:.3g}**"
                if m == min(medians)
                else f"{m:.3g}"
                for m in medians
            ),
        ]
        for problem, medians in peer_medians(cells).items()
    ]
    return lines_of(("problem", "pranam + Adam", *peer_names(cells)), rows)


def draw_profiles(cells: Cells) -> Any:
    """Performance profiles: of the mean over replicas, and of the best."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    limits = np.logspace(0, 6, 200)
    keys = dict.fromkeys((p, o) for p, o, m in cells if m == "pranam")
    for ax, what in zip(axes, ("mean", "best"), strict=True):
        for method in METHODS:
            ratios = []
            for problem, optimizer in keys:
                found = {m: cells.get((problem, optimizer, m)) for m in METHODS}
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
        for method in METHODS:
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


def draw_landscape(num_steps: int = 400) -> Any:
    """The paths of 32 replicas over Schwefel's and Rastrigin's functions in 2-D."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 9), layout="constrained")
    for row, base in zip(
        axes,
        (problems.bound(problems.schwefel(2)), problems.rastrigin(2)),
        strict=True,
    ):
        problem = problems.randomize(base, 1)
        half = float(problem.high[0] - problem.low[0]) / 2
        start = pranam_optax.replicate(problem.init, 2, 32)
        grid = np.linspace(problem.low[0], problem.high[0], 200)
        height = jax.vmap(jax.vmap(problem.fun))(
            jnp.stack(jnp.meshgrid(grid, grid), axis=-1)
        )
        grad_fn = pranam_optax.replica_value_and_grad(problem.fun)
        adam = optax.adam(optax.cosine_decay_schedule(0.1 * half, num_steps))
        # Two codes would express any two weights: one code filters.
        ours = coupled(pranam_optax.mlp_embedding((1,)))(adam, num_steps, 32)
        for ax, (title, tx) in zip(
            row, {"Adam": adam, "pranam + Adam": ours}.items(), strict=True
        ):

            def step(carry: Any, _: None, tx: Any = tx, grad_fn: Any = grad_fn) -> Any:
                params, state = carry
                _, grads = grad_fn(params)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), params

            (end, _), paths = jax.lax.scan(
                step, (start, tx.init(start)), None, num_steps
            )
            # Pixels in the SVG too, which would have millions of points otherwise.
            ax.set_rasterization_zorder(2.5)
            ax.contourf(grid, grid, height, levels=30, cmap="Greys_r", zorder=0)
            ax.plot(paths[..., 0], paths[..., 1], lw=0.8)
            ax.plot(*end.T, "o", color="tab:red", ms=4)
            ax.plot(*problem.minimizer, "*", color="gold", ms=14)
            gap = jax.vmap(problem.fun)(end).mean() - problem.minimum
            ax.set(
                title=f"{title}: mean {gap:.2g}",
                xlim=(grid[0], grid[-1]),
                ylim=(grid[0], grid[-1]),
                aspect="equal",
            )
    return figure


CURVES = (
    "Schwefel 30 rotated",
    "Rastrigin 30 rotated",
    "Levy 30 rotated",
    "tanh 4-5-1",
    "relu 5-6-6-1",
    "MNIST 10-10",
)


def write(
    cells: Cells, double: Cells, folder: Path, landscape_steps: int = 400
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "profiles": draw_profiles(cells),
        "curves": draw_curves(cells, CURVES),
        "landscape": draw_landscape(landscape_steps),
    }
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            # No date, so that the same results make the same file.
            figure.savefig(
                folder / f"study_{name}.{suffix}",
                dpi=100,
                metadata={"Date": None} if suffix == "svg" else None,
            )
    titles = {
        "multimodal": "Multimodal functions",
        "unimodal": "Unimodal functions",
        "model": "Models",
    }
    twice = count_twice(cells, double)
    sections = {
        "targets": target_table(cells, twice),
        "verdicts": verdict_table(
            cells, "pranam", [method for method in METHODS if method != "pranam"]
        ),
        "gains": gain_table(cells, "pranam"),
        "unimodal": race_table(cells, "pranam", CONTROLS),
        "1000-D": dimension_table(cells, step_cost(folder / "devices.md")),
        "resampled": preset_table(
            cells,
            "resampled",
            {
                "the better control": CONTROLS,
                "the normalised control, resampled": "normalised, resampled",
                "pranam": "pranam",
            },
        ),
        **{
            preset: preset_table(
                cells,
                preset,
                {
                    "independent": "independent",
                    "the better control": CONTROLS,
                    "pranam": "pranam",
                },
            )
            for preset in ("quarter free", "quarter free, resampled")
        },
        "presets": "\n\n".join(
            f"*{preset}*:\n\n" + verdict_table(cells, preset, (*CONTROLS, "pranam"))
            for preset in ("resampled", "quarter free", "quarter free, resampled")
        ),
        "peers": peer_table(cells),
        "gradients count twice": peer_table(twice),
        "accuracy": accuracy_table(cells),
        "won and lost": verdict_lists(cells, "pranam", "independent"),
        **{title: cell_table(cells, kind) for kind, title in titles.items()},
    }
    page = folder / "study.md"
    text = page.read_text() if page.exists() else "# The study\n"
    page.write_text(fill(text, sections))
    print(f"wrote {page} and {len(figures)} figures")


def fill(text: str, sections: dict[str, str]) -> str:
    """Puts each table between its markers; those without any go to the end."""
    for name, table in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        block = f"{begin}\n\n{table}\n\n{end}"
        if begin in text:
            head, _, rest = text.partition(begin)
            text = head + block + rest.partition(end)[2]
        else:
            text = f"{text.rstrip()}\n\n## {name.capitalize()}\n\n{block}\n"
    return text


def read_files(paths: Iterable[Path]) -> Cells:
    return read(
        {k: v for path in paths for k, v in json.loads(path.read_text()).items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument(
        "--double",
        nargs="*",
        type=Path,
        default=[],
        help="the same of study.py --gradient-cost 2",
    )
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="invented results")
    args = parser.parse_args()
    if args.quick:
        cells = read(invented())
        with tempfile.TemporaryDirectory() as folder:
            write(cells, cells, Path(folder), landscape_steps=5)
    else:
        write(read_files(args.results), read_files(args.double), args.output)


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


if __name__ == "__main__":
    main()
