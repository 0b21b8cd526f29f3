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
    assert_close,
    assert_equal,
    assert_same_bits,
    line_search,
    make_both,
    make_gradients,
    make_params,
    refused,
    rms,
    rows,
    scaled,
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
    assert_close(updates[:, 0], expected, 1e-6)
    assert_close(state.phi, phi, 1e-7, 1e-6)
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
    """Whose norms are over the whole tree."""
    params = make_params(dtype=jnp.float64)
    state = pranam_optax.pranam(PLANE).init(params)
    phi = state.phi
    table, heads = np.asarray(phi.table), as_matrix(phi.heads)
    bias = np.concatenate([x.ravel() for x in jax.tree.leaves(phi.bias)])
    for seed in range(10):
        grads = make_gradients(params, seed)
        updates, state = update(
            grads, params, state, coupling=0.75, step_size=3.0, embedding=PLANE
        )
        expected, table, heads, bias = reference_step(
            as_matrix(params), as_matrix(grads), table, heads, bias, 0.75, 3.0
        )
        assert_close(as_matrix(updates), expected, 1e-9, 1e-11)
        params = jax.tree.map(lambda w, u: w - 0.1 * u, params, updates)


def test_projection_is_an_exact_line_search_on_the_literal_loss(x64):
    params, grads = make_both(dtype=jnp.float64)
    drawn = make_gradients(jax.eval_shape(TANH.init, jax.random.key(0), params))
    embedding = TANH._replace(init=lambda key, params: drawn)
    updates, state = update(
        grads, params, coupling=0.5, step_size=2.0, embedding=embedding
    )
    normalized = scaled(1 / rms(grads), grads)
    target = jax.tree.map(lambda w, g: w - 2 * spread(params) * g, params, normalized)

    @jax.jit
    def equations(phi):
        def loss(phi):
            residual = optax.tree.sub(TANH.apply(phi), jax.lax.stop_gradient(target))
            return 0.5 * optax.tree.norm(residual, squared=True)

        gradient = jax.grad(loss)(phi)
        alpha = line_search(TANH.apply, phi, gradient)
        phi = jax.tree.map(lambda p, g: p - alpha * g, phi, gradient)
        return phi, optax.tree.sub(params, TANH.apply(phi))

    phi, pull = equations(drawn)
    assert_close(state.phi, phi, 1e-8, 1e-10)
    expected = 0.5 * as_matrix(pull) / rms(pull) + 0.5 * as_matrix(normalized)
    assert_close(as_matrix(updates), expected, 1e-8, 1e-10)


# Normalisation and coupling


def test_without_normalisation_updates_have_the_scale_of_the_gradient():
    params, grads = make_both()
    grads = scaled(37.0, grads)
    updates, _ = update(grads, params, coupling=0.6, normalize_updates=False)
    normalized, _ = update(grads, params, coupling=0.6)
    assert_close(as_matrix(updates), rms(grads) * as_matrix(normalized), 1e-5, 1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_no_coupling_without_normalisation_returns_the_gradient_bit_for_bit(dtype):
    params, grads = make_both(dtype=dtype)
    grads["b"] = jnp.array([-0.0, 0.0, 1e-7, 6e4, -6e-8, 1 / 3], dtype)
    updates, _ = update(grads, params, coupling=0.0, normalize_updates=False)
    assert_same_bits(updates, grads)


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e18, 1e38])
@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
def test_the_scale_of_the_loss_does_not_matter(scale, coupling):
    """Up to finite gradients whose norm is not."""
    params, grads = make_both()
    expected = update(grads, params, coupling=coupling)
    actual = update(scaled(scale, grads), params, coupling=coupling)
    assert_close(actual, expected, 1e-4, 1e-5)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_units_of_the_weights_do_not_matter(scale):
    """Without a bias, which weighs differently in the gradient of the projection."""
    params, grads = make_both()
    given = {"coupling": 0.5, "embedding": PLANE_THROUGH_ZERO}
    updates, _ = update(grads, params, **given)
    others, _ = update(grads, scaled(scale, params), **given)
    assert_close(others, updates, 1e-4, 1e-4)


def test_coupling_of_each_replica():
    params, grads = make_both()
    ladder = jnp.linspace(0.0, 1.0, R)
    updates, _ = update(grads, params, coupling=ladder)
    for r in range(R):
        expected, _ = update(grads, params, coupling=ladder[r])
        assert_close(rows(updates, [r]), rows(expected, [r]), 1e-5, 1e-6)


@pytest.mark.parametrize("shape", [(), (R,)])
def test_schedule_of_the_coupling(shape):
    params, grads = make_both()
    tx = pranam_optax.pranam(
        # 1.5, 0.5, -0.5, ...: clipped to [0, 1]
        coupling=lambda count: jnp.full(shape, 1.5) - count.astype(jnp.float32)
    )
    step, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    for coupling in (1.0, 0.5, 0.0, 0.0):
        expected, _ = update(grads, params, state, coupling=coupling)
        updates, state = step(grads, state, params)
        assert_close(updates, expected, 1e-5, 1e-6)
    assert state.count == 4


# Derivatives: couplings and step sizes may be learned


@functools.cache
def derivatives(normalize_updates):
    """A number made of an update and the new embedding, and its gradient."""

    def number(inputs, state, weights):
        given = {name: inputs[name] for name in ("coupling", "step_size")}
        given["normalize_updates"] = normalize_updates
        tx = pranam_optax.pranam(PLANE, **given)
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
    rests, dies = case % 4 >= 2, case % 5 >= 2
    if rests:  # replica 4 has a gradient of zero
        inputs["grads"] = jax.tree.map(lambda x: x.at[4].set(0), inputs["grads"])
    if dies:  # and 2 is dead
        where = "grads" if case % 5 == 2 else "params"
        inputs[where] = spoil(inputs[where], 2, jnp.nan)
        for name in ("grads", "params"):
            direction[name] = jax.tree.map(lambda x: x.at[2].set(0), direction[name])

    def ahead(step):
        moved = jax.tree.map(lambda x, d: x + step * d, inputs, direction)
        return number(moved, state, weights)

    slopes = gradient(inputs, state, weights)
    chex.assert_tree_all_finite(slopes)
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), slopes, direction)
    along = sum(jax.tree.leaves(products))
    assert_close(along, (ahead(1e-6) - ahead(-1e-6)) / 2e-6, 1e-5)
    if dies:
        for x in jax.tree.leaves([slopes[n] for n in ("coupling", "grads", "params")]):
            np.testing.assert_array_equal(x[2], 0)
    if rests:
        assert jnp.any(slopes["grads"]["w"][4] != 0)


@pytest.mark.parametrize("params", [make_params, lambda: {"w": jnp.zeros((R, 3, 2))}])
def test_derivatives_without_gradients_are_finite(params):
    params = params()
    grads = jax.tree.map(jnp.zeros_like, params)
    state = jax.jit(pranam_optax.pranam().init)(params)

    def number(coupling, step_size, grads, params):
        tx = pranam_optax.pranam(coupling=coupling, step_size=step_size)
        updates, _ = tx.update(grads, state, params)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(updates))

    gradient = jax.jit(jax.grad(number, (0, 1, 2, 3)))
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
    params, grads = make_both(1)
    updates, _ = update(grads, params)
    assert_close(as_matrix(updates), as_matrix(grads) / rms(grads), 1e-4, 1e-5)


@pytest.mark.parametrize("normalize_updates", [True, False])
def test_zero_gradients(normalize_updates):
    params, given = make_params(), {"normalize_updates": normalize_updates}
    updates, state = update(scaled(0, params), params, coupling=0.5, **given)
    chex.assert_tree_all_finite((updates, state))
    # Of the gradient nothing is left; the pull remains, in the gradient's scale.
    assert_close(rms(updates), 0.5 if normalize_updates else 0.0, 1e-5)


@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
def test_zero_pull(coupling):
    """Replicas in the plane of the embedding and zero gradients: nothing to do."""
    params = make_params(4)
    updates, state = update(scaled(0, params), params, coupling=coupling)
    assert rms(updates) == 0.0
    output = pranam_optax.mlp_embedding().apply(state.phi)
    assert_close(output, params, 1e-6, 1e-5)


@pytest.mark.parametrize("factor", [0, jnp.nan])
def test_no_weights_or_no_finite_replica_at_all(factor):
    params = scaled(factor, make_params())
    updates, state = update(params, params)
    assert rms(updates) == 0.0
    chex.assert_tree_all_finite(state)
    assert_equal(state.nonfinite, np.full(R, factor != 0))


# Replicas that are not finite (see also test_faults)


def test_a_replica_comes_back_when_it_is_finite_again():
    params, grads = make_both()
    _, state = update(spoil(grads, 2, jnp.nan), params)
    updates, state = update(grads, params, state)
    assert all(jnp.any(u[2] != 0) for u in jax.tree.leaves(updates))
    assert_equal(state.nonfinite, [0, 0, 1, 0, 0, 0])


@pytest.mark.parametrize("weight", [jnp.inf, jnp.nan])
def test_nothing_has_been_left_out_at_the_start(weight):
    state = pranam_optax.pranam().init(spoil(make_params(), 2, weight))
    assert_equal(state.nonfinite, np.zeros(R))


@pytest.mark.parametrize("shape", [(), (R,)])
def test_replicas_without_a_coupling_wait(shape):
    """A schedule that returns NaN: no update, and it is counted."""
    params, grads = make_both()
    hit = np.broadcast_to(np.arange(R) == 2 if shape else True, R)

    def coupling(count):
        given = jnp.where(jnp.asarray(hit), jnp.nan, 0.5)
        return given if shape else given[0]

    tx = pranam_optax.pranam(coupling=coupling)
    state = jax.jit(tx.init)(params)
    updates, new_state = jax.jit(tx.update)(grads, state, params)
    assert_equal(new_state.nonfinite, hit)
    chex.assert_tree_all_finite((updates, new_state))
    for u in jax.tree.leaves(updates):
        assert np.all(u[hit] == 0)
    if shape:  # the others do as if it were dead
        dead = update(spoil(grads, 2, jnp.nan), params, state, coupling=0.5)
        assert_close(updates, dead[0], 1e-5, 1e-6)


# Inputs and errors (see also test_contract)


def test_gradients_in_a_lower_precision_than_the_params():
    params = make_params()
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = pranam_optax.pranam()
    updates, _ = jax.eval_shape(lambda g, p: tx.update(g, tx.init(p), p), grads, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)


def test_inject_hyperparams():
    params, grads = make_both()
    tx = optax.inject_hyperparams(pranam_optax.pranam, static_args=("key",))(
        coupling=0.25, step_size=2.0
    )
    state, traces = tx.init(params), []
    step = jax.jit(lambda *x: traces.append(x) or tx.update(*x))
    for given in ((0.25, 2.0), (0.75, 2.0), (1.0, 3.0)):
        given = dict(zip(("coupling", "step_size"), given, strict=True))
        state.hyperparams.update({name: jnp.float32(x) for name, x in given.items()})
        expected, _ = update(grads, params, state.inner_state, **given)
        updates, state = step(grads, state, params)
        assert_close(updates, expected, 1e-5, 1e-6)
    assert len(traces) == 1


COUPLING = r"coupling must be a number in \[0, 1\]"
STEP_SIZE = "step_size must be a number >= 0"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("coupling", x, COUPLING) for x in (1.5, -0.1, np.nan, [0.5, 2.0], [[0.5]])),
        ("coupling", "a", COUPLING + ".* got 'a'"),
        *(("step_size", x, STEP_SIZE) for x in (-1.0, np.nan, np.inf, [1.0])),
        ("step_size", "4", STEP_SIZE + ".* got '4'"),
    ],
)
def test_arguments_out_of_range(name, value, message):
    refused(message, pranam_optax.pranam, **{name: value})


@pytest.mark.parametrize("given", [0.5, optax.linear_schedule(1.0, 0.0, 9)])
def test_only_the_embedding_is_given_by_position(given):
    message = r"embedding must be .*coupling=\.\.\."
    refused(message, pranam_optax.pranam, given, error=TypeError)


def test_the_ends_of_the_ranges_are_allowed():
    for kwargs in ({"coupling": 0.0}, {"coupling": 1}, {"step_size": 0.0}):
        pranam_optax.pranam(**kwargs)


@pytest.mark.parametrize("given", [[0.1, 0.2, 0.3], lambda count: jnp.ones(3)])
def test_coupling_of_another_length(given):
    params, tx = make_params(), pranam_optax.pranam(coupling=given)
    state = jax.eval_shape(tx.init, params)
    message = r"coupling has shape \(3,\), expected a scalar or one .* \(6,\)"
    refused(message, jax.eval_shape, tx.update, params, state, params)
