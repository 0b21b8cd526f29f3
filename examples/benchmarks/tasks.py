"""The problems of the study: families of random instances, and how they are trained."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _paths  # noqa: F401
import jax
import jax.numpy as jnp
import nist
import nist_problems
import numpy as np
import optax
import potential_energy
from flax_mnist import load_mnist
from potential_energy import Fit

from pranam_optax import problems

# The arrays of a random problem, such as a `problems.Problem`.
Instance = Any


class Task(NamedTuple):
    """A family of random problems.

    Attributes:
      kind: "multimodal", "unimodal" or "model".
      draw: draws an instance, a pytree, from a key.
      init: draws the params of one replica from a key.
      loss: `loss(data, instance, params, key)` of one replica; the key draws a
        mini-batch, where there is one.
      score: `score(data, instance, params)`, what is reported of one replica: the loss
        over all data, or the height above the known minimum.
      solved: a replica with a lower score has solved the problem.
      floor: scores below it count as equal.
      minimum: of the loss.
      data: arrays that all instances share, such as images.
      accuracy: `accuracy(data, instance, params)` on test data, where there is any.
      max_seeds: how many seeds to tune on and to report at most.
      num_runs: how many runs are computed side by side.
      box: the box to search, for methods that need one.
      batch: "shared", or "split" where every replica draws a mini-batch of its own.
    """

    kind: str
    draw: Callable[[jax.Array], Instance]
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Instance, Any, jax.Array], jax.Array]
    score: Callable[[Any, Instance, Any], jax.Array]
    num_replicas: int
    num_steps: int
    solved: float
    floor: float
    minimum: float = 0.0
    data: Any = ()
    accuracy: Callable[[Any, Instance, Any], jax.Array] | None = None
    max_seeds: tuple[int, int] = (5, 10)
    num_runs: int = 16
    box: tuple[np.ndarray, np.ndarray] | None = None
    batch: Literal["shared", "split"] = "shared"


def ellipsoid(dim: int) -> problems.Problem:
    """An ill-conditioned quadratic: condition number 10,000; minimum 0 at 0."""
    corner = jnp.full(dim, 5.0)
    return problems.Problem(stretched, -corner, corner, jnp.zeros(dim), 0.0)


def stretched(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.logspace(0, 4, len(x)) * x**2)


FUNCTIONS: dict[str, Callable[[int], problems.Problem]] = {
    "Schwefel": lambda dim: problems.bound(problems.schwefel(dim)),
    "Ackley": problems.ackley,
    "Rastrigin": problems.rastrigin,
    "Levy": problems.levy,
    "Griewank": problems.griewank,
    "Styblinski-Tang": problems.styblinski_tang,
    "Michalewicz": lambda dim: problems.bound(problems.michalewicz(dim)),
    "Rosenbrock": problems.rosenbrock,
    "sphere": problems.sphere,
    "ellipsoid": ellipsoid,
}
UNIMODAL = ("Rosenbrock", "sphere", "ellipsoid")
# A replica within this distance of the minimum has solved the problem: below the
# next minimum of each function.
SOLVED = {"Griewank": 1e-3, "Rosenbrock": 1e-3, "sphere": 1e-3, "ellipsoid": 1e-3}


def function(name: str, dim: int, rotated: bool, num_steps: int = 1000) -> Task:
    """Flipped and shifted (to the middle 40 % of the box) at random; or rotated too."""
    problem = FUNCTIONS[name](dim)
    return Task(
        "unimodal" if name in UNIMODAL else "multimodal",
        lambda key: problems.randomize(problem, key, rotated=rotated),
        problem.init,
        lambda data, instance, x, key: instance.fun(x),
        lambda data, instance, x: instance.fun(x) - problem.minimum,
        num_replicas=64,
        num_steps=num_steps,
        solved=SOLVED.get(name, 0.1),
        floor=1e-3,
        minimum=problem.minimum,
        max_seeds=(5, 20) if dim < 1000 else (1, 5),
        num_runs=max(1, 32 * 30 // dim),
        box=(np.asarray(problem.low), np.asarray(problem.high)),
    )


def regression(
    make: Callable[[int | jax.Array], problems.Regression],
    num_steps: int = 1000,
    num_instances: int = 10,
) -> Task:
    """A random model to recover from its output: an instance per seed."""
    return Task(
        "model",
        make,
        make(0).init,
        lambda data, instance, params, key: instance.loss(params),
        lambda data, instance, params: instance.loss(params),
        num_replicas=32,
        num_steps=num_steps,
        solved=1e-4,
        floor=1e-10,
        max_seeds=(5, num_instances),
    )


def teacher(
    features: Sequence[int],
    activation: Callable[[jax.Array], jax.Array],
    num_steps: int = 1000,
) -> Task:
    make = partial(problems.teacher_network, features=features, activation=activation)
    return regression(make, num_steps)


class Network(NamedTuple):
    """A classifier of images."""

    init: Callable[[jax.Array], Any]
    logits: Callable[[Any, jax.Array], jax.Array]


def dense(*hidden: int) -> Network:
    """A relu network."""
    sizes = (784, *hidden, 10)
    shapes = list(pairwise(sizes))

    def logits(params: Any, x: jax.Array) -> jax.Array:
        *layers, last = params
        for layer in layers:
            x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
        return x @ last["w"] + last["b"][None]

    return Network(partial(init_layers, shapes), logits)


def convolutional(*layers: tuple[int, int, int]) -> Network:
    """Relu convolutions, each (side, stride, channels), then a linear layer."""
    shapes: list[tuple[int, ...]] = []
    image, channels = 28, 1
    for side, stride, out in layers:
        shapes.append((side, side, channels, out))
        image, channels = (image - side) // stride + 1, out
    shapes.append((image**2 * channels, 10))

    def logits(params: Any, x: jax.Array) -> jax.Array:
        *hidden, last = params
        x = x.reshape(-1, 28, 28, 1)
        for layer, (_, stride, _) in zip(hidden, layers, strict=True):
            x = convolve(x, layer["w"], stride) + layer["b"][None, None, None]
            x = jax.nn.relu(x)
        return x.reshape(len(x), -1) @ last["w"] + last["b"][None]

    return Network(partial(init_layers, shapes), logits)


def convolve(x: jax.Array, w: jax.Array, stride: int) -> jax.Array:
    """A convolution as one product of matrices.

    On a CPU that is faster than XLA's own, in which the replicas become groups.
    """
    side = len(w)
    end = stride * ((x.shape[1] - side) // stride + 1)
    pixels = [
        x[:, i : i + end : stride, j : j + end : stride]
        for i in range(side)
        for j in range(side)
    ]
    return jnp.concatenate(pixels, axis=-1) @ w.reshape(-1, w.shape[-1])


def init_layers(
    shapes: Sequence[tuple[int, ...]], key: jax.Array
) -> list[dict[str, jax.Array]]:
    return [
        {"w": jax.nn.initializers.lecun_normal()(k, shape), "b": jnp.zeros(shape[-1])}
        for k, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]


def mnist(
    network: Network,
    num_steps: int = 500,
    max_seeds: tuple[int, int] = (1, 5),
    num_replicas: int = 16,
    batch_size: int = 128,
    batch: Literal["shared", "split"] = "shared",
    data_dir: Path | None = None,
) -> Task:
    """MNIST in mini-batches of `batch_size` images for each replica."""

    def mean_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            network.logits(params, x), y
        ).mean()

    def batch_loss(data: Any, _: Instance, params: Any, key: jax.Array) -> jax.Array:
        drawn = jax.random.randint(key, (batch_size,), 0, len(data.train_x))
        return mean_loss(params, data.train_x[drawn], data.train_y[drawn])

    def thousands(fun: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        """Mean over the data, of which 1000 at a time fit into the caches."""
        parts = [x.reshape(-1, 1000, *x.shape[1:]) for x in arrays]
        return jax.lax.map(lambda part: fun(*part), parts).mean()

    def score(data: Any, _: Instance, params: Any) -> jax.Array:
        loss = partial(mean_loss, params)
        return thousands(loss, data.train_x, data.train_y)

    def accuracy(data: Any, _: Instance, params: Any) -> jax.Array:
        def hits(x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.mean(network.logits(params, x).argmax(axis=-1) == y)

        return thousands(hits, data.test_x, data.test_y)

    return Task(
        "model",
        lambda key: (),
        network.init,
        batch_loss,
        score,
        num_replicas=num_replicas,
        num_steps=num_steps,
        solved=0.2,
        floor=1e-10,
        data=load_mnist(data_dir),
        accuracy=accuracy,
        max_seeds=max_seeds,
        num_runs=1,
        batch=batch,
    )


def curve_fit(fit: Fit, rss: float = 0.0, num_steps: int = 1000) -> Task:
    """Mean squared error, in units of the variance, above that of the known minimum.

    The parameters are scaled to [-1, 1] over the box of the fit.
    """
    center, half = (fit.low + fit.high) / 2, (fit.high - fit.low) / 2
    data = jnp.asarray(fit.x, float), jnp.asarray(fit.y, float)
    variance = float(np.var(np.asarray(fit.y)))
    minimum = rss / len(fit.y) / variance

    def loss(data: Any, z: jax.Array) -> jax.Array:
        x, y = data
        error = fit.model(center + half * jnp.sin(z), x) - y
        return jnp.mean(error**2) / variance

    return Task(
        "model",
        lambda key: (),
        lambda key: jax.random.uniform(key, center.shape, float, -1.0, 1.0),
        lambda data, arrays, z, key: loss(data, z),
        lambda data, arrays, z: loss(data, z) - minimum,
        num_replicas=64,
        num_steps=num_steps,
        solved=1e-3,
        floor=1e-10,
        minimum=minimum,
        data=data,
    )


def potential(name: str, data_dir: Path | None) -> Task:
    """Energies of H2+ or H2O."""
    return curve_fit(potential_energy.load(data_dir)[name])


def nist_regression(name: str, data_dir: Path | None) -> Task:
    """One of NIST's regressions, in the box of examples/nist.py."""
    regression = nist_problems.load(data_dir, [name])[name]
    low, high = nist.box(regression)
    return curve_fit(
        Fit(regression.model, regression.x, regression.y, low, high), regression.rss
    )


# Of average or higher difficulty, and finite in the whole box in single precision.
NIST = ("ENSO", "MGH09", "Thurber", "Eckerle4")


# Replicas, images that each of them sees in a step, and whether all see the same.
BATCHES: tuple[tuple[int, int, Literal["shared", "split"]], ...] = (
    (4, 128, "shared"),
    (4, 512, "shared"),
    (4, 32, "shared"),
    (4, 32, "split"),
    (16, 8, "shared"),
    (16, 8, "split"),
    (16, 32, "shared"),
    (16, 32, "split"),
)


def make_tasks(data_dir: Path | None = None) -> dict[str, Callable[[], Task]]:
    """All problems of the study by name, made when they are called."""
    tasks: dict[str, Callable[[], Task]] = {}
    for dim in (10, 30, 100, 1000):
        for name in FUNCTIONS:
            if dim < 1000 or name in ("Schwefel", "Ackley", "Rastrigin"):
                tasks[f"{name} {dim}"] = partial(function, name, dim, False)
            if dim < 1000:
                tasks[f"{name} {dim} rotated"] = partial(function, name, dim, True)
    tasks["polynomial"] = partial(regression, problems.polynomial_fit, num_instances=20)
    for features in ((4, 5, 1), (5, 6, 6, 1), (8, 16, 1)):
        sizes = "-".join(map(str, features))
        tasks[f"tanh {sizes}"] = partial(teacher, features, jnp.tanh)
        tasks[f"relu {sizes}"] = partial(teacher, features, jax.nn.relu)
    tasks["MNIST 10-10"] = partial(mnist, dense(10, 10), data_dir=data_dir)
    tasks["MNIST 20-20"] = partial(mnist, dense(20, 20), data_dir=data_dir)
    tasks["MNIST conv"] = partial(
        mnist, convolutional((4, 4, 8), (3, 2, 16)), 200, (1, 3), data_dir=data_dir
    )
    for num, size, batch in BATCHES:
        tasks[f"MNIST 10-10, R = {num}, {size} each, {batch}"] = partial(
            mnist,
            dense(10, 10),
            max_seeds=(1, 3),
            num_replicas=num,
            batch_size=size,
            batch=batch,
            data_dir=data_dir,
        )
    for name in ("H2+, 3 Gaussians", "H2O, Morse and bend", "H2O, 3-4-1 network"):
        tasks[name] = partial(potential, name, data_dir)
    for name in NIST:
        tasks[f"NIST {name}"] = partial(nist_regression, name, data_dir)
    return tasks
