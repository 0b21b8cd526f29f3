"""`minimize`: starts, the coupled phase and the polish in one call."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial, all_leaves

from pranam_optax._pranam import Coupling
from pranam_optax._replicas import as_key
from pranam_optax._sharding import with_auto_axes
from pranam_optax._tree import PyTree, check_count, is_traced
from pranam_optax.fitting._coordinates import (
    Bounds,
    check_params,
    check_within,
    draw_around,
    parse_bounds,
    to_params,
    working_dtype,
)
from pranam_optax.fitting._coupled import (
    TRIES,
    Carry,
    Method,
    Problem,
    Release,
    Start,
    add_axis,
    advance,
    begin,
    begin_at,
    falls,
    lowest_index,
    make_method,
    pick,
    refine,
    spread_out,
    within,
)
from pranam_optax.fitting._polish import (
    Function,
    Polish,
    Polished,
    check_polish,
    second_order,
    settle,
    stages,
    unrefined,
)
from pranam_optax.fitting._restarts import restart
from pranam_optax.fitting._result import MinimizeResult
from pranam_optax.fitting._search import LANES, Budget, Search, Settings
from pranam_optax.fitting._trace import (
    call,
    explained,
    scalar_function,
    trace,
)

# Largest number of chunks that the coupled phase is cut into for callbacks.
_NUM_CHUNKS = 20


class Progress(NamedTuple):
    """What a callback of `minimize` and `fit` sees.

    Attributes:
      step: steps of the coupled phase done so far; with a budget, evaluations.
      num_steps: steps of the coupled phase in all; with a budget, `max_evaluations`.
      params: where each replica has seen its lowest value, stacked; with a budget, the
        best params, stacked with R = 1.
      values: the values there, `[R]`.
    """

    step: int
    num_steps: int | None
    params: PyTree
    values: jax.Array


Callback = Callable[[Progress], bool | None]


class Options(NamedTuple):
    """How `minimize` and `fit` search; see `minimize`."""

    key: int | jax.Array
    num_replicas: int
    num_steps: int
    optimizer: optax.GradientTransformation | None
    coupling: Coupling | Release
    polish: Polish | None
    callback: Callback | None
    progress: bool
    budget: Budget = Budget()
    callback_every: int | None = None


class Starts(NamedTuple):
    """Where a search begins.

    Attributes:
      first: the user's start, if there is one.
      draw: makes others from keys.
      box: the bounds.
    """

    first: PyTree | None
    draw: Partial
    box: Bounds


@with_auto_axes
def minimize(
    fun: Callable[[PyTree], jax.Array],
    init: PyTree | Callable[[jax.Array], PyTree] | None,
    *,
    key: int | jax.Array = 0,
    num_replicas: int = 64,
    num_steps: int = 1000,
    optimizer: optax.GradientTransformation | None = None,
    coupling: Coupling | None = None,
    bounds: PyTree | None = None,
    shapes: PyTree | None = None,
    polish: Polish | None = second_order(),  # noqa: B008
    callback: Callback | None = None,
    callback_every: int | None = None,
    progress: bool = False,
    max_evaluations: int | None = None,
    time_limit: float | None = None,
    target: float | None = None,
) -> MinimizeResult:
    r"""Searches for the global minimum of a function of any pytree.

    R replicas start at random, in coordinates :math:`z` without bounds and with one
    scale, :math:`x = x(z)` (a sine between two finite bounds). In the coupled phase

    .. math::
      g_r = \nabla_z f(x(z_r)), \quad \hat g_r = g_r / \max |g_r|, \quad
      z \mathrel{+}= \mathrm{optimizer}(\mathrm{pranam}_c(\hat g))

    with the coupling :math:`c = (1 - t / 0.6 T)_+`, released over the first 60 % of the
    T steps, and Adam, whose rate is another one for each replica, since nobody knows
    the best: from 0.01 to 0.3, with a cosine decay. Then `polish` refines each replica
    from the lowest point that it has seen and from its start, and keeps the lower of
    the two.

    With a budget (`max_evaluations`, `time_limit` or `target`) the search is made of
    runs, and what all of them found is kept. Four kinds of runs share the cost like
    27 : 9 : 3 : 1, in the order of the best values that they have found so far: coupled
    runs as above, from `num_steps / 8` steps on, each twice as long as the one before,
    after which the differences between the replicas are added to the best points;
    populations of CMA-ES, each twice as large; sweeps of line searches along one
    parameter after the other; and L-BFGS from the lowest of random points. The same key
    gives the same result, unless time decides.

    Without one, the whole run is one compiled program, cut into chunks for a callback
    or the progress bar.

    `fun` is traced at every call, so that it may use data that change from call to
    call; programs are compiled once for the same computation and shapes.
    It may be called under `jax.jit` and `jax.vmap`, where starts, bounds and data are
    not checked for values that cannot be used.

    Args:
      fun: takes one model's params and returns a scalar.
      init: one model's params (lists of numbers are arrays): the first start, around
        which the others are drawn
        (uniformly between finite bounds, log-normally at the start's distance from a
        single bound, normally with the start's own size where there is none). Or a
        function of a key that returns a random start (a callable pytree, such as an
        Equinox module, is params). Or None with finite bounds.
      key: seed or PRNG key of the starts and of the embedding.
      num_replicas: R, how many of them.
      num_steps: T, steps of the coupled phase.
      optimizer: what follows `pranam` in the chain, learning rate included, for
        coordinates of scale 1.
      coupling: of `pranam`: 0.0 for independent replicas, a schedule or one value per
        replica.
      bounds: a pair `(low, high)` for each leaf of the params, of numbers or arrays
        that broadcast to the leaf; either side may be infinite. If the params are one
        vector, SciPy's list of pairs too.
      shapes: of params whose start and bounds are numbers, like the params: an int or a
        tuple for each, such as `{"height": 3}`. By default a param has the shape of its
        start, or of its bounds without one.
      polish: the refinement, such as `fitting.lbfgs(max_steps=500)`, or None for none.
      callback: called with a `Progress` now and then; return True to end the coupled
        phase, or the search with a budget.
      callback_every: steps between two calls, by default a 20th of all; with a budget,
        evaluations, by default as many as a compiled call makes.
      progress: whether to show a progress bar (needs tqdm).
      max_evaluations: of `fun`, one with its gradient counted once. With this or one of
        the next two, runs restart until it is reached (see above). The last step or
        generation is finished.
      time_limit: in seconds, compilation included. Checked between compiled calls,
        whose length is adapted to it.
      target: a value of `fun` that is good enough. Alone, the search for one that does
        not exist never ends.

    Returns:
      A `MinimizeResult`.

    Raises:
      ValueError: for bounds that are reversed or of another structure than the params,
        starts that are not finite or outside the bounds, a `fun` that does not return
        a scalar or is not finite at any start, or arguments out of range.
      TypeError: for params that are not real floats.

    References:
      N. Hansen, `The CMA evolution strategy: A tutorial
      <https://arxiv.org/abs/1604.00772>`_, 2016.

      P. Baudiš, P. Pošík, Global line search algorithm hybridized with quadratic
      interpolation and its extension to separable functions, GECCO 2015.

    Examples:
      >>> import jax.numpy as jnp, pranam_optax
      >>> def camel(p):  # six humps, two of them deepest
      ...     x, y = p["x"], p["y"]
      ...     return (4 - 2.1 * x**2 + x**4 / 3) * x**2 + x * y + 4 * (y**2 - 1) * y**2
      >>> result = pranam_optax.minimize(
      ...     camel, None, bounds={"x": (-3, 3), "y": (-2, 2)},
      ...     num_replicas=16, num_steps=100)
      >>> print(f"{result.value:.4f}", result.confirmed)
      -1.0316 True
      >>> sorted(round(float(m.params["x"]), 3) for m in result.minima[:2])
      [-0.09, 0.09]
    """
    options = Options(
        key,
        num_replicas,
        num_steps,
        optimizer,
        Release() if coupling is None else coupling,
        polish,
        callback,
        progress,
        Budget(max_evaluations, time_limit, target),
        callback_every,
    )
    starts = make_starts(init, bounds, shapes, options.key)
    return search(fun, None, starts, options)


def make_starts(
    init: PyTree | Callable[[jax.Array], PyTree] | None,
    bounds: PyTree | None,
    shapes: PyTree | None,
    key: int | jax.Array,
) -> Starts:
    """Checks the arguments of a search that describe its params."""
    if callable(init) and (isinstance(init, Partial) or all_leaves([init])):
        if shapes is not None:
            raise ValueError("shapes cannot be given with a function for init")
        key = as_key(key)
        draw = trace(init, key)
        drawn = jax.eval_shape(draw, key)
        check_params(drawn, "init(key)")
        return Starts(None, draw, parse_bounds(bounds, drawn))
    if init is None:
        box = parse_bounds(bounds, None, shapes)
        return Starts(None, Partial(draw_around, start=box.low, bounds=box), box)
    first = to_params(init, shapes)
    check_params(first, "init")
    box = parse_bounds(bounds, first)
    check_within(first, box, "init")
    return Starts(first, Partial(draw_around, start=first, bounds=box), box)


def search(
    fun: Function,
    residuals: Partial | None,
    starts: Starts,
    options: Options,
    unit: jax.Array | float = 1.0,
) -> MinimizeResult:
    """Checks the arguments, then runs the three phases."""
    options = options._replace(
        num_replicas=check_count(options.num_replicas, "num_replicas"),
        num_steps=check_count(options.num_steps, "num_steps"),
    )
    if options.callback_every is not None:
        check_count(options.callback_every, "callback_every")
    check_polish(options.polish, residuals is not None)
    start_key, key = jax.random.split(as_key(options.key))
    first, draw, box = starts
    problem = Problem(
        _make_function(fun, box.low),
        residuals,
        first,
        jnp.asarray(unit, working_dtype()),
    )
    if options.budget != Budget():
        return _search_within(problem, draw, box, start_key, key, options)
    method = make_method(
        box.low,
        key,
        options.num_replicas,
        options.num_steps,
        options.optimizer,
        options.coupling,
    )

    keys = jax.random.split(start_key, TRIES * options.num_replicas)
    start = call(begin, problem.fun, draw, first, box, keys)
    _check_start(start, box)
    start = start._replace(z=spread_out(problem, start.z))
    carry = call(begin_at, method, start.coordinates, start.z)
    carry, history = _explore(problem, method, start, carry, options)
    refined = _refine(problem, start, carry, options)
    result = call(_finish, problem, start, carry, history, refined)
    return dataclasses.replace(result, checked=not is_traced(start.values))


def _search_within(
    problem: Problem,
    draw: Partial,
    box: Bounds,
    start_key: jax.Array,
    key: jax.Array,
    options: Options,
) -> MinimizeResult:
    """The search with a budget."""
    limit, seconds, target = options.budget
    if limit is not None:
        limit = check_count(limit, "max_evaluations")
    for name, number in [("time_limit", seconds), ("target", target)]:
        if number is not None and not np.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {number!r}")
    num_starts = TRIES * (options.num_replicas if limit is None else LANES)
    keys = jax.random.split(start_key, max(num_starts, TRIES * LANES))
    budget = Budget(limit, seconds, target)
    began = time.monotonic()
    start = call(begin, problem.fun, draw, problem.first, box, keys)
    if is_traced(start.values):
        raise ValueError(
            "max_evaluations, time_limit and target cannot be used under jax.jit or "
            "jax.vmap: the search is more than one compiled program"
        )
    _check_start(start, box)
    settings = Settings(
        options.num_replicas,
        options.num_steps,
        options.optimizer,
        options.coupling,
        options.polish and settle(options.polish, problem.residuals, box.low),
    )
    search = Search(problem, draw, start, settings, budget, began)
    every, called = options.callback_every or 1, 0
    with _progress_bar(options.progress, limit, "search") as bar:

        def watch(search: Search) -> bool | None:
            nonlocal called
            value = search.value * problem.unit
            if bar is not None:
                bar.update(search.num_evaluations - bar.n)
                bar.set_postfix(value=f"{float(value):.6g}")
            if options.callback is None or search.num_evaluations < called + every:
                return False
            called = search.num_evaluations
            params = start.coordinates.to_params(search.z)
            progress = Progress(called, limit, add_axis(params), value[None])
            return options.callback(progress)

        return restart(search, key, watch)


def _make_function(fun: Function, params: PyTree) -> Partial:
    with explained():
        value = jax.eval_shape(lambda params: fun(params), params)
    if not isinstance(value, jax.ShapeDtypeStruct) or value.shape:
        described = jax.tree.map(lambda x: x.shape, value)
        raise ValueError(
            f"fun must return a scalar, but it returns shape {described}; for a vector "
            "of residuals see fit"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"fun must return a real float, but it returns {value.dtype}")
    dtype = working_dtype()
    return scalar_function(lambda p: jnp.asarray(fun(p)).astype(dtype), params)


def _check_start(start: Start, bounds: Bounds) -> None:
    """Raises for starts that cannot be used, unless they are traced."""
    if is_traced(start.values):
        return
    check_within(start.params, bounds, "init(key)")
    values = np.asarray(start.values)
    if not np.isfinite(values).any():
        example = jax.tree.map(lambda x: np.asarray(x[0]).tolist(), start.params)
        raise ValueError(
            f"fun is not finite at any of the {len(values)} random starts: it is "
            f"{values[0]} at {example}, for example. Narrow the bounds, or pass an "
            "init where it is finite."
        )


def _explore(
    problem: Problem,
    method: Method,
    start: Start,
    carry: Carry,
    options: Options,
) -> tuple[Carry, jax.Array]:
    """The coupled phase, in chunks if somebody watches."""
    total, callback = options.num_steps, options.callback
    watched = callback is not None or options.progress
    if watched and is_traced(start.values):
        raise ValueError(
            "callback and progress cannot be used under jax.jit or jax.vmap: they run "
            "between compiled programs"
        )
    length = options.callback_every or -(-total // _NUM_CHUNKS) if watched else total
    length = min(length, total)
    empty = jnp.zeros((length, options.num_replicas), start.values.dtype)
    history = []
    with _progress_bar(options.progress, total, "search") as bar:
        for step in range(0, total, length):
            num = min(length, total - step)
            carry, values = call(
                advance, problem.fun, method, start.coordinates, carry, empty, num
            )
            history.append(values[:num])
            if not watched:
                continue
            best = carry.best_values * problem.unit
            if bar is not None:
                bar.update(num)
                bar.set_postfix(value=f"{float(jnp.nanmin(best)):.6g}")
            params = jax.vmap(start.coordinates.to_params)(carry.best_z)
            progress = Progress(step + num, total, params, best)
            if callback is not None and callback(progress):
                break
    return carry, jnp.concatenate(history)


def _refine(
    problem: Problem, start: Start, carry: Carry, options: Options
) -> tuple[Polished, jax.Array] | None:
    """The polish and the values at its end, some replicas at a time if watched."""
    if options.polish is None:
        return None
    found = unrefined(jax.tree.map(_join, carry.best_z, start.z))
    polish = settle(options.polish, problem.residuals, start.coordinates.scale)
    for stage, num in stages(polish) if options.progress else ((polish, None),):
        order = jnp.argsort(found[1])[:num]
        parts = min(_NUM_CHUNKS, len(order)) if options.progress else 1
        with _progress_bar(options.progress, len(order), "polish") as bar:
            for some in jnp.array_split(order, parts):
                found = call(
                    refine, problem, start.coordinates, Partial(stage), found, some
                )
                if bar is not None:
                    bar.update(len(some))
    return found


def _join(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts)


def _finish(
    problem: Problem,
    start: Start,
    carry: Carry,
    history: jax.Array,
    refined: tuple[Polished, jax.Array] | None,
) -> MinimizeResult:
    """Gathers what was found."""
    coordinates, unit = start.coordinates, problem.unit

    fun = within(problem.fun, coordinates)
    num_evaluations = jnp.asarray(len(start.values) + history.size, jnp.int32)
    candidates = jax.tree.map(_join, carry.z, carry.best_z, start.z)
    values = jax.vmap(fun)(candidates)
    if refined is not None:
        polished, ends = refined
        num_evaluations += jnp.sum(polished.num_evaluations)
        candidates = jax.tree.map(_join, candidates, polished.params)
        values = _join(values, ends)
    num_evaluations += len(values)

    # Of its candidates, each replica keeps the lowest.
    num_replicas = history.shape[1]
    lowest = lowest_index(values.reshape(-1, num_replicas))
    index = lowest * num_replicas + jnp.arange(num_replicas)
    z, values = pick((candidates, values), index)
    unbounded = falls(fun, coordinates, pick(z, lowest_index(values)))
    params = jax.vmap(coordinates.to_params)(z)
    if problem.first is not None:
        # The user's start itself: its coordinates may lie beside a bound.
        value = problem.fun(problem.first)
        better = jnp.zeros_like(values, bool).at[0].set(value < values[0])
        params = jax.vmap(optax.tree.where, (0, None, 0))(better, problem.first, params)
        values = jnp.where(better, value, values)
        num_evaluations += 1
    best = lowest_index(values)
    return MinimizeResult(
        params=pick(params, best),
        value=values[best] * unit,
        replica_params=params,
        replica_values=values * unit,
        scale=coordinates.scale,
        history=history * unit,
        start_values=start.values * unit,
        num_evaluations=num_evaluations + 1,
        unbounded=unbounded,
    )


def _progress_bar(shown: bool, total: int | None, name: str) -> Any:
    if not shown:
        return contextlib.nullcontext()
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True needs tqdm: pip install 'pranam-optax[fit]'"
        ) from error
    return tqdm(total=total, desc=name)
