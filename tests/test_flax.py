"""Flax modules between table and heads."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pranam_optax

R, K = 6, 3


def make_params():
    return pranam_optax.replicate(
        lambda key: {"w": jax.random.normal(key, (3, 2)), "b": jnp.ones(())}, 0, R
    )


class Identity(nn.Module):
    @nn.compact
    def __call__(self, table):
        return table


class Mixing(nn.Module):
    """Replicas look at each other's codes and are normalised over."""

    @nn.compact
    def __call__(self, table):
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)(table[None])
        return nn.tanh(nn.BatchNorm(use_running_average=False)(table + x[0]))


def init(embedding, params=None):
    params = make_params() if params is None else params
    return embedding.init(jax.random.key(0), params)


@pytest.mark.parametrize("warmup", ["rescale", "adapter"])
def test_the_identity_is_the_linear_embedding(warmup):
    ours = pranam_optax.flax_embedding(Identity(), width=K, warmup=warmup)
    linear = pranam_optax.mlp_embedding((K,), warmup=warmup)
    phi, expected = init(ours), init(linear)
    chex.assert_trees_all_close(phi._replace(trunk=()), expected, rtol=1e-6)
    chex.assert_trees_all_close(ours.apply(phi), linear.apply(expected), rtol=1e-6)


def test_dense_modules_are_the_multilayer_perceptron():
    mlp = pranam_optax.mlp_embedding((K, 5), warmup="none")
    module = nn.Sequential([nn.Dense(5), nn.relu])
    ours = pranam_optax.flax_embedding(module, width=K, warmup="none")
    phi, expected = init(ours), init(mlp)
    chex.assert_trees_all_equal_shapes(
        phi.trunk, {"layers_0": expected.trunk[0]._asdict()}
    )
    same = expected._replace(trunk={"layers_0": expected.trunk[0]._asdict()})
    chex.assert_trees_all_close(ours.apply(same), mlp.apply(expected), rtol=1e-5)


@pytest.mark.parametrize(
    "module",
    [Mixing(), nnx.bridge.to_linen(nnx.Linear, K, 5)],
    ids=["linen", "nnx"],
)
def test_modules_train_behind_pranam(module, assert_stable):
    params = make_params()
    embedding = pranam_optax.flax_embedding(module, width=K, warmup="rescale")
    tx = pranam_optax.pranam(embedding, step_size=0.0, projection_steps=4)
    state = start = tx.init(params)
    step, output_of = jax.jit(tx.update), jax.jit(pranam_optax.embedding_output)
    distances = []
    for _ in range(3):
        output = output_of(state)
        distances.append(
            sum(np.sum((output[name] - params[name]) ** 2) for name in params)
        )
        updates, new_state = step(params, state, params)
        assert_stable((params, state), (updates, new_state))
        state = new_state
    # With a step size of 0 the target is where the replicas are.
    assert distances[0] > 1.2 * distances[1] > 1.2 * distances[2]
    # The module itself is trained.
    old, new = (s.embedding.args[0].trunk for s in (start, state))
    assert any(
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    )


def test_modules_are_fitted_whatever_their_params_are_called(optax_promotion):
    # Attention has a param called "value", as has the state of L-BFGS.
    params, distances = make_params(), {}
    for warmup in ("rescale", "fit"):
        embedding = pranam_optax.flax_embedding(Mixing(), width=K, warmup=warmup)
        output = embedding.apply(init(embedding, params))
        distances[warmup] = sum(np.sum((output[k] - params[k]) ** 2) for k in params)
    assert distances["fit"] < 0.1 * distances["rescale"]


def test_equal_modules_make_equal_embeddings():
    def apply(width):
        return pranam_optax.flax_embedding(
            nn.Sequential([nn.Dense(width), nn.tanh])
        ).apply

    assert apply(5) == apply(5)
    assert hash(apply(5)) == hash(apply(5))
    assert apply(5) != apply(6)


def test_the_order_of_the_replicas_does_not_matter():
    embedding = pranam_optax.flax_embedding(Mixing(), width=K, warmup="none")
    phi = init(embedding)
    order = np.random.default_rng(0).permutation(R)
    apply = jax.jit(embedding.apply)
    permuted = apply(phi._replace(table=phi.table[order]))
    expected = jax.tree.map(lambda x: x[order], apply(phi))
    chex.assert_trees_all_close(permuted, expected, rtol=1e-5, atol=1e-6)


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="width must be a positive int, got 0"):
        pranam_optax.flax_embedding(Identity(), width=0)
    with pytest.raises(ValueError, match=r"warmup must be 'fit', .* got 'best'"):
        pranam_optax.flax_embedding(Identity(), warmup="best")

    class Mean(nn.Module):
        @nn.compact
        def __call__(self, table):
            return jnp.mean(table, axis=0)

    with pytest.raises(ValueError, match=r"features of shape \(4,\) .*\(6, H\)"):
        init(pranam_optax.flax_embedding(Mean()))
