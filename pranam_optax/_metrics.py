"""What to watch while replicas are trained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from pranam_optax._embedding import Embedding, check_embedding, find_state
from pranam_optax._replicas import alive, check_values
from pranam_optax._revive import without_duplicates
from pranam_optax._sharding import auto_axes
from pranam_optax._tree import (
    PyTree,
    check_replicas,
    deviations,
    divide,
    gram,
    largest_entry,
    leaves_of,
    mask_replicas,
    positive,
    reciprocal,
    replica_mean,
    rms,
    safe_sqrt,
    scale,
    squared_norms,
    subtract,
    sum_of_squares,
    total,
)


def replica_metrics(
    params: PyTree,
    state: PyTree = None,
    values: jax.Array | np.ndarray | None = None,
    grads: PyTree = None,
    *,
    embedding: Embedding | None = None,
    average_value: Any = None,
) -> dict[str, jax.Array]:
    r"""Scalars that tell how an ensemble of replicas fares.

    What is not given is left out. Replicas that are not alive (weights, gradient and
    loss finite, weights that can be squared) are counted and have no part in the rest,
    which is NaN where none is alive. Works under jit. The cost is that of a few passes
    over the params and of the singular values of a matrix of R rows.

    Args:
      params: stacked params :math:`W`.
      state: the state of `pranam`, `elastic_averaging` or `reparametrize`, or of a
        chain that holds one.
      values: the loss of each replica, `[R]`.
      grads: stacked gradients :math:`G`.
      embedding: the embedding that the transformation was given; None for the default.
      average_value: the loss of `average_replicas(params)`, on the data of `values`.

    Returns:
      A dict of scalars:

      - `dead`: how many replicas have a weight, gradient or loss that is not finite.
      - `duplicates`: how many are equal, up to rounding, to one that comes before.
      - `spread`: RMS distance of the replicas from their mean.
      - `effective_rank`: :math:`\exp(-\sum_i p_i \log p_i)`, where :math:`p_i` are the
        singular values of the deviations from the mean, over their sum: from 1
        (replicas on a line) to R - 1 (in all directions alike); 0 if all are the same.
        Of more than 1024 replicas of more than 1024 weights, that of every second,
        third, ... replica.
      - with values, `loss_mean`, `loss_std`, `loss_min` and `loss_max`; and with
        average_value too, `average_gap`, the average's loss minus `loss_mean`: at most
        about 0 where the replicas share a basin, so that their average is a model as
        good as they are; far above where they do not.
      - with grads, `gradient_rms` and `gradient_cosine`, the mean cosine between the
        gradients of two replicas: 1 where all agree, 0 where they have nothing in
        common.
      - with a state, `embedding_distance`, the RMS of the pull :math:`W - f(\phi)` (of
        the leaves that the embedding makes, all but masked ones); `nonfinite`, its
        counts over all replicas; and with grads too, `pull_cosine`, the mean cosine
        between a replica's gradient and its pull.

    Raises:
      ValueError: for leaves without replica axis or that disagree on R, values of
        another shape, gradients of another number of replicas, or a state that does not
        hold one embedding or holds that of other params.
      TypeError: for integer or complex leaves.

    Examples:
      >>> import jax.numpy as jnp, pranam_optax
      >>> params = {"w": jnp.array([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]])}
      >>> metrics = pranam_optax.replica_metrics(params, values=jnp.arange(3.0))
      >>> for name, metric in metrics.items():
      ...     print(f"{name}: {metric:.3g}")
      dead: 0
      duplicates: 0
      effective_rank: 1
      loss_max: 2
      loss_mean: 1
      loss_min: 0
      loss_std: 0.816
      spread: 1.15

    References:
      O. Roy, M. Vetterli, The effective rank, EUSIPCO 2007.
    """
    num_replicas = check_replicas(params, "params")
    if values is not None:
        values = check_values(values, num_replicas)
    elif average_value is not None:
        raise ValueError("average_value needs values, the losses to compare it with")
    if grads is not None and check_replicas(grads, "grads") != num_replicas:
        raise ValueError(
            f"grads has {check_replicas(grads, 'grads')} replicas, params has "
            f"{num_replicas}"
        )
    node = None if state is None else find_state(state)
    apply = Partial(check_embedding(embedding, "values").apply)
    return _metrics(params, node, values, grads, apply, average_value)


@auto_axes
@jax.jit
def _metrics(
    params: PyTree,
    node: Any,
    values: Any,
    grads: PyTree,
    apply: Partial,
    average_value: Any,
) -> dict[str, jax.Array]:
    living = alive(params, grads, values)
    weights = mask_replicas(living, params)
    distances = deviations(weights, living)
    metrics = {
        "dead": jnp.sum(~living),
        "duplicates": jnp.sum(living) - jnp.sum(without_duplicates(params, living)),
        "spread": rms(distances, living),
        "effective_rank": _effective_rank(distances),
    }
    if values is not None:
        mean = jnp.mean(values, where=living)
        spread = jnp.sqrt(jnp.mean(jnp.square(values - mean), where=living))
        metrics |= {
            "loss_mean": mean,
            "loss_std": spread,
            "loss_min": jnp.min(values, where=living, initial=jnp.inf),
            "loss_max": jnp.max(values, where=living, initial=-jnp.inf),
        }
        if average_value is not None:
            metrics["average_gap"] = jnp.asarray(average_value, mean.dtype) - mean
    if grads is not None:
        unit = largest_entry(grads, living)
        gradients = divide(mask_replicas(living, grads), unit)
        directions = _directions(gradients)
        count = jnp.sum(living).astype(unit.dtype)
        together = sum_of_squares(replica_mean(directions, living)) * count**2
        pairs = jnp.maximum(count * (count - 1), 1.0)
        metrics |= {
            "gradient_rms": unit * rms(gradients, living),
            "gradient_cosine": (together - sum_of_squares(directions)) / pairs,
        }
    if node is not None:
        made = apply(node.phi)
        ours = leaves_of(made, weights, "params")
        pull = subtract(ours, leaves_of(made, made, "params"))
        pull = mask_replicas(living, pull)
        metrics |= {
            "embedding_distance": rms(pull, living),
            "nonfinite": jnp.sum(node.nonfinite),
        }
        if grads is not None:
            along = _directions(leaves_of(made, gradients, "grads"))
            cosines = _products(along, _directions(pull))
            metrics["pull_cosine"] = jnp.mean(cosines, where=living)
    none = jnp.sum(living) == 0
    return {
        name: x if name in _COUNTS else jnp.where(none, jnp.nan, x)
        for name, x in metrics.items()
    }


# Replicas from which the effective rank is computed; the time grows with the cube.
_MAX_RANK = 1024
_COUNTS = ("dead", "duplicates", "nonfinite")


def _directions(tree: PyTree) -> PyTree:
    """Each replica divided by its norm; zero stays zero."""
    return scale(reciprocal(safe_sqrt(squared_norms(tree))), tree)


def _products(x: PyTree, y: PyTree) -> jax.Array:
    """Inner product of each replica of x with that of y, `[R]`."""
    products = jax.tree.map(lambda a, b: a * b.astype(a.dtype), x, y)
    return total(products, lambda x: jnp.sum(x, axis=range(1, x.ndim)))


def _effective_rank(distances: PyTree) -> jax.Array:
    """exp of the entropy of the singular values of the distances from the mean."""
    unit = largest_entry(distances)
    scaled = jax.tree.leaves(divide(distances, unit))
    leaves = [x.reshape(len(x), -1) for x in scaled]
    num_replicas, size = len(leaves[0]), sum(x.shape[1] for x in leaves)
    if size < num_replicas:  # the other Gram matrix is smaller
        leaves = [jnp.concatenate([x.astype(unit.dtype) for x in leaves], axis=1).T]
    elif num_replicas > _MAX_RANK:
        leaves = [x[:: -(-num_replicas // _MAX_RANK)] for x in leaves]
    eigenvalues = jnp.linalg.eigvalsh(gram(leaves))
    eps = jnp.finfo(eigenvalues.dtype).eps
    rounding = len(eigenvalues) * eps * jnp.max(eigenvalues)
    values = jnp.sqrt(jnp.where(eigenvalues > rounding, eigenvalues, 0.0))
    p = values / positive(jnp.sum(values))
    entropy = -jnp.sum(p * jnp.log(positive(p)))
    return jnp.where(jnp.sum(values) > 0, jnp.exp(entropy), 0.0)
