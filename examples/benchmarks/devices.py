"""What replicas that are spread over devices communicate.

    python examples/benchmarks/devices.py

Reads from the compiled program of an update on 1 to 8 devices how many bytes it sums
over devices and in how many sums, and compares them with (K + 2) n for n bytes of
params of a model.
"""

import argparse
import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer devices")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)

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
