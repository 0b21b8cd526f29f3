"""Replicas that died or became copies, restarted from a better one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, Partial, keystr

from pranam_optax._embedding import (
    Embedding,
    check_embedding,
    check_state,
    find_state,
    is_state,
    made_by,
)
from pranam_optax._replicas import alive, as_key, check_values
from pranam_optax._sharding import auto_axes
from pranam_optax._tree import (
    PyTree,
    broadcast_to_leaf,
    check_replicas,
    choose,
    compute_dtype,
    deviations,
    leaf_dtype,
    leaves_of,
    mask_replicas,
    replica_mean,
    shapes_by_path,
)


def revive_replicas(
    params: PyTree,
    state: PyTree,
    key: int | jax.Array,
    *,
    embedding: Embedding | None = None,
    values: jax.Array | np.ndarray | None = None,
    noise: float | jax.Array = 1.0,
) -> tuple[PyTree, PyTree]:
    r"""Restarts dead and duplicate replicas near a replica that does well.

    A replica is *dead* if its weights are not finite or too large to be squared, or if
    its loss is not finite. It is a *duplicate* if all its weights equal, to rounding,
    those of a replica with a lower index. The others are the *living*, and the best of
    them, b, is the one with the lowest loss. Each dead or
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
      embedding: the embedding that the transformation was given; None for the default.
      values: one loss per replica, `[R]`. Without them b is drawn for each restarted
        replica among the living.
      noise: :math:`\epsilon`, scale of the noise in units of :math:`\sigma_Z`.

    Returns:
      The new params and state.

    Raises:
      ValueError: at trace time, for a leaf without replica axis, leaves that disagree
        on R, a state that holds no embedding, or several, an embedding without a
        table, params of another R or shape than the state's, or `values` of another
        shape than `[R]`.
      TypeError: for integer or complex leaves.

    Examples:
      >>> import jax.numpy as jnp, optax, pranam_optax
      >>> params = jnp.array([[1.0, 2.0], [3.0, 5.0], [jnp.nan, 0.0], [3.0, 5.0]])
      >>> tx = optax.chain(pranam_optax.pranam(), optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> params, state = pranam_optax.revive_replicas(params, state, key=0)
      >>> print(jnp.isfinite(params).all())
      True
      >>> print(params[:2])
      [[1. 2.]
       [3. 5.]]
    """
    num_replicas = check_replicas(params, "params")
    embedding = check_embedding(embedding, "values")
    node = find_state(state)
    if not hasattr(node.phi, "table"):
        raise ValueError(
            "revive_replicas needs an embedding with one code per replica, phi.table "
            f"of shape [R, K]; phi is a {type(node.phi).__name__}"
        )
    check_state(node, params)
    leaves_of(made_by(embedding.apply, node), params, "params")
    if values is not None:
        values = check_values(values, num_replicas)
    apply = Partial(embedding.apply)
    return _revive(params, state, values, as_key(key), noise, apply)


@auto_axes
def _revive(
    params: PyTree,
    state: PyTree,
    values: jax.Array | None,
    key: jax.Array,
    noise: Any,
    apply: Partial,
) -> tuple[PyTree, PyTree]:
    phi = find_state(state).phi
    table, num_replicas = phi.table, len(phi.table)
    living = without_duplicates(params, alive(params, values=values))
    restart = ~living & jnp.any(living)

    noise_key, source_key = jax.random.split(key)
    if values is None:
        odds = jnp.where(living, 0.0, -jnp.inf)
        drawn = jax.random.categorical(source_key, odds, shape=(num_replicas,))
    else:
        drawn = jnp.argmin(jnp.where(living, values, jnp.inf))
    source = jnp.where(restart, drawn, jnp.arange(num_replicas))

    spread = jnp.asarray(noise, table.dtype) * _code_spread(table, living)
    draws = jax.random.normal(noise_key, table.shape, table.dtype)
    codes = choose(restart, table[source] + spread[None] * draws, table)
    phi = phi._replace(table=codes)

    outputs = jax.tree_util.tree_leaves_with_path(apply(phi))
    made = {keystr(path): output for path, output in outputs}

    def new_weights(path: Any, weights: jax.Array) -> jax.Array:
        # Weights that the embedding does not make (masked ones) are the source's.
        fresh = made.get(keystr(path), weights[source])
        return choose(restart, fresh.astype(leaf_dtype(weights)), weights)

    def new_node(node: Any) -> Any:
        if not is_state(node):
            return node
        # An optimizer of phi keeps what belongs to a code where it keeps the table.
        copy = _row_copier({(GetAttrKey("table"),): table.shape}, restart, source)
        rest = jax.tree_util.tree_map_with_path(copy, node._replace(phi=None))
        return rest._replace(phi=phi)

    return (
        jax.tree_util.tree_map_with_path(new_weights, params),
        jax.tree.map(
            new_node, copy_rows(state, params, restart, source), is_leaf=is_state
        ),
    )


def copy_rows(
    state: PyTree, params: PyTree, moved: jax.Array, source: jax.Array
) -> PyTree:
    """Copies the rows from `source` to the `moved` of what is kept for each weight.

    That is, of what has the shape of a leaf of the params, at the end of the same path;
    embeddings, and what belongs to them, stay as they are.
    """
    copy = _row_copier(shapes_by_path(params), moved, source)
    return jax.tree_util.tree_map_with_path(
        lambda path, node: node if is_state(node) else copy(path, node),
        state,
        is_leaf=is_state,
    )


def _row_copier(
    shapes: dict[Any, Any], moved: jax.Array, source: jax.Array
) -> Callable[[Any, jax.Array], jax.Array]:
    def copy(path: Any, leaf: jax.Array) -> jax.Array:
        ends = (path[start:] for start in range(len(path) + 1))
        if all(shapes.get(end) != jnp.shape(leaf) for end in ends):
            return leaf
        return choose(moved, leaf[source], leaf)

    return copy


def without_duplicates(params: PyTree, living: jax.Array) -> jax.Array:
    """The living without those that equal a living replica of a lower index.

    Each is compared, entry by entry, with the one before it that is nearest to it in a
    few random projections.
    """
    num_replicas, weights = len(living), mask_replicas(living, params)
    leaves = jax.tree.leaves(weights)
    dtype = compute_dtype(*leaves)
    shadows = jnp.concatenate(
        [_shadows(x, i).astype(dtype) for i, x in enumerate(leaves)], axis=1
    )

    # One replica at a time: all pairs at once would take R times the memory.
    def nearest(index: jax.Array) -> jax.Array:
        before = living & (jnp.arange(num_replicas) < index)
        distance = jnp.max(jnp.abs(shadows - shadows[index][None]), axis=1)
        return jnp.argmin(jnp.where(before, distance, jnp.inf))

    twin = jax.lax.map(nearest, jnp.arange(num_replicas))
    equal = living[twin] & (twin < jnp.arange(num_replicas))
    for x, original in zip(leaves, jax.tree.leaves(params), strict=True):
        axes = tuple(range(1, x.ndim))
        largest = jnp.max(jnp.abs(x), axis=axes, initial=0.0)
        limit = float(jnp.finfo(leaf_dtype(original)).eps) * largest
        near = jnp.abs(x - x[twin]) <= broadcast_to_leaf(limit, x)
        equal &= jnp.all(near, axis=axes)
    return living & ~equal


def _shadows(x: jax.Array, index: int) -> jax.Array:
    """Projections of a leaf on four random directions, in units of its largest."""
    x = x.reshape(len(x), -1)
    unit = jnp.max(jnp.abs(x), initial=1e-30)
    directions = jax.random.normal(jax.random.key(index), (x.shape[1], 4), x.dtype)
    return (x / unit) @ directions


def _code_spread(table: jax.Array, living: jax.Array) -> jax.Array:
    """Standard deviation of each code over the living, or its RMS over all, `[K]`."""
    codes = deviations(mask_replicas(living, table), living)
    spread = jnp.sqrt(replica_mean(jnp.square(codes), living))
    root = jnp.sqrt(jnp.mean(jnp.square(table), axis=0))
    root = jnp.where(root > 0, root, 1.0)
    rounding = 8 * jnp.finfo(table.dtype).eps * root
    return jnp.where(spread > rounding, spread, root)
