"""Ideas about the embedding and its training, for the lab notebook.

    python examples/benchmarks/ideas.py                  # goes on where it stopped
    python examples/benchmarks/ideas.py --ideas "weights*" --problems "Schwefel*"
    python examples/benchmarks/ideas.py --table          # of what is there
    python examples/benchmarks/ideas.py --cost
    python examples/benchmarks/ideas.py --batches
    python examples/benchmarks/ideas.py --saturation     # after the tanh output
    python examples/benchmarks/ideas.py --quick

Each idea is `pranam` with one change, run as a method of the study, and compared with
the default seed by seed.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
from jax.tree_util import Partial
from methods import (
    METHODS,
    RELEASE,
    RESAMPLING,
    STEP_SIZE,
    Method,
    coupled,
    mean_embedding,
)
from report import Cell, lines_of, number, read
from speed import compile_program, interleave
from stats import bootstrap_interval, log_floored
from study import (
    ALL,
    QUICK,
    Results,
    Setting,
    make_starts,
    pick,
    select,
    study,
    train,
)
from tasks import Task, make_tasks
from tqdm import tqdm

import pranam_optax
from pranam_optax import Embedding, flax_embedding, mlp_embedding, pranam

# A method for every step size and release, which depend on the class of the problem.
Idea = Callable[[float, float], Method]


def embedded(embedding: Embedding | None) -> Idea:
    return partial(coupled, embedding)


# Who leads: links before `pranam`, made for the steps until the release.


def led(link: Callable[[int], Any]) -> Idea:
    def idea(step_size: float, release: float) -> Method:
        def make(inner: Any, num_steps: int, num_replicas: int) -> Any:
            tail = coupled(step_size=step_size, release=release)
            return optax.chain(
                link(int(release * num_steps)), tail(inner, num_steps, num_replicas)
            )

        return make

    return idea


def weights(temperature: float) -> Idea:
    return led(lambda _: pranam_optax.weight_replicas(temperature))


def to_the_best(num_steps: int) -> Any:
    """From the mean gradient to that of the best replica; equal after the release."""
    cooling = optax.exponential_decay(10.0, num_steps, 0.01)
    schedule = optax.join_schedules([cooling, lambda _: jnp.inf], [num_steps])
    return pranam_optax.weight_replicas(schedule)


def squared() -> Any:
    """Weights each replica's gradient by its square, relative to their mean."""

    def update(updates: Any, _: Any) -> Any:
        squares = sum(
            jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim)))
            for g in jax.tree.leaves(updates)
        )
        weight = squares / (jnp.mean(squares) + 1e-30)
        return jax.tree.map(lambda g: jnp.einsum("r,r...->r...", weight, g), updates)

    return optax.stateless(update)


def resampled(method: Idea, *times: float, **options: Any) -> Idea:
    """With `resample_replicas` at these parts of the run."""

    def idea(step_size: float, release: float) -> Method:
        return methods.resampled(method(step_size, release), times, **options)

    return idea


# Other structures of the embedding.


class Trunk(nn.Module):
    """One dense layer of 8 features."""

    activation: Callable[[jax.Array], jax.Array] = nn.tanh
    use_bias: bool = True
    norm: Callable[[], nn.Module] | None = None

    @nn.compact
    def __call__(self, table: jax.Array) -> jax.Array:
        x = nn.Dense(8, use_bias=self.use_bias)(table)
        return self.activation(x if self.norm is None else self.norm()(x))


class Attention(nn.Module):
    """The replicas attend to each other's codes."""

    norm: bool

    @nn.compact
    def __call__(self, table: jax.Array) -> jax.Array:
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)(table[None])
        return nn.LayerNorm()(table + x[0]) if self.norm else table + x[0]


class Covariance(nn.Module):
    """The codes and their products."""

    @nn.compact
    def __call__(self, table: jax.Array) -> jax.Array:
        i, j = np.triu_indices(table.shape[1])
        return jnp.concatenate([table, table[:, i] * table[:, j]], axis=1)


def add(coarse: Embedding, fine: Embedding) -> Embedding:
    """The sum of two embeddings; the second one is fitted to what the first leaves."""

    def init(key: jax.Array, params: Any) -> Any:
        phi = coarse.init(key, params)
        rest = jax.tree.map(jnp.subtract, params, coarse.apply(phi))
        return phi, fine.init(key, rest)

    def apply(phi: Any) -> Any:
        return jax.tree.map(jnp.add, coarse.apply(phi[0]), fine.apply(phi[1]))

    return Embedding(init, apply)


def in_groups(embedding: Embedding, size: int) -> Embedding:
    """Groups of neighbouring replicas share a code."""

    def init(key: jax.Array, params: Any) -> Any:
        means = jax.tree.map(
            lambda x: x.reshape(-1, size, *x.shape[1:]).mean(axis=1), params
        )
        return embedding.init(key, means)

    def apply(phi: Any) -> Any:
        return jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), embedding.apply(phi))

    return Embedding(init, apply)


def layer_codes(width: int = 4, num_features: int = 8) -> Embedding:
    """One trunk for all leaves, from a replica's code and a leaf's code to features."""

    def features(phi: Any) -> jax.Array:
        codes, leaf_codes, kernel, _, _ = phi
        codes = codes[:, None] + leaf_codes[None]
        return jnp.tanh(jnp.einsum("rlk,kh->lrh", codes, kernel))

    def apply(phi: Any) -> Any:
        heads, bias = phi[3:]
        leaves, treedef = jax.tree.flatten(heads)
        made = [
            jnp.einsum("rh,h...->r...", x, head)
            for x, head in zip(features(phi), leaves, strict=True)
        ]
        made = jax.tree.unflatten(treedef, made)
        return jax.tree.map(lambda x, b: x + b[None], made, bias)

    def init(key: jax.Array, params: Any) -> Any:
        linear = mlp_embedding((width,)).init(key, params)
        codes = linear.table / (linear.table.std() + 1e-30)
        keys = jax.random.split(key)
        leaves, treedef = jax.tree.flatten(params)
        leaf_codes = jax.random.normal(keys[0], (len(leaves), width))
        kernel = jax.random.normal(keys[1], (width, num_features)) / width**0.5
        phi = codes, leaf_codes, kernel, None, None
        heads, bias = [], []
        for x, leaf in zip(features(phi), leaves, strict=True):
            # The best heads for these features, in closed form.
            ones = jnp.ones((len(x), 1))
            flat = leaf.reshape(len(leaf), -1)
            found = jnp.linalg.lstsq(jnp.concatenate([x, ones], axis=1), flat)[0]
            heads.append(found[:-1].reshape(-1, *leaf.shape[1:]))
            bias.append(found[-1].reshape(leaf.shape[1:]))
        unflatten = partial(jax.tree.unflatten, treedef)
        return codes, leaf_codes, kernel, unflatten(heads), unflatten(bias)

    return Embedding(init, apply)


def scaled(embedding: Embedding) -> Embedding:
    """The output times a learned number, at first twice the RMS of the weights."""

    def init(key: jax.Array, params: Any) -> Any:
        scale = 2 * optax.tree.norm(params) / optax.tree.size(params) ** 0.5
        return scale, embedding.init(key, jax.tree.map(lambda x: x / scale, params))

    def apply(phi: Any) -> Any:
        return jax.tree.map(lambda x: x * phi[0], embedding.apply(phi[1]))

    return Embedding(init, apply)


def bounded(output_activation: Callable[[jax.Array], jax.Array]) -> Embedding:
    return mlp_embedding(output_activation=output_activation)


# Other projections.


def shake(noise: float, state: pranam_optax.PranamState) -> pranam_optax.PranamState:
    """Adds noise to the table, in units of the standard deviation of each code."""
    apply, phi = state.embedding.func, state.embedding.args[0]
    drawn = jax.random.normal(
        jax.random.fold_in(jax.random.key(1), state.count), phi.table.shape
    )
    size = noise * phi.table.std(axis=0, keepdims=True)
    phi = phi._replace(table=phi.table + size * drawn)
    return state._replace(embedding=Partial(apply, phi))


def shaken(noise: float) -> Idea:
    """Noise in the table before every update."""

    def idea(step_size: float, release: float) -> Method:
        def make(inner: Any, num_steps: int, _: int) -> Any:
            coupling = optax.linear_schedule(1.0, 0.0, int(release * num_steps))
            link = pranam(coupling=coupling, step_size=step_size)

            def update(updates: Any, state: Any, params: Any, **extra: Any) -> Any:
                return link.update(updates, shake(noise, state), params, **extra)

            shaking = optax.GradientTransformationExtraArgs(link.init, update)
            return optax.chain(shaking, inner)

        return make

    return idea


# Hierarchical training: couplings of layers, and embeddings that grow.


def by_layer(start: Callable[[float], float], end: Callable[[float], float]) -> Idea:
    """An embedding for each layer; coupled between two parts of the time to release.

    `start` and `end` take the place of the layer, from 0 to 1, first layer first.
    """

    def idea(step_size: float, release: float) -> Method:
        def make(inner: Any, num_steps: int, _: int) -> Any:
            span = release * num_steps

            def link(place: float) -> Any:
                begin = int(start(place) * span)
                duration = int(end(place) * span) - begin
                falling = optax.linear_schedule(1.0, 0.0, duration)
                coupling = optax.join_schedules([lambda _: 0.0, falling], [begin])
                return pranam(coupling=coupling, step_size=step_size)

            def links(params: Any) -> Any:
                """For a network that is a list of layers."""
                places = np.linspace(0, 1, len(params)).tolist()
                labels = [
                    jax.tree.map(lambda _, place=place: place, layer)
                    for place, layer in zip(places, params, strict=True)
                ]
                parts = {place: link(place) for place in places}
                return optax.chain(optax.partition(parts, labels), inner)

            return optax.GradientTransformationExtraArgs(
                lambda params: links(params).init(params),
                lambda updates, state, params=None, **extra: links(params).update(
                    updates, state, params, **extra
                ),
            )

        return make

    return idea


def cross_fade(first: Any, second: Any, num_steps: int) -> Any:
    """From the updates of one link to those of another."""

    def init(params: Any) -> Any:
        return jnp.zeros([], jnp.int32), first.init(params), second.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        count, *states = state
        share = jnp.minimum(count / num_steps, 1.0)
        old, first_state = first.update(updates, states[0], params, **extra)
        new, second_state = second.update(updates, states[1], params, **extra)
        mixed = jax.tree.map(lambda a, b: (1 - share) * a + share * b, old, new)
        return mixed, (optax.safe_increment(count), first_state, second_state)

    return optax.GradientTransformationExtraArgs(init, update)


def growing(first: Embedding, second: Embedding) -> Idea:
    def idea(step_size: float, release: float) -> Method:
        def make(inner: Any, num_steps: int, _: int) -> Any:
            span = int(release * num_steps)
            coupling = optax.linear_schedule(1.0, 0.0, span)
            old, new = (
                pranam(embedding, coupling=coupling, step_size=step_size)
                for embedding in (first, second)
            )
            return optax.chain(cross_fade(old, new, span), inner)

        return make

    return idea


IDEAS: dict[str, Idea] = {
    "default": embedded(None),
    "normalised": lambda step_size, release: METHODS["normalised"],
    "to the mean": embedded(mean_embedding()),
    # who leads
    "weights 3": weights(3.0),
    "weights 1": weights(1.0),
    "weights 0.3": weights(0.3),
    "weights 10 to 0.1": led(to_the_best),
    "weights by square": led(lambda _: squared()),
    # the end
    "quarter free": partial(coupled, None, free=0.25),
    "resampled once": resampled(embedded(None), 0.6),
    "resampled": resampled(embedded(None), *RESAMPLING),
    "resampled 7 times": resampled(embedded(None), *np.arange(0.6, 0.91, 0.05)),
    "resampled, pull 0.5": resampled(embedded(None), *RESAMPLING, pull=0.5),
    "resampled, pull 0.7": resampled(embedded(None), *RESAMPLING, pull=0.7),
    "resampled, pull 0.99": resampled(embedded(None), *RESAMPLING, pull=0.99),
    "resampled, a quarter": resampled(embedded(None), *RESAMPLING, part=0.25),
    **{
        f"{name}, resampled": resampled(method, *RESAMPLING)
        for name, method in (
            ("quarter free", partial(coupled, None, free=0.25)),
            ("normalised", lambda step_size, release: METHODS["normalised"]),
            ("to the mean", embedded(mean_embedding())),
        )
    },
    # projection
    "2 projection steps": partial(coupled, None, projection_steps=2),
    "8 projection steps": partial(coupled, None, projection_steps=8),
    "code noise 0.03": shaken(0.03),
    "code noise 0.3": shaken(0.3),
    # structure
    "relu trunk": embedded(flax_embedding(Trunk(nn.relu))),
    "tanh trunk": embedded(flax_embedding(Trunk())),
    "tanh trunk, 8 steps of Adam": partial(
        coupled,
        flax_embedding(Trunk()),
        projection_optimizer=optax.adam(0.01),
        projection_steps=8,
    ),
    "tanh trunk, 4 steps of L-BFGS": partial(
        coupled,
        flax_embedding(Trunk()),
        projection_optimizer=optax.lbfgs(),
        projection_steps=4,
    ),
    "tanh trunk, no biases": embedded(flax_embedding(Trunk(use_bias=False))),
    "tanh trunk, layer norm": embedded(flax_embedding(Trunk(norm=nn.LayerNorm))),
    "tanh trunk, batch norm": embedded(
        flax_embedding(Trunk(norm=partial(nn.BatchNorm, use_running_average=False)))
    ),
    "attention": embedded(flax_embedding(Attention(norm=False))),
    "attention, layer norm": embedded(flax_embedding(Attention(norm=True))),
    "covariance": embedded(flax_embedding(Covariance())),
    "pairs": embedded(
        add(in_groups(mlp_embedding((4,)), 2), mlp_embedding((1,), use_bias=False))
    ),
    "layer codes": embedded(layer_codes()),
    # output
    "tanh output": embedded(bounded(jnp.tanh)),
    "softsign output": embedded(bounded(jax.nn.soft_sign)),
    "scaled tanh output": embedded(scaled(bounded(jnp.tanh))),
    "scaled softsign output": embedded(scaled(bounded(jax.nn.soft_sign))),
    # hierarchy
    "each layer apart": by_layer(lambda place: 0.0, lambda place: 1.0),
    "first layer released first": by_layer(
        lambda place: 0.0, lambda place: (1 + place) / 2
    ),
    "last layer coupled late": by_layer(lambda place: place / 2, lambda place: 1.0),
    "K 0 to 4": growing(mean_embedding(), mlp_embedding()),
    "K 4 to 0": growing(mlp_embedding(), mean_embedding()),
    "K 1 to 4": growing(mlp_embedding((1,)), mlp_embedding()),
}


class Family(NamedTuple):
    """Problems that want the same step size and release.

    Attributes:
      rates: learning rates, as in `study.Setting`.
      max_seeds: how many seeds to tune on, and to report.
    """

    problems: tuple[str, ...]
    step_size: float
    release: float
    rates: tuple[float, ...]
    max_seeds: tuple[int, int]


RATES = (0.0316, 0.1, 0.316, 1.0)
FAMILIES = {
    "functions": Family(
        tuple(f"{f} 30 rotated" for f in ("Schwefel", "Rastrigin", "Styblinski-Tang")),
        STEP_SIZE,
        RELEASE,
        RATES,
        (3, 12),
    ),
    "teacher nets": Family(
        ("tanh 4-5-1", "relu 5-6-6-1"), STEP_SIZE, RELEASE, RATES, (3, 12)
    ),
    # One rate: in docs/notebook.md the best one of every setting.
    "MNIST": Family(("MNIST 10-10",), 1.0, 0.3, RATES[2:3], (1, 3)),
}
QUICK_IDEAS = ("default", "weights 1", "layer codes", "K 0 to 4")
QUICK_FAMILIES = {
    "functions": FAMILIES["functions"]._replace(
        problems=("Ackley 10 rotated",), rates=QUICK.rates
    )
}


def limited(make: Callable[[], Task], max_seeds: tuple[int, int]) -> Task:
    return make()._replace(max_seeds=max_seeds)


def run(
    family: Family,
    problems: Sequence[str],
    ideas: Sequence[str],
    setting: Setting,
    output: Path,
    data_dir: Path | None,
) -> Results:
    """The cells of a family of problems, with its step size and release."""
    makers = make_tasks(data_dir)
    chosen: dict[str, Callable[[], Task]] = {
        name: partial(limited, makers[name], family.max_seeds)
        for name in select(family.problems, problems)
    }
    ALL.update({name: IDEAS[name](family.step_size, family.release) for name in ideas})
    setting = setting._replace(rates=family.rates)
    return study(chosen, ["Adam"], ideas, setting, output)


def ratio(ours: Cell, theirs: Cell, what: str) -> str:
    """Ours over theirs with its 95 % interval over seeds; in bold where 1 is outside.

    A geometric mean over seeds.
    """
    logs = log_floored(getattr(ours, what), ours.floor)
    logs -= log_floored(getattr(theirs, what), theirs.floor)
    low, high = bootstrap_interval(logs)
    mean, *ends = (f"{10**x:.2g}" for x in (logs.mean(), low, high))
    text = f"{mean} ({ends[0]} to {ends[1]})"
    return text if low <= 0 <= high else f"**{text}**"


def table(
    results: Results,
    ideas: Sequence[str],
    problems: Sequence[str],
    reference: str = "default",
) -> str:
    """Score over that of the reference: mean over replicas / best replica."""
    cells = read(results)
    rows = []
    for idea in ideas:
        row = [idea]
        for problem in problems:
            ours, theirs = (
                cells.get((problem, "Adam", name)) for name in (idea, reference)
            )
            if ours is None or theirs is None:
                row.append("")
            else:
                row.append(
                    " / ".join(ratio(ours, theirs, what) for what in ("mean", "best"))
                )
        if any(row[1:]):
            rows.append(row)
    return lines_of(["idea", *problems], rows)


# Batches: shared by all replicas, or split among them.

# Gradients of examples in a step, all replicas together, and numbers of replicas.
BUDGETS, REPLICAS = (128, 512), (4, 16, 64)


def batch_task(
    make: Callable[..., Task], num_replicas: int, size: int, split: bool
) -> Task:
    """MNIST, where every replica sees `size` images in a step."""
    return make(batch_size=size)._replace(
        num_replicas=num_replicas,
        batch="split" if split else "shared",
        max_seeds=FAMILIES["MNIST"].max_seeds,
    )


def batch_tasks(make: Callable[..., Task]) -> dict[str, Callable[[], Task]]:
    cells = [
        (num, budget // num, split)
        for num in REPLICAS
        for budget in BUDGETS
        for split in (False, True)
    ]
    # Replicas that see whole batches, each of them as costly as all of a cell.
    cells = [(4, budget, False) for budget in BUDGETS] + cells
    return {
        f"R = {num}, {size} each, {'split' if split else 'shared'}": partial(
            batch_task, make, num, size, split
        )
        for num, size, split in dict.fromkeys(cells)
    }


def batch_table(results: Results) -> str:
    """Losses over all training images and test accuracies, with 95 % intervals."""
    rows = []
    for (problem, _, method), cell in read(results).items():
        assert cell.accuracy is not None
        row = [problem, method, number(cell.rate)]
        for values in (cell.mean, cell.best, *cell.accuracy):
            low, high = bootstrap_interval(values)
            row.append(f"{values.mean():.3f} ({low:.3f} to {high:.3f})")
        rows.append(row)
    header = ["batch", "method", "rate", "loss, mean", "loss, best"]
    return lines_of([*header, "accuracy, mean", "accuracy, best"], rows)


# Saturation.


def saturation(task: Task, rate: float, seeds: Sequence[int]) -> list[list[str]]:
    """What a tanh at the output does to the share of weights that can still move.

    Runs of the idea "tanh output": the share of outputs where the slope of the tanh is
    below 0.1, at three times.
    """
    name, family = "tanh output", FAMILIES["teacher nets"]
    ALL[name] = IDEAS[name](family.step_size, family.release)

    def flat(_: jax.Array, state: Any) -> jax.Array:
        outputs = jax.tree.leaves(pranam_optax.embedding_output(state))
        share = [jnp.sum(1 - y**2 < 0.1) for y in outputs]
        return sum(share) / sum(y.size for y in outputs)

    def run(start: Any) -> tuple[jax.Array, jax.Array]:
        params, shares = train(task, name, "Adam", task.data, start, rate, flat)
        large = [jnp.sum(jnp.abs(x) > 1) for x in jax.tree.leaves(params)]
        beyond = sum(large) / sum(x.size for x in jax.tree.leaves(params))
        return shares[jnp.array([0, len(shares) // 2, -1])], beyond

    shares, beyond = jax.jit(jax.vmap(run))(make_starts(task, seeds))
    return [
        [name, f"{values.mean():.2f} ({low:.2f} to {high:.2f})"]
        for name, values in (
            ("flat outputs, first step", np.asarray(shares[:, 0])),
            ("flat outputs, half of the run", np.asarray(shares[:, 1])),
            ("flat outputs, end", np.asarray(shares[:, 2])),
            ("weights of the replicas beyond 1, end", np.asarray(beyond)),
        )
        for low, high in [bootstrap_interval(values)]
    ]


# Costs.


def costs(task: Task, family: Family, ideas: Sequence[str], seconds: float) -> Any:
    """Time of a training step over that of the default, run in turns."""
    start = pick(make_starts(task, [0]), 0)
    # A part of the data, since each program holds its own.
    data = jax.tree.map(lambda x: x[:1000], task.data)
    programs = {}
    for idea in tqdm(ideas, unit="program"):
        inner = optax.adam(1e-3)
        tx = IDEAS[idea](family.step_size, family.release)(
            inner, task.num_steps, task.num_replicas
        )
        tx = optax.with_extra_args_support(tx)

        def step(params: Any, state: Any, rest: Any, tx: Any = tx) -> Any:
            data, problem, key = rest
            values, grads = pranam_optax.replica_value_and_grad(
                lambda params: task.loss(data, problem, params, key)
            )(params)
            updates, state = tx.update(grads, state, params, values=values)
            return optax.apply_updates(params, updates), state

        # The time does not depend on the numbers, and some warm-ups take long.
        state = jax.tree.map(
            lambda x: jax.random.normal(jax.random.key(0), x.shape).astype(x.dtype),
            jax.eval_shape(tx.init, start.params),
        )
        rest = data, start.problem, start.batches[0]
        programs[idea] = compile_program(step, start.params, state, rest)
    least = interleave(programs, seconds)
    return {idea: least[idea] / least["default"] for idea in ideas}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ideas", nargs="*", default=["*"], help="names or globs")
    parser.add_argument("--problems", nargs="*", default=["*"], help="names or globs")
    parser.add_argument("--output", type=Path, help="default ideas.json")
    parser.add_argument("--data-dir", type=Path, help="folder with the data files")
    parser.add_argument("--seed", type=int, default=100, help="first one reported")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--cost", action="store_true", help="time of a training step")
    parser.add_argument("--batches", action="store_true", help="shared or split")
    parser.add_argument("--saturation", action="store_true", help="of tanh outputs")
    parser.add_argument("--quick", action="store_true", help="a few, 20 steps each")
    args = parser.parse_args()

    families = QUICK_FAMILIES if args.quick else FAMILIES
    ideas = select(list(IDEAS), QUICK_IDEAS if args.quick else args.ideas)
    seeds = range(args.seed, args.seed + 12)
    setting = QUICK if args.quick else Setting(report_seeds=seeds)
    stem = "ideas_quick" if args.quick else "batches" if args.batches else "ideas"
    output = args.output or Path(f"{stem}.json")

    if args.cost:
        makers = make_tasks(args.data_dir)
        found = {
            problem: costs(makers[problem](), family, ideas, 20.0)
            for family in families.values()
            for problem in select(family.problems, args.problems)
        }
        rows = [[idea, *(f"{x[idea]:.2f}" for x in found.values())] for idea in ideas]
        print(lines_of(["idea", *found], rows))
        return

    if args.saturation:
        name = "tanh 4-5-1"
        rate = json.loads(output.read_text())[f"{name} | Adam | tanh output"]["rate"]
        rows = saturation(make_tasks(args.data_dir)[name](), rate, seeds)
        print(lines_of(["share", "mean over seeds"], rows))
        return

    if args.batches:
        family = FAMILIES["MNIST"]
        ALL["coupled"] = coupled(None, family.step_size, family.release)
        tasks = batch_tasks(make_tasks(args.data_dir)["MNIST 10-10"])
        tasks = {name: tasks[name] for name in select(list(tasks), args.problems)}
        setting = setting._replace(rates=RATES[:3])
        methods = ("normalised", "coupled")
        print(batch_table(study(tasks, ["Adam"], methods, setting, output)))
        return

    results: Results = json.loads(output.read_text()) if output.exists() else {}
    if not args.table:
        for family in families.values():
            results = run(family, args.problems, ideas, setting, output, args.data_dir)
    problems = [p for family in families.values() for p in family.problems]
    print(table(results, ideas, select(problems, args.problems)))


if __name__ == "__main__":
    main()
