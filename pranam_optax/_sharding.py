"""Replicas spread over devices."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from pranam_optax._tree import PyTree, check_replicas


def shard_replicas(params: PyTree, mesh: Mesh, axis_name: str = "replicas") -> PyTree:
    """Spreads replicas over the devices of a mesh axis.

    Each device of the axis holds R / d replicas whole. To spread the models too, give
    `jax.device_put` shardings whose first axis is the replicas'.

    Args:
      params: stacked params.
      mesh: the devices, from `jax.make_mesh`.
      axis_name: the axis of the mesh along which the replicas are spread.

    Returns:
      The params on these devices. An optimizer state that is initialised from them, in
      or outside jit, is spread in the same way.

    Raises:
      ValueError: if the mesh has no such axis or its size does not divide R.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, pranam_optax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("replicas",))
      >>> params = {"w": jnp.arange(48.0).reshape(16, 3)}
      >>> params = pranam_optax.shard_replicas(params, mesh)
      >>> params["w"].sharding.spec
      P('replicas', None)
    """
    if axis_name not in mesh.shape:
        raise ValueError(
            f"the mesh has no axis {axis_name!r}; its axes are {mesh.axis_names}"
        )
    num_replicas, num_devices = check_replicas(params, "params"), mesh.shape[axis_name]
    if num_replicas % num_devices:
        raise ValueError(
            f"{num_replicas} replicas cannot be spread evenly over the {num_devices} "
            f"devices of mesh axis {axis_name!r}; R must be a multiple of "
            f"{num_devices}"
        )
    return jax.tree.map(
        lambda x: jax.device_put(
            x, NamedSharding(mesh, PartitionSpec(axis_name, *(None,) * (x.ndim - 1)))
        ),
        params,
    )


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
                f"and the latter as {theirs} along axis 0; see shard_replicas"
            )


def _replica_axes(x: Any) -> tuple[str, ...] | None:
    """The mesh axes along which the replicas are known to be spread."""
    sharding = getattr(x, "sharding", None)
    if isinstance(x, jax.core.Tracer):
        sharding = jax.typeof(x).sharding
        if not _is_explicit(sharding.mesh):
            return None
    if isinstance(sharding, NamedSharding):
        first = (*sharding.spec, None)[0]
        axes = first if isinstance(first, tuple) else (first,)
        return tuple(a for a in axes if a is not None and sharding.mesh.shape[a] > 1)
    return () if isinstance(sharding, jax.sharding.SingleDeviceSharding) else None


def _is_explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types


def sharding_of(x: Any, mesh: Any) -> NamedSharding:
    return NamedSharding(mesh, jax.typeof(x).sharding.spec)


def with_auto_axes(
    fun: Callable[..., Any], shardings: Callable[[Any], PyTree], *args: Any
) -> Any:
    """fun(*args), where the compiler decides on the sharding of all that lies between.

    With mesh axes of type Explicit, JAX wants to be told how to shard each sum over
    replicas. `shardings(mesh)` are those of the output. Arrays must be among the args:
    those that `fun` closes over still have Explicit axes.
    """
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    for mesh in (jax.typeof(x).sharding.mesh for x in arrays):
        if _is_explicit(mesh):
            # Outside jit and set_mesh no array can be made on the mesh; and it is
            # compiled once where `fun` is the same object in each call.
            compiled = jax.jit(fun)
            return jax.sharding.auto_axes(compiled, out_sharding=shardings(mesh))(*args)
    return fun(*args)


def keep_shardings(fun: Callable[..., Any], *args: Any) -> Any:
    """fun(*args), a pair, sharded as the first two arguments are."""
    return with_auto_axes(
        fun,
        lambda mesh: jax.tree.map(lambda x: sharding_of(x, mesh), args[:2]),
        *args,
    )
