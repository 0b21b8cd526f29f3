"""Coordinates in which bounded parameters are free and have the same unit scale."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from pranam_optax._tree import PyTree, cast, leaf_dtype

# How far inside the box a start lies at least, in parts of the half-width or scale: on
# a bound itself the transform is stationary.
_MARGIN = 1e-3
_FORM = (
    "expected one pair for the whole leaf, (low_array, high_array) or numbers, with "
    "-jnp.inf or jnp.inf for no bound"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """Where params may lie.

    Attributes:
      low: lower bounds, like one model's params.
      high: upper bounds, like one model's params.
      kinds: of the leaves: "box" if all bounds of the leaf are finite, "low" or "high"
        if only the lower or the upper ones are, "free" if none is, and "any" if they
        differ or are traced. Static, so that only what is needed is compiled.
    """

    low: PyTree
    high: PyTree
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def map(self, fun: Any, *trees: PyTree) -> PyTree:
        """Maps fun(kind, low, high, *leaves)."""
        treedef: Any = jax.tree.structure(self.low)
        kinds = treedef.unflatten(self.kinds)
        return jax.tree.map(fun, kinds, self.low, self.high, *trees)


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
    unlike with a sigmoid a replica near a bound still moves.

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
        return self.bounds.map(_to_param, self.center, self.scale, z)

    def from_params(self, x: PyTree) -> PyTree:
        """Coordinates of one model's params, which must lie within the bounds."""
        return self.bounds.map(_from_param, self.center, self.scale, x)


def _to_param(
    kind: str,
    low: jax.Array,
    high: jax.Array,
    center: jax.Array,
    scale: jax.Array,
    z: jax.Array,
) -> jax.Array:
    inside = center + scale * jnp.sin(z)
    above = _finite(low) + scale * jax.nn.softplus(z)
    below = _finite(high) - scale * jax.nn.softplus(-z)
    x = _select(kind, low, high, inside, above, below, center + scale * z)
    return jnp.clip(x, low, high)


def _from_param(
    kind: str,
    low: jax.Array,
    high: jax.Array,
    center: jax.Array,
    scale: jax.Array,
    x: jax.Array,
) -> jax.Array:
    unit = (x - center) / scale
    inside = jnp.arcsin(jnp.clip(unit, -1 + _MARGIN, 1 - _MARGIN))
    above = _inverse_softplus(jnp.maximum((x - _finite(low)) / scale, _MARGIN))
    below = -_inverse_softplus(jnp.maximum((_finite(high) - x) / scale, _MARGIN))
    return _select(kind, low, high, inside, above, below, unit)


def _finite(bound: jax.Array) -> jax.Array:
    """The bound, or zero where there is none: no infinity reaches a gradient."""
    return jnp.where(jnp.isfinite(bound), bound, jnp.zeros_like(bound))


def _inverse_softplus(y: jax.Array) -> jax.Array:
    return y + jnp.log(-jnp.expm1(-y))


def _select(
    kind: str,
    low: jax.Array,
    high: jax.Array,
    inside: jax.Array,
    above: jax.Array,
    below: jax.Array,
    free: jax.Array,
) -> jax.Array:
    cases = {"box": inside, "low": above, "high": below, "free": free}
    if kind in cases:
        return cases[kind]
    has_low, has_high = jnp.isfinite(low), jnp.isfinite(high)
    return jnp.where(
        has_low, jnp.where(has_high, inside, above), jnp.where(has_high, below, free)
    )


def make_coordinates(starts: PyTree, bounds: Bounds) -> Coordinates:
    """Coordinates in which the starts (stacked params) spread over about one unit."""

    def center(_: str, low: jax.Array, high: jax.Array, x: jax.Array) -> jax.Array:
        boxed = jnp.isfinite(low) & jnp.isfinite(high)
        return jnp.where(boxed, (_finite(low) + _finite(high)) / 2, jnp.mean(x, axis=0))

    def scale(_: str, low: jax.Array, high: jax.Array, x: jax.Array) -> jax.Array:
        boxed = jnp.isfinite(low) & jnp.isfinite(high)
        spread = jnp.std(x, axis=0)
        # Where the starts agree, the size of what they agree on.
        size = jnp.max(jnp.abs(x), axis=0)
        size = jnp.where(size > 0, size, jnp.ones_like(size))
        spread = jnp.where(spread > jnp.finfo(x.dtype).eps * size, spread, size)
        return jnp.where(boxed, (_finite(high) - _finite(low)) / 2, spread)

    return Coordinates(bounds, bounds.map(center, starts), bounds.map(scale, starts))


def draw_around(key: jax.Array, start: PyTree, bounds: Bounds) -> PyTree:
    """A random start for one model.

    Uniform between finite bounds. With one bound, the start's distance from it times a
    log-normal factor; with none, the start plus a normal of its own size (1 if zero).
    """

    def size(x: jax.Array) -> jax.Array:
        x = jnp.abs(x)
        return jnp.where(x > 0, x, jnp.ones_like(x))

    def draw(
        kind: str, low: jax.Array, high: jax.Array, key: jax.Array, x: jax.Array
    ) -> jax.Array:
        dtype = x.dtype
        # One draw serves all cases: half the time to compile.
        low, high, x = cast((low, high, x))  # ndtri takes no half precision
        u = jax.random.uniform(key, x.shape, x.dtype, jnp.finfo(x.dtype).eps, 1.0)
        normal = jax.scipy.special.ndtri(u)
        bottom, top = _finite(low), _finite(high)
        drawn = _select(
            kind,
            low,
            high,
            bottom + (top - bottom) * u,
            bottom + size(x - bottom) * jnp.exp(normal),
            top - size(top - x) * jnp.exp(normal),
            x + size(x) * normal,
        )
        return drawn.astype(dtype)

    leaves, treedef = jax.tree.flatten(start)
    keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))
    return bounds.map(draw, keys, start)


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


def parse_bounds(bounds: PyTree, like: PyTree | None) -> Bounds:
    """Checks a tree of pairs `(low, high)`.

    Args:
      bounds: a pair for each leaf of the params, or None for no bounds at all.
      like: one model's params, or their shapes; None to take them from the bounds.

    Raises:
      ValueError: for bounds of another structure or shape, or reversed, and for sides
        that are no numbers or arrays.
    """
    if like is None:
        if bounds is None:
            raise ValueError("pass init, or bounds, or both")
        shapes = jax.tree_util.tree_map_with_path(
            lambda path, pair: _shape_between("bounds" + keystr(path), pair),
            bounds,
            is_leaf=_is_pair,
        )
        check_params(shapes, "bounds")
    else:
        shapes = like
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
    lows, highs, kinds = [], [], []
    for (path, leaf), pair in zip(
        jax.tree_util.tree_leaves_with_path(shapes), pairs, strict=True
    ):
        where, shape, dtype = "bounds" + keystr(path), jnp.shape(leaf), leaf_dtype(leaf)
        _check_pair(where, pair)
        for side in pair:
            if not broadcasts_to(jnp.shape(side), shape):
                raise ValueError(
                    f"{where} has a side of shape {jnp.shape(side)}, but the leaf has "
                    f"shape {shape}"
                )
        low, high = pair
        if _concrete(low, high) and not np.all(np.asarray(low) < np.asarray(high)):
            raise ValueError(
                f"{where} is reversed or empty: expected low < high, got low = {low!r} "
                f"and high = {high!r}"
            )
        lows.append(jnp.broadcast_to(jnp.asarray(low, dtype), shape))
        highs.append(jnp.broadcast_to(jnp.asarray(high, dtype), shape))
        kinds.append(_kind(low, high))
    return Bounds(treedef.unflatten(lows), treedef.unflatten(highs), tuple(kinds))


def _check_pair(where: str, pair: Any) -> None:
    """Checks that the bounds of a leaf are two numbers or arrays."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{where} must be a pair (low, high), got {pair!r}; {_FORM}")
    for side in pair:
        if not (isinstance(side, (int, float)) or hasattr(side, "dtype")):
            raise ValueError(
                f"{where} has a side that is no number or array, {side!r}, in "
                f"{pair!r}; {_FORM}"
            )


def _kind(low: Any, high: Any) -> str:
    """See `Bounds`."""
    if _concrete(low, high):
        has_low, has_high = np.isfinite(low), np.isfinite(high)
        cases = {
            "box": has_low.all() and has_high.all(),
            "low": has_low.all() and not has_high.any(),
            "high": has_high.all() and not has_low.any(),
            "free": not has_low.any() and not has_high.any(),
        }
        for kind, holds in cases.items():
            if holds:
                return kind
    return "any"


def broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts to the target's."""
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def check_within(params: PyTree, bounds: Bounds, name: str) -> None:
    """Checks that params, of one model or stacked, are finite and within bounds."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, x), a, b in zip(
        leaves,
        jax.tree.leaves(bounds.low),
        jax.tree.leaves(bounds.high),
        strict=True,
    ):
        if not _concrete(x, a, b):
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


def _concrete(*values: Any) -> bool:
    return not any(isinstance(x, jax.core.Tracer) for x in values)


def _is_pair(node: Any) -> bool:
    return (
        isinstance(node, (tuple, list))
        and len(node) == 2
        and not any(isinstance(side, (tuple, list, dict)) for side in node)
    )


def _shape_between(where: str, pair: Any) -> jax.ShapeDtypeStruct:
    _check_pair(where, pair)
    sides = [jnp.asarray(side, float) for side in pair]
    if all(_concrete(s) for s in sides) and not all(
        np.all(np.isfinite(s)) for s in sides
    ):
        raise ValueError(
            f"without init, bounds must be finite; got {pair!r}. Pass init as well."
        )
    shape = np.broadcast_shapes(*(s.shape for s in sides))
    return jax.ShapeDtypeStruct(shape, jnp.result_type(*sides))
