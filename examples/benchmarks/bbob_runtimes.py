"""How many evaluations a method needs on COCO's functions, and CMA-ES as a check.

    python examples/benchmarks/bbob_runtimes.py
    python examples/benchmarks/bbob_runtimes.py --quick

As COCO counts: a runtime is the number of evaluations until the value is within a
target of the minimum, for 51 targets from 1e2 to 1e-8. A value with its gradient may be
counted as 2 evaluations, what automatic differentiation costs, or as dim + 1, what
finite differences cost.
"""

import argparse

import bbob
import jax
import numpy as np

TARGETS = np.logspace(2, -8, 51)

excess = jax.jit(bbob.Problem.excess)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=10)
    parser.add_argument("--functions", type=int, nargs="+", default=[1, 2, 8, 15])
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--budget", type=int, default=10**4, help="over the dimension")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.dim, args.functions, args.instances, args.budget = 2, [1], [1], 10

    jax.config.update("jax_enable_x64", True)
    budgets = [b for b in (10**2, 10**3, 10**4, 10**5) if b <= args.budget]
    print("Share of the targets that BIPOP-CMA-ES reaches\n")
    print("| function |", *(f"{b} D |" for b in budgets))
    print("| --- |", *("--- |" for _ in budgets))
    for function in args.functions:
        times = []
        for instance in args.instances:
            counted = Counted(bbob.make(function, args.dim, instance))
            run_cma(counted, args.dim, args.budget * args.dim, instance)
            times.append(counted.runtimes())
        shares = [share(np.array(times), b * args.dim) for b in budgets]
        print(f"| f{function} |", *(f"{s:.2f} |" for s in shares), flush=True)


if __name__ == "__main__":
    main()
