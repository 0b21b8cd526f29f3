"""pranam and reparametrize against independent replicas, under four optimizers.

    python examples/benchmarks/optimizers.py   # for docs/original.md
    python examples/benchmarks/optimizers.py --quick

Every method gets the same problems (a random instance per seed: functions shifted,
flipped and rotated), the same initial replicas and batches, the same number of gradient
evaluations, and the best learning rate of one grid, chosen on other seeds than those of
the table. Finished cells are kept in the output file, and a second call goes on there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import pranam_optax
from pranam_optax import problems

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flax_mnist import MLP, load_mnist
from quickstart import interval

Method = Callable[[float], optax.GradientTransformation]


class Task(NamedTuple):
    """A family of random problems, and how replicas are trained on them.

    Attributes:
      draw: draws the arrays that define a problem, such as its rotation, from a key.
      init: draws the params of one replica from a key.
      loss: `loss(problem, params, key)` of one replica; the key draws a mini-batch,
        where there is one.
      score: `score(problem, params)`, what the table shows of one replica: the loss
        over all data, or the height above the known minimum.
      coupled: part of the steps until the coupling is 0. As the README advises: all
        of them on functions; 30 %, and short steps, on models.
      step_size: that of pranam.
      batched: whether several runs fit into memory at once.
    """

    draw: Callable[[jax.Array], Any]
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    score: Callable[[Any, Any], jax.Array]
    num_replicas: int
    num_steps: int
    rates: Sequence[float]
    coupled: float
    step_size: float
    batched: bool = True


def function(problem: problems.Problem, num_steps: int, rates: Sequence[float]) -> Task:
    """Flipped, shifted (to the middle 40 % of the box) and rotated at random."""
    (dim,) = problem.low.shape

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = jax.random.split(key, 3)
        return (
            jax.random.rademacher(keys[0], (dim,), float),
            jax.random.uniform(keys[1], (dim,), float, 0.3, 0.7),
            jax.random.orthogonal(keys[2], dim),
        )

    def make(arrays: tuple[jax.Array, jax.Array, jax.Array]) -> problems.Problem:
        signs, place, rotation = arrays
        flipped = problems.flip(problem, signs)
        minimizer = problem.low + place * (problem.high - problem.low)
        shifted = problems.shift(flipped, minimizer - flipped.minimizer)
        return problems.rotate(shifted, rotation)

    return Task(
        draw,
        problem.init,
        lambda arrays, x, key: make(arrays).fun(x),
        lambda arrays, x: make(arrays).fun(x) - problem.minimum,
        num_replicas=64,
        num_steps=num_steps,
        rates=rates,
        coupled=1.0,
        step_size=6.0,
    )


def polynomial(num_steps: int, rates: Sequence[float]) -> Task:
    fit = problems.polynomial_fit(0)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = problems.polynomial_fit(key)
        return drawn.x, drawn.y

    def loss(data: tuple[jax.Array, jax.Array], params: Any) -> jax.Array:
        return fit._replace(x=data[0], y=data[1]).loss(params)

    return Task(
        draw,
        fit.init,
        lambda data, params, key: loss(data, params),
        loss,
        num_replicas=32,
        num_steps=num_steps,
        rates=rates,
        coupled=0.3,
        step_size=1.0,
    )


def mnist(data_dir: Path | None, num_steps: int, rates: Sequence[float]) -> Task:
    """784-10-10-10, in mini-batches of 128."""
    data, model = load_mnist(data_dir), MLP((10, 10))

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def batch_loss(_: Any, params: Any, key: jax.Array) -> jax.Array:
        batch = jax.random.randint(key, (128,), 0, len(data.train_x))
        return loss(params, data.train_x[batch], data.train_y[batch])

    return Task(
        lambda key: (),
        lambda key: model.init(key, data.train_x[:1]),
        batch_loss,
        lambda _, params: loss(params, data.train_x, data.train_y),
        num_replicas=16,
        num_steps=num_steps,
        rates=rates,
        coupled=0.3,
        step_size=1.0,
        batched=False,
    )


def make_tasks(quick: bool, data_dir: Path | None) -> dict[str, Task]:
    if quick:
        return {
            "Ackley, 10-D": function(problems.ackley(10), 100, (0.1, 1.0)),
            "polynomial": polynomial(100, (0.1, 1.0)),
        }
    rates = tuple(10**k for k in np.arange(-3, 2, 0.5))
    functions = {
        "Schwefel": problems.bound(problems.schwefel(30)),
        "Ackley": problems.ackley(30),
        "Rastrigin": problems.rastrigin(30),
        "Levy": problems.levy(30),
    }
    return {
        **{
            f"{name}, 30-D": function(problem, 1000, rates)
            for name, problem in functions.items()
        },
        "polynomial": polynomial(1000, rates),
        "MNIST": mnist(data_dir, 500, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
    }


OPTIMIZERS: dict[str, Callable[[optax.ScalarOrSchedule], Any]] = {
    "SGD": optax.sgd,
    "Adagrad": optax.adagrad,
    "RMSProp": optax.rmsprop,
    "Adam": optax.adam,
}
METHODS = ("independent", "normalised", "reparametrize", "pranam")


def make_optimizer(task: Task, method: str, inner: Any) -> Any:
    """The method around an optimizer `inner` whose learning rate is set."""
    if method == "independent":
        return inner
    if method == "normalised":
        return optax.chain(pranam_optax.pranam(coupling=0.0), inner)
    if method == "reparametrize":
        return pranam_optax.reparametrize(inner)
    release = optax.linear_schedule(1.0, 0.0, int(task.coupled * task.num_steps))
    link = pranam_optax.pranam(coupling=release, step_size=task.step_size)
    return optax.chain(link, inner)


def rms(tree: Any) -> jax.Array:
    return optax.tree.norm(tree) / optax.tree.size(tree) ** 0.5


def rate_unit(method: str, optimizer: str, params: Any, grads: Any) -> jax.Array:
    """Unit of the learning rate, so that one grid serves all methods and problems.

    The size of what the optimizer acts on, over that of the first gradient where the
    optimizer's step is in proportion to it.
    """
    if method == "reparametrize":
        state = pranam_optax.reparametrize(optax.identity()).init(params)
        apply, phi = state.embedding.func, state.embedding.args[0]
        size, gradient = phi, jax.vjp(apply, phi)[1](grads)[0]
    else:
        size = jax.tree.map(lambda x: x - x.mean(axis=0, keepdims=True), params)
        gradient = grads
    proportional = optimizer == "SGD" and method in ("independent", "reparametrize")
    return rms(size) / (rms(gradient) if proportional else 1.0)


class Start(NamedTuple):
    """What all methods share in a run."""

    problem: Any
    params: Any
    batches: jax.Array


def make_starts(task: Task, seeds: Sequence[int]) -> Start:
    """The starts for these seeds, stacked."""

    @jax.jit
    @jax.vmap
    def start(key: jax.Array) -> Start:
        problem_key, replica_key, batch_key = jax.random.split(key, 3)
        return Start(
            task.draw(problem_key),
            pranam_optax.replicate(task.init, replica_key, task.num_replicas),
            jax.random.split(batch_key, task.num_steps),
        )

    return start(jax.vmap(jax.random.key)(jnp.array(seeds)))


def make_run(
    task: Task, method: str, optimizer: str
) -> Callable[[Start, jax.Array], jax.Array]:
    """A training run: (start, learning rate) to the score of every replica."""

    def run(start: Start, rate: jax.Array) -> jax.Array:
        grad_fn = pranam_optax.replica_value_and_grad(partial(task.loss, start.problem))
        first = grad_fn(start.params, start.batches[0])[1]
        unit = rate_unit(method, optimizer, start.params, first)
        schedule = optax.cosine_decay_schedule(rate * unit, task.num_steps)
        tx = make_optimizer(task, method, OPTIMIZERS[optimizer](schedule))

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            _, grads = grad_fn(params, key)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = start.params, tx.init(start.params)
        (params, _), _ = jax.lax.scan(step, carry, start.batches)
        return jax.lax.map(partial(task.score, start.problem), params)

    return run


def compare(
    task: Task, method: str, optimizer: str, tuning: Start, report: Start
) -> dict[str, Any]:
    """Tunes the learning rate on some starts and scores the replicas of others."""
    run = make_run(task, method, optimizer)

    @jax.jit
    def scores(starts: Start, rate: jax.Array) -> jax.Array:
        if task.batched:
            return jax.vmap(run, in_axes=(0, None))(starts, rate)
        return jax.lax.map(lambda start: run(start, rate), starts)

    means = [float(scores(tuning, rate).mean()) for rate in task.rates]
    best = int(np.argmin(np.nan_to_num(means, nan=np.inf)))
    return {
        "rate": float(task.rates[best]),
        "at_edge": best in (0, len(task.rates) - 1),
        "scores": scores(report, task.rates[best]).tolist(),
    }


def table(results: dict[str, Any]) -> str:
    """One row per problem and optimizer: mean over replicas (interval) / best.

    The lowest mean is bold.
    """
    lines = [
        "| problem | optimizer | " + " | ".join(METHODS) + " |",
        "| --- | --- |" + " --- |" * len(METHODS),
    ]
    for row in dict.fromkeys(tuple(cell.split(" | ")[:2]) for cell in results):
        scores = [
            np.array(results[" | ".join((*row, method))]["scores"], float)
            for method in METHODS
        ]
        means = [s.mean(axis=1) for s in scores]
        lowest = np.nanargmin([mean.mean() for mean in means])
        cells = []
        for i, (s, mean) in enumerate(zip(scores, means, strict=True)):
            diverged = np.sum(~np.isfinite(mean))
            if diverged:
                text = f"diverged in {diverged} of {len(mean)} runs"
            else:
                low, high = interval(mean)
                text = f"{mean.mean():.3g} ({low:.3g} to {high:.3g})"
            bold = "**" if i == lowest else ""
            best = np.nanmin(s, axis=1).mean()
            cells.append(f"{bold}{text}{bold} / {best:.3g}")
        lines.append("| " + " | ".join((*row, *cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with the files of MNIST")
    parser.add_argument("--output", type=Path, default=Path("optimizers.json"))
    parser.add_argument("--quick", action="store_true", help="small, to try the code")
    args = parser.parse_args()

    num_seeds = 2 if args.quick else 5
    optimizers = ("Adam",) if args.quick else tuple(OPTIMIZERS)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    tasks = make_tasks(args.quick, args.data_dir)
    with tqdm(
        total=len(tasks) * len(optimizers) * len(METHODS), unit="cell"
    ) as progress:
        for name, task in tasks.items():
            # As many to tune as to report, so that a cell is one program; but one
            # where runs are long.
            tuning = range(num_seeds if task.batched else 1)
            report = range(100, 100 + num_seeds)
            starts = make_starts(task, tuning), make_starts(task, report)
            for optimizer in optimizers:
                for method in METHODS:
                    cell = f"{name} | {optimizer} | {method}"
                    progress.set_description(cell)
                    if cell not in results:
                        results[cell] = compare(task, method, optimizer, *starts)
                        args.output.write_text(json.dumps(results))
                    progress.update()
    print(table(results))
    edges = [cell for cell, result in results.items() if result["at_edge"]]
    if edges:
        print("\nbest rate at the edge of the grid:", "; ".join(edges))


if __name__ == "__main__":
    main()
