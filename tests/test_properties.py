"""What holds for every tree, dtype, number of replicas and width, whatever the data."""

import contextlib
import functools
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
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
    make_gradients,
    rms,
)

bf16, f16, f32, f64 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64


class Leaf(NamedTuple):
    """A leaf of one model."""

    shape: tuple[int, ...]
    dtype: Any


class Pair(NamedTuple):
    first: Any
    second: Any


class Case(NamedTuple):
    """What is static: programs are compiled once for each case."""

    model: Any
    num_replicas: int
    features: tuple[int, ...]


CASES = {
    "nested, mixed, with an empty leaf": Case(
        {"a": [Leaf((2, 2), bf16), Leaf((0, 3), f32)], "c": (Leaf((3,), f32), None)},
        5,
        (2,),
    ),
    "f16 with an empty leaf": Case([Leaf((4,), f16), Leaf((2, 0), f16)], 2, (2,)),
    "f64 and f32": Case(Pair(Leaf((2,), f64), Leaf((3,), f32)), 3, (2,)),
    "one array": Case(Leaf((5,), f32), 4, (2,)),
    "scalars": Case({"w": Leaf((3, 2), f32), "b": Leaf((), f32)}, 3, (3,)),
    "one replica": Case(Pair(Leaf((3,), f32), Leaf((), f32)), 1, (2, 3)),
    "bf16, deep": Case({"w": Leaf((2, 3), bf16)}, 6, (4, 5)),
    "f16 and f64": Case({"x": Leaf((2,), f16), "y": [Leaf((2,), f64)]}, 2, (1,)),
}
FAST = list(CASES)[:3]


def is_leaf(node):
    return isinstance(node, Leaf)


def leaves_of(case):
    return jax.tree.leaves(case.model, is_leaf=is_leaf)


def precision(case):
    """Context in which the case has its dtypes."""
    wide = any(leaf.dtype == f64 for leaf in leaves_of(case))
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def tolerance(case):
    """What rounding may do to numbers of size 1 (phi has at least float32)."""
    return 1e-3 + 4 * max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves_of(case))


def draw_tree(case, rng, scale):
    """Normal numbers, stacked."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            scale * rng.normal(size=(case.num_replicas, *leaf.shape)), leaf.dtype
        ),
        case.model,
        is_leaf=is_leaf,
    )


def lane(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def permute(state, order):
    """The state with the codes of the replicas in another order."""
    return state._replace(phi=state.phi._replace(table=state.phi.table[order]))


def types(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def embedding_of(case):
    """Deep ones with parameters drawn, since their fit is slow to compile."""
    embedding = pranam_optax.mlp_embedding(case.features, activation=jnp.tanh)
    if len(case.features) == 1:
        return embedding
    shapes = functools.partial(jax.eval_shape, embedding.init)
    return embedding._replace(
        init=lambda key, params: make_gradients(shapes(key, params))
    )


def lanes(link, update):
    """One update in four lanes: as it is, permuted, scaled, uncoupled."""

    def program(params, grads, order, scale, coupling):
        state = link(coupling).init(params)

        def shuffle(tree):
            return jax.tree.map(lambda x: x[order], tree)

        scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        arguments = [
            (grads, state, params, coupling),
            (shuffle(grads), permute(state, order), shuffle(params), coupling),
            (scaled, state, params, coupling),
            (grads, state, params, jnp.zeros_like(coupling)),
        ]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *arguments)
        return state, jax.vmap(update)(*stacked)

    return jax.jit(program)


@functools.cache
def pranam_program(case_name):
    embedding = embedding_of(CASES[case_name])

    def link(coupling, normalize_updates=True):
        return pranam_optax.pranam(
            embedding, coupling=coupling, normalize_updates=normalize_updates
        )

    def update(grads, state, params, coupling):
        normalized, state_after = link(coupling).update(grads, state, params)
        raw, _ = link(coupling, False).update(grads, state, params)
        return normalized, raw, state_after

    return lanes(link, update)


@functools.cache
def reparametrize_program(case_name):
    embedding = embedding_of(CASES[case_name])
    tx = pranam_optax.reparametrize(optax.sgd(1e-3), embedding)

    def update(grads, state, params, coupling):
        del coupling
        updates, state_after = tx.update(grads, state, params)
        return updates, state_after.phi, embedding.apply(state_after.phi)

    return lanes(lambda coupling: tx, update)


@st.composite
def arguments(draw, case):
    """Params, gradients, an order, a factor for the gradients, and a coupling."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # In f16 the scaled gradients have to stay clear of its smallest numbers.
    narrow = any(leaf.dtype == f16 for leaf in leaves_of(case))
    limit = 4 if narrow else 40
    params = draw_tree(case, rng, 10.0 ** draw(st.integers(-2, 2)))
    grads = draw_tree(case, rng, 2.0 ** draw(st.integers(-limit // 2, limit // 2)))
    scale = 2.0 ** draw(st.integers(-limit // 2, limit // 2))
    coupling = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    order = rng.permutation(case.num_replicas)
    return params, grads, order, jnp.float32(scale), jnp.float32(coupling)


def check_pranam(name, drawn):
    case = CASES[name]
    _, grads, order, _, coupling = drawn
    state, (normalized, raw, after) = pranam_program(name)(*drawn)
    updates, atol = lane(normalized, 0), tolerance(case)
    assert types(updates) == types(grads)
    assert types(lane(after, 0)) == types(state)

    # The replicas have no order, and the loss no scale.
    weights = as_matrix(updates)
    assert_close(as_matrix(lane(normalized, 1)), weights[order], 1e-7, 4 * atol)
    assert_close(as_matrix(lane(normalized, 2)), weights, 1e-7, atol)
    # Sizes: 1 at both ends, and in between two unit vectors are mixed.
    size = rms(updates)
    if coupling in (0, 1):
        assert_close(size, 1, atol)
    assert size < 1 + atol
    assert size > 0.05 or coupling == 0.5  # where they might point apart
    assert_close(rms(lane(raw, 0)), size * rms(grads), 2 * atol)
    # Uncoupled the gradients come through bit for bit.
    assert_same_bits(lane(raw, 3), grads)


def check_reparametrize(name, drawn):
    case = CASES[name]
    params, grads, order, scale, _ = drawn
    state, (updates, phi, output) = reparametrize_program(name)(*drawn)
    assert types(lane(updates, 0)) == types(grads)
    assert types(lane(phi, 0)) == types(state.phi)
    # The update takes the replicas to the embedding.
    moved = as_matrix(params) + as_matrix(lane(updates, 0))
    target = as_matrix(lane(output, 0))
    largest = np.max(np.abs(target))
    size = largest + np.max(np.abs(as_matrix(params)))
    assert_close(moved, target, 1e-7, tolerance(case) * size)
    # The replicas have no order.
    assert_close(as_matrix(lane(output, 1)), target[order], 1e-3, 1e-4 * largest)
    # Plain descent of phi is proportional to the gradient.
    scale = float(scale)
    trees = state.phi, lane(phi, 0), lane(phi, 2)
    for start, step, scaled in zip(*map(jax.tree.leaves, trees), strict=True):
        rounding = 1e-5 * np.max(np.abs(scaled), initial=0.0)
        largest = np.max(np.abs(np.stack([start, step])), initial=1e-3)
        rounding += 1e-5 * (1 + scale) * largest
        assert_close(scaled - start, scale * (step - start), 1e-3, rounding)


@pytest.mark.parametrize("check", [check_pranam, check_reparametrize])
@pytest.mark.parametrize(
    ("names", "num_examples"),
    [(FAST, 50), pytest.param(list(CASES), 800, marks=pytest.mark.slow)],
    ids=["fast", "slow"],
)
def test_properties(check, names, num_examples):
    counts = dict.fromkeys(names, 0)

    @hypothesis.settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data(), st.sampled_from(names))
    def run(data, name):
        case = CASES[name]
        with precision(case):
            check(name, data.draw(arguments(case)))
        counts[name] += 1

    run()
    print(f"{check.__name__}: {sum(counts.values())} examples, {counts}")


# Gradients at both ends of f16


F16 = pranam_optax.mlp_embedding((2,))


@functools.partial(jax.jit, static_argnums=0)
def f16_update(normalize_updates, grads, params, coupling):
    given = {"coupling": coupling, "normalize_updates": normalize_updates}
    tx = pranam_optax.pranam(F16, **given)
    updates, state = tx.update(grads, tx.init(params), params)
    return updates, F16.apply(state.phi), state.nonfinite


@pytest.mark.parametrize("normalize_updates", [True, False])
@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("size", "dtype"),  # 6e-8 is the smallest number of f16
    [(6e-8, f16), (1e-6, f16), (1.0, f16), (6e4, f16), (1e-8, bf16)],
)
def test_gradients_of_any_size_for_f16_weights(
    size, dtype, coupling, normalize_updates
):
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(4, 6)), f16)
    grads = jnp.asarray(size * rng.choice([-1.0, 1.0], (4, 6)), dtype)
    given = params, jnp.float32(coupling)
    updates, output, nonfinite = f16_update(normalize_updates, grads, *given)
    assert updates.dtype == dtype
    assert np.all(np.isfinite(updates))
    assert np.all(np.isfinite(output))
    assert not np.any(nonfinite)
    if normalize_updates:
        ones, *_ = f16_update(True, jnp.sign(grads), *given)
        assert_close(rms(updates), rms(ones), 1e-2)
        assert rms(updates) > 0.1
    elif coupling == 0:
        assert_equal(updates, grads)
    else:
        assert 0.1 < rms(updates) / size < 2


@pytest.mark.parametrize("size", [1e-50, 1e-250, 1e50])
def test_gradients_out_of_range_of_another_leaf(size):
    """Of the loss's size nothing is left, also where f32 cannot hold its inverse."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        a, b = (jnp.asarray(rng.normal(size=(4, n))) for n in (3, 2))
        params = {"a": a, "b": b.astype(f32)}
        grads = {"a": jnp.asarray(rng.normal(size=(4, 3))), "b": jnp.zeros((4, 2), f32)}
        tx = pranam_optax.pranam(coupling=0.5)
        state = tx.init(params)
        expected, _ = tx.update(grads, state, params)
        updates, state = tx.update(grads | {"a": size * grads["a"]}, state, params)
        assert_equal(state.nonfinite, 0)
        assert_close(updates, expected, 1e-5)
