"""`minimize` as it comes on rotated test functions, and other methods at equal cost.

    python examples/benchmarks/defaults.py --output docs/results/defaults.csv
    python examples/benchmarks/defaults.py --quick

Nothing is chosen: the default call, the same with `max_evaluations`, and the methods of
`peers`, which get the same functions and boxes. A value with its gradient counts as one
evaluation for everybody. Instances are drawn from seeds that no default was chosen on.
"""

import argparse
import csv
import pathlib
import time
from collections.abc import Callable
from typing import Any

import _paths  # noqa: F401
import jax
import numpy as np
import peers
import tasks

import pranam_optax
from pranam_optax import problems

FUNCTIONS = {
    f"{name} {dim}-D": (make, dim)
    for dim in (30, 100)
    for name, make in tasks.FUNCTIONS.items()
}
FUNCTIONS["Rastrigin 50-D"] = (problems.rastrigin, 50)
PEERS = ("multi-start L-BFGS", "basin hopping", "dual annealing", "CMA-ES")
FIRST_SEED = 5000


def run_default(problem: Any, budget: int, seed: int) -> float:
    result = pranam_optax.minimize(
        problem.fun, None, bounds=(problem.low, problem.high), key=seed
    )
    return float(result.value)


def run_budget(problem: Any, budget: int, seed: int) -> float:
    result = pranam_optax.minimize(
        problem.fun,
        None,
        bounds=(problem.low, problem.high),
        key=seed,
        max_evaluations=budget,
    )
    return float(result.value)


def run_peer(name: str) -> Callable[[Any, int, int], float]:
    def run(problem: Any, budget: int, seed: int) -> float:
        low, high = np.asarray(problem.low), np.asarray(problem.high)
        found = peers.search(
            peers.PEERS[name],
            problem.fun,
            low,
            high,
            num_evaluations=budget,
            seed=seed,
        )
        return found.value

    return run


Row = dict[str, str]
METHODS: dict[str, Callable[[Any, int, int], float]] = {
    "default call": run_default,
    "max_evaluations": run_budget,
} | {name: run_peer(name) for name in PEERS}


def measure(args: argparse.Namespace) -> list[Row]:
    """A row for each run: its value above the minimum and its seconds."""
    rows = []
    for name in args.functions:
        make, dim = FUNCTIONS[name]
        base = make(dim)
        for method, run in METHODS.items():
            num_seeds = args.peer_seeds if method in PEERS else args.seeds
            for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
                problem = problems.randomize(base, jax.random.key(seed), rotated=True)
                begin = time.perf_counter()
                value = run(problem, args.budget, seed) - float(problem.minimum)
                seconds = f"{time.perf_counter() - begin:.3f}"
                columns = "function", "method", "seed", "value", "seconds"
                entries = name, method, str(seed), f"{value:.4g}", seconds
                rows.append(dict(zip(columns, entries, strict=True)))
        print(name, flush=True)
    return rows


def table(rows: list[Row], column: str) -> str:
    """Medians of all methods on each function, the lowest in bold."""
    lines = [
        f"\n| {column} | {' | '.join(METHODS)} |",
        "| --- " * (1 + len(METHODS)) + "|",
    ]
    for name in dict.fromkeys(row["function"] for row in rows):
        of_name = [row for row in rows if row["function"] == name]
        medians = [
            np.median([float(r[column]) for r in of_name if r["method"] == method])
            for method in METHODS
        ]
        cells = [f"{x:.3g}" for x in medians]
        best = int(np.argmin(medians))
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=FUNCTIONS)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--peer-seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=64_000)
    parser.add_argument("--output", type=pathlib.Path, help="a CSV of all runs")
    parser.add_argument(
        "--results", type=pathlib.Path, nargs="+", help="tables of these"
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.functions, args.seeds, args.peer_seeds = ["Ackley 30-D"], 1, 1
        args.budget = 300
    rows: list[Row] = []
    for path in args.results or ():
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    rows = rows or measure(args)
    if args.output:
        with args.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    print(table(rows, "value"), table(rows, "seconds"), sep="\n")


if __name__ == "__main__":
    main()
