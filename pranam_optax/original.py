"""What only the original TensorFlow program needs: see docs/original.md.

`pranam_optax.reparametrize` is its algorithm; here are the activations of the output
and the warm-ups of its embedding.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pranam_optax._embedding import (
    Activation,
    Dense,
    Embedding,
    Initializer,
    MLPParams,
    check_features,
    draw,
    fit_by_descent,
    make_factors,
    multiply,
)
from pranam_optax._replicas import alive
from pranam_optax._sharding import auto_axes
from pranam_optax._tree import PyTree, mask_replicas, replica_mean, rms, total

Warmup = Literal["fit", "rescale", "adapter", "none"]


class OriginalParams(NamedTuple):
    """Parameters of `mlp_embedding` of this module.

    Attributes:
      table: `[R, K]`, one code per replica.
      trunk: the dense layers between table and heads.
      heads: like one model's params with a leading axis of length H.
      bias: like one model's params, or None.
      scale: factor of the output: a constant scalar (`warmup="rescale"`), or learned
        and like one model's params (`warmup="adapter"`), else None.
      shift: like one model's params, added to the scaled output
        (`warmup="adapter"`), else None.
    """

    table: jax.Array
    trunk: tuple[Dense, ...]
    heads: PyTree
    bias: PyTree | None
    scale: PyTree | None
    shift: PyTree | None


def mlp_embedding(
    features: Sequence[int] = (4,),
    *,
    activation: Activation | Sequence[Activation] = jax.nn.relu,
    output_activation: Activation | None = None,
    use_bias: bool = True,
    kernel_init: Initializer | None = None,
    warmup: Warmup = "fit",
) -> Embedding:
    r"""The embedding of the original program, `FCEmbedder`.

    That of `pranam_optax.mlp_embedding`, with an activation o of the output and with
    scale a and shift b behind it:

    .. math:: f(\phi)_r = a \, o(h_d B + \beta) + b

    Args:
      features: as in `pranam_optax.mlp_embedding`.
      activation: as in `pranam_optax.mlp_embedding`.
      output_activation: o, such as `jnp.tanh` or `jax.nn.soft_sign`; None for a linear
        output.
      use_bias: as in `pranam_optax.mlp_embedding`.
      kernel_init: as in `pranam_optax.mlp_embedding`.
      warmup: how the embedding is brought to the initial replicas.

        - `"fit"`: by 200 L-BFGS steps on the L2 projection loss.
        - `"rescale"`: a is a constant number, so that the variance of the random output
          over all replicas and weights equals theirs.
        - `"adapter"`: a and b are learned, one of each per weight, and start where each
          weight's mean and variance over the replicas equal theirs.
        - `"none"`: the random output is left as drawn.

    Returns:
      An `Embedding`. Its parameters are `OriginalParams`, in at least float32.

    Raises:
      ValueError: as `pranam_optax.mlp_embedding`, or if `warmup` is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from pranam_optax import original
      >>> params = {"w": jnp.arange(12.0).reshape(4, 3)}
      >>> embedding = original.mlp_embedding(
      ...     (4, 8), output_activation=jnp.tanh, warmup="rescale")
      >>> phi = embedding.init(jax.random.key(0), params)
      >>> output = embedding.apply(phi)["w"]
      >>> bool(jnp.allclose(output.std(), params["w"].std(), rtol=1e-5))
      True

    References:
      The `TensorFlow program <https://github.com/SKorablyov/Pranam>`_, 2019. Its
      adapter is a full matrix over all weights of a model; this one is its diagonal.
    """
    if warmup not in ("fit", "rescale", "adapter", "none"):
        raise ValueError(
            f"warmup must be 'fit', 'rescale', 'adapter' or 'none', got {warmup!r}"
        )
    widths, activations = check_features(features, activation)
    factors = make_factors(activations)

    @auto_axes
    def apply(phi: OriginalParams) -> PyTree:
        output = multiply(*factors(MLPParams(*phi[:4])))
        if output_activation is not None:
            output = jax.tree.map(output_activation, output)
        if phi.shift is not None:
            return jax.tree.map(
                lambda x, a, b: x * a[None] + b[None], output, phi.scale, phi.shift
            )
        if phi.scale is not None:
            constant = jax.lax.stop_gradient(phi.scale)
            return jax.tree.map(lambda x: x * constant.astype(x.dtype), output)
        return output

    @auto_axes
    def init(key: jax.Array, params: PyTree) -> OriginalParams:
        drawn = draw(key, params, widths, use_bias, kernel_init)
        phi = OriginalParams(*drawn, scale=None, shift=None)
        if not jax.tree.leaves(params):  # Optax's placeholder for params
            return phi
        living = alive(params)
        weights = mask_replicas(living, params)
        if warmup == "fit":
            phi = fit_by_descent(apply, phi, weights, living)
        elif warmup != "none":
            output = mask_replicas(living, apply(phi))
            match = _rescale if warmup == "rescale" else _adapt
            scale, shift = match(weights, output, living)
            phi = phi._replace(scale=scale, shift=shift)
        return phi._replace(table=mask_replicas(living, phi.table))

    return Embedding(init, apply)


def _moments(tree: PyTree, living: jax.Array) -> tuple[PyTree, PyTree]:
    """Mean and variance of each weight over the living replicas."""
    mean = replica_mean(tree, living)
    squares = jax.tree.map(lambda x, m: jnp.square(x - m[None]), tree, mean)
    return mean, replica_mean(mask_replicas(living, squares), living)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """sqrt(numerator / denominator), or 1 where either is zero."""
    valid = (numerator > 0) & (denominator > 0)
    return jnp.sqrt(
        jnp.where(valid, numerator, 1.0) / jnp.where(valid, denominator, 1.0)
    )


def _rescale(
    weights: PyTree, output: PyTree, living: jax.Array
) -> tuple[jax.Array, None]:
    """The factor that brings the variance of the output to that of the weights."""

    def variance(tree: PyTree) -> jax.Array:
        """Over all weights of all living replicas."""
        mean = replica_mean(tree, living)
        size = sum(x.size for x in jax.tree.leaves(mean))
        average = total(mean, jnp.sum) / size
        centred = jax.tree.map(lambda x: x - average.astype(x.dtype), tree)
        return jnp.square(rms(mask_replicas(living, centred), living))

    return _ratio(variance(weights), variance(output)), None


def _adapt(weights: PyTree, output: PyTree, living: jax.Array) -> tuple[PyTree, PyTree]:
    """Scale and shift that bring the output's moments to those of the weights."""
    mean, variance = _moments(weights, living)
    output_mean, output_variance = _moments(output, living)
    scale = jax.tree.map(_ratio, variance, output_variance)
    shift = jax.tree.map(lambda m, a, o: m - a * o, mean, scale, output_mean)
    return scale, shift
