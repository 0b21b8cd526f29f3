"""The time of a fit of 20 parameters, and SciPy's dual_annealing at equal evaluations.

    python examples/benchmarks/minimize.py
    python examples/benchmarks/minimize.py --quick

Every time is the least of a few repetitions.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import _paths  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
import peers

import pranam_optax
from pranam_optax import fitting

POINTS = 50


def model(p: Any, x: Any) -> jax.Array:
    """Six Gaussians on a line: centres, heights, widths of six, offset and slope."""
    center, height, width = p[:6], p[6:12], p[12:18]
    peaks = height * jnp.exp(-(((x[:, None] - center) / width) ** 2))
    return jnp.sum(peaks, axis=1) + p[18] + p[19] * x


def least(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--annealing", type=int, default=10**9, help="most evaluations of it"
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.steps, args.annealing = 1, 20, 500

    rng = np.random.default_rng(0)
    x = np.linspace(0, 10, POINTS, dtype=np.float32)
    truth = np.concatenate(
        [
            rng.uniform(0, 10, 6),
            rng.uniform(1, 3, 6),
            rng.uniform(0.3, 1, 6),
            [0.5, 0.1],
        ]
    ).astype(np.float32)
    y = np.asarray(model(truth, x)) + 0.02 * rng.normal(size=POINTS).astype(np.float32)
    low = np.array([0.0] * 12 + [0.1] * 6 + [-10.0] * 2, np.float32)
    high = np.array([10.0] * 12 + [5.0] * 6 + [10.0] * 2, np.float32)

    print("| 64 replicas, 20 parameters | with compilation | compiled | value |")
    print("| --- | --- | --- | --- |")
    polishes = {
        "Levenberg-Marquardt": fitting.levenberg_marquardt(),
        "none": None,
        "L-BFGS": fitting.lbfgs(),
    }
    for name, polish in list(polishes.items())[: 1 if args.quick else None]:

        def run(key: int = 0) -> fitting.FitResult:
            return pranam_optax.fit(
                model,
                x,
                y,
                bounds=(low, high),
                key=key,
                num_steps=args.steps,
                polish=polish,  # noqa: B023
            )

        first = least(run, 1)
        compiled = least(run, args.repeats)
        result = run()
        print(
            f"| {args.steps} steps, polish: {name} | {first:.2f} s "
            f"| {compiled:.3f} s | {float(result.value):.4g} |",
            flush=True,
        )
        if name == "Levenberg-Marquardt":
            budget, ours = int(result.num_evaluations), compiled
    begin = time.perf_counter()
    found = peers.search(
        peers.dual_annealing,
        lambda p: jnp.sum((model(p, x) - y) ** 2),
        low,
        high,
        num_evaluations=min(budget, args.annealing),
        seed=0,
    )
    annealing = time.perf_counter() - begin
    count = found.num_evaluations
    print(
        f"\ndual_annealing: {annealing:.1f} s for {count} evaluations, value "
        f"{found.value:.4g};"
        f" fit: {ours:.3f} s for {budget}. Ratio per evaluation: "
        f"{annealing / count * budget / ours:.1f}"
    )


if __name__ == "__main__":
    main()
