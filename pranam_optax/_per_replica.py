"""The wrapper `per_replica`: a transformation run on each replica apart."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from pranam_optax._replicas import check_values, zero_counts
from pranam_optax._tree import PyTree, check_replicas


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
      such as `grad`, each replica sees its part along axis 0 (a tree like the updates
      is one of these even if it is callable, as an Equinox model is).

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
        return jax.vmap(lambda w, zero: _place(tx.init(w), zero))(
            params, zero_counts(params)
        )

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        num_replicas = check_replicas(updates, "updates")
        if not num_replicas:
            return updates, state
        if "values" in extra_args:
            values = extra_args.pop("values")
            extra_args["value"] = check_values(values, num_replicas)
        check_replicas(params, "params")
        _check_axis((params, state), ("params", "state"), num_replicas)

        # A model may be callable, and so are its gradients then.
        model: Any = jax.tree.structure(updates)
        flat: dict[str, tuple[list[Any], Any]] = {
            name: jax.tree.flatten(
                x, is_leaf=None if jax.tree.structure(x) == model else callable
            )
            for name, x in extra_args.items()
        }
        mapped = {
            name: [x if getattr(x, "ndim", 0) else None for x in leaves]
            for name, (leaves, _) in flat.items()
        }
        for name, (_, treedef) in flat.items():
            _check_axis([treedef.unflatten(mapped[name])], [name], num_replicas)

        def update_one(
            updates: PyTree,
            state: PyTree,
            params: PyTree,
            mapped: dict[str, list[Any]],
            zero: jax.Array,
        ) -> tuple[PyTree, PyTree]:
            extra_args = {
                name: treedef.unflatten(
                    x if part is None else part
                    for x, part in zip(leaves, mapped[name], strict=True)
                )
                for name, (leaves, treedef) in flat.items()
            }
            updates, state = tx.update(updates, state, params, **extra_args)
            return updates, _place(state, zero)

        return jax.vmap(update_one)(
            updates, state, params, mapped, zero_counts(updates)
        )

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


def _place(state: PyTree, zero: jax.Array) -> PyTree:
    """Subtracts a replica's zero from its state, to have it where the replica is.

    What does not depend on params or updates, like the zeros that most states start
    from, would be on one device at first and move in a later step, which would compile
    the step again (see `zero_counts`).
    """

    def place(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        if x.dtype == bool:
            return x ^ zero.astype(bool)
        return x - zero.astype(x.dtype)  # adding it would change -0.0

    return jax.tree.map(place, state)
