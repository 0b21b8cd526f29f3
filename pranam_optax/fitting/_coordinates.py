"""Coordinates in which bounded parameters are free and have the same unit scale."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from pranam_optax._tree import PyTree, is_traced, leaf_dtype

# How far inside the box a start lies at least, in parts of the half-width or scale: on
# a bound itself the transform is stationary.
_MARGIN = 1e-3
_FORM = (
    "expected one pair for the whole leaf, (low_array, high_array) or numbers, with "
    "-jnp.inf or jnp.inf for no bound"
)


def working_dtype() -> jnp.dtype:
    """Of coordinates and values: params of any precision, and data, are cast to it."""
    return jnp.dtype(jax.dtypes.canonicalize_dtype(float))


class Bounds(NamedTuple):
    """Where params may lie: both trees are like one model's params."""

    low: PyTree
    high: PyTree


class Coordinates(NamedTuple):
    r"""The transform from coordinates :math:`z` to params :math:`x`, entry by entry.

    .. math::
      x = \begin{cases}
        \frac{l + h}2 + \frac{h - l}2 \sin z & l, h \text{ finite} \\
        l + s \log(1 + e^z) & \text{only } l \text{ finite} \\
        h - s \log(1 + e^{-z}) & \text{only } h \text{ finite} \\
        m + s z & \text{neither}
      \end{cases}

    The sine reflects at the bounds: descent that leaves the box re-enters it, and
    unlike with a sigmoid a replica near a bound still moves. Coordinates have JAX's
    default precision; params keep their own.

    Attributes:
      bounds: l and h.
      center: m, like one model's params.
      scale: s, like one model's params; half the width of the box where it is finite.
    """

    bounds: Bounds
    center: PyTree
    scale: PyTree

    def to_params(self, z: PyTree) -> PyTree:
        """Params of one model, for its coordinates."""

        def to_param(
            low: jax.Array, high: jax.Array, center: Any, scale: Any, z: jax.Array
        ) -> jax.Array:
            side = _Side.of(low, high, z.dtype)
            one_sided = side.bound + side.sign * scale * jax.nn.softplus(side.sign * z)
            x = side.select(center + scale * jnp.sin(z), one_sided, center + scale * z)
            return jnp.clip(x.astype(low.dtype), low, high)

        return jax.tree.map(to_param, *self.bounds, self.center, self.scale, z)

    def from_params(self, x: PyTree) -> PyTree:
        """Coordinates of one model's params, which must lie within the bounds."""

        def from_param(
            low: jax.Array, high: jax.Array, center: Any, scale: Any, x: jax.Array
        ) -> jax.Array:
            side = _Side.of(low, high, center.dtype)
            x = x.astype(center.dtype)
            unit = (x - center) / scale
            inside = jnp.arcsin(jnp.clip(unit, -1 + _MARGIN, 1 - _MARGIN))
            distance = jnp.maximum(side.sign * (x - side.bound) / scale, _MARGIN)
            # The inverse of softplus.
            one_sided = side.sign * (distance + jax.nn.log1mexp(distance))
            return side.select(inside, one_sided, unit)

        return jax.tree.map(from_param, *self.bounds, self.center, self.scale, x)


class _Side(NamedTuple):
    """How the entries of a leaf are bounded.

    Attributes:
      boxed: whether from both sides.
      free: whether from none.
      bound: the only bound of those with one; no infinity reaches a gradient.
      sign: 1 if that bound is the lower one, else -1.
    """

    boxed: jax.Array
    free: jax.Array
    bound: jax.Array
    sign: jax.Array

    @classmethod
    def of(cls, low: jax.Array, high: jax.Array, dtype: jnp.dtype) -> "_Side":
        has_low, has_high = jnp.isfinite(low), jnp.isfinite(high)
        zero = jnp.zeros_like(low)
        bound = jnp.where(has_low, low, jnp.where(has_high, high, zero))
        sign = jnp.where(has_low, 1, -1)
        return cls(
            has_low & has_high,
            ~(has_low | has_high),
            bound.astype(dtype),
            sign.astype(dtype),
        )

    def select(self, inside: jax.Array, one_sided: Any, free: Any) -> jax.Array:
        return jnp.where(self.boxed, inside, jnp.where(self.free, free, one_sided))


def _finite(bound: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The bound, or zero where there is none."""
    return jnp.where(jnp.isfinite(bound), bound, jnp.zeros_like(bound)).astype(dtype)


def _size(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, jnp.ones_like(x), jnp.abs(x))


def make_coordinates(starts: PyTree, bounds: Bounds) -> Coordinates:
    """Coordinates in which the starts (stacked params) spread over about one unit."""
    dtype = working_dtype()

    def center(low: jax.Array, high: jax.Array, x: jax.Array) -> jax.Array:
        boxed = jnp.isfinite(low) & jnp.isfinite(high)
        middle = (_finite(low, dtype) + _finite(high, dtype)) / 2
        return jnp.where(boxed, middle, jnp.mean(x.astype(dtype), axis=0))

    def scale(low: jax.Array, high: jax.Array, x: jax.Array) -> jax.Array:
        boxed = jnp.isfinite(low) & jnp.isfinite(high)
        eps, x = jnp.finfo(x.dtype).eps, x.astype(dtype)
        spread = jnp.std(x, axis=0)
        # Where the starts agree, the size of what they agree on.
        size = _size(jnp.max(jnp.abs(x), axis=0))
        spread = jnp.where(spread > eps * size, spread, size)
        half = (_finite(high, dtype) - _finite(low, dtype)) / 2
        return jnp.where(boxed, half, spread)

    return Coordinates(
        bounds,
        jax.tree.map(center, *bounds, starts),
        jax.tree.map(scale, *bounds, starts),
    )


def draw_around(key: jax.Array, start: PyTree, bounds: Bounds) -> PyTree:
    """A random start for one model.

    Uniform between finite bounds. With one bound, the start's distance from it times a
    log-normal factor; with none, the start plus a normal of its own size (1 if zero).
    """

    def draw(
        low: jax.Array, high: jax.Array, key: jax.Array, start: jax.Array
    ) -> jax.Array:
        dtype = working_dtype()
        side, x = _Side.of(low, high, dtype), start.astype(dtype)
        # One draw serves all cases: half the time to compile.
        u = jax.random.uniform(key, x.shape, dtype, jnp.finfo(dtype).eps, 1.0)
        normal = jax.scipy.special.ndtri(u)
        bottom, top = _finite(low, dtype), _finite(high, dtype)
        drawn = side.select(
            bottom + (top - bottom) * u,
            side.bound + side.sign * _size(x - side.bound) * jnp.exp(normal),
            x + _size(x) * normal,
        )
        # Rounding to half precision may leave the box.
        return jnp.clip(drawn.astype(start.dtype), low, high)

    leaves, treedef = jax.tree.flatten(start)
    keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))
    return jax.tree.map(draw, *bounds, keys, start)


def is_numbers(x: Any) -> bool:
    """Whether this is a list of numbers, or of such lists: an array to be."""
    return (
        isinstance(x, list)
        and bool(x)
        and all(isinstance(y, (int, float, np.number)) or is_numbers(y) for y in x)
    )


def to_params(init: PyTree, shapes: PyTree | None) -> PyTree:
    """Params from what a user writes: ints, floats and lists of them too."""

    def to_param(x: Any) -> Any:
        if is_numbers(x) or (isinstance(x, int) and not isinstance(x, bool)):
            return jnp.asarray(np.asarray(x, float), float)
        return jnp.asarray(x)

    params = jax.tree.map(to_param, init, is_leaf=is_numbers)
    return _in_shapes(params, shapes, "init", None)


def _in_shapes(
    tree: PyTree,
    shapes: PyTree | None,
    name: str,
    is_pair: Callable[[Any], bool] | None,
) -> PyTree:
    """The tree with those leaves, or pairs of sides, broadcast that `shapes` names."""
    if shapes is None:
        return tree
    wanted = {
        keystr(path): (shape,) if isinstance(shape, int) else tuple(shape)
        for path, shape in jax.tree_util.tree_leaves_with_path(
            shapes, is_leaf=lambda x: isinstance(x, (tuple, list))
        )
    }

    def in_shape(path: Any, leaf: Any) -> Any:
        shape = wanted.pop(keystr(path), None)
        if shape is None:
            return leaf
        sides = leaf if isinstance(leaf, (tuple, list)) else [leaf]
        for side in sides:
            if not broadcasts_to(np.shape(side), shape):
                raise ValueError(
                    f"{name}{keystr(path)} has shape {np.shape(side)}, which does not "
                    f"broadcast to the shape {shape} that shapes gives"
                )
        wide = tuple(_broadcast(side, shape) for side in sides)
        return wide[0] if sides is not leaf else wide

    tree = jax.tree_util.tree_map_with_path(in_shape, tree, is_leaf=is_pair)
    if wanted:
        raise ValueError(f"shapes has {', '.join(wanted)}, which {name} does not have")
    return tree


def check_params(params: PyTree, name: str) -> None:
    """Checks that one model's params, or their shapes, are real floats."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"{name} has no leaves; there is nothing to fit")
    for path, leaf in leaves:
        dtype = leaf_dtype(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}{keystr(path)} has dtype {dtype} (shape {jnp.shape(leaf)}); "
                "expected real floating-point params"
            )


def parse_bounds(
    bounds: PyTree, like: PyTree | None, shapes: PyTree | None = None
) -> Bounds:
    """Checks a tree of pairs `(low, high)`.

    Args:
      bounds: a pair for each leaf of the params, or None for no bounds at all.
      like: one model's params, or their shapes; None to take them from the bounds.
      shapes: with `like` None, the shapes of leaves whose bounds are numbers.

    Raises:
      ValueError: for bounds of another structure or shape, or reversed, and for sides
        that are no numbers or arrays.
    """
    if like is None:
        if bounds is None:
            raise ValueError("pass init, or bounds, or both")
        bounds = _in_shapes(bounds, shapes, "bounds", _is_pair)
        shapes = jax.tree_util.tree_map_with_path(
            lambda path, pair: _shape_between("bounds" + keystr(path), pair),
            bounds,
            is_leaf=_is_pair,
        )
        check_params(shapes, "bounds")
    else:
        shapes = like
        bounds = _from_scipy(bounds, like)
    if bounds is None:
        bounds = jax.tree.map(lambda _: (-jnp.inf, jnp.inf), shapes)
    treedef: Any = jax.tree.structure(shapes)
    try:
        pairs = treedef.flatten_up_to(bounds)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "bounds must have one pair (low, high) for each leaf of the params, whose "
            f"structure is {treedef}; got {bounds!r}"
        ) from error
    lows, highs = [], []
    for (path, leaf), pair in zip(
        jax.tree_util.tree_leaves_with_path(shapes), pairs, strict=True
    ):
        where, shape, dtype = "bounds" + keystr(path), jnp.shape(leaf), leaf_dtype(leaf)
        _check_pair(where, pair)
        pair = [np.asarray(side) if is_numbers(side) else side for side in pair]
        for side in pair:
            if not broadcasts_to(jnp.shape(side), shape):
                raise ValueError(
                    f"{where} has a side of shape {jnp.shape(side)}, but the leaf has "
                    f"shape {shape}"
                )
        _check_order(where, pair, dtype)
        low, high = pair
        lows.append(jnp.broadcast_to(jnp.asarray(low, dtype), shape))
        highs.append(jnp.broadcast_to(jnp.asarray(high, dtype), shape))
    return Bounds(treedef.unflatten(lows), treedef.unflatten(highs))


def _broadcast(side: Any, shape: tuple[int, ...]) -> Any:
    if hasattr(side, "dtype"):
        return jnp.broadcast_to(side, shape)
    return np.broadcast_to(np.asarray(side, float), shape)


def _from_scipy(bounds: PyTree, like: PyTree) -> PyTree:
    """A pair, from SciPy's list of pairs or `Bounds` if the params are one vector."""
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        bounds = (bounds.lb, bounds.ub)
    # A tuple of two lists is the pair of the lower and the upper bounds.
    pairs = (
        isinstance(bounds, (list, tuple))
        and bool(bounds)
        and not (isinstance(bounds, tuple) and all(map(is_numbers, bounds)))
        and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in bounds)
    )
    if not (pairs and hasattr(like, "shape") and like.shape == (len(bounds),)):
        return bounds
    return tuple(
        np.array([none if x is None else x for x in side])
        for none, side in zip((-np.inf, np.inf), zip(*bounds, strict=True), strict=True)
    )


def _check_pair(where: str, pair: Any) -> None:
    """Checks that the bounds of a leaf are two numbers or arrays."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{where} must be a pair (low, high), got {pair!r}; {_FORM}")
    for side in pair:
        number = isinstance(side, (int, float)) or hasattr(side, "dtype")
        if not (number or is_numbers(side)):
            raise ValueError(
                f"{where} has a side that is no number or array, {side!r}, in "
                f"{pair!r}; {_FORM}"
            )


def _check_order(where: str, pair: Any, dtype: jnp.dtype) -> None:
    """Checks that bounds leave a width that the dtype can hold."""
    if is_traced(pair):
        return
    low, high = exact = [np.asarray(side) for side in pair]
    if not np.all(low < high):
        problem = "is reversed or empty: expected low < high"
    else:
        with np.errstate(over="ignore"):
            low, high = (side.astype(dtype) for side in exact)
            finite = np.isfinite(low) & np.isfinite(high)
            too_wide = np.any(finite & ~np.isfinite(high - low))
        largest = f"the largest {dtype} number, {float(jnp.finfo(dtype).max):.3g}"
        if any(
            np.any(np.isinf(a) & np.isfinite(b))
            for a, b in ((low, exact[0]), (high, exact[1]))
        ):
            problem = f"goes beyond {largest}; use jnp.inf for no bound"
        elif too_wide:
            problem = f"is wider than {largest}; use jnp.inf for no bound"
        elif not np.all(low < high):
            problem = (
                f"has sides that {dtype} cannot tell apart; subtract an offset, or "
                "enable jax_enable_x64"
            )
        else:
            return
    raise ValueError(f"{where} {problem}, got low = {pair[0]!r} and high = {pair[1]!r}")


def broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts to the target's."""
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def check_within(params: PyTree, bounds: Bounds, name: str) -> None:
    """Checks that params, of one model or stacked, are finite and within bounds."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, x), a, b in zip(leaves, *map(jax.tree.leaves, bounds), strict=True):
        if is_traced(x, a, b):
            continue
        bad = ~np.isfinite(np.asarray(x))
        if bad.any():
            raise ValueError(
                f"{name}{keystr(path)} (shape {jnp.shape(x)}) is NaN or infinite in "
                f"{bad.sum()} of {bad.size} entries"
            )
        outside = ~((np.asarray(x) >= np.asarray(a)) & (np.asarray(x) <= np.asarray(b)))
        if outside.any():
            raise ValueError(
                f"{name}{keystr(path)} (shape {jnp.shape(x)}) lies outside its bounds "
                f"in {outside.sum()} of {outside.size} entries: got {_brief(x)}, "
                f"expected low = {_brief(a)} to high = {_brief(b)}"
            )


def _brief(x: Any) -> str:
    return np.array2string(np.asarray(x), precision=6, threshold=8, edgeitems=3)


def _is_pair(node: Any) -> bool:
    return (
        isinstance(node, (tuple, list))
        and len(node) == 2
        and (
            not any(isinstance(side, (tuple, list, dict)) for side in node)
            or (isinstance(node, tuple) and all(map(is_numbers, node)))
        )
    )


def _shape_between(where: str, pair: Any) -> jax.ShapeDtypeStruct:
    _check_pair(where, pair)
    if not is_traced(pair) and not all(np.all(np.isfinite(side)) for side in pair):
        raise ValueError(
            f"without init, bounds must be finite; got {pair!r}. Pass init as well."
        )
    pair = [np.asarray(side, float) if is_numbers(side) else side for side in pair]
    shape = np.broadcast_shapes(*map(jnp.shape, pair))
    return jax.ShapeDtypeStruct(shape, jnp.result_type(float, *pair))
