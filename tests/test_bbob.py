"""COCO's noiseless functions against COCO itself, and their gradients."""

import bbob
import bbob_runtimes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_close, refused

FUNCTIONS = sorted(bbob.FUNCTIONS)

# Steps of central differences, for functions with ripples shorter than the usual one.
STEPS = {16: 1e-9, 19: 1e-8, 23: 3e-13}


@jax.jit
def values_and_gradients(problems, x):
    """Of `excess`, for each problem of a stack at each row of `x[problem]`."""
    evaluate = jax.value_and_grad(bbob.Problem.excess, argnums=1)
    return jax.vmap(jax.vmap(evaluate, (None, 0)))(problems, x)


def stack(function, dim, instances):
    made = [bbob.make(function, dim, instance) for instance in instances]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)


def points(problems, num):
    """Anywhere, outside the box too; near the minimiser; nearer; and at it."""
    best = np.asarray(problems.minimizer)[:, None]
    rng = np.random.default_rng(best.shape[-1])
    shape = best.shape[0], num, best.shape[-1]
    near = [best + scale * rng.normal(size=shape) for scale in (1e-2, 1e-5)]
    anywhere = [rng.uniform(-side, side, shape) for side in (5, 8)]
    return jnp.asarray(np.concatenate([*anywhere, *near, best], axis=1))


def check(function, dim, instances, num):
    """To 1e-9 of max(1, |f|) everywhere, and of f - f_opt away from the minimum."""
    cocoex = pytest.importorskip("cocoex")
    problems = stack(function, dim, instances)
    x = points(problems, num)
    excess, gradients = values_and_gradients(problems, x)
    assert np.isfinite(gradients).all()
    for k, instance in enumerate(instances):
        reference = cocoex.BareProblem("bbob", function, dim, instance)
        minimum = float(problems.minimum[k])
        assert_close(minimum, reference.best_value(), 1e-12, 1e-12)
        expected = np.array([reference(row) for row in np.asarray(x[k])])
        error = np.abs(np.asarray(excess[k]) + minimum - expected)
        assert np.all(error <= 1e-9 * np.maximum(1, np.abs(expected)))
        assert np.all((error <= 1e-9 * (expected - minimum))[: 2 * num])
        assert_close(excess[k, -1], 0, 1e-7, 1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_equals_coco(x64, function):
    check(function, 5, (1, 101), 5)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3, 5, 10, 20, 40])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_equals_coco_everywhere(x64, function, dim):
    check(function, dim, (1, 2, 7, 15, 101), 20)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradient_equals_differences(x64, function):
    """Along a random direction; by the median where kinks are everywhere (f23)."""
    problems = stack(function, 5, (1, 101))
    rng = np.random.default_rng(function)
    x = rng.uniform(-5, 5, (2, 7, 5))
    direction = rng.normal(size=x.shape)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    step = STEPS.get(function, 1e-7) * direction
    everything = jnp.asarray(np.concatenate([x, x - step, x + step], axis=1))
    values, gradients = values_and_gradients(problems, everything)
    _, below, above = np.split(np.asarray(values), 3, axis=1)
    gradients = np.asarray(gradients)[:, :7]
    width = np.linalg.norm((x + step) - (x - step), axis=-1)
    error = np.abs((above - below) / width - np.sum(gradients * direction, axis=-1))
    error /= np.maximum(np.linalg.norm(gradients, axis=-1), 1e-3)
    if function == 23:
        assert np.median(error) < 0.05
    else:
        assert np.max(error) < 1e-4
    if function == 7:
        assert not gradients.any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_single_precision(function):
    """Finite gradients at the minimiser, next to it and at zero; f_opt is reached."""
    problems = stack(function, 5, (1, 101))
    best = problems.minimizer[:, None]
    assert best.dtype == jnp.float32
    next_to = best + best * jnp.finfo(jnp.float32).eps
    x = jnp.concatenate([best, next_to, jnp.zeros_like(best)], axis=1)
    values, gradients = values_and_gradients(problems, x)
    assert values.dtype == gradients.dtype == jnp.float32
    assert np.isfinite(values).all() and np.isfinite(gradients).all()
    assert_close(values[:, 0], 0, 1e-7, 1e-5)
    if function not in (5, 23, 24):  # a slope; kinks; ripples about 2.5
        assert_close(gradients[:, 0], 0, 1e-7, 1e-2)
    assert np.all(np.abs(best) <= 5)


def test_instances_share_a_program():
    traced = []

    @jax.jit
    def value(problem, x):
        traced.append(problem.function)
        return problem.fun(x)

    for instance in (1, 2, 3):
        problem = bbob.make(15, 3, instance)
        x = problem.init(jax.random.key(instance))
        assert np.all((problem.low <= x) & (x <= problem.high))
        assert value(problem, x) > value(problem, problem.minimizer)
        assert value(problem, problem.minimizer) == problem.minimum
    assert traced == [15]


@pytest.mark.parametrize("numbers", [(0, 2, 1), (25, 2, 1), (1, 1, 1), (1, 2, 0)])
def test_numbers_are_checked(numbers):
    refused("function must be|need dim", bbob.make, *numbers)


def test_runtimes(x64):
    """Every evaluation counts, and those with a gradient as often as is said."""
    targets = bbob_runtimes.TARGETS
    assert targets[0] == 1e2 and targets[-1] == 1e-8
    problem = bbob.make(1, 3, 1)
    counted = bbob_runtimes.Counted(problem)
    best = np.asarray(problem.minimizer)
    values = [counted(best + distance) for distance in (1.0, 1e-2)]
    value, gradient = counted.value_and_grad(best + 1e-3)
    assert_close(gradient, np.full(3, 2e-3), 1e-9)
    np.testing.assert_allclose([*values, value], counted.minimum, 1e-1)
    times = counted.runtimes(gradient_cost=4)
    assert times[0] == 1 and sorted(set(times)) == [1, 2, 6, np.inf]
    assert np.all((times <= 1) == (targets >= 3))
    assert np.all((times <= 6) == (targets >= 3e-6))
    assert_close(bbob_runtimes.share(times, 6), np.mean(targets >= 3e-6), 1e-7)


def test_cma_reaches_all_targets_of_the_sphere(x64):
    pytest.importorskip("cma")
    counted = bbob_runtimes.Counted(bbob.make(1, 2, 1))
    bbob_runtimes.run_cma(counted, dim=2, budget=1000, seed=0)
    assert np.isfinite(counted.runtimes()).all() and len(counted.history) < 1000


def test_searches_end_at_the_last_target_or_when_the_budget_is_spent(x64):
    """Methods of `peers` see the box as the unit cube."""
    problem = bbob.make(1, 2, 1)
    limited = bbob_runtimes.Limited(problem, 4)  # a gradient costs one more
    u = (np.asarray(problem.minimizer) + 5) / 10 + np.array([0.1, 0.0])
    value, gradient = limited.value_and_grad(u)
    np.testing.assert_allclose(value - float(problem.minimum), 1.0)
    np.testing.assert_allclose(gradient, [20.0, 0.0], atol=1e-9)
    limited.value(u)
    with pytest.raises(bbob_runtimes.ReachedError):
        limited.value(u)
    with pytest.raises(bbob_runtimes.ReachedError):
        bbob_runtimes.Limited(problem, 3).value(u - np.array([0.1, 0.0]))


def test_tables_of_runtimes():
    half = 2 * 10.0**3 * np.ones(51)
    half[26:] = np.inf
    rows = [
        dict(
            zip(
                bbob_runtimes.columns(),
                map(str, ["pranam", 2, 1, i, value, 1.0, cost, *times]),
                strict=True,
            )
        )
        for i, (times, value) in enumerate([(half, 1e-3), (half / 20, 1e-3)])
        for cost in (2, 3)
    ]
    text = bbob_runtimes.tables(rows)
    # Half of the targets: one run within 1e2, both within 1e3 evaluations over dim.
    assert "| pranam | 2 | 0.25 / 0.51 / 0.51 | 0.25 / 0.51 / 0.51 | - |" in text
    assert "| pranam | f1 | 0.51 | 0 of 2 | 525 | 1.0e-03 |" in text
