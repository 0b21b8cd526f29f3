"""Replicas spread over devices: the same numbers, and every shard stays in place."""

import devices
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pranam_optax
from conftest import (
    assert_close,
    assert_stable,
    make_both,
    make_mesh,
    make_params,
    refused,
    shard,
)

R = 8


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


PRANAM = pranam_optax.pranam(coupling=0.8)
made = pranam_optax.mlp_embedding().apply
REPARAMETRIZE = pranam_optax.reparametrize(optax.sgd(1e-2))
PLANE = pranam_optax.mlp_embedding((2,))
X = jnp.linspace(-1.0, 1.0, 2 * R * 3).reshape(2 * R, 3)


@pytest.mark.parametrize(
    ("axis_type", "transformation", "model_axis"),
    [
        ("Auto", PRANAM, None),
        ("Auto", REPARAMETRIZE, "model"),
        ("Auto", pranam_optax.elastic_averaging(0.3, every=2), None),
        ("Explicit", PRANAM, "model"),
        ("Explicit", REPARAMETRIZE, None),
        ("Explicit", pranam_optax.elastic_averaging(0.3), "model"),
        ("Explicit", pranam_optax.elastic_averaging(0.3, PLANE, every=2), None),
    ],
)
def test_sharded_replicas_equal_the_others_and_keep_their_shardings(
    axis_type, transformation, model_axis
):
    tx = optax.chain(transformation, optax.scale(-1e-2))
    grad_fn = pranam_optax.replica_value_and_grad(loss)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(params)
        _, grads = grad_fn(params, X)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(params):
        run = [(params, jax.jit(tx.init)(params))]
        for _ in range(3):
            run.append(step(*run[-1]))
        return run

    expected, *_ = run(make_params(R))[-1]
    sharded = run(shard(make_params(R), make_mesh(axis_type), model_axis))
    assert len(traces) == 2  # one for each
    assert_close(sharded[-1][0], expected, 1e-4, 1e-5)
    assert_stable(sharded[0], sharded[-1])

    # One code per replica lives with its replica; the heads live with the model.
    state, width = sharded[-1][1][0], 1 if model_axis else 2
    assert state.nonfinite.sharding.shard_shape((R,)) == (R // 2,)
    if state.phi.heads:
        k = len(state.phi.heads["b"])
        assert state.phi.table.sharding.shard_shape((R, k)) == (R // 2, k)
        assert state.phi.heads["w"].sharding.shard_shape((k, 3, 2)) == (k, 3, width)


@pytest.mark.optimized
def test_traffic_is_the_heads_and_one_model_whatever_r():
    """A sum over replicas of K + 1 models, their mean, and a few scalars."""

    def collectives(num_replicas, num_devices=8):
        params = make_params(num_replicas)
        return devices.collectives(devices.compile_update(PRANAM, params, num_devices))

    found = collectives(16)
    model = 4 * (3 * 2 + 1)
    assert {kind for kind, _ in found} == {"all-reduce"}
    total = sum(size for _, size in found)
    assert 6 * model < total < 6 * model + 4 * 120
    assert collectives(64) == found
    assert collectives(16, num_devices=2) == found


@pytest.mark.optimized
def test_no_device_holds_all_replicas_while_init_fits_them():
    """Not their weights: a block of 32, and what R codes and their products take."""
    num_replicas = 64
    params = shard(make_params(num_replicas), jax.make_mesh((8,), ("replicas",)))
    state, program = PRANAM.init(params), jax.jit(PRANAM.init).lower(params).compile()
    found = devices.collectives(program.as_text())
    model = 4 * (3 * 2 + 1)
    sums = [size for kind, size in found if kind == "all-reduce"]
    gathered = [size for kind, size in found if kind == "all-gather"]
    assert max(sums) < 32 * model + 40
    assert max(gathered) == 4 * num_replicas**2
    alone = PRANAM.init(make_params(num_replicas))
    assert_close(made(state.phi), made(alone.phi), 1e-5, 1e-5)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_gradients_that_lie_elsewhere(axis_type):
    mesh = make_mesh(axis_type)
    grads = jax.device_put(make_params(R), NamedSharding(mesh, PartitionSpec()))
    params = shard(make_params(R), mesh)
    state = jax.eval_shape(PRANAM.init, make_params(R))
    message = r"updates\['b'\] and params\['b'\] .* axis 0"
    refused(message, PRANAM.update, grads, state, params)
    if axis_type == "Explicit":
        message = r"sharded as \(\) and"
        refused(message, jax.eval_shape, PRANAM.update, grads, state, params)


# All public functions, mostly on explicit axes, the default of `jax.make_mesh`


def ladder():
    return jnp.linspace(0.0, 1.0, R)


def first_update(tx, **keywords):
    return lambda params, grads: tx.update(grads, tx.init(params), params, **keywords)


def schedule(params, grads):
    rungs = ladder()  # an array that the transformation closes over
    tx = pranam_optax.pranam(
        coupling=lambda count: rungs / (1 + count.astype(jnp.float32))
    )
    return first_update(tx)(params, grads)


def revive(params, grads):
    values = jnp.where(ladder() > 0, ladder(), jnp.nan)  # the first is dead
    state = PRANAM.init(params)
    return pranam_optax.revive_replicas(
        params, state, 1, values=values, noise=jnp.asarray(0.5)
    )


def resample(params, grads):
    state = optax.TraceState(grads)
    pull = jnp.asarray(0.9)
    return pranam_optax.resample_replicas(params, state, ladder(), pull=pull)


def split_batch(params, grads):
    return pranam_optax.replica_value_and_grad(loss, batch="split")(params, X)


CASES = {
    "schedule": schedule,
    "injected": first_update(
        optax.inject_hyperparams(pranam_optax.pranam, static_args=("key",))(
            coupling=optax.linear_schedule(0.5, 0.0, 9), step_size=2.0
        )
    ),
    "reparametrize": first_update(
        pranam_optax.reparametrize(optax.polyak_sgd()),
        **{"value": 2.0, "value_fn": jnp.sum, "other": [1, True]},
    ),
    "elastic_averaging": first_update(pranam_optax.elastic_averaging(0.1)),
    "revive": revive,
    "resample": resample,
    "split batch": split_batch,
    "average": lambda params, grads: pranam_optax.average_replicas(params),
    "best": lambda params, grads: pranam_optax.best_replica(params, -ladder()),
    "select": lambda params, grads: [
        pranam_optax.select_replica(params, index) for index in (-2, jnp.array(3))
    ],
    "metrics": lambda params, grads: pranam_optax.replica_metrics(
        params, PRANAM.init(params), ladder(), grads
    ),
}


AUTO = [("average", "Auto"), ("resample", "Auto")]
TOLERANCES = {"average": (1e-5,), "resample": (1e-6,)}


@pytest.mark.parametrize(
    ("name", "axis_type"), [*AUTO, *((name, "Explicit") for name in CASES)]
)
def test_public_functions(name, axis_type, optax_promotion):
    mesh, arguments = make_mesh(axis_type), make_both(R)
    expected = jax.jit(CASES[name])(*arguments)
    sharded = shard(arguments, mesh, "model")
    results = [jax.jit(CASES[name])(*sharded)]
    with jax.set_mesh(mesh):
        results.append(CASES[name](*sharded))
    for result in results:
        assert_close(result, expected, *TOLERANCES.get(name, (1e-3, 1e-4)))
        for path, x in jax.tree_util.tree_leaves_with_path(result):
            shape = x.sharding.shard_shape(x.shape)
            if x.shape[:1] == (R,):
                assert shape[0] == R // 2, path
            if name in ("best", "select") and x.ndim:
                assert shape[-1] == 1, path
