"""Strict settings, so that what passes here passes under any user's; shared helpers."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def optax_promotion():
    """For tests that run Optax transformations which strict promotion refuses."""
    # Not by the context manager, which holds in one thread only.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Most tests compile small programs whose speed does not matter."""
    optimized = request.node.get_closest_marker("optimized")
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def slow_unless(fast, names):
    """For `parametrize`: all but some of the names are slow."""
    slow = pytest.mark.slow
    return [n if n in fast else pytest.param(n, marks=slow) for n in names]


# Replicas, made by NumPy since each operation of JAX outside jit is compiled


def make_params(num_replicas=6, seed=0, dtype=jnp.float32):
    """Replicas of a model with a matrix and a scalar."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (num_replicas, 3, 2), "b": (num_replicas,)}
    return {
        name: jnp.asarray(rng.normal(size=shape) + (name == "w"), dtype)
        for name, shape in shapes.items()
    }


def mixed_params():
    """Four replicas with a leaf of each dtype, for `x64`."""
    return {
        "half": jnp.ones((4, 2), jnp.float16),
        "brain": jnp.ones((4, 2), jnp.bfloat16),
        "single": jnp.ones((4,), jnp.float32),
        "double": jnp.arange(12.0, dtype=jnp.float64).reshape(4, 3, 1),
    }


def make_gradients(tree, seed=1):
    """Normal numbers of these shapes and dtypes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def make_both(num_replicas=6, seed=0, dtype=jnp.float32):
    """Params and gradients."""
    params = make_params(num_replicas, seed, dtype)
    return params, make_gradients(params, seed + 1)


def bumpy_gradient(params):
    """The gradient of a bowl with ripples."""
    return jax.tree.map(lambda x: x + jnp.sin(5 * x), params)


def spoil(tree, replica, value):
    """The tree with a value at one weight of a replica, or of several."""
    w = np.array(tree["w"])
    w[replica, 1, 0] = value
    return {**tree, "w": jnp.asarray(w)}


def scaled(factor, tree):
    return jax.tree.map(lambda x: factor * x, tree)


def rows(tree, index):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[index]), tree)


def without(tree, replica):
    return jax.tree.map(lambda x: jnp.asarray(np.delete(x, replica, axis=0)), tree)


# Numbers


def as_matrix(tree):
    """All weights in double precision, one row for each replica."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def rms(tree):
    return np.sqrt(np.mean(as_matrix(tree) ** 2))


def spread(tree):
    weights = as_matrix(tree)
    return np.sqrt(np.mean((weights - weights.mean(axis=0)) ** 2))


def line_search(apply, phi, gradient):
    """||g||^2 / ||J g||^2: exact on the embedding linearised at phi."""
    slope = jax.jvp(apply, (phi,), (gradient,))[1]
    return jnp.divide(*(optax.tree.norm(x, squared=True) for x in (gradient, slope)))


def assert_close(actual, expected, rtol=0.0, atol=0.0):
    """Trees of numbers, in double precision."""

    def compare(path, *pair):
        pair = (np.asarray(x, np.float64) for x in pair)
        path = jax.tree_util.keystr(path)
        np.testing.assert_allclose(*pair, rtol, atol, err_msg=path)

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def assert_equal(actual, expected):
    """Trees of numbers; NaN equals NaN, and zero equals minus zero."""
    assert_close(actual, expected)


def refused(match, fun, *args, error=ValueError, **kwargs):
    """A call ends with an error whose message matches."""
    with pytest.raises(error, match=match):
        fun(*args, **kwargs)


def assert_same_bits(actual, expected):
    """Signed zeros and NaN too."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_stable(old, new):
    """A step left the types of a tree as they were, and every leaf in its place."""
    assert jax.tree.structure(old) == jax.tree.structure(new)
    for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert jax.typeof(x) == jax.typeof(y)  # weak types too
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


# Devices and programs


def make_mesh(axis_type="Explicit", size=2, model_size=2):
    """Axes for the replicas and for what is in one of them."""
    types = (jax.sharding.AxisType[axis_type],) * 2
    return jax.make_mesh((size, model_size), ("replicas", "model"), axis_types=types)


def shard(tree, mesh, model_axis=None):
    """Replicas along one axis of a mesh, and the last axis of a model along another."""

    def place(x):
        last = (*(None,) * (x.ndim - 2), model_axis) if x.ndim > 1 else ()
        spec = PartitionSpec("replicas", *last)
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def start_example(name, *arguments, **environment):
    """An example as a program."""
    root = Path(__file__).parents[1]
    command = [sys.executable, root / "examples" / f"{name}.py", *arguments]
    return subprocess.Popen(
        [str(x) for x in command],
        env={**environment, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
