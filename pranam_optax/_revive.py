"""Replicas that died or became copies, restarted from a better one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, Partial, keystr

from pranam_optax._embedding import find_embedding, holds_embedding
from pranam_optax._replicas import as_key, check_values
from pranam_optax._sharding import keep_shardings
from pranam_optax._tree import (
    PyTree,
    broadcast_to_leaf,
    cast,
    check_replicas,
    compute_dtype,
    deviations_from,
    in_range,
    largest_magnitudes,
    leaf_dtype,
    replica_mean,
)


def revive_replicas(
    params: PyTree,
    state: PyTree,
    key: int | jax.Array,
    *,
    values: jax.Array | np.ndarray | None = None,
    noise: float | jax.Array = 1.0,
) -> tuple[PyTree, PyTree]:
    r"""Restarts dead and duplicate replicas near a replica that does well.

    A replica is *dead* if a weight is NaN, infinite or so large that its square
    overflows, or if its loss is not finite. It is a *duplicate* if all its weights
    equal, to rounding, those of a replica with a lower index. The others are the
    *living*, and the best of them, b, is the one with the lowest loss. Each dead or
    duplicate replica r gets a new code in the table :math:`Z` of the embedding and
    the weights that the embedding makes of it,

    .. math::
      Z_r \leftarrow Z_b + \epsilon \, \sigma_Z \odot n_r, \quad
      n_r \sim \mathcal N(0, I), \quad
      W_r \leftarrow f(\phi)_r

    where :math:`\sigma_Z` is the standard deviation of each code over the living
    replicas; where they do not differ, its RMS over all takes its place. What the
    optimizer keeps for each weight (moments, averages, accumulated gradients) is
    copied from b along with the code. The living keep their weights, their codes and
    their optimizer state bit for bit; with nobody alive nothing is changed.

    A leaf of the state is kept "for each weight" if it has the shape of a leaf of the
    params, at the end of the same path. Other state is left as it is, so a transform
    that keeps NaN in another form (factored moments, an L-BFGS memory) belongs after
    `pranam`, whose updates are finite.

    Args:
      params: stacked params, every leaf `[R, ...]`.
      state: the state of `pranam` or `reparametrize`, or of any chain or wrapper that
        holds one, whose embedding has a table (`phi.table`, `[R, K]`).
      key: seed or PRNG key of the noise; use a new one each time.
      values: one loss per replica, `[R]`. Without them b is drawn for each restarted
        replica among the living.
      noise: :math:`\epsilon`, scale of the noise in units of :math:`\sigma_Z`.

    Returns:
      The new params and state. The state counts the restarts of each replica in
      `revived`.

    Raises:
      ValueError: at trace time, for a leaf without replica axis, leaves that disagree
        on R, a state that holds no embedding, or several, an embedding without a
        table, an R other than the state's, or `values` of another shape than `[R]`.
      TypeError: for integer or complex leaves.

    Examples:
      >>> import jax.numpy as jnp, optax, pranam_optax
      >>> params = jnp.array([[1.0, 2.0], [3.0, 5.0], [jnp.nan, 0.0], [3.0, 5.0]])
      >>> tx = optax.chain(pranam_optax.pranam(), optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> params, state = pranam_optax.revive_replicas(params, state, key=0)
      >>> print(state[0].revived, jnp.isfinite(params).all())
      [0 0 1 1] True
      >>> print(params[:2])
      [[1. 2.]
       [3. 5.]]
    """
    num_replicas = check_replicas(params, "params")
    phi = find_embedding(state).embedding.args[0]
    if not hasattr(phi, "table"):
        raise ValueError(
            "revive_replicas needs an embedding with one code per replica, phi.table "
            f"of shape [R, K]; phi is a {type(phi).__name__}"
        )
    if phi.table.shape[0] != num_replicas:
        raise ValueError(
            f"params has {num_replicas} replicas, but the state was initialised for "
            f"{phi.table.shape[0]}"
        )
    if values is not None:
        check_values(values, num_replicas)
    return keep_shardings(_revive, params, state, values, as_key(key), noise)


def _revive(
    params: PyTree,
    state: PyTree,
    values: jax.Array | np.ndarray | None,
    key: jax.Array,
    noise: float | jax.Array,
) -> tuple[PyTree, PyTree]:
    node = find_embedding(state)
    f, phi = node.embedding.func, node.embedding.args[0]
    table = phi.table
    num_replicas = table.shape[0]
    living = in_range(
        largest_magnitudes(params, compute_dtype(*jax.tree.leaves(params)))
    )
    if values is not None:
        living &= jnp.isfinite(jnp.asarray(values))
    living = without_duplicates(params, living)
    restart = ~living & jnp.any(living)

    noise_key, source_key = jax.random.split(key)
    if values is None:
        drawn = jax.random.categorical(
            source_key, jnp.where(living, 0.0, -jnp.inf), shape=(num_replicas,)
        )
    else:
        drawn = jnp.argmin(jnp.where(living, jnp.asarray(values), jnp.inf))
    source = jnp.where(restart, drawn, jnp.arange(num_replicas))

    spread = jnp.asarray(noise, table.dtype) * _code_spread(table, living)
    draws = jax.random.normal(noise_key, table.shape, table.dtype)
    codes = jnp.where(restart[:, None], table[source] + spread[None] * draws, table)

    embedding = Partial(f, phi._replace(table=codes))
    outputs = {
        keystr(path): output
        for path, output in jax.tree_util.tree_leaves_with_path(embedding())
    }

    def new_weights(path: Any, weights: jax.Array) -> jax.Array:
        # Weights that the embedding does not make (masked ones) are the source's.
        fresh = outputs.get(keystr(path), weights[source])
        rows = broadcast_to_leaf(restart, weights)
        return jnp.where(rows, fresh.astype(leaf_dtype(weights)), weights)

    copy_for_weights = row_copier(shapes_by_path(params), restart, source)
    copy_for_codes = row_copier({_TABLE: table.shape}, restart, source)

    def new_state(path: Any, leaf: Any) -> Any:
        if not holds_embedding(leaf):
            return copy_for_weights(path, leaf)
        optimizers = jax.tree_util.tree_map_with_path(
            copy_for_codes, leaf._replace(embedding=None)
        )
        return optimizers._replace(
            embedding=embedding, revived=leaf.revived + restart.astype(jnp.int32)
        )

    return (
        jax.tree_util.tree_map_with_path(new_weights, params),
        jax.tree_util.tree_map_with_path(new_state, state, is_leaf=holds_embedding),
    )


# Where an optimizer of phi keeps what belongs to the table.
_TABLE = (GetAttrKey("table"),)

Shapes = dict[Any, tuple[int, ...]]


def shapes_by_path(tree: PyTree) -> Shapes:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path: jnp.shape(leaf) for path, leaf in leaves}


def row_copier(
    shapes: Shapes, moved: jax.Array, source: jax.Array
) -> Callable[[Any, jax.Array], jax.Array]:
    """Copies rows, from `source` to the `moved`, of what is kept for these leaves.

    That is, of state that has the shape of one of them, at the end of the same path.
    """

    def copy(path: Any, leaf: jax.Array) -> jax.Array:
        ends = (path[start:] for start in range(len(path) + 1))
        if not any(shapes.get(end) == jnp.shape(leaf) for end in ends):
            return leaf
        return jnp.where(broadcast_to_leaf(moved, leaf), leaf[source], leaf)

    return copy


def without_duplicates(params: PyTree, living: jax.Array) -> jax.Array:
    """The living without those that equal a living replica of a lower index."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(cast(params))]
    roundings = [float(jnp.finfo(leaf_dtype(x)).eps) for x in jax.tree.leaves(params)]

    # One replica at a time: all pairs at once would take R times the memory.
    def is_duplicate(index: jax.Array) -> jax.Array:
        equal = living & (jnp.arange(living.shape[0]) < index)
        for x, rounding in zip(leaves, roundings, strict=True):
            axes = tuple(range(1, x.ndim))
            limit = rounding * jnp.max(jnp.abs(x[index]), initial=0.0)
            equal &= jnp.all(jnp.abs(x - x[index][None]) <= limit, axis=axes)
        return jnp.any(equal)

    return living & ~jax.lax.map(is_duplicate, jnp.arange(living.shape[0]))


def _code_spread(table: jax.Array, living: jax.Array) -> jax.Array:
    """Standard deviation of each code over the living, or its RMS over all, `[K]`."""
    deviations = deviations_from(replica_mean(table, living), table, living)
    spread = jnp.sqrt(replica_mean(jnp.square(deviations), living))
    rms = jnp.sqrt(jnp.mean(jnp.square(table), axis=0))
    rms = jnp.where(rms > 0, rms, 1.0)
    rounding = 8 * jnp.finfo(table.dtype).eps * rms
    return jnp.where(spread > rounding, spread, rms)
