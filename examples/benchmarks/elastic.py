"""Elastic averaging against its controls; the tables of docs/elastic.md.

    python examples/benchmarks/elastic.py --quick
    python examples/benchmarks/elastic.py --stage run --out elastic.json
    python examples/benchmarks/elastic.py --stage tables --out elastic.json
    python examples/benchmarks/elastic.py --stage confirm --out elastic.json

All rates, seeds and settings of a method that differ in numbers alone are one compiled
program. Rates are multiples of the spread of random starts, fall to zero along a cosine
and are chosen on the tuning seeds; the tables show the report seeds. What was chosen on
those, among many, is confirmed on further seeds at the same rates.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _paths  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
import optax
import potential_energy
from elastic_tables import load, print_tables
from flax_mnist import load_mnist
from tasks import Network, convolutional, dense

import pranam_optax
from pranam_optax import problems

# Losses decide on 1e-9: no matrix product in reduced precision.
jax.config.update("jax_default_matmul_precision", "highest")

# Each with a learning rate of 1; the step multiplies by the schedule.
OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "Adam": optax.adam(1.0),
    "AdamW": optax.adamw(1.0, weight_decay=0.01),
    "RMSProp": optax.rmsprop(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
}
EMA, SWA = 0.999, 0.75


class Method(NamedTuple):
    """One way to train; the first five fields choose a program, the rest are data.

    Attributes:
      replicas: R, each with its own part of the examples of a step.
      optimizer: one of `OPTIMIZERS`.
      before: whether `pranam` stands before the optimizer.
      width: of the embedding behind the optimizer; 0 is the mean.
      sequential: k, to take k times as many steps with 1/k of the examples each.
      gamma: strength of the elastic pull.
      release: part of the run over which gamma falls to zero; 0 keeps it.
      tied: 1 to let gamma fall like the learning rate.
      grow: 1 to let gamma rise from zero over the run.
      free: part of the replicas, the first ones, that are not pulled.
      every: the replicas meet at every k-th step.
      normalize: 1 to normalise the gradients (without `before`).
      constant: 1 for a constant learning rate.
      step, own, coupled: of `pranam`: its step size, 1 to multiply that by
        rms(G) / rms(mean of G), and the part of the run after which it is released.
    """

    replicas: int = 4
    optimizer: str = "Adam"
    before: bool = False
    width: int = 0
    sequential: int = 1
    gamma: float = 0.0
    release: float = 0.0
    tied: float = 0.0
    grow: float = 0.0
    free: float = 0.0
    every: int = 1
    normalize: float = 0.0
    constant: float = 0.0
    step: float = 4.0
    own: float = 0.0
    coupled: float = 0.6


class Task(NamedTuple):
    """What is trained.

    Attributes:
      draw: `draw(key)`, the arrays of an instance.
      init: `init(key)`, the params of one replica.
      loss: `loss(data, instance, params, batch)`; `batch` is None for full batches.
      evaluate: `evaluate(data, instance, params)` of one model, a dict.
      examples: per step, of all replicas together; 0 for full batches.
      tuning, report: numbers of seeds, from 1000 and from 0.
    """

    draw: Callable[[jax.Array], Any]
    init: Callable[[jax.Array], Any]
    loss: Callable[..., jax.Array]
    evaluate: Callable[..., dict[str, jax.Array]]
    methods: dict[str, Method]
    rates: tuple[float, ...]
    steps: int
    data: Any = ()
    examples: int = 0
    tuning: int = 10
    report: int = 20


def rms(tree: Any) -> jax.Array:
    return optax.tree.norm(tree) / optax.tree.size(tree) ** 0.5


def mean(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.mean(axis=0), tree)


def minus(tree: Any, single: Any) -> Any:
    return jax.tree.map(lambda x, m: x - m[None], tree, single)


def train(
    task: Task, static: Method, data: Any, numbers: Method, rate: Any, key: jax.Array
) -> dict[str, jax.Array]:
    """One run: scores at its end."""
    instance_key, init_key, batch_key = jax.random.split(key, 3)
    instance = task.draw(instance_key)
    num_replicas, num_steps = static.replicas, task.steps * static.sequential
    starts = pranam_optax.replicate(task.init, init_key, max(num_replicas, 16))
    unit = rms(minus(starts, mean(starts)))
    params = jax.tree.map(lambda x: x[:num_replicas], starts)

    def gradients(params: Any, t: Any) -> Any:
        grad = jax.grad(partial(task.loss, data, instance))
        if not task.examples:
            return jax.vmap(lambda p: grad(p, None))(params)
        shape = num_replicas, task.examples // static.sequential // num_replicas
        key = jax.random.fold_in(batch_key, t)
        batch = jax.random.randint(key, shape, 0, len(data.train_x))
        return jax.vmap(grad)(params, batch)

    def link(step: Any, coupling: Any) -> optax.GradientTransformationExtraArgs:
        return pranam_optax.pranam(step_size=step, coupling=coupling)

    def elastic(gamma: Any) -> optax.GradientTransformationExtraArgs:
        embedding = pranam_optax.mlp_embedding((static.width,))
        return pranam_optax.elastic_averaging(gamma, embedding)

    def pull(updates: Any, state: Any, params: Any, gamma: Any) -> Any:
        if static.width:
            return elastic(gamma).update(updates, state, params)
        # What `elastic_averaging` does without its checks, which compiles faster.
        moved = optax.apply_updates(params, updates)
        away = minus(moved, mean(moved))
        apart = jax.vmap(optax.tree.scale)(gamma, away)
        return optax.tree.sub(updates, apart), state

    inner = OPTIMIZERS[static.optimizer]
    if static.optimizer == "momentum":  # whose steps are as long as the gradients
        size = rms(gradients(params, 0))
        unit = 0.1 * unit / jnp.where(numbers.normalize > 0, 1.0, size)
    before = link(4.0, 1.0).init(params) if static.before else ()
    after = elastic(0.0).init(params) if static.width else ()

    def step(carry: Any, t: Any) -> Any:
        params, before, state, after, averages = carry
        passed = t / num_steps
        grads = gradients(params, t)
        if static.before:
            coupling = jnp.maximum(1 - passed / numbers.coupled, 0.0)
            ratio = rms(grads) / (rms(mean(grads)) + 1e-30)
            s = numbers.step * jnp.where(numbers.own > 0, ratio, 1.0)
            grads, before = link(s, coupling).update(grads, before, params)
        else:
            factor = jnp.where(numbers.normalize > 0, 1 / (rms(grads) + 1e-30), 1.0)
            grads = optax.tree.scale(factor, grads)
        cosine = 0.5 + 0.5 * jnp.cos(jnp.pi * passed)
        schedule = jnp.where(numbers.constant > 0, 1.0, cosine)
        updates, state = inner.update(grads, state, params)
        updates = optax.tree.scale(rate * unit * schedule, updates)
        if num_replicas > 1:
            release = jnp.where(numbers.release > 0, numbers.release, jnp.inf)
            gamma = numbers.gamma * jnp.maximum(1 - passed / release, 0.0)
            gamma = gamma * jnp.where(numbers.tied > 0, schedule, 1.0)
            gamma = gamma * jnp.where(numbers.grow > 0, passed, 1.0)
            gamma = jnp.where((t + 1) % numbers.every == 0, gamma, 0.0)
            pulled = jnp.arange(num_replicas) >= numbers.free * num_replicas
            gamma = jnp.where(pulled, gamma, 0.0)
            updates, after = pull(updates, after, params, gamma)
        params = optax.apply_updates(params, updates)
        if static.sequential > 1:
            ema, swa = averages
            late = passed >= SWA
            share = late / jnp.maximum(t + 1 - SWA * num_steps, 1)
            averages = (
                optax.tree.add_scale(ema, 1 - EMA, optax.tree.sub(params, ema)),
                optax.tree.add_scale(swa, share, optax.tree.sub(params, swa)),
            )
        return (params, before, state, after, averages), None

    averages: Any = (params, params) if static.sequential > 1 else ()
    carry = params, before, inner.init(params), after, averages
    (params, _, _, _, averages), _ = jax.lax.scan(step, carry, jnp.arange(num_steps))

    evaluate = partial(task.evaluate, data, instance)
    scores = jax.vmap(evaluate)(params)
    best = jnp.argsort(scores["loss"])[0]
    found: dict[str, jax.Array] = {
        "unit": unit,
        "spread": rms(minus(params, mean(params))),
    }
    for name, values in scores.items():
        found |= {f"mean {name}": values.mean(), f"best {name}": values[best]}
    singles = {"average": mean(params)}
    if static.sequential > 1:
        singles |= {"EMA": mean(averages[0]), "SWA": mean(averages[1])}
    if num_replicas == 16:
        singles["soup"] = soup(evaluate, params, scores["loss"])
    for name, single in singles.items():
        found |= {f"{name} {k}": x for k, x in evaluate(single).items()}
    return found


def soup(evaluate: Callable[..., Any], params: Any, losses: jax.Array) -> Any:
    """The greedy soup: from the best, each that lowers the average's loss joins."""

    def add(carry: Any, index: jax.Array) -> Any:
        average, count, lowest = carry
        one = jax.tree.map(lambda x: x[index], params)
        tried = jax.tree.map(lambda a, x: a + (x - a) / (count + 1), average, one)
        loss = evaluate(tried)["loss"]
        better = loss < lowest
        pick = partial(jnp.where, better)
        average = jax.tree.map(pick, tried, average)
        return (average, count + better, pick(loss, lowest)), None

    order = jnp.argsort(losses)
    start = jax.tree.map(lambda x: x[order[0]], params)
    (average, *_), _ = jax.lax.scan(add, (start, 1, losses[order[0]]), order[1:])
    return average


def thousands(fun: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Mean over the data, of which 1000 at a time fit into memory."""
    parts = [x.reshape(-1, 1000, *x.shape[1:]) for x in arrays]
    return jax.tree.map(jnp.mean, jax.lax.map(lambda part: fun(*part), parts))


def mnist(network: Network, data: Any, **fields: Any) -> Task:
    entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss(data: Any, _: Any, params: Any, batch: jax.Array) -> jax.Array:
        logits = network.logits(params, data.train_x[batch])
        return entropy(logits, data.train_y[batch]).mean()

    def evaluate(data: Any, _: Any, params: Any) -> dict[str, jax.Array]:
        def cross(x: jax.Array, y: jax.Array) -> jax.Array:
            return entropy(network.logits(params, x), y)

        def hits(x: jax.Array, y: jax.Array) -> jax.Array:
            return (network.logits(params, x).argmax(-1) == y).astype(jnp.float32)

        return {
            "loss": thousands(cross, data.train_x, data.train_y),
            "accuracy": thousands(hits, data.test_x, data.test_y),
        }

    rates = (0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0)
    return Task(
        lambda key: (),
        network.init,
        loss,
        evaluate,
        rates=rates,
        data=data,
        tuning=4,
        report=8,
        **fields,
    )


def regression(make: Callable[[jax.Array], problems.Regression], steps: int) -> Task:
    """A model to fit to all of its data."""
    shape = make(jax.random.key(0))

    def loss(data: Any, xy: Any, params: Any, _: Any = None) -> jax.Array:
        return jnp.mean((shape.predict(params, xy[0]) - xy[1]) ** 2)

    def draw(key: jax.Array) -> Any:
        made = make(key)
        return made.x, made.y

    return Task(
        draw,
        shape.init,
        loss,
        lambda *args: {"loss": loss(*args)},
        methods=MODELS,
        rates=(0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
        steps=steps,
        tuning=20,
    )


def morse(key: jax.Array) -> problems.Regression:
    """A tanh network of 3-16-16-1 for the energy of three coupled Morse bonds."""
    net = problems.teacher_network(0, features=(3, 16, 16, 1))
    keys = jax.random.split(key, 4)
    r = jax.random.uniform(keys[0], (500, 3), minval=0.7, maxval=2.5)
    depth, a = jax.random.uniform(keys[1], (2, 1, 3), minval=0.5, maxval=2.0)
    r_e = jax.random.uniform(keys[2], (1, 3), minval=0.9, maxval=1.4)
    stretch = r - r_e
    bonds = jnp.sum(depth * (1 - jnp.exp(-a * stretch)) ** 2, axis=1)
    cross = jax.random.uniform(keys[3], (1, 3), minval=-0.2, maxval=0.2)
    y = bonds + jnp.sum(cross * stretch * jnp.roll(stretch, 1, axis=1), axis=1)
    x = (r - r.mean(0)[None]) / r.std(0)[None]
    return replace(net, x=x, y=(y - y.mean()) / y.std())


def water(data_dir: Path | None) -> Callable[[jax.Array], problems.Regression]:
    """The 3-4-1 network for H2O; the instances are starts."""
    folder = data_dir / "chem" if data_dir else None
    fit = potential_energy.load(folder)["H2O, 3-4-1 network"]
    net = problems.teacher_network(0, features=(3, 4, 1))
    x, y = jnp.asarray(fit.x, jnp.float32), jnp.asarray(fit.y, jnp.float32)
    return lambda key: replace(net, x=x, y=y)


def function(problem: problems.Problem) -> Task:
    """Flipped, shifted and rotated; the height above the minimum."""

    def draw(key: jax.Array) -> problems.Problem:
        return problems.randomize(problem, key, rotated=True)

    def height(data: Any, instance: Any, x: Any, _: Any = None) -> jax.Array:
        return instance.fun(x) - problem.minimum

    return Task(
        draw,
        problem.init,
        height,
        lambda *args: {"loss": height(*args)},
        methods=FUNCTIONS,
        rates=(0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
        steps=1000,
        tuning=20,
    )


ONE, ELASTIC = Method(1), Method(4, gamma=0.1)
SIXTEEN = Method(16, gamma=0.1)
MAIN = {
    "one model": ONE,
    "one, 16x steps": ONE._replace(sequential=16),
    "one, 16x steps, constant rate": ONE._replace(sequential=16, constant=1),
    "independent 16": Method(16),
    "elastic 16": SIXTEEN,
    "elastic 16, normalised": SIXTEEN._replace(normalize=1),
    "elastic 4": ELASTIC,
    "elastic 4, normalised": ELASTIC._replace(normalize=1),
    "elastic 4, gamma .03": ELASTIC._replace(gamma=0.03),
    "elastic 4, gamma .3": ELASTIC._replace(gamma=0.3),
}
PAIR = {
    "elastic 2": Method(2, gamma=0.1),
    "elastic 2, normalised": Method(2, gamma=0.1, normalize=1),
    "elastic 2, gamma .03": Method(2, gamma=0.03),
    "elastic 2, gamma .3": Method(2, gamma=0.3),
}
PRANAM = {"pranam 16": Method(16, before=True, step=1, coupled=0.3)}
DETAILS = {
    "one model, normalised": ONE._replace(normalize=1),
    "one, 4x steps": ONE._replace(sequential=4),
    "independent 4": Method(4),
    "elastic 8": Method(8, gamma=0.1),
    "elastic 8, normalised": Method(8, gamma=0.1, normalize=1),
    "elastic 4, gamma .01": ELASTIC._replace(gamma=0.01),
    "elastic 4, gamma 1": ELASTIC._replace(gamma=1),
    "elastic 4, gamma .03, normalised": ELASTIC._replace(gamma=0.03, normalize=1),
    "elastic 4, gamma .3, normalised": ELASTIC._replace(gamma=0.3, normalize=1),
    "elastic 16, gamma .03": SIXTEEN._replace(gamma=0.03),
    "elastic 16, gamma .3": SIXTEEN._replace(gamma=0.3),
    "elastic 16, gamma .3, normalised": SIXTEEN._replace(gamma=0.3, normalize=1),
    "elastic 4, released": ELASTIC._replace(release=1),
    "elastic 16, released": SIXTEEN._replace(release=1),
    "elastic 4, tied": ELASTIC._replace(tied=1),
    "elastic 4, growing": ELASTIC._replace(grow=1),
    "elastic 4, growing to 1": ELASTIC._replace(grow=1, gamma=1),
    "elastic 16, width 4": SIXTEEN._replace(width=4),
    **{
        f"elastic 4, every {k}, gamma {g}": ELASTIC._replace(every=k, gamma=g)
        for k in (4, 16, 64)
        for g in (0.1, 0.3, 0.6, 0.9)
    },
}
CONV = PAIR | {
    "one model": ONE,
    "one, 4x steps": ONE._replace(sequential=4),
    "one, 4x steps, constant rate": ONE._replace(sequential=4, constant=1),
    "independent 4": Method(4),
    **{k: m for k, m in MAIN.items() if k.startswith("elastic 4")},
    "elastic 4, growing": ELASTIC._replace(grow=1),
    "elastic 4, growing to 1": ELASTIC._replace(grow=1, gamma=1),
    "pranam 4": Method(4, before=True, step=1, coupled=0.3),
}
_NORMAL = Method(32, normalize=1)
MODELS = {
    "independent": Method(32),
    "normalised": _NORMAL,
    **{
        f"elastic {g:g}, {release:.0%}": _NORMAL._replace(gamma=g, release=release)
        for g, release in (
            *((0.01, 0.1), (0.01, 0.2), (0.03, 0.1), (0.03, 0.2), (0.03, 0.6)),
            (0.1, 0.2),
        )
    },
    "half elastic 0.03, 20%": _NORMAL._replace(gamma=0.03, release=0.2, free=0.5),
    "half elastic 0.1, 20%": _NORMAL._replace(gamma=0.1, release=0.2, free=0.5),
    **{
        f"width 4, {g:g}, {release:.0%}": _NORMAL._replace(
            gamma=g, release=release, width=4
        )
        for g, release in ((0.01, 0.2), (0.03, 0.2), (0.1, 0.2), (0.1, 0.6))
    },
    "pranam": Method(32, before=True),
}
CONFIRMED = (
    *("independent", "normalised", "width 4, 0.01, 20%"),
    *("elastic 0.01, 20%", "elastic 0.03, 20%", "pranam"),
)
_BOTH = Method(64, before=True, release=0.6)
FUNCTIONS = {
    "independent": Method(64),
    "normalised": Method(64, normalize=1),
    "elastic .03": Method(64, normalize=1, gamma=0.03, release=0.6),
    "pranam": _BOTH,
    **{f"pranam, elastic {g:g}": _BOTH._replace(gamma=g) for g in (0.01, 0.03, 0.1)},
    "own step": _BOTH._replace(step=1, own=1),
    "own step .5": _BOTH._replace(step=0.5, own=1),
    "own step, elastic .03": _BOTH._replace(step=1, own=1, gamma=0.03),
    "own step .5, elastic .03": _BOTH._replace(step=0.5, own=1, gamma=0.03),
}


def make_tasks(data_dir: Path | None) -> dict[str, Task]:
    """In the order in which they matter."""
    data = load_mnist(data_dir / "mnist" if data_dir else None)
    batch = {"examples": 2048, "steps": 1000}

    tasks = {
        "MNIST 10-10": mnist(
            dense(10, 10), data, methods=MAIN | PAIR | PRANAM | DETAILS, **batch
        )
    }
    for name, act in (("tanh", jnp.tanh), ("relu", jax.nn.relu)):
        for sizes in ((8, 16, 1), (5, 6, 6, 1), (4, 5, 1)):
            make = partial(problems.teacher_network, features=sizes, activation=act)
            tasks[f"{name} {'-'.join(map(str, sizes))}"] = regression(make, 1000)
    tasks["polynomial"] = regression(problems.polynomial_fit, 1000)
    tasks["Morse, tanh 3-16-16-1"] = regression(morse, 2000)._replace(
        rates=(0.05, 0.1, 0.15, 0.2, 0.3), tuning=10
    )
    tasks["H2O, tanh 3-4-1"] = regression(water(data_dir), 1000)
    methods = MAIN | PAIR | PRANAM
    tasks["MNIST 20-20"] = mnist(dense(20, 20), data, methods=methods, **batch)
    for name, make_function in (
        ("Schwefel", lambda dim: problems.bound(problems.schwefel(dim))),
        ("Rastrigin", problems.rastrigin),
        ("Levy", problems.levy),
        ("Styblinski-Tang", problems.styblinski_tang),
        ("Ackley", problems.ackley),
        ("Griewank", problems.griewank),
        ("Michalewicz", lambda dim: problems.bound(problems.michalewicz(dim))),
    ):
        tasks[name] = function(make_function(30))
    for name in ("momentum", "RMSProp", "AdamW"):
        methods = {k: m._replace(optimizer=name) for k, m in MAIN.items()}
        task = mnist(dense(10, 10), data, methods=methods, **batch)
        tasks[f"MNIST 10-10, {name}"] = task
    conv = convolutional((4, 4, 8), (3, 2, 16))
    tasks["MNIST conv"] = mnist(conv, data, methods=CONV, examples=512, steps=2000)
    large = ("one model", "one, 4x steps", "elastic 4", "elastic 4, normalised")
    tasks["MNIST conv, 2048 examples"] = mnist(
        conv,
        data,
        methods={k: CONV[k] for k in large},
        examples=2048,
        steps=2000,
    )._replace(rates=(0.06, 0.125, 0.25, 0.5))
    return tasks


def arrays(methods: Sequence[Method]) -> Method:
    """The numbers of several methods, stacked, and None for what is static."""
    columns = [
        np.array(column, np.float32)
        for column in zip(*(m[5:] for m in methods), strict=True)
    ]
    numbers: Any = Method(*[None] * 5, *columns)  # type: ignore[arg-type]
    return numbers._replace(every=numbers.every.astype(np.int32))


class Job(NamedTuple):
    """The methods of a task that share a program."""

    task: str
    names: tuple[str, ...]
    arguments: tuple[Any, ...]
    compiled: Callable[[], Any]


def make_job(
    name: str, task: Task, static: Method, names: Sequence[str], seeds: Sequence[int]
) -> Job:
    methods = [task.methods[k] for k in names for _ in task.rates]
    rates = np.tile(np.array(task.rates, np.float32), len(names))
    run = partial(train, task, static)
    program = jax.vmap(jax.vmap(run, (None, 0, 0, None)), (None, None, None, 0))
    arguments = (
        task.data,
        arrays(methods),
        rates,
        jax.vmap(jax.random.key)(np.array(seeds)),
    )
    return Job(
        name,
        tuple(names),
        arguments,
        lambda: jax.jit(program).lower(*arguments).compile(),
    )


def run_all(tasks: dict[str, Task], out: Path, minutes: float, threads: int) -> int:
    """Compiles side by side and runs one after the other, until time is up.

    Returns how many programs failed.
    """
    begin = time.perf_counter()
    jobs, failures = [], 0
    for name, task in tasks.items():
        groups: dict[Method, list[str]] = {}
        for k, method in task.methods.items():
            groups.setdefault(Method(*method[:5]), []).append(k)
        seeds = [*range(task.report), *range(1000, 1000 + task.tuning)]
        jobs += [make_job(name, task, *group, seeds) for group in groups.items()]
    full = [job for job in jobs if "width" not in job.names[0]]
    jobs = full + [job for job in jobs if job not in full]
    results: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(job.compiled) for job in jobs]
        for job, future in zip(jobs, waiting, strict=True):
            label = f"{job.task}: {job.names[0]}"
            if time.perf_counter() - begin > 60 * minutes:
                print(f"no time for {label}")
                future.cancel()
                continue
            task = tasks[job.task]
            try:
                program = future.result()
                start = time.perf_counter()
                found = jax.device_get(program(*job.arguments))
            except Exception as error:
                print(f"{label} failed: {str(error)[:500]}", flush=True)
                failures += 1
                if failures > 2 and not results:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise SystemExit("nothing runs here") from error
                continue
            now = time.perf_counter()
            seconds[label] = [round(now - start, 2), round(now - begin, 1)]
            print(label, *seconds[label], flush=True)
            row = results.setdefault(job.task, {"rates": task.rates, "methods": {}})
            row["seeds"] = [*range(task.report), *range(1000, 1000 + task.tuning)]
            for i, k in enumerate(job.names):
                part = slice(i * len(task.rates), (i + 1) * len(task.rates))
                row["methods"][k] = {
                    measure: [
                        [float(f"{x:.5g}") for x in line[part]] for line in values
                    ]
                    for measure, values in found.items()
                }
            about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
            everything = {"about": about, "seconds": seconds, "tasks": results}
            partial_file = out.with_suffix(".partial")
            partial_file.write_text(json.dumps(everything))
            partial_file.rename(out)
    return failures


def confirm(tasks: dict[str, Task], results: dict[str, Any]) -> dict[str, Any]:
    """Results of the `CONFIRMED` methods on seeds from 2000, at the chosen rates.

    The tuning seeds keep what they have, so that they choose the same rates.
    """
    tables, confirmed = load(results), {}
    for name, task in tasks.items():
        before = results["tasks"][name]
        tuning = [i for i, seed in enumerate(before["seeds"]) if seed >= 1000]
        seeds = [*range(2000, 2000 + task.report)]
        row = {
            "rates": before["rates"],
            "seeds": [before["seeds"][i] for i in tuning] + seeds,
            "methods": {},
        }
        for method in CONFIRMED:
            measures = ("mean loss", "best loss")
            rates = sorted({tables[name].cell(method, m).rate for m in measures})
            columns = [before["rates"].index(rate) for rate in rates]
            job = make_job(
                name,
                task._replace(rates=tuple(rates)),
                Method(*task.methods[method][:5]),
                [method],
                seeds,
            )
            found = jax.device_get(job.compiled()(*job.arguments))
            row["methods"][method] = {}
            for m in measures:
                new = np.full((len(seeds), len(before["rates"])), np.nan)
                new[:, columns] = found[m]
                old = [before["methods"][method][m][i] for i in tuning]
                row["methods"][method][m] = old + new.tolist()
        confirmed[name] = row
        print(name, flush=True)
    return {"about": {"device": jax.devices()[0].device_kind}, "tasks": confirmed}


def small(task: Task) -> Task:
    """The same in seconds."""
    return task._replace(
        steps=8,
        tuning=1,
        report=2,
        rates=task.rates[2:4],
        examples=task.examples // 32,
        data=jax.tree.map(lambda x: x[:2000], task.data),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="holds mnist/ and chem/")
    stages = ("run", "tables", "all", "confirm")
    parser.add_argument("--stage", choices=stages, default="all")
    parser.add_argument("--out", type=Path, default=Path("elastic.json"))
    parser.add_argument("--tasks", nargs="*", help="only these")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no job later")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.stage != "tables":
        tasks = make_tasks(args.data_dir)
        if args.quick:
            args.tasks = args.tasks or ["tanh 4-5-1", "Ackley"]
            tasks = {name: small(task) for name, task in tasks.items()}
        if args.tasks:
            tasks = {name: tasks[name] for name in args.tasks}
        if args.stage == "confirm":
            before = json.loads(args.out.read_text())
            models = {k: t for k, t in tasks.items() if t.methods is MODELS}
            args.out = args.out.with_stem(f"{args.out.stem}_confirmed")
            args.out.write_text(json.dumps(confirm(models, before)))
        elif run_all(tasks, args.out, args.minutes, args.threads):
            raise SystemExit("not every program ran")
    if args.stage != "run":
        print_tables(json.loads(args.out.read_text()))


if __name__ == "__main__":
    main()
