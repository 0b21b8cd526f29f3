"""Replicas spread over devices: all that the package has to know about it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from pranam_optax._tree import PyTree

Function = TypeVar("Function", bound=Callable[..., Any])


def auto_axes(fun: Function) -> Function:
    """Lets the compiler choose how everything inside `fun(*args)` is sharded.

    With mesh axes of type `Explicit`, the default of `jax.make_mesh`, JAX asks to be
    told how each sum over replicas is to be sharded. Under this decorator only the
    results are, and they lie as the arguments do (see `_place`). Arrays must be
    arguments: those that `fun` closes over would still be explicit.
    """
    # Outside jit and set_mesh no array can be made on the mesh.
    compiled = jax.jit(fun)

    @functools.wraps(fun)
    def wrapper(*args: Any) -> Any:
        for x in jax.tree.leaves(args):
            mesh = _explicit_mesh(x)
            if mesh is not None:
                shardings = _place(fun, args, mesh)
                return jax.sharding.auto_axes(compiled, out_sharding=shardings)(*args)
        return fun(*args)

    return cast(Function, wrapper)


def _explicit_mesh(x: Any) -> Any:
    """The mesh on which an array lies, if its axes are explicit."""
    if isinstance(x, jax.Array):
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def _place(fun: Callable[..., Any], args: Any, mesh: Any) -> PyTree:
    """Shardings of what `fun(*args)` returns, after the arguments most like it.

    An array with the shape of an argument lies as that argument does; of several, as
    the one whose path ends most alike. One that differs from an argument in axis 0
    only, or has lost it, lies like that argument along the other axes. What has as many
    rows as an argument is spread along axis 0 as that one is.
    """
    known = [
        (keystr(path)[::-1], jnp.shape(x), tuple(jax.typeof(x).sharding.spec))
        for path, x in jax.tree_util.tree_leaves_with_path(args)
        if isinstance(x, jax.Array)
    ]

    def place(path: Any, leaf: Any) -> NamedSharding:
        end, shape = keystr(path)[::-1], leaf.shape

        def alike(argument: tuple[str, tuple[int, ...], Any]) -> int:
            pairs = zip(end + "^", argument[0] + "$", strict=False)
            return next(i for i, (a, b) in enumerate(pairs) if a != b)

        ranked = sorted(known, key=alike, reverse=True)
        rows = [spec[:1] for _, s, spec in known if shape and s[:1] == shape[:1]]
        first = rows[0] if rows else (None,)
        same = [spec for _, s, spec in ranked if s == shape]
        less = [spec[1:] for _, s, spec in ranked if s and s[1:] == shape]
        other = [
            (*first, *spec[1:]) for _, s, spec in ranked if s and s[1:] == shape[1:]
        ]
        spec = [*same, *less, *other, first if shape else ()][0]
        return NamedSharding(mesh, PartitionSpec(*spec))

    def unsharded(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        weak_type = getattr(x, "weak_type", False)  # which keys do not have
        return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=weak_type)

    shapes = jax.eval_shape(fun, *jax.tree.map(unsharded, args))
    return jax.tree_util.tree_map_with_path(place, shapes)


def with_auto_axes(fun: Function) -> Function:
    """Strips arguments and the current mesh of explicit axes: for a whole fit."""

    def strip(x: Any) -> Any:
        if isinstance(x, jax.core.Tracer) or _explicit_mesh(x) is None:
            return x
        mesh = Mesh(x.sharding.mesh.devices, x.sharding.mesh.axis_names)
        return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))

    @functools.wraps(fun)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = jax.tree.map(strip, (args, kwargs))
        with _auto_mesh():
            return fun(*args, **kwargs)

    return cast(Function, wrapper)


@contextlib.contextmanager
def _auto_mesh() -> Iterator[None]:
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        yield
    else:
        axis_types = (AxisType.Auto,) * len(mesh.axis_names)
        with jax.sharding.use_abstract_mesh(mesh.update(axis_types=axis_types)):
            yield


def check_shardings(updates: PyTree, params: PyTree) -> None:
    """Checks that gradients are spread over the same devices as their params.

    As far as that is known: outside jit, or with explicit mesh axes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    for (path, update), param in zip(leaves, jax.tree.leaves(params), strict=True):
        ours, theirs = _replica_axes(update), _replica_axes(param)
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(
                f"updates{keystr(path)} and params{keystr(path)} must have their "
                f"replicas on the same devices, but the former is sharded as {ours} "
                f"and the latter as {theirs} along axis 0; move one with jax.device_put"
            )


def _replica_axes(x: Any) -> tuple[str, ...] | None:
    """The mesh axes along which the replicas are known to be spread."""
    sharding = getattr(x, "sharding", None)
    if isinstance(x, jax.core.Tracer):
        if _explicit_mesh(x) is None:
            return None
        sharding = jax.typeof(x).sharding
    if isinstance(sharding, NamedSharding):
        first = (*sharding.spec, None)[0]
        axes = first if isinstance(first, tuple) else (first,)
        return tuple(a for a in axes if a is not None and sharding.mesh.shape[a] > 1)
    return () if isinstance(sharding, jax.sharding.SingleDeviceSharding) else None
