"""`fit`: constraints, data frames, ODEs; intervals, bands and goodness of fit."""

import functools
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.experimental.ode import odeint

import pranam_optax
from conftest import assert_close, assert_equal, refused
from pranam_optax.fitting import FitResult, lbfgs

BOUNDS = {"offset": (-10.0, 10.0), "slope": (-10.0, 10.0)}
SMALL = {"num_replicas": 8, "num_steps": 20}
X = np.linspace(-1, 3, 12)
Y = 2 * X - 1 + 0.1 * np.random.default_rng(0).normal(size=12)


def line(p, x):
    return p["slope"] * x + p["offset"]


def decay(p, t):
    return p["size"] * jnp.exp(-p["rate"] * t)


def peaks(p, x):
    distance = (x[:, None] - p["center"][None]) / p["width"]
    return jnp.sum(p["height"][None] * jnp.exp(-(distance**2)), axis=1)


fit_line = functools.partial(pranam_optax.fit, line, X, Y, bounds=BOUNDS, **SMALL)
DECAY = {"size": (0, 10), "rate": (0, 5)}
T = np.linspace(0, 3, 15)
DECAYED = 3 * np.exp(-T) + 0.2 * np.random.default_rng(1).normal(size=15)


@pytest.fixture(autouse=True)
def settings(x64):
    """Six digits and more."""


@pytest.fixture(scope="module")
def fitted():
    with jax.enable_x64(True):
        return fit_line()


@pytest.fixture(scope="module")
def decayed():
    with jax.enable_x64(True):
        return pranam_optax.fit(decay, T, DECAYED, bounds=DECAY, **SMALL)


# Intervals and bands


def test_intervals_and_bands_of_a_line_by_hand(fitted):
    """For a linear model the profile is the t-interval, to rounding."""
    design = np.stack([np.ones_like(X), X], axis=1)
    (offset, slope), (rss,), _, _ = np.linalg.lstsq(design, Y)
    inverse, t = np.linalg.inv(design.T @ design), scipy.stats.t(10)
    for level in (0.68, 0.95):
        half = t.ppf((1 + level) / 2) * np.sqrt(rss / 10 * inverse[1, 1])
        interval = fitted.confidence_interval("slope", level)
        assert_close(interval, (slope - half, slope + half), 1e-7)
    x = np.array([0.0, 5.0])
    rows = np.stack([np.ones_like(x), x], axis=1)
    variance = rss / 10 * np.sum(rows @ inverse * rows, axis=1)
    half = t.ppf(0.975) * np.sqrt(variance)
    low, high = fitted.confidence_band(x)
    assert_close(
        (low, high), tuple(rows @ [offset, slope] + half * s for s in (-1, 1)), 1e-7
    )
    wide = t.ppf(0.975) * np.sqrt(variance + rss / 10)
    assert_close(fitted.prediction_band(x)[1] - high, wide - half, 1e-6)


def test_intervals_with_known_sigma_and_an_end_at_a_bound():
    bounds = BOUNDS | {"slope": (1.99, 10.0)}
    result = fit_line(bounds=bounds, sigma=0.5)
    design = np.stack([np.ones_like(X), X], axis=1) / 0.5
    error = np.sqrt(np.linalg.inv(design.T @ design)[1, 1])
    low, high = result.confidence_interval("slope")
    assert low == 1.99
    best = np.polyfit(X, Y, 1)[0]
    # The others are free, so that the profile is a parabola around the line's slope;
    # its least value is at the bound.
    excess = (1.99 - best) ** 2 if best < 1.99 else 0.0
    expected = best + np.sqrt((scipy.special.ndtri(0.975) * error) ** 2 + excess)
    assert_close(high, expected, 1e-5)
    new = result.prediction_band(X)
    assert np.all(new[1] - new[0] > 2 * 1.95 * 0.5)
    uneven = fit_line(sigma=np.linspace(0.1, 0.4, 12))
    refused("different sigmas: pass", uneven.prediction_band, X)
    uneven.prediction_band(X, sigma=0.2)


def test_profile_and_errors_agree_with_lmfit(decayed):
    lmfit = pytest.importorskip("lmfit")
    params = lmfit.create_params(rate=1.0, size=3.0)
    fitter = lmfit.Minimizer(
        lambda p: p["size"] * np.exp(-p["rate"] * T) - DECAYED, params
    )
    theirs = fitter.minimize(ftol=1e-15, xtol=1e-15)
    for name in DECAY:
        assert_close(decayed.params[name], theirs.params[name].value, 1e-6)
        assert_close(decayed.standard_errors[name], theirs.params[name].stderr, 1e-5)
    assert_close(decayed.chi_square, theirs.chisqr, 1e-9)
    assert_close(decayed.reduced_chi_square, theirs.redchi, 1e-9)
    assert_close(decayed.aic, theirs.aic, 1e-7)
    assert_close(decayed.bic, theirs.bic, 1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intervals = lmfit.conf_interval(fitter, theirs, sigmas=[0.95])
    for name in DECAY:
        expected = [intervals[name][0][1], intervals[name][2][1]]
        assert_close(np.array(decayed.confidence_interval(name)), expected, 1e-5)


def test_goodness_of_fit_by_hand(fitted):
    rss = float(np.sum((Y - np.polyval(np.polyfit(X, Y, 1), X)) ** 2))
    assert_close(fitted.reduced_chi_square, rss / 10, 1e-9)
    assert_close(fitted.r_squared, 1 - rss / np.sum((Y - Y.mean()) ** 2), 1e-9)
    assert_close(fitted.aic, 12 * np.log(rss / 12) + 4, 1e-9)
    known = fit_line(sigma=0.1)
    assert_close(known.aic, rss / 0.01 + 4, 1e-9)
    assert_close(known.bic, rss / 0.01 + 2 * np.log(12), 1e-9)
    correlation = -X.mean() / np.sqrt(np.mean(X**2))
    assert_close(fitted.correlations[0, 1], correlation, 1e-6)
    assert "offset  slope  -0.623" in fitted.report()
    assert fitted.names == ["offset", "slope"]
    assert list(fitted.best_values) == ["offset", "slope"]


def test_intervals_that_cannot_be_had(fitted):
    refused(
        "'slop' is not one of the free parameters: offset, slope",
        fitted.confidence_interval,
        "slop",
    )
    refused("level must lie between 0 and 1", fitted.confidence_interval, "slope", 95)
    robust = fit_line(loss=jnp.abs, polish=None)
    refused("need least squares", robust.confidence_interval, "slope")
    refused("need least squares", robust.confidence_band, X)


# Parameters that are not free


def test_held_and_tied_parameters():
    held = fit_line(fixed={"offset": -1})
    slope = np.sum(X * (Y + 1)) / np.sum(X**2)
    assert_close(held.params, {"offset": -1.0, "slope": slope}, 1e-8)
    assert held.degrees_of_freedom == 11
    assert held.standard_errors["offset"] == 0
    assert held.covariance.shape == (1, 1)
    assert "held" in repr(held)
    # offset = -slope / 2: a line through (1/2, 0).
    tied = fit_line(fixed={"offset": lambda p: -p["slope"] / 2})
    slope = np.sum((X - 0.5) * Y) / np.sum((X - 0.5) ** 2)
    assert_close(tied.params, {"offset": -slope / 2, "slope": slope}, 1e-8)
    errors = tied.standard_errors
    assert_close(errors["offset"], errors["slope"] / 2, 1e-9)
    assert "tied" in tied.report()
    refused("is not one of the free", tied.confidence_interval, "offset")


def test_constraints_that_cannot_be_used():
    refused(r"does not read fixed\['slop'\]", fit_line, fixed={"slop": 1.0})
    refused(r"fixed\['slope'\] must be finite", fit_line, fixed={"slope": np.nan})
    refused("must be a dict", fit_line, fixed="slope", error=TypeError)
    array = functools.partial(pranam_optax.fit, line, X, Y, np.zeros(2))
    refused("needs params that are a dict", array, fixed={"slope": 1.0})
    refused("exchangeable has 'a', which is none", fit_line, exchangeable=("a",))
    refused("along axis 0, but offset has shape", fit_line, exchangeable=("offset",))
    uneven = {"center": ([0, 1], [8, 9]), "width": (1, 3), "height": (0, 3)}
    refused(
        "need equal bounds, but those of center",
        pranam_optax.fit,
        peaks,
        X,
        Y,
        bounds=uneven,
        shapes={"width": 2, "height": 2},
        exchangeable=("center",),
    )


def test_shapes_and_terms_in_order():
    """Numbers as bounds, three terms; all replicas in the one order."""
    x = np.linspace(0, 10, 40)
    truth = {"center": np.array([7.0, 2, 4.5]), "height": np.array([1.0, 3, 2])}
    y = np.asarray(peaks(truth | {"width": 0.8}, x))
    result = pranam_optax.fit(
        peaks,
        x,
        y,
        bounds={"center": (0, 10), "height": (0, 5)},
        shapes={"center": 3, "height": (3,)},
        fixed={"width": 0.8},
        exchangeable=("center", "height"),
        num_replicas=32,
        num_steps=200,
    )
    assert_close(result.params["center"], [2, 4.5, 7], 1e-5)
    assert_close(result.params["height"], [3, 2, 1], 1e-5)
    assert np.all(np.diff(result.replica_params["center"], axis=1) >= 0)
    assert result.minima[0].num_replicas > 4
    refused(
        r"shapes has \['middle'\], which bounds does not have",
        fit_line,
        shapes={"middle": 3},
    )
    refused(
        r"bounds\['slope'\] has shape \(2,\), .* \(3,\)",
        fit_line,
        bounds=BOUNDS | {"slope": (np.zeros(2), 1)},
        shapes={"slope": 3},
    )


def test_a_vector_of_params_by_shape():
    result = pranam_optax.minimize(
        lambda p: jnp.sum((p - 1.0) ** 2), None, bounds=(-5, 5), shapes=3, **SMALL
    )
    assert_close(result.params, np.ones(3), 1e-6)


# What goes in and out


def test_numbers_and_lists_are_taken(fitted):
    result = pranam_optax.fit(
        line, X.tolist(), Y.tolist(), {"slope": 1, "offset": 0}, sigma=[1] * 12, **SMALL
    )
    assert_close(result.params, fitted.params, 1e-6)
    vector = pranam_optax.fit(
        lambda p, x: p[1] * x + p[0], X, Y, [0, 1], bounds=([-9, -9], [9, 9]), **SMALL
    )
    assert_close(vector.params, list(fitted.params.values()), 1e-6)


def test_one_sigma_for_all_data_in_single_precision():
    with jax.enable_x64(False):
        result = fit_line(sigma=0.1)
    assert_close(result.params["slope"], np.polyfit(X, Y, 1)[0], 1e-5)


def test_results_are_read_back(fitted):
    saved = json.loads(json.dumps(fitted.to_dict(data=True)))
    read = FitResult.from_dict(saved, line)
    assert read.report() == fitted.report()
    assert_equal(read.predict(X), fitted.predict(X))
    interval = fitted.confidence_interval("slope")
    assert_close(read.confidence_interval("slope"), interval, 1e-9)
    bare = FitResult.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert "slope      1.98" in repr(bare)
    refused("no model: pass it to from_dict", bare.predict, X)
    refused(r"without data: to_dict\(data=True\)", getattr, bare, "residuals")
    tied = fit_line(fixed={"offset": lambda p: -p["slope"] / 2}).to_dict()
    refused("offset was tied by a function", FitResult.from_dict, tied)
    again = FitResult.from_dict(tied, tied={"offset": lambda p: -p["slope"] / 2})
    assert_close(again.params["offset"], tied["params"]["offset"], 1e-9)


def test_pandas_and_xarray(fitted):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"t": X, "y": Y}, index=np.arange(12) * 10)
    result = pranam_optax.fit(
        lambda p, x: line(p, x["t"]), frame[["t"]], frame["y"], bounds=BOUNDS, **SMALL
    )
    assert_close(result.params, fitted.params, 1e-6)
    predictions = result.predict(frame[["t"]])
    assert list(predictions.index) == list(frame.index)
    assert result.to_dataframe().loc["slope", "value"] == result.best_values["slope"]
    xarray = pytest.importorskip("xarray")
    array = xarray.DataArray(X, dims="t", coords={"t": X})
    low, high = fitted.confidence_band(array)
    assert low.dims == ("t",)
    assert float(low[3]) < float(fitted.predict(array)[3]) < float(high[3])


# Models


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda p, x: np.exp(p["slope"]) * x, "`.*np.exp.*`: .* jnp.exp for np.exp"),
        (lambda p, x: scipy.special.erf(p["slope"]) * x, "jax.scipy.special"),
        (lambda p, x: x if p["slope"] > 0 else -x, "jnp.where"),
        (lambda p, x: math.exp(p["slope"]) * x, "jnp.exp for math.exp"),
    ],
)
def test_models_that_are_not_of_jax(model, message):
    error = rf"line \d+ of .*test_fit_result.py.*{message}"
    refused(error, pranam_optax.fit, model, X, Y, bounds=BOUNDS, error=TypeError)


@pytest.mark.slow
def test_models_of_one_mode_of_differentiation():
    """An adjoint method, and a loop that ends by itself."""
    t = np.linspace(0, 3, 7)
    y = 3 * np.exp(-t) + 0.1 * np.cos(9 * t)
    run = functools.partial(
        pranam_optax.fit, x=t, y=y, bounds=DECAY, num_replicas=4, num_steps=30
    )

    def adjoint(p, t):
        return odeint(lambda y, t, p: -p["rate"] * y, p["size"], t, p)

    def loop(p, t):
        def halve(carry):
            i, y = carry
            return i + 1, y * jnp.exp(-p["rate"] * t / 8)

        return jax.lax.while_loop(lambda c: c[0] < 8, halve, (0, p["size"] + 0 * t))[1]

    expected = run(decay)
    for model in (adjoint, loop):
        result = run(model)
        assert_close(result.params, expected.params, 1e-5)
        assert_close(result.standard_errors, expected.standard_errors, 1e-4)


def test_a_covariance_that_fails_is_a_warning():
    """The fit is kept."""

    @jax.custom_vjp
    def opaque(x):
        return x

    def backward(_, g):
        # As adjoints that allow no batch.
        if isinstance(g, jax.core.Tracer) and type(g).__name__ == "BatchTracer":
            raise NotImplementedError("no batch")
        return (g,)

    opaque.defvjp(lambda x: (x, None), backward)
    with pytest.warns(UserWarning, match="covariance could not be computed"):
        result = pranam_optax.fit(
            lambda p, x: opaque(line(p, x)),
            X,
            Y,
            bounds=BOUNDS,
            polish=lbfgs(),
            **SMALL,
        )
    assert result.covariance is None
    assert_close(result.params["slope"], np.polyfit(X, Y, 1)[0], 1e-6)
