"""Second-order refinement of replicas, each on its own, after the coupled phase."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pranam_optax._replicas import replica_value_and_grad
from pranam_optax._tree import PyTree, check_count, largest_magnitudes
from pranam_optax.fitting._coordinates import working_dtype
from pranam_optax.fitting._trace import only_in_reverse

Function = Callable[[PyTree], jax.Array]

# A descent ends after so many steps in a row that gain nothing.
PATIENCE = 2
# Constants of the line search: a step is too long, or too short.
_ARMIJO, _WOLFE = 1e-4, 0.9
# Numbers that L-BFGS may remember of each replica, unless ten steps are more.
_MEMORY = 100_000
# Up to so many params Levenberg-Marquardt refines all replicas, up to so many the best.
_FEW, _MANY, _BEST = 100, 1000, 8
# Steps of Levenberg-Marquardt for all replicas, before the best go on.
_FIRST = 30
# Up to so many params Levenberg-Marquardt takes all of its steps; beyond, where each
# costs more, at least this share of them. L-BFGS takes another share.
_SMALL, _LEAST_SHARE, _LBFGS_SHARE = 20, 0.2, 0.5
# Replicas that are refined together on a CPU, where they wait for the slowest; and
# numbers in their Jacobians.
_TOGETHER, _JACOBIANS = 8, 50_000_000


class Polished(NamedTuple):
    """Stacked params, and how many evaluations of the function they took, `[R]`."""

    params: PyTree
    num_evaluations: jax.Array


#: `polish(fun, residuals, params)`: the loss of one model; its residuals if it is a sum
#: of their squares, else None; stacked params. Equal ones are compiled once.
Polish = Callable[[Function, Function | None, PyTree], Polished]


def second_order(max_steps: int = 1000) -> Polish:
    """The default: Levenberg-Marquardt for least squares, L-BFGS for all else.

    The cost of a step of Levenberg-Marquardt grows with the cube of the number of
    params. Up to 100 of them, all replicas take at most 30 steps, and the eight best go
    on: in a narrow valley they need hundreds. Beyond, L-BFGS goes first, and
    Levenberg-Marquardt refines the eight best; from 1000 on, and for models that can
    only be differentiated in reverse, there is L-BFGS alone.

    Args:
      max_steps: maximum number of steps of Levenberg-Marquardt up to 20 params; with
        more, in inverse proportion to them, down to a fifth. L-BFGS may take half as
        many trial steps, each an evaluation.
    """
    return _SecondOrder(max_steps)


def lbfgs(max_steps: int = 500) -> Polish:
    """Optax's L-BFGS, until no replica gains any more.

    Args:
      max_steps: maximum number of trial steps of a replica, each an evaluation.
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
        polish = settle(self, residuals, jax.tree.map(lambda x: x[0], params))
        return polish(fun, residuals, params)


@dataclasses.dataclass(frozen=True)
class _Staged:
    """Refinements, one after the other, and how many of the lowest each takes."""

    parts: tuple[tuple[Polish, int | None], ...]

    def __call__(
        self, fun: Function, residuals: Function | None, params: PyTree
    ) -> Polished:
        found = unrefined(params)
        for polish, num in self.parts:
            some = jnp.argsort(found[1])[:num]
            found = refine_some(polish, fun, residuals, found, some)
        return found[0]


def unrefined(params: PyTree) -> tuple[Polished, jax.Array]:
    """Where stages begin: replicas that are not refined, their values all zero."""
    num = len(jax.tree.leaves(params)[0])
    return Polished(params, jnp.zeros(num, jnp.int32)), jnp.zeros(num, working_dtype())


def refine_some(
    polish: Polish,
    fun: Function,
    residuals: Function | None,
    found: tuple[Polished, jax.Array],
    some: jax.Array,
) -> tuple[Polished, jax.Array]:
    """Replicas and their values, some of them refined."""
    old = found[0]
    params = jax.tree.map(lambda x: x[some], old.params)
    polished = polish(fun, residuals, params)
    count = old.num_evaluations[some] + polished.num_evaluations
    new = Polished(polished.params, count), jax.vmap(fun)(polished.params)
    return jax.tree.map(lambda x, y: x.at[some].set(y), found, new)


def stages(polish: Polish) -> tuple[tuple[Polish, int | None], ...]:
    """Refinements, one after the other, and how many of the lowest each takes."""
    if isinstance(polish, _LevenbergMarquardt) and polish.first_steps is not None:
        first, last = (
            _LevenbergMarquardt(n) for n in (polish.first_steps, polish.max_steps)
        )
        return (first, None), (last, _BEST)
    return polish.parts if isinstance(polish, _Staged) else ((polish, None),)


def settle(polish: Polish, residuals: Function | None, params: PyTree) -> Polish:
    """The refinement that the default is for this model; another one as it is."""
    if not isinstance(polish, _SecondOrder):
        return polish
    size, steps = sum(x.size for x in jax.tree.leaves(params)), polish.max_steps
    descent = _LBFGS(math.ceil(_LBFGS_SHARE * steps))
    if residuals is None or size > _MANY or only_in_reverse(residuals):
        return descent
    last = math.ceil(steps * min(1, max(_SMALL / max(size, 1), _LEAST_SHARE)))
    if size > _FEW:
        return _Staged(((descent, None), (_LevenbergMarquardt(last), _BEST)))
    return _LevenbergMarquardt(last, min(_FIRST, steps))


class _LBFGS(_Polish):
    def __call__(
        self, fun: Function, residuals: Function | None, params: PyTree
    ) -> Polished:
        unit = typical_slope(fun, params)
        start = begin_descents(fun, params, unit)
        end, _ = descend(fun, start, unit, jnp.arange(self.max_steps))
        return Polished(end.params, end.num_evaluations)


class Descents(NamedTuple):
    """Descents by L-BFGS in progress, one per row.

    Attributes:
      params: where they are.
      values: there, in units of the slope.
      grads: likewise.
      state: of L-BFGS.
      direction: in which each goes.
      step: the part of its direction that each tries next.
      bracket: the parts that are known to be too short and too long.
      idle: for how many steps each has gained nothing.
      num_evaluations: of each.
    """

    params: PyTree
    values: jax.Array
    grads: PyTree
    state: optax.OptState
    direction: PyTree
    step: jax.Array
    bracket: tuple[jax.Array, jax.Array]
    idle: jax.Array
    num_evaluations: jax.Array

    @property
    def active(self) -> jax.Array:
        """Which of them still gain."""
        return self.idle < PATIENCE


def _lbfgs(params: PyTree) -> optax.GradientTransformation:
    """L-BFGS that remembers the whole curvature of a small model."""
    size = sum(x.size for x in jax.tree.leaves(params))
    memory = min(3 * size, _MEMORY // size, 60)
    return optax.chain(optax.scale_by_lbfgs(max(memory, 10)), optax.scale(-1.0))


def begin_descents(fun: Function, params: PyTree, unit: jax.Array) -> Descents:
    """Descents from stacked params; `unit` is that of `typical_slope`."""

    def begin(params: PyTree) -> Descents:
        value, grad = jax.value_and_grad(lambda p: fun(p) / unit)(params)
        idle = jnp.where(jnp.isfinite(value), 0, PATIENCE)
        state = _lbfgs(params).init(params)
        return _aim(params, value, grad, state, idle, jnp.ones((), jnp.int32))

    return jax.vmap(begin)(params)


def _aim(
    params: PyTree, value: jax.Array, grad: PyTree, state: optax.OptState, *counts: Any
) -> Descents:
    """One descent at the beginning of a line search."""
    direction, state = _lbfgs(params).update(grad, state, params)
    bracket = jnp.zeros_like(value), jnp.full_like(value, jnp.inf)
    step = jnp.ones_like(value)
    return Descents(params, value, grad, state, direction, step, bracket, *counts)


def _advance(fun: Function, old: Descents) -> Descents:
    r"""One evaluation of one descent: a trial step, and what follows from it.

    With the slope :math:`s` along the direction, a step t is too long unless
    :math:`f(t) \le f(0) + c_1 t s(0)`, and too short if none was too long yet and
    :math:`s(t) < c_2 s(0)`. Any other is taken. As each evaluation is a step of its
    own, descents beside each other do not wait for the longest line search.

    References:
      A. S. Lewis, M. L. Overton, `Nonsmooth optimization via quasi-Newton methods
      <https://doi.org/10.1007/s10107-012-0514-2>`_, 2013.
    """
    params = optax.tree.add_scale(old.params, old.step, old.direction)
    value, grad = jax.value_and_grad(fun)(params)
    slope = optax.tree.vdot(old.grads, old.direction)
    new_slope = optax.tree.vdot(grad, old.direction)
    rounding = 2 * jnp.finfo(value.dtype).eps * jnp.abs(old.values)
    fallen = value <= old.values + _ARMIJO * old.step * slope + rounding
    short, long = old.bracket
    too_short = fallen & (new_slope < _WOLFE * slope) & jnp.isinf(long)
    taken = fallen & ~too_short
    # Nothing is left to gain in this direction.
    lost = ~fallen & ~(-slope * old.step > rounding)

    # The search goes on.
    short = jnp.where(too_short, old.step, short)
    long = jnp.where(fallen, long, old.step)
    part = jnp.where(short > 0, 0.5, _cubic(old, value, slope, new_slope))
    step = jnp.where(too_short, 2 * old.step, short + part * (long - short))
    on = old._replace(step=step, bracket=(short, long))

    # Or the next one begins: without memory, if the curvature was not positive.
    gained = taken & (old.values - value > 2 * rounding)
    params, value, grad = optax.tree.where(
        taken, (params, value, grad), (old.params, old.values, old.grads)
    )
    empty = _lbfgs(params).init(params)
    state = optax.tree.where(taken & (new_slope > slope), old.state, empty)
    idle = jnp.where(gained, 0, old.idle + 1)
    turn = _aim(params, value, grad, state, idle, old.num_evaluations)
    new = optax.tree.where(taken | lost, turn, on)
    new = new._replace(num_evaluations=old.num_evaluations + 1)
    return optax.tree.where(old.active, new, old)


def _cubic(
    old: Descents, value: jax.Array, slope: jax.Array, new_slope: jax.Array
) -> jax.Array:
    """Which part of a step that was too long is the minimum of a cubic, about."""
    chord = slope + new_slope - 3 * (value - old.values) / old.step
    root = jnp.sqrt(chord**2 - slope * new_slope)
    part = 1 - (new_slope + root - chord) / (new_slope - slope + 2 * root)
    return jnp.where(jnp.isfinite(part), jnp.clip(part, 0.1, 0.5), 0.1)


def descend(
    fun: Function,
    start: Descents,
    unit: jax.Array,
    steps: jax.Array,
    max_evaluations: jax.Array | float = jnp.inf,
) -> tuple[Descents, jax.Array]:
    """Descends for as many trial steps, or until nothing gains or the budget is spent.

    Returns:
      The descents, and after each step how many evaluations were made and the lowest
      value, `[steps, 2]`; NaN after the last.
    """
    size = len(steps)

    def spent(now: Descents) -> jax.Array:
        return jnp.sum(now.num_evaluations - start.num_evaluations)

    def step(
        carry: tuple[jax.Array, Descents, jax.Array],
    ) -> tuple[jax.Array, Descents, jax.Array]:
        count, old, history = carry
        new = jax.vmap(lambda one: _advance(lambda p: fun(p) / unit, one))(old)
        lowest = jnp.nanmin(new.values) * unit
        return count + 1, new, history.at[count].set(jnp.stack([spent(new), lowest]))

    def unfinished(carry: tuple[jax.Array, Descents, jax.Array]) -> jax.Array:
        count, now, _ = carry
        return (count < size) & jnp.any(now.active) & (spent(now) < max_evaluations)

    empty = jnp.full((size, 2), jnp.nan, start.values.dtype)
    carry = (jnp.array(0), start, empty)
    return jax.lax.while_loop(unfinished, step, carry)[1:]


def typical_slope(fun: Function, params: PyTree) -> jax.Array:
    """The size of the replicas' gradients: in units of it, no tolerance is absolute."""
    _, grads = replica_value_and_grad(fun)(params)
    largest = largest_magnitudes(grads)
    usable = jnp.isfinite(largest) & (largest > 0)
    typical = jnp.nanmedian(jnp.where(usable, largest, jnp.nan))
    return jnp.where(jnp.isfinite(typical), power_of_two(typical), 1.0)


def power_of_two(x: jax.Array) -> jax.Array:
    """The next power of two, division by which is exact."""
    return jnp.ldexp(jnp.ones_like(x), jnp.frexp(x)[1])


@dataclasses.dataclass(frozen=True)
class _LevenbergMarquardt(_Polish):
    """Of all replicas; or `first_steps` of all, after which the best go on."""

    first_steps: int | None = None

    def __call__(
        self, fun: Function, residuals: Function | None, params: PyTree
    ) -> Polished:
        rank = jnp.arange(len(jax.tree.leaves(params)[0]))
        limits = jnp.full_like(rank, self.max_steps)[None]
        if self.first_steps is not None:
            last = jnp.where(rank < _BEST, self.max_steps, 0)
            limits = jnp.stack([jnp.full_like(rank, self.first_steps), last])

        # A loop, since a program for each number of steps would be compiled on its own.
        def turn(found: Any, limits: jax.Array) -> tuple[Any, None]:
            polish = functools.partial(_damped, limits=limits)
            lowest_first = jnp.argsort(found[1])
            return refine_some(polish, fun, residuals, found, lowest_first), None

        return jax.lax.scan(turn, unrefined(params), limits)[0][0]


def _damped(
    fun: Function, residuals: Function | None, params: PyTree, limits: jax.Array
) -> Polished:
    """Levenberg-Marquardt for at most so many steps of each replica."""
    import optimistix

    assert residuals is not None
    solver = _limited_solver(jax.tree.leaves(params)[0].dtype)

    def refine(row: tuple[PyTree, jax.Array]) -> Polished:
        params, limit = row
        solution: Any = optimistix.least_squares(
            lambda params, _: residuals(params),
            solver,
            params,
            options={"limit": limit},
            max_steps=None,
            throw=False,
        )
        steps = solution.stats["num_steps"]
        return Polished(solution.value, jnp.asarray(steps, jnp.int32))

    one = jax.tree.map(lambda x: x[0], params)
    size = sum(x.size for x in jax.tree.leaves(one))
    fitting = _JACOBIANS // (jax.eval_shape(residuals, one).size * size)
    wanted = _TOGETHER if jax.default_backend() == "cpu" else len(limits)
    most = max(min(fitting, wanted), 1)
    together = next(n for n in range(most, 0, -1) if len(limits) % n == 0)
    return jax.lax.map(refine, (params, limits), batch_size=together)


@functools.cache
def _limited_solver(dtype: Any) -> Any:
    """The solver, with the largest number of steps as an option, which is data."""
    import lineax
    import optimistix

    class Limited(optimistix.LevenbergMarquardt):  # type: ignore[type-arg]
        def terminate(self, *args: Any) -> Any:
            done, result = super().terminate(*args)
            _, _, _, options, state, _ = args
            return done | (state.num_steps >= options["limit"]), result

    solver: Any = Limited
    eps = float(jnp.finfo(dtype).eps)
    # Cholesky of the damped normal equations: several times faster in a batch than the
    # default QR, and the damping makes up for what it loses.
    return solver(
        rtol=eps**0.75,
        atol=eps**0.9,
        linear_solver=lineax.Normal(lineax.Cholesky()),
    )


def stops_anywhere(polish: Polish) -> bool:
    """Whether the refinement is descent by L-BFGS, which can be interrupted."""
    return isinstance(polish, _LBFGS)


def needs_residuals(polish: Polish | None) -> bool:
    """Whether the refinement cannot do without residuals."""
    return isinstance(polish, _LevenbergMarquardt)


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
