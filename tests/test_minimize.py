"""`minimize`: what it finds, what it reports, and what it refuses."""

import dataclasses
import functools
import pickle
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import assert_close, assert_equal, refused
from pranam_optax import minimize
from pranam_optax.fitting import (
    MinimizeResult,
    draw_around,
    lbfgs,
    levenberg_marquardt,
    make_coordinates,
    parse_bounds,
)

INF = float("inf")


def camel(p):
    """Two deepest minima of -1.0316 at (0.0898, -0.7127) and its mirror image."""
    x, y = p["x"], p["y"]
    return (4 - 2.1 * x**2 + x**4 / 3) * x**2 + x * y + 4 * (y**2 - 1) * y**2


BOUNDS = {"x": (-3, 3), "y": (-2, 2)}
SMALL = {"num_replicas": 8, "num_steps": 40}
UNPOLISHED = SMALL | {"polish": None}
TINY = {"num_replicas": 2, "num_steps": 1, "polish": None}


def scaled_camel(p, unit=1.0):
    return unit * camel(p)


minimize_camel = functools.partial(minimize, scaled_camel, None, bounds=BOUNDS)


@pytest.fixture(scope="module")
def found():
    return minimize_camel(**SMALL)


@pytest.fixture
def compilations():
    """The number of programs compiled so far, as a function."""
    durations = []

    def listen(name, duration, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(durations)
    jax.monitoring.clear_event_listeners()


def shifted(p, by):
    return (p["x"] - by) ** 2


def minimize_quickly(fun, **kwargs):
    """In programs that are the same for all functions like `shifted`."""
    return minimize(fun, None, bounds={"x": (-3, 3)}, **UNPOLISHED | kwargs)


# What is found


def test_the_deepest_minima_are_found(found):
    assert_close(found.value, -1.0316285, 1e-6)
    assert found.confirmed
    best, mirrored = found.minima[:2]
    assert_close(mirrored.value, best.value, 1e-5)
    for minimum in (best, mirrored):
        sign = np.sign(minimum.params["x"])
        expected = {"x": sign * 0.08984, "y": -sign * 0.71266}
        assert_close(minimum.params, expected, 1e-7, 1e-3)
    assert_close(camel(found.params), found.value, 1e-6)
    assert sum(m.num_replicas for m in found.minima) == 8


def test_no_replica_ends_above_a_value_it_has_seen(found):
    lowest = found.history.min(axis=0)
    assert found.history.shape == (40, 8)
    assert jnp.all(found.replica_values <= lowest + 1e-6)
    assert found.value == found.replica_values.min()
    # Starts (4 per replica), coupled phase and three last looks at least.
    assert found.num_evaluations > 4 * 8 + 40 * 8 + 5 * 8
    assert_close(found.history[0], found.start_values[:8], 1e-6)


def test_what_the_function_closes_over_may_change():
    """Numbers, arrays in place, attributes of methods and of modules, globals."""
    scope = {"t": 1.0, "jnp": jnp}
    exec("def fun(p): return (p['x'] - t) ** 2", scope)
    array = np.zeros([])

    @dataclasses.dataclass
    class Module:
        target: Any

        def __call__(self, p):
            return self.value(p)

        def value(self, p):
            return shifted(p, self.target)

    module, other = Module(jnp.zeros([])), Module(jnp.zeros([]))
    partial, closure = functools.partial, lambda p: shifted(p, array)
    for target in (1.0, 2.0, -1.0):
        scope["t"] = module.target = array[...] = target
        other.target = jnp.asarray(target)
        functions = scope["fun"], closure, module, module.value, other
        for fun in (*functions, partial(shifted, by=target)):
            assert_close(minimize_quickly(fun).params["x"], target, 1e-7, 0.02)


def test_fresh_functions_and_optimizers_compile_nothing(compilations):
    def run(by):
        return minimize_quickly(
            lambda p: shifted(p, by),
            optimizer=optax.adam(optax.cosine_decay_schedule(by / 10, 40)),
            coupling=optax.linear_schedule(by / 3, 0.0, 20),
            key=int(10 * by),
        )

    assert_equal(run(1.0).replica_values, run(1.0).replica_values)
    before = compilations()
    for by in np.linspace(0.1, 2.9, 10).tolist():
        result = run(by)
        assert compilations() == before
        np.testing.assert_allclose(result.params["x"], by, atol=0.5)


def test_callback_sees_every_chunk_and_may_stop(found):
    seen = []

    def callback(progress):
        assert progress.params["x"].shape == (8,)
        seen.append((progress.step, float(progress.values.min())))
        return progress.step >= 20 and len(seen) >= 10 and stop

    stop = False
    run = functools.partial(minimize_camel, callback=callback, **UNPOLISHED)
    whole = run(progress=True)
    assert [step for step, _ in seen] == list(range(2, 41, 2))
    values = [value for _, value in seen]
    assert values == sorted(values, reverse=True)
    assert_close(whole.history, found.history, 1e-3, 1e-3)
    assert_close(whole.value, values[-1], 1e-3)

    seen.clear()
    stop = True
    stopped = run()
    assert len(seen) == 10
    assert_close(stopped.history, whole.history[:20], 1e-6)


def test_starts_where_the_function_is_not_finite_are_replaced():
    def fun(p):  # NaN for half of the starts
        return jnp.sqrt(p) + (p - 1) ** 2

    options = {"polish": None, "num_replicas": 8, "num_steps": 3}
    result = minimize(fun, None, bounds=(-2.0, 2.0), **options)
    assert 4 < np.isnan(result.start_values).sum() < 28
    assert np.isfinite(result.replica_values).all()


def test_start_and_single_bounds_are_kept():
    """The first start is init itself; the minimum at a bound is found there."""

    def fun(p):
        return (p["positive"] + 1) ** 2 + (p["low"] - 3) ** 2 + (p["free"] - 5) ** 2

    init = {"free": 50.0, "low": -1.0, "positive": 7.0}
    bounds = {"free": (-INF, INF), "low": (-INF, 0), "positive": (0.0, INF)}
    result = minimize(fun, init, bounds=bounds, **UNPOLISHED | {"num_steps": 1000})
    assert_close(result.start_values[0], fun(init), 1e-5)
    assert jnp.all(result.replica_params["positive"] >= 0)
    assert jnp.all(result.replica_params["low"] <= 0)
    assert_close(result.params["free"], 5, 0.05)
    assert_close(result.value, 10, 0.01)


def test_params_may_be_callable():
    """An Equinox model is one model's params, not a function that draws them."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Linear("scalar", "scalar", key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jnp.linspace(-1, 1, 20)

    def loss(params):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - 2 * x) ** 2)

    result = jax.eval_shape(lambda p: minimize(loss, p, **UNPOLISHED), params)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)


# Coordinates


LOW, HIGH = np.array([-2.0, 1.0, -INF, -INF]), np.array([4.0, INF, 3.0, INF])
TWO_STARTS = np.array([[0.0, 2.0, 1.0, -0.5], [0.0, 4.0, 3.0, 1.5]])


def test_coordinates_and_back(x64):
    bounds = parse_bounds((LOW, HIGH), jnp.zeros(4))
    first = jnp.array([0.0, 2.0, 1.0, 10.0])
    keys = jax.random.split(jax.random.key(0), 500)
    starts = jax.vmap(lambda key: draw_around(key, first, bounds))(keys)
    assert jnp.all((starts >= LOW[None]) & (starts <= HIGH[None]))
    # Uniform, log-normal about the distances of 1 and 2, normal of deviation 10.
    np.testing.assert_allclose(starts[:, 0].mean(), 1, atol=0.2)
    np.testing.assert_allclose(np.median(starts[:, 1]), 2, atol=0.2)
    np.testing.assert_allclose(np.median(starts[:, 2]), 1, atol=0.3)
    assert_close(starts[:, 3].std(), 10, 0.1)

    coordinates = make_coordinates(starts, bounds)
    assert_close(coordinates.scale[::3], [3, starts[:, 3].std()], 1e-7)
    z = jax.vmap(coordinates.from_params)(starts)
    moved = jnp.abs(jax.vmap(coordinates.to_params)(z) - starts) > 1e-9
    assert moved.mean() < 0.02  # those within 1/1000 of a bound
    assert jnp.all(jnp.isfinite(z))
    assert jnp.all((z.std(axis=0) > 0.5) & (z.std(axis=0) < 2))


def test_coordinates_by_hand():
    starts, z = jnp.asarray(TWO_STARTS), jnp.zeros(4)
    to_params = make_coordinates(starts, parse_bounds((LOW, HIGH), starts[0])).to_params
    assert_close(to_params(z), [1, 1 + np.log(2), 3 - np.log(2), 0.5], 1e-6)
    slope = jax.vmap(jax.grad(lambda z, i: to_params(z)[i]), (None, 0))
    expected = np.diag([3.0, 0.5, 0.5, 1.0])
    assert_close(slope(z, jnp.arange(4)), expected, 1e-7, 1e-6)


def test_leaves_with_bounds_of_one_kind_equal_those_with_mixed_ones():
    starts, first = jnp.asarray(TWO_STARTS), jnp.array([0.0, 2.0, 1.0, 10.0])
    mixed = parse_bounds((LOW, HIGH), first)
    split = parse_bounds(list(zip(LOW, HIGH, strict=True)), list(first))
    together = make_coordinates(starts, mixed)
    apart = make_coordinates(list(starts.T), split)
    z = jnp.array([0.3, -0.7, 1.1, 0.2])
    params = together.to_params(z)
    assert_equal(params, apart.to_params(list(z)))
    assert_equal(together.from_params(params), apart.from_params(list(params)))


def test_params_may_be_tuples_and_lists():
    """Nested pairs are one pair for each leaf where the params are a tuple."""
    for init in ((0.5, 3.0), None):
        bounds = parse_bounds(((0, 1), (2.0, np.float32(5))), init)
        assert (bounds.low, bounds.high) == ((0, 2), (1, 5))
    bounds = parse_bounds([[np.zeros(2), jnp.ones(2)], (2, 5)], [jnp.ones(2), 3.0])
    assert_equal(bounds.high, [jnp.ones(2), 5])


def test_half_precision_and_leaves_without_entries():
    first = {"b": jnp.zeros(3, jnp.bfloat16), "e": jnp.ones((0, 2))}
    bounds = {"b": (-2.0, 2.0), "e": (0.0, 5.0)}
    result = minimize(
        lambda p: jnp.sum(jnp.square(p["b"] - 1)), first, bounds=bounds, **UNPOLISHED
    )
    assert [x.dtype for x in result.params.values()] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(result.params["b"].astype("float32"), 1, atol=0.2)
    assert result.minima[0].params["e"].shape == (0, 2)
    assert result.to_dict()["params"]["e"] == []
    assert list(result.table())[3:] == ["b[0]", "b[1]", "b[2]"]
    draw = jax.vmap(lambda key: draw_around(key, first, parse_bounds(bounds, first)))
    half = draw(jax.random.split(jax.random.key(0), 100))["b"]
    assert half.dtype == jnp.bfloat16
    assert jnp.all(jnp.abs(half) <= 2)


def test_the_start_of_the_user_is_a_candidate_even_on_a_bound():
    options = UNPOLISHED | {"num_steps": 1}
    result = minimize(lambda p: -jnp.sum(p), jnp.ones(3), bounds=(0, 1), **options)
    assert_equal(result.params, np.ones(3))
    assert_equal(result.replica_params[0], np.ones(3))
    assert result.value == -3


def test_a_function_that_falls_without_end_is_reported():
    def run(slope, curvature, center):
        return minimize(
            lambda p: curvature * jnp.sum((p - center) ** 2) - slope * jnp.sum(p),
            lambda key: jax.random.normal(key, (2,)),
            **SMALL,
        )

    result, far = run(1.0, 0.0, 0.0), run(0.0, 1.0, 1e3)
    assert result.unbounded and not result.confirmed
    assert "falls without end" in repr(result)
    assert_close(far.params, 1e3, 1e-7)
    assert far.confirmed and not far.unbounded


def test_units_of_the_function_do_not_matter():
    """L-BFGS has tolerances of its own, which are in units of the gradients."""
    fun = functools.partial(scaled_camel, unit=1e-20)
    result = minimize(fun, None, bounds=BOUNDS, **SMALL)
    assert_close(result.value, -1.0316285e-20, 1e-6)


def test_a_function_may_return_a_number():
    assert minimize_quickly(lambda p: 2.0).value == 2


# The result


def make_result(**changes):
    places = [[1.0, 2.0], [3.0, 4.0], [1.0, 2.001], [jnp.nan, 0.0]]
    fields = {
        "params": jnp.array([1.0, 2.0]),
        "value": jnp.array(0.5),
        "replica_params": jnp.array(places),
        "replica_values": jnp.array([0.5, 0.5, 0.5000001, jnp.nan]),
        "scale": jnp.array([1.0, 1.0]),
        "history": jnp.ones((3, 4)),
        "start_values": jnp.ones(16),
        "num_evaluations": jnp.array(28),
        "unbounded": jnp.array(False),
        "checked": True,
    }
    return MinimizeResult(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "replicas", "confirmed"),
    [
        ({}, [(0, 2), (1,)], True),
        # The same params, but a value that differs, or a coarser unit of distance.
        ({"replica_values": [0.5, 0.5, 0.6, np.nan]}, [(0,), (1,), (2,)], False),
        ({"scale": [1e3, 1e3]}, [(0, 1, 2)], True),
        ({"replica_values": [np.nan] * 4}, [], False),
    ],
)
def test_minima_are_clustered_in_params_and_value(changes, replicas, confirmed):
    result = make_result(**{name: jnp.array(x) for name, x in changes.items()})
    assert [m.replicas for m in result.minima] == replicas
    assert result.confirmed == confirmed


def test_result_exports():
    result = make_result()
    exported = result.to_dict()
    assert exported["params"] == [1.0, 2.0]
    first = {"params": [1.0, 2.0], "value": 0.5, "num_replicas": 2}
    assert exported["minima"][0] == first
    table = result.table()
    assert table["replica"] == [0, 1, 2, 3]
    assert table["minimum"] == [0, 1, 0, -1]
    assert table["x[0]"][:3] == [1.0, 3.0, 1.0]
    assert "found by 3 of 4 replicas, in 2 arrangements\n" in repr(result)
    assert "x[1]       2" in repr(result)
    ones = jnp.ones(40)
    many = make_result(params=ones, replica_params=jnp.ones((4, 40)), scale=ones)
    assert "... 30 more" in repr(many)


def test_parameters_may_have_the_names_of_columns():
    names = {"value": 1.0, "replica": 2.0, "other": 3.0}
    replicas = {name: jnp.full(4, x) for name, x in names.items()}
    table = make_result(params=names, scale=names, replica_params=replicas).table()
    assert table["value"][0] == 0.5
    assert table["params.value"] == [1.0] * 4
    assert list(table)[3:] == ["other", "params.replica", "params.value"]


def test_results_compare_by_identity_and_can_be_pickled():
    result = make_result()
    assert result == result
    assert result != make_result()
    assert result in {result}
    restored = pickle.loads(pickle.dumps(result))
    assert_equal(restored.replica_params, result.replica_params)
    assert repr(restored) == repr(result)


def test_thousands_of_replicas_are_grouped_at_once():
    """In NumPy, not pair by pair in Python, which took 500 times as long as a pass."""
    points = np.random.default_rng(0).normal(size=(2000, 2))
    many = make_result(replica_params=points, replica_values=np.zeros(2000))

    def grouping():
        assert len(many.minima) > 1000
        repr(many)

    def pairs():
        np.abs(points[:, None] - points[None]).max(axis=-1).min()

    def seconds(run):
        start = time.process_time()
        run()
        return time.process_time() - start

    assert seconds(grouping) < 100 * min(seconds(pairs) for _ in range(3))


def camel_x(p):
    return camel({"x": p["x"], "y": p["x"]})


def test_results_say_whether_values_were_checked():
    assert "not checked" in repr(make_result(checked=False))
    assert "not checked" not in repr(make_result())
    run = functools.partial(minimize_quickly, camel_x)
    assert not jax.eval_shape(lambda key: run(key=key), jax.random.key(0)).checked


def test_batch_of_results():
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), make_result())
    assert repr(batch) == "MinimizeResult(batch of shape (2,))"
    refused(r"batch of results, of shape \(2,\)", lambda: batch.minima)
    assert len(jax.tree.map(lambda x: x[0], batch).minima) == 2


def test_plot_shows_curves_and_minima():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = make_result().plot()
    curves, waterfall = figure.axes
    assert len(curves.lines) == 4 + 2
    # Start values first, then four replicas a step.
    np.testing.assert_array_equal(curves.lines[0].get_xdata(), 16 + 4 * np.arange(1, 4))
    values = waterfall.lines[0].get_ydata()
    np.testing.assert_array_equal(values[:3], sorted(values[:3]))
    matplotlib.pyplot.close(figure)


# What is refused


ONE, X = {"x": 1.0, "y": 1.0}, r"bounds\['x'\]"


def x_in(low, high):
    return BOUNDS | {"x": (low, high)}


@pytest.mark.parametrize(
    ("init", "bounds", "message"),
    [
        (ONE, x_in(3, -3), rf"{X} is reversed.* low = 3 "),
        (ONE, {"x": (-3, 3)}, "one pair .* for each leaf"),
        (ONE, {"x": (-3, 3), "y": 2}, r"bounds\['y'\] must be a pair"),
        (ONE, x_in(-3, np.ones(2)), rf"{X} has a side of shape \(2,\)"),
        (ONE | {"y": 7.0}, BOUNDS, r"init\['y'\] .* outside its bounds in 1 of 1 .* 7"),
        (None, None, "pass init, or bounds"),
        (None, x_in(-3, INF), "without init, bounds must be finite"),
        ({}, None, "init has no leaves"),
        (jnp.ones((2, 2)), [(0, 1), (2, 5)], r"bounds has a side .* \(0, 1\)"),
        (jnp.ones(3), [(0, 2)] * 2, r"bounds has a side .* \(0, 2\)"),
        (ONE, x_in(0, None), rf"{X} has a side .* None, .* jnp.inf for no bound"),
        (None, x_in(None, 1), rf"{X} has a side .* None, .* jnp.inf for no bound"),
        (ONE, x_in(0, 1e300), rf"{X} goes beyond the largest float32 .* use jnp.inf"),
        (None, x_in(-3e38, 3e38), rf"{X} is wider than the largest float32"),
        (None, x_in(1, 1 + 1e-12), rf"{X} has sides that float32 cannot tell apart"),
    ],
)
def test_bad_starts_and_bounds(init, bounds, message):
    refused(message, minimize, camel, init, bounds=bounds)


def draw_nan(key):
    x = jax.random.normal(key, (3,))
    return {"x": jnp.where(x > 1.5, jnp.nan, x)}


def draw_above(key):
    return 5 + jax.random.uniform(key)


def squares(p):
    return jnp.sum(p["x"] ** 2)


K = r"init\(key\)"
NAN_STARTS = rf"{K}\['x'\] .* is NaN or infinite in \d of 24 entries"
TWO, INFINITE = jnp.ones(2), {"x": jnp.array([1.0, INF])}


@pytest.mark.parametrize(
    ("fun", "init", "bounds", "message"),
    [
        (lambda p: p, TWO, None, r"must return a scalar, .* shape \(2,\)"),
        (jnp.argmax, TWO, None, r"must return a real float, .* int32"),
        (jnp.sum, INFINITE, None, r"init\['x'\] .* in 1 of 2 entries"),
        (squares, draw_nan, None, NAN_STARTS),
        (jnp.square, draw_above, (0.0, 1.0), rf"{K} .* outside its bounds in 8 of"),
        (jnp.log, None, (-2.0, -1.0), "any of the 8 random starts: .* nan at -"),
    ],
)
def test_bad_functions_and_random_starts(fun, init, bounds, message):
    refused(message, minimize, fun, init, bounds=bounds, **TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_replicas": 0}, "num_replicas must be a positive int"),
        ({"num_steps": 1.5}, "num_steps must be a positive int"),
        ({"num_steps": True}, "num_steps must be a positive int, got True"),
        ({"polish": "lbfgs"}, "polish must be a function such as fitting.lbfgs"),
        ({"polish": levenberg_marquardt()}, "levenberg_marquardt is for least squares"),
        ({"coupling": 2.0}, "coupling must be a number in"),
    ],
)
def test_bad_options(options, message):
    refused(message, minimize_camel, **options)


def test_arrays_of_integers_are_no_params():
    message, init = r"init\['x'\] has dtype int", ONE | {"x": np.array(1)}
    refused(message, minimize, camel, init, bounds=BOUNDS, error=TypeError)


def test_numbers_of_steps_may_come_from_numpy():
    assert lbfgs(np.int64(3)) == lbfgs(3)
    refused("max_steps must be a positive int, got 0", lbfgs, 0)
    counts = {name: np.int32(x) for name, x in SMALL.items()}
    result = minimize_quickly(functools.partial(shifted, by=0.5), **counts)
    assert result.history.shape == (40, 8)


def test_callback_needs_concrete_values():
    message = "callback and progress cannot be used under"
    run = functools.partial(minimize_camel, callback=print, **SMALL)
    refused(message, jax.eval_shape, lambda key: run(key=key), jax.random.key(0))


def test_the_optimizer_and_the_coupling_can_be_chosen():
    """Independent replicas under plain SGD in the coordinates, by hand."""
    result = minimize(
        lambda p: jnp.sum(p**2),
        lambda key: jax.random.normal(key, (1,)),
        optimizer=optax.sgd(0.25),
        coupling=0.0,
        **{"num_replicas": 4, "num_steps": 2, "polish": None},
    )
    starts = np.sqrt(np.asarray(result.history[0]))
    # One parameter: every unit gradient has magnitude 1, and so has its RMS.
    expected = np.abs(starts - 0.25 * float(result.scale[0]))
    assert_close(np.sqrt(result.history[1]), expected, 1e-3)
