"""Killed, moved to other devices, or changed: what a checkpoint must survive or say."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pranam_optax

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import checkpointing  # noqa: E402

NUM_STEPS, SAVE_EVERY = 60, 4


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the example as a program; all share the programs that they compile."""
    cache = tmp_path_factory.mktemp("cache")

    def start(directory, num_devices=1):
        return subprocess.Popen(
            [
                sys.executable,
                ROOT / "examples" / "checkpointing.py",
                f"--directory={directory}",
                f"--steps={NUM_STEPS}",
                f"--save-every={SAVE_EVERY}",
            ],
            env={
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process):
    """The steps and the digests that a run prints first and last."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    first, *_, last = output.splitlines()
    step, start_digest = first.removeprefix("step ").split(": ")
    return int(step), start_digest, last.removeprefix("done: ")


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    step, _, digest = finish(start(directory))
    assert step == 0
    return directory, digest


@pytest.mark.parametrize("num_runs", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_with_the_same_bits(
    num_runs, start, undisturbed, tmp_path
):
    rng, resumed_at = random.Random(num_runs), []
    for number in range(num_runs):
        directory = tmp_path / str(number)
        with start(directory) as process:
            for _ in range(rng.randint(2, NUM_STEPS // SAVE_EVERY - 2)):
                assert process.stdout.readline().startswith("step ")
            time.sleep(rng.uniform(0, 0.02))  # between steps, in a step, in a save
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        step, _, digest = finish(start(directory))
        assert step < NUM_STEPS
        assert digest == undisturbed[1]
        resumed_at.append(step)
    assert num_runs == 1 or len(set(resumed_at)) > 3
    print(f"{num_runs} runs killed, resumed at steps {resumed_at}")


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 8])
def test_a_run_moves_to_other_devices(num_devices, start, undisturbed, tmp_path):
    directory, digest = undisturbed
    assert finish(start(directory, num_devices)) == (NUM_STEPS, digest, digest)
    # And from there to one device.
    _, _, digest = finish(start(tmp_path, num_devices))
    assert finish(start(tmp_path)) == (NUM_STEPS, digest, digest)


# In this process


def make_tree(num_replicas=8, features=(3,), num_devices=1, scale=1.0):
    """Params, state and keys of a run, with replicas over some devices."""
    devices = np.array(jax.devices()[:num_devices])
    sharding = NamedSharding(
        jax.sharding.Mesh(devices, "replicas"), PartitionSpec("replicas")
    )
    grid = np.arange(2 * num_replicas).reshape(num_replicas, 2)
    params = {"w": jax.device_put(scale * jnp.sin(grid), sharding)}
    # Noise has a key in its state.
    embedding = pranam_optax.mlp_embedding(features, warmup="none")
    tx = optax.chain(
        pranam_optax.pranam(embedding), optax.add_noise(0.1, 0.5, 0), optax.adam(0.1)
    )
    return checkpointing.Run(params, tx.init(params), jnp.int32(5), jax.random.key(7))


@pytest.fixture
def manager(tmp_path):
    with ocp.CheckpointManager(
        tmp_path, item_handlers=ocp.StandardCheckpointHandler()
    ) as manager:
        yield manager


def test_a_checkpoint_is_restored_to_other_devices(manager):
    saved = make_tree(num_devices=8)
    checkpointing.save(manager, 5, saved)
    manager.wait_until_finished()
    for num_devices in (8, 2, 1):
        like = make_tree(num_devices=num_devices, scale=2.0)
        restored = checkpointing.restore(manager, 5, like)
        assert jax.tree.structure(restored) == jax.tree.structure(saved)
        chex.assert_trees_all_equal_dtypes(restored, saved)
        assert checkpointing.digest(restored) == checkpointing.digest(saved)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        chex.assert_trees_all_close(
            pranam_optax.embedding_output(restored.state),
            pranam_optax.embedding_output(saved.state),
            rtol=1e-6,
        )


def test_what_changed_is_named(manager):
    checkpointing.save(manager, 5, make_tree())
    manager.wait_until_finished()

    def changes(**kwargs):
        with pytest.raises(ValueError, match="the checkpoint is of another") as error:
            like = jax.eval_shape(lambda: make_tree(**kwargs))
            checkpointing.restore(manager, 5, like)
        return str(error.value).splitlines()[1:]

    phi = ".state[0].embedding[<flat index 0>][0]"
    assert sorted(changes(features=(4,))) == [
        f"  {phi}.heads['w'] is float32[3, 2] there, float32[4, 2] here",
        f"  {phi}.table is float32[8, 3] there, float32[8, 4] here",
    ]
    assert sorted(changes(num_replicas=16)) == [
        "  .params['w'] is float32[8, 2] there, float32[16, 2] here",
        f"  {phi}.table is float32[8, 3] there, float32[16, 3] here",
        "  .state[0].nonfinite is int32[8] there, int32[16] here",
        "  .state[0].revived is int32[8] there, int32[16] here",
        "  .state[2][0].mu['w'] is float32[8, 2] there, float32[16, 2] here",
        "  .state[2][0].nu['w'] is float32[8, 2] there, float32[16, 2] here",
    ]
    assert sorted(changes(features=(3, 3))) == [
        f"  {phi}.trunk[0].bias is missing there, float32[3] here",
        f"  {phi}.trunk[0].kernel is missing there, float32[3, 3] here",
    ]
