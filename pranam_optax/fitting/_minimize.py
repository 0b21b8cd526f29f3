"""`minimize`: starts, the coupled phase and the polish in one call."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial, all_leaves

from pranam_optax._pranam import Coupling, pranam
from pranam_optax._replicas import as_key
from pranam_optax._sharding import with_auto_axes
from pranam_optax._tree import PyTree, check_count, is_traced, largest_magnitudes, scale
from pranam_optax.fitting._coordinates import (
    Bounds,
    Coordinates,
    check_params,
    check_within,
    draw_around,
    make_coordinates,
    parse_bounds,
    working_dtype,
)
from pranam_optax.fitting._polish import Function, Polish, check_polish, second_order
from pranam_optax.fitting._result import MinimizeResult
from pranam_optax.fitting._trace import (
    call,
    scalar_function,
    standard_promotion,
    trace,
    vector_function,
)

# Random starts tried per replica, to replace those where the function is not finite.
_TRIES = 4
# The lowest and the highest rate of a replica, in scales of the coordinates.
_RATES = 0.01, 0.3
# Largest number of chunks that the coupled phase is cut into for callbacks.
_NUM_CHUNKS = 20
# In scales from the starts: where a function that still falls has no minimum.
_FAR = 100.0


class Progress(NamedTuple):
    """What a callback of `minimize` and `fit` sees.

    Attributes:
      step: steps of the coupled phase done so far.
      num_steps: steps of the coupled phase in all.
      params: where each replica has seen its lowest value, stacked.
      values: the lowest value each replica has seen, `[R]`.
    """

    step: int
    num_steps: int
    params: PyTree
    values: jax.Array


Callback = Callable[[Progress], bool | None]


class Options(NamedTuple):
    """How `minimize` and `fit` search; see `minimize`."""

    key: int | jax.Array
    num_replicas: int
    num_steps: int
    optimizer: optax.GradientTransformation | None
    coupling: Coupling | None
    polish: Polish | None
    callback: Callback | None
    progress: bool


class _Problem(NamedTuple):
    """What is minimised: a pytree of numbers, functions included.

    Attributes:
      fun: the value at one model's params.
      residuals: of one model's params, if the value is the sum of their squares.
      first: the start that the user gave.
      unit: what values are multiplied by when they are reported.
    """

    fun: Partial
    residuals: Partial | None
    first: PyTree | None
    unit: jax.Array


class _Method(NamedTuple):
    """How the replicas move: a pytree of numbers, functions included.

    Attributes:
      key: of the embedding.
      coupling: for a count of steps.
      init: state of the optimizer, for stacked coordinates.
      update: `(gradients, state, coordinates, values)` to updates and state.
    """

    key: jax.Array
    coupling: Partial
    init: Partial
    update: Partial

    def link(self) -> optax.GradientTransformationExtraArgs:
        return pranam(coupling=self.coupling, key=self.key)


class _Start(NamedTuple):
    """The starts tried, and coordinates of the replicas that begin at some of them."""

    coordinates: Coordinates
    params: PyTree
    values: jax.Array
    z: PyTree


class _Carry(NamedTuple):
    """The replicas in their coordinates, and the lowest point each has seen.

    Their params are carried along, as otherwise XLA computes them anew for each of the
    data.
    """

    z: PyTree
    params: PyTree
    states: tuple[optax.OptState, optax.OptState]
    best_z: PyTree
    best_values: jax.Array


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
    polish: Polish | None = second_order(),  # noqa: B008
    callback: Callback | None = None,
    progress: bool = False,
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

    The whole run is one compiled program, cut into chunks for a callback or the
    progress bar. `fun` is traced at every call, so that it may use data that change
    from call to call; programs are compiled once for the same computation and shapes.
    It may be called under `jax.jit` and `jax.vmap`, where starts, bounds and data are
    not checked for values that cannot be used.

    Args:
      fun: takes one model's params and returns a scalar.
      init: one model's params: the first start, around which the others are drawn
        (uniformly between finite bounds, log-normally at the start's distance from a
        single bound, normally with the start's own size where there is none). Or a
        function of a key that returns a random start (a callable pytree, such as an
        Equinox module, is params). Or None with finite bounds.
      key: seed or PRNG key of the starts and of the embedding.
      num_replicas: R.
      num_steps: T, steps of the coupled phase.
      optimizer: what follows `pranam` in the chain, learning rate included, for
        coordinates of scale 1.
      coupling: of `pranam`: 0.0 for independent replicas, a schedule or one value per
        replica.
      bounds: a pair `(low, high)` for each leaf of the params, of numbers or arrays
        that broadcast to the leaf; either side may be infinite.
      polish: the refinement, such as `fitting.lbfgs(max_steps=500)`, or None for none.
      callback: called with a `Progress` after each of at most 20 chunks of equal
        length; return True to end the coupled phase early.
      progress: whether to show a progress bar (needs tqdm).

    Returns:
      A `MinimizeResult`.

    Raises:
      ValueError: for bounds that are reversed or of another structure than the params,
        starts that are not finite or outside the bounds, a `fun` that does not return
        a scalar or is not finite at any start, or arguments out of range.
      TypeError: for params that are not real floats.

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
        key, num_replicas, num_steps, optimizer, coupling, polish, callback, progress
    )
    return search(fun, None, init, bounds, options)


def search(
    fun: Function,
    residuals: Function | None,
    init: PyTree | Callable[[jax.Array], PyTree] | None,
    bounds: PyTree | None,
    options: Options,
    unit: jax.Array | float = 1.0,
) -> MinimizeResult:
    """Checks the arguments, then runs the three phases."""
    options = options._replace(
        num_replicas=check_count(options.num_replicas, "num_replicas"),
        num_steps=check_count(options.num_steps, "num_steps"),
    )
    polish = options.polish
    check_polish(polish, residuals is not None)
    start_key, key = jax.random.split(as_key(options.key))
    first, draw, box = _make_starts(init, bounds, start_key)
    problem = _Problem(
        _make_function(fun, box.low),
        residuals and vector_function(residuals, box.low),
        first,
        jnp.asarray(unit, working_dtype()),
    )
    with standard_promotion():
        optimizer = _make_optimizer(box.low, options)
        method = _Method(key, _make_coupling(options), *optimizer)

    keys = jax.random.split(start_key, _TRIES * options.num_replicas)
    start = call(_begin, problem.fun, draw, first, box, keys)
    _check_start(start, box)
    carry = call(_start_carry, method, start)
    carry, history = _explore(problem, method, start, carry, options)
    result = call(_finish, problem, polish and Partial(polish), start, carry, history)
    return dataclasses.replace(result, checked=not is_traced(start.values))


def _make_starts(
    init: PyTree | Callable[[jax.Array], PyTree] | None,
    bounds: PyTree | None,
    key: jax.Array,
) -> tuple[PyTree | None, Partial, Bounds]:
    """The user's start, the function that draws the others, and the bounds."""
    if callable(init) and (isinstance(init, Partial) or all_leaves([init])):
        draw = trace(init, key)
        shapes = jax.eval_shape(draw, key)
        check_params(shapes, "init(key)")
        return None, draw, parse_bounds(bounds, shapes)
    if init is None:
        box = parse_bounds(bounds, None)
        return None, Partial(draw_around, start=box.low, bounds=box), box
    check_params(init, "init")
    first = jax.tree.map(jnp.asarray, init)
    box = parse_bounds(bounds, first)
    check_within(first, box, "init")
    return first, Partial(draw_around, start=first, bounds=box), box


def _make_function(fun: Function, params: PyTree) -> Partial:
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


def _make_coupling(options: Options) -> Partial:
    if callable(options.coupling):
        return trace(options.coupling, jnp.zeros([], jnp.int32))
    if options.coupling is not None:
        pranam(coupling=options.coupling)  # checks it
        return Partial(_constant, value=jnp.asarray(options.coupling))
    return Partial(_release, end=max(int(0.6 * options.num_steps), 1))


def _constant(count: jax.Array, value: jax.Array) -> jax.Array:
    del count
    return value


def _release(count: jax.Array, end: jax.Array) -> jax.Array:
    return jnp.maximum(0.0, 1 - count / end)


def _adam(num_replicas: int, num_steps: int) -> optax.GradientTransformation:
    """Adam with another rate for each replica."""
    low, high = _RATES
    place = (jnp.arange(num_replicas) + 0.5) / num_replicas
    rates = low * (high / low) ** place
    return optax.chain(
        optax.scale_by_adam(),
        optax.stateless(lambda updates, _: scale(rates, updates)),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(1.0, num_steps)),
    )


def _make_optimizer(params: PyTree, options: Options) -> tuple[Partial, Partial]:
    optimizer = options.optimizer
    if optimizer is None:
        optimizer = _adam(options.num_replicas, options.num_steps)
    tx = optax.with_extra_args_support(optimizer)
    dtype = working_dtype()
    z = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((options.num_replicas, *x.shape), dtype), params
    )
    values = jax.ShapeDtypeStruct((options.num_replicas,), dtype)
    init = trace(tx.init, z)
    update = trace(
        lambda g, state, z, values: tx.update(g, state, z, values=values),
        *(z, jax.eval_shape(init, z), z, values),
    )
    return init, update


def _begin(
    fun: Partial, draw: Partial, first: PyTree | None, bounds: Bounds, keys: jax.Array
) -> _Start:
    """Draws the starts, and replaces those where the function is not finite."""
    params = jax.vmap(draw)(keys)
    if first is not None:
        params = jax.tree.map(lambda x, y: x.at[0].set(y), params, first)
    coordinates = make_coordinates(params, bounds)
    z = jax.vmap(coordinates.from_params)(params)
    values = jax.vmap(lambda z: fun(coordinates.to_params(z)))(z)
    finite_first = jnp.argsort(~jnp.isfinite(values), stable=True)
    z = _pick(z, finite_first[: len(keys) // _TRIES])
    return _Start(coordinates, params, values, z)


def _check_start(start: _Start, bounds: Bounds) -> None:
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


def _start_carry(method: _Method, start: _Start) -> _Carry:
    params = jax.vmap(start.coordinates.to_params)(start.z)
    states = method.link().init(start.z), method.init(start.z)
    values = jnp.full(len(start.values) // _TRIES, jnp.inf, start.values.dtype)
    return _Carry(start.z, params, states, start.z, values)


def _explore(
    problem: _Problem,
    method: _Method,
    start: _Start,
    carry: _Carry,
    options: Options,
) -> tuple[_Carry, jax.Array]:
    """The coupled phase, in chunks if somebody watches."""
    total, callback = options.num_steps, options.callback
    watched = callback is not None or options.progress
    if watched and is_traced(start.values):
        raise ValueError(
            "callback and progress cannot be used under jax.jit or jax.vmap: they run "
            "between compiled programs"
        )
    length = -(-total // _NUM_CHUNKS) if watched else total
    history = []
    with _progress_bar(total) if options.progress else contextlib.nullcontext() as bar:
        for step in range(0, total, length):
            steps = jnp.arange(step, min(step + length, total))
            carry, values = call(
                _advance, problem.fun, method, start.coordinates, carry, steps
            )
            history.append(values)
            best = carry.best_values * problem.unit
            if bar is not None:
                bar.update(len(steps))
                bar.set_postfix(value=f"{float(jnp.nanmin(best)):.6g}")
            params = jax.vmap(start.coordinates.to_params)(carry.best_z)
            progress = Progress(step + len(steps), total, params, best)
            if callback is not None and callback(progress):
                break
    return carry, jnp.concatenate(history)


def _advance(
    fun: Partial,
    method: _Method,
    coordinates: Coordinates,
    carry: _Carry,
    steps: jax.Array,
) -> tuple[_Carry, jax.Array]:
    """The coupled phase for as many steps, and the values before each."""
    link = method.link()
    to_params = jax.vmap(coordinates.to_params)
    grad_fn = jax.vmap(jax.value_and_grad(fun))

    def step(carry: _Carry, _: jax.Array) -> tuple[_Carry, jax.Array]:
        values, grads = grad_fn(carry.params)
        (grads,) = jax.vjp(to_params, carry.z)[1](grads)
        lower = values < carry.best_values
        best_z = jax.vmap(optax.tree.where)(lower, carry.z, carry.best_z)
        best_values = jnp.where(lower, values, carry.best_values)
        # Each replica counts the same, however steep its part of the landscape.
        updates, coupled = link.update(_unit_gradients(grads), carry.states[0], carry.z)
        updates, state = method.update(updates, carry.states[1], carry.z, values)
        z = optax.apply_updates(carry.z, updates)
        return _Carry(z, to_params(z), (coupled, state), best_z, best_values), values

    return jax.lax.scan(step, carry, steps)


def _unit_gradients(grads: PyTree) -> PyTree:
    largest = largest_magnitudes(grads)
    return scale(jnp.where(largest == 0, 1.0, 1 / largest), grads)


def _finish(
    problem: _Problem,
    polish: Partial | None,
    start: _Start,
    carry: _Carry,
    history: jax.Array,
) -> MinimizeResult:
    """Polishes, and gathers what was found."""
    coordinates, unit = start.coordinates, problem.unit

    def within(function: Function) -> Function:
        return lambda z: function(coordinates.to_params(z))

    fun = within(problem.fun)
    residuals = problem.residuals and within(problem.residuals)
    num_evaluations = jnp.asarray(len(start.values) + history.size, jnp.int32)
    groups = [carry.z, carry.best_z, start.z]
    if polish is not None:
        ends = jax.tree.map(lambda *x: jnp.concatenate(x), carry.best_z, start.z)
        polished = polish(fun, residuals, ends)
        num_evaluations += jnp.sum(polished.num_evaluations)
        groups.append(polished.params)
    candidates = jax.tree.map(lambda *x: jnp.concatenate(x), *groups)
    values = jax.vmap(fun)(candidates)
    num_evaluations += len(values)

    # Of its candidates, each replica keeps the lowest.
    num_replicas = history.shape[1]
    lowest = _lowest(values.reshape(-1, num_replicas))
    index = lowest * num_replicas + jnp.arange(num_replicas)
    z, values = _pick((candidates, values), index)
    unbounded = _falls(fun, coordinates, _pick(z, _lowest(values)))
    params = jax.vmap(coordinates.to_params)(z)
    if problem.first is not None:
        # The user's start itself: its coordinates may lie beside a bound.
        value = problem.fun(problem.first)
        better = jnp.zeros_like(values, bool).at[0].set(value < values[0])
        params = jax.vmap(optax.tree.where, (0, None, 0))(better, problem.first, params)
        values = jnp.where(better, value, values)
        num_evaluations += 1
    best = _lowest(values)
    return MinimizeResult(
        params=_pick(params, best),
        value=values[best] * unit,
        replica_params=params,
        replica_values=values * unit,
        scale=coordinates.scale,
        history=history * unit,
        start_values=start.values * unit,
        num_evaluations=num_evaluations + 1,
        unbounded=unbounded,
    )


def _lowest(values: jax.Array) -> jax.Array:
    """Where the lowest value is along axis 0; NaN never wins."""
    return jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values), axis=0)


def _pick(tree: PyTree, index: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: x[index], tree)


def _falls(fun: Function, coordinates: Coordinates, z: PyTree) -> jax.Array:
    """Whether a point is far from the starts, and the function lower twice as far."""

    def unboxed(low: jax.Array, high: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.where(jnp.isfinite(low) & jnp.isfinite(high), 0.0, z)

    distance = jax.tree.map(unboxed, *coordinates.bounds, z)
    value, further = fun(z), fun(optax.tree.add(z, distance))
    far = optax.tree.norm(distance, ord="inf") > _FAR
    falls = further < value - 1e-5 * jnp.abs(value)
    return (far & falls) | (value == -jnp.inf)


def _progress_bar(total: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True needs tqdm: pip install 'pranam-optax[fit]'"
        ) from error
    return tqdm(total=total, unit="step")
