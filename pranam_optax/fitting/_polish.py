"""Second-order refinement of replicas, each on its own, after the coupled phase."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pranam_optax._per_replica import per_replica
from pranam_optax._replicas import replica_value_and_grad
from pranam_optax._tree import PyTree, check_count, largest_magnitudes

Function = Callable[[PyTree], jax.Array]


class Polished(NamedTuple):
    """Stacked params, and how many evaluations of the function they took, `[R]`."""

    params: PyTree
    num_evaluations: jax.Array


# polish(fun, residuals, params): the loss of one model; its residuals if it is a sum of
# their squares, else None; stacked params. Equal ones are compiled once.
Polish = Callable[[Function, Function | None, PyTree], Polished]


def second_order(max_steps: int = 200) -> Polish:
    """Levenberg-Marquardt for least squares, L-BFGS for all else: the default.

    Args:
      max_steps: maximum number of steps of a replica.
    """
    return _SecondOrder(max_steps)


def lbfgs(max_steps: int = 200) -> Polish:
    """Optax's L-BFGS with its line search, until no replica gains any more.

    Args:
      max_steps: maximum number of steps of a replica.
    """
    return _LBFGS(max_steps)


def levenberg_marquardt(max_steps: int = 200) -> Polish:
    """Optimistix's Levenberg-Marquardt, for `fit` without a `loss`.

    Args:
      max_steps: maximum number of steps of a replica.
    """
    return _LevenbergMarquardt(max_steps)


@dataclasses.dataclass(frozen=True)
class _Polish:
    max_steps: int

    def __post_init__(self) -> None:
        steps = check_count(self.max_steps, "max_steps")
        object.__setattr__(self, "max_steps", steps)


class _SecondOrder(_Polish):
    def __call__(
        self, fun: Function, residuals: Function | None, params: PyTree
    ) -> Polished:
        method = _LBFGS if residuals is None else _LevenbergMarquardt
        return method(self.max_steps)(fun, residuals, params)


class _LBFGS(_Polish):
    def __call__(
        self, fun: Function, residuals: Function | None, params: PyTree
    ) -> Polished:
        tx = per_replica(optax.lbfgs())
        unit = _typical_slope(fun, params)

        def scaled(params: PyTree) -> jax.Array:
            return fun(params) / unit

        grad_fn = replica_value_and_grad(scaled)
        state = tx.init(params)

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            count, params, state, evaluations, last, _ = carry
            values, grads = grad_fn(params)
            updates, state = tx.update(
                grads, state, params, values=values, grad=grads, value_fn=scaled
            )
            searches = optax.tree.get(state, "num_linesearch_steps")
            gained = last - values > 4 * jnp.finfo(values.dtype).eps * jnp.abs(values)
            params = optax.apply_updates(params, updates)
            evaluations = evaluations + 1 + searches.astype(jnp.int32)
            return count + 1, params, state, evaluations, values, jnp.any(gained)

        def unfinished(carry: tuple[Any, ...]) -> jax.Array:
            count, *_, gained = carry
            return (count < self.max_steps) & gained

        values = jax.vmap(scaled)(params)
        zeros = jnp.zeros(values.shape, jnp.int32)
        last = jnp.full_like(values, jnp.inf)
        carry = (0, params, state, zeros, last, jnp.array(True))
        _, params, _, evaluations, _, _ = jax.lax.while_loop(unfinished, step, carry)
        return Polished(params, evaluations)


def _typical_slope(fun: Function, params: PyTree) -> jax.Array:
    """The size of the replicas' gradients: in units of it, no tolerance is absolute."""
    _, grads = replica_value_and_grad(fun)(params)
    largest = largest_magnitudes(grads)
    usable = jnp.isfinite(largest) & (largest > 0)
    typical = jnp.nanmedian(jnp.where(usable, largest, jnp.nan))
    return jnp.where(jnp.isfinite(typical), power_of_two(typical), 1.0)


def power_of_two(x: jax.Array) -> jax.Array:
    """The next power of two, division by which is exact."""
    return jnp.ldexp(jnp.ones_like(x), jnp.frexp(x)[1])


class _LevenbergMarquardt(_Polish):
    def __call__(
        self, fun: Function, residuals: Function | None, params: PyTree
    ) -> Polished:
        import lineax
        import optimistix

        assert residuals is not None
        eps = float(jnp.finfo(jax.tree.leaves(params)[0].dtype).eps)
        # Cholesky of the damped normal equations: several times faster in a batch than
        # the default QR, and the damping makes up for what it loses.
        solver: Any = optimistix.LevenbergMarquardt(
            rtol=eps**0.75,
            atol=eps**0.9,
            linear_solver=lineax.Normal(lineax.Cholesky()),
        )

        def refine(params: PyTree) -> Polished:
            solution: Any = optimistix.least_squares(
                lambda params, _: residuals(params),
                solver,
                params,
                max_steps=self.max_steps,
                throw=False,
            )
            steps = solution.stats["num_steps"]
            return Polished(solution.value, jnp.asarray(steps, jnp.int32))

        return jax.vmap(refine)(params)


def check_polish(polish: Polish | None, least_squares: bool) -> None:
    """Checks, before anything is compiled, that a refinement can be used."""
    if not (polish is None or callable(polish)):
        raise ValueError(
            "polish must be a function such as fitting.lbfgs(), or None, got "
            f"{polish!r}"
        )
    if isinstance(polish, _LevenbergMarquardt) and not least_squares:
        raise ValueError(
            "levenberg_marquardt is for least squares, which is fit without a loss; "
            "otherwise use lbfgs"
        )
    default = isinstance(polish, _SecondOrder) and least_squares
    if default or isinstance(polish, _LevenbergMarquardt):
        try:
            import optimistix  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "levenberg_marquardt needs optimistix: pip install "
                "'pranam-optax[fit]', or pass polish=fitting.lbfgs()"
            ) from error
