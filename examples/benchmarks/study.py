"""The study: pranam and other methods on many problems, at equal evaluations.

    python examples/benchmarks/study.py --full            # goes on where it stopped
    python examples/benchmarks/study.py --quick
    python examples/benchmarks/study.py --problems "* 30 rotated" --optimizers Adam
    python examples/benchmarks/study.py --gradient-cost 2 --output double.json \\
        --problems "* 30 rotated" --methods independent pranam multi* basin* dual*
    python examples/benchmarks/report.py study.json       # tables and figures

Every method gets the same problems (a random instance per seed), the same initial
replicas and batches, the same number of gradient evaluations, and the best learning
rate of one grid, chosen on other seeds than those that are reported. A cell is one
problem, base optimizer and method; finished ones are kept in the output file.
"""

import argparse
import fnmatch
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import _paths  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
import optax
from methods import MAIN_METHODS, METHODS, OPTIMIZERS, Method, Optimizer, rate_unit
from peers import PEERS, Peer, search
from stats import geometric_mean
from tasks import Task, make_tasks
from tqdm import tqdm

import pranam_optax

# The full study: problems, optimizers and methods. Cells of functions take seconds on
# one core, those of models 10 s to 5 minutes.
MAIN = ("* 30 rotated", "polynomial", "tanh *", "relu *", "MNIST 10-10")
FOUR = ("Adam", "SGD", "Adagrad", "RMSProp")
CONTROLLED = ("independent", "normalised", "pranam")
NETWORKS = ("s1 r0.3", "s1 r0.3, resampled")
RESAMPLED = ("resampled", "normalised, resampled")
PEERS_100 = ("CMA-ES", "Sep-CMA-ES", "multi-start L-BFGS", "differential evolution")
FULL = (
    (MAIN, ("Adam",), tuple(MAIN_METHODS)),
    (MAIN, FOUR, CONTROLLED),
    (("* 10 rotated",), FOUR, CONTROLLED),
    (("* 30", "* 100 rotated", "* 1000"), ("Adam",), CONTROLLED),
    (("H2*", "NIST *", "MNIST 20-20", "MNIST conv"), ("Adam",), CONTROLLED),
    (("* 30 rotated", "tanh 4-5-1"), ("*",), CONTROLLED),
    (
        ("[SARL][cake]* 30 rotated", "polynomial", "MNIST 10-10"),
        FOUR,
        ("reparametrize",),
    ),
    (("MNIST 10-10",), FOUR, NETWORKS),
    (("MNIST 20-20", "MNIST conv"), ("Adam",), NETWORKS),
    (MAIN, ("Adam",), ("quarter free", *RESAMPLED, "quarter free, resampled")),
    (("* 30 rotated",), FOUR, RESAMPLED),
    (("* 30 rotated",), (), tuple(PEERS)),
    (("[SAR][cka]* 100 rotated",), (), PEERS_100),
)

Results = dict[str, dict[str, Any]]

# Peers run one evaluation at a time: on the first of the reported seeds only.
PEER_SEEDS = 3

# Cells at a time: compilation takes most of the time of many, and uses one core. They
# take turns in running: on few cores, programs that run side by side can wait for each
# other's threads forever.
NUM_WORKERS = min(os.cpu_count() or 1, 4)
TURN = Lock()

RATES = tuple(float(f"{10**k:.3g}") for k in np.arange(-2.5, 1.5, 0.5))


class Setting(NamedTuple):
    """What all cells share.

    Attributes:
      rates: learning rates, in the units of `methods.rate_unit`.
      num_points: of the loss curves.
      num_steps: if given, in place of the task's own.
      gradient_cost: evaluations that a gradient counts for. The number of evaluations
        is the same: methods with gradients make fewer steps.
      optimization_level: of the compiler. What takes most of the time of a small
        problem is compilation, and 1 saves a part of it at no cost.
    """

    rates: tuple[float, ...] = RATES
    tuning_seeds: range = range(5)
    report_seeds: range = range(100, 120)
    num_points: int = 40
    num_steps: int | None = None
    gradient_cost: int = 1
    optimization_level: int = 1


QUICK = Setting(
    rates=(0.1, 1.0),
    tuning_seeds=range(2),
    report_seeds=range(100, 102),
    num_points=5,
    num_steps=20,
    optimization_level=0,
)
QUICK_PROBLEMS = ("Ackley 10 rotated", "tanh 4-5-1")
QUICK_METHODS = ("independent", "resampled", "consensus")


class Start(NamedTuple):
    """What all methods share in a run."""

    instance: Any
    params: Any
    batches: jax.Array


class Outcome(NamedTuple):
    """Of one run.

    Attributes:
      scores: of every replica, `[R]`.
      accuracies: of every replica on test data, `[R]`; NaN where there is none.
      means: loss above the minimum over the run, mean over replicas, `[num_points]`.
      bests: the same of the best replica.
    """

    scores: Any
    accuracies: Any
    means: Any
    bests: Any


def make_starts(task: Task, seeds: Sequence[int]) -> Start:
    """The starts for these seeds, stacked."""

    def start(key: jax.Array) -> Start:
        instance_key, replica_key, batch_key = jax.random.split(key, 3)
        steps: tuple[int, ...] = (task.num_steps,)
        if task.batch == "split":  # a key for each replica
            steps += (task.num_replicas,)
        return Start(
            task.draw(instance_key),
            pranam_optax.replicate(task.init, replica_key, task.num_replicas),
            jax.random.split(batch_key, steps),
        )

    # It runs once: what takes time is the compilation of the random numbers.
    draw = jax.jit(jax.vmap(start), compiler_options=compiler_options(0))
    return draw(jax.vmap(jax.random.key)(jnp.array(seeds)))


def compiler_options(optimization_level: int) -> dict[str, Any]:
    return {
        "xla_backend_optimization_level": optimization_level,
        "xla_llvm_disable_expensive_passes": optimization_level == 0,
    }


def pick(starts: Start, seeds: Any) -> Start:
    return jax.tree.map(lambda x: x[seeds], starts)


def make_run(
    task: Task, method: Method, optimizer: Optimizer, num_points: int
) -> Callable[[Any, Start, jax.Array], Outcome]:
    """A training run: (data, start, learning rate) to its outcome."""

    def run(data: Any, start: Start, rate: jax.Array) -> Outcome:
        def loss(params: Any, key: jax.Array) -> jax.Array:
            # One key for all replicas, or this replica's share: a single one.
            return task.loss(data, start.instance, params, jnp.ravel(key)[0])

        grad_fn = pranam_optax.replica_value_and_grad(loss, batch=task.batch)
        first = grad_fn(start.params, start.batches[0])[1]
        unit = rate_unit(method, optimizer, start.params, first)
        schedule = optax.cosine_decay_schedule(rate * unit, task.num_steps)
        inner = optimizer.make(schedule)
        tx = optax.with_extra_args_support(
            method.make(inner, task.num_steps, task.num_replicas)
        )

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            values, grads = grad_fn(params, key)
            updates, state = tx.update(grads, state, params, values=values)
            level = values - task.minimum
            params = optax.apply_updates(params, updates)
            return (params, state), (level.mean(), level.min())

        carry = start.params, tx.init(start.params)
        (params, _), curves = jax.lax.scan(step, carry, start.batches)
        points = np.linspace(0, task.num_steps - 1, num_points).round().astype(int)
        means, bests = (curve[points] for curve in curves)
        evaluate = partial(jax.lax.map, xs=params, batch_size=task.num_replicas)
        scores = evaluate(partial(task.score, data, start.instance))
        if task.accuracy is None:
            accuracies = jnp.full_like(scores, jnp.nan)
        else:
            accuracies = evaluate(partial(task.accuracy, data, start.instance))
        return Outcome(scores, accuracies, means, bests)

    return run


def run_all(
    program: Callable[..., Outcome],
    task: Task,
    starts: Start,
    rates: Sequence[float],
    chunk: int,
) -> Outcome:
    """All rates on all starts, in chunks of one size: `[rate, seed, ...]`."""
    num_seeds = len(starts.batches)
    pairs = [(rate, seed) for rate in rates for seed in range(num_seeds)]
    padded = pairs + pairs[:1] * (-len(pairs) % chunk)
    outcomes = []
    for i in range(0, len(padded), chunk):
        rate, seed = zip(*padded[i : i + chunk], strict=True)
        start = pick(starts, np.array(seed))
        # One chunk at a time, see `TURN`.
        outcomes.append(jax.device_get(program(task.data, start, jnp.array(rate))))

    def join(*parts: np.ndarray) -> np.ndarray:
        whole = np.concatenate(parts)[: len(pairs)]
        return whole.reshape(len(rates), num_seeds, *whole.shape[1:])

    return Outcome(*map(join, *outcomes))


def short(values: np.ndarray) -> Any:
    """Nested lists with 4 digits."""
    return np.vectorize(lambda x: float(f"{x:.4g}"))(values).tolist()


def compare(
    task: Task,
    method: Method,
    optimizer: Optimizer,
    starts: Start,
    num_tuning: int,
    setting: Setting,
) -> dict[str, Any]:
    """Tunes the learning rate on the first starts and runs the others with it."""
    chunk = min(task.num_runs, len(starts.batches) - num_tuning)
    run = make_run(task, method, optimizer, setting.num_points)
    program = jax.jit(
        jax.vmap(run, in_axes=(None, 0, 0)),
        compiler_options=compiler_options(setting.optimization_level),
    )

    def first(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((chunk, *x.shape[1:]), x.dtype)

    rates = jax.ShapeDtypeStruct((chunk,), jnp.float32)
    program.lower(task.data, jax.tree.map(first, starts), rates).compile()
    with TURN:
        tuning = pick(starts, slice(num_tuning))
        tuned = run_all(program, task, tuning, setting.rates, chunk)
        levels = geometric_mean(tuned.scores.mean(axis=-1), task.floor)
        best = int(np.argmin(levels))
        report = pick(starts, slice(num_tuning, None))
        reported = run_all(program, task, report, setting.rates[best : best + 1], chunk)
    outcome = {name: short(x[0]) for name, x in reported._asdict().items()}
    if task.accuracy is None:
        del outcome["accuracies"]
    return {
        "rate": setting.rates[best],
        "at_edge": best in (0, len(setting.rates) - 1),
        "tuning": short(levels),
        **outcome,
    }


def run_peer(
    task: Task, peer: Peer, instances: Any, gradient_cost: int = 1
) -> dict[str, Any]:
    """The lowest score that a peer reaches on each instance.

    It may spend as many evaluations as the gradients of the task's steps count for.
    """
    assert task.box is not None
    budget = task.num_replicas * task.num_steps * gradient_cost
    scores = []
    for seed in range(len(jax.tree.leaves(instances)[0])):
        instance = jax.tree.map(lambda x, seed=seed: x[seed], instances)
        found = search(
            peer,
            partial(task.score, task.data, instance),
            *task.box,
            num_evaluations=budget,
            seed=seed,
            gradient_cost=gradient_cost,
        )
        scores.append([found.value])
    return {"scores": scores, "budget": budget}


def save(path: Path, results: Results) -> None:
    """Renamed when whole, so that a killed study leaves no broken file."""
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(results))
    partial_path.rename(path)


def select(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]


def study(
    tasks: Mapping[str, Callable[[], Task]],
    methods: Mapping[str, Method | Peer],
    optimizers: Mapping[str, Optimizer],
    setting: Setting,
    output: Path,
) -> Results:
    """Computes the cells that the output file does not hold yet, several at a time.

    A cell is one task, optimizer and method. Methods that are none of ours, from
    `peers.PEERS`, have no optimizer and run on tasks that have a box.
    """
    results: Results = json.loads(output.read_text()) if output.exists() else {}
    plan = {}
    for problem in tasks:
        for name, method in methods.items():
            ours = isinstance(method, Method)
            for optimizer in optimizers if ours else ("-",):
                plan[f"{problem} | {optimizer} | {name}"] = problem, optimizer, name
    order = list(dict.fromkeys([*results, *plan]))

    @lru_cache(maxsize=NUM_WORKERS)
    def prepare(problem: str) -> tuple[Task, Start, int]:
        task = tasks[problem]()
        num_steps = (setting.num_steps or task.num_steps) // setting.gradient_cost
        task = task._replace(num_steps=num_steps)
        tuning_seeds = setting.tuning_seeds[: task.max_seeds[0]]
        report_seeds = setting.report_seeds[: task.max_seeds[1]]
        starts = make_starts(task, [*tuning_seeds, *report_seeds])
        return task, starts, len(tuning_seeds)

    def run(problem: str, optimizer: str, name: str) -> dict[str, Any] | None:
        with TURN:
            task, starts, num_tuning = prepare(problem)
        method = methods[name]
        if isinstance(method, Method):
            base = optimizers[optimizer]
            result = compare(task, method, base, starts, num_tuning, setting)
        elif task.box is None:
            return None
        else:
            with TURN:
                report = pick(starts, slice(num_tuning, num_tuning + PEER_SEEDS))
                result = run_peer(task, method, report.instance, setting.gradient_cost)
        return result | {"kind": task.kind, "solved": task.solved}

    with (
        ThreadPoolExecutor(NUM_WORKERS) as pool,
        tqdm(total=len(plan), initial=len(plan.keys() & results), unit="cell") as bar,
    ):
        names = {
            pool.submit(run, *cell): name
            for name, cell in plan.items()
            if name not in results
        }
        try:
            for future in as_completed(names):
                result, name = future.result(), names[future]
                bar.set_description(name)
                bar.update()
                if result is not None:
                    results[name] = result
                    results = {name: results[name] for name in order if name in results}
                    save(output, results)
        finally:
            pool.shutdown(cancel_futures=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="*", metavar="NAME", help="names or globs")
    parser.add_argument("--optimizers", nargs="*", metavar="NAME", default=["Adam"])
    parser.add_argument("--methods", nargs="*", metavar="NAME", help="names or globs")
    parser.add_argument("--output", type=Path, help="default study.json")
    parser.add_argument("--data-dir", type=Path, help="folder with the data files")
    parser.add_argument("--report-seeds", type=int, default=20, help="at most")
    parser.add_argument("--seed", type=int, default=100, help="first one reported")
    parser.add_argument(
        "--gradient-cost", type=int, default=1, help="evaluations per gradient"
    )
    parser.add_argument("--quick", action="store_true", help="two small problems")
    parser.add_argument("--full", action="store_true", help="the whole plan")
    parser.add_argument("--list", action="store_true", help="list the names and stop")
    args = parser.parse_args()

    tasks = make_tasks(args.data_dir)
    methods: dict[str, Method | Peer] = {**METHODS, **PEERS}
    if args.list:
        print("problems:", ", ".join(tasks))
        print("optimizers:", ", ".join(OPTIMIZERS))
        print("methods:", ", ".join(methods))
        return
    # Apart, so that no cell of a quick study passes for a finished one.
    output = args.output or Path("study_quick.json" if args.quick else "study.json")
    setting = QUICK
    if not args.quick:
        setting = Setting(
            report_seeds=range(args.seed, args.seed + args.report_seeds),
            gradient_cost=args.gradient_cost,
        )
    chosen = (
        args.problems or (QUICK_PROBLEMS if args.quick else ["*"]),
        args.optimizers,
        args.methods or (QUICK_METHODS if args.quick else list(MAIN_METHODS)),
    )
    results: Results = {}
    for problems, optimizers, names in FULL if args.full else (chosen,):
        results = study(
            {name: tasks[name] for name in select(tasks, problems)},
            {name: methods[name] for name in select(methods, names)},
            {name: OPTIMIZERS[name] for name in select(OPTIMIZERS, optimizers)},
            setting,
            output,
        )
    edges = [name for name, cell in results.items() if cell.get("at_edge")]
    print(f"{len(results)} cells in {output}; tables: report.py {output}")
    if edges and not args.quick:
        print("best rate at the edge of the grid:", "; ".join(edges))


if __name__ == "__main__":
    main()
