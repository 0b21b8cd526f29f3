"""How often errors, intervals and bands cover the truth, on simulated data.

Five models, one of them a differential equation; noise of unknown size. The share of
data sets whose 68 and 95 % intervals hold the true value, by standard errors (with
Student's t), by profile, and of bands for the curve.

    python examples/benchmarks/calibration.py
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import pranam_optax

LEVELS = (0.68, 0.95)


class Case(NamedTuple):
    """A model, its true parameters, their bounds, inputs and noise."""

    model: Callable[[dict[str, jax.Array], jax.Array], jax.Array]
    truth: dict[str, float]
    bounds: dict[str, tuple[float, float]]
    x: np.ndarray
    noise: float


def logistic(p: dict[str, jax.Array], t: jax.Array) -> jax.Array:
    """Growth, as an initial value problem: Runge-Kutta steps in a scan."""

    def slope(y: jax.Array) -> jax.Array:
        return p["rate"] * y * (1 - y / p["capacity"])

    def step(y: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        k1 = slope(y)
        k2 = slope(y + h / 2 * k1)
        k3 = slope(y + h / 2 * k2)
        k4 = slope(y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y, y

    return jax.lax.scan(step, p["start"], jnp.diff(t, prepend=0.0))[1]


CASES = {
    "line": Case(
        lambda p, x: p["slope"] * x + p["offset"],
        {"slope": 2.0, "offset": -1.0},
        {"slope": (-10, 10), "offset": (-10, 10)},
        np.linspace(0, 1, 12),
        0.3,
    ),
    "decay": Case(
        lambda p, t: p["size"] * jnp.exp(-p["rate"] * t) + p["base"],
        {"size": 3.0, "rate": 1.3, "base": 0.5},
        {"size": (0, 10), "rate": (0.1, 10), "base": (-2, 2)},
        np.linspace(0, 4, 30),
        0.15,
    ),
    "peak": Case(
        lambda p, x: (
            p["height"] * jnp.exp(-(((x - p["center"]) / p["width"]) ** 2)) + p["base"]
        ),
        {"height": 2.0, "center": 4.0, "width": 1.0, "base": 0.3},
        {"height": (0, 10), "center": (0, 10), "width": (0.2, 5), "base": (-2, 2)},
        np.linspace(0, 10, 40),
        0.2,
    ),
    "Michaelis-Menten": Case(
        lambda p, s: p["rate"] * s / (p["half"] + s),
        {"rate": 2.0, "half": 1.5},
        {"rate": (0, 20), "half": (0.01, 50)},
        np.geomspace(0.2, 12, 14),
        0.1,
    ),
    "growth (ODE)": Case(
        logistic,
        {"start": 0.2, "rate": 1.2, "capacity": 3.0},
        {"start": (0.01, 2), "rate": (0.1, 5), "capacity": (0.5, 10)},
        np.linspace(0.4, 8, 25),
        0.1,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-sets", type=int, default=2000)
    parser.add_argument("--only", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.data_sets, args.only = 2, ["line"]
    jax.config.update("jax_enable_x64", True)

    head = "standard errors 68 %", "95 %", "profile 68 %", "95 %", "band 68 %", "95 %"
    print("| model |", " | ".join(head), "|")
    print("| --- |", " | ".join(["---"] * 6), "|")
    for name in args.only:
        case = CASES[name]
        rng = np.random.default_rng(7)
        truth = {k: jnp.asarray(v) for k, v in case.truth.items()}
        curve = np.asarray(case.model(truth, jnp.asarray(case.x)))
        data = curve + case.noise * rng.normal(size=(args.data_sets, len(curve)))

        def fit(y: Any, case: Case = case) -> pranam_optax.fitting.FitResult:
            return pranam_optax.fit(
                case.model, case.x, y, bounds=case.bounds, num_replicas=8, num_steps=100
            )

        results = jax.vmap(fit)(data)
        hits = np.zeros(6)
        for i in range(args.data_sets):
            result = jax.tree.map(lambda x, i=i: x[i], results)
            for j, level in enumerate(LEVELS):
                t = scipy.stats.t(result.degrees_of_freedom).ppf((1 + level) / 2)
                for param, true in case.truth.items():
                    error = t * float(result.standard_errors[param])
                    hits[j] += abs(float(result.params[param]) - true) <= error
                    low, high = result.confidence_interval(param, level)
                    hits[2 + j] += low <= true <= high
                low, high = result.confidence_band(case.x, level)
                hits[4 + j] += len(truth) * np.mean((low <= curve) & (curve <= high))
        shares = hits / (args.data_sets * len(truth))
        print(f"| {name} |", " | ".join(f"{s:.1%}" for s in shares), "|", flush=True)


if __name__ == "__main__":
    main()
