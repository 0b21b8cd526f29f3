"""The embedding: an input-less network, and how it is fitted to the replicas."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pranam_optax._replicas import alive
from pranam_optax._sharding import auto_axes, check_shardings
from pranam_optax._tree import (
    PyTree,
    broadcast_to_leaf,
    check_count,
    check_replicas,
    check_same,
    combine,
    compute_dtype,
    deviations,
    divide,
    gram,
    largest_entry,
    leaves_of,
    mask_replicas,
    product,
    replica_mean,
    safe_sqrt,
    squared_norms,
    subtract,
    sum_of_squares,
    times,
)

Factors = tuple[jax.Array, PyTree, PyTree | None]
Activation = Callable[[jax.Array], jax.Array]
Initializer = jax.nn.initializers.Initializer

# L-BFGS steps that fit an embedding which is not linear.
_FIT_STEPS = 200

# Up to this width, products with heads are written as sums of outer products.
_MAX_FUSED = 16

# Above this number of replicas, principal directions come from random combinations.
_MAX_EXACT = 1024


class Embedding(NamedTuple):
    r"""An input-less network: a pair of pure functions.

    Attributes:
      init: `init(key, params) -> phi`, the embedding's parameters for these stacked
        params, warm-started from them if it likes.
      apply: `apply(phi)`, the output :math:`f(\phi)`: a pytree like the stacked
        params.
      factors: may be left out. `factors(phi)` returns features A, `[R, H]`, heads B,
        like one model's params with a leading axis of length H, and a bias like one
        model's params, or None: the output is :math:`A B + \beta`. With them the
        projection step forms no array of the replicas' size but the target.
    """

    init: Callable[[jax.Array, PyTree], PyTree]
    apply: Callable[[PyTree], PyTree]
    factors: Callable[[PyTree], Factors] | None = None


class Dense(NamedTuple):
    """A layer of the trunk: `kernel` is `[in, out]`, `bias` is `[out]` or None."""

    kernel: jax.Array
    bias: jax.Array | None


class MLPParams(NamedTuple):
    """Parameters of `mlp_embedding`.

    Attributes:
      table: `[R, K]`, one code per replica. That of the mean alone is `[R, 1]` and
        unused, since checkpoints hold no empty arrays.
      trunk: the dense layers between table and heads.
      heads: like one model's params with a leading axis of length H; None for the mean
        alone.
      bias: like one model's params, or None.
    """

    table: jax.Array
    trunk: tuple[Dense, ...]
    heads: PyTree | None
    bias: PyTree | None


def mlp_embedding(
    features: Sequence[int] = (4,),
    *,
    activation: Activation | Sequence[Activation] = jax.nn.relu,
    use_bias: bool = True,
    kernel_init: Initializer | None = None,
) -> Embedding:
    r"""The embedding: a multilayer perceptron whose input is the replica's index.

    With a table :math:`Z` of one code per replica, replica r's weights are

    .. math::
      h_0 = Z_r, \quad h_i = a_i(h_{i-1} A_i + b_i), \quad
      f(\phi)_r = h_d B + \beta

    where the trunk :math:`A_i, b_i` is shared by all replicas and the heads
    :math:`B` and bias :math:`\beta` are pytrees like one model's params, B with a
    leading axis of length `features[-1]`. With a single feature size the trunk is
    the identity and the replicas lie on a K-dimensional plane through :math:`\beta`;
    with none, or zero, the output is :math:`\beta`, the same for every replica.

    `init` fits :math:`f(\phi)` to the initial replicas by least squares: in closed form
    if the embedding is linear (the best fit of rank K, split evenly between table and
    heads), else by 200 L-BFGS steps. Replicas whose weights are not alive at that
    moment have no part in the fit; one that dies later has had its part.

    Args:
      features: `features[0]` is the width K of the table, the others are the widths
        of the trunk's dense layers. `()` and `(0,)` are the mean alone.
      activation: activation :math:`a_i` of the trunk's layers: one for all, or a
        sequence of one for each of the `len(features) - 1` layers.
      use_bias: whether trunk and output have biases.
      kernel_init: draws the kernels, of shape `[in, out]`, of trunk and heads (a leaf
        of one model's params has `out` entries). Default: `lecun_normal()`. The
        table is drawn from a standard normal. The fit of a linear embedding replaces
        both, except along directions in which the replicas do not differ.

    Returns:
      An `Embedding`. Its parameters are `MLPParams`, in at least float32.

    Raises:
      ValueError: if `features` are not positive, `activation` has another length than
        the trunk, or nothing is left of the embedding (no features and no bias).

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
      (2019), class `FCEmbedder`; see `pranam_optax.original` for its warm-ups.
    """
    widths, activations = check_features(features, activation)
    if widths == (0,) and not use_bias:
        raise ValueError("an embedding without features needs use_bias=True")
    factors = make_factors(activations)

    @auto_axes
    def apply(phi: MLPParams) -> PyTree:
        return multiply(*factors(phi))

    @auto_axes
    @jax.jit  # which takes a quarter of the time that its operations do one by one
    def init(key: jax.Array, params: PyTree) -> MLPParams:
        phi = draw(key, params, widths, use_bias, kernel_init)
        if not jax.tree.leaves(params):  # Optax's placeholder for params
            return phi
        living = alive(params)
        weights = mask_replicas(living, params)
        if activations:
            phi = fit_by_descent(apply, phi, weights, living)
        else:
            phi = _fit_linear(phi, weights, living)
        return phi._replace(table=mask_replicas(living, phi.table))

    return Embedding(init, apply, factors)


def check_embedding(embedding: Embedding | None, keyword: str) -> Embedding:
    """The embedding, or the default one for None."""
    if embedding is None:
        return _default_embedding()
    if not isinstance(embedding, Embedding):
        raise TypeError(
            f"embedding must be an Embedding, such as mlp_embedding(), got "
            f"{embedding!r}; anything else is given by keyword, such as {keyword}=..."
        )
    return embedding


@functools.cache  # since what compiles for one is of use for the next
def _default_embedding() -> Embedding:
    return mlp_embedding()


def check_update(
    updates: PyTree,
    state: Any,
    kind: type,
    params: PyTree,
    apply: Callable[[Any], PyTree],
) -> None:
    """Checks what a transformation's `update` was given; `kind` is its state's type."""
    words = re.findall("[A-Z][a-z]+", kind.__name__.removesuffix("State"))
    name = "_".join(words).lower()
    if params is None:
        raise ValueError(
            f"{name} needs the replicas' params: call tx.update(grads, state, params)"
        )
    if not check_replicas(updates, "updates"):
        raise ValueError(f"updates has no leaves; {name} needs at least one")
    check_replicas(params, "params")
    check_same(updates, params, "updates", "params")
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be the {kind.__name__} that tx.init(params) returns, got "
            f"{type(state).__name__}; the order is tx.update(grads, state, params)"
        )
    check_state(state, params)
    check_same(params, made_by(apply, state), "params", "the state's embedding")
    check_shardings(updates, params)


def check_state(state: Any, params: PyTree) -> None:
    """Checks that a state was made for as many replicas of as many weights."""
    num_replicas = check_replicas(params, "params")
    if state.nonfinite.shape != (num_replicas,):
        raise ValueError(
            f"params has {num_replicas} replicas, but the state was initialised for "
            f"{state.nonfinite.shape[0]}"
        )
    if hasattr(state.phi, "heads"):
        # The heads have a leading axis that the bias, all of the mean alone, has not.
        alone = state.phi.heads is None
        made = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (num_replicas, *x.shape[0 if alone else 1 :]), x.dtype
            ),
            state.phi.bias if alone else state.phi.heads,
        )
        leaves_of(made, params, "params")


def made_by(apply: Callable[[Any], PyTree], state: Any) -> PyTree:
    """Shapes of what the embedding in a state makes."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.phi)
    return jax.eval_shape(apply, shapes)


def is_state(node: Any) -> bool:
    """Whether this is the state of a transformation that holds an embedding."""
    return {"phi", "nonfinite"} <= set(getattr(node, "_fields", ()))


def find_state(state: PyTree) -> Any:
    """The one node of an optimizer state that holds an embedding."""
    nodes = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
    if len(nodes) != 1:
        raise ValueError(
            f"expected a state with one embedding, found {len(nodes)}; pass the "
            "state of one such transformation, or of a chain that holds one"
        )
    return nodes[0]


def check_features(
    features: Sequence[int], activation: Activation | Sequence[Activation]
) -> tuple[tuple[int, ...], tuple[Activation, ...]]:
    """Widths of table and layers, `(0,)` for none, and one activation per layer."""
    widths = tuple(features)
    if widths in ((), (0,)):
        return (0,), ()
    widths = tuple(check_count(n, f"each of features {features!r}") for n in widths)
    depth = len(widths) - 1
    activations = (activation,) * depth if callable(activation) else tuple(activation)
    if len(activations) != depth:
        raise ValueError(
            f"activation has {len(activations)} entries, but features {widths} make a "
            f"trunk of {depth} layers; each needs one"
        )
    return widths, activations


def make_factors(
    activations: tuple[Activation, ...],
) -> Callable[[MLPParams], Factors]:
    """`factors` of an embedding whose trunk has these activations."""

    def factors(phi: MLPParams) -> Factors:
        if phi.heads is None:  # the mean alone
            heads = jax.tree.map(lambda b: b[None], phi.bias)
            return jnp.ones_like(phi.table), heads, None
        features = phi.table
        for layer, activation in zip(phi.trunk, activations, strict=True):
            features = product(features, layer.kernel)
            if layer.bias is not None:
                features = features + layer.bias[None]
            features = activation(features)
        return features, phi.heads, phi.bias

    return factors


def multiply(features: jax.Array, heads: PyTree, bias: PyTree = None) -> PyTree:
    """The output whose factors these are."""
    output = jax.tree.map(lambda head: _product(features, head), heads)
    if bias is None:
        return output
    return jax.tree.map(lambda x, b: x + b[None], output, bias)


@jax.custom_jvp
def _product(features: jax.Array, head: jax.Array) -> jax.Array:
    """`product`; if narrow as a sum of outer products, which fuses with its reader."""
    width = features.shape[1]
    if width > _MAX_FUSED:
        return product(features, head)
    terms = [times(features[:, i], head[i][None]) for i in range(width)]
    return functools.reduce(jnp.add, terms)


@_product.defjvp
def _product_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # Matrix products, since a gradient transposes them.
    (features, head), (d_features, d_head) = primals, tangents
    tangent = product(d_features, head) + product(features, d_head)
    return _product(features, head), tangent


def _flatten(tree: PyTree) -> tuple[list[jax.Array], Any]:
    return jax.tree.flatten(tree)  # whose structure has no type


def draw(
    key: jax.Array,
    params: PyTree,
    widths: tuple[int, ...],
    use_bias: bool,
    kernel_init: Initializer | None,
) -> MLPParams:
    """Random parameters for an embedding of these stacked params."""
    num_replicas = check_replicas(params, "params")
    leaves, treedef = _flatten(params)
    dtype = compute_dtype(*leaves)
    if kernel_init is None:
        kernel_init = jax.nn.initializers.lecun_normal()
    table_key, trunk_key, heads_key = jax.random.split(key, 3)

    def kernel(key: jax.Array, n_in: int, n_out: int, dtype: jnp.dtype) -> jax.Array:
        if not n_out:  # which initializers do not expect
            return jnp.zeros((n_in, n_out), dtype)
        return kernel_init(key, (n_in, n_out), dtype)

    def layer(key: jax.Array, n_in: int, n_out: int) -> Dense:
        bias = jnp.zeros(n_out, dtype) if use_bias else None
        return Dense(kernel(key, n_in, n_out, dtype), bias)

    def head(key: jax.Array, x: jax.Array) -> jax.Array:
        size = x.size // num_replicas
        drawn = kernel(key, widths[-1], size, compute_dtype(x))
        return drawn.reshape(widths[-1], *x.shape[1:])

    trunk_keys = jax.random.split(trunk_key, len(widths))
    heads_keys = jax.random.split(heads_key, max(len(leaves), 1))
    bias = [jnp.zeros(x.shape[1:], compute_dtype(x)) for x in leaves]
    if widths == (0,):
        table = jnp.zeros((num_replicas, 1), dtype)
        return MLPParams(table, (), heads=None, bias=treedef.unflatten(bias))
    heads = [head(k, x) for k, x in zip(heads_keys, leaves, strict=False)]
    return MLPParams(
        table=jax.random.normal(table_key, (num_replicas, widths[0]), dtype),
        trunk=tuple(map(layer, trunk_keys, widths[:-1], widths[1:])),
        heads=treedef.unflatten(heads),
        bias=treedef.unflatten(bias) if use_bias else None,
    )


def _principal_directions(
    tree: PyTree, width: int
) -> tuple[jax.Array, PyTree, jax.Array]:
    """Truncated singular value decomposition of a tree with a replica axis.

    The left singular vectors come from the R x R Gram matrix, so that no leaf is
    flattened and a sharded leaf stays sharded.

    Returns:
      Left singular vectors U, `[R, K]`; U^T times the tree, a pytree with leading
      axis K; and its norms, the singular values, `[K]`, which are exactly zero
      for directions in which the replicas do not differ beyond rounding.
    """
    unit = largest_entry(tree)
    products = gram(divide(tree, unit))
    num_replicas, eps = len(products), jnp.finfo(products.dtype).eps
    vectors = _leading_eigenvectors(products, min(width, num_replicas))
    vectors = jnp.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))
    projections = combine(vectors, tree)
    norms = safe_sqrt(squared_norms(divide(projections, unit)))
    rounding = 4 * num_replicas * eps * jnp.sqrt(jnp.trace(products))
    return vectors, projections, unit * jnp.where(norms > rounding, norms, 0.0)


def _leading_eigenvectors(products: jax.Array, width: int) -> jax.Array:
    """Eigenvectors of a Gram matrix with the largest eigenvalues first, `[R, K]`.

    Of many replicas those of the matrix within the span of a few random combinations of
    them: Halko, Martinsson, Tropp, Finding structure with randomness, 2011.
    """
    size = len(products)
    if size <= _MAX_EXACT:
        return jnp.linalg.eigh(products)[1][:, ::-1][:, :width]
    basis = jax.random.normal(jax.random.key(0), (size, width + 8), products.dtype)
    for _ in range(3):
        basis = jnp.linalg.qr(product(products, basis))[0]
    small = product(basis.T, product(products, basis))
    return product(basis, jnp.linalg.eigh(small)[1][:, ::-1][:, :width])


def _fit_linear(phi: MLPParams, weights: PyTree, living: jax.Array) -> MLPParams:
    """The best affine fit of rank K, the singular values split evenly."""
    mean = replica_mean(weights, living)
    if phi.bias is None:
        mean = optax.tree.zeros_like(mean)
    phi = phi._replace(bias=None if phi.bias is None else mean)
    if phi.heads is None:
        return phi
    vectors, projections, norms = _principal_directions(
        deviations(weights, living, mean), phi.table.shape[1]
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
    )


def fit_by_descent(
    apply: Callable[[Any], PyTree], phi: Any, weights: PyTree, living: jax.Array
) -> Any:
    """L-BFGS on the projection loss, from codes along the principal directions."""
    vectors, _, norms = _principal_directions(
        deviations(weights, living), phi.table.shape[1]
    )
    codes = vectors * jnp.sqrt(jnp.sum(living).astype(vectors.dtype))
    phi = phi._replace(table=jnp.where(norms[None] == 0, phi.table, codes))

    # Optax finds the last value in the state by its name, which a param of the trunk
    # may have too: leaves in a list have none.
    leaves, treedef = _flatten(phi)

    def loss(leaves: list[jax.Array]) -> jax.Array:
        residual = subtract(apply(treedef.unflatten(leaves)), weights)
        return 0.5 * sum_of_squares(mask_replicas(living, residual))

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
    return treedef.unflatten(leaves)
