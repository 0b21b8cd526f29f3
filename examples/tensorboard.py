"""What to watch while replicas are trained: event files for TensorBoard, and a figure.

    python examples/tensorboard.py --log-dir runs/watch --plot watch.png
    tensorboard --logdir runs/watch

A tiny network on MNIST; where its files are not at hand, on random images of the same
shape. Scalars are those of `replica_metrics`, the coupling, the slope and curvature of
the loss along the gradient, and the share of ReLUs that are off; histograms are those
of the embedding, layer by layer. TensorFlow is not needed.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import flax_mnist
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from tensorboardX import SummaryWriter
from tqdm import trange

import pranam_optax


class Setting(NamedTuple):
    num_replicas: int = 16
    num_steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 1.5e-2
    step_size: float = 1.0  # that for networks in mini-batches
    scalars_every: int = 10
    histograms_every: int = 100


class Record(NamedTuple):
    """What was logged at one step."""

    step: int
    values: np.ndarray
    scalars: dict[str, float]


def load(data_dir: Path | None) -> tuple[jax.Array, jax.Array]:
    """Training images and digits, or random images about ten centres."""
    if data_dir is not None or (datasets.SHARED / "mnist").is_dir():
        data = flax_mnist.load_mnist(data_dir)
        return data.train_x, data.train_y
    print("no MNIST here: random images in its place")
    keys = jax.random.split(jax.random.key(0), 3)
    centres = jax.random.uniform(keys[0], (10, 784))
    y = jax.random.randint(keys[1], (10_000,), 0, 10)
    return centres[y] + jax.random.normal(keys[2], (10_000, 784)), y


def layers(state: Any) -> dict[str, jax.Array]:
    """The arrays of the embedding of `chain(pranam(...), ...)`, by their names."""
    return {
        "embedding/" + keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state[0].phi)
    }


def train(
    data: tuple[jax.Array, jax.Array],
    setting: Setting,
    coupling: optax.Schedule,
    writer: SummaryWriter,
    seed: int = 0,
) -> list[Record]:
    """Trains replicas, and logs to the writer what it returns."""
    x, y = data
    model = flax_mnist.MLP((10, 10))
    tx = optax.chain(
        pranam_optax.pranam(coupling=coupling, step_size=setting.step_size),
        optax.adam(
            optax.cosine_decay_schedule(setting.learning_rate, setting.num_steps)
        ),
    )

    def loss(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, seen = model.apply(params, x, capture_intermediates=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        # What the ReLUs of the first layer are given.
        return losses.mean(), seen["intermediates"]["Dense_0"]["__call__"][0]

    grad_fn = pranam_optax.replica_value_and_grad(loss, has_aux=True)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        (values, hidden), grads = grad_fn(params, x, y)
        updates, updated = tx.update(grads, state, params)
        scalars = pranam_optax.replica_metrics(params, state, values, grads)
        scalars["coupling"] = coupling(state[0].count)
        # A ReLU passes no gradient where its input is negative.
        scalars["saturation"] = jnp.mean(hidden < 0)
        return optax.apply_updates(params, updates), updated, values, scalars

    # Apart, since it costs two gradients more.
    @jax.jit
    def curvature(params: Any, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        """Means over the replicas of g'g and g'Hg, for the gradient g."""

        def one(params: Any) -> dict[str, jax.Array]:
            gradient = jax.grad(lambda params: loss(params, x, y)[0])
            g = gradient(params)
            hg = jax.jvp(gradient, (params,), (g,))[1]
            return {"slope": optax.tree.vdot(g, g), "curvature": optax.tree.vdot(g, hg)}

        return jax.tree.map(jnp.mean, jax.vmap(one)(params))

    init_key, batch_key = jax.random.split(jax.random.key(seed))
    params = pranam_optax.replicate(
        lambda key: model.init(key, x[:1]), init_key, setting.num_replicas
    )
    state = jax.jit(tx.init)(params)
    records = []
    for i in trange(setting.num_steps, unit="step"):
        key = jax.random.fold_in(batch_key, i)
        drawn = jax.random.randint(key, (setting.batch_size,), 0, len(x))
        batch = x[drawn], y[drawn]
        if i % setting.histograms_every == 0:
            for name, leaf in layers(state).items():
                writer.add_histogram(name, np.asarray(leaf), i)
        before = params
        params, state, values, scalars = step(params, state, *batch)
        if i % setting.scalars_every == 0:
            scalars |= curvature(before, *batch)
            numbers = {name: float(x) for name, x in scalars.items()}
            for name, number in numbers.items():
                writer.add_scalar(f"replicas/{name}", number, i)
            records.append(Record(i, np.asarray(values), numbers))
    return records


def smooth(x: np.ndarray, width: int = 9) -> np.ndarray:
    """Running mean over the records, since all losses jump with the batches."""
    window = np.ones(min(width, len(x)))

    def total(x: np.ndarray) -> np.ndarray:
        return np.convolve(x, window, mode="same")

    return total(x) / total(np.ones(len(x)))


def plot(file: Path, runs: dict[str, list[Record]]) -> None:
    """For each run, the losses of all replicas over what tells of their state."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    shade = LinearSegmentedColormap.from_list("coupled", ["white", "#d3e4f3"])
    ink, grey, blue, orange = "#33333d", "#b4b4bf", "#2f6fb5", "#e07b39"
    style: Any = {
        "axes.edgecolor": grey,
        "axes.labelcolor": ink,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "text.color": ink,
        "xtick.color": grey,
        "ytick.color": grey,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
    }
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            4,
            len(runs),
            figsize=(11, 8.5),
            height_ratios=(5, 1, 1.4, 1.8),
            sharex=True,
            sharey="row",
            layout="constrained",
            squeeze=False,
        )
        for column, (name, records) in zip(grid.T, runs.items(), strict=True):
            steps = np.array([record.step for record in records])
            losses = np.stack([record.values for record in records], axis=1)
            scalars = {
                key: np.array([record.scalars[key] for record in records])
                for key in records[0].scalars
            }
            for axis in column:  # shaded as far as the replicas are coupled
                axis.pcolormesh(
                    steps,
                    [0, 1],
                    np.tile(scalars["coupling"], (2, 1)),
                    shading="gouraud",
                    cmap=shade,
                    vmin=0,
                    vmax=1,
                    transform=axis.get_xaxis_transform(),
                    zorder=-2,
                )
            top, coupling, rank, cosine = column
            curves = np.stack([smooth(x) for x in losses])
            order = np.argsort(curves[:, -1])
            colours = plt.get_cmap("plasma")(np.linspace(0, 0.9, len(order)))
            for replica, colour in zip(order, colours, strict=True):
                top.plot(steps, curves[replica], color=colour, lw=1)
            top.set_yscale("log")
            top.set_title(name, loc="left", fontsize=15)
            coupling.fill_between(steps, scalars["coupling"], color=blue, lw=0)
            rank.plot(steps, scalars["effective_rank"], color=blue, lw=2)
            for key, colour, label in (
                ("gradient_cosine", blue, "of the gradients of two replicas"),
                ("pull_cosine", orange, "of gradient and pull to the embedding"),
            ):
                cosine.plot(steps, smooth(scalars[key]), color=colour, label=label)
            cosine.set_xlabel("step")
        ticks = [0.15, 0.2, 0.3, 0.5, 1, 2]
        grid[0, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        grid[0, 0].set_yticks([], minor=True)
        grid[0, 0].set_ylabel("loss of each replica (dark: the best in the end)")
        grid[1, 0].set(ylabel="coupling", ylim=(0, 1.05))
        grid[2, 0].set(ylabel="effective rank", ylim=(0, None))
        grid[3, 0].set(ylabel="cosine", ylim=(-0.1, 1))
        grid[3, 0].legend(frameon=False, loc="upper right", labelcolor="linecolor")
        figure.align_ylabels()
        figure.savefig(file, dpi=110)
    plt.close(figure)
    print(f"wrote {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--log-dir", type=Path, default=Path("runs"))
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figure")
    parser.add_argument(
        "--quick", action="store_true", help="20 steps, 4 replicas, coupled ones only"
    )
    args = parser.parse_args()
    setting = Setting()
    if args.quick:
        setting = Setting(
            num_replicas=4, num_steps=20, scalars_every=5, histograms_every=10
        )
    couplings: dict[str, optax.Schedule] = {
        "independent": optax.constant_schedule(0.0),
        "pranam": optax.linear_schedule(1.0, 0.0, int(0.3 * setting.num_steps)),
    }
    if args.quick:
        del couplings["independent"]

    data = load(args.data_dir)
    runs = {}
    for name, coupling in couplings.items():
        with SummaryWriter(str(args.log_dir / name)) as writer:
            runs[name] = train(data, setting, coupling, writer)
        last = runs[name][-1]
        print(
            f"{name}: at step {last.step} losses {last.values.min():.3f} to "
            f"{last.values.max():.3f}, effective rank "
            f"{last.scalars['effective_rank']:.1f}"
        )
    print(f"look at it: tensorboard --logdir {args.log_dir}")
    if args.plot:
        plot(args.plot, runs)


if __name__ == "__main__":
    main()
