"""What pranam costs: a training step and an update, against Adam alone.

    python examples/benchmarks/speed.py
    python examples/benchmarks/speed.py --quick

First both sides of four settings, then an update of twice the replicas and of twice the
weights. All run in turns in one process; times are the least of many. Ratios are what
carries over to other machines. The floor is the time in which the arrays that Adam's
update has to read and write (gradients, params and two moments; params and two
moments) could be copied once.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import pranam_optax
from pranam_optax import problems


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
}
QUICK: dict[str, Callable[[], Setting]] = {
    "MNIST 784-10-10-10, R = 4": lambda: network(MLP((10, 10)), 4, 32),
    "function, 100-D, R = 8": lambda: function(100, 8),
}


class Program(NamedTuple):
    compiled: Any
    seconds: float
    arguments: tuple[Any, ...]


def compile_program(fun: Callable[..., Any], *args: Any) -> Program:
    """`fun(params, state, rest)` with params and state donated."""
    lowered = jax.jit(fun, donate_argnums=(0, 1)).lower(*args)
    start = time.perf_counter()
    compiled = lowered.compile()
    return Program(compiled, time.perf_counter() - start, jax.tree.map(jnp.copy, args))


def interleave(programs: dict[str, Program], seconds: float) -> dict[str, float]:
    """Least time of each, running them in turns."""
    held = {name: program.arguments for name, program in programs.items()}
    least = dict.fromkeys(programs, float("inf"))
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - start < seconds:
        rounds += 1
        for name, program in programs.items():
            params, state, rest = held[name]
            before = time.perf_counter()
            params, state = jax.block_until_ready(program.compiled(params, state, rest))
            least[name] = min(least[name], time.perf_counter() - before)
            held[name] = params, state, rest
    return least


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes read plus bytes written, per second, of a scaled copy in place."""
    x = jnp.ones(num_bytes // 4)
    double = jax.jit(lambda x: 2 * x, donate_argnums=0).lower(x).compile()
    least = float("inf")
    for _ in range(20):
        before = time.perf_counter()
        x = jax.block_until_ready(double(x))
        least = min(least, time.perf_counter() - before)
    return 2 * x.nbytes / least


def make_update(tx: Any) -> Callable[..., Any]:
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return update


def make_transformations() -> dict[str, Any]:
    release = optax.linear_schedule(1.0, 0.0, 1000)
    adam = optax.adam(1e-3)
    return {
        "adam": adam,
        "pranam": optax.chain(pranam_optax.pranam(coupling=release), adam),
    }


def doubling(dim: int, num_replicas: int, seconds: float) -> str:
    """How the time of an update grows with the weights and with the replicas."""
    tx = make_transformations()["pranam"]
    programs = {}
    for name, shape in {
        "": (num_replicas, dim),
        "twice the replicas": (2 * num_replicas, dim),
        "twice the weights": (num_replicas, 2 * dim),
    }.items():
        params = jax.random.normal(jax.random.key(0), shape)
        state = jax.jit(tx.init)(params)
        programs[name] = compile_program(make_update(tx), params, state, params)
    least = interleave(programs, seconds)
    ratios = [f"{name} {least[name] / least['']:.2f}" for name in list(least)[1:]]
    return f"R = {num_replicas}, {dim:,} weights: time of {', of '.join(ratios)}"


def measure(setting: Setting, seconds: float) -> dict[str, dict[str, Any]]:
    """Rows "step" and "update": everything about Adam alone and behind pranam."""
    transformations = make_transformations()
    grad_fn = pranam_optax.replica_value_and_grad(setting.loss)
    grads = jax.jit(grad_fn)(setting.params, setting.batch)[1]
    states = {
        name: jax.jit(tx.init)(setting.params) for name, tx in transformations.items()
    }
    held = nbytes(setting.params)
    floor = 7 * held / copy_bandwidth(held)

    def make_step(tx: Any) -> Callable[..., Any]:
        update = make_update(tx)
        return lambda params, state, batch: update(
            params, state, grad_fn(params, batch)[1]
        )

    rows: dict[str, dict[str, Any]] = {}
    for row, make, rest in (
        ("step", make_step, setting.batch),
        ("update", make_update, grads),
    ):
        programs = {
            name: compile_program(make(tx), setting.params, states[name], rest)
            for name, tx in transformations.items()
        }
        least = interleave(programs, seconds)
        rows[row] = {
            "floor": floor,
            "state": (nbytes(states["pranam"]) - nbytes(states["adam"])) / held,
        }
        for name, program in programs.items():
            cost = program.compiled.cost_analysis()
            memory = program.compiled.memory_analysis()
            rows[row][name] = {
                "time": least[name],
                "compile": program.seconds,
                "flops": cost["flops"],
                "bytes": cost["bytes accessed"],
                "temporary": memory.temp_size_in_bytes,
                "params": held,
            }
    return rows


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = [
        "| setting | | Adam | pranam + Adam | ratio | floor | flops | bytes "
        "| temporary memory / params | state of pranam / params | compile time |",
        "| --- |" + " --- |" * 10,
    ]
    for setting, rows in results.items():
        for row, r in rows.items():
            adam, ours = r["adam"], r["pranam"]
            lines.append(
                f"| {setting} | {row} | {adam['time'] * 1e3:.2f} ms "
                f"| {ours['time'] * 1e3:.2f} ms | {ours['time'] / adam['time']:.2f} "
                f"| {r['floor'] * 1e3:.2f} ms "
                f"| {ours['flops'] / adam['flops']:.2f} "
                f"| {ours['bytes'] / adam['bytes']:.2f} "
                f"| {adam['temporary'] / adam['params']:.2f}, "
                f"{ours['temporary'] / ours['params']:.2f} | {r['state']:.3f} "
                f"| {ours['compile'] / adam['compile']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    parser.add_argument("--quick", action="store_true", help="small, to try the code")
    args = parser.parse_args()
    settings = QUICK if args.quick else SETTINGS
    results = {
        name: measure(make(), 0.2 if args.quick else 10.0)
        for name, make in tqdm(settings.items(), unit="setting")
    }
    print("\nColumns from flops on are ratios of pranam + Adam to Adam, if not said.\n")
    print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)")
    print(table(results))
    print()
    for dim in (1_000,) if args.quick else (1_000, 10_000, 100_000):
        print(doubling(dim, 16, 0.2 if args.quick else 10.0))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
