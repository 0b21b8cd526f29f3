"""Training that may be killed at any moment and goes on where it was.

    python examples/checkpointing.py --directory run

Stop it, by Ctrl-C or SIGKILL, and start it again: the result has the bits of a run
that was never stopped. A checkpoint holds the params, the optimizer's state (the
embedding is in it), the step and the key of the mini-batches. Replicas are spread over
all devices; a run may be resumed on another number of them, though then sums are
rounded in another way.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr

import pranam_optax
from pranam_optax import problems


class Run(NamedTuple):
    """All that a training run needs in order to go on."""

    params: Any
    state: Any
    step: jax.Array
    key: jax.Array


def key_data(tree: Any) -> Any:
    """The tree with the integers of its keys, which is what Orbax stores."""
    return jax.tree.map(
        lambda x: (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        ),
        tree,
    )


def check_unchanged(saved: Any, tree: Any) -> None:
    """Raises an error that names the leaves in which a checkpoint differs from a tree.

    Orbax raises one too, but does not say which leaf it is about.

    Args:
      saved: the checkpoint's metadata, a tree of shapes and dtypes.
      tree: what is to be restored.
    """

    def describe(leaves: dict[str, Any], name: str) -> str:
        if name not in leaves:
            return "missing"
        return f"{leaves[name].dtype}{list(leaves[name].shape)}"

    there = {leaf.name: leaf for leaf in jax.tree.leaves(saved)}
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(key_data, tree))
    here = {keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    changes = [
        f"  {name} is {describe(there, name)} there, {describe(here, name)} here"
        for name in {**there, **here}
        if describe(there, name) != describe(here, name)
    ]
    if changes:
        raise ValueError(
            "the checkpoint is of another model, number of replicas, embedding or "
            "optimizer:\n" + "\n".join(changes)
        )


def restore(manager: ocp.CheckpointManager, step: int, tree: Any) -> Any:
    """A checkpoint in the structure of a tree of arrays, sharded as they are."""
    check_unchanged(manager.item_metadata(step).tree, tree)
    return manager.restore(step, args=ocp.args.StandardRestore(tree))


def train(
    directory: Path,
    *,
    num_steps: int = 2000,
    save_every: int = 100,
    num_replicas: int = 16,
    width: int = 4,
    seed: int = 0,
) -> Run:
    """Fits a small network to a random one of the same shape."""
    problem = problems.teacher_network(key=0)
    tx = optax.chain(
        pranam_optax.pranam(
            pranam_optax.mlp_embedding((width,)),
            coupling=optax.linear_schedule(1.0, 0.0, num_steps // 3),
        ),
        optax.adam(optax.cosine_decay_schedule(1e-2, num_steps)),
    )

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((problem.predict(params, x) - y) ** 2)

    value_and_grad = pranam_optax.replica_value_and_grad(loss)
    mesh = jax.make_mesh(
        (jax.device_count(),),
        ("replicas",),
        axis_types=(jax.sharding.AxisType.Auto,),
    )

    def start(key: jax.Array) -> Run:
        replica_key, key = jax.random.split(key)
        params = jax.lax.with_sharding_constraint(
            pranam_optax.replicate(problem.init, replica_key, num_replicas),
            NamedSharding(mesh, PartitionSpec("replicas")),
        )
        return Run(params, tx.init(params), jnp.zeros([], jnp.int32), key)

    @jax.jit
    def advance(run: Run) -> tuple[Run, jax.Array]:
        batch_key, key = jax.random.split(run.key)
        batch = jax.random.choice(batch_key, len(problem.x), (64,))
        values, grads = value_and_grad(run.params, problem.x[batch], problem.y[batch])
        updates, state = tx.update(grads, run.state, run.params)
        params = optax.apply_updates(run.params, updates)
        return Run(params, state, run.step + 1, key), values

    # The shardings of a step's result, so that the first step compiles like all others.
    run = jax.jit(start)(jax.random.key(seed))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(
        directory.resolve(),
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    ) as manager:
        latest = manager.latest_step()
        if latest is not None:
            run = restore(manager, latest, run)
        print(f"step {int(run.step)}: {digest(run)}", flush=True)
        while run.step < num_steps:
            run, values = advance(run)
            if run.step % save_every == 0 or run.step == num_steps:
                manager.save(int(run.step), args=ocp.args.StandardSave(run))
                print(f"step {int(run.step)}: loss {values.min():.2e}", flush=True)
        manager.wait_until_finished()
    return run


def digest(run: Run) -> str:
    """A checksum of all bits of a run."""
    leaves = jax.tree.leaves(key_data(run))
    data = b"".join(np.asarray(leaf).tobytes() for leaf in leaves)
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="of the checkpoints")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--width", type=int, default=4, help="of the embedding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="100 steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = train(
            args.directory or Path(scratch),
            num_steps=100 if args.quick else args.steps,
            save_every=10 if args.quick else args.save_every,
            num_replicas=args.replicas,
            width=args.width,
            seed=args.seed,
        )
    print(f"done: {digest(run)}")


if __name__ == "__main__":
    main()
