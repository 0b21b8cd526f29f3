"""The 27 NIST StRD regressions from wide random boxes, and other methods beside.

    python examples/nist.py --quick
    python examples/nist.py --control --output nist.json --plot nist.png

The box is the same for all problems and methods: [-10 |b|, 10 |b|] for each certified
parameter b, the sign unknown; the official starts are never used by `fit`. A run
succeeds if all its parameters agree with the certified ones to 6 digits (up to the
order of equal terms of a sum, and signs that do not matter).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nist_problems
import numpy as np
import peers
import scipy.optimize
from tqdm import tqdm

import pranam_optax
from pranam_optax.fitting import FitResult, levenberg_marquardt, second_order

QUICK = ("Misra1a",)
WIDTH = 10.0


def box(problem: nist_problems.Regression) -> tuple[np.ndarray, np.ndarray]:
    size = WIDTH * np.abs(problem.certified)
    return -size, size


def fit_seeds(
    problem: nist_problems.Regression, num_seeds: int, **options: Any
) -> FitResult:
    """One fit per seed, all at once: a batch of results.

    The seeds are not those with which the defaults were chosen, which were of key 0.
    """

    @jax.jit
    @jax.vmap
    def run(key: jax.Array) -> FitResult:
        return pranam_optax.fit(
            problem.model, problem.x, problem.y, bounds=box(problem), key=key, **options
        )

    return jax.block_until_ready(run(jax.random.split(jax.random.key(1), num_seeds)))


def official_digits(name: str, problem: nist_problems.Regression) -> list[float]:
    """SciPy's `least_squares` with its defaults, from the two official starts."""

    def residuals(b: Any) -> Any:
        return problem.model(b, problem.x) - problem.y

    digits = []
    for start in problem.starts:
        try:
            with np.errstate(all="ignore"):
                found = scipy.optimize.least_squares(
                    jax.jit(residuals), start, jac=jax.jit(jax.jacfwd(residuals))
                )
            digits.append(float(nist_problems.digits(name, problem, found.x)))
        except ValueError:  # not finite at the start
            digits.append(0.0)
    return digits


def study(
    name: str, problem: nist_problems.Regression, args: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table."""

    def residuals(b: jax.Array) -> jax.Array:
        return problem.model(b, problem.x) - problem.y

    def rss(b: jax.Array) -> jax.Array:
        return jnp.sum(residuals(b) ** 2)

    def hits(b: np.ndarray) -> np.ndarray:
        return nist_problems.digits(name, problem, b) >= 6

    options = {
        "num_replicas": args.replicas,
        "num_steps": args.steps,
        "polish": (levenberg_marquardt if args.all else second_order)(
            args.polish_steps
        ),
    }
    begin = time.process_time()
    ours = fit_seeds(problem, args.seeds, **options)
    seconds = time.process_time() - begin
    digits = nist_problems.digits(name, problem, np.asarray(ours.params))
    budget = int(np.mean(ours.num_evaluations))
    row: dict[str, Any] = {
        "digits": float(digits.min()),
        "success": float(np.mean(digits >= 6)),
        "replicas": float(hits(np.asarray(ours.replica_params)).mean()),
        "value": float(np.max(ours.value) / problem.rss),
        "evaluations": budget,
        "seconds": seconds,
    }
    if args.control:
        alone = fit_seeds(problem, args.seeds, coupling=0.0, **options)
        row["uncoupled"] = float(hits(np.asarray(alone.params)).mean())

    low, high = box(problem)
    starts = peers.multi_start(
        residuals,
        low,
        high,
        num_starts=args.starts,
        max_steps=args.polish_steps,
        seed=1,
    )
    hit = hits(starts.params)
    row["per start"] = float(hit.mean())
    row["multi-start"] = starts.success_at(hit, budget)
    row["official"] = official_digits(name, problem)
    for peer in ("differential evolution", "dual annealing"):
        ends = [
            peers.polish(
                residuals,
                peers.search(
                    peers.PEERS[peer], rss, low, high, num_evaluations=budget, seed=seed
                ).params,
            )
            for seed in range(args.peer_seeds)
        ]
        row[peer] = float(hits(np.stack(ends)).mean()) if ends else np.nan
    return row


def percent(x: float) -> str:
    return "-" if np.isnan(x) else f"{100 * x:.3g} %"


def line(name: str, row: dict[str, Any]) -> str:
    cells = [
        name,
        f"{row['digits']:.1f}",
        percent(row["success"]),
        percent(row["replicas"]),
        percent(row.get("uncoupled", np.nan)),
        percent(row["multi-start"]),
        percent(row["per start"]),
        percent(row["differential evolution"]),
        percent(row["dual annealing"]),
        ", ".join(f"{d:.1f}" for d in row["official"]),
        f"{row['evaluations']}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| problem | fit: fewest digits | success | of its replicas | uncoupled "
    "| multi-start LM | one start of LM | differential evolution | dual annealing "
    "| least_squares from the official starts: digits | evaluations |\n" + "| --- " * 11
) + "|"


def plot(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """How often a run of each method ends in the certified minimum."""
    import matplotlib.pyplot as plt

    names = sorted(rows, key=lambda name: rows[name]["per start"])
    figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
    kinds = {
        "success": "fit",
        "multi-start": "Levenberg-Marquardt, as many evaluations",
        "per start": "one start of Levenberg-Marquardt",
    }
    for i, (key, label) in enumerate(kinds.items()):
        heights = [100 * rows[name][key] for name in names]
        axes.bar(np.arange(len(names)) + 0.27 * i, heights, width=0.27, label=label)
    axes.set_xticks(np.arange(len(names)) + 0.27, names, rotation=60, ha="right")
    axes.set(ylabel="runs in the certified minimum (%)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="problems; default all")
    parser.add_argument("--data-dir", type=Path, help="folder with NIST's files")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--peer-seeds", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--polish-steps", type=int, default=1000)
    parser.add_argument(
        "--all", action="store_true", help="refine all replicas to the end"
    )
    parser.add_argument("--starts", type=int, default=1000, help="of LM, pooled")
    parser.add_argument("--control", action="store_true", help="also without coupling")
    parser.add_argument("--quick", action="store_true", help="one problem, 2 seeds")
    parser.add_argument("--output", type=Path, help="keeps the rows that are done")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    names = args.names or list(nist_problems.MODELS)
    if args.quick:
        names = args.names or list(QUICK)
        args.seeds, args.peer_seeds, args.steps, args.starts = 2, 0, 200, 64

    jax.config.update("jax_enable_x64", True)
    rows: dict[str, dict[str, Any]] = {}
    if args.output and args.output.exists():
        rows = json.loads(args.output.read_text())
    print(HEADER)
    with tqdm(nist_problems.load(args.data_dir, names).items(), unit="fit") as progress:
        for name, problem in progress:
            progress.set_description(name)
            if name not in rows:
                rows[name] = study(name, problem, args)
            if args.output:
                args.output.write_text(json.dumps(rows))
            progress.write(line(name, rows[name]))
    good = [row["success"] >= 0.95 for row in rows.values()]
    print(
        f"\n{sum(good)} of {len(good)} problems succeed in at least 95 % of the runs."
    )
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    main()
