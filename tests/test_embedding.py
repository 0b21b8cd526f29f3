"""The network, its fit to the replicas, and what it refuses."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import (
    as_matrix,
    assert_close,
    assert_equal,
    make_gradients,
    make_params,
    mixed_params,
    refused,
    scaled,
    spoil,
    without,
)
from pranam_optax import mlp_embedding

R = 12
TANH = mlp_embedding((3, 4), activation=jnp.tanh)


@functools.partial(jax.jit, static_argnums=0)
def start_of(embedding, params, seed=0):
    """phi and the output for these params; compiled once for each shape of them."""
    phi = embedding.init(jax.random.key(seed), params)
    return phi, embedding.apply(phi)


def start(params, *args, seed=0, **kwargs):
    return start_of(mlp_embedding(*args, **kwargs), params, seed)


def test_output_equals_the_layers_written_out():
    params = make_params()
    embedding = mlp_embedding((3, 5, 2), activation=(jnp.tanh, jnp.sin))
    shapes = jax.eval_shape(embedding.init, jax.random.key(0), params)
    phi = make_gradients(shapes)
    hidden = np.tanh(phi.table @ phi.trunk[0].kernel + phi.trunk[0].bias[None])
    hidden = np.sin(hidden @ phi.trunk[1].kernel + phi.trunk[1].bias[None])
    output = jax.jit(embedding.apply)(phi)
    for name in params:
        expected = np.tensordot(hidden, phi.heads[name], 1) + phi.bias[name][None]
        assert_close(output[name], expected, 1e-5, 1e-6)


def test_drawn_parameters_have_the_shapes_of_the_layers():
    """One activation serves all layers; without bias there is none anywhere."""
    params = make_params()
    embedding = mlp_embedding((4, 8, 5), use_bias=False)
    phi = jax.eval_shape(embedding.init, jax.random.key(0), params)
    assert phi.table.shape == (6, 4)
    assert [layer.kernel.shape for layer in phi.trunk] == [(4, 8), (8, 5)]
    assert [layer.bias for layer in phi.trunk] == [None, None]
    assert phi.heads["w"].shape == (5, 3, 2)
    assert phi.heads["b"].shape == (5,)
    assert phi.bias is None


def test_mixed_dtypes(x64):
    params = mixed_params()
    expected = {"half": "f4", "brain": "f4", "single": "f4", "double": "f8"}
    for features in ((), (3,), (3, 4)):
        embedding = mlp_embedding(features)
        phi = jax.eval_shape(embedding.init, jax.random.key(0), params)
        output = jax.eval_shape(embedding.apply, phi)
        chex.assert_trees_all_equal_shapes(output, params)
        assert {k: x.dtype for k, x in output.items()} == expected
        assert {k: x.dtype for k, x in phi.bias.items()} == expected
        assert phi.table.dtype == jnp.float64


@pytest.mark.parametrize(("width", "use_bias"), [(1, True), (4, False), (7, True)])
def test_linear_fit_is_the_best_of_its_rank(width, use_bias):
    params = make_params(R)
    phi, output = start(params, (width,), use_bias=use_bias)
    weights = as_matrix(params)
    mean = weights.mean(0) if use_bias else 0 * weights.mean(0)
    u, s, vt = np.linalg.svd(weights - mean)
    expected = mean + (u[:, :width] * s[:width]) @ vt[:width]
    assert_close(as_matrix(output), expected, 1e-7, 1e-5)
    # The singular values are split evenly: table and heads have the same norms.
    for norms in (np.sum(phi.table**2, 0), np.sum(as_matrix(phi.heads) ** 2, 1)):
        assert_close(norms, s[:width], 1e-4, 1e-4)
    assert (phi.bias is None) == (not use_bias)


def test_linear_fit_of_very_many_replicas():
    """By random combinations of them."""
    weights = np.random.default_rng(0).normal(size=(1100, 5)) * [9, 5, 3, 0.1, 0.1]
    phi, output = start(jnp.asarray(weights, jnp.float32), (3,))
    mean = weights.mean(axis=0)
    u, s, vt = np.linalg.svd(weights - mean, full_matrices=False)
    expected = mean + (u[:, :3] * s[:3]) @ vt[:3]
    assert_close(output, expected, 1e-7, 2e-3)
    assert_close(np.linalg.norm(phi.table, axis=0) ** 2, s[:3], 1e-3)


def test_very_many_replicas_need_no_eigenvectors_of_all():
    """Up to 1024 they do; beyond, the time would grow with the cube of their number."""

    def sizes(num_replicas):
        embedding, params = mlp_embedding((3,)), jnp.ones((num_replicas, 5))
        program = jax.make_jaxpr(embedding.init)(jax.random.key(0), params)
        return re.findall(r"f32\[\d+,(\d+)\] .*= eigh\[", str(program))

    assert sizes(1024) == ["1024"]
    assert sizes(1025) == ["11"]  # 3 heads and 8 more


@pytest.mark.parametrize(("width", "products"), [(1, 0), (16, 0), (17, 1)])
def test_narrow_products_fuse_with_what_reads_them(width, products):
    """As sums of outer products; matrix products are arrays of the replicas' size."""
    embedding = mlp_embedding((width,), use_bias=False)
    phi = jax.eval_shape(embedding.init, jax.random.key(0), jnp.ones((R, 3)))
    program = str(jax.make_jaxpr(embedding.apply)(phi))
    assert program.count("dot_general[") == products


@pytest.mark.parametrize("features", [(), (0,)])
def test_without_features_it_is_the_mean(features):
    params = make_params(R)
    phi, output = start(spoil(params, 5, jnp.nan), features)
    assert phi.heads is None
    expected = as_matrix(without(params, 5)).mean(axis=0)
    assert_close(as_matrix(output), np.tile(expected, (R, 1)), 1e-5)


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_linear_fit_of_few_replicas_is_exact_and_can_still_be_learned(num_replicas):
    params = make_params(num_replicas)
    phi, output = start(params)
    assert_close(output, params, 1e-6, 1e-5)
    assert phi.table.shape == (num_replicas, 4)
    assert np.all(np.linalg.norm(phi.table, axis=0) > 0.1)  # no dead codes
    # The key draws the codes along which the replicas do not differ, and no other.
    other, _ = start(params, seed=1)
    num_directions = num_replicas - 1
    same = np.all(np.isclose(other.table, phi.table), axis=0)
    assert_equal(same, np.arange(4) < num_directions)


def test_fit_of_very_different_scales():
    w, b = make_params(R).values()
    params = {"w": w * 1e6, "b": b * 1e-3}
    _, output = start(params, (7,))
    assert_close(output["w"], params["w"], 1e-5, 5)
    for scale in (1e-18, 1e17):
        params = scaled(scale, make_params(R))
        _, output = start(params, (7,))
        assert_close(output, params, 1e-4, 1e-4 * scale)


def test_fit_without_closed_form_beats_the_linear_embedding():
    params = scaled(0.3, make_params(R))

    def error(embedding):
        output = start_of(embedding, params)[1]
        return np.sum((as_matrix(output) - as_matrix(params)) ** 2)

    assert error(TANH) < 1.02 * error(mlp_embedding((3,)))


@pytest.mark.parametrize("embedding", [mlp_embedding((3,)), TANH])
def test_replicas_that_are_not_finite_have_no_part_in_the_fit(embedding):
    params = make_params(R)
    phi, output = start_of(embedding, spoil(params, 5, jnp.nan))
    same, _ = start_of(embedding, spoil(params, 5, -jnp.inf))
    assert_equal(phi, same)
    chex.assert_tree_all_finite(output)
    assert_equal(phi.table[5], 0)
    if embedding is not TANH:
        _, rest = start_of(embedding, without(params, 5))
        assert_close(without(output, 5), rest, 1e-6, 1e-5)


@pytest.mark.parametrize("activation", [[], [jnp.tanh], [jnp.tanh] * 3])
def test_activations_must_be_as_many_as_layers(activation):
    message, make = r"activation has . entries, but .* 2 layers", mlp_embedding
    refused(message, make, (3, 5, 2), activation=activation)


@pytest.mark.parametrize("features", [(-1,), (4, -1), (4.0,), (4, 0), (True,)])
def test_features_must_be_positive(features):
    refused("features .* must be a positive int", mlp_embedding, features)


def test_something_must_be_left_of_it():
    message = "without features needs use_bias=True"
    refused(message, mlp_embedding, (), use_bias=False)
