"""The transformation `pranam`: replica gradients, projected onto an embedding."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from pranam_optax._embedding import (
    Embedding,
    mlp_embedding,
    projection_loss,
    squared_slope,
)
from pranam_optax._replicas import as_key
from pranam_optax._sharding import check_shardings, keep_shardings
from pranam_optax._tree import (
    PyTree,
    broadcast_to_leaf,
    cast,
    check_replicas,
    check_update,
    compute_dtype,
    deviations_from,
    in_range,
    leaf_dtype,
    mask_replicas,
    positive,
    reciprocal,
    replica_mean,
    replica_norms,
    scale,
    scaled_replica_norms,
    sum_of_squares,
    times,
    zero_counts,
)

Coupling = float | jax.Array | np.ndarray | Callable[[jax.Array], jax.Array]


class PranamState(NamedTuple):
    """State of `pranam`.

    Attributes:
      count: number of updates so far.
      embedding: the embedding with its parameters: `embedding()` is :math:`f(\\phi)`,
        `embedding.args[0]` is :math:`\\phi`.
      projection: state of the `projection_optimizer`.
      nonfinite: `[R]`, in how many updates each replica was left out because its
        gradient or weights were not finite.
      revived: `[R]`, how often `revive_replicas` has restarted each replica.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count
    embedding: Partial
    projection: optax.OptState
    nonfinite: jax.Array
    revived: jax.Array


def pranam(
    embedding: Embedding | None = None,
    *,
    coupling: Coupling = 1.0,
    step_size: float | jax.Array = 4.0,
    normalize_updates: bool = True,
    projection_optimizer: optax.GradientTransformation | None = None,
    projection_steps: int = 1,
    projection_every: int = 1,
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

    A replica with a NaN or an infinity in its gradient or weights, or with weights
    whose squares overflow, is left out of every norm and of the projection, and its
    update is zero; the others go on as if it were not there. Weights whose squares
    underflow (below 1e-19 in single precision) count as zero: choose other units.

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
      projection_optimizer: takes the step on :math:`\ell` instead of the line search:
        any Optax optimizer (its state is kept from update to update).
      projection_steps: number of steps on :math:`\ell` per update.
      projection_every: k, for slow networks: only every k-th update projects (steps 2
        to 4). In the others the replicas are pulled to the embedding as it is, with
        norms taken over each replica alone, so that replicas on several devices have
        nothing to communicate.
      key: seed or PRNG key of the embedding's random initialisation.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs `params`. Under
      `optax.inject_hyperparams`, `coupling` and `step_size` can be injected; name
      `static_args=("projection_steps", "projection_every", "key")`.

    Raises:
      ValueError: from the factory, for arguments out of range; from `init` and
        `update`, at trace time, for a leaf without replica axis, leaves that disagree
        on R, params and updates of different structure or shapes, missing params, a
        tree without leaves, or a coupling of a length other than R.
      TypeError: from `init` and `update`, for integer or complex leaves.

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
    _check_coupling(coupling)
    if not isinstance(step_size, jax.core.Tracer) and not (
        np.ndim(step_size) == 0 and 0 <= float(step_size) < np.inf
    ):
        raise ValueError(f"step_size must be a number >= 0, got {step_size!r}")
    for name, number in (
        ("projection_steps", projection_steps),
        ("projection_every", projection_every),
    ):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a positive int, got {number!r}")
    if embedding is None:
        embedding = mlp_embedding()
    if projection_optimizer is None:
        solver = None
    else:
        solver = optax.with_extra_args_support(projection_optimizer)

    def init_fn(params: PyTree) -> PranamState:
        check_replicas(params, "params")
        phi = embedding.init(as_key(key), params)
        return PranamState(
            count=jnp.zeros([], jnp.int32),
            embedding=Partial(embedding.apply, phi),
            projection=optax.EmptyState() if solver is None else solver.init(phi),
            nonfinite=zero_counts(params),
            revived=zero_counts(params),
        )

    def step(*args: Any) -> tuple[PyTree, PranamState]:
        return _step(
            *args, normalize_updates, solver, projection_steps, projection_every
        )

    def update_fn(
        updates: PyTree, state: PranamState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PranamState]:
        del extra_args
        check_update("pranam", updates, params, state.nonfinite)
        check_shardings(updates, params)
        c = coupling(state.count) if callable(coupling) else coupling
        return keep_shardings(step, updates, state, params, c, step_size)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# Compiled also where the caller does not, and once for all transformations alike.
@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _step(
    updates: PyTree,
    state: PranamState,
    params: PyTree,
    coupling: float | jax.Array | np.ndarray,
    step_size: float | jax.Array,
    normalize_updates: bool,
    solver: optax.GradientTransformationExtraArgs | None,
    projection_steps: int,
    projection_every: int,
) -> tuple[PyTree, PranamState]:
    """The update; see `pranam` for its equations."""
    (num_replicas,) = state.nonfinite.shape
    f, phi = state.embedding.func, state.embedding.args[0]
    dtype = compute_dtype(*jax.tree.leaves((updates, params)))

    gradient_norms = scaled_replica_norms(updates, dtype)
    weight_norms = replica_norms(params, dtype)
    finite = jnp.isfinite(gradient_norms) & in_range(weight_norms)
    gradients = mask_replicas(finite, cast(updates))
    weights = mask_replicas(finite, cast(params))
    size = sum(x.size for x in jax.tree.leaves(params)) // num_replicas

    def root_mean(norms: jax.Array) -> jax.Array:
        largest = positive(jnp.max(norms, where=finite, initial=0.0))
        total = jnp.sum(jnp.square(norms / largest), where=finite)
        count = jnp.maximum(jnp.sum(finite), 1).astype(dtype) * size
        return largest * jnp.sqrt(total / count)

    def pull(phi: PyTree) -> PyTree:
        return mask_replicas(finite, jax.tree.map(jnp.subtract, weights, f(phi)))

    def rms_of_pull(rms: Callable[[jax.Array], jax.Array], phi: PyTree) -> jax.Array:
        pull_rms = rms(replica_norms(pull(phi), dtype))
        # A pull that is nothing but rounding is no pull.
        return jnp.where(pull_rms > _rounding(rms(weight_norms)), pull_rms, 0.0)

    def project(phi: PyTree, projection: optax.OptState) -> tuple[Any, ...]:
        # 1. G^ = G / rms(G)
        gradient_rms, weight_rms = root_mean(gradient_norms), root_mean(weight_norms)
        normalized = scale(reciprocal(gradient_rms), gradients)

        # 2. T = W - s * sigma * G^
        mean = replica_mean(cast(params), finite)
        deviations = deviations_from(mean, weights, finite)
        spread = root_mean(replica_norms(deviations, dtype))
        target = projection_target(weights, normalized, spread, weight_rms, step_size)

        # 3. l(phi) = 1/2 ||f(phi) - T||^2
        def loss(phi: PyTree) -> jax.Array:
            return projection_loss(f, phi, target, finite)

        # 4. phi' = phi - alpha grad l(phi), or a step of the projection optimizer
        phi, projection = jax.lax.fori_loop(
            0,
            projection_steps,
            lambda _, carry: _descend(solver, f, loss, finite, *carry),
            (phi, projection),
            unroll=projection_steps == 1,
        )
        # All replicas have one unit.
        units = jnp.stack([gradient_rms, rms_of_pull(root_mean, phi)])
        return phi, projection, jnp.broadcast_to(units[:, None], (2, num_replicas))

    def stay(phi: PyTree, projection: optax.OptState) -> tuple[Any, ...]:
        # Each replica has its own unit, so that there is nothing to communicate.
        def rms(norms: jax.Array) -> jax.Array:
            return jnp.where(finite, norms, 0.0) / jnp.sqrt(jnp.asarray(size, dtype))

        units = jnp.stack([rms(gradient_norms), rms_of_pull(rms, phi)])
        return phi, projection, units

    if projection_every == 1:
        phi, projection, units = project(phi, state.projection)
    else:
        meet = state.count % projection_every == 0
        phi, projection, units = jax.lax.cond(
            meet, project, stay, phi, state.projection
        )
    gradient_rms, pull_rms = units

    # 5. P = W - f(phi')
    pulled = pull(phi)

    # 6. U = c P / rms(P) + (1 - c) G^
    c = each_coupling(coupling, num_replicas, dtype)
    unit = 1.0 if normalize_updates else gradient_rms
    per_pull = c * unit * reciprocal(pull_rms)
    per_gradient = (1 - c) * reciprocal(gradient_rms) if normalize_updates else 1 - c

    def mix(original: jax.Array, p: jax.Array, g: jax.Array) -> jax.Array:
        update = times(per_pull, p) + times(per_gradient, g)
        dtype = leaf_dtype(original)
        if dtype != update.dtype:
            limit = float(jnp.finfo(dtype).max)  # float16 ends at 65504
            update = jnp.clip(update, -limit, limit).astype(dtype)
        if not normalize_updates:  # c = 0: bit for bit, signed zeros too
            independent = broadcast_to_leaf(c == 0, original)
            update = jnp.where(independent, original, update)
        return update

    mixed = mask_replicas(finite, jax.tree.map(mix, updates, pulled, gradients))
    return mixed, PranamState(
        count=optax.safe_increment(state.count),
        embedding=Partial(f, phi),
        projection=projection,
        nonfinite=state.nonfinite + (~finite).astype(jnp.int32),
        revived=state.revived,
    )


def projection_target(
    weights: PyTree,
    normalized: PyTree,
    spread: jax.Array,
    weight_rms: jax.Array,
    step_size: float | jax.Array,
) -> PyTree:
    """T = W - s * sigma * G^; for equal replicas sigma is the RMS of the weights."""
    identical = spread <= _rounding(weight_rms)
    sigma = jnp.where(identical, positive(weight_rms), spread)
    distance = jnp.asarray(step_size, spread.dtype) * sigma
    return jax.tree.map(jnp.subtract, weights, scale(distance, normalized))


def _rounding(weight_rms: jax.Array) -> jax.Array:
    """The RMS up to which differences of weights may be nothing but rounding."""
    return 8 * jnp.finfo(weight_rms.dtype).eps * weight_rms


def _descend(
    solver: optax.GradientTransformationExtraArgs | None,
    f: Callable[[PyTree], PyTree],
    loss: Callable[[PyTree], jax.Array],
    finite: jax.Array,
    phi: PyTree,
    projection: optax.OptState,
) -> tuple[PyTree, optax.OptState]:
    """One step on the projection loss."""
    value, gradient = jax.value_and_grad(loss)(phi)
    if solver is None:
        steps = _line_search(lambda d: squared_slope(f, phi, d, finite), gradient)
    else:
        steps, projection = solver.update(
            gradient, projection, phi, value=value, grad=gradient, value_fn=loss
        )
    return optax.apply_updates(phi, steps), projection


def _line_search(
    squared_slope: Callable[[PyTree], jax.Array], gradient: PyTree
) -> PyTree:
    """-alpha grad l, with alpha = ||grad l||^2 / ||J grad l||^2."""
    leaves = jax.tree.leaves(gradient)
    dtype = compute_dtype(*leaves)
    # Along the unit vector d = grad l / ||grad l||, where squares stay in range:
    # alpha grad l = ||grad l|| / ||J d||^2 d.
    largest = [jnp.max(jnp.abs(x), initial=0.0).astype(dtype) for x in leaves]
    unit = positive(jnp.max(jnp.stack(largest)))
    norm = unit * jnp.sqrt(sum_of_squares(scale(1 / unit, gradient)))
    direction = scale(reciprocal(norm), gradient)
    length = norm * reciprocal(squared_slope(direction))
    # Where even that overflows, better no step than one that ends at infinity.
    valid = jnp.isfinite(norm) & jnp.isfinite(length)
    return jax.tree.map(lambda d: jnp.where(valid, times(-length, d), 0.0), direction)


def _check_coupling(coupling: Coupling) -> None:
    if callable(coupling) or isinstance(coupling, jax.core.Tracer):
        return
    values = np.asarray(coupling)
    if values.ndim > 1 or not np.all((values >= 0) & (values <= 1)):
        raise ValueError(
            "coupling must be a number in [0, 1], an array of one such number per "
            f"replica, or a schedule of either; got {coupling!r}"
        )


def each_coupling(
    coupling: float | jax.Array | np.ndarray, num_replicas: int, dtype: jnp.dtype
) -> jax.Array:
    """The coupling of each replica."""
    values = jnp.asarray(coupling, dtype)
    if values.shape not in ((), (num_replicas,)):
        raise ValueError(
            f"coupling has shape {values.shape}, expected a scalar or one value per "
            f"replica, ({num_replicas},)"
        )
    return jnp.broadcast_to(jnp.clip(values, 0.0, 1.0), (num_replicas,))
