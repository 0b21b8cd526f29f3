"""Overlapping peaks of spectra in a CSV file: components, bands, errors.

    python examples/peaks.py --quick
    python examples/peaks.py --plot peaks.png --output peaks.csv
    python examples/peaks.py --data mine.csv --num-peaks 3

The file has the positions in its first column and a spectrum in each of the others.
The first spectrum is fitted and reported in full, all of them are fitted in a row.
Its sample, `spectra.csv`, is simulated (`--simulate spectra.csv`): four peaks, one of
which moves under another, on a sloping baseline.
"""

import argparse
import csv
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tables import write_rows

import pranam_optax
from pranam_optax.fitting import FitResult

Params = dict[str, jax.Array]
SAMPLE = Path(__file__).parent / "spectra.csv"
NOISE = 0.02


def components(p: Params, x: jax.Array) -> jax.Array:
    """Pseudo-Voigt peaks `[N, num_peaks]`: a part of each is Lorentzian."""
    u = (x[:, None] - p["center"]) / p["width"]
    gaussian, lorentzian = jnp.exp(-jnp.log(2) * u**2), 1 / (1 + u**2)
    return p["height"] * (p["part"] * lorentzian + (1 - p["part"]) * gaussian)


def baseline(p: Params, x: jax.Array) -> jax.Array:
    return p["offset"] + p["slope"] * (x - x[0]) / (x[-1] - x[0])


def model(p: Params, x: jax.Array) -> jax.Array:
    return components(p, x).sum(axis=1) + baseline(p, x)


def simulate(path: Path, num_spectra: int = 20) -> None:
    rng, x = np.random.default_rng(3), np.linspace(400, 500, 201)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["position", *(f"spectrum_{i}" for i in range(num_spectra))])
        spectra = []
        for i in range(num_spectra):
            part = i / (num_spectra - 1)
            truth = {
                "center": jnp.array([425.0, 433.0 + 6 * part, 444.0, 472.0]),
                "height": jnp.array([1.0, 0.4 + 0.3 * part, 0.7, 0.5]),
                "width": jnp.array([4.0, 3.0, 4.0, 6.0]),
                "part": jnp.array([0.3, 0.3, 0.3, 0.3]),
                "offset": jnp.array(0.1),
                "slope": jnp.array(0.1),
            }
            y = np.asarray(model(truth, jnp.asarray(x)))
            spectra.append(y + NOISE * rng.normal(size=len(x)))
        writer.writerows(np.round(np.stack([x, *spectra], axis=1), 4).tolist())


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Positions `[N]` and spectra `[num, N]`."""
    columns = np.loadtxt(path, delimiter=",", skiprows=1, unpack=True)
    return columns[0], columns[1:]


def fit(x: np.ndarray, y: np.ndarray, num_peaks: int) -> FitResult:
    """All that has to be known is what a peak may be; peaks come in order."""
    span, top = float(np.ptp(x)), float(np.ptp(y))
    bounds = {
        "center": (float(x.min()), float(x.max())),
        "height": (0.0, 2 * top),
        "width": (span / len(x), span / 4),
        "part": (0.0, 1.0),
        "offset": (float(y.min()) - top, float(y.max())),
        "slope": (-top, top),
    }
    peak = ("center", "height", "width", "part")
    shapes = dict.fromkeys(bounds, ()) | dict.fromkeys(peak, num_peaks)
    return pranam_optax.fit(
        model, x, y, bounds=bounds, shapes=shapes, exchangeable=peak
    )


def errors_of(result: FitResult, name: str) -> np.ndarray:
    assert result.standard_errors is not None  # there is a curvature
    return np.asarray(result.standard_errors[name])


def table(results: list[FitResult]) -> list[dict[str, str]]:
    """A row for each spectrum: values with their standard errors."""
    rows = []
    for i, result in enumerate(results):
        row = {"spectrum": str(i)}
        for name in ("center", "height", "width"):
            errors = errors_of(result, name)
            for j, value in enumerate(np.asarray(result.params[name])):
                row[f"{name}[{j}]"] = f"{value:.6g}"
                row[f"{name}[{j}] error"] = f"{errors[j]:.2g}"
        rows.append(row)
    return rows


def plot(x: np.ndarray, y: np.ndarray, results: list[FitResult], path: Path) -> None:
    """The first spectrum with components, band and residuals; centers of all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 1])
    main, below = (figure.add_subplot(grid[i, 0]) for i in range(2))
    right = figure.add_subplot(grid[:, 1])
    result, at = results[0], jnp.asarray(x)
    fitted, base = model(result.params, at), baseline(result.params, at)
    low, high = result.prediction_band(x, 0.95)
    main.plot(x, y, "k.", ms=3, label="data")
    main.plot(x, fitted, "C3", label="fit")
    main.fill_between(x, low, high, color="C3", alpha=0.2, label="95 % of new data")
    for peak in components(result.params, at).T:
        main.fill_between(x, base, base + peak, alpha=0.3)
    main.legend(fontsize="small")
    below.plot(x, y - fitted, "k.", ms=3)
    below.axhline(0, color="C3")
    below.set(xlabel="position", ylabel="residual")
    centers = np.stack([r.params["center"] for r in results])
    errors = np.stack([errors_of(r, "center") for r in results])
    for j, (center, error) in enumerate(zip(centers.T, errors.T, strict=True)):
        right.errorbar(range(len(results)), center, error, fmt=".", label=f"peak {j}")
    right.set(xlabel="spectrum", ylabel="center with standard error")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--num-peaks", type=int, default=4)
    parser.add_argument("--output", type=Path, help="values and errors (CSV)")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--simulate", type=Path, help="write the sample there and end")
    parser.add_argument("--quick", action="store_true", help="two spectra")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if args.simulate:
        simulate(args.simulate)
        return

    x, spectra = load(args.data)
    spectra = spectra[: 2 if args.quick else None]
    results, seconds = [], []
    for y in spectra:
        began = time.perf_counter()
        results.append(fit(x, y, args.num_peaks))
        seconds.append(time.perf_counter() - began)
    print(results[0].report())
    rows = table(results)
    print()
    names = " | ".join(f"center {j}" for j in range(args.num_peaks))
    print(f"| spectrum | {names} |")
    print("| --- " * (args.num_peaks + 1) + "|")
    for row in rows:
        cells = [
            f"{row[f'center[{j}]']} ± {row[f'center[{j}] error']}"
            for j in range(args.num_peaks)
        ]
        print(f"| {row['spectrum']} | {' | '.join(cells)} |")
    print(f"\nfirst fit {seconds[0]:.1f} s, others {np.median(seconds[1:]):.2f} s each")
    if args.output:
        write_rows(args.output, rows)
    if args.plot:
        plot(x, spectra[0], results, args.plot)


if __name__ == "__main__":
    main()
