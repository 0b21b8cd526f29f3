"""What only the TensorFlow program needs: warm-ups and activations of the output."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pranam_optax
from conftest import (
    as_matrix,
    assert_close,
    assert_equal,
    make_gradients,
    make_params,
    refused,
    scaled,
    spoil,
)
from pranam_optax import original

R = 12


@functools.cache
def compiled(features, warmup, output_activation=jnp.tanh, **kwargs):
    embedding = original.mlp_embedding(
        features, warmup=warmup, output_activation=output_activation, **kwargs
    )

    def start(params):
        phi = embedding.init(jax.random.key(0), params)
        squares = lambda phi: jnp.sum(embedding.apply(phi)["w"] ** 2)  # noqa: E731
        return phi, embedding.apply(phi), jax.grad(squares)(phi)

    return jax.jit(start)


def wide_params():
    return scaled(5, make_params(R))


def test_output_equals_the_layers_written_out():
    params = make_params()
    embedding = original.mlp_embedding(
        (3, 5),
        activation=jnp.tanh,
        output_activation=jax.nn.soft_sign,
        warmup="adapter",
    )
    shapes = jax.eval_shape(embedding.init, jax.random.key(0), params)
    phi = make_gradients(shapes)
    hidden = np.tanh(phi.table @ phi.trunk[0].kernel + phi.trunk[0].bias[None])
    output = np.tensordot(hidden, phi.heads["w"], 1) + phi.bias["w"][None]
    output = output / (1 + np.abs(output))
    output = output * phi.scale["w"][None] + phi.shift["w"][None]
    assert_close(embedding.apply(phi)["w"], output, 1e-5, 1e-6)


def test_rescale_matches_the_variance_and_keeps_it_constant():
    params = wide_params()
    _, output, grads = compiled((4,), "rescale")(params)
    _, drawn, _ = compiled((4,), "none")(params)
    output, drawn = as_matrix(output), as_matrix(drawn)
    assert_close(output.var(), as_matrix(params).var(), 1e-5)
    assert_close(output, drawn * output.std() / drawn.std(), 1e-4)
    assert grads.scale == 0
    assert jnp.any(grads.heads["w"] != 0)


def test_adapter_matches_each_weights_mean_and_variance_and_learns():
    params = wide_params()
    _, output, grads = compiled((4,), "adapter")(params)
    output, weights = as_matrix(output), as_matrix(params)
    assert_close(output.mean(0), weights.mean(0), 1e-7, 1e-4)
    assert_close(output.var(0), weights.var(0), 1e-4)
    assert jnp.all(grads.scale["w"] != 0)
    assert jnp.all(grads.shift["w"] != 0)


def test_none_leaves_the_layers_as_drawn():
    constant = jax.nn.initializers.constant(0.5)
    phi, output, _ = compiled((4, 8), "none", None, kernel_init=constant)(make_params())
    for kernel in (phi.trunk[0].kernel, phi.heads["w"], phi.heads["b"]):
        assert jnp.all(kernel == 0.5)
    hidden = jax.nn.relu(phi.table.sum(axis=1) * 0.5)
    assert_close(output["b"], 4 * hidden, 1e-5, 1e-6)


def test_fit_with_an_activation_of_the_output():
    params = jax.tree.map(lambda x: 0.5 * jnp.tanh(0.3 * x), make_params(R))
    _, output, _ = compiled((4,), "fit")(params)
    linear = pranam_optax.mlp_embedding()
    expected = linear.apply(linear.init(jax.random.key(0), params))
    error, error_of_linear = (
        np.sum((as_matrix(y) - as_matrix(params)) ** 2) for y in (output, expected)
    )
    assert error < 1.02 * error_of_linear


@pytest.mark.parametrize("warmup", ["fit", "rescale", "adapter"])
def test_replicas_that_are_not_finite_have_no_part_in_the_warmup(warmup):
    params = wide_params()
    phi, output, _ = compiled((4,), warmup)(spoil(params, 5, jnp.nan))
    same, *_ = compiled((4,), warmup)(spoil(params, 5, -jnp.inf))
    assert_equal(phi, same)
    chex.assert_tree_all_finite(output)


def test_unknown_warmup():
    message = "warmup must be 'fit', 'rescale', 'adapter'"
    refused(message, original.mlp_embedding, (4,), warmup="warm")
