"""`minimize`: starts, the coupled phase and the polish in one call."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial, all_leaves

from pranam_optax import _polish
from pranam_optax._coordinates import (
    Bounds,
    Coordinates,
    check_params,
    check_within,
    draw_around,
    make_coordinates,
    parse_bounds,
)
from pranam_optax._pranam import Coupling, pranam
from pranam_optax._replicas import (
    as_key,
    best_replica,
    replica_value_and_grad,
    replicate,
)
from pranam_optax._result import MinimizeResult
from pranam_optax._tree import (
    PyTree,
    broadcast_to_leaf,
    largest_magnitudes,
    scale,
)

# Random starts tried per replica, to replace those where the function is not finite.
_TRIES = 4
# Chunks that the coupled phase is cut into for callbacks and the progress bar.
_NUM_CHUNKS = 20


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


class Method(NamedTuple):
    """What is compiled into a run; see `minimize`."""

    num_replicas: int
    num_steps: int
    optimizer: optax.GradientTransformation | None
    polish: str | None
    polish_steps: int


class _Objective(NamedTuple):
    """What is minimised, and where: functions of params in pytrees of their data."""

    fun: Partial
    residuals: Partial | None
    coupling: Partial | None
    draw: Partial
    first: PyTree | None
    bounds: Bounds


class _Start(NamedTuple):
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
    state: optax.OptState
    best_z: PyTree
    best_values: jax.Array


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
    polish: Literal["lbfgs"] | None = "lbfgs",
    polish_steps: int = 200,
    callback: Callback | None = None,
    progress: bool = False,
) -> MinimizeResult:
    r"""Searches for the global minimum of a function of any pytree.

    R replicas start at random, in coordinates :math:`z` without bounds and with one
    scale, :math:`x = x(z)` (a sine between two finite bounds). In the coupled phase

    .. math::
      g_r = \nabla_z f(x(z_r)), \quad \hat g_r = g_r / \max |g_r|, \quad
      z \mathrel{+}= \mathrm{optimizer}(\mathrm{pranam}_c(\hat g))

    with couplings :math:`c_r = (1 - t / 0.6 T)_+ \, r / (R - 1)`: a ladder from
    independent explorers to full consensus, released over the first 60 % of the T
    steps. Then L-BFGS refines each replica from the lowest point that it has seen and
    from its start, and the lower of the two is kept.

    The whole run is one compiled program, cut into 20 chunks for a callback or the
    progress bar. It compiles once for the same `fun` and shapes: for a function of
    data, pass `jax.tree_util.Partial(fun, data=data)`. It may be called under
    `jax.jit` and `jax.vmap`.

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
        coordinates of scale 1. Default: Adam with a cosine decay from 0.03.
      coupling: of `pranam`, in place of the ladder: 0.0 for independent replicas, a
        schedule or one value per replica.
      bounds: a pair `(low, high)` for each leaf of the params, of numbers or arrays
        that broadcast to the leaf; either side may be infinite.
      polish: `"lbfgs"`, or None for no refinement.
      polish_steps: most steps of the refinement.
      callback: called with a `Progress` after every chunk; what is true ends the
        coupled phase.
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
    check_choice(polish, ("lbfgs", None), "polish")
    method = make_method(num_replicas, num_steps, optimizer, polish, polish_steps)
    return search(
        as_partial(fun), None, init, key, method, coupling, bounds, callback, progress
    )


def as_partial(fun: Callable[..., Any]) -> Partial:
    """The function as a pytree: the data of a Partial may change or be traced."""
    return fun if isinstance(fun, Partial) else Partial(fun)


def check_choice(value: Any, choices: tuple[Any, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def make_method(
    num_replicas: int,
    num_steps: int,
    optimizer: optax.GradientTransformation | None,
    polish: str | None,
    polish_steps: int,
) -> Method:
    numbers = {
        "num_replicas": num_replicas,
        "num_steps": num_steps,
        "polish_steps": polish_steps,
    }
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    return Method(num_replicas, num_steps, optimizer, polish, polish_steps)


def search(
    fun: Partial,
    residuals: Partial | None,
    init: PyTree | Callable[[jax.Array], PyTree] | None,
    key: int | jax.Array,
    method: Method,
    coupling: Coupling | None,
    bounds: PyTree | None,
    callback: Callback | None,
    progress: bool,
) -> MinimizeResult:
    """Checks the arguments, then runs at once or in chunks."""
    objective = _make_objective(fun, residuals, init, coupling, bounds, as_key(key))
    key = as_key(key)
    if callback is None and not progress:
        result, start = _run(objective, key, method)
        _check_start(start, objective)
        return result

    start = jax.jit(_begin, static_argnums=2)(objective, key, method)
    if isinstance(start.values, jax.core.Tracer):
        raise ValueError(
            "callback and progress cannot be used under jax.jit or jax.vmap: they run "
            "between compiled programs"
        )
    _check_start(start, objective)
    carry = _start_carry(objective, start, key, method)
    history = []
    length = -(-method.num_steps // _NUM_CHUNKS)
    with _progress_bar(method.num_steps, progress) as bar:
        for step in range(0, method.num_steps, length):
            carry, values = _advance(
                objective,
                start,
                carry,
                key,
                method,
                min(length, method.num_steps - step),
            )
            history.append(values)
            done = step + len(values)
            bar.update(len(values))
            bar.set_postfix(value=f"{float(jnp.nanmin(carry.best_values)):.6g}")
            if callback is not None and callback(
                Progress(
                    done,
                    method.num_steps,
                    jax.vmap(start.coordinates.to_params)(carry.best_z),
                    carry.best_values,
                )
            ):
                break
    return _finish(objective, start, carry, jnp.concatenate(history), method)


def _make_objective(
    fun: Partial,
    residuals: Partial | None,
    init: PyTree | Callable[[jax.Array], PyTree] | None,
    coupling: Coupling | None,
    bounds: PyTree | None,
    key: jax.Array,
) -> _Objective:
    first = None
    if callable(init) and (isinstance(init, Partial) or all_leaves([init])):
        draw = as_partial(init)
        shapes = jax.eval_shape(draw, key)
        check_params(shapes, "init(key)")
        box = parse_bounds(bounds, shapes)
    elif init is not None:
        check_params(init, "init")
        first = jax.tree.map(jnp.asarray, init)
        box = parse_bounds(bounds, first)
        check_within(first, box, "init")
        draw = Partial(draw_around, start=first, bounds=box)
        shapes = first
    else:
        box = parse_bounds(bounds, None)
        draw = Partial(draw_around, start=box.low, bounds=box)
        shapes = box.low
    value = jax.eval_shape(fun, shapes)
    if not isinstance(value, jax.ShapeDtypeStruct) or value.shape:
        described = jax.tree.map(lambda x: x.shape, value)
        raise ValueError(
            f"fun must return a scalar, but it returns shape {described}; for a vector "
            "of residuals see fit"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"fun must return a real float, but it returns {value.dtype}")
    schedule = None
    if callable(coupling):
        schedule = as_partial(coupling)
    elif coupling is not None:
        pranam(coupling=coupling)  # checks it
        schedule = Partial(_constant, value=jnp.asarray(coupling))
    return _Objective(fun, residuals, schedule, draw, first, box)


def _constant(count: jax.Array, value: jax.Array) -> jax.Array:
    del count
    return value


def _begin(objective: _Objective, key: jax.Array, method: Method) -> _Start:
    """Draws the starts, and replaces those where the function is not finite."""
    start_key, _ = jax.random.split(key)
    params = replicate(objective.draw, start_key, _TRIES * method.num_replicas)
    if objective.first is not None:
        params = jax.tree.map(
            lambda x, first: x.at[0].set(first.astype(x.dtype)), params, objective.first
        )
    coordinates = make_coordinates(params, objective.bounds)
    z = jax.vmap(coordinates.from_params)(params)
    values = jax.vmap(lambda z: objective.fun(coordinates.to_params(z)))(z)
    order = jnp.argsort(~jnp.isfinite(values), stable=True)[: method.num_replicas]
    return _Start(coordinates, params, values, jax.tree.map(lambda x: x[order], z))


def _check_start(start: _Start, objective: _Objective) -> None:
    """Raises for starts that cannot be used, unless they are traced."""
    if isinstance(start.values, jax.core.Tracer):
        return
    check_within(start.params, objective.bounds, "init(key)")
    values = np.asarray(start.values)
    if not np.isfinite(values).any():
        example = jax.tree.map(lambda x: np.asarray(x[0]).tolist(), start.params)
        raise ValueError(
            f"fun is not finite at any of the {len(values)} random starts: it is "
            f"{values[0]} at {example}, for example. Narrow the bounds, or pass an "
            "init where it is finite."
        )


def _in_coordinates(fun: Partial, coordinates: Coordinates) -> Callable[[PyTree], Any]:
    return lambda z: fun(coordinates.to_params(z))


def _transformation(
    objective: _Objective, key: jax.Array, method: Method
) -> optax.GradientTransformationExtraArgs:
    coupling = objective.coupling
    if coupling is None:
        rungs = jnp.linspace(0.0, 1.0, method.num_replicas)
        release = optax.linear_schedule(1.0, 0.0, max(int(0.6 * method.num_steps), 1))
        coupling = Partial(lambda count: release(count) * rungs)
    optimizer = method.optimizer
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(0.03, method.num_steps))
    _, embedding_key = jax.random.split(key)
    link = pranam(coupling=coupling, key=embedding_key)
    return optax.chain(link, optimizer)


@functools.partial(jax.jit, static_argnums=3)
def _start_carry(
    objective: _Objective, start: _Start, key: jax.Array, method: Method
) -> _Carry:
    state = _transformation(objective, key, method).init(start.z)
    values = jnp.full(method.num_replicas, jnp.inf, start.values.dtype)
    params = jax.vmap(start.coordinates.to_params)(start.z)
    return _Carry(start.z, params, state, start.z, values)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _advance(
    objective: _Objective,
    start: _Start,
    carry: _Carry,
    key: jax.Array,
    method: Method,
    length: int,
) -> tuple[_Carry, jax.Array]:
    """`length` steps of the coupled phase, and the values before each."""
    tx = _transformation(objective, key, method)
    grad_fn = replica_value_and_grad(objective.fun)
    to_params = jax.vmap(start.coordinates.to_params)

    def step(carry: _Carry, _: None) -> tuple[_Carry, jax.Array]:
        values, grads = grad_fn(carry.params)
        (grads,) = jax.vjp(to_params, carry.z)[1](grads)
        lower = values < carry.best_values
        best_z = _where(lower, carry.z, carry.best_z)
        best_values = jnp.where(lower, values, carry.best_values)
        # Each replica counts the same, however steep its part of the landscape.
        updates, state = tx.update(
            _unit_gradients(grads), carry.state, carry.z, values=values
        )
        z = optax.apply_updates(carry.z, updates)
        return _Carry(z, to_params(z), state, best_z, best_values), values

    return jax.lax.scan(step, carry, None, length)


def _unit_gradients(grads: PyTree) -> PyTree:
    largest = largest_magnitudes(grads)
    return scale(jnp.where(largest == 0, 1.0, 1 / largest), grads)


def _where(choose: jax.Array, this: PyTree, that: PyTree) -> PyTree:
    """This or that, replica by replica."""
    return jax.tree.map(
        lambda x, y: jnp.where(broadcast_to_leaf(choose, x), x, y), this, that
    )


@functools.partial(jax.jit, static_argnums=4)
def _finish(
    objective: _Objective,
    start: _Start,
    carry: _Carry,
    history: jax.Array,
    method: Method,
) -> MinimizeResult:
    """Polishes, and gathers what was found."""
    coordinates, num_replicas = start.coordinates, method.num_replicas
    fun = _in_coordinates(objective.fun, coordinates)
    num_evaluations = jnp.asarray(len(start.values) + history.size, jnp.int32)

    candidates = jax.tree.map(
        lambda *x: jnp.concatenate(x), carry.z, carry.best_z, start.z
    )
    if method.polish is not None:
        ends = jax.tree.map(lambda x: x[num_replicas:], candidates)
        if method.polish == "lm":
            assert objective.residuals is not None
            residuals = _in_coordinates(objective.residuals, coordinates)
            polished = _polish.levenberg_marquardt(residuals, ends, method.polish_steps)
        else:
            polished = _polish.lbfgs(fun, ends, method.polish_steps)
        num_evaluations += jnp.sum(polished.num_evaluations)
        candidates = jax.tree.map(
            lambda x, y: jnp.concatenate([x, y]), candidates, polished.params
        )
    values = jax.vmap(fun)(candidates)
    num_evaluations += len(values)

    # Of its candidates, each replica keeps the lowest.
    by_replica = values.reshape(-1, num_replicas)
    lowest = jnp.argsort(by_replica, axis=0)[0]  # NaN sorts last
    index = lowest * num_replicas + jnp.arange(num_replicas)
    params = jax.vmap(coordinates.to_params)(
        jax.tree.map(lambda x: x[index], candidates)
    )
    values = values[index]
    return MinimizeResult(
        params=best_replica(params, values),
        value=jnp.sort(values)[0],
        replica_params=params,
        replica_values=values,
        scale=coordinates.scale,
        history=history,
        start_values=start.values,
        num_evaluations=num_evaluations,
    )


@functools.partial(jax.jit, static_argnums=2)
def _run(
    objective: _Objective, key: jax.Array, method: Method
) -> tuple[MinimizeResult, _Start]:
    start = _begin(objective, key, method)
    carry = _start_carry(objective, start, key, method)
    carry, history = _advance(objective, start, carry, key, method, method.num_steps)
    return _finish(objective, start, carry, history, method), start


def _progress_bar(total: int, enabled: bool) -> Any:
    if not enabled:
        return _NoBar()
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True needs tqdm: pip install 'pranam-optax[fit]'"
        ) from error
    return tqdm(total=total, unit="step")


class _NoBar:
    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def update(self, n: int) -> None: ...

    def set_postfix(self, **values: str) -> None: ...
