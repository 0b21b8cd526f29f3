"""The wrapper `per_replica`: a transformation run on each replica apart."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from pranam_optax._replicas import check_values
from pranam_optax._tree import PyTree, broadcast_to_leaf, check_replicas, zero_counts


def per_replica(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an Optax transformation on each of R replicas apart.

    With the transformation's :math:`(u, s') = t(g, s, w)` of gradients, state and
    params of one model,

    .. math:: (U_r, S'_r) = t(G_r, S_r, W_r), \quad r = 1, \ldots, R

    so that what reduces over the whole tree (a global norm, a line search, an
    estimate of the learning rate, a test for NaN) does not couple the replicas. Every
    array of the state has a leading axis of length R: where the state holds
    hyperparameters (`optax.inject_hyperparams`), each replica has its own.

    Args:
      tx: any Optax transformation for one model's params. One that draws random
        numbers draws the same ones for every replica, unless the keys in its state
        are set apart.

    Returns:
      A `GradientTransformationExtraArgs`. Keywords of its `update` reach `tx` like
      this: `values`, the replicas' losses (`[R]`), as each replica's scalar `value`,
      in place of one that is given; callables such as `value_fn`, a function of one
      model's params, and scalars as they are; of all other arrays and trees of arrays,
      such as `grad`, each replica sees its part along axis 0.

    Raises:
      ValueError: from `init` and `update`, at trace time, for a leaf without replica
        axis, leaves that disagree on R, or a state, `values` or keyword of another R.
      TypeError: from `init` and `update`, for integer or complex leaves.

    Examples:
      One learning rate for each replica:

      >>> import jax.numpy as jnp, optax, pranam_optax
      >>> params = grads = {"w": jnp.ones((3, 2))}
      >>> tx = pranam_optax.per_replica(optax.inject_hyperparams(optax.sgd)(0.1))
      >>> state = tx.init(params)
      >>> rates = jnp.array([0.1, 0.2, 0.3])
      >>> state = optax.tree.set(state, learning_rate=rates)
      >>> updates, state = tx.update(grads, state, params)
      >>> print(updates["w"][:, 0])
      [-0.1 -0.2 -0.3]
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: PyTree) -> PyTree:
        if not check_replicas(params, "params"):  # nothing, or Optax's placeholder
            return tx.init(params)
        return _place(jax.vmap(tx.init)(params), zero_counts(params))

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        num_replicas = check_replicas(updates, "updates")
        if not num_replicas:
            return updates, state
        if "values" in extra_args:
            values = jnp.asarray(extra_args.pop("values"))
            check_values(values, num_replicas)
            extra_args["value"] = values
        check_replicas(params, "params")
        _check_axis((params, state), ("params", "state"), num_replicas)

        leaves, treedef = jax.tree.flatten(extra_args, is_leaf=callable)
        mapped = [x if getattr(x, "ndim", 0) else None for x in leaves]
        _check_axis(
            jax.tree.unflatten(treedef, mapped).values(), extra_args, num_replicas
        )

        def update_one(
            updates: PyTree, state: PyTree, params: PyTree, mapped: list[Any]
        ) -> tuple[PyTree, PyTree]:
            parts = [
                x if part is None else part
                for x, part in zip(leaves, mapped, strict=True)
            ]
            extra_args = jax.tree.unflatten(treedef, parts)
            return tx.update(updates, state, params, **extra_args)

        return jax.vmap(update_one)(updates, state, params, mapped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_axis(trees: Iterable[PyTree], names: Iterable[str], length: int) -> None:
    for name, tree in zip(names, trees, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if jnp.shape(leaf)[:1] != (length,):
                raise ValueError(
                    f"{name}{keystr(path)} has shape {jnp.shape(leaf)}, but updates "
                    f"has {length} replicas: expected a leading axis of that length. "
                    "What all replicas share must be a scalar, or be held by a "
                    "callable such as value_fn."
                )


def _place(state: PyTree, zeros: jax.Array) -> PyTree:
    """Each replica's part of a new state on the replica's devices.

    Constants, unlike what depends on the params (see `zero_counts`), would start on
    one device and move in the first update, which would compile the step twice.
    """

    def place(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        zero = broadcast_to_leaf(zeros, x).astype(x.dtype)
        return x ^ zero if x.dtype == bool else x - zero  # x + 0 would change -0.0

    return jax.tree.map(place, state)
