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

import pranam_optax
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


def scaled_camel(p, unit=1.0):
    return unit * camel(p)


@pytest.fixture(scope="module")
def found():
    return pranam_optax.minimize(scaled_camel, None, bounds=BOUNDS, **SMALL)


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
    return pranam_optax.minimize(
        fun, None, bounds={"x": (-3, 3)}, **UNPOLISHED, **kwargs
    )


# What is found


def test_the_deepest_minima_are_found(found):
    np.testing.assert_allclose(found.value, -1.0316285, rtol=1e-6)
    assert found.confirmed
    best, mirrored = found.minima[:2]
    np.testing.assert_allclose(mirrored.value, best.value, rtol=1e-5)
    for minimum in (best, mirrored):
        sign = np.sign(minimum.params["x"])
        np.testing.assert_allclose(minimum.params["x"], sign * 0.08984, atol=1e-3)
        np.testing.assert_allclose(minimum.params["y"], -sign * 0.71266, atol=1e-3)
    np.testing.assert_allclose(camel(found.params), found.value, rtol=1e-6)
    assert sum(m.num_replicas for m in found.minima) == 8


def test_no_replica_ends_above_a_value_it_has_seen(found):
    lowest = found.history.min(axis=0)
    assert found.history.shape == (40, 8)
    assert jnp.all(found.replica_values <= lowest + 1e-6)
    assert found.value == found.replica_values.min()
    # Starts (4 per replica), coupled phase and three last looks at least.
    assert found.num_evaluations > 4 * 8 + 40 * 8 + 5 * 8
    np.testing.assert_allclose(found.history[0], found.start_values[:8], rtol=1e-6)


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

    module = Module(jnp.zeros([]))
    for target in (1.0, 2.0, -1.0):
        scope["t"] = module.target = target
        array[...] = target
        for fun in (
            scope["fun"],
            lambda p: shifted(p, array),
            module,
            module.value,
            functools.partial(shifted, by=target),
        ):
            found = minimize_quickly(fun).params["x"]
            np.testing.assert_allclose(found, target, atol=0.02)
        module.target = jnp.asarray(target)
        np.testing.assert_allclose(
            minimize_quickly(module).params["x"], target, atol=0.02
        )


def test_fresh_functions_and_optimizers_compile_nothing(compilations):
    def run(by):
        return minimize_quickly(
            lambda p: shifted(p, by),
            optimizer=optax.adam(optax.cosine_decay_schedule(by / 10, 40)),
            coupling=optax.linear_schedule(by / 3, 0.0, 20),
            key=int(10 * by),
        )

    first, same = run(1.0), run(1.0)
    np.testing.assert_array_equal(first.replica_values, same.replica_values)
    before = compilations()
    others = [run(by) for by in np.linspace(0.1, 2.9, 10).tolist()]
    assert compilations() == before
    for by, result in zip(np.linspace(0.1, 2.9, 10), others, strict=True):
        np.testing.assert_allclose(result.params["x"], by, atol=0.5)


def test_callback_sees_every_chunk_and_may_stop(found):
    seen = []

    def callback(progress):
        assert progress.params["x"].shape == (8,)
        seen.append((progress.step, float(progress.values.min())))
        return progress.step >= 20 and len(seen) >= 10 and stop

    stop = False
    whole = pranam_optax.minimize(
        scaled_camel,
        None,
        bounds=BOUNDS,
        callback=callback,
        progress=True,
        **UNPOLISHED,
    )
    assert [step for step, _ in seen] == list(range(2, 41, 2))
    values = [value for _, value in seen]
    assert values == sorted(values, reverse=True)
    np.testing.assert_allclose(whole.history, found.history, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(whole.value, values[-1], rtol=1e-3)

    seen.clear()
    stop = True
    stopped = pranam_optax.minimize(
        scaled_camel, None, bounds=BOUNDS, callback=callback, **UNPOLISHED
    )
    assert len(seen) == 10
    assert stopped.history.shape == (20, 8)
    np.testing.assert_allclose(stopped.history, whole.history[:20], rtol=1e-6)


def test_starts_where_the_function_is_not_finite_are_replaced():
    def fun(p):  # NaN for half of the starts
        return jnp.sqrt(p) + (p - 1) ** 2

    result = pranam_optax.minimize(
        fun, None, bounds=(-2.0, 2.0), polish=None, num_replicas=8, num_steps=3
    )
    failed = np.isnan(result.start_values)
    assert 4 < failed.sum() < 28
    assert np.isfinite(result.replica_values).all()


def test_start_and_single_bounds_are_kept():
    """The first start is init itself; the minimum at a bound is found there."""

    def fun(p):
        return (p["positive"] + 1) ** 2 + (p["low"] - 3) ** 2 + (p["free"] - 5) ** 2

    init = {"free": 50.0, "low": -1.0, "positive": 7.0}
    bounds = {"free": (-INF, INF), "low": (-INF, 0), "positive": (0.0, INF)}
    result = pranam_optax.minimize(
        fun, init, bounds=bounds, num_replicas=8, num_steps=1000, polish=None
    )
    np.testing.assert_allclose(result.start_values[0], fun(init), rtol=1e-5)
    assert jnp.all(result.replica_params["positive"] >= 0)
    assert jnp.all(result.replica_params["low"] <= 0)
    np.testing.assert_allclose(result.params["free"], 5, rtol=0.05)
    np.testing.assert_allclose(result.value, 10, rtol=0.01)


def test_params_may_be_callable():
    """An Equinox model is one model's params, not a function that draws them."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Linear("scalar", "scalar", key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jnp.linspace(-1, 1, 20)

    def loss(params):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - 2 * x) ** 2)

    result = jax.eval_shape(
        lambda params: pranam_optax.minimize(loss, params, **UNPOLISHED), params
    )
    assert jax.tree.structure(result.params) == jax.tree.structure(params)


# Coordinates


LOW, HIGH = np.array([-2.0, 1.0, -INF, -INF]), np.array([4.0, INF, 3.0, INF])


def test_coordinates_and_back(x64):
    bounds = parse_bounds((LOW, HIGH), jnp.zeros(4))
    key = jax.random.key(0)
    starts = jax.vmap(
        lambda key: draw_around(key, jnp.array([0.0, 2.0, 1.0, 10.0]), bounds)
    )(jax.random.split(key, 500))
    assert jnp.all((starts >= LOW[None]) & (starts <= HIGH[None]))
    # Uniform, log-normal about the distances of 1 and 2, normal of deviation 10.
    np.testing.assert_allclose(starts[:, 0].mean(), 1, atol=0.2)
    np.testing.assert_allclose(np.median(starts[:, 1]), 2, atol=0.2)
    np.testing.assert_allclose(np.median(starts[:, 2]), 1, atol=0.3)
    np.testing.assert_allclose(starts[:, 3].std(), 10, rtol=0.1)

    coordinates = make_coordinates(starts, bounds)
    np.testing.assert_allclose(coordinates.scale[0], 3)
    np.testing.assert_allclose(coordinates.scale[3], starts[:, 3].std())
    z = jax.vmap(coordinates.from_params)(starts)
    moved = jnp.abs(jax.vmap(coordinates.to_params)(z) - starts) > 1e-9
    assert moved.mean() < 0.02  # those within 1/1000 of a bound
    assert jnp.all(jnp.isfinite(z))
    assert jnp.all((z.std(axis=0) > 0.5) & (z.std(axis=0) < 2))


@pytest.mark.parametrize(
    ("z", "expected"), [(0.0, [1, 1 + np.log(2), 3 - np.log(2), 0.5])]
)
def test_coordinates_by_hand(z, expected):
    starts = jnp.array([[0.0, 2.0, 1.0, -0.5], [0.0, 4.0, 3.0, 1.5]])
    coordinates = make_coordinates(starts, parse_bounds((LOW, HIGH), starts[0]))
    z = jnp.full(4, z)
    np.testing.assert_allclose(coordinates.to_params(z), expected, rtol=1e-6)
    slope = jax.vmap(jax.grad(lambda z, i: coordinates.to_params(z)[i]), (None, 0))
    expected = np.diag([3.0, 0.5, 0.5, 1.0])
    np.testing.assert_allclose(slope(z, jnp.arange(4)), expected, atol=1e-6)


def test_leaves_with_bounds_of_one_kind_equal_those_with_mixed_ones():
    first = jnp.array([0.0, 2.0, 1.0, 10.0])
    starts = jnp.array([[0.0, 2.0, 1.0, -0.5], [0.0, 4.0, 3.0, 1.5]])
    mixed = parse_bounds((LOW, HIGH), first)
    split = parse_bounds(list(zip(LOW, HIGH, strict=True)), list(first))
    together = make_coordinates(starts, mixed)
    apart = make_coordinates(list(starts.T), split)
    z = jnp.array([0.3, -0.7, 1.1, 0.2])
    params = together.to_params(z)
    np.testing.assert_array_equal(params, apart.to_params(list(z)))
    np.testing.assert_array_equal(
        together.from_params(params), apart.from_params(list(params))
    )


def test_params_may_be_tuples_and_lists():
    """Nested pairs are one pair for each leaf where the params are a tuple."""
    for init in ((0.5, 3.0), None):
        bounds = parse_bounds(((0, 1), (2.0, np.float32(5))), init)
        assert bounds.low == (0, 2)
        assert bounds.high == (1, 5)
    bounds = parse_bounds([[np.zeros(2), jnp.ones(2)], (2, 5)], [jnp.ones(2), 3.0])
    np.testing.assert_array_equal(bounds.high[0], [1, 1])
    assert bounds.high[1] == 5


def test_half_precision_and_leaves_without_entries():
    first = {"b": jnp.zeros(3, jnp.bfloat16), "e": jnp.ones((0, 2))}
    bounds = {"b": (-2.0, 2.0), "e": (0.0, 5.0)}
    result = pranam_optax.minimize(
        lambda p: jnp.sum(jnp.square(p["b"] - 1)), first, bounds=bounds, **UNPOLISHED
    )
    for name, leaf in first.items():
        assert result.params[name].dtype == leaf.dtype
    np.testing.assert_allclose(result.params["b"].astype("float32"), 1, atol=0.2)
    assert result.minima[0].params["e"].shape == (0, 2)
    assert result.to_dict()["params"]["e"] == []
    assert list(result.table())[3:] == ["b[0]", "b[1]", "b[2]"]
    half = jax.vmap(lambda key: draw_around(key, first, parse_bounds(bounds, first)))(
        jax.random.split(jax.random.key(0), 100)
    )
    assert half["b"].dtype == jnp.bfloat16
    assert jnp.all(jnp.abs(half["b"]) <= 2)


def test_the_start_of_the_user_is_a_candidate_even_on_a_bound():
    result = pranam_optax.minimize(
        lambda p: -jnp.sum(p),
        jnp.ones(3),
        bounds=(0, 1),
        **UNPOLISHED | {"num_steps": 1},
    )
    np.testing.assert_array_equal(result.params, 1)
    np.testing.assert_array_equal(result.replica_params[0], 1)
    assert result.value == -3


def test_a_function_that_falls_without_end_is_reported():
    def run(slope, curvature, center):
        return pranam_optax.minimize(
            lambda p: curvature * jnp.sum((p - center) ** 2) - slope * jnp.sum(p),
            lambda key: jax.random.normal(key, (2,)),
            **SMALL,
        )

    result = run(1.0, 0.0, 0.0)
    assert result.unbounded
    assert not result.confirmed
    assert "falls without end" in repr(result)
    far = run(0.0, 1.0, 1e3)
    np.testing.assert_allclose(far.params, 1e3)
    assert not far.unbounded
    assert far.confirmed


def test_units_of_the_function_do_not_matter():
    """L-BFGS has tolerances of its own, which are in units of the gradients."""
    result = pranam_optax.minimize(
        functools.partial(scaled_camel, unit=1e-20), None, bounds=BOUNDS, **SMALL
    )
    np.testing.assert_allclose(result.value, -1.0316285e-20, rtol=1e-6)


def test_a_function_may_return_a_number():
    result = minimize_quickly(lambda p: 2.0)
    assert result.value == 2


# The result


def make_result(**changes):
    fields = {
        "params": jnp.array([1.0, 2.0]),
        "value": jnp.array(0.5),
        "replica_params": jnp.array(
            [[1.0, 2.0], [3.0, 4.0], [1.0, 2.001], [jnp.nan, 0.0]]
        ),
        "replica_values": jnp.array([0.5, 0.5, 0.5000001, jnp.nan]),
        "scale": jnp.array([1.0, 1.0]),
        "history": jnp.ones((3, 4)),
        "start_values": jnp.ones(16),
        "num_evaluations": jnp.array(28),
        "unbounded": jnp.array(False),
        "checked": True,
    }
    return MinimizeResult(**fields | changes)


def test_minima_are_clustered_in_params_and_value():
    result = make_result()
    assert [m.replicas for m in result.minima] == [(0, 2), (1,)]
    assert result.confirmed
    # The same params, but a value that differs, or a coarser unit of distance.
    higher = make_result(replica_values=jnp.array([0.5, 0.5, 0.6, jnp.nan]))
    assert [m.replicas for m in higher.minima] == [(0,), (1,), (2,)]
    assert not higher.confirmed
    coarse = make_result(scale=jnp.array([1e3, 1e3]))
    assert [m.replicas for m in coarse.minima] == [(0, 1, 2)]
    nothing = make_result(replica_values=jnp.full(4, jnp.nan))
    assert nothing.minima == []
    assert not nothing.confirmed


def test_result_exports():
    result = make_result()
    exported = result.to_dict()
    assert exported["params"] == [1.0, 2.0]
    assert exported["minima"][0] == {
        "params": [1.0, 2.0],
        "value": 0.5,
        "num_replicas": 2,
    }
    table = result.table()
    assert table["replica"] == [0, 1, 2, 3]
    assert table["minimum"] == [0, 1, 0, -1]
    assert table["x[0]"][:3] == [1.0, 3.0, 1.0]
    text = repr(result)
    assert "found by 2 of 4 replicas" in text
    assert "x[1]       2" in text
    many = make_result(
        params=jnp.ones(40), replica_params=jnp.ones((4, 40)), scale=jnp.ones(40)
    )
    assert "... 10 more" in repr(many)


def test_parameters_may_have_the_names_of_columns():
    names = {"value": 1.0, "replica": 2.0, "other": 3.0}
    result = make_result(
        params=names,
        scale=names,
        replica_params={k: jnp.full(4, v) for k, v in names.items()},
    )
    table = result.table()
    assert table["value"][0] == 0.5
    assert table["params.value"] == [1.0] * 4
    assert list(table)[3:] == ["other", "params.replica", "params.value"]


def test_results_compare_by_identity_and_can_be_pickled():
    result = make_result()
    assert result == result
    assert result != make_result()
    assert result in {result}
    restored = pickle.loads(pickle.dumps(result))
    np.testing.assert_array_equal(restored.replica_params, result.replica_params)
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


def test_results_say_whether_values_were_checked():
    unchecked = make_result(checked=False)
    assert "not checked" in repr(unchecked)
    assert "not checked" not in repr(make_result())
    traced = jax.eval_shape(
        lambda key: minimize_quickly(camel_x, key=key), jax.random.key(0)
    )
    assert not traced.checked


def camel_x(p):
    return camel({"x": p["x"], "y": p["x"]})


def test_batch_of_results():
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), make_result())
    assert repr(batch) == "MinimizeResult(batch of shape (2,))"
    with pytest.raises(ValueError, match=r"batch of results, of shape \(2,\)"):
        batch.minima  # noqa: B018
    one = jax.tree.map(lambda x: x[0], batch)
    assert len(one.minima) == 2


def test_plot_shows_curves_and_minima():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = make_result().plot()
    curves, minima = figure.axes
    assert len(curves.lines) == 4 + 2
    assert len(minima.collections[0].get_offsets()) == 2
    matplotlib.pyplot.close(figure)


# What is refused


@pytest.mark.parametrize(
    ("init", "bounds", "error", "message"),
    [
        (
            {"x": 1.0, "y": 1.0},
            {"x": (3, -3), "y": (-2, 2)},
            ValueError,
            r"bounds\['x'\] is reversed.* low = 3 ",
        ),
        ({"x": 1.0, "y": 1.0}, {"x": (-3, 3)}, ValueError, "one pair .* for each leaf"),
        (
            {"x": 1.0, "y": 1.0},
            {"x": (-3, 3), "y": 2},
            ValueError,
            r"bounds\['y'\] must be a pair",
        ),
        (
            {"x": 1.0, "y": 1.0},
            {"x": (-3, np.ones(2)), "y": (0, 1)},
            ValueError,
            r"bounds\['x'\] has a side of shape \(2,\)",
        ),
        (
            {"x": 1.0, "y": 7.0},
            BOUNDS,
            ValueError,
            r"init\['y'\] .* outside its bounds in 1 of 1 .* 7",
        ),
        ({"x": 1, "y": 1.0}, BOUNDS, TypeError, r"init\['x'\] has dtype int"),
        (None, None, ValueError, "pass init, or bounds"),
        (
            None,
            {"x": (-3, INF), "y": (-2, 2)},
            ValueError,
            "without init, bounds must be finite",
        ),
        ({}, None, ValueError, "init has no leaves"),
        # SciPy's form, which could be read as a pair of rows.
        (
            jnp.array([0.5, 3.0]),
            [(0, 1), (2, 5)],
            ValueError,
            r"bounds has a side .* \(0, 1\), .* \(low_array, high_array\)",
        ),
        (
            jnp.ones(3),
            [(0, 2)] * 3,
            ValueError,
            r"bounds must be a pair .* one pair for the whole leaf",
        ),
        (
            {"x": 1.0, "y": 1.0},
            {"x": (0, None), "y": (0, 2)},
            ValueError,
            r"bounds\['x'\] has a side .* None, .* jnp.inf for no bound",
        ),
        (
            None,
            {"x": (None, 1), "y": (0, 2)},
            ValueError,
            r"bounds\['x'\] has a side .* None, .* jnp.inf for no bound",
        ),
        (
            {"x": 1.0, "y": 1.0},
            {"x": (0, 1e300), "y": (0, 2)},
            ValueError,
            r"bounds\['x'\] goes beyond the largest float32 .* use jnp.inf",
        ),
        (
            None,
            {"x": (-3e38, 3e38), "y": (0, 2)},
            ValueError,
            r"bounds\['x'\] is wider than the largest float32",
        ),
        (
            None,
            {"x": (1, 1 + 1e-12), "y": (0, 2)},
            ValueError,
            r"bounds\['x'\] has sides that float32 cannot tell apart",
        ),
    ],
)
def test_bad_starts_and_bounds(init, bounds, error, message):
    with pytest.raises(error, match=message):
        pranam_optax.minimize(camel, init, bounds=bounds)


def test_starts_that_are_not_finite():
    def init(key):
        x = jax.random.normal(key, (3,))
        return {"x": jnp.where(x > 1.5, jnp.nan, x)}

    message = r"init\(key\)\['x'\] .* is NaN or infinite in \d of 24 entries"
    with pytest.raises(ValueError, match=message):
        pranam_optax.minimize(
            lambda p: jnp.sum(p["x"] ** 2),
            init,
            num_replicas=2,
            num_steps=1,
            polish=None,
        )
    with pytest.raises(ValueError, match=r"init\['x'\] .* in 1 of 2 entries"):
        pranam_optax.minimize(jnp.sum, {"x": jnp.array([1.0, jnp.inf])})


def test_bad_functions():
    with pytest.raises(ValueError, match=r"must return a scalar, .* shape \(2,\)"):
        pranam_optax.minimize(lambda p: p, jnp.ones(2))
    with pytest.raises(ValueError, match=r"must return a real float, .* int32"):
        pranam_optax.minimize(lambda p: jnp.argmax(p), jnp.ones(2))


def test_nan_at_every_start_says_how_many_and_where():
    options = {"polish": None, "num_replicas": 2, "num_steps": 1}
    with pytest.raises(ValueError, match=r"any of the 8 random starts: .* nan at -"):
        pranam_optax.minimize(jnp.log, None, bounds=(-2.0, -1.0), **options)


def test_random_starts_outside_the_bounds():
    options = {"polish": None, "num_replicas": 2, "num_steps": 1}
    with pytest.raises(ValueError, match=r"init\(key\) .* outside its bounds in 8 of"):
        pranam_optax.minimize(
            jnp.square,
            lambda key: 5 + jax.random.uniform(key),
            bounds=(0.0, 1.0),
            **options,
        )


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
    with pytest.raises(ValueError, match=message):
        pranam_optax.minimize(camel, None, bounds=BOUNDS, **options)


def test_numbers_of_steps_may_come_from_numpy():
    assert lbfgs(np.int64(3)) == lbfgs(3)
    with pytest.raises(ValueError, match="max_steps must be a positive int, got 0"):
        lbfgs(0)
    counts = {
        name: np.int32(UNPOLISHED[name]) for name in ("num_replicas", "num_steps")
    }
    result = pranam_optax.minimize(
        functools.partial(shifted, by=0.5),
        None,
        bounds={"x": (-3, 3)},
        polish=None,
        **counts,
    )
    assert result.history.shape == (40, 8)


def test_callback_needs_concrete_values():
    def run(key):
        return pranam_optax.minimize(
            camel, None, bounds=BOUNDS, key=key, callback=print, **SMALL
        )

    with pytest.raises(ValueError, match="callback and progress cannot be used under"):
        jax.eval_shape(run, jax.random.key(0))


def test_the_optimizer_and_the_coupling_can_be_chosen():
    """Independent replicas under plain SGD in the coordinates, by hand."""
    result = pranam_optax.minimize(
        lambda p: jnp.sum(p**2),
        lambda key: jax.random.normal(key, (1,)),
        num_replicas=4,
        num_steps=2,
        optimizer=optax.sgd(0.25),
        coupling=0.0,
        polish=None,
    )
    starts = np.sqrt(np.asarray(result.history[0]))
    # One parameter: every unit gradient has magnitude 1, and so has its RMS.
    expected = np.abs(starts - 0.25 * float(result.scale[0]))
    np.testing.assert_allclose(np.sqrt(result.history[1]), expected, rtol=1e-3)
