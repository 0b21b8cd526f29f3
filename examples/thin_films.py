"""Mirrors and anti-reflection coatings of thin films, by `minimize` and other methods.

    python examples/thin_films.py --quick
    python examples/thin_films.py --output thin_films.csv --plot thin_films.png
    python examples/thin_films.py --results thin_films.csv

Two problems of M. R. Bennet et al., `Illustrated tutorial on global optimization in
nanophotonics <https://doi.org/10.1364/JOSAB.506389>`_, 2024, at normal incidence:

- *Bragg*: N layers of index 1.8 and 1.4 in turn on a substrate of 1.8; their
  thicknesses, from 0 to 214 nm, are to reflect the most at 600 nm.
- *Photovoltaics*: N layers of permittivity 2 and 3 in turn on amorphous silicon, from
  30 to 250 nm, are to let in the most of the sun's photons from 375 to 750 nm.

All methods have the same bounds and evaluations, a value with its gradient counting
once. Spectrum and silicon are those of PyMoosh.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peers
from tables import success_cells, write_rows

import pranam_optax

WAVELENGTH, LOW_INDEX, HIGH_INDEX = 600.0, 1.4, 1.8


class Stack(NamedTuple):
    """A problem: layers, and what light makes of them.

    Attributes:
      name: with the number of layers.
      indices: of the layers, from above.
      bounds: of each thickness in nm.
      cost: of the thicknesses `[N]`.
      num_evaluations: that each method may make.
      best_known: the cost of the quarter-wave stack, or None.
    """

    name: str
    indices: np.ndarray
    bounds: tuple[float, float]
    cost: Callable[[jax.Array], jax.Array]
    num_evaluations: int
    best_known: float | None


def reflectance(
    thickness: jax.Array, index: Any, substrate: Any, wavelength: Any
) -> jax.Array:
    r"""Share of the light that layers reflect into air at normal incidence.

    The fields at the two sides of a layer of index n and phase
    :math:`\delta = 2 \pi n d / \lambda` obey

    .. math::
      E' = E \cos \delta - i H \sin \delta / n, \quad
      H' = H \cos \delta - i n E \sin \delta

    from :math:`E = 1, H = n_s` in the substrate upwards, and
    :math:`R = |E - H|^2 / |E + H|^2` on top.
    """
    index = jnp.asarray(index)
    phase = 2 * jnp.pi * index * thickness / wavelength

    def through(fields: Any, layer: Any) -> Any:
        (e, h), (n, cos, sin) = fields, layer
        return (e * cos - 1j * h * sin / n, h * cos - 1j * n * e * sin), None

    h = jnp.asarray(substrate, complex)
    layers = index, jnp.cos(phase), jnp.sin(phase)
    (e, h), _ = jax.lax.scan(through, (jnp.ones_like(h), h), layers, reverse=True)
    back, there = e - h, e + h
    return (back.real**2 + back.imag**2) / (there.real**2 + there.imag**2)


def bragg(num_layers: int, num_evaluations: int) -> Stack:
    index = np.resize([HIGH_INDEX, LOW_INDEX], num_layers)

    def cost(thickness: jax.Array) -> jax.Array:
        return 1 - reflectance(thickness, index, HIGH_INDEX, WAVELENGTH)

    quarter_wave = float(cost(jnp.asarray(WAVELENGTH / 4 / index)))
    bounds = 0.0, WAVELENGTH / 2 / LOW_INDEX
    name = f"Bragg, {num_layers} layers"
    return Stack(name, index, bounds, cost, num_evaluations, quarter_wave)


def sunlight() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wavelengths in nm, the share of photons at each, and the index of silicon."""
    peers.package("PyMoosh")
    from PyMoosh import Structure
    from PyMoosh.photo import solar

    wavelengths = np.linspace(375, 750, 300)
    photons = solar(wavelengths)
    photons[[0, -1]] /= 2  # the trapezoidal rule
    silicon = Structure([1.0, "SiA"], [0, 1], [0, 0], verbose=False)
    permittivity = [silicon.polarizability(w)[0][1] for w in wavelengths]
    return wavelengths, photons / photons.sum(), np.sqrt(permittivity)


def photovoltaics(num_layers: int, num_evaluations: int) -> Stack:
    index = np.resize(np.sqrt([2.0, 3.0]), num_layers)
    wavelengths, photons, silicon = sunlight()

    def cost(thickness: jax.Array) -> jax.Array:
        return jnp.asarray(photons) @ spectrum(thickness, index, silicon, wavelengths)

    name = f"photovoltaics, {num_layers} layers"
    return Stack(name, index, (30.0, 250.0), cost, num_evaluations, None)


spectrum = jax.vmap(reflectance, (None, None, 0, 0))

# Numbers of layers and evaluations.
PROBLEMS: dict[str, list[tuple[Callable[[int, int], Stack], tuple[int, int]]]] = {
    "Bragg": [
        (bragg, (10, 10_000)),
        (bragg, (20, 10_000)),
        (bragg, (40, 40_000)),
        (bragg, (60, 100_000)),
    ],
    "photovoltaics": [(photovoltaics, (num, 10_000)) for num in (10, 20, 32)],
}


def by_minimize(stack: Stack, seed: int) -> np.ndarray:
    """Nothing is chosen but the budget."""
    shape = jnp.shape(stack.indices)
    low, high = (jnp.full(shape, side) for side in stack.bounds)
    found = pranam_optax.minimize(
        stack.cost,
        None,
        bounds=(low, high),
        max_evaluations=stack.num_evaluations,
        key=seed,
    )
    return np.asarray(found.params)


def by_peer(peer: peers.Peer) -> Callable[[Stack, int], np.ndarray]:
    def run(stack: Stack, seed: int) -> np.ndarray:
        low, high = (np.full(len(stack.indices), side) for side in stack.bounds)
        found = peers.search(
            peer,
            stack.cost,
            low,
            high,
            num_evaluations=stack.num_evaluations,
            seed=seed,
        )
        return found.params

    return run


METHODS = {
    "`minimize`": by_minimize,
    # Costs are far below one: with SciPy's tolerances it would stop too early.
    "multi-start L-BFGS": by_peer(partial(peers.restarted_lbfgs, tolerance=1e-14)),
    "CMA-ES": by_peer(peers.cma_es),
    "differential evolution": by_peer(peers.differential_evolution),
}


def run(stacks: list[Stack], num_runs: dict[str, int]) -> list[dict[str, Any]]:
    """A row for each run, with its design."""
    rows: list[dict[str, Any]] = []
    for stack in stacks:
        value = jax.jit(stack.cost)
        for method, search in METHODS.items():
            print(f"{stack.name}, {method}", file=sys.stderr)
            for seed in range(num_runs[method]):
                began = time.perf_counter()
                design = search(stack, seed)
                seconds = time.perf_counter() - began
                rows.append(
                    {
                        "problem": stack.name,
                        "method": method,
                        "seed": seed,
                        "cost": float(value(jnp.asarray(design))),
                        "seconds": round(seconds, 2),
                        "design": " ".join(f"{d:.6g}" for d in design),
                    }
                )
    return rows


def load(path: Path) -> list[dict[str, Any]]:
    """Rows that `run` made."""
    with path.open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(row[name]) for name in ("cost", "seconds")}
    return rows


def of_stack(stack: Stack, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a problem, the lowest first."""
    own = [row for row in rows if row["problem"] == stack.name]
    return sorted(own, key=lambda row: row["cost"])


def goal(stack: Stack, rows: list[dict[str, Any]]) -> float:
    """The cost of the quarter-wave stack, or the lowest of all."""
    return stack.best_known or of_stack(stack, rows)[0]["cost"]


def table(stacks: list[Stack], rows: list[dict[str, Any]]) -> str:
    """How many runs come within 1e-4 of the goal."""
    lines = ["| problem | method | reached | 95 % | median | worst | seconds |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for stack in stacks:
        for method in METHODS:
            runs = [r for r in of_stack(stack, rows) if r["method"] == method]
            costs = np.array([row["cost"] for row in runs])
            seconds = np.median([row["seconds"] for row in runs])
            reached = int(np.sum(costs <= (1 + 1e-4) * goal(stack, rows)))
            lines.append(
                f"| {stack.name} | {method} | {success_cells(reached, len(runs))} "
                f"| {np.median(costs):.6g} | {costs.max():.6g} | {seconds:.1f} |"
            )
    return "\n".join(lines)


def plot(stacks: list[Stack], rows: list[dict[str, Any]], path: Path) -> None:
    """How far each run ends above the goal, and the light that the best let in."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, method in enumerate(METHODS):
        for j, stack in enumerate(stacks):
            runs = [r for r in of_stack(stack, rows) if r["method"] == method]
            costs = np.array([row["cost"] for row in runs])
            excess = np.maximum(costs / goal(stack, rows) - 1, 1e-8)
            x = j + (i - 1.5) / 6 + np.linspace(-0.05, 0.05, len(excess))
            label = method.strip("`") if j == 0 else None
            left.semilogy(x, excess, ".", color=f"C{i}", ms=4, label=label)
    left.set_xticks(range(len(stacks)), [stack.name for stack in stacks])
    left.tick_params(axis="x", rotation=30)
    left.set(ylabel="cost above the lowest, relative")
    left.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), ncols=2)

    wavelengths, _, silicon = sunlight()
    bare = 1 - np.abs((1 - silicon) / (1 + silicon)) ** 2
    right.plot(wavelengths, 100 * bare, "k--", label="no layer")
    for stack in stacks:
        if stack.best_known is None:
            best = of_stack(stack, rows)[0]
            design = jnp.array([float(d) for d in best["design"].split()])
            light = 1 - spectrum(design, stack.indices, silicon, wavelengths)
            right.plot(wavelengths, 100 * light, label=stack.name.split(", ")[1])
    right.set(xlabel="wavelength (nm)", ylabel="light that silicon absorbs (%)")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--peer-runs", type=int, default=10, help="of the others")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=[*PROBLEMS])
    parser.add_argument("--output", type=Path, help="rows of all runs (CSV)")
    parser.add_argument("--results", type=Path, help="such rows, instead of runs")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    stacks = [make(*given) for name in args.problems for make, given in PROBLEMS[name]]
    if args.quick:
        args.runs, args.peer_runs = 1, 1
        stacks = [bragg(4, 500), photovoltaics(2, 100)]
    if args.results:
        rows = load(args.results)
    else:
        num_runs = dict.fromkeys(METHODS, args.peer_runs) | {"`minimize`": args.runs}
        rows = run(stacks, num_runs)
    print(table(stacks, rows))
    if args.output:
        write_rows(args.output, rows)
    if args.plot:
        plot(stacks, rows, args.plot)


if __name__ == "__main__":
    main()
