"""Replicas that do badly, moved to where others do well."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pranam_optax._embedding import check_state, is_state
from pranam_optax._replicas import alive, check_values
from pranam_optax._revive import copy_rows
from pranam_optax._sharding import auto_axes
from pranam_optax._tree import PyTree, check_replicas, choose, is_traced


def resample_replicas(
    params: PyTree,
    state: PyTree,
    values: jax.Array | np.ndarray | Sequence[float],
    *,
    part: float = 0.5,
    pull: float | jax.Array = 0.9,
) -> tuple[PyTree, PyTree]:
    r"""Moves the replicas with the highest losses to those with the lowest.

    To call a few times between the release of the coupling and the end of a run, as
    at 60, 70 and 80 % of it: replicas that were left in a worse basin go on from a
    better one. Of the L replicas that are alive (finite weights and loss), in the
    order of their losses, the last :math:`\lfloor p L \rfloor` are moved, the worst to
    the best, the second worst to the second best, and so on:

    .. math::
      W_r \leftarrow W_r + a \, (W_b - W_r)

    With a below 1 they stay different, the further they were apart the more, and
    search the surroundings of the better ones. What the optimizer keeps for each
    weight (moments, averages, accumulated gradients; see `revive_replicas`) is copied
    from b. All other replicas keep everything bit for bit, and so does the embedding:
    as long as the coupling is not 0 it pulls the moved ones back.

    Args:
      params: stacked params, every leaf `[R, ...]`.
      state: the state of any optimizer for them; it need not hold an embedding.
      values: one loss per replica, `[R]`.
      part: p, of the living replicas, at most 0.5.
      pull: a, from 0 to 1; at 1 they become copies.

    Returns:
      The new params and state.

    Raises:
      ValueError: at trace time, for a leaf without replica axis, leaves that disagree
        on R, `values` of another shape than `[R]`, `part` outside [0, 0.5] or `pull`
        outside [0, 1].
      TypeError: for integer or complex leaves.

    Examples:
      >>> import jax.numpy as jnp, optax, pranam_optax
      >>> params = jnp.array([[0.0], [10.0], [20.0], [30.0]])
      >>> state = optax.sgd(0.1).init(params)
      >>> values = jnp.array([3.0, 1.0, 2.0, 4.0])
      >>> params, state = pranam_optax.resample_replicas(params, state, values)
      >>> print(params.ravel())  # the first goes to the third, the last to the second
      [18. 10. 20. 12.]

    References:
      P. Grassberger, `Go with the winners: a general Monte Carlo strategy
      <https://doi.org/10.1016/S0010-4655(02)00205-9>`_, 2002; M. Jaderberg et al.,
      `Population based training of neural networks <https://arxiv.org/abs/1711.09846>`_,
      2017, where bad members of a population copy good ones ("truncation selection").
    """
    num_replicas = check_replicas(params, "params")
    values = check_values(values, num_replicas)
    for node in filter(is_state, jax.tree.leaves(state, is_leaf=is_state)):
        check_state(node, params)
    if not 0 <= part <= 0.5:
        raise ValueError(f"part must be in [0, 0.5], got {part!r}")
    if not is_traced(pull) and not (np.ndim(pull) == 0 and 0 <= float(pull) <= 1):
        raise ValueError(f"pull must be a number in [0, 1], got {pull!r}")
    return _resample(params, state, values, part, pull)


@auto_axes
def _resample(
    params: PyTree, state: PyTree, values: jax.Array, part: Any, pull: Any
) -> tuple[PyTree, PyTree]:
    living = alive(params, values=values)
    order = jnp.argsort(jnp.where(living, values, jnp.inf))
    rank, num_living = jnp.argsort(order), jnp.sum(living)
    share = jnp.asarray(part, values.dtype) * num_living.astype(values.dtype)
    moved = living & (rank >= num_living - jnp.floor(share).astype(rank.dtype))
    source = jnp.where(moved, order[num_living - 1 - rank], jnp.arange(len(order)))

    def move(x: jax.Array) -> jax.Array:
        goal = x[source]
        return goal - (1 - jnp.asarray(pull, x.dtype)) * (goal - x)

    params = jax.tree.map(jnp.asarray, params)
    return (
        choose(moved, jax.tree.map(move, params), params),
        copy_rows(state, params, moved, source),
    )
