"""Saved and restored, killed, moved to other devices: what a state must survive."""

import os
import pickle
import random
import signal
import time

import checkpointing
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import pranam_optax
from conftest import assert_same_bits, assert_stable, make_params, shard, start_example

NUM_STEPS, SAVE_EVERY = 60, 4
STATES = {
    "pranam": pranam_optax.pranam(),
    "deep": pranam_optax.pranam(pranam_optax.mlp_embedding((3, 4))),
    "mean": pranam_optax.pranam(pranam_optax.mlp_embedding(())),
    "chain": optax.chain(pranam_optax.pranam(), optax.adam(1e-3)),
    "elastic_averaging": pranam_optax.elastic_averaging(),
    "reparametrize": pranam_optax.reparametrize(optax.adam(1e-3)),
    "per_replica": pranam_optax.per_replica(optax.adam(1e-3)),
}


def numbers(shapes):
    """Numbers that are all different."""
    return jax.tree.map(
        lambda x: jnp.asarray(np.arange(x.size).reshape(x.shape) + 0.1, x.dtype), shapes
    )


# As they are


@pytest.fixture(scope="module")
def states():
    """A state of each transformation, with other numbers than `init` makes."""
    params = make_params()
    return {
        name: numbers(jax.eval_shape(tx.init, params)) for name, tx in STATES.items()
    }


def by_pickle(state, like, directory):
    return pickle.loads(pickle.dumps(state))


def by_flax(state, like, directory):
    return serialization.from_bytes(like, serialization.to_bytes(state))


def by_orbax(state, like, directory):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "state", like)


@pytest.mark.parametrize("method", [by_pickle, by_flax, by_orbax])
@pytest.mark.parametrize("name", STATES)
def test_states_are_restored_bit_for_bit(name, method, states, tmp_path):
    state = states[name]
    restored = method(state, jax.tree.map(jnp.zeros_like, state), tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same_bits(restored, state)


# By the example


@pytest.fixture
def manager(tmp_path):
    handlers = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        yield manager


def make_run(num_replicas=8, features=(3,), num_devices=1):
    """Params, state and keys of a run, with replicas over some devices."""
    # Noise has a key in its state.
    tx = optax.chain(
        pranam_optax.pranam(pranam_optax.mlp_embedding(features)),
        optax.add_noise(0.1, 0.5, 0),
        optax.adam(0.1),
    )

    @jax.jit
    def make(params):
        rest = jnp.int32(5), jax.random.key(7)
        return checkpointing.Run(params, tx.init(params), *rest)

    mesh = jax.make_mesh((num_devices,), ("replicas",))
    return make(shard(make_params(num_replicas), mesh))


def test_a_checkpoint_is_restored_to_other_devices(manager):
    saved = make_run(num_devices=8)
    manager.save(5, args=ocp.args.StandardSave(saved))
    manager.wait_until_finished()
    for num_devices in (8, 2):
        like = make_run(num_devices=num_devices)
        restored = checkpointing.restore(manager, 5, like)
        assert checkpointing.digest(restored) == checkpointing.digest(saved)
        assert_stable(like, restored)


def test_what_changed_is_named(manager):
    manager.save(5, args=ocp.args.StandardSave(make_run()))
    manager.wait_until_finished()

    def changes(**kwargs):
        like = jax.eval_shape(lambda: make_run(**kwargs))
        with pytest.raises(ValueError, match="the checkpoint is of another") as error:
            checkpointing.restore(manager, 5, like)
        _, *lines = str(error.value).splitlines()
        return dict(line.strip().split(" is ", 1) for line in lines)

    phi = "state.0.phi"
    wider = changes(features=(4,))
    assert wider.keys() == {f"{phi}.heads.w", f"{phi}.heads.b", f"{phi}.table"}
    assert wider[f"{phi}.table"] == "float32[8, 3] there, float32[8, 4] here"
    more = changes(num_replicas=16)
    assert more["params.b"] == "float32[8] there, float32[16] here"
    assert more["state.0.nonfinite"] == "int32[8] there, int32[16] here"
    assert f"{phi}.heads.w" not in more
    deeper = changes(features=(3, 3))
    assert deeper[f"{phi}.trunk.0.bias"] == "missing there, float32[3] here"


# The example as a program, killed


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the example as a program; all share the programs that they compile."""
    cache = tmp_path_factory.mktemp("cache")

    def start(directory, num_devices=1):
        return start_example(
            "checkpointing",
            f"--directory={directory}",
            f"--steps={NUM_STEPS}",
            f"--save-every={SAVE_EVERY}",
            **{
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                **os.environ,
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
            },
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


@pytest.mark.parametrize("num_runs", [1, pytest.param(6, marks=pytest.mark.slow)])
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
    assert num_runs == 1 or len(set(resumed_at)) > 2


@pytest.mark.slow
def test_a_run_moves_to_other_devices(start, undisturbed, tmp_path):
    directory, digest = undisturbed
    assert finish(start(directory, 8)) == (NUM_STEPS, digest, digest)
    # And from there to one device.
    _, _, digest = finish(start(tmp_path, 8))
    assert finish(start(tmp_path)) == (NUM_STEPS, digest, digest)
