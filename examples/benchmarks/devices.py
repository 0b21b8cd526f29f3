"""What replicas that are spread over devices communicate, and what they hold.

    python examples/benchmarks/devices.py
    python examples/benchmarks/devices.py --train 512                # 13 GB of memory
    python examples/benchmarks/devices.py --train 512 --processes 4

Reads from the compiled program of an update on 1 to 8 devices how many bytes it sums
over devices and in how many sums, and compares them with (K + 2) n for n bytes of
params of a model. `--train` takes steps with so many networks of a million weights on 8
devices of the CPU, and prints what each device holds beside what a formula expects.
"""

import argparse
import math
import re
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from speed import MLP

import pranam_optax

WIDTH = 4  # of the default embedding
NBYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


class Traffic(NamedTuple):
    """Bytes and sums of one update."""

    nbytes: int
    sums: int


def collectives(hlo: str) -> list[tuple[str, int]]:
    """Kind and number of bytes of every collective in compiled HLO."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = []
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", hlo):
        arrays = re.findall(r"(f32|s32|u32|pred)\[([\d,]*)\]", shapes)
        sizes = [
            NBYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
            for dtype, dims in arrays
        ]
        found.append((kind, sum(sizes)))
    return found


def compile_update(tx: Any, params: Any, num_devices: int) -> str:
    """HLO of an update whose replicas are spread over so many devices."""
    mesh = jax.make_mesh((num_devices,), ("replicas",))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec("replicas")))
    state = jax.jit(tx.init)(params)
    compiled = jax.jit(tx.update).lower(params, state, params).compile()
    return compiled.as_text() or ""


def measure(sizes: tuple[int, ...], num_replicas: int, num_devices: int) -> Traffic:
    """Collectives in the compiled update of a model with leaves of these sizes."""
    params: Any = pranam_optax.replicate(
        lambda key: [jax.random.normal(key, (size,)) for size in sizes],
        0,
        num_replicas,
    )
    found = collectives(compile_update(pranam_optax.pranam(), params, num_devices))
    return Traffic(sum(nbytes for _, nbytes in found), len(found))


def of_a_device(tree: Any) -> int:
    """Bytes that the first device of this process holds."""
    device = jax.local_devices()[0]
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == device)


def train(num_replicas: int, num_steps: int) -> None:
    """Steps of mini-batches with replicas spread over all devices."""
    model, batch = MLP((900, 300)), 16
    mesh = jax.make_mesh((jax.device_count(),), ("replicas",))
    spread, everywhere = (
        NamedSharding(mesh, PartitionSpec(*names)) for names in (("replicas",), ())
    )
    x = jax.random.uniform(jax.random.key(0), (batch, 784))
    y = jnp.arange(batch) % 10
    x, y = jax.device_put((x, y), everywhere)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    grad_fn = pranam_optax.replica_value_and_grad(loss)
    tx = optax.chain(pranam_optax.pranam(step_size=1.0), optax.adam(1e-3))

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        values, grads = grad_fn(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, values.mean()

    # Each device draws its own replicas: no device has room for all.
    seeds = jax.device_put(np.arange(num_replicas), spread)
    init = jax.vmap(lambda s: model.init(jax.random.key(s), jnp.zeros((1, 784))))
    params = jax.jit(init, out_shardings=spread)(seeds)
    state = jax.jit(tx.init)(params)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x, y).compile()
    held, memory = of_a_device((params, state)), program.memory_analysis()
    found = collectives(program.as_text() or "")
    losses, began = [], time.perf_counter()
    for _ in range(num_steps):
        params, state, value = program(params, state, x, y)
        losses.append(float(value))
    seconds = (time.perf_counter() - began) / num_steps
    model_size = 4 * sum(x.size for x in jax.tree.leaves(params)) // num_replicas
    # Params, two moments and codes of its replicas, and heads and bias.
    expected = 3 * model_size * num_replicas // jax.device_count()
    expected += (WIDTH + 1) * model_size + 4 * WIDTH * num_replicas
    if jax.process_index() == 0:
        print(
            f"| {jax.process_count()} | {jax.device_count()} | {num_replicas} "
            f"| {held / 1e6:.0f} MB, {expected / 1e6:.0f} MB "
            f"| {memory.temp_size_in_bytes / 1e6:.0f} MB "  # type: ignore[union-attr]
            f"| {sum(nbytes for _, nbytes in found) / 1e6:.1f} MB in {len(found)}, "
            f"{(WIDTH + 2) * model_size / 1e6:.1f} MB "
            f"| {losses[0]:.3f} to {losses[-1]:.3f} | {seconds:.1f} s |"
        )


def start_processes(arguments: list[str], num_processes: int) -> None:
    """This program again, in so many processes."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [sys.executable, __file__, *arguments, "--port", str(port)]
    processes = [
        subprocess.Popen([*command, "--process-id", str(i)])
        for i in range(num_processes)
    ]
    if any([process.wait() for process in processes]):
        raise SystemExit("a process has failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=int, help="so many replicas")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="fewer devices")
    args = parser.parse_args()
    if args.processes > 1 and args.port is None:
        start_processes(sys.argv[1:], args.processes)
        return
    jax.config.update("jax_num_cpu_devices", 8 // args.processes)
    if args.train:
        if args.processes > 1:
            address = f"localhost:{args.port}"
            jax.distributed.initialize(address, args.processes, args.process_id)
        train(args.train, args.steps)
        return

    sizes = 6000, 60, 600, 10
    model = (WIDTH + 2) * 4 * sum(sizes)
    print("| devices | replicas | sums | bytes | (K + 2) n |")
    print("| --- | --- | --- | --- | --- |")
    cases = [(d, 16) for d in ((2,) if args.quick else (1, 2, 4, 8))]
    if not args.quick:
        cases += [(8, 64), (8, 256)]
    for num_devices, num_replicas in cases:
        traffic = measure(sizes, num_replicas, num_devices)
        print(
            f"| {num_devices} | {num_replicas} | {traffic.sums} | {traffic.nbytes:,} "
            f"| {model:,} |"
        )


if __name__ == "__main__":
    main()
