"""`minimize` with a budget: runs that restart until it is spent."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pranam_optax
from conftest import assert_equal, refused
from pranam_optax import fitting, problems
from pranam_optax.fitting._evolve import begin_population, evolve
from pranam_optax.fitting._sweep import Line, sweep

LOW, HIGH = jnp.full(4, -5.0), jnp.full(4, 5.0)


def landscape(ripples=0.0, needle=0.0, wall=-np.inf):
    """A bowl, perhaps with ripples or a needle, or not a number in a part of the box.

    They differ in numbers alone, so that they are compiled together.
    """

    def fun(x):
        y = x - 1.3
        bowl = jnp.sum(y**2 + ripples * (1 - jnp.cos(2 * jnp.pi * y)))
        hole = needle * jnp.exp(-100 * jnp.sum((x - 4.0) ** 2))
        return jnp.where(x[0] > wall, bowl - hole, jnp.nan)

    return fun


sphere, rastrigin = landscape(), landscape(ripples=10.0)


def plateaus(x):
    """Its gradient is zero, but for jumps."""
    return jnp.sum(jnp.floor(4 * jnp.abs(x - 1.3)))


def solve(fun, init=None, **kwargs):
    kwargs = {"num_replicas": 16, "num_steps": 200} | kwargs
    return pranam_optax.minimize(fun, init, bounds=(LOW, HIGH), **kwargs)


@pytest.fixture(scope="module")
def spent():
    return solve(rastrigin, max_evaluations=60_000, key=1)


def test_the_budget_is_spent_and_no_more(spent):
    assert spent.ended == "max_evaluations spent"
    largest = 36 * 2**3  # the population that was cut short, if any
    assert 60_000 <= spent.num_evaluations < 60_000 + largest
    assert sum(run.num_evaluations for run in spent.runs) == pytest.approx(
        int(spent.num_evaluations), abs=32 + 8 + 1
    )
    made, gradients = np.asarray(spent.evaluations).T
    assert 0 <= spent.num_evaluations - made[-1] <= 2  # the start, and bounds
    assert np.all(np.diff(made) > 0) and np.all(np.diff(gradients) >= 0)
    assert np.all(gradients <= made)
    assert np.all(np.diff(spent.history[:, 0]) <= 0)


def test_the_minimum_is_found_by_several_kinds_of_runs(spent):
    np.testing.assert_allclose(spent.params, 1.3, atol=1e-3)
    kinds = {"independent", "sweep", "evolution", "coupled", "continued"}
    assert {run.kind for run in spent.runs} == kinds
    best = min(run.value for run in spent.runs)
    alone = 0
    for kind, (reached, total) in spent.restarts.items():
        values = np.array([run.value for run in spent.runs if run.kind == kind])
        assert (reached, total) == (np.sum(values < best + 1e-3), len(values))
        assert f"{reached} of {total} {kind}" in repr(spent)
        alone += reached * (kind != "continued")
    assert spent.confirmed == (alone > 1)
    assert "ended: max_evaluations spent" in repr(spent)
    assert len(spent.to_dict()["runs"]) == len(spent.runs)
    assert spent.history[-1, 0] == pytest.approx(float(spent.value), abs=1e-5)


def test_one_key_gives_one_result(spent):
    again = solve(rastrigin, max_evaluations=60_000, key=1)
    assert_equal(again.params, spent.params)
    assert again.runs == spent.runs
    assert solve(rastrigin, max_evaluations=60_000, key=2).runs != spent.runs


def test_target_ends_the_search():
    result = solve(sphere, target=1e-6)
    assert result.ended == "target reached" and result.value <= 1e-6
    assert result.num_evaluations < 500


def test_a_sum_over_parameters_is_minimised_in_one_sweep(x64):
    """Of 9^5 minima; a bound between them is kept."""

    def fun(x):
        return jnp.sum((x - 1.3) ** 2 + 10 - 10 * jnp.cos(2 * jnp.pi * (x - 1.3)))

    low, high = jnp.full(5, -4.0).at[1].set(2.2), jnp.full(5, 5.0).at[3].set(jnp.inf)
    row, key = jnp.full(5, 3.0), jax.random.key(0)
    order = jnp.array([4, 2, 0, 3, 1])
    line, history = sweep(fun, (low, high), Line(row, fun(row)), key, order, 4)
    np.testing.assert_allclose(line.row[jnp.array([0, 2, 3, 4])], 1.3, atol=0.02)
    assert line.row[1] == 3.0  # the fifth step is not taken
    np.testing.assert_allclose(line.value, fun(line.row), rtol=1e-12)
    assert np.all(np.diff(history[:4]) < 0) and np.isnan(history[4])
    line, _ = sweep(fun, (low, high), line, key, order[::-1], 1)
    np.testing.assert_allclose(line.row[1], 2.3, atol=0.02)


def test_sweeps_solve_what_separates():
    problem = problems.rastrigin(20)
    result = pranam_optax.minimize(
        problem.fun, None, bounds=(problem.low, problem.high), target=1e-3
    )
    assert result.restarts["sweep"][0] == 1 and result.num_evaluations < 10_000


def test_functions_without_gradients():
    result = solve(plateaus, max_evaluations=30_000)
    assert result.value == 0
    assert result.restarts["evolution"][0] > 0


def test_time_limit_once_compiled():
    solve(rastrigin, max_evaluations=20_000)
    began = time.monotonic()
    result = solve(rastrigin, time_limit=2.0)
    # On an idle machine 2.1 s; here others may run beside it.
    assert 2 <= time.monotonic() - began < 6
    assert result.ended == "time_limit reached"


def test_no_budget_is_too_small():
    result = solve(sphere, max_evaluations=1)
    assert np.isfinite(result.value) and result.num_evaluations <= 64


def test_the_users_start_is_one():
    needle = landscape(needle=100.0)  # which is not found by chance
    assert solve(needle, jnp.full(4, 4.02), max_evaluations=3000).value < -60
    assert solve(needle, max_evaluations=3000).value > -1


def test_a_minimum_on_a_bound_is_reached():
    result = pranam_optax.minimize(
        lambda p: (p["a"] - 1) ** 2 + jnp.sum((p["b"] - 2) ** 2),
        {"a": 0.0, "b": jnp.ones(2)},
        bounds={"a": (-jnp.inf, 0.5), "b": (0, 1.5)},
        num_replicas=8,
        num_steps=50,
        max_evaluations=2000,
    )
    assert_equal(result.params, {"a": jnp.array(0.5), "b": jnp.full(2, 1.5)})
    assert result.value == 0.75


def test_functions_that_fail_in_a_part_of_the_box():
    result = solve(landscape(ripples=10.0, wall=0.0), max_evaluations=30_000)
    np.testing.assert_allclose(result.params, 1.3, atol=1e-3)


def test_callback_sees_the_best_and_may_stop():
    seen = []

    def callback(progress):
        seen.append(progress)
        return len(seen) == 3

    result = solve(
        rastrigin, max_evaluations=30_000, callback=callback, callback_every=1000
    )
    assert result.ended == "stopped by the callback"
    steps = [progress.step for progress in seen]
    assert np.all(np.diff([0, *steps]) >= 1000) and len(steps) == 3
    assert seen[-1].num_steps == 30_000
    assert rastrigin(seen[-1].params[0]) == pytest.approx(float(seen[-1].values[0]))


def test_fit_with_a_budget():
    x = jnp.linspace(0.0, 4.0, 30)
    truth = {"a": 3.0, "rate": 1.5}

    def model(p, x):
        return p["a"] * jnp.exp(-p["rate"] * x)

    bounds = {"a": (0, 100), "rate": (0, 100)}
    kwargs = {"num_replicas": 16, "num_steps": 100, "max_evaluations": 3000}
    result = pranam_optax.fit(model, x, model(truth, x), bounds=bounds, **kwargs)
    np.testing.assert_allclose(result.params["rate"], 1.5, rtol=1e-4)
    assert result.search.ended == "max_evaluations spent"


def test_budgets_that_cannot_be_used():
    refused("max_evaluations must be a positive int", solve, sphere, max_evaluations=0)
    refused("time_limit must be a finite", solve, sphere, time_limit=np.nan)
    refused("callback_every must be a positive", solve, sphere, callback_every=0)
    refused(
        "cannot be used under jax.jit",
        lambda: jax.jit(lambda key: solve(sphere, key=key, target=0.0))(0),
    )


def test_a_population_learns_the_metric(x64):
    """An ellipsoid of condition 1e4, which a round population cannot descend."""
    scales = 10.0 ** jnp.linspace(0.0, 2.0, 6)
    begun = begin_population(jax.random.key(0), jnp.ones(6))
    end, history = evolve(
        lambda z: jnp.sum(jnp.square(scales * z)),
        lambda z: jnp.clip(z, -0.1, 2.0),
        begun,
        12,
        jnp.arange(300),
        300,
    )
    assert jnp.all(end.lowest >= -0.1)
    assert end.value < 1e-10 and end.value == jnp.min(history)
    deviations = jnp.sqrt(jnp.diag(end.covariance))
    np.testing.assert_allclose(jnp.log10(deviations[0] / deviations[-1]), 2.0, atol=0.4)


def test_as_a_method_of_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    problem, seen = problems.ackley(3), []
    pairs = [(-30, 30)] * 3
    options = {"num_replicas": 16, "num_steps": 100, "maxfun": 4000}
    for bounds in (pairs, optimize.Bounds([-30] * 3, [30] * 3)):
        found = optimize.minimize(
            lambda x, factor: factor * problem.fun(x),
            np.full(3, 20.0),
            args=(2.0,),
            bounds=bounds,
            method=fitting.scipy_method,
            callback=lambda x: seen.append(x),
            options=options,
        )
        assert found.success and found.fun < 1e-3 and found.nfev < 5000
        assert np.all(np.abs(found.x) < 1e-3) and found.result.ended in found.message
    assert seen[-1].shape == (3,)
    refused(
        "no constraints",
        fitting.scipy_method,
        sphere,
        np.zeros(2),
        constraints=[{"type": "eq"}],
    )


def test_replicas_are_spread_over_the_devices():
    """Without being asked, unless somebody has placed data on one of them."""
    shardings = []

    def run(fun, num_replicas):
        return solve(
            fun,
            num_replicas=num_replicas,
            num_steps=20,
            callback=lambda progress: shardings.append(progress.values.sharding),
        )

    def spread():
        return len(shardings[-1].device_set)

    result = run(rastrigin, 16)
    assert spread() == jax.local_device_count() == 8
    assert run(rastrigin, 9).ended is None and spread() == 1
    placed = jax.device_put(jnp.full(4, 1.3), jax.local_devices()[-1])
    same = run(lambda x: rastrigin(x - placed + 1.3), 16)
    assert spread() == 1
    np.testing.assert_allclose(same.value, result.value, rtol=1e-3, atol=1e-4)
