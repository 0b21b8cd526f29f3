"""Pranam against the same optimizer alone, on Schwefel and Ackley in 30 dimensions.

    python examples/quickstart.py                     # one table, under a minute
    python examples/quickstart.py --plot quickstart.png

Every method gets the same functions (flipped and shifted at random), the same initial
replicas, the same gradient evaluations, and its best learning rate of one grid, chosen
on other seeds than those of the table.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from tqdm import tqdm

import pranam_optax
from pranam_optax import problems

# Learning rates as parts of the box's half-width.
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


# Seeds and learning rates to losses, curves and paths; compiled or to be compiled.
Run = Callable[[jax.Array, jax.Array], Any]


class Setting(NamedTuple):
    """What all methods share.

    There are as many report seeds as pairs of tuning seeds and learning rates, so that
    one compiled program serves both.
    """

    dim: int = 30
    num_replicas: int = 64
    num_steps: int = 1000
    spread: float = 0.4
    learning_rates: tuple[float, ...] = LEARNING_RATES
    tuning_seeds: range = range(2)
    report_seeds: range = range(100, 112)


class Result(NamedTuple):
    """One method on one problem: an entry per report seed."""

    learning_rate: float
    mean: np.ndarray
    best: np.ndarray
    curves: np.ndarray
    seconds: float


def make_problems(dim: int) -> dict[str, problems.Problem]:
    return {
        "Schwefel": problems.bound(problems.schwefel(dim)),
        "Ackley": problems.ackley(dim),
    }


def make_methods(
    num_steps: int, width: int = 4
) -> dict[str, optax.GradientTransformation]:
    """What stands before Adam."""
    embedding = pranam_optax.mlp_embedding((width,))
    release = optax.linear_schedule(1.0, 0.0, num_steps)
    return {
        "Adam": optax.identity(),
        "Adam, normalised gradients": pranam_optax.pranam(coupling=0.0),
        "pranam + Adam": pranam_optax.pranam(embedding, coupling=release),
    }


def make_run(
    problem: problems.Problem, link: optax.GradientTransformation, setting: Setting
) -> jax.stages.Wrapped:
    """Runs side by side: (seeds, learning rates) to losses, curves and paths."""
    half_width = float(problem.high[0] - problem.low[0]) / 2

    @jax.jit
    @jax.vmap
    def run(seed: jax.Array, learning_rate: jax.Array) -> Any:
        instance_key, replica_key = jax.random.split(jax.random.key(seed))
        instance = problems.randomize(problem, instance_key, spread=setting.spread)
        params = pranam_optax.replicate(
            instance.init, replica_key, setting.num_replicas
        )
        schedule = optax.cosine_decay_schedule(
            half_width * learning_rate, setting.num_steps
        )
        tx = optax.chain(link, optax.adam(schedule))
        grad_fn = pranam_optax.replica_value_and_grad(instance.fun)

        def step(carry: Any, _: None) -> Any:
            params, state = carry
            values, grads = grad_fn(params)
            updates, state = tx.update(grads, state, params)
            # The first two coordinates are for the picture.
            path = params[:, :2]
            return (optax.apply_updates(params, updates), state), (values, path)

        (params, _), (values, paths) = jax.lax.scan(
            step, (params, tx.init(params)), None, setting.num_steps
        )
        return jax.vmap(instance.fun)(params), values, paths

    return run


def tuning_runs(setting: Setting) -> tuple[jax.Array, jax.Array]:
    """Seeds and learning rates, every pair once."""
    rates, seeds = jnp.meshgrid(
        jnp.array(setting.learning_rates),
        jnp.array(setting.tuning_seeds),
        indexing="ij",
    )
    return seeds.ravel(), rates.ravel()


def tune(run: Run, setting: Setting) -> float:
    """The learning rate with the lowest mean loss over the tuning seeds."""
    values, _, _ = run(*tuning_runs(setting))
    scores = values.reshape(len(setting.learning_rates), -1).mean(axis=1)
    return setting.learning_rates[int(jnp.nanargmin(scores))]


def report(
    problem: problems.Problem,
    run: Run,
    learning_rate: float,
    setting: Setting,
) -> Result:
    """The report seeds."""
    seeds = jnp.array(setting.report_seeds)
    start = time.perf_counter()
    values, curves, _ = jax.block_until_ready(
        run(seeds, jnp.full(seeds.shape, learning_rate, float))
    )
    return Result(
        learning_rate=learning_rate,
        mean=np.mean(values, axis=1) - problem.minimum,
        best=np.min(values, axis=1) - problem.minimum,
        curves=np.asarray(curves) - problem.minimum,
        seconds=(time.perf_counter() - start) / len(seeds),
    )


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds."""
    found = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def table(results: dict[str, dict[str, Result]]) -> str:
    lines = [
        "| problem | method | rate | mean over replicas (95 % interval) "
        "| best replica | solved | time per run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for problem, methods in results.items():
        for method, r in methods.items():
            low, high = interval(r.mean)
            solved = f"{np.sum(r.best < 1)} of {len(r.best)}"
            lines.append(
                f"| {problem} | {method} | {r.learning_rate:g} "
                f"| {r.mean.mean():.3g} ({low:.3g} to {high:.3g}) "
                f"| {r.best.mean():.3g} | {solved} | {r.seconds:.2f} s |"
            )
    return "\n".join(lines)


def plot(file: str, results: dict[str, dict[str, Result]], setting: Setting) -> None:
    """Loss curves, and the replicas' paths over the landscape in 2-D."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, 3, figsize=(13, 8), layout="constrained", width_ratios=(1.2, 1, 1)
    )
    styles: tuple[dict[str, Any], ...] = (
        {"color": "silver", "lw": 5},
        {"color": "tab:red"},
        {"color": "tab:blue"},
    )
    for row, (name, methods) in zip(axes, results.items(), strict=True):
        for (method, result), style in zip(methods.items(), styles, strict=True):
            mean = result.curves.mean(axis=(0, 2))
            best = result.curves.min(axis=2).mean(axis=0)
            row[0].semilogy(mean, label=method, **style)
            row[0].semilogy(best, ls=":", **style)
        row[0].set(
            title=f"{name} in {setting.dim}-D: mean and best (dotted) replica",
            xlabel="step",
            ylabel="loss above the minimum",
        )
        row[0].legend()

        problem = make_problems(2)[name]
        # One run with few replicas and two codes each, at a rate that suits both.
        small = setting._replace(dim=2, num_replicas=32, num_steps=500)
        key = jax.random.key(0)
        instance = problems.randomize(
            problem, jax.random.split(key)[0], spread=setting.spread
        )
        grid = np.linspace(instance.low[0], instance.high[0], 300)
        xy = jnp.stack(jnp.meshgrid(grid, grid), axis=-1)
        height = jax.vmap(jax.vmap(instance.fun))(xy)
        links = make_methods(small.num_steps, width=2)
        for ax, method in zip(row[1:], ("Adam", "pranam + Adam"), strict=True):
            run = make_run(problem, links[method], small)
            values, _, (paths,) = run(jnp.array([0]), jnp.array([0.1]))
            ax.contourf(grid, grid, height, levels=30, cmap="Greys_r")
            ax.plot(paths[..., 0], paths[..., 1], lw=0.8)
            ax.plot(*paths[-1].T, "o", color="tab:red", ms=5, label="last step")
            ax.plot(*instance.minimizer, "*", color="gold", ms=14, label="minimum")
            ax.set(
                title=f"{method}, 2-D: mean {values.mean():.2g}",
                xlim=(grid[0], grid[-1]),
                ylim=(grid[0], grid[-1]),
                aspect="equal",
            )
    figure.savefig(file, dpi=110)
    print(f"wrote {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", metavar="FILE", help="draw curves and 2-D paths")
    parser.add_argument(
        "--spread",
        type=float,
        default=Setting().spread,
        help="part of the box, about its centre, that the minimiser is drawn from",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few steps and seeds, to try the code"
    )
    args = parser.parse_args()

    setting = Setting(spread=args.spread)
    if args.quick:
        setting = setting._replace(
            num_steps=200,
            learning_rates=(0.03, 0.3),
            tuning_seeds=range(1),
            report_seeds=range(100, 102),
        )
    start = time.perf_counter()
    methods = make_methods(setting.num_steps)
    cells = list(itertools.product(make_problems(setting.dim).items(), methods.items()))
    runs = [make_run(problem, link, setting) for (_, problem), (_, link) in cells]
    # Compilation takes most of the time, and only one core for each.
    with ThreadPoolExecutor() as pool:
        seeds_and_rates = tuning_runs(setting)
        compiling = pool.map(lambda run: run.lower(*seeds_and_rates).compile(), runs)
        compiled = list(tqdm(compiling, "compile", len(runs)))
    results: dict[str, dict[str, Result]] = {}
    for ((name, problem), (method, _)), run in zip(
        tqdm(cells, "run"), compiled, strict=True
    ):
        by_method = results.setdefault(name, {})
        by_method[method] = report(problem, run, tune(run, setting), setting)

    print(
        f"{setting.dim}-D, {setting.num_replicas} replicas, {setting.num_steps} steps; "
        "loss above the minimum, means over "
        f"{len(setting.report_seeds)} seeds;\nrate: learning rate over half the box's "
        "width; solved: best replica within 1 of the minimum.\n"
    )
    print(table(results))
    for name, result in results.items():
        ratio = result["Adam"].mean.mean() / result["pranam + Adam"].mean.mean()
        print(f"\n{name}: the mean over replicas is {ratio:.3g} times lower.")
    print(f"\nTotal time: {time.perf_counter() - start:.0f} s")
    if args.plot:
        plot(args.plot, results, setting)


if __name__ == "__main__":
    main()
