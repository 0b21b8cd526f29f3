"""Pranam in a Flax training loop: a tiny network on MNIST, with and without it.

    python examples/flax_mnist.py
    python examples/flax_mnist.py --hidden 20 20 --output model.msgpack

Both sides start from the same replicas, see the same batches and take the same number
of steps at the same learning rate.
"""

import argparse
import gzip
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from datasets import Source, find
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
    hidden: Sequence[int] = (10, 10)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class Trained(NamedTuple):
    """Stacked params, and each replica's loss on all training and test images."""

    params: Any
    train_loss: np.ndarray
    test_accuracy: np.ndarray
    seconds: float


def train(
    model: nn.Module,
    data: Mnist,
    tx: optax.GradientTransformation,
    *,
    num_replicas: int,
    num_steps: int,
    batch_size: int,
    seed: int,
    description: str = "",
) -> Trained:
    """Trains R replicas on the same batches."""

    def predict(params: Any, x: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply(params, x))

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = predict(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    grad_fn = pranam_optax.replica_value_and_grad(loss_fn)

    def step(carry: Any, batch: jax.Array) -> Any:
        params, state = carry
        values, grads = grad_fn(params, data.train_x[batch], data.train_y[batch])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), values

    @jax.jit
    def steps(params: Any, state: Any, batches: jax.Array) -> Any:
        return jax.lax.scan(step, (params, state), batches)

    @jax.jit
    def evaluate(params: Any) -> tuple[jax.Array, jax.Array]:
        def one(params: Any) -> tuple[jax.Array, jax.Array]:
            hits = predict(params, data.test_x).argmax(-1) == data.test_y
            return loss_fn(params, data.train_x, data.train_y), hits.mean()

        return jax.lax.map(one, params)

    key = jax.random.key(seed)
    params = pranam_optax.replicate(
        lambda key: model.init(key, data.train_x[:1]), key, num_replicas
    )
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
    train_loss, test_accuracy = map(np.asarray, evaluate(params))
    return Trained(params, train_loss, test_accuracy, seconds)


def make_optimizer(
    name: str, learning_rate: float, num_steps: int
) -> optax.GradientTransformation:
    """Adam with a cosine schedule, alone or behind pranam."""
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    if name == "Adam":
        return adam
    if name == "Adam, normalised gradients":
        return optax.chain(pranam_optax.pranam(coupling=0.0), adam)
    # Neural networks want a short coupling and small steps of the embedding.
    release = optax.linear_schedule(1.0, 0.0, int(0.3 * num_steps))
    return optax.chain(pranam_optax.pranam(coupling=release, step_size=1.0), adam)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder with the IDX files")
    parser.add_argument("--hidden", type=int, nargs="*", default=[10, 10])
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("mnist_best.msgpack"))
    parser.add_argument("--quick", action="store_true", help="100 steps, 4 replicas")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.replicas = 100, 4

    data = load_mnist(args.data_dir)
    model = MLP(args.hidden)
    rates = {"Adam": 1.5e-2, "pranam + Adam": 1.5e-2}
    rows = []
    for name, rate in rates.items():
        trained = train(
            model,
            data,
            make_optimizer(name, rate, args.steps),
            num_replicas=args.replicas,
            num_steps=args.steps,
            batch_size=args.batch_size,
            seed=args.seed,
            description=name,
        )
        loss, accuracy = trained.train_loss, trained.test_accuracy
        best = int(np.nanargmin(loss))
        rows.append(
            f"| {name} | {loss.mean():.3f} | {loss[best]:.3f} | {accuracy.mean():.3f} "
            f"| {accuracy[best]:.3f} | {trained.seconds:.0f} s |"
        )
    print(
        "\n| method | train loss, mean | best | test accuracy, mean "
        "| of the best by train loss | time |\n| --- | --- | --- | --- | --- | --- |"
    )
    print("\n".join(rows))
    model_params = pranam_optax.best_replica(trained.params, trained.train_loss)
    args.output.write_bytes(flax.serialization.to_bytes(model_params))
    print(f"\nsaved the best single model of pranam + Adam to {args.output}")


if __name__ == "__main__":
    main()
