"""For tests and doctests alike: compiled quickly, and doctests as a user's session."""

import os
import subprocess
import sys
import tempfile

import jax
import pytest

# XLA's older kernel generator compiles in a third of the time, where it is still there.
QUICK = "--xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # workers inherit the environment
    flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
    probe = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
    )
    if probe.returncode == 0:
        os.environ["XLA_FLAGS"] = flags
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.TemporaryDirectory()
        config.add_cleanup(cache.cleanup)
        settings = {
            "jax_compilation_cache_dir": cache.name,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        for name, value in settings.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)


@pytest.fixture(autouse=True)
def default_promotion_in_doctests(request):
    if isinstance(request.node, pytest.DoctestItem):
        with jax.numpy_dtype_promotion("standard"):
            yield
    else:
        yield
