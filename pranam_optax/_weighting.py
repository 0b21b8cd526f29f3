"""The transformation `weight_replicas`: better replicas have larger gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pranam_optax._replicas import check_values
from pranam_optax._tree import (
    PyTree,
    cast,
    check_replicas,
    compute_dtype,
    leaf_dtype,
    mask_replicas,
    scale,
)

Temperature = float | jax.Array | Callable[[jax.Array], jax.Array]


class WeightReplicasState(NamedTuple):
    """State of `weight_replicas`.

    Attributes:
      count: number of updates so far.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count


def weight_replicas(
    temperature: Temperature,
) -> optax.GradientTransformationExtraArgs:
    r"""Weights the gradients of R replicas by a softmin of their losses.

    A link for `optax.chain`, before `pranam`, whose embedding then follows the better
    replicas more than the others. With the losses :math:`v` and the temperature
    :math:`\tau`,

    .. math::
      z_r = \frac{v_r - \mathrm{mean}(v)}{\mathrm{std}(v)}, \quad
      U_r = R \, \frac{e^{-z_r / \tau}}{\sum_q e^{-z_q / \tau}} \, G_r

    so that the weights have mean 1, are all 1 where the losses are equal, and do not
    depend on the scale of the loss. A replica whose loss is not finite has weight zero
    and an update of zeros; mean, standard deviation, sum and R are those of the others.

    For experiments: on the functions and networks of docs/notebook.md no temperature
    helped on two sets of seeds, and low ones were much worse on functions.

    Args:
      temperature: :math:`\tau \ge 0`, a number or a schedule (whose values are clipped
        to it): the weights are all 1 at infinity, and 0 leaves the best replica alone.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs the keyword `values`, the
      losses at the present params (`[R]`).

    Raises:
      ValueError: from the factory, for a temperature out of range; from `update`, at
        trace time, for missing `values` or ones that are not one for each replica, a
        leaf without replica axis, or leaves that disagree on R.
      TypeError: from `update`, for integer or complex leaves.

    Examples:
      >>> import jax.numpy as jnp, numpy as np, pranam_optax
      >>> grads = jnp.ones((4, 1))
      >>> tx = pranam_optax.weight_replicas(temperature=1.0)
      >>> values = jnp.array([1.0, 2.0, 3.0, jnp.nan])
      >>> updates, _ = tx.update(grads, tx.init(grads), values=values)
      >>> print(np.asarray(updates[:, 0]).round(2))
      [2.17 0.64 0.19 0.  ]
    """
    if (
        not callable(temperature)
        and not isinstance(temperature, jax.core.Tracer)
        and not (np.ndim(temperature) == 0 and float(temperature) >= 0)
    ):
        raise ValueError(
            f"temperature must be a number >= 0 or a schedule, got {temperature!r}"
        )

    def init_fn(params: PyTree) -> WeightReplicasState:
        check_replicas(params, "params")
        return WeightReplicasState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: PyTree,
        state: WeightReplicasState,
        params: PyTree = None,
        *,
        values: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, WeightReplicasState]:
        del params, extra_args
        if values is None:
            raise ValueError(
                "weight_replicas needs the replicas' losses: call tx.update(grads, "
                "state, params, values=values)"
            )
        num_replicas = check_replicas(updates, "updates")
        if num_replicas:
            check_values(values, num_replicas)
            t = temperature(state.count) if callable(temperature) else temperature
            weights = _weights(values, t)
            weighted = jax.tree.map(
                lambda u, x: x.astype(leaf_dtype(u)),
                updates,
                scale(weights, cast(updates)),
            )
            updates = mask_replicas(jnp.isfinite(values), weighted)
        return updates, WeightReplicasState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _weights(values: jax.Array, temperature: float | jax.Array) -> jax.Array:
    dtype = compute_dtype(values)
    values = jnp.asarray(values, dtype)
    finite = jnp.isfinite(values)
    # Shifting the losses changes no weight, and scaling them neither; in these units
    # equal losses differ by exactly zero, and squares stay in range.
    unit = jnp.max(jnp.abs(values), where=finite, initial=0.0)
    values = jnp.where(finite, values, 0.0) / jnp.where(unit > 0, unit, 1.0)
    excess = values - jnp.min(values, where=finite, initial=1.0)
    count = jnp.maximum(jnp.sum(finite), 1).astype(dtype)
    mean = jnp.sum(excess, where=finite) / count
    std = jnp.sqrt(jnp.sum(jnp.square(excess - mean), where=finite) / count)
    width = std * jnp.maximum(jnp.asarray(temperature, dtype), 0.0)
    # Where there is no width, what is not the best is infinitely far away.
    distance = jnp.where(excess > 0, excess / jnp.where(width > 0, width, 1.0), 0.0)
    distance = jnp.where((excess > 0) & (width == 0), jnp.inf, distance)
    softmin = jnp.where(finite, jnp.exp(-distance), 0.0)
    total = jnp.sum(softmin)
    return softmin * count / jnp.where(total > 0, total, 1.0)
