"""Replicas spread over devices: the same numbers, and every shard stays in place."""

import re
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pranam_optax

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]

import devices  # noqa: E402
from devices import collectives  # noqa: E402

pytestmark = pytest.mark.optimized


@pytest.fixture(
    scope="module", params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
def mesh(request):
    return jax.make_mesh((4, 2), ("replicas", "model"), axis_types=(request.param,) * 2)


def make_params(num_replicas=16):
    return pranam_optax.replicate(
        lambda key: {
            "w": jax.random.normal(key, (6, 4)),
            "b": jax.random.normal(key, (4,)),
        },
        0,
        num_replicas,
    )


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2)


def specs(tree):
    return [x.sharding for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    "transformation",
    [
        pranam_optax.pranam(coupling=0.8),
        pranam_optax.reparametrize(optax.sgd(1e-2)),
    ],
    ids=["pranam", "reparametrize"],
)
@pytest.mark.parametrize(
    "model_spec",
    [
        {"w": PartitionSpec("replicas"), "b": PartitionSpec("replicas")},
        {
            "w": PartitionSpec("replicas", None, "model"),
            "b": PartitionSpec("replicas", "model"),
        },
    ],
)
def test_sharded_replicas_equal_the_others_and_keep_their_shardings(
    mesh, model_spec, transformation
):
    params, x = make_params(), jax.random.normal(jax.random.key(1), (5, 6))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), model_spec)
    sharded = jax.tree.map(jax.device_put, params, shardings)
    tx = optax.chain(transformation, optax.scale(-1e-2))
    grad_fn = pranam_optax.replica_value_and_grad(loss)

    traces = []

    def make_step():
        @jax.jit
        def step(params, state):
            traces.append(params)
            _, grads = grad_fn(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    step, sharded_step = make_step(), make_step()
    state, sharded_state = jax.jit(tx.init)(params), jax.jit(tx.init)(sharded)
    for _ in range(3):
        params, state = step(params, state)
        new_params, new_state = sharded_step(sharded, sharded_state)
        for old, new in ((sharded, new_params), (sharded_state, new_state)):
            for a, b, leaf in zip(
                specs(old), specs(new), jax.tree.leaves(new), strict=True
            ):
                assert a.is_equivalent_to(b, leaf.ndim), (a, b)
        sharded, sharded_state = new_params, new_state
    assert len(traces) == 2  # one for each
    chex.assert_trees_all_close(sharded, params, rtol=1e-4, atol=1e-5)

    # One code per replica lives with its replica; the heads live with the model.
    phi = sharded_state[0].embedding.args[0]
    assert phi.table.sharding.shard_shape(phi.table.shape) == (4, 4)
    assert sharded_state[0].nonfinite.sharding.shard_shape((16,)) == (4,)
    columns = 4 // (2 if "model" in model_spec["w"] else 1)
    heads = phi.heads["w"]
    assert heads.sharding.shard_shape(heads.shape) == (4, 6, columns)


def compile_update(tx, num_replicas, num_devices=8):
    return devices.compile_update(tx, make_params(num_replicas), num_devices)


def test_traffic_is_the_heads_and_one_model_whatever_r():
    """A sum over replicas of K + 1 models, their mean, and a few scalars."""
    tx = pranam_optax.pranam()
    text = compile_update(tx, 16)
    model = 4 * (6 * 4 + 4)
    assert {kind for kind, _ in collectives(text)} == {"all-reduce"}
    total = sum(size for _, size in collectives(text))
    assert 6 * model < total < 6 * model + 4 * 120
    assert collectives(compile_update(tx, 64)) == collectives(text)
    assert collectives(compile_update(tx, 16, num_devices=2)) == collectives(text)


def test_between_projections_nothing_is_communicated():
    text = compile_update(pranam_optax.pranam(projection_every=4), 16)
    branch = re.search(r"conditional\(.*", text).group()
    names = re.findall(r"(?:true|false)_computation=%([\w.]+)", branch)
    names += re.findall(r"%([\w.]+)", branch.split("branch_computations")[-1])
    computations = dict(re.findall(r"\n%([\w.]+) \(.*?\{\n(.*?)\n\}", text, re.DOTALL))
    projecting = [name for name in names if collectives(computations.get(name, ""))]
    assert len(projecting) == 1
    assert collectives(computations[projecting[0]]) == collectives(text)


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_devices_agree(num_devices, optax_promotion):
    mesh = jax.make_mesh((num_devices,), ("replicas",))
    params = pranam_optax.shard_replicas(make_params(), mesh)
    tx = optax.chain(
        pranam_optax.pranam(coupling=optax.linear_schedule(1.0, 0.0, 30)),
        optax.adam(1e-2),
    )
    x = jax.random.normal(jax.random.key(1), (5, 6))
    grad_fn = pranam_optax.replica_value_and_grad(loss)

    @jax.jit
    def step(params, state):
        _, grads = grad_fn(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    alone, state = make_params(), jax.jit(tx.init)(make_params())
    spread = jax.jit(tx.init)(params)
    for _ in range(30):
        alone, state = step(alone, state)
        params, spread = step(params, spread)
    chex.assert_trees_all_close(params, alone, atol=1e-5)


def test_gradients_inside_shard_map():
    """The recipe for code that is written for one shard of the replicas."""
    mesh = jax.make_mesh((8,), ("replicas",))
    spec = PartitionSpec("replicas")
    params, x = make_params(), jax.random.normal(jax.random.key(1), (5, 6))
    tx = pranam_optax.pranam()
    local = pranam_optax.replica_value_and_grad(loss)
    grad_fn = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )

    @jax.jit
    def step(params, state):
        return tx.update(grad_fn(params, x)[1], state, params)[0]

    spread = pranam_optax.shard_replicas(params, mesh)
    expected = tx.update(local(params, x)[1], tx.init(params), params)[0]
    chex.assert_trees_all_close(step(spread, tx.init(spread)), expected, atol=1e-5)


def test_shard_replicas_says_what_is_wrong():
    mesh = jax.make_mesh((8,), ("replicas",))
    with pytest.raises(ValueError, match=r"no axis 'models'.*\('replicas',\)"):
        pranam_optax.shard_replicas(make_params(), mesh, "models")
    with pytest.raises(ValueError, match=r"12 replicas cannot .* over the 8 devices"):
        pranam_optax.shard_replicas(make_params(12), mesh)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_gradients_that_lie_elsewhere(axis_type):
    mesh = jax.make_mesh((8,), ("replicas",), axis_types=(axis_type,))
    grads = jax.device_put(make_params(), NamedSharding(mesh, PartitionSpec()))
    params = pranam_optax.shard_replicas(make_params(), mesh)
    tx = pranam_optax.pranam()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"updates\['b'\] and params\['b'\] .* axis 0"):
        tx.update(grads, state, params)
    if axis_type == AxisType.Explicit:
        with pytest.raises(ValueError, match=r"sharded as \(\) and"):
            jax.jit(tx.update)(grads, state, params)
