"""`fit`: parameters, their errors, and what it refuses."""

import dataclasses
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pranam_optax
from pranam_optax.fitting import levenberg_marquardt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import datasets  # noqa: E402
import nist_problems  # noqa: E402

DATA = Path(__file__).parent / "data" / "nist_strd"
SMALL = {"num_replicas": 8, "num_steps": 20}


class Line:
    """One program, whatever the factor."""

    factor = 1.0

    def __call__(self, p, x):
        return (p["slope"] * x + p["offset"]) * self.factor


line = Line()


BOUNDS = {"offset": (-10.0, 10.0), "slope": (-10.0, 10.0)}


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
        x, y = make_line()
        return pranam_optax.fit(line, x, y, bounds=BOUNDS, **SMALL)


# What is found


def test_covariance_of_a_line_by_hand(fitted):
    x, y = make_line()
    design = np.stack([np.ones_like(x), x], axis=1)  # offset, slope
    expected, (rss,), _, _ = np.linalg.lstsq(design, y)
    covariance = np.linalg.inv(design.T @ design) * rss / 10
    np.testing.assert_allclose(fitted.params["offset"], expected[0], rtol=1e-8)
    np.testing.assert_allclose(fitted.params["slope"], expected[1], rtol=1e-8)
    np.testing.assert_allclose(fitted.value, rss, rtol=1e-10)
    np.testing.assert_allclose(fitted.chi_square, rss, rtol=1e-10)
    np.testing.assert_allclose(fitted.covariance, covariance, rtol=1e-7)
    np.testing.assert_allclose(
        fitted.standard_errors["slope"], np.sqrt(covariance[1, 1]), rtol=1e-7
    )
    np.testing.assert_allclose(fitted.residuals, y - design @ expected, atol=1e-8)
    assert fitted.degrees_of_freedom == 10
    assert fitted.minima[0].num_replicas == 8
    assert fitted.confirmed


def test_known_errors_of_the_data_and_params_that_only_occur_together():
    """With sigma the covariance does not look at the residuals; weights count.

    Errors of the params that the data do not determine are infinite.
    """
    x, y = make_line()
    sigma = np.where(x < 1, 0.1, 0.4)
    bounds = {"a": (-10.0, 10.0), "b": (-10.0, 10.0), "slope": (-10.0, 10.0)}

    def model(p, x):
        return p["a"] * 3 + p["b"] * 3 + p["slope"] * x

    result = pranam_optax.fit(model, x, y, bounds=bounds, sigma=sigma, **SMALL)
    design = np.stack([np.ones_like(x), x], axis=1) / sigma[:, None]
    covariance = np.linalg.inv(design.T @ design)
    expected = covariance @ design.T @ (y / sigma)
    np.testing.assert_allclose(result.params["slope"], expected[1], rtol=1e-7)
    np.testing.assert_allclose(result.covariance[2, 2], covariance[1, 1], rtol=1e-7)
    assert result.standard_errors["a"] == result.standard_errors["b"] == np.inf
    assert np.isnan(result.covariance[0, 1])
    rss = np.sum((design @ expected - y / sigma) ** 2)
    np.testing.assert_allclose(result.chi_square, rss, rtol=1e-9)
    np.testing.assert_allclose(
        result.residuals, y - design @ expected * sigma, atol=1e-7
    )


def test_replicas_share_a_minimum_of_zero():
    """Without noise the values are nothing but rounding."""
    x, _ = make_line()
    y = 2 * x - 1
    result = pranam_optax.fit(line, x, y, bounds=BOUNDS, **SMALL)
    assert result.value < 1e-12
    assert result.confirmed
    assert [m.num_replicas for m in result.minima] == [8]


def test_many_data_sets_at_once(fitted):
    x, _ = make_line()
    ys = np.stack([make_line(0)[1], make_line(1, -3.0)[1], make_line(2, 0.5)[1]])
    results = jax.vmap(lambda y: pranam_optax.fit(line, x, y, bounds=BOUNDS, **SMALL))(
        ys
    )
    assert repr(results) == "FitResult(batch of shape (3,))"
    for use in ("degrees_of_freedom", "residuals"):
        with pytest.raises(ValueError, match=r"batch of results, of shape \(3,\)"):
            getattr(results, use)
    with pytest.raises(ValueError, match=r"batch of results, of shape \(3,\)"):
        results.predict(x)
    predictions = jax.vmap(lambda result: result.predict(x))(results)
    for i, y in enumerate(ys):
        slope, offset = np.polyfit(x, y, 1)
        np.testing.assert_allclose(results.params["slope"][i], slope, rtol=1e-7)
        np.testing.assert_allclose(results.params["offset"][i], offset, rtol=1e-7)
    one = jax.tree.map(lambda leaf: leaf[0], results)
    np.testing.assert_allclose(one.covariance, fitted.covariance, rtol=1e-7)
    np.testing.assert_allclose(one.value, fitted.value, rtol=1e-9)
    assert len(one.minima) == 1
    assert one.degrees_of_freedom == 10
    np.testing.assert_allclose(predictions[0], one.predict(x), rtol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.optimized])
        for name in ("Misra1a", "Gauss1")
    ],
)
def test_certified_parameters_and_their_deviations(name):
    problem = nist_problems.load(DATA, [name])[name]
    size = 10 * np.abs(problem.certified)
    steps = 1000 if name == "Gauss1" else 50
    result = pranam_optax.fit(
        problem.model, problem.x, problem.y, bounds=(-size, size), num_steps=steps
    )
    assert nist_problems.digits(name, problem, np.asarray(result.params)) >= 6
    np.testing.assert_allclose(result.value, problem.rss, rtol=1e-9)
    np.testing.assert_allclose(
        np.sort(result.standard_errors), np.sort(problem.deviations), rtol=1e-6
    )


def test_a_robust_loss_leaves_out_an_outlier():
    x, y = make_line()
    y[3] += 50
    result = pranam_optax.fit(
        line,
        x,
        y,
        bounds=BOUNDS,
        sigma=0.1,
        loss=optax.losses.huber_loss,
        num_replicas=8,
        num_steps=300,
        polish=None,
    )
    np.testing.assert_allclose(result.params["slope"], 2, atol=0.1)
    assert result.covariance is None
    assert result.standard_errors is None
    assert "standard error" not in repr(result)


@pytest.mark.parametrize("exponent", [-12, 12])
def test_units_of_the_data_do_not_matter(fitted, exponent):
    unit = 10.0**exponent
    x, y = make_line()
    bounds = jax.tree.map(lambda b: b * unit, BOUNDS)
    result = pranam_optax.fit(line, x, y * unit, bounds=bounds, **SMALL)
    for name in BOUNDS:
        np.testing.assert_allclose(
            result.params[name], fitted.params[name] * unit, rtol=1e-9
        )
        np.testing.assert_allclose(
            result.standard_errors[name], fitted.standard_errors[name] * unit, rtol=1e-6
        )
    np.testing.assert_allclose(
        result.chi_square, fitted.chi_square * unit**2, rtol=1e-9
    )


def test_small_and_large_data_in_single_precision(fitted):
    x, y = make_line()
    params = {name: float(fitted.params[name]) for name in BOUNDS}
    errors = {name: float(fitted.standard_errors[name]) for name in BOUNDS}

    def check(unit, data):
        bounds = jax.tree.map(lambda b: b * unit, BOUNDS)
        result = pranam_optax.fit(line, x, data, bounds=bounds, **SMALL)
        for name in BOUNDS:
            np.testing.assert_allclose(
                result.params[name], params[name] * unit, rtol=1e-4
            )
            np.testing.assert_allclose(
                result.standard_errors[name], errors[name] * unit, rtol=1e-3
            )

    with jax.enable_x64(False):
        check(1e-15, y * 1e-15)
        check(1e15, y * 1e15)
        # Integers beyond int32, of which float32 holds the differences, or not.
        check(5e9, np.round(y * 5e9).astype(np.int64))
        message = "x lies between 1700000000000 and .* float32 .* subtract an offset"
        with pytest.raises(ValueError, match=message):
            pranam_optax.fit(line, 1_700_000_000_000 + np.arange(12), y, bounds=BOUNDS)


def test_explicit_meshes_and_params_of_lower_precision_than_the_data():
    """The current mesh, data and starts may have explicit axes: jax.make_mesh's."""
    mesh = jax.make_mesh((4,), ("data",))
    x, y = make_line()

    def cubic(p, x):
        p = p.astype(x.dtype)
        return p[0] + p[1] * x + p[2] * x**2 + p[3] * x**3

    with jax.set_mesh(mesh):
        init = np.zeros(4, np.float32)
        spread = jax.device_put((x, y, init), jax.P("data"))
        result = pranam_optax.fit(cubic, *spread, **SMALL)
    assert result.params.dtype == np.float32
    np.testing.assert_allclose(result.params, np.polyfit(x, y, 3)[::-1], rtol=1e-4)


def test_what_the_model_closes_over_may_change(fitted, monkeypatch):
    """A chi-square and predictions of one and the same model."""
    x, y = make_line()
    monkeypatch.setattr(Line, "factor", 2.0)
    result = pranam_optax.fit(line, x, y, bounds=BOUNDS, **SMALL)
    np.testing.assert_allclose(
        result.params["slope"] * 2, fitted.params["slope"], rtol=1e-9
    )
    np.testing.assert_allclose(
        result.chi_square, np.sum(result.residuals**2), rtol=1e-9
    )


def test_results_of_a_model_that_cannot_be_pickled_say_so(fitted):
    restored = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(restored.predict(fitted.x), fitted.predict(fitted.x))
    model = jax.tree_util.Partial(lambda p, x: line(p, x))
    with pytest.raises(TypeError, match=r"model .*lambda.* cannot be pickled: define"):
        pickle.dumps(dataclasses.replace(fitted, model=model))
    assert fitted != restored


# The result


def test_fit_result_exports(fitted):
    exported = fitted.to_dict()
    assert exported["degrees_of_freedom"] == 10
    np.testing.assert_allclose(
        exported["standard_errors"]["slope"], fitted.standard_errors["slope"]
    )
    assert np.shape(exported["covariance"]) == (2, 2)
    text = repr(fitted)
    assert "degrees of freedom: 10" in text
    assert "parameter  value" in text
    assert "standard error" in text
    assert list(fitted.table())[3:] == ["offset", "slope"]
    pandas = pytest.importorskip("pandas")
    assert pandas.DataFrame(fitted.table()).shape == (8, 5)


def test_plot_shows_the_fit_and_its_residuals(fitted):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = fitted.plot()
    panels = {axes.get_label(): axes for axes in figure.axes}
    np.testing.assert_allclose(
        panels["residuals"].lines[0].get_ydata(), fitted.residuals
    )
    np.testing.assert_allclose(
        panels["fit"].lines[1].get_ydata(), fitted.predict(fitted.x)
    )
    matplotlib.pyplot.close(figure)


# What is refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"y": np.ones(11)},
            ValueError,
            r"x has shape \(12,\) and y has shape \(11,\)",
        ),
        ({"x": {"t": np.ones(3)}}, ValueError, r"x\['t'\] has shape \(3,\)"),
        (
            {"y": np.append(np.ones(11), np.nan)},
            ValueError,
            r"y must be finite, but 1 of .* \(11,\)",
        ),
        ({"y": 1.0}, ValueError, "expected one or more data on axis 0"),
        ({"sigma": 0.0}, ValueError, "sigma must be positive, .* 0.0"),
        (
            {"sigma": np.linspace(-1, 1, 12)},
            ValueError,
            "sigma must be positive, .* -1.0",
        ),
        ({"sigma": np.ones(5)}, ValueError, r"sigma has shape \(5,\)"),
        ({"sigma": np.inf}, ValueError, "sigma must be finite"),
        (
            {"model": lambda p, x: x[:3]},
            ValueError,
            r"model returns shape \(3,\), expected that of y, \(12,\)",
        ),
        ({"bounds": None}, ValueError, "pass init, or bounds"),
        (
            {"init": {"slope": 1, "offset": 0.0}},
            TypeError,
            r"init\['slope'\] has dtype int",
        ),
        ({"polish": "lm"}, ValueError, "polish must be a function such as"),
        (
            {"polish": levenberg_marquardt(), "loss": jnp.abs},
            ValueError,
            "least squares",
        ),
        ({"y": np.ones(12) + 1j}, TypeError, "y has dtype complex128; stack its real"),
        (
            {"model": lambda p, x: jax.lax.complex(p["slope"] * x, x)},
            TypeError,
            "model returns dtype complex128",
        ),
        (
            {"x": np.append(np.ones(11), np.nan)},
            ValueError,
            r"x must not be NaN, but 1 of its 12 entries",
        ),
    ],
)
def test_bad_input(changes, error, message):
    x, y = make_line()
    options = {"model": line, "x": x, "y": y, "bounds": BOUNDS} | changes
    with pytest.raises(
        (error, ValueError) if error is ValueError else error, match=message
    ):
        pranam_optax.fit(**options)


def test_missing_optimistix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimistix", None)
    x, y = make_line(5)
    with pytest.raises(ImportError, match=r"pip install 'pranam-optax\[fit\]'"):
        pranam_optax.fit(line, x, y, bounds=BOUNDS, num_replicas=4, num_steps=2)


# The problems of NIST


def test_nist_files_are_read():
    problem = nist_problems.load(DATA, ["Gauss1"])["Gauss1"]
    assert problem.x.shape == problem.y.shape == (250,)
    assert problem.starts.shape == (2, 8)
    assert problem.starts[1, 7] == 20.0
    assert problem.y[0] == 97.62227
    residuals = problem.model(problem.certified, problem.x) - problem.y
    np.testing.assert_allclose(np.sum(residuals**2), problem.rss, rtol=1e-9)


def test_digits_look_through_symmetries():
    problem = nist_problems.load(DATA, ["Gauss1"])["Gauss1"]
    b = problem.certified[[0, 1, 5, 6, 7, 2, 3, 4]]
    b[4] *= -1
    assert nist_problems.digits("Gauss1", problem, b) == 11
    assert 3.99 < nist_problems.digits("Gauss1", problem, b * 1.0001) < 4.01
    batch = np.stack([b, b * np.nan])
    np.testing.assert_array_equal(
        nist_problems.digits("Gauss1", problem, batch), [11, 0]
    )
    three = nist_problems.equivalents("Lanczos1", np.arange(6.0))
    assert len(three) == 6  # orders of three terms


def test_missing_and_broken_data_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"Misra1a.dat is missing.* --data-dir"):
        nist_problems.load(tmp_path, ["Misra1a"])
    (tmp_path / "Misra1a.dat").write_text("no data")
    with pytest.raises(SystemExit, match="its checksum differs"):
        nist_problems.load(tmp_path, ["Misra1a"])


def test_data_are_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SHARED", tmp_path / "nowhere")
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(nist_problems, "SOURCE", f"file://{DATA}/")
    assert nist_problems.load(names=["Misra1a"])["Misra1a"].x.shape == (14,)
    monkeypatch.setattr(nist_problems, "SOURCE", "file:///nowhere/")
    nist_problems.load(names=["Misra1a"])  # from the cache
    with pytest.raises(SystemExit, match=r"(?s)could not be downloaded.* --data-dir"):
        nist_problems.load(names=["Gauss1"])
