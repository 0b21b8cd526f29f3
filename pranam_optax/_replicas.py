"""Replicas: R copies of a model stacked along axis 0 of every leaf."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from pranam_optax._sharding import auto_axes
from pranam_optax._tree import (
    PyTree,
    cast,
    check_count,
    check_replicas,
    is_traced,
    largest_magnitudes,
    leaf_dtype,
    mask_replicas,
    squared_norms,
)


def as_key(key: int | jax.Array) -> jax.Array:
    """The PRNG key for a seed; a key, new-style or raw, is returned as it is."""
    if jnp.ndim(key) == 0 and jnp.issubdtype(jnp.result_type(key), jnp.integer):
        return jax.random.key(key)
    return jnp.asarray(key)


def replicate(
    init_fn: Callable[[jax.Array], PyTree], key: int | jax.Array, num_replicas: int
) -> PyTree:
    r"""Initialises `num_replicas` copies of a model, each from its own key.

    Args:
      init_fn: takes a PRNG key and returns the params of one model.
      key: seed or PRNG key, split into one key per replica.
      num_replicas: R, at least 1.

    Returns:
      The stacked params: every leaf of the model with a leading axis of length R.

    Raises:
      ValueError: if `num_replicas` is not a positive integer.

    Examples:
      >>> import jax, pranam_optax
      >>> params = pranam_optax.replicate(
      ...     lambda key: {"w": jax.random.normal(key, (3, 2))}, 0, num_replicas=8)
      >>> params["w"].shape
      (8, 3, 2)
    """
    num_replicas = check_count(num_replicas, "num_replicas")
    return jax.vmap(init_fn)(jax.random.split(as_key(key), num_replicas))


@jax.named_scope("alive")
def alive(params: PyTree, grads: PyTree = None, values: Any = None) -> jax.Array:
    """Which replicas take part, `[R]`: the one definition of *alive*.

    A replica is alive if its weights, its gradient and its loss are finite, as far as
    they are given, and if its weights can be squared: the squares of the distances
    between R such replicas can be summed without overflow. Gradients may have any
    finite size.
    """
    norms = squared_norms(cast(params))
    living = norms < jnp.finfo(norms.dtype).max / (16 * len(norms))
    if grads is not None:
        living &= jnp.isfinite(largest_magnitudes(grads))
    if values is not None:
        living &= jnp.isfinite(jnp.asarray(values))
    return living


def zero_counts(params: PyTree) -> jax.Array:
    """A zero for each replica, sharded as the replicas are.

    Under jit only what depends on the params is sharded like them; and no weight is
    greater than infinity.
    """
    for x in jax.tree.leaves(params):
        return jnp.any(x > jnp.inf, axis=range(1, x.ndim)).astype(jnp.int32)
    return jnp.zeros([0], jnp.int32)


def replica_value_and_grad(
    fun: Callable[..., Any],
    *,
    has_aux: bool = False,
    batch: Literal["shared", "split"] = "shared",
) -> Callable[..., tuple[Any, PyTree]]:
    r"""`jax.value_and_grad` of every replica.

    With `fun(params, *args, **kwargs)` the loss of one model, the result maps stacked
    params :math:`W` to :math:`(L(w_r))_r` and :math:`(\nabla L(w_r))_r`.

    Args:
      fun: takes one model's params, then data, and returns a scalar, or a pair of a
        scalar and auxiliary output if `has_aux`.
      has_aux: whether `fun` returns such a pair.
      batch: `"shared"`: all replicas see the same data. `"split"`: axis 0 of every
        array in the positional arguments after the params is cut into R equal
        parts, one per replica, so that a step costs as much as that of one model.
        Keyword arguments are shared in either case.

    Returns:
      A function of `(params, *args, **kwargs)` that returns `(values, grads)` or
      `((values, aux), grads)`: `values` has shape `[R]`, `grads` is like the stacked
      params, and the leaves of `aux` get a leading axis of length R.

    Raises:
      ValueError: if `batch` is unknown, a leaf of the params has no replica axis, or
        a batch cannot be cut into R equal parts.

    Examples:
      >>> import jax.numpy as jnp, pranam_optax
      >>> def loss(w, x):
      ...     return jnp.mean((w - x) ** 2)
      >>> w = jnp.array([0.0, 1.0])
      >>> x = jnp.array([1.0, 1.0, 3.0, 3.0])
      >>> values, grads = pranam_optax.replica_value_and_grad(loss)(w, x)
      >>> print(values, grads)
      [5. 2.] [-4. -2.]
      >>> split = pranam_optax.replica_value_and_grad(loss, batch="split")
      >>> values, grads = split(w, x)
      >>> print(values, grads)
      [1. 4.] [-2. -4.]
    """
    if batch not in ("shared", "split"):
        raise ValueError(f"batch must be 'shared' or 'split', got {batch!r}")
    value_and_grad = jax.value_and_grad(fun, has_aux=has_aux)

    def replicas_fn(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        check_replicas(params, "params")
        if batch == "split":
            args, _ = _split_batch(args, params)
        return jax.vmap(
            lambda params, args: value_and_grad(params, *args, **kwargs),
            in_axes=(0, 0 if batch == "split" else None),
        )(params, args)

    return replicas_fn


@auto_axes
def _split_batch(args: tuple[Any, ...], params: PyTree) -> tuple[Any, PyTree]:
    """The batch with a leading replica axis, and the params, which it lies beside."""
    num_replicas = check_replicas(params, "params")

    def split(path: Any, x: Any) -> jax.Array:
        shape = jnp.shape(x)
        if not shape or shape[0] % num_replicas:
            raise ValueError(
                f"batch='split' needs arrays whose axis 0 is a multiple of the "
                f"{num_replicas} replicas, but argument{keystr(path)} has shape "
                f"{shape}. Pass what all replicas share as a keyword argument."
            )
        return jnp.reshape(x, (num_replicas, shape[0] // num_replicas, *shape[1:]))

    return jax.tree_util.tree_map_with_path(split, args), params


def select_replica(params: PyTree, index: int | jax.Array) -> PyTree:
    """Params of the replica with the given index.

    Args:
      params: stacked params.
      index: an int in `[-R, R)`, or a traced integer.

    Returns:
      One model's params: every leaf without its replica axis.

    Raises:
      IndexError: if a Python index is out of range.

    Examples:
      >>> import jax.numpy as jnp, pranam_optax
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> print(pranam_optax.select_replica(params, 1)["w"])
      [3. 4.]
    """
    num_replicas = check_replicas(params, "params")
    if not is_traced(index) and not -num_replicas <= int(index) < num_replicas:
        raise IndexError(f"replica {index} of {num_replicas} replicas")
    return _select(params, index)


@auto_axes
def _select(params: PyTree, index: int | jax.Array) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(x)[index], params)


def best_replica(params: PyTree, values: jax.Array | np.ndarray) -> PyTree:
    """Params of the replica with the lowest value; NaN never wins.

    Args:
      params: stacked params.
      values: one loss per replica, `[R]`.

    Returns:
      One model's params. If every value is NaN, those of replica 0.

    Raises:
      ValueError: if `values` does not have shape `[R]`.

    Examples:
      >>> import jax.numpy as jnp, pranam_optax
      >>> params = {"w": jnp.array([1.0, 2.0, 3.0])}
      >>> values = jnp.array([0.3, jnp.nan, 0.2])
      >>> print(pranam_optax.best_replica(params, values)["w"])
      3.0
    """
    values = check_values(values, check_replicas(params, "params"))
    # NaN sorts last, after infinity.
    return _select(params, jnp.argsort(values)[0])


def average_replicas(params: PyTree, weights: Any = None) -> PyTree:
    r"""Params of one model, the average of the replicas that are alive.

    .. math:: \bar w = \sum_r a_r w_r / \sum_r a_r

    over the replicas whose weights are finite and can be squared. The average is a good
    model where the replicas share a basin, as after `elastic_averaging`; those that
    were trained apart have a useless one. `replica_metrics` tells, from its loss.

    Statistics of batch normalisation are not weights and their average is not that of
    the averaged model: pass some batches through it in training mode instead.

    Args:
      params: stacked params.
      weights: :math:`a`, one number >= 0 per replica, `[R]`; default: 1 for all.

    Returns:
      One model's params, in the params' dtypes: NaN if no replica that is alive has a
      weight.

    Raises:
      ValueError, TypeError: for leaves that are not real floats with a replica axis, or
        weights of another shape than `[R]`, negative or not finite.

    Examples:
      >>> import jax.numpy as jnp, pranam_optax
      >>> params = {"w": jnp.array([1.0, 2.0, jnp.nan, 6.0])}
      >>> print(pranam_optax.average_replicas(params)["w"])
      3.0
      >>> print(pranam_optax.average_replicas(params, jnp.array([1, 0, 5, 1]))["w"])
      3.5
    """
    num_replicas = check_replicas(params, "params")
    weights = jnp.ones(num_replicas) if weights is None else jnp.asarray(weights, float)
    if weights.shape != (num_replicas,):
        raise ValueError(
            f"weights has shape {weights.shape}, expected ({num_replicas},): one "
            "number per replica"
        )
    if not is_traced(weights) and not (
        jnp.all(weights >= 0) and jnp.all(jnp.isfinite(weights))
    ):
        raise ValueError(f"weights must be finite and >= 0, got {weights}")
    return _average(params, weights)


@auto_axes
def _average(params: PyTree, weights: jax.Array) -> PyTree:
    living = alive(params)
    parts = jnp.where(living, weights, 0.0)
    parts = parts / jnp.max(parts)  # NaN if there is nobody
    parts = parts / jnp.sum(parts)

    def average(x: jax.Array, masked: jax.Array) -> jax.Array:
        row, highest = parts.astype(masked.dtype), jax.lax.Precision.HIGHEST
        mean = jnp.tensordot(row, masked, 1, precision=highest)
        return mean.astype(leaf_dtype(x))

    return jax.tree.map(average, params, mask_replicas(living, params))


def check_values(values: Any, num_replicas: int) -> jax.Array:
    """The values as an array; there must be one per replica."""
    values = jnp.asarray(values)
    if values.shape != (num_replicas,):
        raise ValueError(
            f"values has shape {values.shape}, expected ({num_replicas},): one value "
            "per replica"
        )
    return values
