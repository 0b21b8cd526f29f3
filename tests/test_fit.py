"""`fit`: parameters, their errors, and what it refuses."""

import dataclasses
import functools
import pickle
import sys
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import nist_problems
import numpy as np
import optax
import pytest

import pranam_optax
from conftest import assert_close, assert_equal, refused, scaled
from pranam_optax.fitting import levenberg_marquardt

DATA = Path(__file__).parent / "data" / "nist_strd"
SMALL = {"num_replicas": 8, "num_steps": 20}


class Line:
    """One program, whatever the factor."""

    factor = 1.0

    def __call__(self, p, x):
        return (p["slope"] * x + p["offset"]) * self.factor


line = Line()


BOUNDS = {"offset": (-10.0, 10.0), "slope": (-10.0, 10.0)}
fit_line = functools.partial(pranam_optax.fit, line, bounds=BOUNDS, **SMALL)


def make_line(seed=0, slope=2.0):
    rng = np.random.default_rng(seed)
    x = np.linspace(-1, 3, 12)
    return x, slope * x - 1 + 0.1 * rng.normal(size=12)


@pytest.fixture(autouse=True)
def settings(x64):
    """Six digits and more."""


@pytest.fixture(scope="module")
def fitted():
    with jax.enable_x64(True):
        return fit_line(*make_line())


# What is found


def test_covariance_of_a_line_by_hand(fitted):
    x, y = make_line()
    design = np.stack([np.ones_like(x), x], axis=1)  # offset, slope
    expected, (rss,), _, _ = np.linalg.lstsq(design, y)
    covariance = np.linalg.inv(design.T @ design) * rss / 10
    assert_close(fitted.params, dict(zip(BOUNDS, expected, strict=True)), 1e-8)
    assert_close(fitted.value, rss, 1e-10)
    assert_close(fitted.chi_square, rss, 1e-10)
    assert_close(fitted.covariance, covariance, 1e-7)
    assert_close(fitted.standard_errors["slope"], np.sqrt(covariance[1, 1]), 1e-7)
    assert_close(fitted.residuals, y - design @ expected, 1e-7, 1e-8)
    assert fitted.degrees_of_freedom == 10
    assert fitted.minima[0].num_replicas == 8
    assert fitted.confirmed


def test_known_errors_of_the_data_and_params_that_only_occur_together():
    """With sigma the covariance does not look at the residuals; weights count.

    Errors of the params that the data do not determine are infinite.
    """
    x, y = make_line()
    sigma = np.where(x < 1, 0.1, 0.4)
    bounds = dict.fromkeys(("a", "b", "slope"), (-10.0, 10.0))

    def model(p, x):
        return p["a"] * 3 + p["b"] * 3 + p["slope"] * x

    result = pranam_optax.fit(model, x, y, bounds=bounds, sigma=sigma, **SMALL)
    design = np.stack([np.ones_like(x), x], axis=1) / sigma[:, None]
    covariance = np.linalg.inv(design.T @ design)
    expected = covariance @ design.T @ (y / sigma)
    assert_close(result.params["slope"], expected[1], 1e-7)
    assert_close(result.covariance[2, 2], covariance[1, 1], 1e-7)
    assert result.standard_errors["a"] == result.standard_errors["b"] == np.inf
    assert np.isnan(result.covariance[0, 1])
    assert_close(result.chi_square, np.sum((design @ expected - y / sigma) ** 2), 1e-9)
    assert_close(result.residuals, y - design @ expected * sigma, 1e-7, 1e-7)


def test_replicas_share_a_minimum_of_zero():
    """Without noise the values are nothing but rounding."""
    x, _ = make_line()
    result = fit_line(x, 2 * x - 1)
    assert result.value < 1e-12
    assert result.confirmed
    assert [m.num_replicas for m in result.minima] == [8]


def test_many_data_sets_at_once(fitted):
    x, _ = make_line()
    ys = np.stack([make_line(0)[1], make_line(1, -3.0)[1], make_line(2, 0.5)[1]])
    results = jax.vmap(lambda y: fit_line(x, y))(ys)
    assert repr(results) == "FitResult(batch of shape (3,))"
    message = r"batch of results, of shape \(3,\)"
    refused(message, getattr, results, "residuals")
    refused(message, results.predict, x)
    assert results.degrees_of_freedom == 10
    exported = results.to_dict()
    assert [e["params"]["slope"] for e in exported] == results.params["slope"].tolist()
    slope, offset = np.polyfit(x, ys.T, 1)
    assert_close(results.params, {"slope": slope, "offset": offset}, 1e-7)
    one = jax.tree.map(lambda leaf: leaf[0], results)
    assert_close(one.covariance, fitted.covariance, 1e-7)
    assert_close(one.value, fitted.value, 1e-9)
    assert len(one.minima) == 1
    assert one.degrees_of_freedom == 10
    predictions = jax.vmap(lambda result: result.predict(x))(results)
    assert_close(predictions[0], one.predict(x), 1e-9)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(("name", "num_steps"), [("Misra1a", 50), ("Gauss1", 1000)])
def test_certified_parameters_and_their_deviations(name, num_steps):
    problem = nist_problems.load(DATA, [name])[name]
    size = 10 * np.abs(problem.certified)
    result = pranam_optax.fit(
        problem.model, problem.x, problem.y, bounds=(-size, size), num_steps=num_steps
    )
    assert nist_problems.digits(name, problem, np.asarray(result.params)) >= 6
    assert_close(result.value, problem.rss, 1e-9)
    expected = np.sort(problem.deviations)
    assert_close(np.sort(result.standard_errors), expected, 1e-6)


def test_slow_replicas_are_coupled_half_as_strongly():
    begin = 0.5 + 0.5 * (np.arange(8) + 0.5) / 8

    def coupling(count):
        return jnp.maximum(0.0, 1 - count.astype(float) / 12) * begin

    explicit = fit_line(*make_line(), coupling=coupling, polish=None)
    default = fit_line(*make_line(), polish=None)
    assert_close(default.history, explicit.history, 1e-5)


def test_a_robust_loss_leaves_out_an_outlier():
    x, y = make_line()
    y[3] += 50
    robust = {"loss": optax.losses.huber_loss, "polish": None}
    result = fit_line(x, y, sigma=0.1, num_steps=300, **robust)
    np.testing.assert_allclose(result.params["slope"], 2, atol=0.1)
    assert result.covariance is None
    assert result.standard_errors is None
    assert "standard error" not in repr(result)


def test_small_and_large_data_in_single_precision(fitted):
    x, y = make_line()
    expected = jax.tree.map(float, (fitted.params, fitted.standard_errors))

    def check(unit, data):
        result = fit_line(x, data, bounds=scaled(unit, BOUNDS))
        params, errors = scaled(unit, expected)
        assert_close(result.params, params, 1e-4)
        assert_close(result.standard_errors, errors, 1e-3)

    with jax.enable_x64(False):
        check(1e-15, y * 1e-15)
        check(1e15, y * 1e15)
        # Integers beyond int32, of which float32 holds the differences, or not.
        check(5e9, np.round(y * 5e9).astype(np.int64))
        # Equal numbers that float32 rounds have no differences to lose.
        tenths = fit_line(x, y).predict(np.full(12, 0.1))
        slope, offset = expected[0]["slope"], expected[0]["offset"]
        assert_close(tenths, np.full(12, 0.1 * slope + offset), 1e-3)
        message = "x lies between 1700000000000 and .* float32 .* subtract an offset"
        refused(message, fit_line, 1_700_000_000_000 + np.arange(12), y)


def test_explicit_meshes_and_params_of_lower_precision_than_the_data():
    """The current mesh, data and starts may have explicit axes: jax.make_mesh's."""
    mesh = jax.make_mesh((4,), ("data",))
    x, y = make_line()

    def cubic(p, x):
        p = p.astype(x.dtype)
        return p[0] + p[1] * x + p[2] * x**2 + p[3] * x**3

    with jax.set_mesh(mesh):
        spread = jax.device_put((x, y, np.zeros(4, np.float32)), jax.P("data"))
        result = pranam_optax.fit(cubic, *spread, **SMALL)
    assert result.params.dtype == np.float32
    assert_close(result.params, np.polyfit(x, y, 3)[::-1], 1e-4)


def test_what_the_model_closes_over_may_change(fitted, monkeypatch):
    """A chi-square and predictions of one and the same model."""
    monkeypatch.setattr(Line, "factor", 2.0)
    result = fit_line(*make_line())
    assert_close(result.params["slope"] * 2, fitted.params["slope"], 1e-9)
    assert_close(result.chi_square, np.sum(result.residuals**2), 1e-9)


def test_results_of_a_model_that_cannot_be_pickled_say_so(fitted):
    restored = pickle.loads(pickle.dumps(fitted))
    assert_equal(restored.predict(fitted.x), fitted.predict(fitted.x))
    assert fitted != restored
    model = jax.tree_util.Partial(lambda p, x: line(p, x))
    result = dataclasses.replace(fitted, model=model)
    message = r"function .*lambda.* cannot be pickled: define"
    refused(message, pickle.dumps, result, error=TypeError)


def test_fit_result_exports(fitted):
    exported = fitted.to_dict()
    assert exported["degrees_of_freedom"] == 10
    assert_close(exported["standard_errors"], fitted.standard_errors, 1e-7)
    assert np.shape(exported["covariance"]) == (2, 2)
    for text in ("degrees of freedom: 10", "parameter  value", "standard error"):
        assert text in repr(fitted)
    assert list(fitted.table())[3:] == ["offset", "slope"]
    pandas = pytest.importorskip("pandas")
    assert pandas.DataFrame(fitted.table()).shape == (8, 5)


def test_plot_shows_the_fit_and_its_residuals(fitted):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = fitted.plot()
    lines = {axes.get_label(): axes.lines for axes in figure.axes}
    assert_close(lines["residuals"][0].get_ydata(), fitted.residuals, 1e-7)
    assert_close(lines["fit"][1].get_ydata(), fitted.predict(fitted.x), 1e-7)
    matplotlib.pyplot.close(figure)


# What is refused


NAN_LAST = np.append(np.ones(11), np.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": np.ones(11)}, r"x has shape \(12,\) and y has shape \(11,\)"),
        ({"x": {"t": np.ones(3)}}, r"x\['t'\] has shape \(3,\)"),
        ({"y": NAN_LAST}, r"y must be finite, but 1 of .* \(11,\)"),
        ({"x": NAN_LAST}, r"x must not be NaN, but 1 of its 12 entries"),
        ({"y": 1.0}, "expected one or more data on axis 0"),
        ({"sigma": 0.0}, "sigma must be positive, .* 0.0"),
        ({"sigma": np.linspace(-1, 1, 12)}, "sigma must be positive, .* -1.0"),
        ({"sigma": np.ones(5)}, r"sigma has shape \(5,\)"),
        ({"sigma": np.inf}, "sigma must be finite"),
        (
            {"model": lambda p, x: x[:3]},
            r"model returns shape \(3,\), expected that of y, \(12,\)",
        ),
        ({"bounds": None}, "pass init, or bounds"),
        ({"polish": "lm"}, "polish must be a function such as"),
        ({"polish": levenberg_marquardt(), "loss": jnp.abs}, "least squares"),
    ],
)
def test_bad_input(changes, message):
    x, y = make_line()
    options = {"model": line, "x": x, "y": y, "bounds": BOUNDS} | changes
    refused(message, pranam_optax.fit, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"init": {"slope": np.arange(2), "offset": 0.0}},
            r"init\['slope'\] has dtype int",
        ),
        ({"y": np.ones(12) + 1j}, "y has dtype complex128; stack its real"),
        (
            {"model": lambda p, x: jax.lax.complex(p["slope"] * x, x)},
            "model returns dtype complex128",
        ),
    ],
)
def test_bad_dtypes(changes, message):
    x, y = make_line()
    options = {"model": line, "x": x, "y": y, "bounds": BOUNDS} | changes
    refused(message, pranam_optax.fit, error=TypeError, **options)


def test_missing_optimistix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimistix", None)
    message = r"pip install 'pranam-optax\[fit\]'"
    refused(message, fit_line, *make_line(5), error=ImportError)


# The problems of NIST


def test_nist_files_are_read():
    problem = nist_problems.load(DATA, ["Gauss1"])["Gauss1"]
    assert problem.x.shape == problem.y.shape == (250,)
    assert problem.starts.shape == (2, 8)
    assert problem.starts[1, 7] == 20.0
    assert problem.y[0] == 97.62227
    residuals = problem.model(problem.certified, problem.x) - problem.y
    assert_close(np.sum(residuals**2), problem.rss, 1e-9)


def test_digits_look_through_symmetries():
    problem = nist_problems.load(DATA, ["Gauss1"])["Gauss1"]
    digits = functools.partial(nist_problems.digits, "Gauss1", problem)
    b = problem.certified[[0, 1, 5, 6, 7, 2, 3, 4]]
    b[4] *= -1
    assert digits(b) == 11
    assert 3.99 < digits(b * 1.0001) < 4.01
    assert_equal(digits(np.stack([b, b * np.nan])), [11, 0])
    three = nist_problems.equivalents("Lanczos1", np.arange(6.0))
    assert len(three) == 6  # orders of three terms


def test_data_are_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SHARED", tmp_path / "nowhere")
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(nist_problems, "SOURCE", f"file://{DATA}/")
    assert nist_problems.load(names=["Misra1a"])["Misra1a"].x.shape == (14,)
    monkeypatch.setattr(nist_problems, "SOURCE", "file:///nowhere/")
    nist_problems.load(names=["Misra1a"])  # from the cache
    message = r"(?s)could not be downloaded.* --data-dir"
    refused(message, nist_problems.load, names=["Gauss1"], error=SystemExit)
