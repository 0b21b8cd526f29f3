"""A tiny network on MNIST in Flax: four elastic replicas at the price of one model.

    python examples/flax_mnist.py
    python examples/flax_mnist.py --nnx --hidden 20 20 --output model.msgpack

Both sides see the same number of examples in the same number of steps: one model the
whole batch, each replica its part of it. The replicas end as one model, their average,
which is saved.
"""

import argparse
import gzip
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from datasets import Source, find
from flax import nnx
from tqdm import tqdm

import pranam_optax

MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
# The original IDX files and their sha256.
FILES = {
    name: Source(tuple(mirror + name for mirror in MIRRORS), sha256)
    for name, sha256 in (
        (
            "train-images-idx3-ubyte.gz",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        (
            "t10k-labels-idx1-ubyte.gz",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    )
}


class Mnist(NamedTuple):
    """Images as floats in [0, 1], flattened, and their digits."""

    train_x: jax.Array
    train_y: jax.Array
    test_x: jax.Array
    test_y: jax.Array


def load_mnist(data_dir: Path | None = None) -> Mnist:
    """MNIST from a folder with its four IDX files; see `datasets.find`."""
    arrays = [_read(packed) for packed in find("mnist", FILES, data_dir).values()]
    images = [x.reshape(len(x), -1).astype(np.float32) / 255 for x in arrays[::2]]
    labels = [y.astype(np.int32) for y in arrays[1::2]]
    return Mnist(*map(jnp.asarray, (images[0], labels[0], images[1], labels[1])))


def _read(packed: bytes) -> np.ndarray:
    data = gzip.decompress(packed)
    # IDX: two zero bytes, the type, the number of axes, their lengths, the bytes.
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


class MLP(nn.Module):
    """The network in Flax Linen."""

    hidden: Sequence[int] = (10, 10)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class NnxMLP(nnx.Module):
    """The same in Flax NNX."""

    def __init__(self, hidden: Sequence[int], rngs: nnx.Rngs) -> None:
        sizes = (784, *hidden, 10)
        self.layers = nnx.List(
            nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(sizes)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


class Model(NamedTuple):
    """One model as functions of its params, whatever the framework."""

    init: Callable[[jax.Array], Any]
    logits: Callable[[Any, jax.Array], jax.Array]


def linen_model(hidden: Sequence[int]) -> Model:
    module: Any = MLP(hidden)
    return Model(lambda key: module.init(key, jnp.zeros((1, 784))), module.apply)


def nnx_model(hidden: Sequence[int]) -> Model:
    graph = nnx.graphdef(NnxMLP(hidden, nnx.Rngs(0)))

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(NnxMLP(hidden, nnx.Rngs(key))))

    def logits(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, nnx.State(params))(x)

    return Model(init, logits)


class Trained(NamedTuple):
    """Stacked params, and each replica's loss on all training and test images."""

    params: Any
    train_loss: np.ndarray
    test_accuracy: np.ndarray
    seconds: float


def train(
    model: Model,
    data: Mnist,
    tx: optax.GradientTransformation,
    *,
    num_replicas: int,
    num_steps: int,
    batch_size: int,
    seed: int,
    description: str = "",
) -> Trained:
    """Trains R replicas, each on its part of every batch; with R = 1 one model."""

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = model.logits(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    grad_fn = pranam_optax.replica_value_and_grad(loss_fn, batch="split")

    def step(carry: Any, batch: jax.Array) -> Any:
        params, state = carry
        values, grads = grad_fn(params, data.train_x[batch], data.train_y[batch])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), values

    @jax.jit
    def steps(params: Any, state: Any, batches: jax.Array) -> Any:
        return jax.lax.scan(step, (params, state), batches)

    params = pranam_optax.replicate(model.init, seed, num_replicas)
    state = tx.init(params)
    rng = np.random.default_rng(seed)
    per_epoch = len(data.train_x) // batch_size
    epochs = [
        rng.permutation(len(data.train_x))[: per_epoch * batch_size]
        for _ in range(-(-num_steps // per_epoch))
    ]
    batches = np.concatenate(epochs).reshape(-1, batch_size)[:num_steps]

    start = time.perf_counter()
    chunk = max(num_steps // 20, 1)
    with tqdm(total=num_steps, unit="step", desc=description) as progress:
        for i in range(0, num_steps, chunk):
            (params, state), values = steps(params, state, batches[i : i + chunk])
            progress.set_postfix(loss=f"{values[-1].mean():.3f}")
            progress.update(len(values))
    seconds = time.perf_counter() - start
    # After the last update: the losses that a step returns are those from before it.
    return Trained(params, *evaluate(model, data, params), seconds)


def evaluate(model: Model, data: Mnist, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Each replica's loss on the training images and accuracy on the test images."""

    def one(params: Any) -> tuple[jax.Array, jax.Array]:
        entropy = optax.softmax_cross_entropy_with_integer_labels
        loss = entropy(model.logits(params, data.train_x), data.train_y).mean()
        hits = model.logits(params, data.test_x).argmax(-1) == data.test_y
        return loss, hits.mean()

    loss, accuracy = jax.jit(lambda params: jax.lax.map(one, params))(params)
    return np.asarray(loss), np.asarray(accuracy)


def make_optimizer(
    learning_rate: float, num_steps: int, *, elastic: bool
) -> optax.GradientTransformation:
    """Adam with a cosine schedule, and behind it the pull of the replicas."""
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    if not elastic:
        return adam
    return optax.chain(adam, pranam_optax.elastic_averaging(0.1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with the IDX files")
    parser.add_argument("--hidden", type=int, nargs="*", default=[10, 10])
    parser.add_argument("--nnx", action="store_true", help="Flax NNX, not Linen")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=2048, help="of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("mnist.msgpack"))
    parser.add_argument("--quick", action="store_true", help="20 small steps")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch_size = 20, 256

    data = load_mnist(args.data_dir)
    model = nnx_model(args.hidden) if args.nnx else linen_model(args.hidden)
    rows = []
    # Replicas that are pulled together bear, and want, larger steps.
    for name, num_replicas, rate in (
        ("one model", 1, 1e-2),
        ("elastic replicas", args.replicas, 3e-2),
    ):
        trained = train(
            model,
            data,
            make_optimizer(rate, args.steps, elastic=num_replicas > 1),
            num_replicas=num_replicas,
            num_steps=args.steps,
            batch_size=args.batch_size,
            seed=args.seed,
            description=name,
        )
        average = pranam_optax.average_replicas(trained.params)
        stacked = jax.tree.map(lambda x: x[None], average)
        (loss,), (accuracy,) = evaluate(model, data, stacked)
        rows.append(
            f"| {name} | {trained.train_loss.mean():.3f} | {loss:.3f} | {accuracy:.3f} "
            f"| {trained.seconds:.0f} s |"
        )
    print(
        "\n| method | train loss, mean of replicas | of their average "
        "| its test accuracy | time |\n| --- | --- | --- | --- | --- |"
    )
    print("\n".join(rows))
    metrics = pranam_optax.replica_metrics(
        trained.params, values=trained.train_loss, average_value=loss
    )
    print(f"\nloss of the average above the replicas': {metrics['average_gap']:.2g}")
    args.output.write_bytes(flax.serialization.to_bytes(average))
    print(f"saved the averaged model to {args.output}")


if __name__ == "__main__":
    main()
