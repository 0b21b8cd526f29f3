"""Potential energies of H2+ and H2O, fitted from random starts, and other methods.

    python examples/potential_energy.py --quick
    python examples/potential_energy.py --seeds 20 --plot potential_energy.png

- H2+ (1s sigma_g, 106 distances from 0.5 bohr): three Gaussians and a constant, 10
  parameters. Best with heights at their bounds, so once with bounds of 10 hartree and
  once of 1000.
- H2O (988 geometries): a Morse function of each bond, a harmonic bend and the product
  of the stretches, 7 parameters; and a 3-4-1 tanh network, 21 parameters.

A run succeeds if its RMSE is within 1 % of the lowest that any method found, in this
run of the script or, in the wide box, in any.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peers
from datasets import Source, find
from tqdm import tqdm

import pranam_optax
from pranam_optax.fitting import FitResult, second_order

FILES = {
    "h2plus_1ssg_0_0_1.dat": Source(
        (
            "https://raw.githubusercontent.com/javierelpianista/h2p-benchmarks/"
            "0e81fff997bf035677ad7e10999c2a3b3c466123/discurves/0_0_1.dat",
        ),
        "da512fc9f43aa4b77398b292d1c60d4373830c8e755fafda01dd0d4f127010d3",
    ),
    "H2O.dat": Source(
        (
            "https://raw.githubusercontent.com/CCQC/PES-Learn/"
            "1b5e008b3f24b227f3d6023a766727326ca74333/tests/datafiles/H2O.dat",
        ),
        "e2277ae217a9abb32cdb4f5d2909afc46b015106951147003d9931708fc943e7",
    ),
}
KCAL_PER_HARTREE = 627.509474
# In the wide box: where all methods miss it, none of them succeeds.
LOWEST_KNOWN = {"H2+, 3 Gaussians, wide box": 0.000297867}


class Fit(NamedTuple):
    """A model, its data, and the box of its parameters (a vector)."""

    model: Callable[[jax.Array, jax.Array], jax.Array]
    x: Any
    y: Any
    low: np.ndarray
    high: np.ndarray


def gaussians(p: jax.Array, r: jax.Array) -> jax.Array:
    """Three Gaussians and a constant: heights, centres, widths of three, constant."""
    height, center, width = p[0:3], p[3:6], p[6:9]
    return p[9] + jnp.sum(
        height * jnp.exp(-(((r[:, None] - center) / width) ** 2)), axis=1
    )


def morse_bend(p: jax.Array, x: jax.Array) -> jax.Array:
    """Energy of (r1, r2, cos angle): D, a, r_e, k, angle_e, k_rr and a constant."""
    depth, steepness, r_e, k, angle_e, k_rr, constant = p
    stretch = x[:, :2] - r_e
    angle = jnp.arccos(x[:, 2])
    return (
        constant
        + depth * jnp.sum((1 - jnp.exp(-steepness * stretch)) ** 2, axis=1)
        + 0.5 * k * (angle - angle_e) ** 2
        + k_rr * stretch[:, 0] * stretch[:, 1]
    )


def network(p: jax.Array, x: jax.Array) -> jax.Array:
    """A 3-4-1 tanh network on standardised inputs and energies."""
    hidden = jnp.tanh(x @ p[:12].reshape(3, 4) + p[12:16])
    return hidden @ p[16:20] + p[20]


def load(data_dir: Path | None = None) -> dict[str, Fit]:
    h2plus_file, h2o_file = (
        content.decode().splitlines()
        for content in find("chem", FILES, data_dir).values()
    )
    r, energy, _ = np.loadtxt(h2plus_file).T
    r0, r1, r2, total = np.loadtxt(h2o_file, delimiter=",", skiprows=1).T
    cosine = np.clip((r1**2 + r2**2 - r0**2) / (2 * r1 * r2), -1, 1)
    x = np.stack([r1, r2, cosine], axis=1)
    r, energy = r[r >= 0.5], energy[r >= 0.5]

    def h2plus(height: float) -> Fit:
        low = np.array([-height] * 3 + [-20.0] * 3 + [0.1] * 3 + [-2.0])
        high = np.array([height] * 3 + [20.0] * 3 + [100.0] * 3 + [2.0])
        # With the repulsion of the nuclei.
        return Fit(gaussians, r, energy + 1 / r, low, high)

    kcal = (total - total.min()) * KCAL_PER_HARTREE
    return {
        "H2+, 3 Gaussians": h2plus(10.0),
        "H2+, 3 Gaussians, wide box": h2plus(1000.0),
        "H2O, Morse and bend": Fit(
            morse_bend,
            x,
            kcal,
            np.array([1.0, 0.1, 0.5, 0.0, 0.5, -500.0, -100.0]),
            np.array([1000.0, 10.0, 2.0, 500.0, 3.0, 500.0, 100.0]),
        ),
        "H2O, 3-4-1 network": Fit(
            network,
            (x - x.mean(0)) / x.std(0),
            (kcal - kcal.mean()) / kcal.std(),
            np.full(21, -5.0),
            np.full(21, 5.0),
        ),
    }


def study(fit: Fit, args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """RMSE of each run of each method, at the evaluations that `fit` takes."""

    def residuals(p: Any) -> jax.Array:
        return fit.model(p, fit.x) - fit.y

    def rmse(rss: Any) -> np.ndarray:
        return np.sqrt(np.asarray(rss) / len(fit.y))

    @jax.jit
    def run(key: jax.Array) -> FitResult:
        return pranam_optax.fit(
            fit.model,
            fit.x,
            fit.y,
            bounds=(fit.low, fit.high),
            key=key,
            num_replicas=args.replicas,
            num_steps=args.steps,
            polish=second_order(args.polish_steps),
        )

    results = [run(jax.random.key(seed)) for seed in range(args.seeds)]
    budget = int(np.mean([r.num_evaluations for r in results]))
    starts = peers.multi_start(
        residuals,
        fit.low,
        fit.high,
        num_starts=args.starts,
        max_steps=args.polish_steps,
        seed=1,
    )
    errors: dict[str, Any] = {
        "fit": rmse([r.value for r in results]),
        "one start of LM": rmse(starts.values),
    }
    for peer in ("differential evolution", "dual annealing"):
        ends = [
            peers.search(
                peers.PEERS[peer],
                lambda p: jnp.sum(residuals(p) ** 2),
                fit.low,
                fit.high,
                num_evaluations=budget,
                seed=seed,
            ).params
            for seed in range(args.peer_seeds)
        ]
        if ends:
            polished = peers.refine(
                residuals, fit.low, fit.high, np.stack(ends), max_steps=1000
            )
            errors[peer] = rmse(polished.values)
    best = results[int(np.argmin(errors["fit"]))]
    return {
        "errors": errors,
        "budget": budget,
        "replicas": rmse([r.replica_values for r in results]),
        "starts": starts,
    }, best


def table(name: str, row: dict[str, Any]) -> list[str]:
    found = [np.nanmin(values) for values in row["errors"].values()]
    lowest = min(*found, LOWEST_KNOWN.get(name, np.inf))
    lines = []
    for method, values in row["errors"].items():
        hit = values < 1.01 * lowest
        spent = "| | "
        if method == "fit":
            share = 100 * np.mean(row["replicas"] < 1.01 * lowest)
            spent = f"| {row['budget']} | {share:.3g} % "
        if method == "one start of LM":
            pooled = 100 * row["starts"].success_at(hit, row["budget"])
            lines.append(f"| {name} | multi-start LM | | | {pooled:.3g} % | | |")
        lines.append(
            f"| {name} | {method} | {np.nanmin(values):.6g} "
            f"| {np.nanmedian(values):.6g} | {100 * np.mean(hit):.3g} % {spent}|"
        )
    return lines


HEADER = (
    "| fit | method | lowest RMSE | median | within 1 % of the lowest "
    "| evaluations | of the replicas |\n" + "| --- " * 7
) + "|"


def plot(path: Path, fits: dict[str, Fit], bests: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(fits), figsize=(4 * len(fits), 3.5), layout="constrained"
    )
    for ax, (name, fit) in zip(np.atleast_1d(axes), fits.items(), strict=True):
        predictions = np.asarray(bests[name].predict(fit.x))
        if fit.x.ndim == 1:
            ax.semilogx(fit.x, fit.y, ".", color="0.5", label="ab initio")
            ax.semilogx(fit.x, predictions, label="fit")
            ax.set(xlabel="distance (bohr)", ylabel="energy (hartree)")
            ax.legend()
        else:
            ax.plot(fit.y, predictions, ".", color="0.5", markersize=2)
            ax.axline((0, 0), slope=1)
            ax.set(xlabel="ab initio", ylabel="fit")
        ax.set_title(name)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with the two files")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--peer-seeds", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--polish-steps", type=int, default=1000)
    parser.add_argument("--starts", type=int, default=500, help="of LM, pooled")
    parser.add_argument("--only", help="part of a fit's name")
    parser.add_argument("--quick", action="store_true", help="two small runs")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.peer_seeds, args.starts = 2, 0, 8
        args.replicas, args.steps, args.polish_steps = 8, 50, 20

    jax.config.update("jax_enable_x64", True)
    part = args.only or ("Morse" if args.quick else "")
    fits = {name: fit for name, fit in load(args.data_dir).items() if part in name}
    bests = {}
    print(HEADER)
    with tqdm(fits.items(), unit="fit") as progress:
        for name, fit in progress:
            progress.set_description(name)
            row, bests[name] = study(fit, args)
            for line in table(name, row):
                progress.write(line)
    if args.plot:
        plot(args.plot, fits, bests)


if __name__ == "__main__":
    main()
