"""How many evaluations methods need on COCO's 24 functions, as COCO counts.

    python examples/benchmarks/bbob_runtimes.py --dim 20 --instances 15
    python examples/benchmarks/bbob_runtimes.py --methods cma --instances 5 \\
        --output docs/results/bbob_20d_cma.csv.gz
    python examples/benchmarks/bbob_runtimes.py --quick

A runtime is the number of evaluations until the value is within a target of the
minimum, for 51 targets from 1e2 to 1e-8. A value with its gradient may be counted as 2
evaluations, what automatic differentiation costs, or as dim + 1, what finite
differences cost. `pranam` is `minimize` with `max_evaluations` and nothing else.

The archive's shares that are printed beside ours were read from the curves of COCO's
data archive (https://numbbo.github.io/data-archive/bbob/).
"""

import argparse
import csv
import gzip
import pathlib
import time
from collections.abc import Callable

import _paths  # noqa: F401
import bbob
import jax
import numpy as np
import peers

import pranam_optax

TARGETS = np.logspace(2, -8, 51)
TENTH = 15  # where the target 0.1 is

excess = jax.jit(bbob.Problem.excess)
excesses = jax.jit(jax.vmap(bbob.Problem.excess, in_axes=(None, 0)))
excess_and_gradient = jax.jit(jax.value_and_grad(bbob.Problem.excess, argnums=1))


class Counted:
    """A problem as functions of NumPy vectors, which count their evaluations.

    Attributes:
      history: the value above the minimum, evaluation by evaluation.
      with_gradient: whether each of them was asked for with its gradient.
    """

    def __init__(self, problem: bbob.Problem) -> None:
        self.problem = problem
        self.minimum = float(problem.minimum)
        self.history: list[float] = []
        self.with_gradient: list[bool] = []

    def __call__(self, x: np.ndarray) -> float:
        return self._record(excess(self.problem, x), False)

    def value_and_grad(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = excess_and_gradient(self.problem, x)
        return self._record(value, True), np.asarray(gradient)

    def _record(self, value: jax.Array, with_gradient: bool) -> float:
        self.history.append(float(value))
        self.with_gradient.append(with_gradient)
        return self.history[-1] + self.minimum

    def runtimes(self, gradient_cost: int = 2) -> np.ndarray:
        """Evaluations until each target, if a value with gradient counts as so many."""
        return runtimes(self.history, np.where(self.with_gradient, gradient_cost, 1))


def runtimes(history: np.ndarray | list[float], costs: np.ndarray) -> np.ndarray:
    """Evaluations until each target, and infinity for targets that are not reached.

    Args:
      history: values above the minimum, in the order of evaluation.
      costs: of each of them, in evaluations.
    """
    reached = np.asarray(history)[None] <= TARGETS[:, None]
    return np.where(reached.any(1), np.cumsum(costs)[reached.argmax(1)], np.inf)


def share(times: np.ndarray, budget: float) -> float:
    """Of the targets, the part reached within so many evaluations."""
    return float(np.mean(times <= budget))


class ReachedError(Exception):
    """Raised when the last target is reached or the budget spent."""


class Limited(Counted):
    """Ends the search that uses it; in the unit cube, as methods of `peers` want it."""

    def __init__(self, problem: bbob.Problem, budget: int) -> None:
        super().__init__(problem)
        self.left = budget

    def _record(self, value: jax.Array, with_gradient: bool) -> float:
        result = super()._record(value, with_gradient)
        self.left -= 1 + with_gradient
        if self.history[-1] <= TARGETS[-1] or self.left <= 0:
            raise ReachedError
        return result

    def value(self, u: np.ndarray) -> float:
        return self(10 * np.asarray(u) - 5)

    def values(self, points: np.ndarray) -> np.ndarray:
        points = 10 * np.asarray(points) - 5
        return np.array(
            [self._record(v, False) for v in excesses(self.problem, points)]
        )

    def value_and_grad(self, u: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = super().value_and_grad(10 * np.asarray(u) - 5)
        return value, 10 * gradient

    def grad(self, u: np.ndarray) -> np.ndarray:
        return self.value_and_grad(u)[1]


def run_cma(counted: Counted, dim: int, budget: int, seed: int) -> None:
    """BIPOP-CMA-ES with up to 9 restarts, from uniform starts."""
    import cma

    rng = np.random.default_rng(seed)
    options = {
        "ftarget": counted.minimum + TARGETS[-1],
        "maxfevals": budget,
        "seed": seed + 1,
        "verbose": -9,
    }

    def start() -> np.ndarray:
        return rng.uniform(-4, 4, dim)

    cma.fmin2(counted, start, 2.0, options, restarts=9, bipop=True)


Run = tuple[np.ndarray, np.ndarray, np.ndarray]


def run_peer(name: str) -> Callable[[bbob.Problem, int, int], Run]:
    """Values above the minimum; of each, how many evaluations and gradients it took."""

    def run(problem: bbob.Problem, budget: int, seed: int) -> Run:
        dim = len(problem.minimizer)
        counted = Limited(problem, budget)
        try:
            if name == "cma":
                run_cma(counted, dim, budget, seed)
            elif name in peers.GRADIENT_PEERS:
                # The default would end descents before the last target.
                peers.PEERS[name](counted, dim, seed, tolerance=1e-16)  # type: ignore
            else:
                peers.PEERS[name](counted, dim, seed)  # type: ignore[arg-type]
        except ReachedError:
            pass
        gradients = np.array(counted.with_gradient, int)
        return np.array(counted.history), np.ones_like(gradients), gradients

    return run


def run_pranam(problem: bbob.Problem, budget: int, seed: int) -> Run:
    result = pranam_optax.minimize(
        problem.fun,
        None,
        bounds=(problem.low, problem.high),
        max_evaluations=budget,
        target=float(problem.minimum) + TARGETS[-1],
        key=seed,
    )
    values = np.asarray(result.history)[:, 0] - float(problem.minimum)
    made = np.diff(np.asarray(result.evaluations), axis=0, prepend=0)
    return values, made[:, 0], made[:, 1]


METHODS = {
    "pranam": run_pranam,
    "cma": run_peer("cma"),
    "multi-start L-BFGS": run_peer("multi-start L-BFGS"),
    "basin hopping": run_peer("basin hopping"),
    "dual annealing": run_peer("dual annealing"),
    "Sep-CMA-ES": run_peer("Sep-CMA-ES"),
}
GRADIENT_FREE = ("cma", "Sep-CMA-ES")
# Shares at 1e3 and 1e4 evaluations per dimension, from the archive of COCO.
ARCHIVE = {
    20: {
        "best of 2009": (0.68, 0.83),
        "HCMA 2013": (0.69, 0.80),
        "CMA-ES 2019": (0.57, 0.72),
        "BIPOP-CMA 2009": (0.49, 0.69),
        "NEWUOA": (0.40, 0.55),
        "multi-start L-BFGS-B 2019": (0.46, 0.52),
    },
    40: {
        "best of 2009": (0.57, 0.76),
        "SLSQP + lq-CMA 2020": (0.50, 0.68),
        "BIPOP-CMA 2009": (0.31, 0.64),
        "NEWUOA": (0.38, 0.53),
        "multi-start L-BFGS-B 2019": (0.43, 0.50),
    },
}
GROUPS = {"f1-f5": 5, "f6-f9": 9, "f10-f14": 14, "f15-f19": 19, "f20-f24": 24}
HEADER = ["method", "dim", "function", "instance", "value", "seconds", "cost"]


def measure(args: argparse.Namespace) -> list[dict[str, str]]:
    """A row per run and cost of a gradient, with the runtimes to all targets."""
    rows = []
    for method in args.methods:
        for function in args.functions:
            for instance in range(1, args.instances + 1):
                problem = bbob.make(function, args.dim, instance)
                begin = time.perf_counter()
                budget = args.budget * args.dim
                values, made, gradients = METHODS[method](problem, budget, instance)
                seconds = time.perf_counter() - begin
                for cost in (2, args.dim + 1):
                    times = runtimes(values, made + (cost - 1) * gradients)
                    row = [method, args.dim, function, instance, f"{values.min():.3e}"]
                    row += [f"{seconds:.2f}", cost, *(f"{t:.0f}" for t in times)]
                    rows.append(dict(zip(columns(), map(str, row), strict=True)))
            print(f"{method} f{function}: {rows[-1]['value']}", flush=True)
    return rows


def columns() -> list[str]:
    return HEADER + [f"to_{target:.1e}" for target in TARGETS]


def write(path: pathlib.Path, rows: list[dict[str, str]]) -> None:
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, columns())
        writer.writeheader()
        writer.writerows(rows)


def read(path: pathlib.Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


def times_of(rows: list[dict[str, str]]) -> np.ndarray:
    return np.array([[float(row[c]) for c in columns()[len(HEADER) :]] for row in rows])


def of_method(
    rows: list[dict[str, str]], method: str, cost: int
) -> list[dict[str, str]]:
    return [r for r in rows if r["method"] == method and int(r["cost"]) == cost]


def tables(rows: list[dict[str, str]]) -> str:
    """Shares of the targets by groups of functions, and aRT per function."""
    lines = []
    for dim in sorted({int(row["dim"]) for row in rows}):
        of_dim = [row for row in rows if int(row["dim"]) == dim]
        lines += [
            f"\nShare of the targets in {dim}-D within 1e2, 1e3 and 1e4 evaluations "
            "per dimension\n",
            "| method | a gradient counts | all | " + " | ".join(GROUPS) + " |",
            "| --- " * (3 + len(GROUPS)) + "|",
        ]
        for method in dict.fromkeys(row["method"] for row in of_dim):
            for cost in (2, dim + 1):
                own = of_method(of_dim, method, cost)
                if method in GRADIENT_FREE and cost > 2:
                    continue
                cells, first = [_shares(times_of(own), dim)], 1
                for last in GROUPS.values():
                    part = [r for r in own if first <= int(r["function"]) <= last]
                    cells.append(_shares(times_of(part), dim) if part else "-")
                    first = last + 1
                lines.append(f"| {method} | {cost} | " + " | ".join(cells) + " |")
        for name, (early, late) in ARCHIVE.get(dim, {}).items():
            empty = " | -" * len(GROUPS)
            lines.append(f"| {name} (archive) | | - / {early} / {late}{empty} |")
        lines += [
            f"\nEach function in {dim}-D, a gradient counting 2: share of the targets "
            "within 1e4 evaluations per dimension, runs that reach 1e-8, aRT to 1e-1 "
            "over the dimension, and the median of the last values\n",
            "| method | function | share | solved | aRT | value |",
            "| --- " * 6 + "|",
        ]
        for row in dict.fromkeys((r["method"], r["function"]) for r in of_dim):
            own = of_method(of_dim, row[0], 2)
            own = [r for r in own if r["function"] == row[1]]
            times = times_of(own)
            within = times <= 1e4 * dim
            hit = within[:, TENTH]
            spent = np.where(hit, times[:, TENTH], 1e4 * dim).sum()
            art = f"{spent / hit.sum() / dim:.0f}" if hit.any() else "inf"
            value = np.median([float(r["value"]) for r in own])
            lines.append(
                f"| {row[0]} | f{row[1]} | {within.mean():.2f} "
                f"| {within[:, -1].sum()} of {len(own)} | {art} | {value:.1e} |"
            )
    return "\n".join(lines)


def _shares(times: np.ndarray, dim: int) -> str:
    return " / ".join(f"{share(times, b * dim):.2f}" for b in (1e2, 1e3, 1e4))


def plot(rows: list[dict[str, str]], path: str) -> None:
    """The empirical distribution of runtimes, the archive's shares as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dims = sorted({int(row["dim"]) for row in rows})
    figure, axes = plt.subplots(
        1, len(dims), figsize=(6 * len(dims), 4), layout="constrained", squeeze=False
    )
    for dim, ax in zip(dims, axes[0], strict=True):
        budgets = np.logspace(0, 4, 200)
        of_dim = [row for row in rows if int(row["dim"]) == dim]
        for method in dict.fromkeys(row["method"] for row in of_dim):
            for cost, style in ((2, "-"), (dim + 1, ":")):
                own = of_method(of_dim, method, cost)
                times = times_of(own)
                label = f"{method}, gradient = {cost}"
                shares = [share(times, b * dim) for b in budgets]
                if method not in GRADIENT_FREE or cost == 2:
                    ax.plot(budgets, shares, style, label=label)
        for name, read_off in ARCHIVE.get(dim, {}).items():
            ax.plot([1e3, 1e4], read_off, "x--", linewidth=0.7, label=name)
        ax.set(xscale="log", ylim=(0, 1), title=f"{dim}-D, 24 functions, 51 targets")
        ax.set(xlabel="evaluations / dimension", ylabel="share of targets reached")
        ax.legend(fontsize=6)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=20)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["pranam"])
    parser.add_argument("--functions", type=int, nargs="+", default=range(1, 25))
    parser.add_argument("--instances", type=int, default=15, help="the first so many")
    parser.add_argument("--budget", type=int, default=10**4, help="over the dimension")
    parser.add_argument(
        "--output", type=pathlib.Path, help="a .csv.gz for the runtimes"
    )
    parser.add_argument(
        "--results", type=pathlib.Path, nargs="+", help="tables of these"
    )
    parser.add_argument("--plot", help="the file of a figure")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        # Without evosax, which only the study needs.
        args.methods = [name for name in METHODS if name != "Sep-CMA-ES"]
        args.dim, args.functions, args.instances, args.budget = 2, [1], 1, 50

    jax.config.update("jax_enable_x64", True)
    if args.results:
        rows = [row for path in args.results for row in read(path)]
    else:
        rows = measure(args)
    if args.output:
        write(args.output, rows)
    if args.plot:
        plot(rows, args.plot)
    print(tables(rows))


if __name__ == "__main__":
    main()
