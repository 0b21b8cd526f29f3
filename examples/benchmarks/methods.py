"""The methods and the base optimizers of the study."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pranam_optax
from pranam_optax import Embedding


class LookaheadState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count
    slow: Any
    inner: Any


def lookahead(
    inner: optax.GradientTransformation, period: int = 6, pace: float = 0.5
) -> optax.GradientTransformation:
    """As `optax.lookahead`, but for plain params, so that it may follow any link.

    References:
      M. Zhang, J. Lucas, G. Hinton, J. Ba, `Lookahead optimizer: k steps forward, 1
      step back <https://arxiv.org/abs/1907.08610>`_, 2019.
    """

    def init(params: Any) -> LookaheadState:
        slow = jax.tree.map(jnp.copy, params)
        return LookaheadState(jnp.zeros([], jnp.int32), slow, inner.init(params))

    def update(updates: Any, state: LookaheadState, params: Any = None) -> Any:
        updates, inner_state = inner.update(updates, state.inner, params)
        fast = optax.apply_updates(params, updates)
        sync = (state.count + 1) % period == 0

        def pick(slow: jax.Array, fast: jax.Array) -> jax.Array:
            return jnp.where(sync, slow + pace * (fast - slow), slow)

        slow = jax.tree.map(pick, state.slow, fast)
        updates = jax.tree.map(
            lambda s, f, p: jnp.where(sync, s, f) - p, slow, fast, params
        )
        return updates, LookaheadState(
            optax.safe_increment(state.count), slow, inner_state
        )

    return optax.GradientTransformation(init, update)


OPTIMIZERS: dict[str, Callable[[optax.ScalarOrSchedule], Any]] = {
    "Adam": optax.adam,
    "SGD": optax.sgd,
    "Adagrad": optax.adagrad,
    "RMSProp": optax.rmsprop,
    "momentum": partial(optax.sgd, momentum=0.9),
    "Nesterov": partial(optax.sgd, momentum=0.9, nesterov=True),
    "Adadelta": optax.adadelta,
    "AdamW": optax.adamw,
    "NAdam": optax.nadam,
    "AMSGrad": optax.amsgrad,
    "AdaMax": optax.adamax,
    "Lookahead(Adam)": lambda rate: lookahead(optax.adam(rate)),
}
# Their steps are in proportion to the gradients.
PROPORTIONAL = ("SGD", "momentum", "Nesterov")


def mean_embedding() -> Embedding:
    """Width 0: the bias alone, so that the pull is towards the replicas' mean."""

    def init(key: jax.Array, params: Any) -> Any:
        num_replicas = jax.tree.leaves(params)[0].shape[0]
        return jnp.zeros(num_replicas), jax.tree.map(lambda x: x.mean(axis=0), params)

    return Embedding(init, apply_mean)


def apply_mean(phi: Any) -> Any:
    replicas, bias = phi
    return jax.tree.map(
        lambda x: jnp.broadcast_to(x[None], (*replicas.shape, *x.shape)), bias
    )


def unshared_embedding(width: int = 4) -> Embedding:
    """Codes, heads and bias of its own for each replica: nothing is shared."""

    def init(key: jax.Array, params: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves) + 1)
        table = jax.random.normal(keys[0], (leaves[0].shape[0], width))
        heads = [
            jax.random.normal(k, (x.shape[0], width, *x.shape[1:])) * x.std() / width
            for k, x in zip(keys[1:], leaves, strict=True)
        ]
        phi = table, jax.tree.unflatten(treedef, heads)
        return (*phi, jax.tree.map(jnp.subtract, params, product(*phi)))

    return Embedding(init, apply_unshared)


def product(table: jax.Array, heads: Any) -> Any:
    return jax.tree.map(lambda h: jnp.einsum("rk,rk...->r...", table, h), heads)


def apply_unshared(phi: Any) -> Any:
    table, heads, bias = phi
    return jax.tree.map(jnp.add, product(table, heads), bias)


# Makes the whole optimizer out of the base optimizer and the numbers of steps and of
# replicas.
Method = Callable[[Any, int, int], Any]

# The one default, for functions and models alike; see docs/notebook.md.
RELEASE = 0.6
STEP_SIZE = 4.0


def coupled(
    embedding: Embedding | None = None,
    step_size: float = STEP_SIZE,
    release: float = RELEASE,
    free: float = 0.0,
    **options: Any,
) -> Method:
    """`pranam` with its one default: the same for all problems.

    The first `free` of the replicas, as a part of them, are never coupled. `options`
    are other arguments of `pranam`.
    """

    def make(inner: Any, num_steps: int, num_replicas: int) -> Any:
        schedule = optax.linear_schedule(1.0, 0.0, int(release * num_steps))
        is_coupled = np.arange(num_replicas) >= free * num_replicas
        link = pranam_optax.pranam(
            embedding,
            coupling=(lambda count: schedule(count) * is_coupled) if free else schedule,
            step_size=step_size,
            **options,
        )
        return optax.chain(link, inner)

    return make


# Parts of the run after which the worse half is moved to the better one.
RESAMPLING = (0.6, 0.7, 0.8)


def resampled(
    method: Method, times: Sequence[float] = RESAMPLING, **options: Any
) -> Method:
    """A method with `resample_replicas` at these parts of the run."""

    def make(inner: Any, num_steps: int, num_replicas: int) -> Any:
        tx = optax.with_extra_args_support(method(inner, num_steps, num_replicas))
        steps = jnp.array([int(time * num_steps) for time in times])

        def init(params: Any) -> Any:
            return jnp.zeros([], jnp.int32), tx.init(params)

        def update(updates: Any, state: Any, params: Any, *, values: Any) -> Any:
            count, rest = state
            updates, rest = tx.update(updates, rest, params, values=values)

            def resample(updates: Any, rest: Any) -> Any:
                moved = optax.apply_updates(params, updates)
                moved, rest = pranam_optax.resample_replicas(
                    moved, rest, values, **options
                )
                return jax.tree.map(jnp.subtract, moved, params), rest

            updates, rest = jax.lax.cond(
                jnp.any(count == steps), resample, lambda *same: same, updates, rest
            )
            return updates, (count + 1, rest)

        return optax.GradientTransformationExtraArgs(init, update)

    return make


def normalize() -> optax.GradientTransformation:
    """As `pranam(coupling=0)`, without the embedding that this does not use."""
    return optax.stateless(
        lambda updates, _: optax.tree.scale(1 / (rms(updates) + 1e-30), updates)
    )


METHODS: dict[str, Method] = {
    "independent": lambda inner, *_: inner,
    "normalised": lambda inner, *_: optax.chain(normalize(), inner),
    "pranam": coupled(),
    "reparametrize": lambda inner, *_: pranam_optax.reparametrize(inner),
    "to the mean": coupled(mean_embedding()),
    "no sharing": coupled(unshared_embedding()),
}

# Other settings of `pranam`, for docs/notebook.md and docs/devices.md.
PRESETS: dict[str, Method] = {
    "quarter free": coupled(free=0.25),
    "resampled": resampled(coupled()),
    "normalised, resampled": resampled(METHODS["normalised"]),
    "quarter free, resampled": resampled(coupled(free=0.25)),
    "s1 r0.3, resampled": resampled(coupled(step_size=1, release=0.3)),
    **{
        f"s{s:g} r{r:g}": coupled(step_size=s, release=r)
        for s, r in ((1, 0.3), (2, 0.3), (2, 0.6), (4, 0.3), (6, 1))
    },
    **{f"every {k}": coupled(projection_every=k) for k in (4, 16, 64)},
}


def rms(tree: Any) -> jax.Array:
    return optax.tree.norm(tree) / optax.tree.size(tree) ** 0.5


def rate_unit(method: str, optimizer: str, params: Any, grads: Any) -> jax.Array:
    """Unit of the learning rate, so that one grid serves all methods and problems.

    The size of what the optimizer acts on, over that of the first gradient where the
    optimizer's step is in proportion to it.
    """
    if method == "reparametrize":
        state = pranam_optax.reparametrize(optax.identity()).init(params)
        apply, phi = state.embedding.func, state.embedding.args[0]
        size, gradient = phi, jax.vjp(apply, phi)[1](grads)[0]
    else:
        size = jax.tree.map(lambda x: x - x.mean(axis=0, keepdims=True), params)
        gradient = grads
    unnormalised = method in ("independent", "reparametrize")
    proportional = optimizer in PROPORTIONAL and unnormalised
    return rms(size) / (rms(gradient) if proportional else 1.0)
