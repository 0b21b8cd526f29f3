"""The transformation `pranam`: replica gradients, projected onto an embedding."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pranam_optax._embedding import (
    Embedding,
    Factors,
    check_embedding,
    check_update,
    multiply,
)
from pranam_optax._replicas import alive, as_key, zero_counts
from pranam_optax._sharding import auto_axes
from pranam_optax._tree import (
    PyTree,
    away_from,
    broadcast_to_leaf,
    cast,
    check_replicas,
    combine,
    compute_dtype,
    divide,
    gram,
    inner,
    is_traced,
    largest_entry,
    leaf_dtype,
    mask_replicas,
    positive,
    reciprocal,
    replica_mean,
    rms,
    scale,
    subtract,
    sum_of_squares,
    times,
)

Coupling = float | jax.Array | np.ndarray | Callable[[jax.Array], jax.Array]


class PranamState(NamedTuple):
    """State of `pranam`.

    Attributes:
      count: number of updates so far.
      phi: the embedding's parameters; its output is `embedding.apply(phi)`.
      nonfinite: `[R]`, in how many updates each replica was left out.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count
    phi: PyTree
    nonfinite: jax.Array


def pranam(
    embedding: Embedding | None = None,
    *,
    coupling: Coupling = 1.0,
    step_size: float | jax.Array = 4.0,
    normalize_updates: bool = True,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Projects the gradients of R replicas onto a shared embedding.

    A link for `optax.chain`, before any optimizer. It takes the gradients :math:`G` of
    R replicas of a model, stacked along axis 0 of every leaf, and their stacked params
    :math:`W`, and returns updates that look like gradients. With the embedding
    :math:`f(\phi)`, whose parameters are in the state,

    .. math::
      \hat G &= G / \mathrm{rms}(G) \\
      T &= W - s \, \sigma \, \hat G \\
      \ell(\phi) &= \tfrac12 \| f(\phi) - T \|^2 \\
      \phi' &= \phi - \alpha \nabla \ell(\phi), \quad
        \alpha = \|\nabla \ell\|^2 / \|J_f \nabla \ell\|^2 \\
      P &= W - f(\phi') \\
      U &= c \, P / \mathrm{rms}(P) + (1 - c) \, \hat G

    where :math:`\sigma` is the spread of the replicas (RMS distance from their mean;
    the RMS of the weights where they are identical), :math:`\alpha` is the exact line
    search on the linearised embedding, and every norm is taken over the whole tree.

    A replica is left out of every norm and of the projection, and its update is zero,
    while its gradient, its weights or its coupling are not finite, or its weights are
    too large to be squared. The other replicas are unaffected. Weights whose squares
    underflow (below 1e-19 in single precision) count as zero: choose other units.

    The update can be differentiated, also with respect to the coupling and the step
    size. Checks of values, here and elsewhere in the package, do not run on arrays that
    are traced by `jit`, `vmap` or `grad`; checks of shapes and dtypes always do.

    Args:
      embedding: the embedding; default `mlp_embedding()`, linear with 4 codes per
        replica.
      coupling: c in [0, 1]: 0 leaves the replicas independent, 1 moves them by the
        embedding alone. A scalar, one value per replica (`[R]`), or a schedule of
        either, whose values are clipped to [0, 1]. The default never releases the
        replicas: for results give a schedule from 1 to 0, such as
        `optax.linear_schedule(1.0, 0.0, int(0.6 * num_steps))`.
      step_size: s, how far the target lies from the replicas, in units of their
        spread (for a gradient of RMS 1): 4 for functions and for models trained on
        all their data, 1 for networks in mini-batches.
      normalize_updates: if True the updates have RMS about 1 and do not depend on
        the scale of the loss; if False U is multiplied by rms(G), and c = 0 returns
        the gradients unchanged.
      key: seed or PRNG key of the embedding's random initialisation. A linear embedding
        is fitted to the replicas, so that the key hardly matters to it.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs `params`. Under
      `optax.inject_hyperparams`, `coupling` and `step_size` can be injected; name
      `static_args=("normalize_updates", "key")`.

    Raises:
      ValueError, TypeError: from the factory, for arguments out of range or of another
        kind; from `init` and `update`, at trace time, for leaves that are not real
        floats with a replica axis, and for updates, params and state that do not fit
        each other. The message names the leaf, its shape and what was expected.

    Examples:
      >>> import jax, optax, pranam_optax
      >>> from pranam_optax import problems
      >>> problem = problems.randomize(problems.ackley(10), key=0)
      >>> params = pranam_optax.replicate(problem.init, key=1, num_replicas=32)
      >>> grad_fn = pranam_optax.replica_value_and_grad(problem.fun)
      >>> def train(tx, params, num_steps=400):
      ...     @jax.jit
      ...     def step(params, state):
      ...         values, grads = grad_fn(params)
      ...         updates, state = tx.update(grads, state, params)
      ...         return optax.apply_updates(params, updates), state, values
      ...     state = tx.init(params)
      ...     for _ in range(num_steps):
      ...         params, state, values = step(params, state)
      ...     return values
      >>> adam = optax.adam(optax.cosine_decay_schedule(1.0, 400))
      >>> train(adam, params).mean() > 15  # stuck in local minima
      Array(True, dtype=bool)
      >>> pranam = pranam_optax.pranam(coupling=optax.linear_schedule(1.0, 0.0, 400))
      >>> train(optax.chain(pranam, adam), params).mean() < 0.01  # the deepest is 0
      Array(True, dtype=bool)

    References:
      S. Korablyov et al., `Pranam <https://github.com/SKorablyov/Pranam>`_, 2019:
      replica gradients projected onto an embedding by an L2 loss.
    """
    embedding = check_embedding(embedding, "coupling")
    check_fraction(coupling, "coupling")
    _check_step_size(step_size)

    @auto_axes
    def init(params: PyTree) -> PranamState:
        check_replicas(params, "params")
        phi = embedding.init(as_key(key), params)
        return PranamState(jnp.zeros([], jnp.int32), phi, zero_counts(params))

    step = auto_axes(
        partial(_step, embedding=embedding, normalize_updates=normalize_updates)
    )

    def update_fn(
        updates: PyTree, state: PranamState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PranamState]:
        del extra_args
        check_update(updates, state, PranamState, params, embedding.apply)
        c = coupling(state.count) if callable(coupling) else coupling
        return step(updates, state, params, c, step_size)

    return optax.GradientTransformationExtraArgs(init, update_fn)


def _step(
    updates: PyTree,
    state: PranamState,
    params: PyTree,
    coupling: Any,
    s: Any,
    *,
    embedding: Embedding,
    normalize_updates: bool,
) -> tuple[PyTree, PranamState]:
    """One update: U and the next state."""
    # Who is not alive becomes rows of zeros; no square of G over its unit overflows.
    c, s = each_replica(coupling, "coupling", updates), jnp.asarray(s, float)
    living = alive(params, updates) & jnp.isfinite(c) & jnp.isfinite(s)
    unit = largest_entry(updates, living)
    w, g = cast(params, like=updates), cast(updates, like=params)
    weights, gradients = mask_replicas(living, w), mask_replicas(living, g)
    # `rms` masks by itself: on CPUs no mask, or factor for all, fuses with a sum.
    gradient_rms = rms(scale(jnp.where(living, 1 / unit, 0.0), g), living)
    weight_rms = rms(w, living)
    dtype, rounding = weight_rms.dtype, 8 * jnp.finfo(weight_rms.dtype).eps
    c = jnp.where(living, jnp.clip(c, 0.0, 1.0), 0.0).astype(dtype)

    # 1. G^ = G / rms(G)
    normalized = scale(reciprocal(gradient_rms), divide(gradients, unit))

    # 2. T = W - s sigma G^; differences that rounding explains are none
    spread = rms(away_from(replica_mean(weights, living), w), living)
    identical = spread <= rounding * weight_rms
    sigma = jnp.where(identical, positive(weight_rms), spread)
    target = subtract(weights, scale(s.astype(dtype) * sigma, normalized))

    # 3. l(phi) = 1/2 ||f(phi) - T||^2
    # 4. phi' = phi - alpha grad l(phi)
    phi = projection_step(embedding, state.phi, target, living)

    # 5. P = W - f(phi')
    pull = mask_replicas(living, subtract(weights, embedding.apply(phi)))
    pull_rms = rms(pull, living)
    pull_rms = jnp.where(pull_rms > rounding * weight_rms, pull_rms, 0.0)

    # 6. U = c P / rms(P) + (1 - c) G^, times rms(G) if it is not normalised
    size = 1.0 if normalize_updates else gradient_rms * unit.astype(dtype)
    of_pull, of_gradient = size * c * reciprocal(pull_rms), size * (1 - c)

    def mix(original: jax.Array, p: jax.Array, g: jax.Array) -> jax.Array:
        update = times(of_pull, p) + times(of_gradient, g)
        if normalize_updates and leaf_dtype(original) == update.dtype:
            return update  # which cannot overflow
        limit = float(jnp.finfo(leaf_dtype(original)).max)
        update = jnp.clip(update, -limit, limit).astype(leaf_dtype(original))
        # Without coupling, and not normalised, the gradient itself, bit for bit.
        free = living & (c == 0) & (not normalize_updates)
        return jnp.where(broadcast_to_leaf(free, original), original, update)

    return jax.tree.map(mix, updates, pull, normalized), PranamState(
        count=optax.safe_increment(state.count),
        phi=phi,
        nonfinite=state.nonfinite + (~living).astype(jnp.int32),
    )


@jax.named_scope("projection_step")
def projection_step(
    embedding: Embedding, phi: PyTree, target: PyTree, living: jax.Array
) -> PyTree:
    r"""phi' = phi - alpha grad l(phi), with l(phi) = 1/2 ||f(phi) - T||^2.

    The line search is exact on the linearised embedding:
    :math:`\alpha = \|\nabla \ell\|^2 / \|J_f \nabla \ell\|^2`.
    """
    if embedding.factors is None:

        def loss(phi: PyTree) -> jax.Array:
            residual = mask_replicas(living, subtract(embedding.apply(phi), target))
            return 0.5 * sum_of_squares(residual)

        gradient = jax.grad(loss)(phi)
    else:
        gradient = _factored_gradient(embedding.factors, phi, target, living)
    # Along d = grad l / max|grad l|, since the squares of grad l itself may overflow.
    unit = largest_entry(gradient)
    d = divide(gradient, unit)
    slope = _squared_slope(embedding, phi, d, living)
    length = unit * sum_of_squares(d) * reciprocal(slope)
    # Where even that overflows, better no step than one that ends at infinity.
    length = jnp.where(jnp.isfinite(length), length, 0.0)
    return jax.tree.map(lambda x, d: x - times(length, d), phi, d)


def _factored_gradient(
    factors: Callable[[PyTree], Factors], phi: PyTree, target: PyTree, living: jax.Array
) -> PyTree:
    """grad l of f(phi) = A B + beta, without the residual E = f(phi) - T in memory.

    From B B^T and T B^T for the features, E B^T, and from products with A^T for the
    heads and the bias, A^T E and 1^T E. T is seen from beta, so that nothing cancels.
    """
    (a, b, bias), pull_back = jax.vjp(factors, phi)
    a = left = mask_replicas(living, a)
    if bias is not None:
        target = away_from(bias, target)
        left = jnp.concatenate([a, living[:, None].astype(a.dtype)], axis=1)
    products = inner(a, gram(b)) - inner(target, b).astype(a.dtype)
    rows = subtract(multiply(inner(left.T, a.T), b), combine(left, target))
    return pull_back(
        (
            mask_replicas(living, products),
            jax.tree.map(lambda x: x[: a.shape[1]], rows),
            bias if bias is None else jax.tree.map(lambda x: x[-1], rows),
        )
    )[0]


def _squared_slope(
    embedding: Embedding, phi: PyTree, d: PyTree, living: jax.Array
) -> jax.Array:
    """||J_f d||^2 over the living replicas."""
    if embedding.factors is None:
        slope = jax.jvp(embedding.apply, (phi,), (d,))[1]
        return sum_of_squares(mask_replicas(living, slope))
    # J d = dA B + A dB + 1 dbeta: its norm comes from products of their rows.
    (a, b, bias), (da, db, dbias) = jax.jvp(embedding.factors, (phi,), (d,))
    terms = [(da, b), (a, db)]
    if bias is not None:
        terms.append((jnp.ones_like(a[:, :1]), jax.tree.map(lambda x: x[None], dbias)))
    terms = [(mask_replicas(living, left), right) for left, right in terms]
    # Those of two different terms occur twice.
    pairs = itertools.combinations_with_replacement(enumerate(terms), 2)
    products = [
        (1 + (i != j)) * jnp.sum(inner(x.T, y.T) * inner(u, v).astype(x.dtype))
        for (i, (x, u)), (j, (y, v)) in pairs
    ]
    return jnp.sum(jnp.stack(products))


def each_replica(value: Any, name: str, tree: PyTree) -> jax.Array:
    """A number, or one number for each replica of the tree, as `[R]`."""
    leaves = jax.tree.leaves(tree)
    num_replicas, value = len(leaves[0]), jnp.asarray(value)
    if value.shape not in ((), (num_replicas,)):
        raise ValueError(
            f"{name} has shape {value.shape}, expected a scalar or one value per "
            f"replica, ({num_replicas},)"
        )
    return jnp.broadcast_to(value.astype(compute_dtype(*leaves)), (num_replicas,))


def check_fraction(value: Any, name: str) -> None:
    """Checks what is known of a coupling or strength before it is traced."""
    if callable(value) or is_traced(value):
        return
    numbers = _numbers(value)
    if numbers.ndim > 1 or not np.all((numbers >= 0) & (numbers <= 1)):
        raise ValueError(
            f"{name} must be a number in [0, 1], an array of one such number per "
            f"replica, or a schedule of either; got {value!r}"
        )


def _check_step_size(value: Any) -> None:
    if is_traced(value):
        return
    numbers = _numbers(value)
    if numbers.ndim or not 0 <= numbers < np.inf:
        raise ValueError(f"step_size must be a number >= 0, got {value!r}")


def _numbers(value: Any) -> np.ndarray:
    """The value as an array, of NaN where it does not consist of real numbers."""
    values = np.asarray(value)
    return values if values.dtype.kind in "biuf" else np.array(np.nan)
