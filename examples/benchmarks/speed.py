"""What pranam costs: a training step and an update, against Adam alone.

Beside them elastic averaging, a wrapper of Optax that users accept, and a floor: one
copy of the params.

    python examples/benchmarks/speed.py
    python examples/benchmarks/speed.py --against ../before    # another checkout
    python examples/benchmarks/speed.py --quick

Programs run in turns, those of another checkout in a process of its own; times are the
least of many. Ratios are what carries over to other machines.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from tqdm import tqdm

import pranam_optax
from pranam_optax import problems

HERE = Path(__file__).resolve().parents[2]


class Setting(NamedTuple):
    """R replicas of a model, and the loss of one on a batch."""

    params: Any
    loss: Callable[[Any, Any], jax.Array]
    batch: Any


class ConvNet(nn.Module):
    """About 100,000 parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(x.reshape(-1, 28, 28, 1)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(60)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class MLP(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def network(model: nn.Module, num_replicas: int, batch_size: int) -> Setting:
    x_key, y_key, key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.uniform(x_key, (batch_size, 784))
    y = jax.random.randint(y_key, (batch_size,), 0, 10)

    def loss(params: Any, batch: Any) -> jax.Array:
        logits: Any = model.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    params = pranam_optax.replicate(
        lambda key: model.init(key, x[:1]), key, num_replicas
    )
    return Setting(params, loss, (x, y))


def function(dim: int, num_replicas: int) -> Setting:
    problem = problems.rastrigin(dim)
    params = pranam_optax.replicate(problem.init, 0, num_replicas)
    return Setting(params, lambda x, batch: problem.fun(x), ())


SETTINGS: dict[str, Callable[[], Setting]] = {
    "MNIST 784-20-20-10, R = 64": lambda: network(MLP((20, 20)), 64, 128),
    "conv net, 100 k, R = 16": lambda: network(ConvNet(), 16, 128),
    "MLP, 1 M, R = 16": lambda: network(MLP((900, 300)), 16, 128),
    "function, 1000-D, R = 64": lambda: function(1000, 64),
    # From 1e4 to 1e7 weights in all.
    "function, 1000-D, R = 16": lambda: function(1000, 16),
    "function, 10,000-D, R = 16": lambda: function(10_000, 16),
    "function, 10,000-D, R = 128": lambda: function(10_000, 128),
    "function, 10,000-D, R = 1000": lambda: function(10_000, 1000),
    "function, 100,000-D, R = 16": lambda: function(100_000, 16),
    "function, 625,000-D, R = 16": lambda: function(625_000, 16),
}
QUICK: dict[str, Callable[[], Setting]] = {
    "function, 100-D, R = 8": lambda: function(100, 8),
}
ROWS = "step", "update"
# Of an update, by the names of its scopes.
PARTS = "alive", "rms", "projection_step"


def pranam_adam() -> Any:
    release = optax.linear_schedule(1.0, 0.0, 1000)
    return optax.chain(pranam_optax.pranam(coupling=release), optax.adam(1e-3))


def elastic_adam() -> Any:
    return optax.chain(optax.adam(1e-3), pranam_optax.elastic_averaging(0.1))


def schedule_free_adam() -> Any:
    return optax.contrib.schedule_free_adamw(1e-3)


SIDES: dict[str, Callable[[], Any]] = {
    "Adam": lambda: optax.adam(1e-3),
    "pranam + Adam": pranam_adam,
    "elastic": elastic_adam,
    "schedule-free": schedule_free_adam,
    "copy": optax.identity,
}
# Those that are compared with an older checkout.
COMPARED = "Adam", "pranam + Adam"


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@cache
def prepare(setting: str) -> tuple[Setting, Any]:
    """A setting and its gradients."""
    made = {**SETTINGS, **QUICK}[setting]()
    grad_fn = pranam_optax.replica_value_and_grad(made.loss)
    return made, jax.jit(grad_fn)(made.params, made.batch)[1]


class Program:
    """A compiled step or update, its arguments, and what is known of it."""

    def __init__(self, setting: str, row: str, side: str) -> None:
        made, grads = prepare(setting)
        tx = SIDES[side]()
        grad_fn = pranam_optax.replica_value_and_grad(made.loss)

        def update(params: Any, state: Any, grads: Any) -> Any:
            if side == "copy":
                return jax.tree.map(lambda x: 1.001 * x, params), state
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def step(params: Any, state: Any, batch: Any) -> Any:
            return update(params, state, grad_fn(params, batch)[1])

        fun, self._rest = (step, made.batch) if row == "step" else (update, grads)
        # Donated in every run.
        self._held = jax.tree.map(
            jnp.copy, (made.params, jax.jit(tx.init)(made.params))
        )
        jax.clear_caches()
        start = time.perf_counter()
        jitted = jax.jit(fun, donate_argnums=(0, 1))
        self._compiled = jitted.lower(*self._held, self._rest).compile()
        cost: Any = self._compiled.cost_analysis()
        memory: Any = self._compiled.memory_analysis()
        self.facts = {
            "compile": time.perf_counter() - start,
            "flops": cost["flops"],
            "bytes": cost["bytes accessed"],
            "temporary": memory.temp_size_in_bytes,
            "state": nbytes(self._held[1]),
            "params": nbytes(made.params),
        }

    def scopes(self) -> dict[str, str]:
        """Of each kernel, the scope of the operation that it computes."""
        text = self._compiled.as_text() or ""
        return dict(re.findall(r'%(\S+) = .*op_name="([^"]*)"', text))

    def run(self) -> float:
        """Seconds of one run."""
        before = time.perf_counter()
        self._held = jax.block_until_ready(self._compiled(*self._held, self._rest))
        return time.perf_counter() - before


def serve() -> None:
    """Compiles and runs the programs that the standard input asks for."""
    programs: dict[str, Program] = {}
    # Answers have the standard output for themselves.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        verb, *words = json.loads(line)
        answer: Any
        if verb == "where":
            answer = pranam_optax.__file__
        elif verb == "run":
            answer = programs[words[0]].run()
        else:
            setting, row, side = words
            programs[side] = Program(setting, row, side)
            answer = programs[side].facts
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A process that measures the package of one checkout."""

    def __init__(self, checkout: Path) -> None:
        # Compilation is measured: nothing may come out of a cache.
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        where = Path(self.ask("where"))
        if not where.is_relative_to(checkout):
            raise SystemExit(f"there is no pranam_optax in {checkout}; found {where}")

    def ask(self, *words: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process that was asked for {words} has ended")
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate()


Facts = dict[str, Any]


def measure(
    workers: Sequence[Worker],
    sides: Iterable[str],
    setting: str,
    row: str,
    seconds: float,
    compilations: int,
) -> list[dict[str, Facts]]:
    """What is known of all sides, of each worker; all of them take turns."""
    found: list[dict[str, Facts]] = [{} for _ in workers]
    turns = [
        (w, f, side) for w, f in zip(workers, found, strict=True) for side in sides
    ]
    for _ in range(compilations):
        for worker, facts, side in turns:
            new = worker.ask("compile", setting, row, side)
            old = facts.get(side, new)
            facts[side] = new | {"compile": min(new["compile"], old["compile"])}
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - start < seconds:
        rounds += 1
        for worker, facts, side in turns:
            taken = worker.ask("run", side)
            facts[side]["time"] = min(facts[side].get("time", taken), taken)
    return found


def profile(setting: str, side: str, num_runs: int = 20) -> dict[str, float]:
    """Milliseconds of the kernels of an update, by its parts."""
    # A program out of the cache may have the names of another one.
    jax.config.update("jax_enable_compilation_cache", False)
    program = Program(setting, "update", side)
    program.run()
    scopes = program.scopes()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(num_runs):
                program.run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    parts = dict.fromkeys((*PARTS, ""), 0.0)
    for event in (e for plane in data.planes for x in plane.lines for e in x.events):
        kernel = dict(event.stats).get("hlo_op")
        scope = scopes.get(str(kernel), "")
        part = next((p for p in PARTS if f"/{p}/" in scope), "")
        parts[part] += event.duration_ns / num_runs / 1e6 if kernel else 0.0
    return parts


def profile_line(setting: str) -> str:
    adam = sum(profile(setting, "Adam").values())
    parts = profile(setting, "pranam + Adam")
    parts[""] -= adam
    times = " | ".join(f"{ms:.2f} ms" for ms in (adam, *parts.values()))
    return f"| {setting} | {times} |"


HEADER = (
    "| setting | | Adam | pranam + Adam | ratio | elastic | schedule-free | copy "
    "| flops | bytes | temporary memory / params | state of pranam / params "
    "| compile time |\n| --- |" + " --- |" * 12
)
HEADER_AGAINST = (
    "| setting | | before | after | ratio | compile time before | after | ratio "
    "| ratio of Adam alone |\n| --- |" + " --- |" * 8
)


def line(setting: str, row: str, facts: dict[str, Facts]) -> str:
    adam, ours = (facts[side] for side in COMPARED)
    held = ours["params"]

    def ratio(name: str, side: str = "pranam + Adam") -> str:
        return f"{facts[side][name] / adam[name]:.2f}"

    return (
        f"| {setting} | {row} | {adam['time'] * 1e3:.2f} ms "
        f"| {ours['time'] * 1e3:.2f} ms | {ratio('time')} "
        f"| {ratio('time', 'elastic')} | {ratio('time', 'schedule-free')} "
        f"| {ratio('time', 'copy')} "
        f"| {ratio('flops')} | {ratio('bytes')} "
        f"| {adam['temporary'] / held:.2f}, {ours['temporary'] / held:.2f} "
        f"| {(ours['state'] - adam['state']) / held:.3f} | {ratio('compile')} |"
    )


def line_against(setting: str, row: str, found: Sequence[dict[str, Facts]]) -> str:
    (adam, old), (same, new) = ([facts[side] for side in COMPARED] for facts in found)
    return (
        f"| {setting} | {row} | {old['time'] * 1e3:.2f} ms "
        f"| {new['time'] * 1e3:.2f} ms | {new['time'] / old['time']:.2f} "
        f"| {old['compile']:.2f} s | {new['compile']:.2f} s "
        f"| {new['compile'] / old['compile']:.2f} | {same['time'] / adam['time']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout: ratios to it")
    parser.add_argument("--settings", nargs="*", help="their names; default all")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each line")
    parser.add_argument("--compilations", type=int, default=3, help="of each program")
    parser.add_argument(
        "--profile", action="store_true", help="an update, by its parts"
    )
    parser.add_argument("--quick", action="store_true", help="small, to try the code")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    settings = args.settings or list(QUICK if args.quick else SETTINGS)
    if args.quick:
        args.seconds, args.compilations = 0.2, 1
    sides = COMPARED if args.against else tuple(SIDES)
    if args.profile:
        names = "Adam", *PARTS, "the rest: masks, T, P and U"
        print(f"| setting | {' | '.join(names)} |\n| --- |" + " --- |" * len(names))
        for setting in settings:
            print(profile_line(setting), flush=True)
        return
    checkouts = [HERE] if args.against is None else [args.against.resolve(), HERE]
    workers = [Worker(checkout) for checkout in checkouts]
    print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)")
    lines = [HEADER_AGAINST if args.against else HEADER]
    for setting in tqdm(settings, unit="setting"):
        for row in ROWS:
            found = measure(
                workers, sides, setting, row, args.seconds, args.compilations
            )
            if args.against:
                lines.append(line_against(setting, row, found))
            else:
                lines.append(line(setting, row, found[0]))
    for worker in workers:
        worker.close()
    print(
        "\nElastic averaging, schedule-free Adam and a copy of the params: ratios of "
        "times to Adam's. Columns from flops on: of pranam + Adam to Adam, if not said."
        if not args.against
        else ""
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
