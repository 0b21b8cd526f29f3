"""Variants of `pranam`, for the lab notebook (docs/notebook.md).

    python examples/benchmarks/variants.py --list
    python examples/benchmarks/variants.py "s*" --tasks "*30 rotated" "tanh*"

A prototype of the algorithm on flat weights, whose every setting is an array, so that
one compiled program serves all variants, learning rates and seeds of a problem.
Finished cells are kept in the output file.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from report import lines_of
from stats import geometric_mean
from study import Start, make_starts, select
from tasks import Task, make_tasks
from tqdm import tqdm

MAX_WIDTH = 16
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


class Knobs(NamedTuple):
    """What a variant sets; the values here are those that the search began with.

    Attributes:
      step: size of the steps of the embedding, in units of the spread.
      step_ratio: the last replica's step over the first one's.
      width: codes per replica, up to `MAX_WIDTH`; 0 is a pull to the mean.
      release: part of the run after which the coupling is 0.
      power, root: c = (1 - t^power)^root, where t goes from 0 to 1.
      start: the coupling at the beginning.
      ladder: how far the coupling of the first replica is below that of the last:
        c_r = c (1 - ladder (1 - u)), u from 0 to 1 over the replicas.
      stagger: how much earlier the first replica is released than the last, as part
        of `release`.
      ranked: 1 if u goes by the rank of the current loss (lowest first) and not by
        index.
      elite: part of the replicas, those with the lowest losses, that are not coupled.
      explorers: part of the replicas, the first ones, that are not coupled before
        `recall`.
      recall: part of the run after which the elite is free in place of the explorers.
      delay: part of the run before which the coupling is 0.
      per_leaf: 1 to normalise gradients and pulls leaf by leaf.
      per_replica: 1 to normalise gradients replica by replica.
      noise: of the points at which gradients are taken, in units of the spread, times
        the coupling.
      weight: softmin weights of the replicas' gradients: R softmax(-weight z(loss)).
      fit_weight: the same of the replicas in the projection loss.
      adaptive: 1 to multiply the coupling by what part of the gradients the embedding
        expresses (beyond what it would of noise).
    """

    step: float = 6.0
    step_ratio: float = 1.0
    width: float = 4.0
    release: float = 1.0
    power: float = 1.0
    root: float = 1.0
    start: float = 1.0
    ladder: float = 0.0
    stagger: float = 0.0
    ranked: float = 0.0
    elite: float = 0.0
    explorers: float = 0.0
    recall: float = 1.0
    delay: float = 0.0
    per_leaf: float = 0.0
    per_replica: float = 0.0
    noise: float = 0.0
    weight: float = 0.0
    fit_weight: float = 0.0
    adaptive: float = 0.0


def couplings(
    knobs: Knobs, time: jax.Array, values: jax.Array, agreement: jax.Array
) -> jax.Array:
    """c of each replica; `time` goes from 0 to 1."""
    num = values.shape[0]
    index = jnp.arange(num) / (num - 1)
    rank = jnp.argsort(jnp.argsort(values)) / (num - 1)
    u = jnp.where(knobs.ranked > 0, rank, index)
    release = knobs.release * (1 - knobs.stagger * (1 - u))
    passed = jnp.minimum(time / jnp.maximum(release, 1e-6), 1.0)
    c = knobs.start * (1 - passed**knobs.power) ** knobs.root
    exploring = (index < knobs.explorers) & (time < knobs.recall)
    # Without explorers the elite is free from the beginning.
    leading = (rank < knobs.elite) & ((knobs.explorers == 0) | (time >= knobs.recall))
    free = exploring | leading | (time < knobs.delay)
    c = jnp.where(free, 0.0, c)
    return (
        c * (1 - knobs.ladder * (1 - u)) * jnp.where(knobs.adaptive > 0, agreement, 1.0)
    )


class Phi(NamedTuple):
    """A linear embedding: table `[R, MAX_WIDTH]`, heads, bias."""

    table: jax.Array
    heads: jax.Array
    bias: jax.Array

    def output(self) -> jax.Array:
        return self.table @ self.heads + self.bias[None]


def fit(weights: jax.Array, width: Any) -> Phi:
    """The best affine fit of rank `width`; all codes beyond are zero for ever."""
    mean = weights.mean(axis=0)
    u, norms, vt = jnp.linalg.svd(weights - mean[None], full_matrices=False)
    k = min(MAX_WIDTH, len(norms))
    root = jnp.sqrt(norms[:k]) * (jnp.arange(k) < width)
    return Phi(u[:, :k] * root[None], vt[:k] * root[:, None], mean)


def rms(x: jax.Array, axis: int | None = None) -> jax.Array:
    return jnp.sqrt(jnp.mean(x**2, axis=axis, keepdims=axis is not None))


def unit(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1.0), 0.0)


def leaf_rms(x: jax.Array, leaves: np.ndarray) -> jax.Array:
    """RMS over all replicas of each weight's leaf, `[1, n]`."""
    member = (leaves[:, None] == np.unique(leaves)[None]).astype(x.dtype)
    average = jnp.mean(x**2, axis=0) @ (member / member.sum(axis=0))
    return jnp.sqrt(member @ average)[None]


def update(
    knobs: Knobs,
    leaves: np.ndarray,
    time: jax.Array,
    phi: Phi,
    weights: jax.Array,
    gradients: jax.Array,
    values: jax.Array,
) -> tuple[Phi, jax.Array]:
    """One update of `pranam`."""
    num = len(values)
    z = (values - values.mean()) * unit(values.std())
    share = num * jax.nn.softmax(-knobs.weight * z)
    fit_share = (num * jax.nn.softmax(-knobs.fit_weight * z))[:, None]

    def normalised(x: jax.Array) -> jax.Array:
        whole = x * unit(rms(x))
        return jnp.where(knobs.per_leaf > 0, x * unit(leaf_rms(x, leaves)), whole)

    by_replica = gradients * unit(rms(gradients, axis=1))
    g = normalised(jnp.where(knobs.per_replica > 0, by_replica, gradients))
    weighted = g * share[:, None]
    spread = rms(weights - weights.mean(axis=0)[None])
    sizes = knobs.step * knobs.step_ratio ** (jnp.arange(num) / (num - 1))
    target = weights - spread * sizes[:, None] * weighted

    residual = phi.output() - target
    pulled = fit_share * residual
    d = Phi(pulled @ phi.heads.T, phi.table.T @ pulled, pulled.sum(axis=0))
    slope = d.table @ phi.heads + phi.table @ d.heads + d.bias[None]
    squared = sum(jnp.sum(x**2) for x in d)
    alpha = squared * unit(jnp.sum(fit_share * slope**2))
    new = Phi(*(p - alpha * x for p, x in zip(phi, d, strict=True)))
    pull = weights - new.output()

    # The part of the gradients that the embedding's tangent space expresses.
    agreement = jnp.clip(
        1 - jnp.sum((residual - alpha * slope) ** 2) * unit(jnp.sum(residual**2)),
        0.0,
        1.0,
    )
    c = couplings(knobs, time, values, agreement)[:, None]
    return new, c * normalised(pull) + (1 - c) * g


def make_program(
    task: Task, optimizer: str = "adam", noisy: bool = False
) -> Callable[..., jax.Array]:
    """Runs side by side: (data, starts, knobs, rates) to the scores of the replicas."""

    def run(data: Any, start: Start, knobs: Knobs, rate: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda x: x[0], start.params)
        unravel = ravel_pytree(one)[1]
        weights = jax.vmap(lambda p: ravel_pytree(p)[0])(start.params)
        sizes = [x.size for x in jax.tree.leaves(one)]
        leaves = np.repeat(np.arange(len(sizes)), sizes)
        scale = rms(weights - weights.mean(axis=0)[None])
        tx = getattr(optax, optimizer)(
            optax.cosine_decay_schedule(rate * scale, task.num_steps)
        )
        loss_and_grad = jax.vmap(
            jax.value_and_grad(
                lambda w, key: task.loss(data, start.problem, unravel(w), key)
            ),
            in_axes=(0, None),
        )

        def step(carry: Any, inputs: Any) -> Any:
            weights, phi, state = carry
            key, count = inputs
            time = count / task.num_steps
            points = weights
            if noisy:
                spread = rms(weights - weights.mean(axis=0)[None])
                level = knobs.noise * (1 - jnp.minimum(time / knobs.release, 1.0))
                points += level * spread * jax.random.normal(key, weights.shape)
            values, gradients = loss_and_grad(points, key)
            phi, updates = update(knobs, leaves, time, phi, weights, gradients, values)
            updates, state = tx.update(updates, state, weights)
            return (optax.apply_updates(weights, updates), phi, state), None

        inputs = start.batches, jnp.arange(task.num_steps)
        carry = weights, fit(weights, knobs.width), tx.init(weights)
        (weights, _, _), _ = jax.lax.scan(step, carry, inputs)
        return jax.vmap(lambda w: task.score(data, start.problem, unravel(w)))(weights)

    @jax.jit
    def program(data: Any, starts: Start, knobs: Knobs, rates: jax.Array) -> jax.Array:
        def one(i: jax.Array) -> jax.Array:
            start = jax.tree.map(lambda x: x[i % len(starts.batches)], starts)
            return run(data, start, knobs, rates[i // len(starts.batches)])

        total = len(rates) * len(starts.batches)
        chunk = max(k for k in range(1, task.num_runs + 1) if total % k == 0)
        return jax.lax.map(one, jnp.arange(total), batch_size=chunk)

    return program


def evaluate(
    task: Task, program: Callable[..., jax.Array], starts: Start, knobs: Knobs
) -> np.ndarray:
    """Scores `[rate, seed, replica]`."""
    arrays = jax.tree.map(lambda x: jnp.asarray(x, float), knobs)
    scores = program(task.data, starts, arrays, jnp.array(RATES))
    return np.asarray(scores).reshape(len(RATES), -1, task.num_replicas)


VARIANTS: dict[str, Knobs] = {
    "normalised": Knobs(start=0.0),
    "nets": Knobs(step=1.0, release=0.3),
    **{
        f"s{s:g} r{r:g}": Knobs(step=s, release=r)
        for s in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
        for r in (0.3, 0.6, 1.0)
    },
    **{
        f"K{k:g} s{s:g} r{r:g}": Knobs(step=s, release=r, width=k)
        for k in (0, 2, 8, 16)
        for s, r in ((2.0, 0.6), (6.0, 1.0))
    },
    "s2 square": Knobs(step=2.0, power=2.0),
    "s2 squared": Knobs(step=2.0, root=2.0),
    "s2 cubed": Knobs(step=2.0, root=3.0),
    "s6 cubed": Knobs(root=3.0),
    "s2 ranked": Knobs(step=2.0, ladder=1.0, ranked=1.0),
    "s6 ranked": Knobs(ladder=1.0, ranked=1.0),
    "s2 ranked r0.6": Knobs(step=2.0, release=0.6, ladder=1.0, ranked=1.0),
    "s2 ladder": Knobs(step=2.0, ladder=1.0),
    "s6 ladder": Knobs(ladder=1.0),
    "s2 stagger": Knobs(step=2.0, stagger=0.9),
    "s6 stagger": Knobs(stagger=0.9),
    "s2 ranked stagger": Knobs(step=2.0, stagger=0.9, ranked=1.0),
    "s6 ranked stagger": Knobs(stagger=0.9, ranked=1.0),
    "s2 per leaf": Knobs(step=2.0, release=0.6, per_leaf=1.0),
    "s2 per replica": Knobs(step=2.0, release=0.6, per_replica=1.0),
    "s6 per replica": Knobs(per_replica=1.0),
    "s2 steps x10": Knobs(step=1.0, step_ratio=10.0),
    "s2 adaptive": Knobs(step=2.0, adaptive=1.0),
    "s6 adaptive": Knobs(adaptive=1.0),
    "s2 weighted": Knobs(step=2.0, release=0.6, weight=1.0),
    "s6 weighted": Knobs(weight=1.0),
    **{
        f"elite {e:g} s{s:g} r{r:g}": Knobs(elite=e, step=s, release=r)
        for e in (0.1, 0.25, 0.5)
        for s, r in ((2.0, 0.6), (4.0, 0.45), (4.0, 0.6), (4.0, 0.8), (4.0, 1.0))
    },
    **{
        f"elite {e:g} s4 r0.9 sharp": Knobs(elite=e, step=4.0, release=0.9, power=4.0)
        for e in (0.0, 0.1, 0.25)
    },
    **{
        f"elite {e:g} fit {w:g} s4 r0.6": Knobs(
            elite=e, step=4.0, release=0.6, fit_weight=w
        )
        for e in (0.0, 0.1, 0.25)
        for w in (1.0, 3.0)
    },
    "elite 0.25 fit 3 s4 delay": Knobs(
        elite=0.25, step=4.0, release=0.8, fit_weight=3.0, delay=0.1
    ),
    "s4 r0.6 per replica": Knobs(step=4.0, release=0.6, per_replica=1.0),
    "elite 0.1 s4 r0.6 per replica": Knobs(
        elite=0.1, step=4.0, release=0.6, per_replica=1.0
    ),
    "s4 cubed": Knobs(step=4.0, root=3.0),
    **{
        f"K{k:g} s{s:g} r0.6": Knobs(step=s, release=0.6, width=k)
        for k, s in ((0, 4), (2, 4), (3, 4), (6, 4), (8, 4), (8, 8), (4, 3), (4, 5))
    },
    # sqrt(R) / 2 for 32 replicas.
    "s2.83 r0.6": Knobs(step=2.83, release=0.6),
    "s4 r0.45": Knobs(step=4.0, release=0.45),
    "s4 r0.8": Knobs(step=4.0, release=0.8),
    "s4 r0.6 power 2": Knobs(step=4.0, release=0.6, power=2.0),
    "s4 r0.6 root 2": Knobs(step=4.0, release=0.6, root=2.0),
    "s4 r0.6 cosine": Knobs(step=4.0, release=0.6, power=1.7, root=1.7),
    "s4 r0.6 start 0.9": Knobs(step=4.0, release=0.6, start=0.9),
    "s4 r0.6 per leaf": Knobs(step=4.0, release=0.6, per_leaf=1.0),
    "s4 r0.6 weighted 0.5": Knobs(step=4.0, release=0.6, weight=0.5),
    "s4 r0.6 noise 0.1": Knobs(step=4.0, release=0.6, noise=0.1),
    "s4 r0.6 noise 0.5": Knobs(step=4.0, release=0.6, noise=0.5),
    "s4 r0.6 explorers 0.1": Knobs(step=4.0, release=0.6, explorers=0.1),
    "s4 r0.6 explorers 0.25": Knobs(step=4.0, release=0.6, explorers=0.25),
    **{
        f"explorers {e:g} recall {t:g} r0.8 power {p:g}": Knobs(
            step=4.0, release=0.8, explorers=e, elite=0.1, recall=t, power=p
        )
        for e in (0.25, 0.5)
        for t, p in ((0.4, 2.0), (0.4, 4.0), (0.6, 4.0))
    },
    "s4 r0.6 stagger 0.5": Knobs(step=4.0, release=0.6, stagger=0.5),
    "s4 r0.6 stagger 0.9": Knobs(step=4.0, release=0.6, stagger=0.9),
    "s4 r0.8 ranked stagger 0.7": Knobs(step=4.0, release=0.8, stagger=0.7, ranked=1.0),
    "s4 r0.6 steps 2-8": Knobs(step=2.0, release=0.6, step_ratio=4.0),
}


def summary(cell: dict[str, Any], floor: float) -> tuple[float, float, float]:
    """Rate; geometric means over seeds of the mean over replicas and of the best."""
    means, bests = (np.array(cell[key], float) for key in ("mean", "best"))
    chosen = int(np.argmin(geometric_mean(means, floor)))
    return (
        RATES[chosen],
        float(geometric_mean(means[chosen], floor)),
        float(geometric_mean(bests[chosen], floor)),
    )


def table(
    results: dict[str, Any], names: Sequence[str], floors: dict[str, float]
) -> str:
    """A row per variant: mean over replicas / best replica (learning rate)."""
    rows = []
    for variant in dict.fromkeys(cell.split(" | ")[1] for cell in results):
        row = [variant]
        for name in names:
            cell = results.get(f"{name} | {variant}")
            row.append("")
            if cell is not None:
                rate, mean, best = summary(cell, floors[name])
                row[-1] = f"{mean:.2g} / {best:.2g} ({rate:g})"
        rows.append(row)
    return lines_of(["variant", *names], rows)


TASKS = (
    *(f"{name} 30 rotated" for name in (
        "Schwefel", "Ackley", "Rastrigin", "Levy", "Griewank", "Styblinski-Tang",
        "Rosenbrock", "sphere", "ellipsoid",
    )),
    "tanh 4-5-1", "relu 5-6-6-1", "polynomial",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", default=["*"])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--seeds", type=int, help="default 6 for models, else 3")
    parser.add_argument("--replicas", type=int, help="default that of the problem")
    parser.add_argument("--output", type=Path, help="default variants.json")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--quick", action="store_true", help="one cell, 20 steps")
    args = parser.parse_args()
    if args.quick:
        args.variants, args.tasks = ["s6 r1"], ["Ackley 10"]

    file = "variants_quick.json" if args.quick else "variants.json"
    output = args.output or Path(file)
    makers = make_tasks(args.data_dir)
    names = select(list(makers), args.tasks)
    chosen = {name: VARIANTS[name] for name in select(list(VARIANTS), args.variants)}
    results = json.loads(output.read_text()) if output.exists() else {}
    with tqdm(total=len(names) * len(chosen), unit="cell") as progress:
        for name in names if not args.table else ():
            if all(f"{name} | {variant}" in results for variant in chosen):
                progress.update(len(chosen))
                continue
            task = makers[name]()
            if args.quick:
                task = task._replace(num_steps=20)
            if args.replicas:
                task = task._replace(num_replicas=args.replicas)
            programs = {n: make_program(task, args.optimizer, n) for n in (False, True)}
            # Six instances of models, which differ more; two runs where they are long.
            num_seeds = 2 if task.num_runs == 1 else 6 if task.kind == "model" else 3
            starts = make_starts(task, range(args.seeds or num_seeds))
            for variant, knobs in chosen.items():
                cell = f"{name} | {variant}"
                progress.set_description(cell)
                if cell not in results:
                    program = programs[knobs.noise > 0]
                    scores = evaluate(task, program, starts, knobs)
                    results[cell] = {
                        "mean": scores.mean(axis=-1).tolist(),
                        "best": np.nanmin(scores, axis=-1).tolist(),
                    }
                    output.write_text(json.dumps(results))
                progress.update()
    shown = {
        cell: result
        for cell, result in results.items()
        if cell.split(" | ")[0] in names and cell.split(" | ")[1] in chosen
    }
    found = [n for n in names if any(cell.startswith(f"{n} |") for cell in shown)]
    print(table(shown, found, {name: makers[name]().floor for name in found}))


if __name__ == "__main__":
    main()
