"""The transformation `reparametrize`: the optimizer acts on the embedding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from pranam_optax._embedding import Embedding, mlp_embedding
from pranam_optax._replicas import as_key
from pranam_optax._sharding import check_shardings, keep_shardings
from pranam_optax._tree import (
    PyTree,
    cast,
    check_replicas,
    check_update,
    compute_dtype,
    in_range,
    leaf_dtype,
    mask_replicas,
    replica_norms,
    zero_counts,
)


class ReparametrizeState(NamedTuple):
    """State of `reparametrize`.

    Attributes:
      count: number of updates so far.
      embedding: the embedding with its parameters: `embedding()` is :math:`f(\\phi)`,
        `embedding.args[0]` is :math:`\\phi`.
      inner: state of the optimizer of :math:`\\phi`.
      nonfinite: `[R]`, in how many updates each replica was left out because its
        gradient or weights were not finite.
      revived: `[R]`, how often `revive_replicas` has restarted each replica.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count
    embedding: Partial
    inner: optax.OptState
    nonfinite: jax.Array
    revived: jax.Array


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

    A replica with a NaN, an infinity or squares that overflow in its gradient or
    weights is left out of :math:`J_f^T G`, and its update is zero; the others go on
    as if it were not there.

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
      ValueError: from `init` and `update`, at trace time, for a leaf without replica
        axis, leaves that disagree on R, params and updates of different structure or
        shapes, missing params, or a tree without leaves.
      TypeError: from `init` and `update`, for integer or complex leaves.

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
    if embedding is None:
        embedding = mlp_embedding()
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> ReparametrizeState:
        check_replicas(params, "params")
        phi = embedding.init(as_key(key), params)
        return ReparametrizeState(
            count=jnp.zeros([], jnp.int32),
            embedding=Partial(embedding.apply, phi),
            inner=optimizer.init(phi),
            nonfinite=zero_counts(params),
            revived=zero_counts(params),
        )

    def step(*args: Any) -> tuple[PyTree, ReparametrizeState]:
        return _step(optimizer, *args)

    def update_fn(
        updates: PyTree,
        state: ReparametrizeState,
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ReparametrizeState]:
        check_update("reparametrize", updates, params, state.nonfinite)
        check_shardings(updates, params)
        data = jax.tree.map(lambda x: Partial(x) if callable(x) else x, extra_args)
        return keep_shardings(step, updates, state, params, data)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _step(
    optimizer: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: ReparametrizeState,
    params: PyTree,
    extra_args: dict[str, Any],
) -> tuple[PyTree, ReparametrizeState]:
    """The update; see `reparametrize`."""
    f, phi = state.embedding.func, state.embedding.args[0]
    dtype = compute_dtype(*jax.tree.leaves((updates, params)))
    norms = replica_norms(updates, dtype), replica_norms(params, dtype)
    finite = in_range(norms[0]) & in_range(norms[1])

    # 1. grad l = J^T G: f(phi) cancels in the residual, which is G.
    output, pull_back = jax.vjp(f, phi)
    gradients = mask_replicas(finite, cast(updates))
    (gradient,) = pull_back(
        jax.tree.map(lambda g, y: g.astype(y.dtype), gradients, output)
    )

    # 2. phi' = phi + optimizer(grad l)
    steps, inner = optimizer.update(gradient, state.inner, phi, **extra_args)
    phi = optax.apply_updates(phi, steps)

    # 3. U = f(phi') - W
    moves = jax.tree.map(
        lambda y, w, g: (y.astype(w.dtype) - w).astype(leaf_dtype(g)),
        f(phi),
        cast(params),
        updates,
    )
    return mask_replicas(finite, moves), ReparametrizeState(
        count=optax.safe_increment(state.count),
        embedding=Partial(f, phi),
        inner=inner,
        nonfinite=state.nonfinite + (~finite).astype(jnp.int32),
        revived=state.revived,
    )
