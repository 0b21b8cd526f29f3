"""The methods and the base optimizers of the study."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pranam_optax
from pranam_optax import Embedding, mlp_embedding


class Optimizer(NamedTuple):
    """A base optimizer.

    Attributes:
      make: makes it out of the learning rate.
      proportional: whether its steps are in proportion to the gradients.
    """

    make: Callable[[optax.ScalarOrSchedule], Any]
    proportional: bool = False


OPTIMIZERS = {
    "Adam": Optimizer(optax.adam),
    "SGD": Optimizer(optax.sgd, proportional=True),
    "Adagrad": Optimizer(optax.adagrad),
    "RMSProp": Optimizer(optax.rmsprop),
    "momentum": Optimizer(partial(optax.sgd, momentum=0.9), proportional=True),
    "Nesterov": Optimizer(
        partial(optax.sgd, momentum=0.9, nesterov=True), proportional=True
    ),
    "Adadelta": Optimizer(optax.adadelta),
    "AdamW": Optimizer(optax.adamw),
    "NAdam": Optimizer(optax.nadam),
    "AMSGrad": Optimizer(optax.amsgrad),
    "AdaMax": Optimizer(optax.adamax),
}


def in_weights(params: Any, grads: Any) -> tuple[Any, Any]:
    """How far the replicas are from their mean, and their gradients."""
    away = jax.tree.map(lambda x: x - x.mean(axis=0, keepdims=True), params)
    return away, grads


def in_embedding(params: Any, grads: Any) -> tuple[Any, Any]:
    """The parameters of the default embedding, and the gradient by them."""
    embedding = mlp_embedding()
    phi = embedding.init(jax.random.key(0), params)
    return phi, jax.vjp(embedding.apply, phi)[1](grads)[0]


class Method(NamedTuple):
    """A way to use a base optimizer.

    Attributes:
      make: makes the whole optimizer out of the base optimizer and the numbers of
        steps and of replicas.
      normalised: whether the base optimizer is given gradients of RMS 1.
      acts_on: what the base optimizer moves, and its gradient, from the params and
        gradients of the replicas.
    """

    make: Callable[[Any, int, int], Any]
    normalised: bool = True
    acts_on: Callable[[Any, Any], tuple[Any, Any]] = in_weights


def rms(tree: Any) -> jax.Array:
    return optax.tree.norm(tree) / optax.tree.size(tree) ** 0.5


def rate_unit(
    method: Method, optimizer: Optimizer, params: Any, grads: Any
) -> jax.Array:
    """Unit of the learning rate, so that one grid serves all methods and problems.

    The size of what the optimizer acts on, over that of the first gradient where the
    optimizer's step is in proportion to it.
    """
    moved, gradient = method.acts_on(params, grads)
    proportional = optimizer.proportional and not method.normalised
    return rms(moved) / (rms(gradient) if proportional else 1.0)


def normalize() -> optax.GradientTransformation:
    """As `pranam(coupling=0)`, without the embedding that this does not use."""
    return optax.stateless(
        lambda updates, _: optax.tree.scale(1 / (rms(updates) + 1e-30), updates)
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

    def product(table: jax.Array, heads: Any) -> Any:
        return jax.tree.map(lambda h: jnp.einsum("rk,rk...->r...", table, h), heads)

    def apply(phi: Any) -> Any:
        table, heads, bias = phi
        return jax.tree.map(jnp.add, product(table, heads), bias)

    return Embedding(init, apply)


# The one default, for functions and models alike; see docs/notebook.md.
RELEASE = 0.6
STEP_SIZE = 4.0


def coupled(
    embedding: Embedding | None = None,
    step_size: float = STEP_SIZE,
    release: float = RELEASE,
    free: float = 0.0,
) -> Method:
    """`pranam`; its coupling falls linearly to 0 over a part `release` of the run.

    The first `free` of the replicas, as a part of them, are never coupled.
    """

    def make(inner: Any, num_steps: int, num_replicas: int) -> Any:
        schedule = optax.linear_schedule(1.0, 0.0, int(release * num_steps))
        is_coupled = np.arange(num_replicas) >= free * num_replicas
        link = pranam_optax.pranam(
            embedding,
            coupling=(lambda count: schedule(count) * is_coupled) if free else schedule,
            step_size=step_size,
        )
        return optax.chain(link, inner)

    return Method(make)


# Parts of the run after which the worse half is moved to the better one.
RESAMPLING = (0.6, 0.7, 0.8)


def resampled(
    method: Method, times: Sequence[float] = RESAMPLING, **options: Any
) -> Method:
    """A method with `resample_replicas` at these parts of the run."""

    def make(inner: Any, num_steps: int, num_replicas: int) -> Any:
        tx = optax.with_extra_args_support(method.make(inner, num_steps, num_replicas))
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
                return optax.tree.sub(moved, params), rest

            updates, rest = jax.lax.cond(
                jnp.any(count == steps), resample, lambda *same: same, updates, rest
            )
            return updates, (count + 1, rest)

        return optax.GradientTransformationExtraArgs(init, update)

    return method._replace(make=make)


NORMALISED = Method(lambda inner, *_: optax.chain(normalize(), inner))
MAIN_METHODS = {
    "independent": Method(lambda inner, *_: inner, normalised=False),
    "normalised": NORMALISED,
    "pranam": coupled(),
    "reparametrize": Method(
        lambda inner, *_: pranam_optax.reparametrize(inner),
        normalised=False,
        acts_on=in_embedding,
    ),
    "to the mean": coupled(mlp_embedding(())),
    "no sharing": coupled(unshared_embedding()),
}
METHODS = {
    **MAIN_METHODS,
    # Other settings of `pranam`, and ideas, for docs/notebook.md.
    "quarter free": coupled(free=0.25),
    "resampled": resampled(coupled()),
    "resampled once": resampled(coupled(), (0.6,)),
    "resampled 7 times": resampled(coupled(), (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)),
    "resampled, pull 0.5": resampled(coupled(), pull=0.5),
    "resampled, a quarter": resampled(coupled(), part=0.25),
    "normalised, resampled": resampled(NORMALISED),
    "to the mean, resampled": resampled(coupled(mlp_embedding(()))),
    "quarter free, resampled": resampled(coupled(free=0.25)),
    "s1 r0.3, resampled": resampled(coupled(step_size=1, release=0.3)),
    **{
        f"s{s:g} r{r:g}": coupled(step_size=s, release=r)
        for s, r in ((1, 0.3), (2, 0.3), (2, 0.6), (4, 0.3), (6, 1))
    },
}
