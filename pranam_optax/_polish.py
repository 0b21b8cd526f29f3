"""Second-order refinement of replicas, each on its own, after the coupled phase."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pranam_optax._per_replica import per_replica
from pranam_optax._replicas import replica_value_and_grad
from pranam_optax._tree import PyTree


class Polished(NamedTuple):
    """Stacked params, and how many evaluations of the function they took, `[R]`."""

    params: PyTree
    num_evaluations: jax.Array


def lbfgs(
    fun: Callable[[PyTree], jax.Array], params: PyTree, max_steps: int
) -> Polished:
    r"""Optax's L-BFGS with its line search, until no replica gains any more.

    Args:
      fun: the loss of one model.
      params: stacked params.
      max_steps: most steps of a replica.
    """
    tx = per_replica(optax.lbfgs())
    grad_fn = replica_value_and_grad(fun)
    state = tx.init(params)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        count, params, state, evaluations, last, _ = carry
        values, grads = grad_fn(params)
        updates, state = tx.update(
            grads, state, params, values=values, grad=grads, value_fn=fun
        )
        searches = optax.tree.get(state, "num_linesearch_steps")
        gained = last - values > 4 * jnp.finfo(values.dtype).eps * jnp.abs(values)
        params = optax.apply_updates(params, updates)
        evaluations = evaluations + 1 + searches.astype(jnp.int32)
        return count + 1, params, state, evaluations, values, jnp.any(gained)

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        count, *_, gained = carry
        return (count < max_steps) & gained

    values, _ = grad_fn(params)
    zeros = jnp.zeros(values.shape, jnp.int32)
    carry = (0, params, state, zeros, jnp.full_like(values, jnp.inf), jnp.array(True))
    _, params, _, evaluations, _, _ = jax.lax.while_loop(unfinished, step, carry)
    return Polished(params, evaluations)


def levenberg_marquardt(
    residuals: Callable[[PyTree], jax.Array], params: PyTree, max_steps: int
) -> Polished:
    r"""Optimistix's Levenberg-Marquardt on the sum of squares of the residuals.

    Args:
      residuals: of one model, any shape.
      params: stacked params.
      max_steps: most steps of a replica.

    Raises:
      ImportError: without optimistix.
    """
    try:
        import lineax
        import optimistix
    except ImportError as error:
        raise ImportError(
            "polish='lm' needs optimistix: pip install 'pranam-optax[fit]', or pass "
            "polish='lbfgs'"
        ) from error

    eps = float(jnp.finfo(jax.tree.leaves(params)[0].dtype).eps)
    # Cholesky of the damped normal equations: several times faster in a batch than the
    # default QR, and the damping makes up for what it loses.
    solver: Any = optimistix.LevenbergMarquardt(
        rtol=eps**0.75, atol=eps**0.9, linear_solver=lineax.Normal(lineax.Cholesky())
    )

    def refine(params: PyTree) -> Polished:
        solution: Any = optimistix.least_squares(
            lambda params, _: residuals(params),
            solver,
            params,
            max_steps=max_steps,
            throw=False,
        )
        steps = solution.stats["num_steps"]
        return Polished(solution.value, jnp.asarray(steps, jnp.int32))

    return jax.vmap(refine)(params)
