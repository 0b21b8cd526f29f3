"""STAT5 signalling: a stiff model of nine parameters over ten decades each.

    python examples/boehm.py --quick
    python examples/boehm.py --output boehm.json --plot boehm.png
    python examples/boehm.py --results boehm.json

The model of M. E. Boehm et al., `Identification of isoform-specific dynamics in
phosphorylation-dependent STAT5 dimerization <https://doi.org/10.1021/pr5006923>`_,
J. Proteome Res. 2014, as the PEtab benchmark collection has it: how a receptor
phosphorylates STAT5A and STAT5B, which pair up, enter the nucleus and return; 48
measurements, whose three standard deviations are unknown. The lowest negative
log-likelihood that is known is 138.222.
"""

import argparse
import csv
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peers
import scipy.optimize
from datasets import Source, find
from tables import success_cells, success_interval

import pranam_optax

LOWEST, NEAR = 138.222, 0.1
# Of the logarithm to base 10.
LOW, HIGH = -5.0, 5.0
OBSERVABLES = "pSTAT5A_rel", "pSTAT5B_rel", "rSTAT5A_rel"
RATES = (
    "Epo_degradation_BaF3",
    "k_exp_hetero",
    "k_exp_homo",
    "k_imp_hetero",
    "k_imp_homo",
    "k_phos",
)
# Known: the share of STAT5A, a constant of the mass spectrometry, and volumes.
RATIO, SPEC_C17, NUCLEUS, CYTOPLASM, TOTAL = 0.693, 0.107, 0.45, 1.4, 207.6

FOLDER = (
    "https://raw.githubusercontent.com/Benchmarking-Initiative/"
    "Benchmark-Models-PEtab/master/Benchmark-Models/Boehm_JProteomeRes2014/"
)
FILE = "measurementData_Boehm_JProteomeRes2014.tsv"
SHA256 = "fe5813913d14daa07e72a40fa403d56a0ed3367f14745819f4d5384953a0d1c2"


class Data(NamedTuple):
    """Times in minutes `[T]`, and the measurements in percent `[3, T]`."""

    times: np.ndarray
    values: np.ndarray


def load(data_dir: Path | None = None) -> Data:
    (content,) = find(
        "boehm", {FILE: Source((FOLDER + FILE,), SHA256)}, data_dir
    ).values()
    rows = list(csv.DictReader(io.StringIO(content.decode()), delimiter="\t"))
    values = [
        [float(r["measurement"]) for r in rows if r["observableId"] == name]
        for name in OBSERVABLES
    ]
    times = [float(r["time"]) for r in rows if r["observableId"] == OBSERVABLES[0]]
    return Data(np.array(times), np.array(values))


def slope(t: Any, state: jax.Array, rates: dict[str, jax.Array]) -> jax.Array:
    """The differential equations, of amounts per volume."""
    a, b, aa, ab, bb, nuclear_aa, nuclear_ab, nuclear_bb = state
    q = NUCLEUS / CYTOPLASM
    epo = 1.25e-7 * jnp.exp(-rates["Epo_degradation_BaF3"] * t)
    pair = epo * rates["k_phos"]
    into_aa, into_ab, into_bb = pair * a * a, pair * a * b, pair * b * b
    in_aa, in_bb = rates["k_imp_homo"] * aa, rates["k_imp_homo"] * bb
    in_ab = rates["k_imp_hetero"] * ab
    out_aa, out_bb = rates["k_exp_homo"] * nuclear_aa, rates["k_exp_homo"] * nuclear_bb
    out_ab = rates["k_exp_hetero"] * nuclear_ab
    return jnp.stack(
        [
            q * (2 * out_aa + out_ab) - 2 * into_aa - into_ab,
            q * (2 * out_bb + out_ab) - 2 * into_bb - into_ab,
            into_aa - in_aa,
            into_ab - in_ab,
            into_bb - in_bb,
            in_aa / q - out_aa,
            in_ab / q - out_ab,
            in_bb / q - out_bb,
        ]
    )


def simulate(log_params: jax.Array, times: np.ndarray) -> jax.Array:
    """The observables `[3, T]`; NaN where the integration fails.

    Kvaerno's solver of third order with tolerances of 1e-5 is off by 2e-4 in the
    likelihood; one of fifth order, or derivatives in reverse, take longer.
    """
    import diffrax

    rates = {name: 10 ** log_params[i] for i, name in enumerate(RATES)}
    start = jnp.array([TOTAL * RATIO, TOTAL * (1 - RATIO), 0, 0, 0, 0, 0, 0])
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(slope),
        diffrax.Kvaerno3(),
        *(times[0], times[-1], None, start, rates),
        saveat=diffrax.SaveAt(ts=jnp.asarray(times)),
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        adjoint=diffrax.ForwardMode(),
        max_steps=500,
        throw=False,
    )
    a, b, aa, ab, bb = solution.ys[:, :5].T
    c = SPEC_C17
    of_a, of_b = c * (a + 2 * aa), (1 - c) * (b + 2 * bb)
    observables = [
        (100 * ab + 200 * c * aa) / (ab + of_a),
        (100 * ab + 200 * (1 - c) * bb) / (ab + of_b),
        (100 * ab + 100 * of_a) / (2 * ab + of_a + of_b),
    ]
    done = solution.result == diffrax.RESULTS.successful
    return jnp.where(done, jnp.stack(observables), jnp.nan)


def make_likelihood(data: Data) -> Callable[[jax.Array], jax.Array]:
    def negative_log_likelihood(log_params: jax.Array) -> jax.Array:
        """Of normal errors, the logarithms of whose sizes are the last three."""
        sizes = 10 ** log_params[len(RATES) :, None]
        scaled = (simulate(log_params, data.times) - data.values) / sizes
        return jnp.sum(scaled**2 / 2 + jnp.log(sizes * (2 * jnp.pi) ** 0.5))

    return negative_log_likelihood


def make_information(data: Data) -> Callable[[jax.Array], jax.Array]:
    """Fisher's information `[9, 9]`, which takes the place of the Hessian."""

    def information(log_params: jax.Array) -> jax.Array:
        sizes = 10 ** log_params[len(RATES) :, None]
        jacobian = jax.jacfwd(lambda p: simulate(p, data.times))(log_params)
        rows = (jacobian / sizes[..., None]).reshape(-1, len(log_params))
        of_sizes = jnp.zeros(len(log_params)).at[len(RATES) :].set(len(data.times))
        return rows.T @ rows + jnp.diag(2 * np.log(10.0) ** 2 * of_sizes)

    return information


def by_minimize(fun: Any, num_evaluations: int, seed: int) -> dict[str, Any]:
    """Nothing is chosen but the budget."""
    num = len(RATES) + len(OBSERVABLES)
    began = time.perf_counter()
    found = pranam_optax.minimize(
        fun,
        None,
        bounds=(jnp.full(num, LOW), jnp.full(num, HIGH)),
        max_evaluations=num_evaluations,
        key=seed,
    )
    lowest, made = np.asarray(found.history)[:, 0], np.asarray(found.evaluations)[:, 0]
    there = lowest <= LOWEST + NEAR
    return {
        "value": float(found.value),
        "ends": np.sort(np.asarray(found.replica_values)).tolist(),
        "evaluations": int(made[there.argmax()]) if there.any() else None,
        "seconds": time.perf_counter() - began,
    }


Start = Callable[[Any, Any, np.ndarray], tuple[float, int]]


def by_lbfgs(derivatives: Any, _: Any, start: np.ndarray) -> tuple[float, int]:
    """SciPy's L-BFGS-B from one start: its end and how many evaluations it took."""

    def finite(p: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = derivatives(p)
        return float(np.nan_to_num(value, nan=1e10)), np.nan_to_num(grad)

    end = scipy.optimize.minimize(
        finite, start, jac=True, method="L-BFGS-B", bounds=[(LOW, HIGH)] * len(start)
    )
    return float(end.fun), int(end.nfev)


def by_fides(
    derivatives: Any, information: Any, start: np.ndarray
) -> tuple[float, int]:
    """The trust region of fides with Fisher's information, from one start."""
    import fides

    count = 0

    def derivatives_of(p: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        nonlocal count
        count += 1
        value, grad = derivatives(p)
        return float(value), np.asarray(grad), np.asarray(information(p))

    solver = fides.Optimizer(
        derivatives_of,
        ub=np.full(len(start), HIGH),
        lb=np.full(len(start), LOW),
        verbose=40,
        options={fides.Options.MAXITER: 500},
    )
    try:
        value, *_ = solver.minimize(start)
    except (ValueError, RuntimeError):  # not finite at the start
        return np.inf, count
    return float(value), count


STARTS: dict[str, Start] = {
    "multi-start L-BFGS-B": by_lbfgs,
    "multi-start fides": by_fides,
}


def run(data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Runs of `minimize`, and starts of the others."""
    fun = make_likelihood(data)
    derivatives = jax.jit(lambda p: (fun(p), jax.jacfwd(fun)(p)))
    information = jax.jit(make_information(data))
    runs = [by_minimize(fun, args.evaluations, seed) for seed in range(args.runs)]
    results: dict[str, Any] = {"evaluations": args.evaluations, "`minimize`": runs}
    rng = np.random.default_rng(0)
    starts = rng.uniform(LOW, HIGH, (args.starts, len(RATES) + len(OBSERVABLES)))
    derivatives(starts[0]), information(starts[0])
    for name, descend in STARTS.items():
        if name.endswith("fides"):
            peers.package("fides")
        began = time.perf_counter()
        ends, counts = zip(
            *(descend(derivatives, information, s) for s in starts), strict=True
        )
        seconds = time.perf_counter() - began
        results[name] = {"ends": ends, "evaluations": counts, "seconds": seconds}
    return results


def table(results: dict[str, Any]) -> str:
    """How often each is near the lowest, at equal evaluations."""
    budget, runs = results["evaluations"], results["`minimize`"]
    reached = [run["value"] <= LOWEST + NEAR for run in runs]
    ends = np.concatenate([run["ends"] for run in runs])
    lines = [
        f"| method | within {NEAR} in {budget} evaluations | 95 % | ends there "
        "| median evaluations | seconds a run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    made = [run["evaluations"] or np.inf for run in runs]
    seconds = np.median([run["seconds"] for run in runs])
    lines.append(
        f"| `minimize` | {success_cells(sum(reached), len(runs))} "
        f"| {np.mean(ends <= LOWEST + NEAR):.0%} | {np.median(made):.0f} "
        f"| {seconds:.0f} |"
    )
    for name in STARTS:
        peer = results[name]
        there = np.array(peer["ends"]) <= LOWEST + NEAR
        cost = np.mean(peer["evaluations"])
        interval = success_interval(int(there.sum()), len(there))
        share, low, high = (
            1 - (1 - p) ** (budget / cost) for p in (there.mean(), *interval)
        )
        with np.errstate(divide="ignore"):
            half = np.log(2) / -np.log1p(-there.mean()) * cost
        seconds = peer["seconds"] / sum(peer["evaluations"]) * budget
        lines.append(
            f"| {name} | {share:.0%} | {low:.0%} to {high:.0%} | {there.mean():.0%} "
            f"| {half:.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """The sorted ends of all descents: a waterfall."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    ends = {"`minimize`": np.concatenate([r["ends"] for r in results["`minimize`"]])}
    ends |= {name: np.array(results[name]["ends"]) for name in STARTS}
    for name, values in ends.items():
        above = np.sort(np.maximum(values - LOWEST, 1e-3))
        share = (1 + np.arange(len(above))) / len(above)
        ax.loglog(100 * share, above, ".-", ms=3, label=name.strip("`"))
    ax.axhline(NEAR, color="gray", ls=":")
    ax.set(xlabel="descents, the lowest first (%)", ylim=(None, 1e4))
    ax.set(ylabel=f"negative log-likelihood above {LOWEST}")
    ax.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--starts", type=int, default=200, help="of the others")
    parser.add_argument("--evaluations", type=int, default=30_000)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, help="results (JSON)")
    parser.add_argument("--results", type=Path, help="such results, instead of runs")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.starts, args.evaluations = 1, 1, 100
    jax.config.update("jax_enable_x64", True)
    if args.results:
        results = json.loads(args.results.read_text())
    else:
        results = run(load(args.data_dir), args)
    print(table(results))
    if args.output:
        args.output.write_text(json.dumps(results))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
