"""Strict settings: what passes here passes under any user's configuration."""

import jax
import pytest

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
    optimized = any(map(request.node.get_closest_marker, ("slow", "optimized")))
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def assert_stable():
    """Asserts that a step left the types of a tree as they were."""

    def check(old, new):
        assert jax.tree.structure(old) == jax.tree.structure(new)
        for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert jax.typeof(x) == jax.typeof(y)  # weak types too
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)

    return check
