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


COLUMNS = ["function", "method", "seed", "value", "seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=FUNCTIONS)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--peer-seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=64_000)
    parser.add_argument("--output", type=pathlib.Path, help="a CSV of all runs")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.functions, args.seeds, args.peer_seeds = ["Ackley 30-D"], 1, 1
        args.budget = 300

    methods: dict[str, tuple[Callable[[Any, int, int], float], int]] = {
        "default call": (run_default, args.seeds),
        "default, max_evaluations": (run_budget, args.seeds),
    }
    methods |= {name: (run_peer(name), args.peer_seeds) for name in PEERS}
    print("| function | method | median | lowest | within 1e-3 | seconds a run |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows: list[list[Any]] = []
    for name in args.functions:
        make, dim = FUNCTIONS[name]
        base = make(dim)
        for method, (run, num_seeds) in methods.items():
            values, seconds = [], []
            for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
                problem = problems.randomize(base, jax.random.key(seed), rotated=True)
                begin = time.perf_counter()
                values.append(run(problem, args.budget, seed) - float(problem.minimum))
                seconds.append(time.perf_counter() - begin)
                rows.append([name, method, seed, values[-1], seconds[-1]])
            solved = sum(value < 1e-3 for value in values)
            print(
                f"| {name} | {method} | {np.median(values):.3g} | {min(values):.3g} "
                f"| {solved} of {num_seeds} | {np.median(seconds):.2f} |",
                flush=True,
            )
        if args.output:
            with args.output.open("w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
