"""Meshes with explicit axes: inside a fit, the compiler decides on shardings."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

Function = TypeVar("Function", bound=Callable[..., Any])


def with_auto_axes(fun: Function) -> Function:
    """The function, with arguments and the current mesh stripped of explicit axes."""

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = jax.tree.map(_without_explicit_axes, (args, kwargs))
        with _auto_mesh():
            return fun(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _without_explicit_axes(x: Any) -> Any:
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            mesh = Mesh(mesh.devices, mesh.axis_names)
            return jax.device_put(x, NamedSharding(mesh, sharding.spec))
    return x


@contextlib.contextmanager
def _auto_mesh() -> Iterator[None]:
    mesh = jax.sharding.get_abstract_mesh()
    axis_types = (AxisType.Auto,) * len(mesh.axis_names)
    if mesh.empty or mesh.axis_types == axis_types:
        yield
    else:
        with jax.sharding.use_abstract_mesh(mesh.update(axis_types=axis_types)):
            yield
