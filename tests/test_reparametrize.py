"""The update of `reparametrize`, and its relation to that of `pranam`."""

import functools

import jax
import jax.numpy as jnp
import optax

import pranam_optax
from conftest import (
    as_matrix,
    assert_close,
    assert_equal,
    bumpy_gradient,
    line_search,
    make_gradients,
    make_params,
    mixed_params,
    refused,
    rms,
    spoil,
    spread,
)

R = 6
LINEAR = pranam_optax.mlp_embedding()
TANH = pranam_optax.mlp_embedding((3, 5), activation=jnp.tanh)


@functools.cache
def compiled(rate):
    tx = pranam_optax.reparametrize(optax.sgd(rate))
    return jax.jit(tx.init), jax.jit(tx.update)


def with_drawn(embedding, params):
    """The embedding with normal parameters instead of fitted ones, and these."""
    phi = make_gradients(jax.eval_shape(embedding.init, jax.random.key(0), params))
    return embedding._replace(init=lambda key, params: phi), phi


def moved(params, updates):
    return jax.tree.map(jnp.add, params, updates)


def test_a_step_computed_by_hand():
    embedding = pranam_optax.Embedding(
        init=lambda key, params: jnp.array(2.0),
        apply=lambda phi: phi**2 * jnp.array([[1.0], [3.0]]),
    )
    tx = pranam_optax.reparametrize(optax.sgd(0.1), embedding)
    params, grads = jnp.array([[5.0], [-5.0]]), jnp.array([[0.5], [1.0]])
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    # J = 2 phi [1, 3] = [4, 12], J^T G = 2 + 12 = 14, phi' = 2 - 1.4 = 0.6.
    assert_close(state.phi, 0.6, 1e-6)
    # f(phi') = 0.36 [1, 3].
    assert_close(updates, [[0.36 - 5], [1.08 + 5]], 1e-6)
    assert state.count == 1


def test_steps_equal_the_equations(optax_promotion):
    params = make_params()
    embedding, phi = with_drawn(TANH, params)
    optimizer = optax.adamw(0.03)  # its weight decay acts on phi
    tx = pranam_optax.reparametrize(optimizer, embedding)
    step, state = jax.jit(tx.update), tx.init(params)

    @jax.jit
    def equations(grads, phi, inner):
        def loss(phi):
            f = embedding.apply(phi)
            target = jax.lax.stop_gradient(optax.tree.sub(f, grads))
            return 0.5 * optax.tree.norm(optax.tree.sub(f, target), squared=True)

        steps, inner = optimizer.update(jax.grad(loss)(phi), inner, phi)
        phi = optax.apply_updates(phi, steps)
        return phi, inner, embedding.apply(phi)

    inner = optimizer.init(phi)
    for t in range(4):
        grads = bumpy_gradient(params)
        phi, inner, output = equations(grads, phi, inner)
        updates, state = step(grads, state, params)
        params = moved(params, updates)
        assert_close(params, output, 1e-4, 1e-5)
        assert_close(state.phi, phi, 1e-4, 1e-5)
        assert state.count == t + 1


def test_a_step_agrees_with_that_of_pranam(x64):
    """W = f(phi), no normalisation, plain gradient descent: the same step.

    The target of `pranam` is W - s sigma / rms(G) G. With W = f(phi) the gradient of
    its projection loss is s sigma / rms(G) J^T G, so its step is that of gradient
    descent with the rate alpha s sigma / rms(G), where alpha is its line search. The
    update of `pranam` is P rms(G) / rms(P), where P = W - f(phi') is the step downhill.
    """
    start = make_params(dtype=jnp.float64)
    embedding, phi = with_drawn(TANH, start)
    params, grads = jax.jit(embedding.apply)(phi), make_gradients(start)

    @jax.jit
    def steps(factor):
        (gradient,) = jax.vjp(embedding.apply, phi)[1](grads)
        alpha = line_search(embedding.apply, phi, gradient)
        theirs = pranam_optax.pranam(embedding, step_size=2.0, normalize_updates=False)
        ours = pranam_optax.reparametrize(optax.sgd(alpha * factor), embedding)
        return [tx.update(grads, tx.init(params), params) for tx in (theirs, ours)]

    factor = 2.0 * spread(params) / rms(grads)
    (pull, their_state), (updates, our_state) = steps(factor)
    assert_close(our_state.phi, their_state.phi, 1e-9, 1e-12)
    ratio = rms(updates) / rms(grads)
    assert_close(as_matrix(updates), -ratio * as_matrix(pull), 1e-9, 1e-12)


def test_the_first_update_takes_the_replicas_to_the_fitted_embedding():
    params = make_params()
    init, update = compiled(0.0)
    updates, state = update(bumpy_gradient(params), init(params), params)
    output = LINEAR.apply(state.phi)
    assert_close(moved(params, updates), output, 1e-6, 1e-6)
    assert rms(updates) < 0.5 * spread(params)  # fitted
    # The key draws what the fit leaves open.
    few = make_params(2)
    tx = pranam_optax.reparametrize(optax.sgd(0.0), key=3)
    expected = jax.jit(LINEAR.init)(jax.random.key(3), few)
    assert_close(jax.jit(tx.init)(few).phi, expected, 1e-6)


def test_a_replica_comes_back_when_it_is_finite_again():  # see also test_faults
    params = make_params()
    init, update = compiled(0.01)
    grads = bumpy_gradient(params)
    updates, state = update(spoil(grads, 2, jnp.nan), init(params), params)
    assert not as_matrix(updates)[2].any()
    updates, state = update(grads, state, params)
    assert_close(moved(params, updates), LINEAR.apply(state.phi), 1e-6, 1e-6)
    assert_equal(state.nonfinite, [0, 0, 1, 0, 0, 0])


def test_keywords_are_forwarded_and_unknown_ones_tolerated(optax_promotion):
    params = make_params()
    grads = bumpy_gradient(params)
    inner = optax.polyak_sgd()
    tx = pranam_optax.reparametrize(inner)
    state = jax.jit(tx.init)(params)
    value = jnp.float32(3.0)
    _, new_state = jax.jit(tx.update)(grads, state, params, value=value, other=1)

    @jax.jit
    def expected(phi):
        (gradient,) = jax.vjp(LINEAR.apply, phi)[1](grads)
        steps, _ = inner.update(gradient, state.inner, phi, value=value)
        return optax.apply_updates(phi, steps)

    assert_close(new_state.phi, expected(state.phi), 1e-4, 1e-5)
    refused("value", jax.eval_shape, tx.update, grads, state, params, error=TypeError)


def test_mixed_dtypes(x64):
    params = mixed_params()
    embedding, _ = with_drawn(LINEAR, params)
    tx = pranam_optax.reparametrize(optax.sgd(0.1, momentum=0.9), embedding)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    output = embedding.apply(state.phi)
    tolerances = {"half": 2e-3, "brain": 3e-2, "single": 1e-6, "double": 1e-12}
    for name, tolerance in tolerances.items():
        reached = (params[name] + updates[name]).astype(output[name].dtype)
        size = jnp.max(jnp.abs(output[name])) + 1
        assert_close(reached, output[name], 1e-7, tolerance * size)
