"""docs/coming_from.md: every row of its tables against SciPy and lmfit."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from test_docs import ROOT, Page

from conftest import assert_close

PAGE = "docs/coming_from.md"


@pytest.fixture(scope="module")
def page():
    try:
        with jax.numpy_dtype_promotion("standard"):
            yield Page(PAGE)
    finally:
        jax.config.update("jax_enable_x64", False)  # the page sets it, as users do


@pytest.fixture(scope="module")
def curve_fit(page):
    def curve(t, size, rate, base):
        return size * np.exp(-rate * t) + base

    def run(**options):
        return scipy.optimize.curve_fit(
            curve, page["t"], page["y"], (1, 1, 0), ftol=1e-15, xtol=1e-15, **options
        )

    return run


@pytest.fixture(scope="module")
def lmfit_result(page):
    lmfit = pytest.importorskip("lmfit")
    model = lmfit.Model(lambda t, size, rate, base: size * np.exp(-rate * t) + base)
    params = model.make_params(size=1.0, rate=1.0, base=0.0)
    strict = {"ftol": 1e-15, "xtol": 1e-15}

    def run(**changes):
        for name, change in changes.items():
            params[name].set(**change)
        return model.fit(page["y"], params.copy(), t=page["t"], fit_kws=strict)

    return run


NAMES = "size", "rate", "base"


def in_order(tree):
    return np.array([float(tree[name]) for name in NAMES])


@pytest.mark.slow
def test_rows_of_curve_fit(page, curve_fit):
    result, known, fit = page["result"], page["known"], page["fit"]
    popt, pcov = curve_fit()
    assert_close(in_order(result.params), popt, 1e-6)
    errors = np.sqrt(np.diag(pcov))
    assert_close(in_order(result.standard_errors), errors, 1e-6)
    order = [result.names.index(name) for name in NAMES]
    assert_close(np.asarray(result.covariance)[np.ix_(order, order)], pcov, 1e-5)
    sigma = {"sigma": np.full(30, 0.1)}
    _, absolute = curve_fit(absolute_sigma=True, **sigma)
    errors = np.sqrt(np.diag(absolute))
    assert_close(in_order(known.standard_errors), errors, 1e-6)
    _, relative = curve_fit(absolute_sigma=False, **sigma)
    ours = in_order(known.standard_errors) * float(known.reduced_chi_square) ** 0.5
    assert_close(ours, np.sqrt(np.diag(relative)), 1e-6)
    y = page["y"] + 5.0 * (np.arange(30) == 20)
    robust = fit(
        *(page["decay"], page["t"], y),
        sigma=0.1,
        bounds=page["box"],
        loss=optax.losses.huber_loss,
        num_replicas=8,
        num_steps=100,
    )
    assert robust.covariance is None
    assert abs(float(robust.params["base"]) - float(result.params["base"])) < 0.1
    started = fit(
        *(page["decay"], page["t"], page["y"]),
        {"size": 1, "rate": 1, "base": 0},
        **page["few"],
    )
    assert_close(in_order(started.params), popt, 1e-5)
    assert_close(result.residuals, page["y"] - result.predict(page["t"]), 0, 1e-12)
    assert int(result.num_evaluations) > 0


@pytest.mark.slow
def test_rows_of_lmfit(page, lmfit_result):
    lmfit, result, fit = pytest.importorskip("lmfit"), page["result"], page["fit"]
    theirs = lmfit_result()
    assert set(result.best_values) == set(theirs.best_values)
    assert_close(in_order(result.best_values), in_order(theirs.best_values), 1e-6)
    for ours, name in [
        (result.reduced_chi_square, "redchi"),
        (result.aic, "aic"),
        (result.bic, "bic"),
        (result.r_squared, "rsquared"),
    ]:
        assert_close(ours, getattr(theirs, name), 1e-6)
    i, j = result.names.index("rate"), result.names.index("base")
    correlation = theirs.params["rate"].correl["base"]
    assert_close(result.correlations[i, j], correlation, 1e-5)
    half = theirs.eval_uncertainty(sigma=0.95, t=page["t"])
    low, high = result.confidence_band(page["t"], 0.95)
    assert_close((high - low) / 2, half, 3e-5)  # theirs from differences
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intervals = lmfit.conf_interval(theirs, theirs, sigmas=[0.95])["rate"]
    expected = [intervals[0][1], intervals[2][1]]
    assert_close(np.array(result.confidence_interval("rate", 0.95)), expected, 1e-5)
    assert "correlations" in result.report()

    data = page["decay"], page["t"], page["y"]
    held = fit(*data, bounds=page["box"], fixed={"base": 0.5}, **page["few"])
    theirs = lmfit_result(base={"value": 0.5, "vary": False})
    assert_close(in_order(held.best_values), in_order(theirs.best_values), 1e-6)
    tie = {"size": lambda p: 2 * p["rate"]}
    tied = fit(*data, bounds=page["box"], fixed=tie, **page["few"])
    theirs = lmfit_result(base={"vary": True}, size={"expr": "2 * rate"})
    assert_close(in_order(tied.best_values), in_order(theirs.best_values), 1e-6)
    error = theirs.params["size"].stderr
    assert_close(tied.standard_errors["size"], error, 1e-5)


@pytest.mark.slow
def test_rows_of_scipy(page):
    def fun(p):
        return jnp.sum((p - 1.0) ** 2) + jnp.sum(1.0 - jnp.cos(3.0 * (p - 1.0)))

    bounds = [(-3, 3)] * 2
    ours = page["minimize"](fun, [0, 0], bounds=bounds, **page["few"])
    theirs = scipy.optimize.minimize(
        fun,
        np.zeros(2),
        bounds=bounds,
        method=page["scipy_method"],
        options=page["few"],
    )
    assert_close(ours.params, np.ones(2), 1e-5)
    assert_close(theirs.x, np.ones(2), 1e-5)
    assert theirs.success
    budget = page["minimize"](fun, None, bounds=(-3, 3), shapes=2, max_evaluations=500)
    assert_close(budget.params, np.ones(2), 1e-4)
    assert int(budget.num_evaluations) >= 500


def test_no_row_is_left_out():
    """A row that is added needs a test: these are the ones above."""
    rows = re.findall(r"^\| (?!---)", (ROOT / PAGE).read_text(), re.MULTILINE)
    assert len(rows) == 11 + 12 + 6
