"""`fit` and `minimize`, whatever the units, bounds, data, closures and dtypes."""

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pranam_optax
from conftest import assert_close, assert_equal
from pranam_optax.fitting import lbfgs, levenberg_marquardt

INF = np.inf
# One program for each kind of closure, number of params, dtype and refinement; bounds,
# units and data are its arguments.
SIZES = {"num_replicas": 8, "num_steps": 20}
exponents = st.integers(-12, 12)
seeds = st.integers(0, 2**31 - 1)


def examples(count):
    return hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


# Functions of the same form, with what they need in various places


@dataclasses.dataclass
class Module:
    center: Any
    unit: Any

    def __call__(self, p):
        return self.unit * jnp.sum(jnp.abs(p - self.center) + jnp.square(p))


def in_arrays(center, unit, dtype):
    return Module(jnp.asarray(center, dtype), jnp.asarray(unit, dtype))


def in_method(center, unit, dtype):
    return in_arrays(center, unit, dtype).__call__


def in_partial(center, unit, dtype):
    fun = jax.tree_util.Partial(lambda p, module: Module(*module)(p))
    return functools.partial(
        fun, module=(center.astype(dtype), np.asarray(unit, dtype))
    )


def in_lambda(center, unit, dtype):
    return lambda p: Module(jnp.asarray(center, dtype), float(unit))(p)


CLOSURES = [in_arrays, in_method, in_partial, in_lambda]


@st.composite
def boxes(draw, size):
    """Bounds of every kind, and a start within them."""
    rng = np.random.default_rng(draw(seeds))
    kinds = np.array(draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    init = rng.normal(size=size) * 10.0 ** draw(st.integers(-3, 3))
    width = np.abs(rng.normal(size=(2, size))) + 0.1
    low = np.where(kinds % 2 == 0, init - width[0], -INF)
    high = np.where(kinds < 2, init + width[1], INF)
    if draw(st.booleans()):  # the start lies on a bound
        init = np.where(np.isfinite(low), low, init)
    return init, low, high


def check_minimize(data, dtype, polish, closures, size):
    init, low, high = data.draw(boxes(size))
    init = jnp.asarray(init, dtype)
    # In low precision rounding may move the start over its bounds.
    low = jnp.minimum(jnp.asarray(low, dtype), init)
    bounds = low, jnp.maximum(jnp.asarray(high, dtype), init)
    hypothesis.assume(np.all(bounds[0] < bounds[1]))
    unit = 2.0 ** round(data.draw(exponents) * np.log2(10))
    center = np.asarray(init, np.float64) + data.draw(st.integers(-1, 1))
    closure = data.draw(st.sampled_from(closures))
    key = data.draw(seeds)

    def run(unit):
        fun = closure(center, unit, dtype)
        given = {"bounds": bounds, "key": key, "polish": polish}
        return fun, pranam_optax.minimize(fun, init, **given, **SIZES)

    fun, result = run(unit)
    assert (result.params.shape, result.params.dtype) == ((size,), dtype)
    rtol = 1e-2 if dtype == "bfloat16" else 1e-5
    assert_close(result.value, float(fun(result.params)), rtol)
    assert np.all(result.replica_params >= bounds[0][None])
    assert np.all(result.replica_params <= bounds[1][None])
    # The start of the user is a candidate; no replica ends above what it has seen.
    assert result.value <= float(fun(init)) * (1 + rtol)
    assert result.value <= np.nanmin(result.history) * (1 + rtol)
    assert not result.unbounded
    assert result.checked
    assert sum(m.num_replicas for m in result.minima) == SIZES["num_replicas"]
    if polish is None:  # the same numbers in another unit
        _, other = run(1.0)
        assert_equal(result.params, other.params)
        assert_equal(result.history, other.history * unit)


def polynomial(p, x):
    return jnp.tensordot(jnp.stack([x**k for k in range(len(p))], axis=1), p, 1)


def check_fit(data, size, shape, dtype):
    """Against linear least squares, in any unit of x and y."""
    rng = np.random.default_rng(data.draw(seeds))
    x_unit, y_unit = (10.0 ** data.draw(exponents) for _ in range(2))
    x = rng.uniform(-1, 1, 12)
    weights = rng.uniform(0.5, 2, (12, *shape))
    powers = x[:, None] ** np.arange(size)
    truth = rng.normal(size=(size, *shape))
    y = powers @ truth + 0.01 * rng.normal(size=(12, *shape))
    known = data.draw(st.booleans())
    # In the model x is in units of x_unit, which scales the params.
    units = y_unit / x_unit ** np.arange(size).reshape(size, *[1] * len(shape))
    hypothesis.assume(np.all((units > 1e-30) & (units < 1e30)))
    size_of_box = jnp.asarray(20 * units + 0 * truth, dtype)
    result = pranam_optax.fit(
        polynomial,
        jnp.asarray(x * x_unit, dtype),
        jnp.asarray(y * y_unit, dtype),
        bounds=(-size_of_box, size_of_box),
        sigma=weights * 0.01 * y_unit if known else np.full_like(y, y_unit),
        key=data.draw(seeds),
        polish=levenberg_marquardt(),
        **SIZES,
    )
    rtol = 1e-6 if dtype == "float64" else 1e-2
    params, errors = result.params / units, result.standard_errors / units
    for index in np.ndindex(shape):
        column = (slice(None), *index)
        sigma = weights[column][:, None] * 0.01 if known else 1.0
        design, target = powers / sigma, y[column] / np.ravel(sigma)
        expected = np.linalg.lstsq(design, target)[0]
        covariance = np.linalg.inv(design.T @ design)
        assert_close(params[column], expected, rtol, rtol)
        assert_close(errors[column], np.sqrt(np.diag(covariance)), 10 * rtol)
    assert result.confirmed


@examples(35)
@hypothesis.given(st.data())
def test_minimize_fast(data):
    check_minimize(data, "float32", None, [in_arrays, in_lambda], 4)


@examples(15)
@hypothesis.given(st.data())
def test_fit_fast(data):
    with jax.enable_x64(True):
        check_fit(data, 2, (), "float64")


# As many kinds of programs in each test as `minimize` keeps.


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("polish", [None, lbfgs()], ids=["coupled", "polished"])
@examples(234)
@hypothesis.given(data=st.data())
def test_minimize(dtype, polish, data):
    size = data.draw(st.sampled_from([1, 4]))
    with jax.enable_x64(dtype == "float64"):
        check_minimize(data, dtype, polish, CLOSURES, size)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@examples(300)
@hypothesis.given(data=st.data())
def test_fit(dtype, data):
    shape = data.draw(st.sampled_from([(), (2,)]))
    with jax.enable_x64(dtype == "float64"):
        check_fit(data, data.draw(st.integers(1, 3)), shape, dtype)
