"""Replicas on landscapes in 2-D, for embeddings of several widths: a picture of each.

    python examples/gallery.py --output docs/gallery

Every setting gets the same functions (flipped and shifted at random), the same initial
replicas and the same learning rate. The table counts replicas at the minimum over all
functions; the pictures show one on which most settings do what they mostly do.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from tables import write_rows
from tqdm import tqdm

import pranam_optax
from pranam_optax import problems

FAMILIES = {
    "Schwefel": problems.bound(problems.schwefel(2)),
    # In a smaller box, in which its ripples can be seen.
    "Ackley": replace(problems.ackley(2), low=jnp.full(2, -9.0), high=jnp.full(2, 9.0)),
    "Rastrigin": problems.rastrigin(2),
}
# What was put before Adam, by the width of the embedding.
WIDTHS = {"no coupling": None, **{f"width {k}": k for k in (0, 1, 4, 16)}}
NUM_REPLICAS = 32
RATE = 0.1  # Adam's at the start of a cosine decay, over half the box's width
NEAR = 0.01  # above the minimum


def run(problem: problems.Problem, width: int | None, key: Any, num_steps: int) -> Any:
    """A random instance, and values and places of its replicas at all steps."""
    instance = problems.randomize(problem, key)
    params = pranam_optax.replicate(instance.init, key, NUM_REPLICAS)
    grad_fn = pranam_optax.replica_value_and_grad(instance.fun)
    half_width = (problem.high[0] - problem.low[0]) / 2
    if width is None:  # gradients are normalised all the same
        link = pranam_optax.pranam(coupling=0.0)
    else:
        release = optax.linear_schedule(1.0, 0.0, int(0.6 * num_steps))
        embedding = pranam_optax.mlp_embedding((width,))
        link = pranam_optax.pranam(embedding, coupling=release)
    rate = optax.cosine_decay_schedule(RATE * half_width, num_steps)
    tx = optax.chain(link, optax.adam(rate))

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        values, grads = grad_fn(params)
        updates, state = tx.update(grads, state, params)
        path = values - instance.minimum, params
        return (optax.apply_updates(params, updates), state), path

    _, path = jax.lax.scan(step, (params, tx.init(params)), None, num_steps + 1)
    return instance, *path


def animate(
    name: str, instance: problems.Problem, paths: dict[str, Any], num_frames: int
) -> list[Image.Image]:
    """A panel for each setting, and the mean values of all in the last one."""
    figure = Figure(figsize=(8.4, 5.8), dpi=90, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    *axes, last = figure.subplots(2, 3).ravel()
    low, high = float(instance.low[0]), float(instance.high[0])
    grid = np.linspace(low, high, 240)
    xy = jnp.stack(jnp.meshgrid(grid, grid), axis=-1)
    height = np.asarray(jax.vmap(jax.vmap(instance.fun))(xy))
    levels = np.quantile(height, np.linspace(0, 1, 10))  # few colours: a small file
    dots = []
    for ax, (label, (values, _)) in zip(axes, paths.items(), strict=True):
        shades = np.digitize(height, levels)
        ax.imshow(shades, cmap="Greys_r", extent=(low, high, low, high), origin="lower")
        ax.plot(*instance.minimizer, "*", color="gold", ms=11)
        dots += ax.plot([], [], "o", color="tab:red", ms=4.5, mec="white", mew=0.5)
        ax.set(title=label, xticks=[], yticks=[], xlim=(low, high), ylim=(low, high))
        last.semilogy(np.maximum(values.mean(axis=1), 1e-6), label=label)
    last.set(title=f"{name}: mean of the replicas", xlabel="step")
    last.legend(fontsize=7, loc="upper right")
    now = last.axvline(0, color="grey", lw=0.8)

    # One palette for all frames, so that only what moves is stored.
    palette = Image.new("P", (1, 1))
    colours = [str(i / 31) for i in range(32)] + [f"C{i}" for i in range(5)] + ["gold"]
    palette.putpalette([round(255 * c) for name in colours for c in to_rgb(name)])

    num_steps = len(values) - 1
    # More frames where the replicas still move far.
    steps = (num_steps * np.linspace(0, 1, num_frames) ** 1.5).astype(int)
    frames: list[Image.Image] = []
    for step in tqdm(steps, name):
        for dot, (_, places) in zip(dots, paths.values(), strict=True):
            dot.set_data(*places[step].T)
        now.set_xdata([step, step])
        canvas.draw()
        frame = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.NONE))
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gallery"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="one function, few frames")
    args = parser.parse_args()
    families, num_frames = FAMILIES, 60
    if args.quick:
        args.steps, args.instances, num_frames = 10, 2, 2
        families = {"Ackley": FAMILIES["Ackley"]}

    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    keys = jax.random.split(jax.random.key(0), args.instances)
    for name, problem in families.items():
        paths, found = {}, []
        for label, width in WIDTHS.items():
            instances, values, places = jax.jit(
                jax.vmap(lambda key: run(problem, width, key, args.steps))  # noqa: B023
            )(keys)
            paths[label] = np.asarray(values), np.asarray(places)
            near = np.asarray(values[:, -1] < NEAR)
            found.append(near.any(axis=1))
            rows.append(
                {
                    "function": name,
                    "setting": label,
                    "replicas at the minimum": f"{near.mean():.1%}",
                    "functions on which one is": f"{found[-1].sum()} of {len(near)}",
                    "mean value": f"{values[:, -1].mean():.2g}",
                }
            )
        mostly = np.mean(found, axis=1, keepdims=True) > 0.5
        typical = int(np.sum(found == mostly, axis=0).argmax())
        instance = jax.tree.map(lambda leaf: leaf[typical], instances)  # noqa: B023
        paths = {label: (v[typical], p[typical]) for label, (v, p) in paths.items()}
        frames = animate(name, instance, paths, num_frames)
        file = args.output / f"{name.lower()}.gif"
        times = [90] * (num_frames - 1) + [3000]  # milliseconds
        frames[0].save(
            file, save_all=True, append_images=frames[1:], duration=times, loop=0
        )
        frames[-1].save(file.with_suffix(".png"), optimize=True)
        print(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB")

    write_rows(args.output / "gallery.csv", rows)
    print("| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
    print("\n".join("| " + " | ".join(row.values()) + " |" for row in rows))


if __name__ == "__main__":
    main()
