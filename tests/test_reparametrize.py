"""The step, what it promises, and its relation to `pranam`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax

R = 6


def make_params(num_replicas=R, dtype=jnp.float32):
    def init(key):
        return {
            "w": jax.random.normal(key, (3, 2), dtype) + jnp.ones((), dtype),
            "b": jax.random.normal(jax.random.fold_in(key, 1), (), dtype),
        }

    return pranam_optax.replicate(init, 0, num_replicas)


def gradients(params):
    return jax.tree.map(lambda x: x + jnp.sin(5 * x), params)


def apply(params, updates):
    return jax.tree.map(lambda w, u: w + u.astype(w.dtype), params, updates)


def literal_gradient(embedding, phi, grads):
    """The gradient of 1/2 ||f(phi) - stop_gradient(f(phi) - G)||^2."""

    def loss(phi):
        f = embedding.apply(phi)
        target = jax.lax.stop_gradient(jax.tree.map(jnp.subtract, f, grads))
        residual = jax.tree.map(jnp.subtract, f, target)
        return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(residual))

    return jax.grad(loss)(phi)


def test_a_step_computed_by_hand():
    embedding = pranam_optax.Embedding(
        init=lambda key, params: jnp.array(2.0),
        apply=lambda phi: phi**2 * jnp.array([[1.0], [3.0]]),
    )
    tx = pranam_optax.reparametrize(optax.sgd(0.1), embedding)
    params, grads = jnp.array([[5.0], [-5.0]]), jnp.array([[0.5], [1.0]])
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    # J = 2 phi [1, 3] = [4, 12], J^T G = 2 + 12 = 14, phi' = 2 - 1.4 = 0.6.
    np.testing.assert_allclose(state.embedding.args[0], 0.6, rtol=1e-6)
    # f(phi') = 0.36 [1, 3].
    np.testing.assert_allclose(updates, [[0.36 - 5], [1.08 + 5]], rtol=1e-6)
    assert state.count == 1


@pytest.mark.parametrize("features", [(2,), (3, 5)])
def test_steps_equal_the_equations(features, optax_promotion):
    params = make_params()
    embedding = pranam_optax.mlp_embedding(
        features, activation=jnp.tanh, warmup="rescale"
    )
    optimizer = optax.adamw(0.03)  # its weight decay acts on phi
    tx = pranam_optax.reparametrize(optimizer, embedding)
    state = tx.init(params)
    phi, inner = state.embedding.args[0], optimizer.init(state.embedding.args[0])
    for t in range(4):
        grads = gradients(params)
        expected = literal_gradient(embedding, phi, grads)
        steps, inner = optimizer.update(expected, inner, phi)
        phi = optax.apply_updates(phi, steps)
        updates, state = jax.jit(tx.update)(grads, state, params)
        chex.assert_trees_all_close(
            updates,
            jax.tree.map(jnp.subtract, embedding.apply(phi), params),
            rtol=1e-4,
            atol=1e-5,
        )
        params = apply(params, updates)
        output = pranam_optax.embedding_output(state)
        chex.assert_trees_all_close(params, output, rtol=1e-5, atol=1e-6)
        assert state.count == t + 1


def test_a_step_agrees_with_that_of_pranam(x64):
    """W = f(phi), no normalisation, plain gradient descent: the same step.

    The target of `pranam` is W - s sigma / rms(G) G. With W = f(phi) the gradient of
    its projection loss is s sigma / rms(G) J^T G, so gradient descent arrives at the
    same phi' with a learning rate that is s sigma / rms(G) times smaller. The update
    of `pranam` is P rms(G) / rms(P), where P = W - f(phi') is the step, downhill.
    """
    start = make_params(dtype=jnp.float64)
    embedding = pranam_optax.mlp_embedding((3, 5), activation=jnp.tanh, warmup="none")
    step_size, rate = 2.0, 0.05
    params = embedding.apply(embedding.init(jax.random.key(0), start))
    grads = gradients(params)

    def rms(tree):
        squares = [x.ravel() ** 2 for x in jax.tree.leaves(tree)]
        return jnp.sqrt(jnp.mean(jnp.concatenate(squares)))

    sigma = rms(jax.tree.map(lambda x: x - jnp.mean(x, 0, keepdims=True), params))
    factor = step_size * sigma / rms(grads)
    theirs = pranam_optax.pranam(
        embedding,
        step_size=step_size,
        normalize_updates=False,
        projection_optimizer=optax.sgd(rate / factor),
    )
    ours = pranam_optax.reparametrize(optax.sgd(rate), embedding)
    states = [tx.init(start) for tx in (theirs, ours)]
    pull, their_state = theirs.update(grads, states[0], params)
    updates, our_state = ours.update(grads, states[1], params)
    chex.assert_trees_all_close(
        our_state.embedding.args, their_state.embedding.args, rtol=1e-9, atol=1e-12
    )
    ratio = rms(updates) / rms(grads)
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda p: -ratio * p, pull), rtol=1e-9, atol=1e-12
    )


def test_the_first_update_takes_the_replicas_to_the_embedding():
    params = make_params()
    embedding = pranam_optax.mlp_embedding((2,), warmup="none")
    tx = pranam_optax.reparametrize(optax.sgd(0.0), embedding, key=3)
    state = tx.init(params)
    chex.assert_trees_all_equal(
        state.embedding.args[0], embedding.init(jax.random.key(3), params)
    )
    updates, state = tx.update(gradients(params), state, params)
    chex.assert_trees_all_close(
        apply(params, updates), pranam_optax.embedding_output(state), atol=1e-6
    )


def test_default_embedding_is_fitted_to_the_replicas():
    params = make_params(4)
    tx = pranam_optax.reparametrize(optax.sgd(0.0))
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_close(
        updates, jax.tree.map(jnp.zeros_like, params), atol=1e-5
    )


# Replicas that are not finite


def spoil(tree, replica, value):
    return {**tree, "w": tree["w"].at[replica, 1, 0].set(value)}


def without(tree, replica):
    return jax.tree.map(lambda x: jnp.delete(x, replica, axis=0), tree)


@pytest.mark.parametrize("first_bad_step", [0, 3])
def test_a_bad_replica_changes_no_other_by_a_bit(first_bad_step):
    dead, start = 2, make_params()
    tx = pranam_optax.reparametrize(optax.sgd(0.01, momentum=0.9))
    paths = []
    for bad_gradient, bad_weight in [
        (jnp.nan, None),
        (-jnp.inf, None),
        (3e38, None),  # finite, but J^T G would not be
        (jnp.nan, jnp.nan),
        (1.0, jnp.inf),
    ]:
        params, state, path = start, tx.init(start), []
        update = jax.jit(tx.update)
        for t in range(6):
            grads = gradients(params)
            if t >= first_bad_step:
                grads = spoil(grads, dead, bad_gradient)
                if bad_weight is not None:
                    params = spoil(params, dead, bad_weight)
            updates, state = update(grads, state, params)
            if t >= first_bad_step:
                assert all(jnp.all(u[dead] == 0) for u in jax.tree.leaves(updates))
            params = apply(params, updates)
            path.append(without(params, dead))
        chex.assert_tree_all_finite((path, state.embedding()))
        expected = np.zeros(R)
        expected[dead] = 6 - first_bad_step
        np.testing.assert_array_equal(state.nonfinite, expected)
        paths.append(path)
    for path in paths[1:]:
        chex.assert_trees_all_equal(path, paths[0])


def test_a_replica_that_is_left_out_might_as_well_not_be_there(optax_promotion):
    dead, params = 2, make_params()
    embedding = pranam_optax.mlp_embedding((2,))
    tx = pranam_optax.reparametrize(optax.adam(0.01), embedding)
    results = []
    for start in (spoil(params, dead, jnp.nan), without(params, dead)):
        state = tx.init(start)
        for _ in range(5):
            updates, state = jax.jit(tx.update)(gradients(start), state, start)
            start = apply(start, updates)
        results.append(start)
    chex.assert_trees_all_close(
        without(results[0], dead), results[1], rtol=1e-3, atol=1e-4
    )


def test_a_replica_comes_back_when_it_is_finite_again():
    params = make_params()
    tx = pranam_optax.reparametrize(optax.sgd(0.01))
    grads = gradients(params)
    _, state = tx.update(spoil(grads, 2, jnp.nan), tx.init(params), params)
    updates, state = tx.update(grads, state, params)
    chex.assert_trees_all_close(
        apply(params, updates), pranam_optax.embedding_output(state), atol=1e-6
    )
    np.testing.assert_array_equal(state.nonfinite, [0, 0, 1, 0, 0, 0])


# State, tracing and dtypes


def test_state_is_stable_and_a_step_compiles_once(optax_promotion, assert_stable):
    params = make_params()
    tx = pranam_optax.reparametrize(optax.adam(optax.cosine_decay_schedule(1e-2, 5)))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        new_params, new_state = step(params, state)
        assert_stable((params, state), (new_params, new_state))
        params, state = new_params, new_state
    assert step._cache_size() == 1
    assert state.count == 4


def test_with_and_without_jit_agree():
    params = make_params()
    tx = pranam_optax.reparametrize(optax.sgd(0.1))
    state = tx.init(params)
    chex.assert_trees_all_close(
        tx.update(gradients(params), state, params),
        jax.jit(tx.update)(gradients(params), state, params),
        rtol=1e-5,
        atol=1e-6,
    )


def test_init_is_abstract_and_takes_a_tree_without_leaves():
    params = make_params()
    tx = pranam_optax.reparametrize(optax.adam(1.0))
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        state, jax.eval_shape(tx.init, params)
    )
    assert tx.init({}).nonfinite.shape == (0,)
    mapped = optax.tree.map_params(tx, lambda x: x * 0 + 1, state)
    phi = mapped.embedding.args[0]
    assert all(jnp.all(x == 1) for x in jax.tree.leaves((phi.heads, phi.bias)))


def test_donated_buffers():
    params = make_params(1)  # one replica: the bias is the replica itself
    tx = pranam_optax.reparametrize(optax.sgd(0.1, momentum=0.9))
    state = tx.init(params)
    grads = gradients(params)
    expected = jax.jit(tx.update)(grads, state, params)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    chex.assert_trees_all_equal(step(grads, state, params), expected)
    chex.assert_tree_all_finite(params)


def test_keywords_are_forwarded_and_unknown_ones_tolerated(optax_promotion):
    params = make_params()
    grads = gradients(params)
    inner = optax.polyak_sgd()
    tx = pranam_optax.reparametrize(inner)
    state = tx.init(params)
    value = jnp.float32(3.0)
    _, new_state = jax.jit(tx.update)(grads, state, params, value=value, other=1)
    embedding = pranam_optax.mlp_embedding()
    phi = state.embedding.args[0]
    steps, _ = inner.update(
        literal_gradient(embedding, phi, grads), state.inner, phi, value=value
    )
    chex.assert_trees_all_close(
        new_state.embedding.args[0],
        optax.apply_updates(phi, steps),
        rtol=1e-4,
        atol=1e-5,
    )
    with pytest.raises(TypeError, match="value"):
        tx.update(grads, state, params)
    plain = pranam_optax.reparametrize(optax.sgd(0.1))
    plain.update(grads, plain.init(params), params, values=jnp.ones(R), value=value)


def test_mixed_dtypes(x64):
    params = {
        "half": jnp.ones((4, 2), jnp.float16),
        "brain": jnp.ones((4, 2), jnp.bfloat16),
        "single": jnp.ones((4,), jnp.float32),
        "double": jnp.arange(12.0, dtype=jnp.float64).reshape(4, 3, 1),
    }
    embedding = pranam_optax.mlp_embedding((3, 4), warmup="rescale")
    tx = pranam_optax.reparametrize(optax.sgd(0.1, momentum=0.9), embedding)
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    output = new_state.embedding()
    assert {k: x.dtype.name for k, x in output.items()} == {
        "half": "float32",
        "brain": "float32",
        "single": "float32",
        "double": "float64",
    }
    for k, tolerance in {
        "half": 2e-3,
        "brain": 2e-2,
        "single": 1e-6,
        "double": 1e-12,
    }.items():
        np.testing.assert_allclose(
            np.asarray((params[k] + updates[k]).astype(output[k].dtype)),
            output[k],
            rtol=tolerance,
            atol=tolerance,
        )


def test_gradients_in_a_lower_precision_than_the_params():
    params = make_params()
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients(params))
    tx = pranam_optax.reparametrize(optax.sgd(0.1))
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)


def test_embedding_output_in_nested_states():
    params = make_params()
    tx = pranam_optax.reparametrize(optax.adam(1.0))
    expected = tx.init(params).embedding()
    for nested in (
        optax.chain(optax.clip(1.0), tx),
        optax.partition({"a": tx}, jax.tree.map(lambda _: "a", params)),
        optax.MultiSteps(tx, 2),
    ):
        output = pranam_optax.embedding_output(nested.init(params))
        chex.assert_trees_all_close(output, expected, rtol=1e-6)


# Composition


def test_gradients_accumulated_by_multi_steps(optax_promotion):
    params = make_params()
    tx = pranam_optax.reparametrize(optax.adam(0.1))
    grads = [jax.tree.map(lambda g: s * g, gradients(params)) for s in (0.5, 1.5)]
    multi = optax.MultiSteps(tx, 2)
    state = multi.init(params)
    first, state = multi.update(grads[0], state, params)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(first))
    second, _ = multi.update(grads[1], state, params)
    expected, _ = tx.update(gradients(params), tx.init(params), params)
    chex.assert_trees_all_close(second, expected, rtol=1e-4, atol=1e-5)


def test_some_leaves_embedded_and_the_rest_trained_directly():
    params = make_params()
    grads = gradients(params)
    embedded = pranam_optax.reparametrize(optax.sgd(0.1))
    tx = optax.partition(
        {"embedded": embedded, "direct": optax.sgd(0.2)},
        {"w": "embedded", "b": "direct"},
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["b"], -0.2 * grads["b"], rtol=1e-6)
    w = {"w": params["w"]}
    expected, _ = embedded.update({"w": grads["w"]}, embedded.init(w), w)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5, atol=1e-6)


# Errors


def test_errors():
    params = make_params()
    tx = pranam_optax.reparametrize(optax.sgd(0.1))
    state = tx.init(params)
    with pytest.raises(
        ValueError,
        match=r"reparametrize needs .* call tx.update\(grads, state, params\)",
    ):
        tx.update(params, state)
    with pytest.raises(ValueError, match="no leaves; reparametrize needs at least one"):
        tx.update({}, tx.init({}), {})
    with pytest.raises(
        ValueError, match=r"updates\['b'\] is missing and params\['b'\]"
    ):
        tx.update({"w": params["w"]}, state, params)
    with pytest.raises(ValueError, match=r"updates has 4 replicas, but the state .* 6"):
        tx.update(make_params(4), state, make_params(4))
    with pytest.raises(
        ValueError, match=r"params\['c'\] has shape \(\) and no replica"
    ):
        tx.init({**params, "c": jnp.ones(())})
    with pytest.raises(TypeError, match=r"updates\['b'\] has dtype int32"):
        tx.update({**params, "b": jnp.ones(R, jnp.int32)}, state, params)
