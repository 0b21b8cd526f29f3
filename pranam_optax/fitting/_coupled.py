"""The coupled phase of a search: replicas from random starts, tied by `pranam`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from pranam_optax._pranam import Coupling, pranam
from pranam_optax._tree import PyTree, is_traced, largest_magnitudes, scale
from pranam_optax.fitting._coordinates import (
    Bounds,
    Coordinates,
    make_coordinates,
    working_dtype,
)
from pranam_optax.fitting._polish import Function, Polished, refine_some
from pranam_optax.fitting._trace import standard_promotion, trace

# Random starts tried per replica, to replace those where the function is not finite.
TRIES = 4
# The lowest and the highest rate of a replica, in scales of the coordinates.
_RATES = 0.01, 0.3
# In scales from the starts: where a function that still falls has no minimum.
_FAR = 100.0


class Problem(NamedTuple):
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


class Release(NamedTuple):
    """The default coupling: linear to zero, over the first 60 % of the steps.

    Attributes:
      slowest: where that of the slowest replica begins. That of the fastest begins at
        one, and the others are between.
    """

    slowest: float = 1.0

    def schedule(self, num_replicas: int, num_steps: int) -> Partial:
        end = max(int(0.6 * num_steps), 1)
        if self.slowest == 1.0:  # one number for all replicas
            return Partial(_release, end=end, begin=1.0)
        begin = self.slowest + (1 - self.slowest) * _places(num_replicas)
        return Partial(_release, end=end, begin=jnp.asarray(begin, working_dtype()))


class Method(NamedTuple):
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


class Start(NamedTuple):
    """The starts tried, and coordinates of the replicas that begin at some of them."""

    coordinates: Coordinates
    params: PyTree
    values: jax.Array
    z: PyTree


class Carry(NamedTuple):
    """The replicas in their coordinates, and the lowest point each has seen.

    Their params are carried along, as otherwise XLA computes them anew for each of the
    data.
    """

    z: PyTree
    params: PyTree
    states: tuple[optax.OptState, optax.OptState]
    best_z: PyTree
    best_values: jax.Array


def make_method(
    params: PyTree,
    key: jax.Array,
    num_replicas: int,
    num_steps: int,
    optimizer: optax.GradientTransformation | None,
    coupling: Coupling | Release,
) -> Method:
    """The method of a run of so many steps for models like `params`."""
    if isinstance(coupling, Release):
        schedule = coupling.schedule(num_replicas, num_steps)
    elif callable(coupling):
        schedule = trace(coupling, jnp.zeros([], jnp.int32))
    else:
        pranam(coupling=coupling)  # checks it
        schedule = Partial(_constant, value=jnp.asarray(coupling))
    if optimizer is None:
        optimizer = _adam(num_replicas, num_steps)
    tx = optax.with_extra_args_support(optimizer)
    dtype = working_dtype()
    z = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((num_replicas, *x.shape), dtype), params
    )
    values = jax.ShapeDtypeStruct((num_replicas,), dtype)
    with standard_promotion():
        init = trace(tx.init, z)
        update = trace(
            lambda g, state, z, values: tx.update(g, state, z, values=values),
            *(z, jax.eval_shape(init, z), z, values),
        )
    return Method(key, schedule, init, update)


def _constant(count: jax.Array, value: jax.Array) -> jax.Array:
    del count
    return value


def _release(count: jax.Array, end: jax.Array, begin: jax.Array) -> jax.Array:
    return begin * jnp.maximum(0.0, 1 - count / end)


def _places(num_replicas: int) -> np.ndarray:
    """Between zero and one: the slowest replica is the first."""
    return (np.arange(num_replicas) + 0.5) / num_replicas


def _adam(num_replicas: int, num_steps: int) -> optax.GradientTransformation:
    """Adam with another rate for each replica."""
    low, high = _RATES
    rates = jnp.asarray(low * (high / low) ** _places(num_replicas), working_dtype())
    return optax.chain(
        optax.scale_by_adam(),
        optax.stateless(lambda updates, _: scale(rates, updates)),
        optax.scale_by_learning_rate(
            optax.cosine_decay_schedule(1.0, float(num_steps))
        ),
    )


def begin(
    fun: Partial, draw: Partial, first: PyTree | None, bounds: Bounds, keys: jax.Array
) -> Start:
    """Draws the starts, and replaces those where the function is not finite."""
    params = jax.vmap(draw)(keys)
    if first is not None:
        params = jax.tree.map(lambda x, y: x.at[0].set(y), params, first)
    coordinates = make_coordinates(params, bounds)
    z = jax.vmap(coordinates.from_params)(params)
    values = jax.vmap(within(fun, coordinates))(z)
    finite_first = jnp.argsort(~jnp.isfinite(values), stable=True)
    z = pick(z, finite_first[: len(keys) // TRIES])
    return Start(coordinates, params, values, z)


def begin_at(method: Method, coordinates: Coordinates, z: PyTree) -> Carry:
    params = jax.vmap(coordinates.to_params)(z)
    values = jnp.full(len(jax.tree.leaves(z)[0]), jnp.inf, working_dtype())
    return Carry(z, params, (method.link().init(z), method.init(z)), z, values)


def spread_out(problem: Problem, z: PyTree) -> PyTree:
    """The replicas on all devices of this process, in equal parts.

    Not where somebody has placed data on a device, which JAX does not mix with others.
    And no least squares on several devices of one CPU: batches of factorizations there
    wait for threads that wait for them (jaxlib 0.10).
    """
    devices = jax.local_devices()
    if problem.residuals is not None and devices[0].platform == "cpu":
        return z
    leaves = jax.tree.leaves((problem, z))
    placed = any(is_traced(x) or getattr(x, "committed", False) for x in leaves)
    if placed or len(devices) == 1 or len(jax.tree.leaves(z)[0]) % len(devices):
        return z
    mesh = jax.sharding.Mesh(np.array(devices), ("replica",))
    spec = jax.sharding.PartitionSpec("replica")
    return jax.device_put(z, jax.sharding.NamedSharding(mesh, spec))


def advance(
    fun: Partial,
    method: Method,
    coordinates: Coordinates,
    carry: Carry,
    history: jax.Array,
    num_steps: jax.Array | int,
) -> tuple[Carry, jax.Array]:
    """The coupled phase for so many steps.

    Returns:
      The replicas, and `history`, `[steps, R]`, with the values before each step in its
      first rows.
    """
    link = method.link()
    to_params = jax.vmap(coordinates.to_params)
    grad_fn = jax.vmap(jax.value_and_grad(fun))

    def step(i: jax.Array, now: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
        carry, history = now
        values, grads = grad_fn(carry.params)
        (grads,) = jax.vjp(to_params, carry.z)[1](grads)
        lower = values < carry.best_values
        best_z = jax.vmap(optax.tree.where)(lower, carry.z, carry.best_z)
        best_values = jnp.where(lower, values, carry.best_values)
        # Each replica counts the same, however steep its part of the landscape.
        updates, coupled = link.update(_unit_gradients(grads), carry.states[0], carry.z)
        updates, state = method.update(updates, carry.states[1], carry.z, values)
        z = optax.apply_updates(carry.z, updates)
        carry = Carry(z, to_params(z), (coupled, state), best_z, best_values)
        return carry, history.at[i].set(values)

    return jax.lax.fori_loop(0, num_steps, step, (carry, history))


def _unit_gradients(grads: PyTree) -> PyTree:
    largest = largest_magnitudes(grads)
    return scale(jnp.where(largest == 0, 1.0, 1 / largest), grads)


def within(fun: Function, coordinates: Coordinates) -> Function:
    """The function of a model's coordinates."""
    return lambda z: fun(coordinates.to_params(z))


def add_axis(tree: PyTree) -> PyTree:
    """One model as stacked models, of one replica."""
    return jax.tree.map(lambda x: x[None], tree)


def refine(
    problem: Problem,
    coordinates: Coordinates,
    polish: Partial,
    found: tuple[Polished, jax.Array],
    some: jax.Array,
) -> tuple[Polished, jax.Array]:
    """Stacked coordinates and their values, some of them refined."""
    fun = within(problem.fun, coordinates)
    residuals = problem.residuals and within(problem.residuals, coordinates)
    return refine_some(polish, fun, residuals, found, some)


def lowest_index(values: jax.Array) -> jax.Array:
    """Where the lowest value is along axis 0; NaN never wins."""
    return jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values), axis=0)


def pick(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda x: x[index], tree)


def falls(fun: Function, coordinates: Coordinates, z: PyTree) -> jax.Array:
    """Whether a point is far from the starts, and the function lower still further."""

    def unboxed(low: jax.Array, high: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.where(jnp.isfinite(low) & jnp.isfinite(high), 0.0, z)

    distance = jax.tree.map(unboxed, *coordinates.bounds, z)
    value, further = fun(z), fun(optax.tree.add_scale(z, 2**-6, distance))
    far = optax.tree.norm(distance, ord="inf") > _FAR
    # Not a number where it has fallen to the edge of what floats can hold.
    rises = further >= value - 1e-5 * jnp.abs(value)
    return (far & ~rises) | (value == -jnp.inf)
