"""The transformation `reparametrize`: the optimizer acts on the embedding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from pranam_optax._embedding import Embedding, check_embedding, check_update
from pranam_optax._replicas import alive, as_key, zero_counts
from pranam_optax._sharding import auto_axes
from pranam_optax._tree import (
    PyTree,
    check_replicas,
    leaf_dtype,
    mask_replicas,
    subtract,
)


class ReparametrizeState(NamedTuple):
    """State of `reparametrize`.

    Attributes:
      count: number of updates so far.
      phi: the embedding's parameters; its output is `embedding.apply(phi)`.
      inner: state of the optimizer of :math:`\\phi`.
      nonfinite: `[R]`, in how many updates each replica was left out.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count
    phi: PyTree
    inner: optax.OptState
    nonfinite: jax.Array


def reparametrize(
    optimizer: optax.GradientTransformation,
    embedding: Embedding | None = None,
    *,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains an embedding in place of the R replicas that it puts out.

    Pranam as first published. The replicas *are* the output of the embedding
    :math:`f(\phi)`, and `optimizer` acts on its parameters. With the gradients
    :math:`G` of R replicas of a model, stacked along axis 0 of every leaf, and their
    stacked params :math:`W`,

    .. math::
      \ell(\phi) &= \tfrac12 \| f(\phi) - \mathrm{sg}(f(\phi) - G) \|^2, \quad
        \nabla \ell = J_f^T G \\
      \phi' &= \phi + \mathrm{optimizer}(\nabla \ell) \\
      U &= f(\phi') - W

    where sg stops the gradient. U is the whole step: nothing that rescales it may
    follow. The first update takes the replicas from wherever they were to the
    embedding, which the default embedding has been fitted to.

    A replica whose gradient or weights are not finite, or whose weights are too large
    to be squared, is left out of :math:`J_f^T G`, and its update is zero. The other
    replicas are unaffected.

    Args:
      optimizer: a complete Optax optimizer, learning rate included. It sees
        :math:`\phi` as its params, so weight decay, clipping and the like act on
        :math:`\phi`.
      embedding: the embedding; default `mlp_embedding()`, linear with 4 codes per
        replica.
      key: seed or PRNG key of the embedding's random initialisation.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs `params` and forwards
      other keywords to `optimizer`.

    Raises:
      ValueError, TypeError: as `pranam`.

    Examples:
      >>> import jax, optax, pranam_optax
      >>> from pranam_optax import problems
      >>> problem = problems.sphere(10)
      >>> params = pranam_optax.replicate(problem.init, key=0, num_replicas=16)
      >>> grad_fn = pranam_optax.replica_value_and_grad(problem.fun)
      >>> tx = pranam_optax.reparametrize(optax.adam(0.1))
      >>> @jax.jit
      ... def step(params, state):
      ...     values, grads = grad_fn(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state, values
      >>> state = tx.init(params)
      >>> for _ in range(300):
      ...     params, state, values = step(params, state)
      >>> bool(values.max() < 1e-3)
      True

    References:
      S. Korablyov et al., `Pranam <https://github.com/SKorablyov/Pranam>`_, 2019.
    """
    embedding = check_embedding(embedding, "key")
    optimizer = optax.with_extra_args_support(optimizer)

    @auto_axes
    def init(params: PyTree) -> ReparametrizeState:
        check_replicas(params, "params")
        phi = embedding.init(as_key(key), params)
        return ReparametrizeState(
            count=jnp.zeros([], jnp.int32),
            phi=phi,
            inner=optimizer.init(phi),
            nonfinite=zero_counts(params),
        )

    @auto_axes
    def step(
        updates: PyTree,
        state: ReparametrizeState,
        params: PyTree,
        extra_args: dict[str, Any],
    ) -> tuple[PyTree, ReparametrizeState]:
        living = alive(params, updates)

        # 1. grad l = J^T G: f(phi) cancels in the residual, which is G.
        output, pull_back = jax.vjp(embedding.apply, state.phi)
        gradients = mask_replicas(living, updates)
        (gradient,) = pull_back(optax.tree.cast_like(gradients, output))

        # 2. phi' = phi + optimizer(grad l)
        steps, inner = optimizer.update(gradient, state.inner, state.phi, **extra_args)
        phi = optax.apply_updates(state.phi, steps)

        # 3. U = f(phi') - W
        moves = subtract(
            mask_replicas(living, embedding.apply(phi), like=params),
            mask_replicas(living, params),
        )
        moves = jax.tree.map(lambda u, g: u.astype(leaf_dtype(g)), moves, updates)
        return moves, ReparametrizeState(
            count=optax.safe_increment(state.count),
            phi=phi,
            inner=inner,
            nonfinite=state.nonfinite + (~living).astype(jnp.int32),
        )

    def update_fn(
        updates: PyTree,
        state: ReparametrizeState,
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ReparametrizeState]:
        check_update(updates, state, ReparametrizeState, params, embedding.apply)
        data = jax.tree.map(lambda x: Partial(x) if callable(x) else x, extra_args)
        return step(updates, state, params, data)

    return optax.GradientTransformationExtraArgs(init, update_fn)
