"""The update of `pranam`: against its equations, at its limits, and its errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax
from conftest import (
    as_matrix,
    assert_same_bits,
    make_gradients,
    make_params,
    make_run,
    rms,
    rows,
    spoil,
    spread,
)

R = 6
PLANE = pranam_optax.mlp_embedding((2,))
PLANE_THROUGH_ZERO = pranam_optax.mlp_embedding((2,), use_bias=False)
TANH = pranam_optax.mlp_embedding((3, 5), activation=jnp.tanh)
# One number: every weight of both replicas.
ONE_NUMBER = pranam_optax.Embedding(
    init=lambda key, params: jnp.mean(params), apply=lambda phi: phi * jnp.ones((2, 1))
)


# Compiled once for all numbers.


@functools.cache
def compiled(embedding, normalize_updates):
    def link(coupling=1.0, step_size=4.0):
        return pranam_optax.pranam(
            embedding,
            coupling=coupling,
            step_size=step_size,
            normalize_updates=normalize_updates,
        )

    def update(grads, state, params, coupling, step_size):
        return link(coupling, step_size).update(grads, state, params)

    return jax.jit(link().init), jax.jit(update)


def update(
    grads,
    params,
    state=None,
    *,
    coupling=1.0,
    step_size=4.0,
    embedding=None,
    normalize_updates=True,
):
    """One update, the first if no state is given."""
    init, update = compiled(embedding, normalize_updates)
    state = init(params) if state is None else state
    return update(grads, state, params, jnp.float32(coupling), jnp.float32(step_size))


# The equations


@pytest.mark.parametrize("coupling", [0.0, 0.25, 1.0])
def test_a_step_computed_by_hand(coupling):
    params, grads = jnp.array([[1.0], [3.0]]), jnp.array([[30.0], [40.0]])
    updates, state = update(
        grads, params, coupling=coupling, step_size=2.0, embedding=ONE_NUMBER
    )
    # rms(G) = sqrt((900 + 1600) / 2) = 50 / sqrt(2); the mean is 2, sigma = 1.
    normalized = np.array([0.6, 0.8]) * np.sqrt(2)
    # T = W - 2 G^; f = phi = 2 at first, so grad l = 2 * 2 - sum(T) = sum(2 G^).
    # Its slope is 2 and alpha = 1 / 2: phi' = 2 - sum(2 G^) / 2 = 2 - 1.4 sqrt(2).
    phi = 2 - 1.4 * np.sqrt(2)
    pull = np.array([1 - phi, 3 - phi])
    expected = coupling * pull / np.sqrt(np.mean(pull**2)) + (1 - coupling) * normalized
    np.testing.assert_allclose(updates[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(state.phi, phi, atol=1e-6)
    assert state.count == 1


def reference_step(weights, gradients, table, heads, bias, coupling, step_size):
    """The equations for a linear embedding, in NumPy and float64."""
    normalized = gradients / np.sqrt(np.mean(gradients**2))
    sigma = np.sqrt(np.mean((weights - weights.mean(0)) ** 2))
    residual = table @ heads + bias - (weights - step_size * sigma * normalized)
    d_table, d_heads, d_bias = residual @ heads.T, table.T @ residual, residual.sum(0)
    slope = d_table @ heads + table @ d_heads + d_bias
    alpha = sum(np.sum(d**2) for d in (d_table, d_heads, d_bias)) / np.sum(slope**2)
    table, heads = table - alpha * d_table, heads - alpha * d_heads
    bias = bias - alpha * d_bias
    pull = weights - table @ heads - bias
    pull = pull / np.sqrt(np.mean(pull**2))
    return coupling * pull + (1 - coupling) * normalized, table, heads, bias


def test_steps_equal_the_equations_in_numpy(x64):
    params = make_params(dtype=jnp.float64)
    state = pranam_optax.pranam(PLANE).init(params)
    phi = state.phi
    table = np.asarray(phi.table)
    heads = np.concatenate([x.reshape(2, -1) for x in jax.tree.leaves(phi.heads)], 1)
    bias = np.concatenate([x.ravel() for x in jax.tree.leaves(phi.bias)])
    for seed in range(10):
        grads = make_gradients(params, seed)
        updates, state = update(
            grads, params, state, coupling=0.75, step_size=3.0, embedding=PLANE
        )
        expected, table, heads, bias = reference_step(
            as_matrix(params), as_matrix(grads), table, heads, bias, 0.75, 3.0
        )
        np.testing.assert_allclose(as_matrix(updates), expected, rtol=1e-9, atol=1e-11)
        params = jax.tree.map(lambda w, u: w - 0.1 * u, params, updates)


def test_projection_is_an_exact_line_search_on_the_literal_loss(x64):
    params = make_params(dtype=jnp.float64)
    grads = make_gradients(params)
    drawn = make_gradients(jax.eval_shape(TANH.init, jax.random.key(0), params))
    embedding = pranam_optax.Embedding(lambda key, params: drawn, TANH.apply)
    updates, state = update(
        grads, params, coupling=0.5, step_size=2.0, embedding=embedding
    )

    normalized = jax.tree.map(lambda g: g / rms(grads), grads)
    target = jax.tree.map(lambda w, g: w - 2 * spread(params) * g, params, normalized)

    @jax.jit
    def equations(phi):
        def loss(phi):
            residual = jax.tree.map(
                lambda y, t: y - jax.lax.stop_gradient(t), TANH.apply(phi), target
            )
            return 0.5 * optax.tree.norm(residual, squared=True)

        gradient = jax.grad(loss)(phi)
        slope = jax.jvp(TANH.apply, (phi,), (gradient,))[1]
        alpha = optax.tree.norm(gradient, squared=True)
        alpha /= optax.tree.norm(slope, squared=True)
        phi = jax.tree.map(lambda p, g: p - alpha * g, phi, gradient)
        return phi, jax.tree.map(jnp.subtract, params, TANH.apply(phi))

    phi, pull = equations(drawn)
    chex.assert_trees_all_close(state.phi, phi, rtol=1e-8, atol=1e-10)
    expected = jax.tree.map(
        lambda p, g: 0.5 * p / rms(pull) + 0.5 * g, pull, normalized
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-8, atol=1e-10)


# Normalisation and coupling


@pytest.mark.parametrize("coupling", [0.0, 1.0])
def test_updates_have_rms_one_at_both_ends(coupling):
    params = make_params()
    updates, _ = update(make_gradients(params), params, coupling=coupling)
    np.testing.assert_allclose(rms(updates), 1.0, rtol=1e-6)


def test_without_normalisation_updates_have_the_scale_of_the_gradient():
    params = make_params()
    grads = jax.tree.map(lambda g: 37.0 * g, make_gradients(params))
    updates, _ = update(grads, params, coupling=0.6, normalize_updates=False)
    normalized, _ = update(grads, params, coupling=0.6)
    np.testing.assert_allclose(
        as_matrix(updates), rms(grads) * as_matrix(normalized), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_no_coupling_without_normalisation_returns_the_gradient_bit_for_bit(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), make_params())
    grads = make_gradients(params)
    grads["b"] = jnp.array([-0.0, 0.0, 1e-7, 6e4, -6e-8, 1 / 3], dtype)
    updates, _ = update(grads, params, coupling=0.0, normalize_updates=False)
    assert_same_bits(updates, grads)


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e18])
@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
def test_the_scale_of_the_loss_does_not_matter(scale, coupling):
    params = make_params()
    grads = make_gradients(params)
    expected = update(grads, params, coupling=coupling)
    scaled = jax.tree.map(lambda g: scale * g, grads)
    actual = update(scaled, params, coupling=coupling)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_units_of_the_weights_do_not_matter(scale):
    """Without a bias, which weighs differently in the gradient of the projection."""
    params = make_params()
    grads = make_gradients(params)
    updates, _ = update(grads, params, coupling=0.5, embedding=PLANE_THROUGH_ZERO)
    params = jax.tree.map(lambda x: scale * x, params)
    scaled, _ = update(grads, params, coupling=0.5, embedding=PLANE_THROUGH_ZERO)
    chex.assert_trees_all_close(scaled, updates, rtol=1e-4, atol=1e-4)


def test_coupling_of_each_replica():
    params = make_params()
    grads = make_gradients(params)
    ladder = jnp.linspace(0.0, 1.0, R)
    updates, _ = update(grads, params, coupling=ladder)
    for r in range(R):
        expected, _ = update(grads, params, coupling=ladder[r])
        chex.assert_trees_all_close(
            rows(updates, [r]), rows(expected, [r]), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("shape", [(), (R,)])
def test_schedule_of_the_coupling(shape):
    params = make_params()
    grads = make_gradients(params)
    tx = pranam_optax.pranam(
        # 1.5, 0.5, -0.5, ...: clipped to [0, 1]
        coupling=lambda count: jnp.full(shape, 1.5) - count.astype(jnp.float32)
    )
    step, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    for coupling in (1.0, 0.5, 0.0, 0.0):
        expected, _ = update(grads, params, state, coupling=coupling)
        updates, state = step(grads, state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)
    assert state.count == 4


def test_norms_are_over_the_whole_tree():
    """The division of a tree into leaves does not matter."""
    params = make_params()
    joined = jnp.asarray(as_matrix(params), jnp.float32)
    run = make_run(pranam_optax.pranam(PLANE, coupling=0.7), 8)
    np.testing.assert_allclose(
        as_matrix(run(params)[0]), run(joined)[0], rtol=1e-3, atol=1e-4
    )


# Derivatives: couplings and step sizes may be learned


@functools.cache
def derivatives(normalize_updates):
    """A number made of an update and the new embedding, and its gradient."""

    def number(inputs, state, weights):
        tx = pranam_optax.pranam(
            PLANE,
            coupling=inputs["coupling"],
            step_size=inputs["step_size"],
            normalize_updates=normalize_updates,
        )
        updates, state = tx.update(inputs["grads"], state, inputs["params"])
        products = jax.tree.map(jnp.multiply, weights, (updates, state.phi))
        return sum(jnp.sum(x) for x in jax.tree.leaves(products))

    init = jax.jit(pranam_optax.pranam(PLANE).init)
    return init, jax.jit(number), jax.jit(jax.grad(number))


@pytest.mark.parametrize("case", range(20))
def test_derivatives_against_finite_differences(case, x64):
    init, number, gradient = derivatives(normalize_updates=case % 2 == 0)
    rng = np.random.default_rng(case)
    params = make_params(R, seed=case, dtype=jnp.float64)
    state = init(make_params(R, seed=case + 1, dtype=jnp.float64))
    inputs = {
        "coupling": jnp.asarray(rng.uniform(0.1, 0.9, R)),
        "step_size": jnp.asarray(rng.uniform(0.5, 5.0)),
        "grads": make_gradients(params, case),
        "params": params,
    }
    weights = make_gradients((params, state.phi), case + 2)
    direction = make_gradients(inputs, case + 3)
    resting = dead = None
    if case % 4 >= 2:  # one replica has a gradient of zero
        resting = 4
        inputs["grads"] = jax.tree.map(lambda x: x.at[4].set(0), inputs["grads"])
    if case % 5 >= 2:  # and one is dead
        dead = 2
        where = "grads" if case % 5 == 2 else "params"
        inputs[where] = spoil(inputs[where], dead, jnp.nan)
        for name in ("grads", "params"):
            direction[name] = jax.tree.map(lambda x: x.at[dead].set(0), direction[name])

    step = 1e-6
    ends = [
        number(
            jax.tree.map(lambda x, d: x + s * step * d, inputs, direction),
            state,
            weights,
        )
        for s in (1, -1)
    ]
    slopes = gradient(inputs, state, weights)
    chex.assert_tree_all_finite(slopes)
    along = sum(
        jnp.sum(g * d)
        for g, d in zip(*map(jax.tree.leaves, (slopes, direction)), strict=True)
    )
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-5)
    if dead is not None:
        for x in jax.tree.leaves([slopes[n] for n in ("coupling", "grads", "params")]):
            np.testing.assert_array_equal(x[dead], 0)
    if resting is not None:
        assert jnp.any(slopes["grads"]["w"][resting] != 0)


@pytest.mark.parametrize("params", [make_params, lambda: {"w": jnp.zeros((R, 3, 2))}])
def test_derivatives_without_gradients_are_finite(params):
    params = params()
    grads = jax.tree.map(jnp.zeros_like, params)
    state = jax.jit(pranam_optax.pranam().init)(params)

    @jax.jit
    def gradient(coupling, step_size, grads, params):
        def number(*inputs):
            coupling, step_size, grads, params = inputs
            tx = pranam_optax.pranam(coupling=coupling, step_size=step_size)
            updates, _ = tx.update(grads, state, params)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(updates))

        return jax.grad(number, (0, 1, 2, 3))(coupling, step_size, grads, params)

    chex.assert_tree_all_finite(gradient(0.5, 4.0, grads, params))


# Degenerate ensembles


@jax.jit
def descend(params, target, coupling):
    """Mean losses of 60 steps on ||w - target||^2, and the last state."""
    tx = pranam_optax.pranam(coupling=coupling)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params - target, state, params)
        return (params - 0.1 * updates, state), jnp.mean((params - target) ** 2)

    (_, state), losses = jax.lax.scan(step, (params, tx.init(params)), None, 60)
    return losses, state


@pytest.mark.parametrize("coupling", [0.5, 1.0])
@pytest.mark.parametrize("num_replicas", [1, 5])
@pytest.mark.parametrize("start", [0.0, 3.0])
def test_identical_replicas_descend(coupling, num_replicas, start):
    target = jnp.array([[1.0, -2.0, 0.5, 4.0]])
    losses, _ = descend(jnp.full((num_replicas, 4), start), target, coupling)
    assert losses[1] < losses[0]
    assert min(losses) < 0.05 * losses[0]


def test_identical_replicas_that_see_different_data_learn_an_embedding():
    target = jax.random.normal(jax.random.key(0), (5, 4))
    _, state = descend(jnp.ones((5, 4)), target, 1.0)
    output = pranam_optax.mlp_embedding().apply(state.phi)
    assert jnp.std(output, axis=0).min() > 0.1


def test_one_replica_starts_along_its_normalised_gradient():
    params = make_params(1)
    grads = make_gradients(params)
    updates, _ = update(grads, params)
    np.testing.assert_allclose(
        as_matrix(updates), as_matrix(grads) / rms(grads), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("normalize_updates", [True, False])
def test_zero_gradients(normalize_updates):
    params = make_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = update(
        zeros, params, coupling=0.5, normalize_updates=normalize_updates
    )
    chex.assert_tree_all_finite((updates, state))
    # Of the gradient nothing is left; the pull remains, in the gradient's scale.
    expected = 0.5 if normalize_updates else 0.0
    np.testing.assert_allclose(rms(updates), expected, rtol=1e-5)


@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
def test_zero_pull(coupling):
    """Replicas in the plane of the embedding and zero gradients: nothing to do."""
    params = make_params(4)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = update(zeros, params, coupling=coupling)
    assert rms(updates) == 0.0
    output = pranam_optax.mlp_embedding().apply(state.phi)
    chex.assert_trees_all_close(output, params, atol=1e-5)


def test_zero_weights_and_gradients():
    params = jax.tree.map(jnp.zeros_like, make_params())
    updates, state = update(params, params)
    assert rms(updates) == 0.0
    chex.assert_tree_all_finite(state)


# Replicas that are not finite (see also test_faults)


def test_a_replica_comes_back_when_it_is_finite_again():
    params = make_params()
    grads = make_gradients(params)
    _, state = update(spoil(grads, 2, jnp.nan), params)
    updates, state = update(grads, params, state)
    assert all(jnp.any(u[2] != 0) for u in jax.tree.leaves(updates))
    np.testing.assert_array_equal(state.nonfinite, [0, 0, 1, 0, 0, 0])


def test_no_finite_replica_at_all():
    params = make_params()
    updates, state = update(jax.tree.map(lambda x: x * jnp.nan, params), params)
    assert rms(updates) == 0.0
    chex.assert_tree_all_finite(state)
    np.testing.assert_array_equal(state.nonfinite, np.ones(R))


@pytest.mark.parametrize("weight", [jnp.inf, jnp.nan])
def test_nothing_has_been_left_out_at_the_start(weight):
    state = pranam_optax.pranam().init(spoil(make_params(), 2, weight))
    np.testing.assert_array_equal(state.nonfinite, np.zeros(R))


@pytest.mark.parametrize("huge", [1e20, 3e38])
def test_weights_that_cannot_be_squared_are_left_out(huge):
    params = make_params()
    grads = make_gradients(params)
    _, state = update(grads, params)
    expected = update(spoil(grads, 2, jnp.nan), params, state, coupling=0.5)
    actual = update(grads, spoil(params, 2, huge), state, coupling=0.5)
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize("shape", [(), (R,)])
def test_replicas_without_a_coupling_wait(shape):
    """A schedule that returns NaN: no update, and it is counted."""
    params = make_params()
    grads = make_gradients(params)
    hit = np.broadcast_to(np.arange(R) == 2 if shape else True, R)

    def coupling(count):
        given = jnp.where(jnp.asarray(hit), jnp.nan, 0.5)
        return given if shape else given[0]

    tx = pranam_optax.pranam(coupling=coupling)
    state = jax.jit(tx.init)(params)
    updates, new_state = jax.jit(tx.update)(grads, state, params)
    np.testing.assert_array_equal(new_state.nonfinite, hit)
    chex.assert_tree_all_finite((updates, new_state))
    for u in jax.tree.leaves(updates):
        assert np.all(u[hit] == 0)
    if shape:  # the others do as if it were dead
        dead = update(spoil(grads, 2, jnp.nan), params, state, coupling=0.5)
        chex.assert_trees_all_close(updates, dead[0], rtol=1e-5, atol=1e-6)


def test_gradients_at_the_end_of_the_range():
    """Finite ones whose norm is not."""
    params = make_params()
    grads = make_gradients(params)
    expected, _ = update(grads, params, coupling=0.5)
    huge = jax.tree.map(lambda g: g * (3e38 / 3.0), grads)
    updates, state = update(huge, params, coupling=0.5)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.nonfinite, 0)


# Inputs


def test_gradients_in_a_lower_precision_than_the_params():
    params = make_params()
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = pranam_optax.pranam()
    updates, _ = jax.eval_shape(lambda g, p: tx.update(g, tx.init(p), p), grads, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)


def test_inject_hyperparams():
    params = make_params()
    grads = make_gradients(params)
    tx = optax.inject_hyperparams(pranam_optax.pranam, static_args=("key",))(
        coupling=0.25, step_size=2.0
    )
    state = tx.init(params)
    step = jax.jit(tx.update)
    for coupling, step_size in ((0.25, 2.0), (0.75, 2.0), (1.0, 3.0)):
        state.hyperparams["coupling"] = jnp.float32(coupling)
        state.hyperparams["step_size"] = jnp.float32(step_size)
        expected, _ = update(
            grads, params, state.inner_state, coupling=coupling, step_size=step_size
        )
        updates, state = step(grads, state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)
    assert step._cache_size() == 1


# Errors


def test_arguments_out_of_range():
    for coupling in (1.5, -0.1, np.nan, [0.5, 2.0], [[0.5]]):
        with pytest.raises(ValueError, match=r"coupling must be a number in \[0, 1\]"):
            pranam_optax.pranam(coupling=coupling)
    for step_size in (-1.0, np.nan, np.inf, [1.0]):
        with pytest.raises(ValueError, match="step_size must be a number >= 0"):
            pranam_optax.pranam(step_size=step_size)


@pytest.mark.parametrize("given", [0.5, optax.linear_schedule(1.0, 0.0, 9)])
def test_only_the_embedding_is_given_by_position(given):
    with pytest.raises(TypeError, match=r"embedding must be .*coupling=\.\.\."):
        pranam_optax.pranam(given)


def test_numbers_must_be_numbers():
    with pytest.raises(ValueError, match=r"coupling must be a number in .* got 'a'"):
        pranam_optax.pranam(coupling="a")
    with pytest.raises(ValueError, match=r"step_size must be a number .* got '4'"):
        pranam_optax.pranam(step_size="4")


def test_the_ends_of_the_ranges_are_allowed():
    for kwargs in ({"coupling": 0.0}, {"coupling": 1}, {"step_size": 0.0}):
        pranam_optax.pranam(**kwargs)


def raises(error, match, grads=None, params=None, start=None, **kwargs):
    """Checks the error of an update; what is not given is as it should be."""
    params = make_params() if params is None else params
    grads = make_params() if grads is None else grads
    tx = pranam_optax.pranam(**kwargs)
    state = jax.eval_shape(tx.init, make_params() if start is None else start)
    with pytest.raises(error, match=match):
        jax.eval_shape(tx.update, grads, state, params)


def test_params_are_needed():
    tx = pranam_optax.pranam()
    with pytest.raises(ValueError, match=r"call tx.update\(grads, state, params\)"):
        tx.update(make_params(), jax.eval_shape(tx.init, make_params()))


@pytest.mark.parametrize("leaf", [jnp.ones(()), jnp.ones((0, 2))])
def test_a_leaf_without_replica_axis_is_named(leaf):
    params = {"w": jnp.ones((3, 2)), "deep": [leaf]}
    with pytest.raises(ValueError, match=r"params\['deep'\]\[0\] has shape .* axis"):
        pranam_optax.pranam().init(params)


def test_leaves_that_disagree_are_both_named():
    tree = {"a": jnp.ones((3, 2)), "b": {"c": jnp.ones((4, 2))}}
    message = r"\['a'\] has shape \(3, 2\), {0}\['b'\]\['c'\] has shape \(4, 2\)"
    with pytest.raises(ValueError, match="params" + message.format("params")):
        pranam_optax.pranam().init(tree)
    raises(ValueError, "updates" + message.format("updates"), grads=tree)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_leaves_must_be_floating(dtype):
    tree = {"a": jnp.ones((3, 2)), "b": jnp.ones(3, dtype)}
    message = rf"\['b'\] has dtype {jnp.dtype(dtype).name} \(shape"
    with pytest.raises(TypeError, match="params" + message):
        pranam_optax.pranam().init(tree)
    raises(TypeError, "updates" + message, grads=tree)


def test_empty_updates():
    raises(ValueError, "updates has no leaves", grads={}, params={}, start={})


def test_updates_and_params_of_different_structure():
    w, b = make_params().values()
    raises(ValueError, r"updates\['b'\] is missing and params\['b'\]", {"w": w})
    grads = {"w": w, "b": b, "c": jnp.ones(R)}
    raises(ValueError, r"has shape \(6,\) and params\['c'\] is missing", grads)
    grads = {"w": jnp.ones((R, 2, 3)), "b": b}
    raises(ValueError, r"updates\['w'\] has shape \(6, 2, 3\) and", grads)
    raises(
        ValueError, "same structure, but updates is PyTreeDef", [w, b], params=(w, b)
    )


def test_coupling_of_another_length():
    message = r"coupling has shape \(3,\), expected a scalar or one .* \(6,\)"
    raises(ValueError, message, coupling=[0.1, 0.2, 0.3])
    raises(ValueError, message, coupling=lambda count: jnp.ones(3))


def test_state_of_another_number_of_replicas():
    message = r"params has 6 replicas, but the state .* 4"
    raises(ValueError, message, start=make_params(4))


@pytest.mark.parametrize("embedding", [None, pranam_optax.mlp_embedding(())])
def test_params_of_other_shapes_than_those_of_init(embedding):
    """They would broadcast."""
    w, b = make_params().values()
    message = r"makes params\['w'\] of shape \(6, 1, 2\), but .* has shape \(6, 3, 2\)"
    raises(ValueError, message, embedding=embedding, start={"w": w[:, :1], "b": b})
    raises(
        ValueError,
        r"params\['b'\] has shape \(6,\) and .* missing",
        embedding=embedding,
        start={"w": w},
    )
    raises(
        ValueError,
        r"makes params\['c'\] .* missing",
        embedding=embedding,
        start={"w": w, "b": b, "c": b},
    )


@pytest.mark.parametrize("state", [None, {}, (optax.EmptyState(),)])
def test_what_is_no_state(state):
    params = make_params()
    with pytest.raises(TypeError, match=r"PranamState .*update\(grads, state, params"):
        pranam_optax.pranam().update(params, state, params)
