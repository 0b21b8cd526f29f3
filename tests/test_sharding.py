"""Replicas spread over devices: the same numbers, and every shard stays in place."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pranam_optax

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        (4, 2), ("replicas", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def make_params():
    return pranam_optax.replicate(
        lambda key: {
            "w": jax.random.normal(key, (6, 4)),
            "b": jax.random.normal(key, (4,)),
        },
        0,
        16,
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

    def make_step():
        @jax.jit
        def step(params, state):
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
    assert sharded_step._cache_size() == 1
    chex.assert_trees_all_close(sharded, params, rtol=1e-4, atol=1e-5)

    # One code per replica lives with its replica; the heads live with the model.
    phi = sharded_state[0].embedding.args[0]
    assert phi.table.sharding.shard_shape(phi.table.shape) == (4, 4)
    assert sharded_state[0].nonfinite.sharding.shard_shape((16,)) == (4,)
    columns = 4 // (2 if "model" in model_spec["w"] else 1)
    heads = phi.heads["w"]
    assert heads.sharding.shard_shape(heads.shape) == (4, 6, columns)


def test_no_device_gathers_the_replicas(mesh):
    """All a step communicates is as small as one model's params, K + 2 times."""
    sharding = NamedSharding(mesh, PartitionSpec("replicas"))
    params = jax.device_put(make_params(), sharding)
    tx = pranam_optax.pranam()
    state = jax.jit(tx.init)(params)
    text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    assert "all-reduce" in text
    np.testing.assert_array_equal(state.nonfinite, np.zeros(16))
