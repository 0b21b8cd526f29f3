"""What to watch while replicas are trained."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr

from pranam_optax._embedding import (
    Activation,
    find_embedding,
    gram,
    projection_loss,
)
from pranam_optax._pranam import Coupling, each_coupling, projection_target
from pranam_optax._replicas import check_values
from pranam_optax._revive import without_duplicates
from pranam_optax._sharding import with_auto_axes
from pranam_optax._tree import (
    PyTree,
    cast,
    check_replicas,
    compute_dtype,
    deviations_from,
    in_range,
    largest_magnitudes,
    mask_replicas,
    positive,
    reciprocal,
    replica_mean,
    replica_norms,
    scale,
)


def replica_metrics(
    params: PyTree,
    state: PyTree = None,
    values: jax.Array | np.ndarray | None = None,
    grads: PyTree = None,
    *,
    updated: PyTree = None,
    coupling: Coupling | None = None,
    step_size: float | jax.Array | None = None,
) -> dict[str, jax.Array]:
    r"""Scalars that tell how an ensemble of replicas fares.

    What is not given is left out. Replicas that are not finite are counted and take no
    part in the rest. Works under jit; the cost is that of a few passes over the params
    and of the eigenvalues of an R x R matrix.

    Args:
      params: stacked params :math:`W`.
      state: the state of `pranam` or `reparametrize`, or of a chain that holds one.
      values: the loss of each replica, `[R]`.
      grads: stacked gradients :math:`G`.
      updated: the state after the update by these gradients, which holds
        :math:`\phi'`.
      coupling: what `pranam` was given; a schedule is read at the state's count.
      step_size: what `pranam` was given.

    Returns:
      A dict of scalars:

      - `dead`: how many replicas have a weight, gradient or loss that is not finite.
      - `duplicates`: how many are equal, up to rounding, to one that comes before.
      - `spread`: RMS distance of the replicas from their mean.
      - `effective_rank`: :math:`\exp(-\sum_i p_i \log p_i)`, where :math:`p_i` are the
        singular values of the deviations from the mean, over their sum: from 1
        (replicas on a line) to R - 1 (in all directions alike); 0 if all are the same.
      - with values, `loss_mean`, `loss_std`, `loss_min` and `loss_max`.
      - with grads, `gradient_rms` and `gradient_cosine`, the mean cosine between the
        gradients of two replicas: 1 where all agree, 0 where they have nothing in
        common.
      - with coupling, `coupling`, its mean over the replicas; a schedule needs a state.
      - with a state, `embedding_distance`, the RMS of the pull :math:`W - f(\phi)`
        (here and below of the leaves that the embedding makes, all but masked ones);
        `nonfinite` and `revived`, its counts over all replicas; and with grads too,
        `pull_cosine`, the mean cosine between a replica's gradient and its pull.
      - with grads and updated, `projection_cosine`, the mean cosine between a replica's
        gradient and what the projection made of it, :math:`W - f(\phi')`; and with
        state and step_size too, `projection_before` and `projection_after`, the
        projection loss at :math:`\phi` and :math:`\phi'`.

    Raises:
      ValueError: for leaves without replica axis or that disagree on R, values or a
        coupling of another shape, gradients of another number of replicas, a state that
        does not hold one embedding or holds that of other params, or a schedule of the
        coupling without a state.
      TypeError: for integer or complex leaves.

    Examples:
      >>> import jax.numpy as jnp, pranam_optax
      >>> params = {"w": jnp.array([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]])}
      >>> metrics = pranam_optax.replica_metrics(params, values=jnp.arange(3.0))
      >>> for name, metric in metrics.items():
      ...     print(f"{name}: {metric:.3g}")
      dead: 0
      duplicates: 0
      spread: 1.15
      effective_rank: 1
      loss_mean: 1
      loss_std: 0.816
      loss_min: 0
      loss_max: 2

    References:
      O. Roy, M. Vetterli, The effective rank, EUSIPCO 2007.
    """
    num_replicas = check_replicas(params, "params")
    if values is not None:
        check_values(values, num_replicas)
    if grads is not None and check_replicas(grads, "grads") != num_replicas:
        raise ValueError(
            f"grads has {check_replicas(grads, 'grads')} replicas, params has "
            f"{num_replicas}"
        )
    node = None if state is None else find_embedding(state)
    after = None if updated is None else find_embedding(updated)
    if callable(coupling):
        if node is None:
            raise ValueError("a schedule of the coupling needs the state's count")
        coupling = coupling(node.count)
    return with_auto_axes(
        _metrics,
        lambda mesh: NamedSharding(mesh, PartitionSpec()),
        params,
        node,
        values,
        grads,
        after,
        coupling,
        step_size,
    )


def _metrics(
    params: PyTree,
    node: Any,
    values: jax.Array | np.ndarray | None,
    grads: PyTree,
    after: Any,
    coupling: float | jax.Array | np.ndarray | None,
    step_size: float | jax.Array | None,
) -> dict[str, jax.Array]:
    """See `replica_metrics`; `node` and `after` are what its states hold."""
    num_replicas = check_replicas(params, "params")
    dtype = compute_dtype(*jax.tree.leaves(params))
    finite = in_range(largest_magnitudes(params, dtype))
    if values is not None:
        values = jnp.asarray(values, dtype)
        finite &= jnp.isfinite(values)
    if grads is not None:
        finite &= in_range(largest_magnitudes(grads, dtype))
    weights = mask_replicas(finite, cast(params))
    count = jnp.maximum(jnp.sum(finite), 1).astype(dtype)

    def rms(tree: PyTree) -> jax.Array:
        norms = jnp.where(finite, replica_norms(tree, dtype), 0.0)
        size = sum(x.size for x in jax.tree.leaves(tree)) // num_replicas
        return jnp.sqrt(jnp.sum(jnp.square(norms)) / (count * size))

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(x, where=finite) / count

    deviations = deviations_from(replica_mean(weights, finite), weights, finite)
    products = gram(deviations, dtype)
    metrics = {
        "dead": jnp.sum(~finite),
        "duplicates": jnp.sum(finite) - jnp.sum(without_duplicates(params, finite)),
        "spread": rms(deviations),
        "effective_rank": _effective_rank(products),
    }
    if values is not None:
        average = mean(values)
        metrics |= {
            "loss_mean": average,
            "loss_std": jnp.sqrt(mean(jnp.square(values - average))),
            "loss_min": jnp.min(values, where=finite, initial=jnp.inf),
            "loss_max": jnp.max(values, where=finite, initial=-jnp.inf),
        }
    if grads is not None:
        gradients = mask_replicas(finite, cast(grads))
        directions = _directions(gradients, dtype)
        average = jax.tree.map(lambda x: x[None], replica_mean(directions, finite))
        together = jnp.square(count * replica_norms(average, dtype)[0])
        alone = jnp.sum(_products(directions, directions))
        pairs = jnp.maximum(count * (count - 1), 1.0)
        metrics |= {
            "gradient_rms": rms(gradients),
            "gradient_cosine": (together - alone) / pairs,
        }

    def pull(node: Any) -> PyTree:
        outputs = _by_path(node.embedding())
        difference = jax.tree.map(
            lambda w, y: w - y.astype(w.dtype), _like(outputs, weights), outputs
        )
        return mask_replicas(finite, difference)

    def cosine(pull: PyTree) -> jax.Array:
        along = _directions(_like(pull, gradients), dtype)
        return mean(_products(along, _directions(pull, dtype)))

    if coupling is not None:
        metrics["coupling"] = mean(each_coupling(coupling, num_replicas, dtype))
    if node is not None:
        metrics |= {
            "embedding_distance": rms(pull(node)),
            "nonfinite": jnp.sum(node.nonfinite),
            "revived": jnp.sum(node.revived),
        }
        if grads is not None:
            metrics["pull_cosine"] = cosine(pull(node))
    if grads is not None and after is not None:
        pulled = pull(after)
        metrics["projection_cosine"] = cosine(pulled)
        if node is not None and step_size is not None:
            w, g, d = (_like(pulled, x) for x in (weights, gradients, deviations))
            normalized = scale(reciprocal(rms(g)), g)
            target = projection_target(w, normalized, rms(d), rms(w), step_size)
            for name, embedding in (("before", node), ("after", after)):
                metrics[f"projection_{name}"] = projection_loss(
                    lambda node: _by_path(node.embedding()), embedding, target, finite
                )
    return metrics


def _by_path(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {keystr(path): leaf for path, leaf in leaves}


def _like(made: dict[str, Any], tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree that the embedding makes: all but masked ones."""
    leaves = _by_path(tree)
    for path, leaf in made.items():
        if path not in leaves or leaves[path].shape != leaf.shape:
            raise ValueError(
                f"the state's embedding makes a leaf {path} of shape {leaf.shape}, "
                "which params and grads must have too"
            )
    return {path: leaves[path] for path in made}


def replica_curvature(
    fun: Callable[..., jax.Array],
) -> Callable[..., dict[str, jax.Array]]:
    r"""Along its gradient, how steep and how curved the loss of each replica is.

    Args:
      fun: takes one model's params, then data, and returns a scalar.

    Returns:
      A function of `(params, *args)` with stacked params that returns a dict of `[R]`
      arrays: `slope`, :math:`g^T g`, and `curvature`, :math:`g^T H g`, at the cost of
      about two gradients (one forward derivative of the gradient). Gradient descent
      with rate :math:`\eta` gains
      :math:`\eta g^T g - \tfrac12 \eta^2 g^T H g`, so
      :math:`g^T g / g^T H g` is the best rate along the gradient, and a curvature that
      outgrows the slope tells of ill-conditioning.

    Raises:
      ValueError: if a leaf of the params has no replica axis.

    Examples:
      >>> import jax.numpy as jnp, pranam_optax
      >>> fun = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 10.0]) * w**2)
      >>> w = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> for name, value in pranam_optax.replica_curvature(fun)(w).items():
      ...     print(name, value)
      curvature [   1. 1000.]
      slope [  1. 100.]

    References:
      I. Goodfellow, Y. Bengio, A. Courville, Deep Learning, 2016, section 8.2.1.
    """
    gradient = jax.grad(fun)

    def one(params: PyTree, *args: Any) -> dict[str, jax.Array]:
        g = gradient(params, *args)
        hg = jax.jvp(lambda p: gradient(p, *args), (params,), (g,))[1]
        dtype = compute_dtype(*jax.tree.leaves(g))

        def inner(x: PyTree) -> jax.Array:
            products = jax.tree.map(lambda a, b: jnp.sum(a * b).astype(dtype), g, x)
            return jax.tree.reduce(jnp.add, products)

        return {"curvature": inner(hg), "slope": inner(g)}

    def replicas(params: PyTree, *args: Any) -> dict[str, jax.Array]:
        check_replicas(params, "params")
        return jax.vmap(one, in_axes=(0, *(None,) * len(args)))(params, *args)

    return replicas


def replica_saturation(
    activation: Activation, inputs: jax.Array, *, threshold: float = 0.1
) -> jax.Array:
    r"""The share of each replica's units at which an activation is flat.

    Such units learn little, and the share of dead ReLUs or of saturated tanhs tells of
    weights that have grown too large.

    Args:
      activation: an elementwise function :math:`a`.
      inputs: what it is given, the pre-activations of all replicas, `[R, ...]`.
      threshold: a unit is flat where :math:`|a'|` is below it: for `jnp.tanh` and 0.1
        beyond 1.8, for `jax.nn.relu` below 0.

    Returns:
      `[R]`, from 0 to 1.

    Raises:
      ValueError: if the inputs have no replica axis.
      TypeError: if they are integer or complex.

    Examples:
      >>> import jax.numpy as jnp, pranam_optax
      >>> inputs = jnp.array([[-3.0, 0.1, 0.2, 4.0], [0.1, 0.2, 0.3, 2.0]])
      >>> print(pranam_optax.replica_saturation(jnp.tanh, inputs))
      [0.5  0.25]
    """
    check_replicas(inputs, "inputs")
    slopes = jax.jvp(activation, (inputs,), (jnp.ones_like(inputs),))[1]
    return jnp.mean(jnp.abs(slopes) < threshold, axis=tuple(range(1, inputs.ndim)))


def _directions(tree: PyTree, dtype: jnp.dtype) -> PyTree:
    """Each replica divided by its norm; zero stays zero."""
    return scale(reciprocal(replica_norms(tree, dtype)), tree)


def _products(x: PyTree, y: PyTree) -> jax.Array:
    """Inner product of each replica of x with that of y, `[R]`."""
    dtype = compute_dtype(*jax.tree.leaves(x))

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axis=range(1, x.ndim)).astype(dtype)

    return jax.tree.reduce(jnp.add, jax.tree.map(product, x, y))


def _effective_rank(products: jax.Array) -> jax.Array:
    """exp of the entropy of the singular values, the roots of these eigenvalues."""
    unit = positive(jnp.max(jnp.diagonal(products)))
    eigenvalues = jnp.linalg.eigvalsh(products / unit)
    rounding = len(products) * jnp.finfo(products.dtype).eps * jnp.max(eigenvalues)
    values = jnp.sqrt(jnp.where(eigenvalues > rounding, eigenvalues, 0.0))
    total = jnp.sum(values)
    p = values / positive(total)
    entropy = -jnp.sum(p * jnp.log(positive(p)))
    return jnp.where(total > 0, jnp.exp(entropy), 0.0)
