"""How often all of 4, 8 and 16 overlapping peaks are found, at equal evaluations.

Gaussians with noise, of which only the range of their centers is known. A run succeeds
if its sum of squares is within 0.1 % of that of a fit from the true parameters; it ends
there, but for those of lmfit.

    python examples/benchmarks/many_peaks.py --peer-runs 3
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import _paths  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
from tables import success_cells

import pranam_optax
from pranam_optax.fitting import levenberg_marquardt

NOISE, POINTS, LENGTH = 0.02, 400, 100.0
BOUNDS = {"center": (0.0, LENGTH), "height": (0.0, 5.0), "width": (0.5, 10.0)}

Params = dict[str, jax.Array]
Method = Callable[[int, np.ndarray, int, int, float], float]


def peaks(p: Params, x: jax.Array) -> jax.Array:
    """A sum of Gaussians."""
    distance = (x[:, None] - p["center"]) / p["width"]
    return jnp.sum(p["height"] * jnp.exp(-(distance**2)), axis=1)


X = np.linspace(0.0, LENGTH, POINTS)


def make(num: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """True parameters, with centers at least two apart, and data."""
    rng = np.random.default_rng([num, seed])
    while True:
        center = np.sort(rng.uniform(3, LENGTH - 3, num))
        if num == 1 or np.diff(center).min() > 2:
            break
    truth = {
        "center": center,
        "height": rng.uniform(0.5, 2, num),
        "width": rng.uniform(1.5, 4, num),
    }
    y = np.asarray(peaks({k: jnp.asarray(v) for k, v in truth.items()}, jnp.asarray(X)))
    return truth, y + NOISE * rng.normal(size=POINTS)


def by_fit(num: int, y: np.ndarray, budget: int, seed: int, goal: float) -> float:
    """`fit`, nothing chosen."""
    result = pranam_optax.fit(
        peaks,
        X,
        y,
        bounds=BOUNDS,
        shapes=dict.fromkeys(BOUNDS, num),
        exchangeable=("center", "height", "width"),
        max_evaluations=budget,
        target=goal,
        key=seed,
    )
    return float(result.value)


def by_multi_start(
    num: int, y: np.ndarray, budget: int, seed: int, goal: float
) -> float:
    """Levenberg-Marquardt from random starts, in the coordinates of `fit`."""
    lowest, spent, batch = np.inf, 0, 0
    while spent < budget and lowest > goal:
        result = pranam_optax.fit(
            peaks,
            X,
            y,
            bounds=BOUNDS,
            shapes=dict.fromkeys(BOUNDS, num),
            coupling=0.0,
            num_replicas=64,
            num_steps=1,
            key=jax.random.fold_in(jax.random.key(seed), batch),
            polish=levenberg_marquardt(200),
        )
        lowest, batch = min(lowest, float(result.value)), batch + 1
        # Each start is refined twice here, from where it is and from a step further.
        spent += int(result.num_evaluations)
    return lowest


def by_lmfit(method: str) -> Method:
    """`lmfit` with a global method, then its `leastsq`."""

    def run(num: int, y: np.ndarray, budget: int, seed: int, goal: float) -> float:
        import lmfit

        rng, params = np.random.default_rng(seed), lmfit.Parameters()
        for name, (low, high) in BOUNDS.items():
            for i in range(num):
                start = rng.uniform(low, high)
                params.add(f"{name}{i}", value=start, min=low, max=high)

        def residuals(params: Any) -> np.ndarray:
            c, h, w = (
                np.array([params[f"{name}{i}"].value for i in range(num)])
                for name in ("center", "height", "width")
            )
            return np.sum(h * np.exp(-(((X[:, None] - c) / w) ** 2)), axis=1) - y

        fit = lmfit.Minimizer(residuals, params, max_nfev=budget)
        options = {"seed": seed} if method == "basinhopping" else {"rng": seed}
        try:
            found = fit.minimize(method=method, **options)
        except TypeError:
            found = fit.minimize(method=method)
        end = fit.minimize(method="leastsq", params=found.params, max_nfev=10_000)
        return float(np.sum(np.square(residuals(end.params))))

    return run


METHODS: dict[str, Method] = {
    "fit": by_fit,
    "multi-start Levenberg-Marquardt": by_multi_start,
    "lmfit, basin hopping": by_lmfit("basinhopping"),
    "lmfit, differential evolution": by_lmfit("differential_evolution"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peaks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--peer-runs", type=int, default=3, help="of lmfit")
    parser.add_argument("--first-seed", type=int, default=0, help="100 for tuning")
    parser.add_argument("--evaluations", type=int, default=300_000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.peaks, args.runs, args.peer_runs, args.evaluations = [2], 1, 0, 3000
    jax.config.update("jax_enable_x64", True)

    print("| peaks | method | all found | 95 % | median excess | seconds a run |")
    print("| --- | --- | --- | --- | --- | --- |")
    for num in args.peaks:
        for name in args.methods:
            runs = args.peer_runs if name.startswith("lmfit") else args.runs
            if not runs:
                continue
            excess, began = [], time.perf_counter()
            for seed in range(args.first_seed, args.first_seed + runs):
                truth, y = make(num, seed)
                best = pranam_optax.fit(
                    peaks, X, y, truth, bounds=BOUNDS, num_replicas=1, num_steps=1
                )
                goal = float(best.value) * 1.001
                value = METHODS[name](num, y, args.evaluations, seed, goal)
                excess.append(value / float(best.value) - 1)
            found = int(np.sum(np.array(excess) <= 1e-3))
            print(
                f"| {num} | {name} | {success_cells(found, runs)} "
                f"| {np.median(excess):.2g} "
                f"| {(time.perf_counter() - began) / runs:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
