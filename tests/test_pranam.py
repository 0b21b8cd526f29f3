"""The step, equation by equation, and what it promises."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax
from pranam_optax import problems
from pranam_optax._embedding import projection_loss

R = 6


def make_params(num_replicas=R, seed=0):
    return pranam_optax.replicate(
        lambda key: {
            "w": jax.random.normal(key, (3, 2)) + 1.0,
            "b": jax.random.normal(jax.random.fold_in(key, 1), ()),
        },
        seed,
        num_replicas,
    )


def make_gradients(params, seed=1):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        treedef,
        [
            jax.random.normal(k, x.shape).astype(x.dtype)
            for k, x in zip(keys, leaves, strict=True)
        ],
    )


def as_matrix(tree):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def rms(tree):
    return np.sqrt(np.mean(as_matrix(tree) ** 2))


def one_update(tx, grads, params, state=None):
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params)  # compiled once for all that are alike


def run(tx, params, num_steps, grad_fn):
    """Updates of SGD behind `tx`; returns every step's params."""

    def step(params, state, t):
        updates, state = tx.update(grad_fn(params, t), state, params)
        params = jax.tree.map(
            lambda w, u: w - (0.1 * u).astype(w.dtype), params, updates
        )
        return params, state

    state = tx.init(params)
    path = []
    for t in range(num_steps):
        params, state = step(params, state, t)
        path.append(params)
    return path, state


def sphere_gradient(params, t):
    del t
    return jax.tree.map(lambda x: x + jnp.sin(5 * x), params)


# The step


def pull_to_the_mean():
    """An embedding of one number: every weight of every replica."""
    return pranam_optax.Embedding(
        init=lambda key, params: jnp.mean(params),
        apply=lambda phi: jnp.full((2, 1), 1.0) * phi,
    )


@pytest.mark.parametrize("coupling", [0.0, 0.25, 1.0])
def test_a_step_computed_by_hand(coupling):
    params, grads = jnp.array([[1.0], [3.0]]), jnp.array([[30.0], [40.0]])
    tx = pranam_optax.pranam(pull_to_the_mean(), coupling=coupling, step_size=2.0)
    updates, state = one_update(tx, grads, params)
    # rms(G) = sqrt((900 + 1600) / 2) = 50 / sqrt(2); the mean is 2, sigma = 1.
    normalized = np.array([0.6, 0.8]) * np.sqrt(2)
    # T = W - 2 G^; f = phi = 2 at first, so grad l = 2 * 2 - sum(T) = sum(2 G^).
    # Its slope is 2 and alpha = 1 / 2: phi' = 2 - sum(2 G^) / 2 = 2 - 1.4 sqrt(2).
    phi = 2 - 1.4 * np.sqrt(2)
    pull = np.array([1 - phi, 3 - phi])
    expected = coupling * pull / np.sqrt(np.mean(pull**2)) + (1 - coupling) * normalized
    np.testing.assert_allclose(updates[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(pranam_optax.embedding_output(state), phi, atol=1e-6)
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
    params = jax.tree.map(lambda x: x.astype(jnp.float64), make_params())
    embedding = pranam_optax.mlp_embedding((2,))
    tx = pranam_optax.pranam(embedding, coupling=0.7, step_size=3.0)
    state = tx.init(params)
    phi = state.embedding.args[0]
    table = np.asarray(phi.table)
    heads = np.concatenate([x.reshape(2, -1) for x in jax.tree.leaves(phi.heads)], 1)
    bias = np.concatenate([x.ravel() for x in jax.tree.leaves(phi.bias)])
    for seed in range(10):
        grads = make_gradients(params, seed)
        updates, state = one_update(tx, grads, params, state)
        expected, table, heads, bias = reference_step(
            as_matrix(params), as_matrix(grads), table, heads, bias, 0.7, 3.0
        )
        np.testing.assert_allclose(as_matrix(updates), expected, rtol=1e-9, atol=1e-11)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))


def test_projection_follows_the_gradient_of_the_literal_loss():
    params, rate = make_params(), 1e-3
    grads = make_gradients(params)
    embedding = pranam_optax.mlp_embedding((3, 5), activation=jnp.tanh, warmup="none")
    tx = pranam_optax.pranam(
        embedding, step_size=2.0, projection_optimizer=optax.sgd(rate)
    )
    state = tx.init(params)
    _, new_state = one_update(tx, grads, params, state)

    g_rms = rms(grads)
    sigma = np.sqrt(np.mean((as_matrix(params) - as_matrix(params).mean(0)) ** 2))

    def literal(phi):
        output = embedding.apply(phi)
        target = jax.tree.map(lambda w, g: w - 2.0 * sigma * g / g_rms, params, grads)
        return 0.5 * sum(
            jnp.sum((output[k] - jax.lax.stop_gradient(target[k])) ** 2) for k in output
        )

    phi, new_phi = (s.embedding.args[0] for s in (state, new_state))
    expected = jax.tree.map(lambda p, g: p - rate * g, phi, jax.grad(literal)(phi))
    chex.assert_trees_all_close(new_phi, expected, rtol=1e-5, atol=1e-6)


def test_original_loss_is_the_case_of_replicas_at_the_embedding():
    """With W = f(phi) the gradient is that of 1/2 ||f - sg(f) + s sigma G^||^2."""
    embedding = pranam_optax.mlp_embedding((2,))
    phi = embedding.init(jax.random.key(0), make_params())
    params = embedding.apply(phi)
    grads = make_gradients(params)
    everyone = jnp.ones(R, bool)
    target = jax.tree.map(jnp.subtract, params, grads)
    ours = jax.grad(lambda p: projection_loss(embedding.apply, p, target, everyone))

    def original(phi):
        f = embedding.apply(phi)
        stopped = jax.lax.stop_gradient(f)
        return 0.5 * sum(jnp.sum((f[k] - stopped[k] + grads[k]) ** 2) for k in f)

    chex.assert_trees_all_close(
        ours(phi), jax.grad(original)(phi), rtol=1e-4, atol=1e-5
    )


def test_line_search_is_exact_on_a_linear_embedding():
    params = jnp.array([[1.0], [3.0]])
    tx = pranam_optax.pranam(pull_to_the_mean())
    _, state = one_update(tx, jnp.array([[1.0], [2.0]]), params)
    again = pranam_optax.pranam(pull_to_the_mean(), projection_steps=4)
    _, same = one_update(again, jnp.array([[1.0], [2.0]]), params)
    # One step reaches the minimum of a quadratic in one variable; more stay there.
    chex.assert_trees_all_close(state.embedding(), same.embedding(), rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer", [None, optax.sgd(0.01), optax.lbfgs(), optax.adam(0.01)]
)
def test_more_projection_steps_come_closer_to_the_target(optimizer, optax_promotion):
    params = make_params()
    grads = make_gradients(params)
    target_distance = []
    for steps in (1, 20):
        tx = pranam_optax.pranam(
            pranam_optax.mlp_embedding((2,)),
            step_size=1.0,
            projection_optimizer=optimizer,
            projection_steps=steps,
        )
        updates, state = one_update(tx, grads, params)
        np.testing.assert_allclose(rms(updates), 1.0, rtol=1e-5)
        deviations = as_matrix(params) - as_matrix(params).mean(0)
        sigma = np.sqrt(np.mean(deviations**2))
        target = as_matrix(params) - sigma * as_matrix(grads) / rms(grads)
        target_distance.append(np.sum((as_matrix(state.embedding()) - target) ** 2))
    assert target_distance[1] < 0.95 * target_distance[0]


# Normalisation and coupling


@pytest.mark.parametrize("coupling", [0.0, 1.0])
def test_updates_have_rms_one_at_both_ends(coupling):
    params = make_params()
    tx = pranam_optax.pranam(coupling=coupling)
    updates, _ = one_update(tx, make_gradients(params), params)
    np.testing.assert_allclose(rms(updates), 1.0, rtol=1e-6)


def test_without_normalisation_updates_have_the_rms_of_the_gradient():
    params = make_params()
    grads = jax.tree.map(lambda g: 37.0 * g, make_gradients(params))
    tx = pranam_optax.pranam(normalize_updates=False)
    updates, _ = one_update(tx, grads, params)
    np.testing.assert_allclose(rms(updates), rms(grads), rtol=1e-6)
    normalized, _ = one_update(pranam_optax.pranam(), grads, params)
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda u: u * rms(grads), normalized), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_no_coupling_without_normalisation_returns_the_gradient_bit_for_bit(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), make_params())
    grads = make_gradients(params)
    special = jnp.array([-0.0, 0.0, 1e-7, 6e4, -6e-8, 1 / 3], dtype)
    grads["b"] = special
    tx = pranam_optax.pranam(coupling=0.0, normalize_updates=False)
    updates, _ = one_update(tx, grads, params)
    for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()


@pytest.mark.parametrize("scale", [1e6, 1e-6, 1e25, 1e-25])
def test_the_scale_of_the_loss_does_not_matter(scale):
    params = make_params()

    def scaled_gradient(factor):
        return lambda params, t: jax.tree.map(
            lambda g: factor * g, sphere_gradient(params, t)
        )

    for coupling in (0.0, 0.5, 1.0):
        tx = pranam_optax.pranam(coupling=coupling)
        path, _ = run(tx, params, 5, scaled_gradient(1.0))
        scaled, _ = run(tx, params, 5, scaled_gradient(scale))
        chex.assert_trees_all_close(scaled, path, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_units_of_the_weights_do_not_matter(scale):
    params = make_params()
    grads = make_gradients(params)
    embedding = pranam_optax.mlp_embedding((2,))
    tx = pranam_optax.pranam(embedding)
    updates, _ = one_update(tx, grads, params)
    scaled, _ = one_update(tx, grads, jax.tree.map(lambda x: x * scale, params))
    # Not equal: bias and heads weigh differently in the gradient of the projection.
    np.testing.assert_allclose(rms(scaled), rms(updates), rtol=1e-5)


def test_coupling_of_each_replica():
    params = make_params()
    grads = make_gradients(params)
    ladder = jnp.linspace(0.0, 1.0, R)
    updates, _ = one_update(pranam_optax.pranam(coupling=ladder), grads, params)
    for r in range(R):
        tx = pranam_optax.pranam(coupling=float(ladder[r]))
        expected, _ = one_update(tx, grads, params)
        chex.assert_trees_all_close(
            pranam_optax.select_replica(updates, r),
            pranam_optax.select_replica(expected, r),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("per_replica", [False, True])
def test_schedule_of_the_coupling(per_replica):
    params = make_params()
    grads = make_gradients(params)
    shape = (R,) if per_replica else ()

    def schedule(count):  # 1.5, 0.5, -0.5, ...: clipped to [0, 1]
        return jnp.full(shape, 1.5) - count.astype(jnp.float32)

    tx = pranam_optax.pranam(coupling=schedule)
    state = tx.init(params)
    for coupling in (1.0, 0.5, 0.0, 0.0):
        fixed = pranam_optax.pranam(coupling=coupling)
        expected, _ = one_update(fixed, grads, params, state)
        updates, state = one_update(tx, grads, params, state)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert state.count == 4


def test_schedules_of_optax(optax_promotion):
    params = make_params()
    tx = pranam_optax.pranam(coupling=optax.linear_schedule(1.0, 0.0, 10))
    state = tx.init(params)._replace(count=jnp.array(10, jnp.int32))
    grads = make_gradients(params)
    updates, _ = one_update(tx, grads, params, state)
    expected, _ = one_update(pranam_optax.pranam(coupling=0.0), grads, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


# Degenerate ensembles


@pytest.mark.parametrize("coupling", [0.5, 1.0])
@pytest.mark.parametrize("num_replicas", [1, 5])
@pytest.mark.parametrize("start", [0.0, 3.0])
def test_identical_replicas_descend(coupling, num_replicas, start):
    params = jnp.full((num_replicas, 4), start)
    target = jnp.array([[1.0, -2.0, 0.5, 4.0]])
    path, _ = run(
        pranam_optax.pranam(coupling=coupling),
        params,
        60,
        lambda params, t: params - target,
    )
    losses = [jnp.mean((p - target) ** 2) for p in (params, *path)]
    assert losses[1] < losses[0]
    assert min(losses) < 0.05 * losses[0]


def test_one_replica_starts_along_its_normalised_gradient():
    params = make_params(1)
    grads = make_gradients(params)
    updates, _ = one_update(pranam_optax.pranam(), grads, params)
    np.testing.assert_allclose(
        as_matrix(updates), as_matrix(grads) / rms(grads), rtol=1e-4, atol=1e-5
    )


def test_identical_replicas_that_see_different_data_learn_an_embedding():
    params = jnp.ones((8, 3))
    target = jax.random.normal(jax.random.key(0), (8, 3))
    _, state = run(pranam_optax.pranam(), params, 30, lambda w, t: w - target)
    assert jnp.std(state.embedding(), axis=0).min() > 0.1


@pytest.mark.parametrize("normalize_updates", [True, False])
def test_zero_gradients(normalize_updates):
    params = make_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = pranam_optax.pranam(coupling=0.5, normalize_updates=normalize_updates)
    updates, state = one_update(tx, zeros, params)
    chex.assert_tree_all_finite((updates, state))
    # Of the gradient nothing is left; the pull remains, in the gradient's scale.
    expected = 0.5 if normalize_updates else 0.0
    np.testing.assert_allclose(rms(updates), expected, rtol=1e-5)


@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
def test_zero_pull(coupling):
    """Replicas in the plane of the embedding and zero gradients: nothing to do."""
    params = make_params(4)
    embedding = pranam_optax.mlp_embedding((7,))
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = pranam_optax.pranam(embedding, coupling=coupling)
    updates, state = one_update(tx, zeros, params)
    assert rms(updates) == 0.0
    chex.assert_trees_all_close(state.embedding(), params, atol=1e-5)


def test_zero_weights_and_gradients():
    params = jax.tree.map(jnp.zeros_like, make_params())
    updates, state = one_update(pranam_optax.pranam(), params, params)
    assert rms(updates) == 0.0
    chex.assert_tree_all_finite(state)


# Symmetry


def test_permuting_replicas_permutes_the_result():
    params = make_params()
    order = jnp.array([3, 0, 5, 1, 4, 2])
    embedding = pranam_optax.mlp_embedding((2,))
    tx = pranam_optax.pranam(embedding, coupling=0.7)
    path, _ = run(tx, params, 8, sphere_gradient)
    permuted = jax.tree.map(lambda x: x[order], params)
    permuted_path, _ = run(tx, permuted, 8, sphere_gradient)
    chex.assert_trees_all_close(
        permuted_path[-1],
        jax.tree.map(lambda x: x[order], path[-1]),
        rtol=1e-3,
        atol=1e-4,
    )


def test_leaves_may_be_split_or_joined():
    """Norms are over the whole tree: its division into leaves does not matter."""
    params = make_params()
    joined = jnp.asarray(as_matrix(params), jnp.float32)
    embedding = pranam_optax.mlp_embedding((2,))
    tx = pranam_optax.pranam(embedding, coupling=0.7)
    path, _ = run(tx, params, 8, sphere_gradient)
    joined_path, _ = run(tx, joined, 8, sphere_gradient)
    np.testing.assert_allclose(
        as_matrix(path[-1]), joined_path[-1], rtol=1e-3, atol=1e-4
    )


# Replicas that are not finite


def spoil(tree, replica, value):
    return {**tree, "w": tree["w"].at[replica, 1, 0].set(value)}


def without(tree, replica):
    return jax.tree.map(lambda x: jnp.delete(x, replica, axis=0), tree)


@pytest.mark.parametrize("normalize_updates", [True, False])
@pytest.mark.parametrize("first_bad_step", [0, 3])
def test_a_bad_gradient_changes_no_other_replica_by_a_bit(
    normalize_updates, first_bad_step
):
    """Marked out by its weights, or out because of its gradient: the same bits."""
    dead, params = 2, make_params()
    tx = pranam_optax.pranam(coupling=0.7, normalize_updates=normalize_updates)

    def make_step(bad_gradient):
        @jax.jit
        def step(params, state, t):
            grads = sphere_gradient(params, t)
            now = (t >= first_bad_step) & jnp.isfinite(params["w"][dead, 1, 0])
            bad = spoil(grads, dead, bad_gradient)
            grads = jax.tree.map(lambda b, g: jnp.where(now, b, g), bad, grads)
            updates, state = tx.update(grads, state, params)
            new = jax.tree.map(lambda w, u: w - 0.1 * u, params, updates)
            return new, state, updates

        return step

    paths = []
    for bad_gradient, bad_weight in [
        (jnp.nan, None),
        (jnp.inf, None),
        (-jnp.inf, None),
        (jnp.nan, jnp.nan),
        (jnp.nan, jnp.inf),
    ]:
        step, state, current = make_step(bad_gradient), tx.init(params), params
        path = []
        for t in range(8):
            if t == first_bad_step and bad_weight is not None:
                current = spoil(current, dead, bad_weight)
            current, state, updates = step(current, state, t)
            path.append(without(current, dead))
            if t >= first_bad_step:
                assert all(jnp.all(u[dead] == 0) for u in jax.tree.leaves(updates))
        chex.assert_tree_all_finite(path[-1])
        chex.assert_tree_all_finite(state.embedding())
        expected = np.zeros(R)
        expected[dead] = 8 - first_bad_step
        np.testing.assert_array_equal(state.nonfinite, expected)
        paths.append(path)
    for path in paths[1:]:
        chex.assert_trees_all_equal(path, paths[0])


def test_a_replica_that_is_out_from_the_start_might_as_well_not_be_there():
    dead, params = 2, make_params()
    embedding = pranam_optax.mlp_embedding((2,))
    tx = pranam_optax.pranam(embedding, coupling=0.7)
    path, _ = run(tx, spoil(params, dead, jnp.nan), 8, sphere_gradient)
    expected, _ = run(tx, without(params, dead), 8, sphere_gradient)
    chex.assert_trees_all_close(
        without(path[-1], dead), expected[-1], rtol=1e-3, atol=1e-4
    )


def test_a_replica_comes_back_when_it_is_finite_again():
    params = make_params()
    grads = make_gradients(params)
    tx = pranam_optax.pranam()
    _, state = one_update(tx, spoil(grads, 2, jnp.nan), params)
    updates, state = one_update(tx, grads, params, state)
    assert all(jnp.any(u[2] != 0) for u in jax.tree.leaves(updates))
    np.testing.assert_array_equal(state.nonfinite, [0, 0, 1, 0, 0, 0])


def test_no_finite_replica_at_all():
    params = make_params()
    grads = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    updates, state = one_update(pranam_optax.pranam(), grads, params)
    assert rms(updates) == 0.0
    chex.assert_tree_all_finite(state)
    np.testing.assert_array_equal(state.nonfinite, np.ones(R))


@pytest.mark.parametrize("huge", [1e20, 1e30, 3e38])
@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_huge_values_in_one_replica_poison_no_other(huge, where):
    params = make_params()
    grads = make_gradients(params)
    if where == "gradient":
        grads = spoil(grads, 2, huge)
    else:
        params = spoil(params, 2, huge)
    updates, state = one_update(pranam_optax.pranam(coupling=0.5), grads, params)
    chex.assert_tree_all_finite((updates, state))


# State and tracing


def test_state_is_stable_and_a_step_compiles_once(optax_promotion, assert_stable):
    params = make_params()
    tx = optax.chain(
        pranam_optax.pranam(coupling=optax.linear_schedule(1.0, 0.0, 5)),
        optax.adam(1e-2),
    )

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(sphere_gradient(params, 0), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        new_params, new_state = step(params, state)
        assert_stable((params, state), (new_params, new_state))
        params, state = new_params, new_state
    assert step._cache_size() == 1
    assert state[0].count == 5


def test_with_and_without_jit_agree():
    params = make_params()
    grads = make_gradients(params)
    tx = pranam_optax.pranam(coupling=0.5)
    state = tx.init(params)
    with jax.disable_jit():
        expected = tx.update(grads, state, params)
    chex.assert_trees_all_close(
        jax.jit(tx.update)(grads, state, params), expected, rtol=1e-5, atol=1e-6
    )


def test_init_is_abstract_and_takes_a_tree_without_leaves():
    params = make_params()
    tx = pranam_optax.pranam(projection_optimizer=optax.adam(1.0))
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        state, jax.eval_shape(tx.init, params)
    )
    assert tx.init({}).nonfinite.shape == (0,)
    # Optax calls `init` on a placeholder to find out what is like the params.
    mapped = optax.tree.map_params(tx, lambda x: x * 0 + 1, state)
    phi = mapped.embedding.args[0]
    assert all(jnp.all(x == 1) for x in jax.tree.leaves((phi.heads, phi.bias)))
    chex.assert_trees_all_equal(phi.table, state.embedding.args[0].table)


def test_state_does_not_alias_params_and_may_be_donated():
    params = make_params(1)  # one replica: the bias is the replica itself
    tx = pranam_optax.pranam()
    state = tx.init(params)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    grads = make_gradients(params)
    expected = jax.jit(tx.update)(grads, state, params)
    chex.assert_trees_all_equal(step(grads, state, params), expected)
    chex.assert_tree_all_finite(params)


def test_unknown_keywords_are_ignored():
    params = make_params()
    grads = make_gradients(params)
    tx = pranam_optax.pranam()
    state = tx.init(params)
    chex.assert_trees_all_equal(
        tx.update(grads, state, params, value=1.0, values=jnp.ones(R), other=None),
        tx.update(grads, state, params),
    )


def test_arrays_of_numpy_in_float64_without_x64():
    params = {k: np.asarray(x, np.float64) for k, x in make_params().items()}
    tx = pranam_optax.pranam()
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    expected, expected_state = tx.update(
        make_params(), tx.init(make_params()), make_params()
    )
    chex.assert_trees_all_equal_dtypes(updates, expected)
    chex.assert_trees_all_close((updates, state), (expected, expected_state), atol=1e-6)


def test_inject_hyperparams():
    params = make_params()
    grads = make_gradients(params)
    tx = optax.inject_hyperparams(
        pranam_optax.pranam,
        static_args=("projection_steps", "projection_every", "key"),
    )(coupling=0.25, step_size=2.0)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(grads, state, params):
        return tx.update(grads, state, params)

    state = tx.init(params)
    for coupling in (0.25, 0.75, 1.0):
        state.hyperparams["coupling"] = jnp.asarray(coupling)
        fixed = pranam_optax.pranam(coupling=coupling, step_size=2.0)
        expected, _ = fixed.update(grads, state.inner_state, params)
        updates, state = update(grads, state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


def test_masked_leaves_are_left_alone():
    params = {**make_params(), "steps": jnp.arange(3)}
    grads = {**make_gradients(make_params()), "steps": jnp.ones(3)}
    tx = optax.masked(pranam_optax.pranam(), {"w": True, "b": True, "steps": False})
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = pranam_optax.pranam().update(
        make_gradients(make_params()),
        pranam_optax.pranam().init(make_params()),
        make_params(),
    )
    chex.assert_trees_all_equal(updates, {**expected, "steps": jnp.ones(3)})


@pytest.mark.slow
@hypothesis.given(
    num_replicas=st.integers(1, 9),
    shapes=st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=3),
    dtypes=st.lists(
        st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
        min_size=3,
        max_size=3,
    ),
    features=st.sampled_from([(1,), (4,), (2, 3)]),
    coupling=st.sampled_from([0.0, 0.5, 1.0]),
    normalize_updates=st.booleans(),
)
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shapes_and_dtypes(
    num_replicas, shapes, dtypes, features, coupling, normalize_updates
):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), len(shapes))
        params = [
            jax.random.normal(k, (num_replicas, *shape)).astype(dtype)
            for k, shape, dtype in zip(keys, shapes, dtypes, strict=False)
        ]
        grads = make_gradients(params)
        warmup = "fit" if len(features) == 1 else "rescale"
        tx = pranam_optax.pranam(
            pranam_optax.mlp_embedding(features, warmup=warmup),
            coupling=coupling,
            normalize_updates=normalize_updates,
        )
        updates, state = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(
            grads, params
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        chex.assert_tree_all_finite((updates, state))
        if coupling == 0.0:
            unit = rms(grads) if normalize_updates else 1.0
            expected = as_matrix(grads) / unit
            np.testing.assert_allclose(as_matrix(updates), expected, rtol=2e-2)
        else:
            unit = 1.0 if normalize_updates else rms(grads)
            assert rms(updates) <= 1.02 * unit


# Errors


def test_errors_of_the_factory():
    for coupling in (1.5, -0.1, np.nan, [0.5, 2.0], [[0.5]]):
        with pytest.raises(ValueError, match=r"coupling must be a number in \[0, 1\]"):
            pranam_optax.pranam(coupling=coupling)
    for step_size in (-1.0, np.nan, np.inf, [1.0]):
        with pytest.raises(ValueError, match="step_size must be a number >= 0"):
            pranam_optax.pranam(step_size=step_size)


def update_with(params=None, grads=None, init=None, **kwargs):
    params = make_params() if params is None else params
    grads = make_gradients(make_params()) if grads is None else grads
    tx = pranam_optax.pranam(**kwargs)
    return tx.update(grads, tx.init(make_params() if init is None else init), params)


def test_params_are_needed():
    tx = pranam_optax.pranam()
    params = make_params()
    with pytest.raises(ValueError, match=r"call tx.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))


def test_a_leaf_without_replica_axis_is_named():
    for value in (jnp.ones(()), jnp.ones((0, 2))):
        params = {"w": jnp.ones((3, 2)), "deep": [value]}
        with pytest.raises(
            ValueError, match=r"params\['deep'\]\[0\] has shape .* axis"
        ):
            pranam_optax.pranam().init(params)


def test_leaves_that_disagree_are_both_named():
    params = {"a": jnp.ones((3, 2)), "b": {"c": jnp.ones((4, 2))}}
    message = (
        r"params\['a'\] has shape \(3, 2\), params\['b'\]\['c'\] has shape \(4, 2\)"
    )
    with pytest.raises(ValueError, match=message):
        pranam_optax.pranam().init(params)
    with pytest.raises(ValueError, match=message.replace("params", "updates")):
        update_with(grads=params)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_leaves_must_be_floating(dtype):
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(3, dtype)}
    name = jnp.dtype(dtype).name
    with pytest.raises(TypeError, match=rf"params\['b'\] has dtype {name} \(shape"):
        pranam_optax.pranam().init(params)
    with pytest.raises(TypeError, match=rf"updates\['b'\] has dtype {name} \(shape"):
        update_with(grads=params)


def test_empty_updates():
    tx = pranam_optax.pranam()
    with pytest.raises(ValueError, match="updates has no leaves"):
        tx.update({}, tx.init({}), {})


def test_updates_and_params_of_different_structure():
    grads = make_gradients(make_params())
    with pytest.raises(
        ValueError, match=r"updates\['b'\] is missing and params\['b'\]"
    ):
        update_with(grads={"w": grads["w"]})
    with pytest.raises(
        ValueError, match=r"has shape \(6,\) and params\['c'\] is missing"
    ):
        update_with(grads={**grads, "c": jnp.ones(R)})
    with pytest.raises(ValueError, match=r"updates\['w'\] has shape \(6, 2, 3\) and"):
        update_with(grads={**grads, "w": jnp.ones((R, 2, 3))})
    with pytest.raises(ValueError, match=r"same structure, but updates is PyTreeDef"):
        update_with(
            params=(make_params()["w"], make_params()["b"]),
            grads=[grads["w"], grads["b"]],
        )


def test_coupling_of_another_length():
    message = r"coupling has shape \(3,\), expected a scalar or one .* \(6,\)"
    with pytest.raises(ValueError, match=message):
        update_with(coupling=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=message):
        update_with(coupling=lambda count: jnp.ones(3))


def test_state_of_another_number_of_replicas():
    with pytest.raises(ValueError, match=r"updates has 6 replicas, but the state .* 4"):
        update_with(init=make_params(4))


# The purpose


def test_reaches_a_minimum_that_adam_does_not(optax_promotion):
    problem = problems.randomize(problems.ackley(10), 3, rotated=True)
    params = pranam_optax.replicate(problem.init, 4, 32)
    grad_fn = pranam_optax.replica_value_and_grad(problem.fun)
    adam = optax.adam(optax.cosine_decay_schedule(1.0, 400))
    release = optax.linear_schedule(1.0, 0.0, 400)

    def train(tx):
        def step(carry, _):
            params, state = carry
            _, grads = grad_fn(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (final, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, 400)
        return jax.vmap(problem.fun)(final)

    assert jnp.min(jax.jit(lambda: train(adam))()) > 3
    coupled = optax.chain(pranam_optax.pranam(coupling=release), adam)
    assert jnp.max(jax.jit(lambda: train(coupled))()) < 0.05


def test_between_projections_replicas_are_pulled_to_the_embedding_as_it_is():
    keys = jax.random.split(jax.random.key(0), 2)
    params, grads = (jax.random.normal(key, (6, 5)) for key in keys)
    tx = pranam_optax.pranam(coupling=0.7, projection_every=3)
    every = pranam_optax.pranam(coupling=0.7)
    state = tx.init(params)
    updates, after = tx.update(grads, state, params)
    expected, projected = every.update(grads, every.init(params), params)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)
    chex.assert_trees_all_close(
        after.embedding.args, projected.embedding.args, rtol=1e-5
    )

    moved = params + 0.1 * jnp.cos(jnp.arange(30.0)).reshape(6, 5)
    grads = grads.at[2].set(jnp.nan)
    for count in (2, 3):
        updates, later = tx.update(grads, after, moved)
        assert later.count == count
        chex.assert_trees_all_equal(later.embedding.args, after.embedding.args)
        pull = np.array(moved - pranam_optax.embedding_output(after))
        unit = [np.sqrt(np.mean(x**2, axis=1, keepdims=True)) for x in (pull, grads)]
        expected = 0.7 * pull / unit[0] + 0.3 * np.array(grads) / unit[1]
        np.testing.assert_array_equal(updates[2], np.zeros(5))
        expected[2] = 0
        np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-6)
        after = later
    _, later = tx.update(grads, after, moved)
    assert not np.array_equal(
        later.embedding.args[0].table, projected.embedding.args[0].table
    )


@pytest.mark.parametrize("name", ["projection_steps", "projection_every"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_numbers_of_projections_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive int, got"):
        pranam_optax.pranam(**{name: value})
