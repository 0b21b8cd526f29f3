"""Checks of and arithmetic on trees with a replica axis: axis 0 of every leaf."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

PyTree = Any


def leaf_dtype(leaf: Any) -> jnp.dtype:
    """The dtype that an array, a ShapeDtypeStruct or a number has inside JAX."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jax.dtypes.canonicalize_dtype(dtype)


def compute_dtype(*leaves: Any) -> jnp.dtype:
    """The dtype of the embedding and of every norm: float64 if a leaf is, else float32.

    Independent of the promotion mode, which may be strict.
    """
    wide = any(leaf_dtype(x) == jnp.float64 for x in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def check_replicas(tree: PyTree, name: str) -> int:
    """Checks that every leaf is floating with the same leading axis, and returns R.

    A tree without leaves, such as Optax's placeholder for params, has R = 0.
    """
    first = None
    num_replicas = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where, shape, dtype = name + keystr(path), jnp.shape(leaf), leaf_dtype(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{where} has dtype {dtype} (shape {shape}); replicas need real "
                "floating-point leaves. Leave other leaves out with optax.masked or "
                "optax.partition."
            )
        if not shape or not shape[0]:
            raise ValueError(
                f"{where} has shape {shape} and no replica axis; every leaf needs a "
                "leading axis of length R, the number of replicas (see replicate)."
            )
        if first is None:
            first, num_replicas = f"{where} has shape {shape}", shape[0]
        elif shape[0] != num_replicas:
            raise ValueError(
                f"leaves disagree on the number of replicas: {first}, {where} has "
                f"shape {shape}; axis 0 must have the same length in every leaf."
            )
    return num_replicas


def check_update(
    name: str, updates: PyTree, params: PyTree, nonfinite: jax.Array
) -> None:
    """Checks what `update` was given against the state's counts.

    `name` is what the messages call the transformation.
    """
    if params is None:
        raise ValueError(
            f"{name} needs the replicas' params: call tx.update(grads, state, params)"
        )
    num_replicas = check_replicas(updates, "updates")
    check_replicas(params, "params")
    if not num_replicas:
        raise ValueError(f"updates has no leaves; {name} needs at least one")
    update_shapes, param_shapes = (
        {
            keystr(path): jnp.shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (updates, params)
    )
    for path in update_shapes | param_shapes:
        ours, theirs = update_shapes.get(path), param_shapes.get(path)
        if ours != theirs:
            raise ValueError(
                "updates and params must have the same structure and shapes, but "
                f"updates{path} {_describe(ours)} and params{path} {_describe(theirs)}"
            )
    update_structure: Any = jax.tree.structure(updates)
    param_structure = jax.tree.structure(params)
    if update_structure != param_structure:
        raise ValueError(
            "updates and params must have the same structure, but updates is "
            f"{update_structure} and params is {param_structure}"
        )
    if nonfinite.shape != (num_replicas,):
        raise ValueError(
            f"updates has {num_replicas} replicas, but the state was initialised for "
            f"{nonfinite.shape[0]}"
        )


def _describe(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else f"has shape {shape}"


def zero_counts(params: PyTree) -> jax.Array:
    """A zero for each replica, sharded as the replicas are.

    Under jit only what depends on the params is sharded like them; and no weight is
    greater than infinity.
    """
    for x in jax.tree.leaves(params):
        axes = tuple(range(1, x.ndim))
        return jnp.any(x > jnp.inf, axis=axes).astype(jnp.int32)
    return jnp.zeros([0], jnp.int32)


def broadcast_to_leaf(values: jax.Array, leaf: jax.Array) -> jax.Array:
    """Reshapes `[R]` to `[R, 1, ...]`, so that it acts on each replica of `leaf`."""
    return values.reshape(values.shape + (1,) * (leaf.ndim - 1))


def mask_replicas(finite: jax.Array, tree: PyTree) -> PyTree:
    """The tree with zeros in the replicas that are left out (`finite` is `[R]`)."""
    return jax.tree.map(
        lambda x: jnp.where(broadcast_to_leaf(finite, x), x, jnp.zeros_like(x)), tree
    )


def largest_magnitudes(tree: PyTree, dtype: jnp.dtype) -> jax.Array:
    """Largest |x| of each replica, `[R]`: NaN or Inf where the replica has either."""
    return jax.tree.reduce(
        jnp.maximum,
        jax.tree.map(
            lambda x: jnp.max(
                jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0.0
            ).astype(dtype),
            tree,
        ),
    )


def in_range(magnitudes: jax.Array) -> jax.Array:
    """Whether numbers of these magnitudes can be squared: not NaN, not too large."""
    return magnitudes < jnp.sqrt(jnp.finfo(magnitudes.dtype).max)


def sum_of_squares(tree: PyTree) -> jax.Array:
    """Sum of squares of all elements, in the widest dtype of the leaves."""
    dtype = compute_dtype(*jax.tree.leaves(tree))
    sums = [jnp.sum(jnp.square(x)).astype(dtype) for x in jax.tree.leaves(tree)]
    return sum(sums, start=jnp.zeros([], dtype))


def replica_norms(tree: PyTree, dtype: jnp.dtype) -> jax.Array:
    """L2 norm of each replica, `[R]`, NaN or Inf where an element is or a square."""
    leaves = jax.tree.leaves(cast(tree))
    squares = [jnp.sum(x * x, axis=range(1, x.ndim)).astype(dtype) for x in leaves]
    return jnp.sqrt(functools.reduce(jnp.add, squares))


def scaled_replica_norms(tree: PyTree, dtype: jnp.dtype) -> jax.Array:
    """`replica_norms`, NaN or Inf only where an element is."""
    largest = largest_magnitudes(tree, dtype)
    valid = jnp.isfinite(largest) & (largest > 0)
    unit = jnp.where(valid, largest, 1.0)
    norms = unit * replica_norms(scale(1 / unit, cast(tree)), dtype)
    return jnp.where(valid, norms, largest)


def replica_mean(tree: PyTree, finite: jax.Array) -> PyTree:
    """Mean over the finite replicas."""
    count = jnp.maximum(jnp.sum(finite), 1)

    # As a product with a row, which is much faster than a sum over axis 0 on CPUs.
    def mean(x: jax.Array) -> jax.Array:
        row = finite.astype(x.dtype)
        total = jnp.tensordot(row, x, 1, precision=jax.lax.Precision.HIGHEST)
        return total / count.astype(x.dtype)

    return jax.tree.map(mean, mask_replicas(finite, tree))


def deviations_from(mean: PyTree, tree: PyTree, finite: jax.Array) -> PyTree:
    """W - mean, zero for the replicas that are left out."""
    return mask_replicas(finite, jax.tree.map(lambda x, m: x - m[None], tree, mean))


def times(factor: jax.Array, leaf: jax.Array) -> jax.Array:
    """A scalar, or one factor per replica, times a leaf, in the leaf's dtype."""
    # Cast after the product: in a narrower dtype the factor may be infinite.
    dtype = compute_dtype(factor, leaf)
    factor = broadcast_to_leaf(factor, leaf) if factor.ndim else factor
    return (leaf.astype(dtype) * factor.astype(dtype)).astype(leaf.dtype)


def scale(factor: jax.Array, tree: PyTree) -> PyTree:
    """A scalar, or one factor per replica, times a tree."""
    return jax.tree.map(lambda x: times(factor, x), tree)


def positive(x: jax.Array) -> jax.Array:
    """x, or 1 where x is zero."""
    return jnp.where(x > 0, x, 1.0)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x, or 0 where x is zero."""
    return jnp.where(x > 0, 1 / positive(x), 0.0)


def cast(tree: PyTree) -> PyTree:
    """Casts every leaf to at least float32."""
    return jax.tree.map(lambda x: jnp.asarray(x, compute_dtype(x)), tree)
