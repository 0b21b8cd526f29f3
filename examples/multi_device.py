"""Replicas spread over devices, in one process or in several.

    python examples/multi_device.py                # 8 host devices if there is only one
    python examples/multi_device.py --directory run --coordinator localhost:1234 \\
        --num-processes 2 --process-id 0           # and another with --process-id 1

`jax.device_put` spreads the replicas, and jit does the rest: a step computes the
gradients of each replica where it lies, and communicates sums over replicas alone. With
`--directory` a run goes on from its last checkpoint, on as many processes as there are
now. When a process is lost the others say so and stop.
"""

import argparse
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from checkpointing import restore
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import pranam_optax
from pranam_optax import problems


def train(
    directory: Path,
    *,
    num_steps: int,
    until: int,
    save_every: int,
    rate: float,
) -> dict[str, Any]:
    """Trains 64 replicas on the Ackley function; returns all params and losses."""
    problem = problems.randomize(problems.ackley(30), key=0)
    grad_fn = pranam_optax.replica_value_and_grad(problem.fun)
    release = optax.linear_schedule(1.0, 0.0, num_steps)
    tx = optax.chain(
        pranam_optax.pranam(coupling=release),
        optax.adam(optax.cosine_decay_schedule(rate, num_steps)),
    )

    mesh = jax.make_mesh((jax.device_count(),), ("replicas",))
    params = pranam_optax.replicate(problem.init, key=1, num_replicas=64)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec("replicas")))

    def step(run: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = run
        values, grads = grad_fn(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), values

    @jax.jit
    def advance(run: tuple[Any, Any]) -> tuple[tuple[Any, Any], jax.Array]:
        run, values = jax.lax.scan(step, run, length=save_every)
        return run, values[-1]

    gather = functools.partial(multihost_utils.process_allgather, tiled=True)
    run = params, jax.jit(tx.init)(params)
    with ocp.CheckpointManager(
        directory.resolve(), item_handlers=ocp.StandardCheckpointHandler()
    ) as manager:
        start = manager.latest_step() or 0
        if start:
            run = restore(manager, start, run)
        for i in range(start, until, save_every):
            run, last = advance(run)
            values = gather(last)
            manager.save(i + save_every, args=ocp.args.StandardSave(run))
            manager.wait_until_finished()
            print(f"step {i + save_every}: mean loss {values.mean():.3g}", flush=True)
    return {"params": gather(run[0]), "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--process-id", type=int, default=0)
    parser.add_argument("--devices", type=int, default=8, help="on a CPU")
    parser.add_argument("--directory", type=Path, help="of the checkpoints")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--until", type=int, help="stop after so many of the steps")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1.0, help="of learning")
    parser.add_argument("--output", type=Path, help="write the result as npz")
    parser.add_argument("--quick", action="store_true", help="200 steps")
    args = parser.parse_args()
    num_steps = 200 if args.quick else args.steps

    # Has no effect on accelerators.
    jax.config.update("jax_num_cpu_devices", args.devices // args.num_processes)
    if args.coordinator:
        jax.distributed.initialize(
            args.coordinator, args.num_processes, args.process_id
        )
    print(f"{jax.device_count()} devices, {jax.process_count()} processes", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            result = train(
                args.directory or Path(scratch),
                num_steps=num_steps,
                until=args.until or num_steps,
                save_every=args.save_every,
                rate=args.rate,
            )
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            print(
                f"process {args.process_id} stops, since another one was lost: start "
                "again, with fewer processes if need be, to go on from the last "
                f"checkpoint.\n{error}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # the usual way out would wait for the one that was lost
    if args.output and args.process_id == 0:
        np.savez(args.output, **result)


if __name__ == "__main__":
    main()
