"""Checks of and arithmetic on trees with a replica axis: axis 0 of every leaf."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

PyTree = Any
# Rows that are multiplied with all others at a time.
_BLOCK = 32


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


def is_traced(*trees: PyTree) -> bool:
    """Whether a leaf is traced, so that its value cannot be checked."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees))


def check_count(value: Any, name: str) -> int:
    """Checks that a value is a whole number from 1 on; NumPy's will do, True will not.

    Raises:
      ValueError: if it is not.
    """
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return count


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


def check_same(ours: PyTree, theirs: PyTree, our_name: str, their_name: str) -> None:
    """Checks that two trees agree in structure and shapes, and names what does not."""
    our_shapes, their_shapes = shapes_by_path(ours), shapes_by_path(theirs)
    for path in our_shapes | their_shapes:
        our_shape, their_shape = our_shapes.get(path), their_shapes.get(path)
        if our_shape != their_shape:
            where = keystr(path)
            raise ValueError(
                f"{our_name} and {their_name} must have the same structure and shapes, "
                f"but {our_name}{where} {_describe(our_shape)} and "
                f"{their_name}{where} {_describe(their_shape)}"
            )
    structures: list[Any] = [jax.tree.structure(ours), jax.tree.structure(theirs)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{our_name} and {their_name} must have the same structure, but "
            f"{our_name} is {structures[0]} and {their_name} is {structures[1]}"
        )


def leaves_of(made: PyTree, tree: PyTree, name: str) -> dict[str, Any]:
    """The leaves of a tree that an embedding makes, by path: all but masked ones.

    Raises:
      ValueError: for a leaf that is made in another shape, or is not in the tree.
    """
    ours, theirs = (
        {keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
        for t in (tree, made)
    )
    for path, leaf in theirs.items():
        if path not in ours or jnp.shape(ours[path]) != leaf.shape:
            found = _describe(jnp.shape(ours[path]) if path in ours else None)
            raise ValueError(
                f"the state's embedding makes {name}{path} of shape {leaf.shape}, but "
                f"{name}{path} {found}"
            )
    return {path: ours[path] for path in theirs}


def shapes_by_path(tree: PyTree) -> dict[Any, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path: jnp.shape(leaf) for path, leaf in leaves}


def _describe(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else f"has shape {shape}"


def broadcast_to_leaf(values: jax.Array, leaf: jax.Array) -> jax.Array:
    """Reshapes `[R]` to `[R, 1, ...]`, so that it acts on each replica of `leaf`."""
    return values.reshape(values.shape + (1,) * (leaf.ndim - 1))


def cast(tree: PyTree, like: PyTree = None) -> PyTree:
    """Casts every leaf to at least float32, and to at least the dtype in `like`."""
    like = tree if like is None else like
    return jax.tree.map(lambda x, y: jnp.asarray(x, compute_dtype(x, y)), tree, like)


# One tree where `rows` (`[R]`) is True, another elsewhere: choose(rows, this, that).
choose = jax.vmap(optax.tree.where)


def mask_replicas(living: jax.Array, tree: PyTree, like: PyTree = None) -> PyTree:
    """The tree, in at least float32, with rows of zeros for those not living.

    Also in at least the dtypes of `like`.
    """
    tree = cast(tree, like)
    return choose(living, tree, optax.tree.zeros_like(tree))


def subtract(x: PyTree, y: PyTree) -> PyTree:
    """x - y, in the dtypes of x."""
    return jax.tree.map(lambda a, b: a - b.astype(a.dtype), x, y)


def times(factor: jax.Array, leaf: jax.Array) -> jax.Array:
    """A scalar, or one factor per replica, times a leaf, in the leaf's dtype."""
    # Cast after the product: in a narrower dtype the factor may be infinite.
    dtype = compute_dtype(factor, leaf)
    factor = broadcast_to_leaf(factor, leaf) if factor.ndim else factor
    return (leaf.astype(dtype) * factor.astype(dtype)).astype(leaf.dtype)


def scale(factor: jax.Array, tree: PyTree) -> PyTree:
    """A scalar, or one factor per replica, times a tree."""
    return jax.tree.map(lambda x: times(factor, x), tree)


def divide(tree: PyTree, unit: jax.Array) -> PyTree:
    """A tree over its `largest_entry`, as a product: quotients are slower."""
    return scale(1 / unit, tree)


def positive(x: jax.Array) -> jax.Array:
    """x, or 1 where x is zero."""
    return jnp.where(x > 0, x, 1.0)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x, or 0 where x is zero."""
    return jnp.where(x > 0, 1 / positive(x), 0.0)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root, with derivative 0 at 0."""
    return jnp.where(x > 0, jnp.sqrt(positive(x)), 0.0)


def total(tree: PyTree, reduce: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The sum over the leaves of what each is reduced to, in the widest dtype."""
    leaves = jax.tree.leaves(tree)
    dtype = compute_dtype(*leaves)
    sums = [reduce(x).astype(dtype) for x in leaves]
    return sum(sums[1:], start=sums[0]) if sums else jnp.zeros([], dtype)


def sum_of_squares(tree: PyTree) -> jax.Array:
    """Sum of squares of all elements."""
    return total(tree, lambda x: jnp.sum(jnp.square(x)))


def squared_norms(tree: PyTree) -> jax.Array:
    """Sum of squares of each replica, `[R]`."""
    return total(tree, lambda x: jnp.sum(jnp.square(x), axis=range(1, x.ndim)))


def largest_magnitudes(tree: PyTree) -> jax.Array:
    """Largest |x| of each replica, `[R]`: NaN or Inf where the replica has either."""
    leaves = jax.tree.leaves(tree)
    dtype = compute_dtype(*leaves)
    largest = [
        jnp.max(jnp.abs(x), axis=range(1, x.ndim), initial=0.0).astype(dtype)
        for x in leaves
    ]
    return jnp.max(jnp.stack(largest), axis=0)


def largest_entry(tree: PyTree, living: jax.Array | None = None) -> jax.Array:
    """Largest |x| of all (living) rows, or 1 where all are zero: a unit to divide by.

    Within the numbers whose reciprocals are normal. Its derivative is zero, since no
    result depends on the unit in which it is computed.
    """
    largest = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    if living is not None:
        largest = [jnp.max(largest_magnitudes(tree), where=living, initial=0.0)]
    dtype = compute_dtype(*largest)
    unit = positive(jnp.max(jnp.stack([x.astype(dtype) for x in largest])))
    unit = jnp.clip(unit, jnp.finfo(dtype).tiny, jnp.finfo(dtype).max / 8)
    return jax.lax.stop_gradient(unit)


@jax.named_scope("rms")
def rms(tree: PyTree, living: jax.Array) -> jax.Array:
    """Root mean square over the living replicas; the others may hold anything."""
    size = sum(x.size for x in jax.tree.leaves(tree)) // len(living)
    squares = _living_squares(tree, living)
    return safe_sqrt(squares / positive(jnp.sum(living).astype(squares.dtype) * size))


# By replica, and masked at the end: on CPUs a mask does not fuse with the sum over it.
@jax.custom_jvp
def _living_squares(tree: PyTree, living: jax.Array) -> jax.Array:
    return jnp.sum(squared_norms(tree), where=living)


@_living_squares.defjvp
def _living_squares_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (tree, living), (moved, _) = primals, tangents
    along = [mask_replicas(living, x) for x in (tree, moved)]
    products = jax.tree.map(jnp.multiply, *along)
    return _living_squares(tree, living), 2 * total(products, jnp.sum)


def replica_mean(tree: PyTree, living: jax.Array) -> PyTree:
    """Mean over the living replicas of a tree in which the others are zero."""
    # As a product with a row, which is much faster than a sum over axis 0 on CPUs.
    shares = living.astype(compute_dtype(*jax.tree.leaves(tree)))
    means = combine(shares[:, None] / jnp.maximum(jnp.sum(shares), 1.0), tree)
    return jax.tree.map(lambda x: x[0], means)


def deviations(tree: PyTree, living: jax.Array, mean: PyTree = None) -> PyTree:
    """The living replicas' distances from their mean, or from a given one."""
    mean = replica_mean(tree, living) if mean is None else mean
    return mask_replicas(living, away_from(mean, tree))


def away_from(mean: PyTree, tree: PyTree) -> PyTree:
    """All replicas' distances from one model's params."""
    return jax.tree.map(lambda x, m: x - m[None].astype(x.dtype), tree, mean)


def inner(x: PyTree, y: PyTree) -> jax.Array:
    """Inner products between the rows of two trees, over all axes but 0 and leaves."""

    def products(x: jax.Array, y: jax.Array) -> jax.Array:
        axes = tuple(range(1, x.ndim))
        y = y.astype(x.dtype)
        return jnp.tensordot(x, y, (axes, axes), precision=jax.lax.Precision.HIGHEST)

    return total(jax.tree.map(products, x, y), lambda x: x)


def gram(tree: PyTree) -> jax.Array:
    """Inner products between the rows of a tree.

    With a block of rows at a time, which a product picks out: if rows are spread over
    devices, none of them has to hold more than a block of the others'.
    """
    num_rows = len(jax.tree.leaves(tree)[0])
    if num_rows <= _BLOCK:
        return inner(tree, tree)

    def products(first: jax.Array) -> jax.Array:
        chosen = jax.nn.one_hot(first + jnp.arange(_BLOCK), num_rows, axis=0)
        return inner(tree, combine(chosen, tree))

    blocks = jax.lax.map(products, jnp.arange(0, num_rows, _BLOCK))
    return jnp.concatenate(blocks, axis=1)[:, :num_rows]


def combine(features: jax.Array, tree: PyTree) -> PyTree:
    """Features, `[R, H]`, transposed, times a tree with R rows: one with H rows."""
    return jax.tree.map(lambda x: product(features.T, x), tree)


def product(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """Features times a leaf, in its dtype and in full precision.

    The pull W - f(phi) is a small difference of large numbers, which the reduced
    precision that accelerators use by default would drown.
    """
    highest = jax.lax.Precision.HIGHEST
    return jnp.tensordot(features.astype(kernel.dtype), kernel, 1, precision=highest)
