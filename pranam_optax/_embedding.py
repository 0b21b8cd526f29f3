"""Embeddings: the input-less networks that the replicas are tied to."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from pranam_optax._sharding import sharding_of, with_auto_axes
from pranam_optax._tree import (
    PyTree,
    broadcast_to_leaf,
    cast,
    check_replicas,
    compute_dtype,
    deviations_from,
    in_range,
    largest_magnitudes,
    mask_replicas,
    replica_mean,
    scale,
    sum_of_squares,
    times,
)

Activation = Callable[[jax.Array], jax.Array]

# Projection steps of a "fit" that has no closed form.
_FIT_STEPS = 200

# Up to this width, products with heads are written as sums of outer products.
_MAX_FUSED_WIDTH = 16


class Embedding(NamedTuple):
    r"""An input-less network: a pair of pure functions.

    Attributes:
      init: `init(key, params) -> phi`, the embedding's parameters for these stacked
        params, warm-started from them if it likes.
      apply: `apply(phi)`, the output :math:`f(\phi)`: a pytree like the stacked
        params. Equal embeddings should have equal (`==`) functions, since `apply` is
        part of the optimizer state's tree structure.
    """

    init: Callable[[jax.Array, PyTree], PyTree]
    apply: Callable[[PyTree], PyTree]


class Dense(NamedTuple):
    """A layer of the trunk: `kernel` is `[in, out]`, `bias` is `[out]` or None."""

    kernel: jax.Array
    bias: jax.Array | None


class MLPParams(NamedTuple):
    """Parameters of `mlp_embedding` and of `flax_embedding`.

    Attributes:
      table: `[R, K]`, one code per replica.
      trunk: what lies between table and heads: the dense layers, or the params of the
        module.
      heads: like one model's params with a leading axis of length H.
      bias: like one model's params, or None.
      scale: factor of the output: a constant scalar (`warmup="rescale"`), or learned
        and like one model's params (`warmup="adapter"`), else None.
      shift: like one model's params, added to the scaled output
        (`warmup="adapter"`), else None.
    """

    table: jax.Array
    trunk: PyTree
    heads: PyTree
    bias: PyTree | None
    scale: PyTree | None
    shift: PyTree | None


def _matmul(features: jax.Array, kernel: jax.Array) -> jax.Array:
    # The pull W - f(phi) is a small difference of large numbers, which the reduced
    # precision that accelerators use by default would drown.
    return jnp.tensordot(
        features.astype(kernel.dtype),
        kernel,
        axes=1,
        precision=jax.lax.Precision.HIGHEST,
    )


@jax.custom_vjp
def _product(features: jax.Array, heads: jax.Array) -> jax.Array:
    """`_matmul`; when narrow as a sum of outer products, fused into what reads it."""
    width = heads.shape[0]
    if width > _MAX_FUSED_WIDTH:
        return _matmul(features, heads)
    terms = [times(features[:, i], heads[i][None]) for i in range(width)]
    return functools.reduce(jnp.add, terms)


def _product_fwd(features: jax.Array, heads: jax.Array) -> tuple[jax.Array, Any]:
    return _product(features, heads), (features, heads)


def _product_bwd(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    features, heads = residuals
    to_features = _inner(cotangent, heads).astype(features.dtype)
    return to_features, _matmul(features.T, cotangent)


_product.defvjp(_product_fwd, _product_bwd)


@dataclasses.dataclass(frozen=True)
class DenseTrunk:
    """The trunk of `mlp_embedding`: `[R, K]` to `[R, H]`, by dense layers."""

    activations: tuple[Activation, ...]

    def __call__(self, layers: tuple[Dense, ...], features: jax.Array) -> jax.Array:
        for layer, activation in zip(layers, self.activations, strict=True):
            features = _matmul(features, layer.kernel)
            if layer.bias is not None:
                features = features + layer.bias[None]
            features = activation(features)
        return features


@dataclasses.dataclass(frozen=True)
class _DenseInit:
    """Draws the layers of a `DenseTrunk`; compares equal for equal arguments."""

    widths: tuple[int, ...]
    use_bias: bool
    kernel_init: jax.nn.initializers.Initializer

    def __call__(self, key: jax.Array, table: jax.Array) -> tuple[Dense, ...]:
        def dense(key: jax.Array, n_in: int, n_out: int) -> Dense:
            kernel = self.kernel_init(key, (n_in, n_out), table.dtype)
            return Dense(
                kernel, jnp.zeros(n_out, table.dtype) if self.use_bias else None
            )

        keys = jax.random.split(key, len(self.widths))
        return tuple(map(dense, keys, self.widths[:-1], self.widths[1:]))


@dataclasses.dataclass(frozen=True)
class _Network:
    """`apply` of an embedding: heads on a trunk on the table.

    Compares equal for equal trunks and activations.
    """

    trunk: Callable[[PyTree, jax.Array], jax.Array]
    output_activation: Activation | None

    @property
    def is_affine(self) -> bool:
        return self.trunk == DenseTrunk(()) and self.output_activation is None

    def is_product(self, phi: MLPParams) -> bool:
        """Whether the output is the product of the factors, and nothing follows."""
        return self.output_activation is None and phi.scale is None

    def factors(self, phi: MLPParams) -> tuple[jax.Array, PyTree]:
        """Features `[R, H]` and heads, the bias among them, to be multiplied."""
        features = self.trunk(phi.trunk, phi.table)
        if phi.bias is None:
            return features, phi.heads
        ones = jnp.ones_like(features, shape=(features.shape[0], 1))
        return jnp.concatenate([features, ones], axis=1), jax.tree.map(
            lambda x, b: jnp.concatenate([x, b[None]]), phi.heads, phi.bias
        )

    def __call__(self, phi: MLPParams) -> PyTree:
        features, heads = self.factors(phi)
        output = jax.tree.map(lambda head: _product(features, head), heads)
        if self.output_activation is not None:
            output = jax.tree.map(self.output_activation, output)
        if phi.shift is not None:
            output = jax.tree.map(
                lambda x, a, b: x * a[None] + b[None], output, phi.scale, phi.shift
            )
        elif phi.scale is not None:
            scale = jax.lax.stop_gradient(phi.scale)
            output = jax.tree.map(lambda x: x * scale.astype(x.dtype), output)
        return output


def mlp_embedding(
    features: Sequence[int] = (4,),
    *,
    activation: Activation | Sequence[Activation] = jax.nn.relu,
    output_activation: Activation | None = None,
    use_bias: bool = True,
    kernel_init: jax.nn.initializers.Initializer | None = None,
    warmup: Literal["fit", "rescale", "adapter", "none"] = "fit",
) -> Embedding:
    r"""The embedding: a multilayer perceptron whose input is the replica's index.

    With a table :math:`Z` of one code per replica, replica r's weights are

    .. math::
      h_0 = Z_r, \quad h_i = a_i(h_{i-1} A_i + b_i), \quad
      f(\phi)_r = o(h_d B + \beta)

    where the trunk :math:`A_i, b_i` is shared by all replicas and the heads
    :math:`B` and bias :math:`\beta` are pytrees like one model's params, B with a
    leading axis of length `features[-1]`. With a single feature size the trunk is
    the identity and the replicas lie on a K-dimensional plane through
    :math:`\beta`.

    Args:
      features: `features[0]` is the width K of the table, the others are the widths
        of the trunk's dense layers.
      activation: activation :math:`a_i` of the trunk's layers: one for all, or a
        sequence of one for each of the `len(features) - 1` layers.
      output_activation: activation :math:`o` of the output, such as `jnp.tanh` or
        `jax.nn.soft_sign`; None for a linear output.
      use_bias: whether trunk and output have biases.
      kernel_init: draws the kernels, of shape `[in, out]`, of trunk and heads (a leaf
        of one model's params has `out` entries). Default: `lecun_normal()`. The
        table is drawn from a standard normal.
      warmup: how the embedding is brought to the initial replicas.

        - `"fit"`: :math:`f(\phi)` is fitted to them by least squares: in closed form
          if the embedding is linear (the best fit of rank K, split evenly between
          table and heads), else by 200 L-BFGS steps on the L2 projection loss.
        - `"rescale"`: the random output is multiplied by a constant, so that its
          variance over all replicas and weights equals theirs.
        - `"adapter"`: the random output goes through a learned scale and shift per
          weight, which start where each weight's mean and variance over the
          replicas equal theirs.
        - `"none"`: the random output is left as drawn.

    Returns:
      An `Embedding`. Its parameters are `MLPParams`, in at least float32.

    Raises:
      ValueError: if `features` is empty or not positive, `activation` has another
        length than the trunk, or `warmup` is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, pranam_optax
      >>> params = {"w": jnp.arange(12.0).reshape(4, 3)}  # 4 replicas on a line
      >>> embedding = pranam_optax.mlp_embedding(features=(1,))
      >>> phi = embedding.init(jax.random.key(0), params)
      >>> phi.table.shape, phi.heads["w"].shape, phi.bias["w"].shape
      ((4, 1), (1, 3), (3,))
      >>> bool(jnp.allclose(embedding.apply(phi)["w"], params["w"], atol=1e-5))
      True

    References:
      The original `TensorFlow program <https://github.com/SKorablyov/Pranam>`_
      (2019), class `FCEmbedder`. Its adapter is a full matrix over all weights of a
      model; this one is the diagonal of it.
    """
    widths = tuple(features)
    if not widths or not all(isinstance(n, int) and n > 0 for n in widths):
        raise ValueError(
            f"features must be one or more positive ints (the table's width, then the "
            f"trunk's layers), got {features!r}"
        )
    depth = len(widths) - 1
    activations = (activation,) * depth if callable(activation) else tuple(activation)
    if len(activations) != depth:
        raise ValueError(
            f"activation has {len(activations)} entries, but features {widths} make a "
            f"trunk of {depth} layers; each needs one (see output_activation for the "
            "output's)"
        )
    kernel_init = lecun_normal if kernel_init is None else kernel_init
    return make_embedding(
        DenseTrunk(activations),
        _DenseInit(widths, use_bias, kernel_init),
        width=widths[0],
        output_activation=output_activation,
        use_bias=use_bias,
        kernel_init=kernel_init,
        warmup=warmup,
    )


lecun_normal = jax.nn.initializers.lecun_normal()


def make_embedding(
    trunk: Callable[[PyTree, jax.Array], jax.Array],
    init_trunk: Callable[[jax.Array, jax.Array], PyTree],
    *,
    width: int,
    output_activation: Activation | None,
    use_bias: bool,
    kernel_init: jax.nn.initializers.Initializer,
    warmup: str,
) -> Embedding:
    """Table, trunk and heads, warmed up.

    `init_trunk(key, table)` draws the trunk's parameters and `trunk(parameters, table)`
    makes the features, `[R, H]`. Both are hashable and compare by value, so that equal
    embeddings are compiled once.
    """
    if warmup not in ("fit", "rescale", "adapter", "none"):
        raise ValueError(
            f"warmup must be 'fit', 'rescale', 'adapter' or 'none', got {warmup!r}"
        )
    apply = _Network(trunk, output_activation)

    def init(key: jax.Array, params: PyTree) -> MLPParams:
        def draw(key: jax.Array, params: PyTree) -> MLPParams:
            return _init(
                key, params, apply, init_trunk, width, use_bias, kernel_init, warmup
            )

        return with_auto_axes(
            draw,
            lambda mesh: _shardings(mesh, draw, key, params),
            key,
            params,
        )

    return Embedding(init, apply)


def _shardings(
    mesh: Any,
    init: Callable[[jax.Array, PyTree], MLPParams],
    key: jax.Array,
    params: PyTree,
) -> MLPParams:
    """Codes lie with their replicas, and heads with the weights that they make."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    phi = jax.eval_shape(init, key, shapes)
    specs = [(*sharding_of(x, mesh).spec,) for x in jax.tree.leaves(params)]

    def place(tree: PyTree, specs: Sequence[tuple[Any, ...]]) -> PyTree:
        leaves, treedef = jax.tree.flatten(tree)
        specs = specs if leaves else []
        places = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
        return jax.tree.unflatten(treedef, places)

    model = [spec[1:] for spec in specs]
    replicated = [()] * len(jax.tree.leaves(phi.trunk))
    return MLPParams(
        table=place(phi.table, [specs[0][:1]]),
        trunk=place(phi.trunk, replicated),
        heads=place(phi.heads, [(None, *spec) for spec in model]),
        bias=place(phi.bias, model),
        scale=place(phi.scale, model if phi.shift is not None else [()]),
        shift=place(phi.shift, model),
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _init(
    key: jax.Array,
    params: PyTree,
    apply: _Network,
    init_trunk: Callable[[jax.Array, jax.Array], PyTree],
    width: int,
    use_bias: bool,
    kernel_init: jax.nn.initializers.Initializer,
    warmup: str,
) -> MLPParams:
    num_replicas = check_replicas(params, "params")
    dtype = compute_dtype(*jax.tree.leaves(params))
    table_key, trunk_key, heads_key = jax.random.split(key, 3)

    table = jax.random.normal(table_key, (num_replicas, width), dtype)
    trunk = init_trunk(trunk_key, table)
    num_features = jax.eval_shape(apply.trunk, trunk, table).shape[-1]

    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(heads_key, max(len(leaves), 1))

    def head(key: jax.Array, x: jax.Array) -> jax.Array:
        size, dtype = x.size // num_replicas, compute_dtype(x)
        if not size:  # which initializers do not expect
            return jnp.zeros((num_features, *x.shape[1:]), dtype)
        kernel = kernel_init(key, (num_features, size), dtype)
        return kernel.reshape(num_features, *x.shape[1:])

    heads = [head(k, x) for k, x in zip(keys, leaves, strict=False)]
    bias = [jnp.zeros(x.shape[1:], compute_dtype(x)) for x in leaves]
    phi = MLPParams(
        table=table,
        trunk=trunk,
        heads=jax.tree.unflatten(treedef, heads),
        bias=jax.tree.unflatten(treedef, bias) if use_bias else None,
        scale=None,
        shift=None,
    )
    if not leaves:
        return phi
    # Replicas that are not finite have no part in the warm-up and a code of zero.
    finite = in_range(largest_magnitudes(params, dtype))
    weights = mask_replicas(finite, cast(params))
    if warmup == "rescale":
        phi = _rescale(apply, phi, weights, finite)
    elif warmup == "adapter":
        phi = _adapt(apply, phi, weights, finite)
    elif warmup == "fit" and apply.is_affine:
        phi = _fit_linear(phi, weights, finite)
    elif warmup == "fit":
        phi = _fit(apply, phi, weights, finite)
    return phi._replace(table=mask_replicas(finite, phi.table))


def embedding_output(state: PyTree) -> PyTree:
    r"""The embedding's output :math:`f(\phi)` out of an optimizer state.

    Args:
      state: the state of `pranam` or `reparametrize`, or of any chain or wrapper that
        holds one.

    Returns:
      A pytree like the stacked params, in at least float32.

    Raises:
      ValueError: if the state holds no embedding, or several.

    Examples:
      >>> import jax.numpy as jnp, optax, pranam_optax
      >>> params = jnp.arange(6.0).reshape(2, 3)
      >>> tx = optax.chain(pranam_optax.pranam(), optax.adam(1e-3))
      >>> output = pranam_optax.embedding_output(tx.init(params))
      >>> bool(jnp.allclose(output, params, atol=1e-5))
      True
    """
    node = find_embedding(state)
    phi = node.embedding.args[0]

    def shardings(mesh: Any) -> PyTree:
        """Those of the params, as far as the heads tell."""
        (replica_axis,) = sharding_of(node.nonfinite, mesh).spec
        if not isinstance(phi, MLPParams):
            return NamedSharding(mesh, PartitionSpec(replica_axis))

        def place(head: jax.Array) -> NamedSharding:
            model = sharding_of(head, mesh).spec[1:]
            return NamedSharding(mesh, PartitionSpec(replica_axis, *model))

        return jax.tree.map(place, phi.heads)

    return with_auto_axes(node.embedding.func, shardings, phi)


def holds_embedding(node: Any) -> bool:
    """Whether this is the state of `pranam` or of `reparametrize`."""
    return isinstance(getattr(node, "embedding", None), jax.tree_util.Partial)


def find_embedding(state: PyTree) -> Any:
    """The one node of an optimizer state that holds an embedding."""
    leaves = jax.tree.leaves(state, is_leaf=holds_embedding)
    nodes = list(filter(holds_embedding, leaves))
    if len(nodes) != 1:
        raise ValueError(
            f"expected a state with one embedding, found {len(nodes)}; pass the "
            "state of one such transformation, or of a chain that holds one"
        )
    return nodes[0]


def projection_loss(
    apply: Callable[[PyTree], PyTree], phi: PyTree, target: PyTree, finite: jax.Array
) -> jax.Array:
    r""":math:`\frac12 \|f(\phi) - T\|^2` over the finite replicas."""
    residual = jax.tree.map(jnp.subtract, apply(phi), jax.lax.stop_gradient(target))
    return 0.5 * sum_of_squares(mask_replicas(finite, residual))


def squared_slope(
    apply: Callable[[PyTree], PyTree],
    phi: PyTree,
    direction: PyTree,
    finite: jax.Array,
) -> jax.Array:
    r""":math:`\|J_f d\|^2` over the finite replicas."""
    if isinstance(apply, _Network) and apply.is_product(phi):
        # J d = dA B + A dB with A `[R, H]` and B `[H, n]`: its norm comes from Gram
        # matrices of 2H x 2H, without forming any `[R, n]`.
        (a, b), (da, db) = jax.jvp(apply.factors, (phi,), (direction,))
        left = mask_replicas(finite, jnp.concatenate([da, a], axis=1))
        right = jax.tree.map(lambda x, dx: jnp.concatenate([x, dx]), b, db)
        return jnp.sum(gram(left.T, left.dtype) * gram(right, left.dtype))
    # The transpose of the transpose, since apply may have a custom_vjp.
    output, pull_back = jax.vjp(apply, phi)
    (slope,) = jax.linear_transpose(lambda y: pull_back(y)[0], output)(direction)
    return sum_of_squares(mask_replicas(finite, slope))


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """Inner products of the entries of axis 0 of x and y, over all other axes."""
    axes = tuple(range(1, x.ndim))
    return jnp.tensordot(x, y, (axes, axes), precision=jax.lax.Precision.HIGHEST)


def gram(tree: PyTree, dtype: jnp.dtype) -> jax.Array:
    """Inner products between the entries of axis 0, over all other axes and leaves."""
    grams = jax.tree.map(lambda x: _inner(x, x).astype(dtype), tree)
    return jax.tree.reduce(jnp.add, grams)


def _principal_directions(
    deviations: PyTree, width: int, dtype: jnp.dtype
) -> tuple[jax.Array, PyTree, jax.Array]:
    """Truncated singular value decomposition of the replicas' deviations.

    The left singular vectors come from the R x R Gram matrix, so that no leaf is
    flattened and a sharded leaf stays sharded.

    Returns:
      Left singular vectors U, `[R, K]`; U^T times the deviations, a pytree with
      leading axis K; and its norms, the singular values, `[K]`, which are exactly zero
      for directions in which the replicas do not differ beyond rounding.
    """
    leaves = jax.tree.leaves(deviations)
    num_replicas = leaves[0].shape[0]
    unit = jnp.max(largest_magnitudes(deviations, dtype))
    unit = jnp.where(unit > 0, unit, 1.0)
    products = gram(scale(1 / unit, deviations), dtype)
    vectors = jnp.linalg.eigh(products)[1][:, ::-1]  # largest first
    vectors = jnp.pad(vectors, ((0, 0), (0, max(width - num_replicas, 0))))[:, :width]
    projections = jax.tree.map(lambda x: _matmul(vectors.T, x), deviations)
    squares = [
        jnp.sum(jnp.square(x / unit.astype(x.dtype)), axis=range(1, x.ndim))
        for x in jax.tree.leaves(projections)
    ]
    norms = jnp.sqrt(sum(x.astype(dtype) for x in squares))
    rounding = 4 * num_replicas * jnp.finfo(dtype).eps * jnp.sqrt(jnp.trace(products))
    return vectors, projections, unit * jnp.where(norms > rounding, norms, 0.0)


def _fit_linear(phi: MLPParams, params: PyTree, finite: jax.Array) -> MLPParams:
    """The best affine fit of rank K, the singular values split evenly."""
    dtype = phi.table.dtype
    mean = replica_mean(params, finite)
    if phi.bias is None:
        mean = jax.tree.map(jnp.zeros_like, mean)
    deviations = deviations_from(mean, params, finite)
    vectors, projections, norms = _principal_directions(
        deviations, phi.table.shape[1], dtype
    )
    # A direction in which the replicas do not differ keeps its random codes and gets
    # zero heads: the output is the same, but it can still be learned.
    null, root = norms == 0, jnp.sqrt(jnp.where(norms == 0, 1.0, norms))
    factor = jnp.where(null, 0.0, 1.0 / root)
    return phi._replace(
        table=jnp.where(null[None], phi.table, vectors * root[None]),
        heads=jax.tree.map(
            lambda x: x * broadcast_to_leaf(factor.astype(x.dtype), x), projections
        ),
        bias=None if phi.bias is None else mean,
    )


def _fit(
    apply: _Network, phi: MLPParams, params: PyTree, finite: jax.Array
) -> MLPParams:
    """L-BFGS on the projection loss, from codes along the principal directions."""
    dtype = phi.table.dtype
    deviations = deviations_from(replica_mean(params, finite), params, finite)
    vectors, _, norms = _principal_directions(deviations, phi.table.shape[1], dtype)
    codes = vectors * jnp.sqrt(jnp.sum(finite).astype(dtype))
    phi = phi._replace(table=jnp.where(norms[None] == 0, phi.table, codes))

    # Optax finds the last value in the state by its name, which a param of the trunk
    # may have too: leaves in a list have none.
    leaves, treedef = jax.tree.flatten(phi)

    def loss(leaves: list[jax.Array]) -> jax.Array:
        phi = jax.tree.unflatten(treedef, leaves)
        return projection_loss(apply, phi, params, finite)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(_: int, carry: tuple[list[jax.Array], Any]) -> tuple[Any, Any]:
        leaves, state = carry
        value, grad = value_and_grad(leaves, state=state)
        updates, state = solver.update(
            grad, state, leaves, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(leaves, updates), state

    # Optax sums inner products of leaves of any dtype, also where promotion is strict.
    with jax.numpy_dtype_promotion("standard"):
        carry = leaves, solver.init(leaves)
        leaves, _ = jax.lax.fori_loop(0, _FIT_STEPS, step, carry)
    return jax.tree.unflatten(treedef, leaves)


def _moments(params: PyTree, finite: jax.Array) -> tuple[PyTree, PyTree]:
    """Mean and variance of each weight over the finite replicas."""
    mean = replica_mean(params, finite)
    squares = jax.tree.map(jnp.square, deviations_from(mean, params, finite))
    return mean, replica_mean(squares, finite)


def _variance(params: PyTree, finite: jax.Array) -> jax.Array:
    """Variance over all weights of all finite replicas."""
    mean, variance = _moments(params, finite)
    leaves = jax.tree.leaves(mean)
    dtype, size = compute_dtype(*leaves), sum(x.size for x in leaves)

    def average(tree: PyTree) -> jax.Array:
        return sum(jnp.sum(x).astype(dtype) for x in jax.tree.leaves(tree)) / size

    total = average(mean)
    between = jax.tree.map(lambda m: jnp.square(m - total.astype(m.dtype)), mean)
    return average(variance) + average(between)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """sqrt(numerator / denominator), or 1 where either is zero."""
    valid = (numerator > 0) & (denominator > 0)
    return jnp.sqrt(
        jnp.where(valid, numerator, 1.0) / jnp.where(valid, denominator, 1.0)
    )


def _rescale(
    apply: _Network, phi: MLPParams, params: PyTree, finite: jax.Array
) -> MLPParams:
    scale = _ratio(_variance(params, finite), _variance(apply(phi), finite))
    return phi._replace(scale=scale)


def _adapt(
    apply: _Network, phi: MLPParams, params: PyTree, finite: jax.Array
) -> MLPParams:
    mean, variance = _moments(params, finite)
    output_mean, output_variance = _moments(apply(phi), finite)
    scale = jax.tree.map(_ratio, variance, output_variance)
    shift = jax.tree.map(lambda m, a, o: m - a * o, mean, scale, output_mean)
    return phi._replace(scale=scale, shift=shift)
