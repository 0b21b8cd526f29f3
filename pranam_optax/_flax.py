"""Embeddings whose trunk is a Flax module."""

import dataclasses
from typing import Any, Literal

import jax

from pranam_optax._embedding import (
    Activation,
    Embedding,
    lecun_normal,
    make_embedding,
)
from pranam_optax._tree import PyTree


@dataclasses.dataclass(frozen=True)
class _Linen:
    """A Linen module, compared by value even where its attributes have no hash."""

    module: Any

    def __hash__(self) -> int:
        return hash(type(self.module))


class _LinenInit(_Linen):
    """Draws the parameters of a `_LinenTrunk`."""

    def __call__(self, key: jax.Array, table: jax.Array) -> PyTree:
        return self.module.init(key, table).get("params", {})


class _LinenTrunk(_Linen):
    """The module as a trunk: `[R, K]` to `[R, H]`."""

    def __call__(self, params: PyTree, table: jax.Array) -> jax.Array:
        # Statistics and the like belong to one call: mutable, and dropped after it.
        features, _ = self.module.apply({"params": params}, table, mutable=True)
        if features.ndim != 2 or features.shape[0] != table.shape[0]:
            raise ValueError(
                f"the module made features of shape {features.shape} from the table of "
                f"shape {table.shape}; expected ({table.shape[0]}, H): one row per "
                "replica"
            )
        return features


def flax_embedding(
    module: Any,
    *,
    width: int = 4,
    output_activation: Activation | None = None,
    use_bias: bool = True,
    kernel_init: jax.nn.initializers.Initializer | None = None,
    warmup: Literal["fit", "rescale", "adapter", "none"] = "fit",
) -> Embedding:
    r"""The embedding with a Flax module between table and heads.

    With a table :math:`Z` of one code per replica and a module g, whose parameters are
    part of :math:`\phi`, replica r's weights are

    .. math:: f(\phi)_r = o(g(Z)_r B + \beta)

    where table, heads :math:`B`, bias :math:`\beta` and output activation o are those
    of `mlp_embedding`. The module sees all codes at once, so replicas may attend to
    each other, or be normalised over. Then a replica that is left out of the projection
    still lends its (finite) code to the others.

    For experiments: of the modules measured in docs/notebook.md none was better than
    the linear `mlp_embedding()`, and all were much worse on Schwefel's function.

    Args:
      module: a Linen module that maps `[R, K]` to `[R, H]` without randomness. Wrap an
        NNX module in `flax.nnx.bridge.to_linen`. Only its collection `params` is kept
        and trained; others start anew with each call, so a batch norm needs
        `use_running_average=False`.
      width: K, the width of the table.
      output_activation: activation of the output; None for a linear output.
      use_bias: whether the output has a bias.
      kernel_init: draws the heads, of shape `[in, out]`. Default: `lecun_normal()`.
      warmup: how the embedding is brought to the initial replicas, see
        `mlp_embedding`; `"fit"` takes 200 L-BFGS steps.

    Returns:
      An `Embedding`. Its parameters are those of `mlp_embedding`; `phi.trunk` holds the
      module's.

    Raises:
      ValueError: if `width` is not positive or `warmup` is unknown; from `init` and
        `apply`, if the features are not one row per replica.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, pranam_optax
      >>> module = nn.Sequential([nn.Dense(8), nn.LayerNorm(), nn.tanh])
      >>> embedding = pranam_optax.flax_embedding(module, width=2)
      >>> params = {"w": jnp.arange(12.0).reshape(4, 3)}
      >>> phi = embedding.init(jax.random.key(0), params)
      >>> phi.table.shape, phi.heads["w"].shape
      ((4, 2), (8, 3))
      >>> bool(jnp.allclose(embedding.apply(phi)["w"], params["w"], atol=0.1))
      True
    """
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be a positive int, got {width!r}")
    return make_embedding(
        _LinenTrunk(module),
        _LinenInit(module),
        width=width,
        output_activation=output_activation,
        use_bias=use_bias,
        kernel_init=lecun_normal if kernel_init is None else kernel_init,
        warmup=warmup,
    )
