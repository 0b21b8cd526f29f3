import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import pranam_optax
from pranam_optax._embedding import projection_loss

R = 12


def make_params(scale=1.0, num_replicas=R):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "w": scale * jax.random.normal(keys[0], (num_replicas, 3, 2)) + 1.0,
        "b": scale * jax.random.normal(keys[1], (num_replicas,)),
    }


def as_matrix(tree):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def start(params, *args, seed=0, **kwargs):
    embedding = pranam_optax.mlp_embedding(*args, **kwargs)
    phi = embedding.init(jax.random.key(seed), params)
    return embedding, phi


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_fit_is_the_best_of_its_rank(width, use_bias):
    params = make_params()
    embedding, phi = start(params, (width,), use_bias=use_bias)
    weights = as_matrix(params)
    mean = weights.mean(0) if use_bias else 0 * weights.mean(0)
    u, s, vt = np.linalg.svd(weights - mean)
    expected = mean + (u[:, :width] * s[:width]) @ vt[:width]
    np.testing.assert_allclose(as_matrix(embedding.apply(phi)), expected, atol=1e-5)
    # The singular values are split evenly: table and heads have the same norms.
    np.testing.assert_allclose(
        np.linalg.norm(phi.table, axis=0) ** 2, s[:width], rtol=1e-4, atol=1e-4
    )
    heads = as_matrix(phi.heads)
    np.testing.assert_allclose(
        np.linalg.norm(heads, axis=1) ** 2, s[:width], rtol=1e-4, atol=1e-4
    )
    assert (phi.bias is None) == (not use_bias)


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_linear_fit_of_few_replicas_is_exact_and_can_still_be_learned(num_replicas):
    params = make_params(num_replicas=num_replicas)
    embedding, phi = start(params)
    chex.assert_trees_all_close(embedding.apply(phi), params, atol=1e-5)
    assert phi.table.shape == (num_replicas, 4)
    assert np.all(np.linalg.norm(phi.table, axis=0) > 0.1)  # no dead codes


def test_fit_of_very_different_scales():
    params = {"w": make_params()["w"] * 1e6, "b": make_params()["b"] * 1e-3}
    embedding, phi = start(params, (6,))
    output = embedding.apply(phi)
    np.testing.assert_allclose(output["w"], params["w"], rtol=1e-5, atol=5)
    for scale in (1e-18, 1e18):
        params = jax.tree.map(lambda x: x * scale, make_params())
        embedding, phi = start(params, (7,))
        chex.assert_trees_all_close(
            embedding.apply(phi), params, atol=1e-4 * scale, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("features", "output_activation"),
    [((4, 16), None), ((3, 8, 8), None), ((4,), jnp.tanh), ((2, 8), jax.nn.soft_sign)],
)
def test_fit_without_closed_form_beats_the_linear_embedding(
    features, output_activation
):
    params = make_params(0.3)
    params = jax.tree.map(lambda x: 0.5 * jnp.tanh(x), params)
    embedding, phi = start(params, features, output_activation=output_activation)
    error = as_matrix(embedding.apply(phi)) - as_matrix(params)
    linear, linear_phi = start(params, features[:1])
    linear_error = as_matrix(linear.apply(linear_phi)) - as_matrix(params)
    assert np.sum(error**2) < 1.02 * np.sum(linear_error**2)


def test_rescale_matches_the_variance_and_keeps_it_constant():
    params = make_params(5.0)
    embedding, phi = start(params, (4, 8), warmup="rescale", output_activation=jnp.tanh)
    drawn, drawn_phi = start(params, (4, 8), warmup="none", output_activation=jnp.tanh)
    output, raw = as_matrix(embedding.apply(phi)), as_matrix(drawn.apply(drawn_phi))
    np.testing.assert_allclose(output.var(), as_matrix(params).var(), rtol=1e-5)
    np.testing.assert_allclose(output, raw * output.std() / raw.std(), rtol=1e-4)
    grads = jax.grad(lambda phi: jnp.sum(embedding.apply(phi)["w"] ** 2))(phi)
    assert grads.scale == 0
    assert jnp.any(grads.heads["w"] != 0)


def test_adapter_matches_each_weights_mean_and_variance_and_learns():
    params = make_params(5.0)
    embedding, phi = start(params, warmup="adapter", output_activation=jnp.tanh)
    output = as_matrix(embedding.apply(phi))
    np.testing.assert_allclose(output.mean(0), as_matrix(params).mean(0), atol=1e-4)
    np.testing.assert_allclose(output.var(0), as_matrix(params).var(0), rtol=1e-4)
    grads = jax.grad(lambda phi: jnp.sum(embedding.apply(phi)["w"] ** 2))(phi)
    assert jnp.all(grads.scale["w"] != 0)
    assert jnp.all(grads.shift["w"] != 0)


def test_none_leaves_the_heads_as_drawn():
    constant = jax.nn.initializers.constant(0.5)
    embedding, phi = start(
        make_params(), (4, 8), warmup="none", kernel_init=constant, use_bias=False
    )
    for kernel in (phi.trunk[0].kernel, phi.heads["w"], phi.heads["b"]):
        assert jnp.all(kernel == 0.5)
    assert phi.trunk[0].kernel.shape == (4, 8)
    assert phi.heads["w"].shape == (8, 3, 2)
    assert phi.trunk[0].bias is None
    hidden = jax.nn.relu(phi.table.sum(axis=1) * 0.5)
    np.testing.assert_allclose(
        embedding.apply(phi)["b"], 8 * 0.5 * hidden, rtol=1e-5, atol=1e-6
    )


def test_output_equals_the_layers_written_out():
    params = make_params()
    embedding, phi = start(
        params,
        (3, 5),
        activation=jnp.tanh,
        output_activation=jax.nn.soft_sign,
        warmup="none",
    )
    hidden = np.tanh(phi.table @ phi.trunk[0].kernel + phi.trunk[0].bias[None])
    output = np.einsum("rh,hij->rij", hidden, phi.heads["w"]) + phi.bias["w"][None]
    output = output / (1 + np.abs(output))
    np.testing.assert_allclose(embedding.apply(phi)["w"], output, rtol=1e-5, atol=1e-6)


def test_activations_of_each_layer():
    params = make_params()
    embedding, phi = start(
        params, (3, 5, 2), activation=(jnp.tanh, jnp.sin), warmup="none"
    )
    hidden = np.tanh(phi.table @ phi.trunk[0].kernel + phi.trunk[0].bias[None])
    hidden = np.sin(hidden @ phi.trunk[1].kernel + phi.trunk[1].bias[None])
    output = hidden @ phi.heads["b"] + phi.bias["b"]
    np.testing.assert_allclose(embedding.apply(phi)["b"], output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", [[], [jnp.tanh], [jnp.tanh] * 3])
def test_activations_must_be_as_many_as_layers(activation):
    with pytest.raises(ValueError, match=r"activation has . entries, but .* 2 layers"):
        pranam_optax.mlp_embedding((3, 5, 2), activation=activation)


def test_key_draws_what_is_random():
    params = make_params()
    _, phi = start(params, warmup="none")
    _, same = start(params, warmup="none")
    _, other = start(params, warmup="none", seed=1)
    chex.assert_trees_all_equal(phi, same)
    assert jnp.all(phi.table != other.table)
    assert jnp.all(phi.heads["w"] != other.heads["w"])


@pytest.mark.parametrize("warmup", ["fit", "rescale", "adapter"])
@pytest.mark.parametrize("features", [(3,), (3, 4)])
def test_replicas_that_are_not_finite_have_no_part_in_the_warmup(warmup, features):
    params = make_params()

    def spoil(value):
        return {**params, "w": params["w"].at[5, 0, 0].set(value)}

    embedding, phi = start(spoil(jnp.nan), features, warmup=warmup)
    _, same = start(spoil(-jnp.inf), features, warmup=warmup)
    chex.assert_trees_all_equal(phi, same)
    chex.assert_tree_all_finite(embedding.apply(phi))
    if features == (3,) and warmup == "fit":
        rest = jax.tree.map(lambda x: jnp.delete(x, 5, axis=0), params)
        _, phi_rest = start(rest, features, warmup=warmup)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x: jnp.delete(x, 5, axis=0), embedding.apply(phi)),
            embedding.apply(phi_rest),
            atol=1e-5,
        )


def test_mixed_dtypes(x64):
    params = {
        "half": jnp.ones((4, 2), jnp.float16),
        "brain": jnp.ones((4, 2), jnp.bfloat16),
        "single": jnp.ones((4,), jnp.float32),
        "double": jnp.ones((4, 3, 1), jnp.float64),
    }
    expected = {"half": "f4", "brain": "f4", "single": "f4", "double": "f8"}
    for warmup in ("fit", "rescale", "adapter", "none"):
        embedding, phi = start(params, (3, 4), warmup=warmup)
        output = embedding.apply(phi)
        chex.assert_trees_all_equal_shapes(output, params)
        assert {k: x.dtype for k, x in output.items()} == expected
        assert {k: x.dtype for k, x in phi.heads.items()} == expected
        assert phi.table.dtype == jnp.float64


@pytest.mark.parametrize("warmup", ["fit", "rescale", "adapter", "none"])
def test_init_works_abstractly_and_under_jit(warmup):
    params = make_params()
    embedding, phi = start(params, (3, 4), warmup=warmup)
    key = jax.random.key(0)
    abstract = jax.eval_shape(embedding.init, key, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(phi, abstract)
    chex.assert_trees_all_close(jax.jit(embedding.init)(key, params), phi, rtol=1e-2)


def test_equal_embeddings_have_equal_apply_functions():
    first, second = (pranam_optax.mlp_embedding((4, 8)) for _ in range(2))
    assert first.apply == second.apply
    assert hash(first.apply) == hash(second.apply)
    assert first.apply != pranam_optax.mlp_embedding((4, 8, 8)).apply
    tanh = pranam_optax.mlp_embedding((4, 8), activation=jnp.tanh)
    assert first.apply != tanh.apply
    listed = pranam_optax.mlp_embedding((4, 8), activation=[jnp.tanh])
    assert listed.apply == tanh.apply


def test_projection_loss_is_the_literal_one():
    params = make_params()
    embedding, phi = start(params, (3, 4), activation=jnp.tanh)
    target = jax.tree.map(lambda x: x + 1, params)
    everyone = jnp.ones(R, bool)

    def literal(phi):
        output = embedding.apply(phi)
        return 0.5 * sum(
            jnp.sum((output[k] - jax.lax.stop_gradient(target[k])) ** 2) for k in output
        )

    np.testing.assert_allclose(
        projection_loss(embedding.apply, phi, target, everyone), literal(phi), rtol=1e-6
    )
    grads = jax.grad(lambda p: projection_loss(embedding.apply, p, target, everyone))
    chex.assert_trees_all_close(grads(phi), jax.grad(literal)(phi), rtol=1e-5)


@pytest.mark.parametrize("features", [(), (0,), (4, -1), (4.0,), (4, 0)])
def test_features_must_be_positive(features):
    with pytest.raises(ValueError, match="features must be one or more positive ints"):
        pranam_optax.mlp_embedding(features)


def test_unknown_warmup():
    with pytest.raises(ValueError, match="warmup must be 'fit', 'rescale', 'adapter'"):
        pranam_optax.mlp_embedding(warmup="warm")


def test_embedding_output_finds_the_embedding_in_nested_states():
    params = make_params()
    embedding, phi = start(params)
    expected = embedding.apply(phi)
    tx = pranam_optax.pranam(embedding)
    nested = optax.chain(
        optax.clip(1.0), optax.masked(optax.chain(tx, optax.sgd(1.0)), True)
    )
    multi_steps = optax.MultiSteps(optax.chain(tx, optax.adam(1.0)), 2)
    for transformation in (tx, nested, multi_steps):
        state = transformation.init(params)
        chex.assert_trees_all_close(pranam_optax.embedding_output(state), expected)
        output = jax.jit(pranam_optax.embedding_output)(state)
        chex.assert_trees_all_close(output, expected, rtol=1e-5)


def test_embedding_output_needs_exactly_one():
    params = make_params()
    with pytest.raises(ValueError, match="one embedding, found 0"):
        pranam_optax.embedding_output(optax.adam(1.0).init(params))
    two = optax.chain(pranam_optax.pranam(), pranam_optax.pranam())
    with pytest.raises(ValueError, match="one embedding, found 2"):
        pranam_optax.embedding_output(two.init(params))


def test_state_can_be_pickled_and_serialised_by_flax():
    params = make_params()
    tx = optax.chain(pranam_optax.pranam(), optax.adam(1.0))
    state = tx.init(params)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state)), state)
    other = tx.init(jax.tree.map(jnp.zeros_like, params))
    restored = serialization.from_bytes(other, serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
