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


def network(hidden: int = 17) -> None:
    """The refinement of a network of some hundred weights, by method."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (200, 2))
    y = np.sin(3 * x[:, 0]) * np.exp(-(x[:, 1] ** 2)) + 0.5 * x[:, 1]
    shapes = {"w1": (2, hidden), "b1": (hidden,), "w2": (hidden, hidden)}
    shapes |= {"b2": (hidden,), "w3": (hidden, 1), "b3": (1,)}

    def predict(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        first = jnp.tanh(x @ p["w1"] + p["b1"])
        return (jnp.tanh(first @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"])[:, 0]

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(shapes))
        return {
            name: jax.random.normal(k, s) / (s[0] if len(s) > 1 else 1) ** 0.5
            for k, (name, s) in zip(keys, shapes.items(), strict=True)
        }

    size = sum(int(np.prod(s)) for s in shapes.values())
    print(f"| {size} weights, 32 replicas, 300 steps | compiled | sum of squares |")
    print("| --- | --- | --- |")
    for name, polish in {
        "the default": fitting.second_order(),
        "Levenberg-Marquardt for all": fitting.levenberg_marquardt(),
        "L-BFGS": fitting.lbfgs(),
    }.items():
        for _ in range(2):
            began = time.perf_counter()
            result = pranam_optax.fit(
                predict, x, y, draw, num_replicas=32, num_steps=300, polish=polish
            )
            value = float(result.value)
            seconds = time.perf_counter() - began
        print(f"| {name} | {seconds:.1f} s | {value:.3g} |", flush=True)


def batch(num_spectra: int = 20) -> None:
    """Spectra of two peaks, one after the other and all at once."""

    def peaks(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        distance = (x[:, None] - p["center"]) / p["width"]
        return jnp.sum(p["height"] * jnp.exp(-(distance**2)), axis=1) + p["base"]

    rng = np.random.default_rng(0)
    x = np.linspace(0, 10, 100)
    spectra = []
    for _ in range(num_spectra):
        truth = {
            "center": rng.uniform([1, 5.5], [4.5, 9]),
            "height": rng.uniform(1, 3, 2),
            "width": rng.uniform(0.5, 1.5, 2),
            "base": rng.uniform(0, 1),
        }
        curve = peaks({k: jnp.asarray(v) for k, v in truth.items()}, jnp.asarray(x))
        spectra.append(np.asarray(curve) + 0.05 * rng.normal(size=100))
    bounds = {"center": (0, 10), "height": (0, 10), "width": (0.1, 5), "base": (-1, 2)}
    print(f"| {num_spectra} spectra | one by one | at once | ratio | equal values |")
    print("| --- | --- | --- | --- | --- |")
    for num_replicas, num_steps in [(64, 1000), (16, 200), (8, 100)]:

        def fit(y: Any, size: tuple[int, int] = (num_replicas, num_steps)) -> Any:
            return pranam_optax.fit(
                peaks,
                x,
                y,
                bounds=bounds,
                shapes={"center": 2, "height": 2, "width": 2},
                num_replicas=size[0],
                num_steps=size[1],
            ).value

        one_by_one = least(lambda: [fit(y) for y in spectra], 2)
        mapped = jax.vmap(fit)
        at_once = least(lambda: mapped(np.stack(spectra)), 2)  # noqa: B023
        apart = np.array([float(fit(y)) for y in spectra])
        equal = np.isclose(apart, np.asarray(mapped(np.stack(spectra))), rtol=1e-6)
        print(
            f"| {num_replicas} replicas, {num_steps} steps | {one_by_one:.2f} s "
            f"| {at_once:.2f} s | {one_by_one / at_once:.1f} "
            f"| {equal.sum()} of {num_spectra} |",
            flush=True,
        )


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
    parser.add_argument(
        "--network", action="store_true", help="the refinement of a network instead"
    )
    parser.add_argument(
        "--batch", action="store_true", help="many data sets at once instead"
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.network or args.batch:
        jax.config.update("jax_enable_x64", True)
        return network() if args.network else batch()
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
        "the default": fitting.second_order(),
        "Levenberg-Marquardt for all": fitting.levenberg_marquardt(),
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
        if name == "the default":
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
