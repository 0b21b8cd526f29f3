"""The transformation `elastic_averaging`: a pull together after the optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pranam_optax._embedding import (
    Embedding,
    check_embedding,
    check_update,
    mlp_embedding,
)
from pranam_optax._pranam import check_fraction, each_replica, projection_step
from pranam_optax._replicas import alive, as_key, zero_counts
from pranam_optax._sharding import auto_axes
from pranam_optax._tree import (
    PyTree,
    broadcast_to_leaf,
    cast,
    check_count,
    check_replicas,
    choose,
    leaf_dtype,
    mask_replicas,
    replica_mean,
    subtract,
    times,
)

Strength = float | jax.Array | np.ndarray | Callable[[jax.Array], jax.Array]


class ElasticAveragingState(NamedTuple):
    """State of `elastic_averaging`.

    Attributes:
      count: number of updates so far.
      phi: the embedding's parameters; its output is `embedding.apply(phi)`, and that of
        the default one is `phi.bias`, the mean when the replicas last met.
      nonfinite: `[R]`, in how many updates each replica was left out.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count
    phi: PyTree
    nonfinite: jax.Array


def elastic_averaging(
    strength: Strength = 0.1,
    embedding: Embedding | None = None,
    *,
    every: int = 1,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Pulls R replicas towards each other after the optimizer's step.

    The last link of an `optax.chain`, after the optimizer and its learning rate. It
    takes the update :math:`u` of the R replicas of a model, stacked along axis 0 of
    every leaf, and their stacked params :math:`W`. With the embedding
    :math:`f(\phi)`, whose parameters are in the state, and :math:`V = W + u`,

    .. math::
      \ell(\phi) &= \tfrac12 \| f(\phi) - V \|^2 \\
      \phi' &= \phi - \alpha \nabla \ell(\phi), \quad
        \alpha = \|\nabla \ell\|^2 / \|J_f \nabla \ell\|^2 \\
      u' &= u - \gamma \, (V - f(\phi'))

    where :math:`\alpha` is the exact line search on the linearised embedding. With the
    default embedding :math:`f(\phi')` is the mean of V over the replicas.

    The pull is decoupled from the gradient, as weight decay is in AdamW, and vanishes
    as the replicas meet. It makes one good model out of networks that are trained on
    different mini-batches (see `replica_value_and_grad` with `batch="split"` and
    `average_replicas`).

    A replica has no part in the projection, and its update is zero, while its update,
    its weights or its strength are not finite, or its weights are too large to be
    squared. The other replicas are unaffected.

    Args:
      strength: :math:`\gamma` in [0, 1]: the part of the distance to the embedding that
        is taken back at a step; 0 leaves the replicas independent. A scalar, one value
        per replica (`[R]`), or a schedule of either, whose values are clipped to
        [0, 1].
      embedding: the embedding; default `mlp_embedding(())`, the mean of the replicas.
      every: k, the replicas meet at every k-th step only. In the steps between, the
        update passes through and replicas on several devices communicate nothing.
      key: seed or PRNG key of the embedding's random initialisation; the default
        embedding draws nothing.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs `params`. Under
      `optax.inject_hyperparams`, `strength` can be injected; name
      `static_args=("every", "key")`.

    Raises:
      ValueError, TypeError: as `pranam`.

    Examples:
      >>> import jax.numpy as jnp, optax, pranam_optax
      >>> params = {"w": jnp.array([[0.0], [4.0]])}
      >>> tx = optax.chain(optax.sgd(1.0), pranam_optax.elastic_averaging(0.25))
      >>> grads = {"w": jnp.array([[1.0], [-1.0]])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(updates["w"].ravel())  # V = -1 and 5, whose mean is 2
      [-0.25  0.25]

    References:
      S. Zhang, A. Choromanska, Y. LeCun, `Deep learning with Elastic Averaging SGD
      <https://arxiv.org/abs/1412.6651>`_, 2015.

      A. Jolicoeur-Martineau et al., `PopulAtion Parameter Averaging (PAPA)
      <https://arxiv.org/abs/2304.03094>`_, 2023.
    """
    mean_alone = embedding is None
    if embedding is None:
        embedding = mlp_embedding(())
    embedding = check_embedding(embedding, "strength")
    check_fraction(strength, "strength")
    every = check_count(every, "every")

    @auto_axes
    def init(params: PyTree) -> ElasticAveragingState:
        check_replicas(params, "params")
        phi = embedding.init(as_key(key), params)
        return ElasticAveragingState(jnp.zeros([], jnp.int32), phi, zero_counts(params))

    @auto_axes
    def step(
        updates: PyTree, state: ElasticAveragingState, params: PyTree, strength: Any
    ) -> tuple[PyTree, ElasticAveragingState]:
        # V = W + u, finite where both are; a replica that is not alive becomes rows of
        # zeros, here at the edge
        moved = jax.tree.map(jnp.add, cast(params, updates), cast(updates, params))
        gamma = each_replica(strength, "strength", updates)
        living = alive(moved) & jnp.isfinite(gamma)
        moved = mask_replicas(living, moved)
        gamma = jnp.where(living, jnp.clip(gamma, 0.0, 1.0), 0.0)

        def meet(phi: PyTree) -> tuple[PyTree, PyTree]:
            # 1. phi' = phi - alpha grad l(phi), with l(phi) = 1/2 ||f(phi) - V||^2
            if mean_alone:  # at which that step ends
                mean = replica_mean(moved, living)
                bias = optax.tree.where(jnp.any(living), mean, phi.bias)
                phi = phi._replace(bias=bias)
            else:
                phi = projection_step(embedding, phi, moved, living)

            # 2. u' = u - gamma (V - f(phi'))
            pull = subtract(moved, embedding.apply(phi))
            return phi, jax.tree.map(take_back, updates, pull)

        def take_back(u: jax.Array, pull: jax.Array) -> jax.Array:
            update = jnp.asarray(u, pull.dtype) - times(gamma, pull)
            limit = float(jnp.finfo(leaf_dtype(u)).max)
            update = jnp.clip(update, -limit, limit).astype(leaf_dtype(u))
            return jnp.where(broadcast_to_leaf(gamma == 0, update), u, update)

        if every == 1:
            phi, mixed = meet(state.phi)
        else:
            now = (state.count + 1) % every == 0
            phi, mixed = jax.lax.cond(now, meet, lambda phi: (phi, updates), state.phi)
        mixed = choose(living, mixed, optax.tree.zeros_like(mixed))
        return mixed, ElasticAveragingState(
            count=optax.safe_increment(state.count),
            phi=phi,
            nonfinite=state.nonfinite + (~living).astype(jnp.int32),
        )

    def update_fn(
        updates: PyTree,
        state: ElasticAveragingState,
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ElasticAveragingState]:
        del extra_args
        check_update(updates, state, ElasticAveragingState, params, embedding.apply)
        gamma = strength(state.count) if callable(strength) else strength
        return step(updates, state, params, gamma)

    return optax.GradientTransformationExtraArgs(init, update_fn)
