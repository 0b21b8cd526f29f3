import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pranam_optax
from pranam_optax import problems

FUNCTIONS = {
    f.__name__: f
    for f in (
        problems.sphere,
        problems.rosenbrock,
        problems.ackley,
        problems.schwefel,
        problems.rastrigin,
        problems.levy,
        problems.styblinski_tang,
        problems.michalewicz,
        problems.griewank,
    )
}


# Values at x = (1, 2, 3) / 2, worked out from the formulas with Python's math module.
VALUES = {
    "sphere": 3.5,
    "rosenbrock": 81.5,
    "ackley": 5.88744234674083,
    "schwefel": 1254.3712933623408,
    "rastrigin": 43.5,
    "levy": 0.2363911307714057,
    "styblinski_tang": -17.4375,
    "michalewicz": -0.02888963163935927,
    "griewank": 0.5686378859809135,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_at_a_point(name):
    x = jnp.array([0.5, 1.0, 1.5])
    np.testing.assert_allclose(FUNCTIONS[name](3).fun(x), VALUES[name], rtol=2e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dim", [2, 3, 10, 40])
def test_minimum(name, dim, x64):
    problem = FUNCTIONS[name](dim)
    value, grad = jax.value_and_grad(problem.fun)(problem.minimizer)
    scale = max(1.0, abs(problem.minimum))
    np.testing.assert_allclose(value, problem.minimum, atol=1e-9 * scale)
    np.testing.assert_allclose(grad, 0.0, atol=1e-5)
    assert jnp.all(problem.minimizer >= problem.low)
    assert jnp.all(problem.minimizer <= problem.high)
    # No point of a random search in the box, wide or close by, lies lower.
    points = jax.vmap(problem.init)(jax.random.split(jax.random.key(0), 5000))
    near = problem.minimizer[None] + 1e-2 * (points - problem.minimizer[None])
    for x in (points, jnp.clip(near, problem.low[None], problem.high[None])):
        assert jnp.min(jax.vmap(problem.fun)(x)) >= problem.minimum - 1e-9 * scale


@pytest.mark.parametrize(
    ("dim", "minimum"), [(2, -1.8013), (5, -4.687658), (10, -9.66015)]
)
def test_michalewicz_minima_of_the_literature(dim, minimum):
    assert problems.michalewicz(dim).minimum == pytest.approx(minimum, abs=5e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_is_finite_everywhere(name):
    problem = FUNCTIONS[name](4)
    bounded = problems.bound(problem)
    awkward = [
        0.0,
        -0.0,
        1e-30,
        -1e-30,
        1.0,
        421.0,
        *problem.low[:1],
        *problem.high[:1],
    ]
    for value in awkward:
        for x in (jnp.full(4, value), jnp.array([value, 0.0, 1.0, value])):
            for fun in (problem.fun, bounded.fun):
                assert jnp.all(jnp.isfinite(jax.grad(fun)(x))), (name, x)


def test_gradient_is_zero_at_the_cusps():
    assert jnp.all(jax.grad(problems.ackley(3).fun)(jnp.zeros(3)) == 0)
    assert jnp.all(jax.grad(problems.schwefel(3).fun)(jnp.zeros(3)) == 0)


@pytest.mark.parametrize("name", ["rosenbrock", "michalewicz"])
def test_gradient_descent_moves_down_what_the_original_could_not(name):
    problem = FUNCTIONS[name](5)
    x = problem.init(jax.random.key(3))
    step = 1e-6 if name == "rosenbrock" else 1e-4
    before = problem.fun(x)
    for _ in range(20):
        x = x - step * jax.grad(problem.fun)(x)
    assert problem.fun(x) < before


def test_dim_errors():
    with pytest.raises(ValueError, match="dim must be an int >= 1, got 0"):
        problems.sphere(0)
    with pytest.raises(ValueError, match="dim must be an int >= 2, got 1"):
        problems.rosenbrock(1)


def test_shift_flip_and_rotate_by_hand():
    problem = problems.shift(problems.sphere(2), jnp.array([1.0, 2.0]))
    assert problem.fun(jnp.array([1.0, 3.0])) == 1.0
    np.testing.assert_array_equal(problem.minimizer, [1.0, 2.0])

    flipped = problems.flip(problem, jnp.array([-1.0, 1.0]))
    assert flipped.fun(jnp.array([-1.0, 3.0])) == 1.0
    np.testing.assert_array_equal(flipped.minimizer, [-1.0, 2.0])

    # Flipping is about the centre of the box, which for Rosenbrock is 2.5.
    flipped = problems.flip(problems.rosenbrock(2), jnp.array([-1.0, 1.0]))
    np.testing.assert_array_equal(flipped.minimizer, [4.0, 1.0])
    assert flipped.fun(jnp.array([4.0, 1.0])) == 0.0

    quarter = jnp.array([[0.0, -1.0], [1.0, 0.0]])
    rotated = problems.rotate(problems.rosenbrock(2), quarter)
    x = jnp.array([3.0, 0.0])  # (2, -1) from the minimiser, turned to (1, 2)
    assert rotated.fun(x) == problems.rosenbrock(2).fun(jnp.array([2.0, 3.0]))


def test_bound_mirrors_at_the_faces_and_adds_the_penalty():
    problem = problems.bound(problems.schwefel(2))
    inside = jnp.array([123.0, -456.0])
    assert problem.fun(inside) == problems.schwefel(2).fun(inside)
    for outside, mirrored, excess in [
        ((600.0, 10.0), (400.0, 10.0), 100.0),
        ((10.0, -700.0), (10.0, -300.0), 200.0),
        ((1700.0, 10.0), (-300.0, 10.0), 1200.0),
    ]:
        expected = problems.schwefel(2).fun(jnp.array(mirrored))
        np.testing.assert_allclose(
            problem.fun(jnp.array(outside)), expected + excess**2 / 20000, rtol=1e-5
        )
    # The raw function falls below its minimum outside the box, this one does not.
    far = 1e4 * jax.random.normal(jax.random.key(0), (1000, 2))
    assert jax.vmap(problems.schwefel(2).fun)(far).min() < 0
    assert jax.vmap(problem.fun)(far).min() > 0


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rotated", [False, True])
def test_randomize_moves_the_minimiser_within_the_box(name, rotated, x64):
    problem = problems.bound(FUNCTIONS[name](6))
    center = (problem.low + problem.high) / 2
    half = (problem.high - problem.low) / 2
    for seed in range(5):
        instance = problems.randomize(problem, seed, spread=0.4, rotated=rotated)
        position = (instance.minimizer - center) / half
        assert jnp.all(jnp.abs(position) <= 0.4)
        assert jnp.any(jnp.abs(position) > 0.1)
        scale = max(1.0, abs(problem.minimum))
        np.testing.assert_allclose(
            instance.fun(instance.minimizer), problem.minimum, atol=1e-9 * scale
        )
        np.testing.assert_array_equal(instance.low, problem.low)


def test_randomize_is_a_function_of_the_key():
    problem = problems.ackley(4)
    minimizers = [problems.randomize(problem, seed).minimizer for seed in (0, 0, 1)]
    np.testing.assert_array_equal(minimizers[0], minimizers[1])
    assert jnp.all(minimizers[0] != minimizers[2])
    traced = jax.jit(lambda key: problems.randomize(problem, key).minimizer)
    np.testing.assert_allclose(traced(jax.random.key(1)), minimizers[2], rtol=1e-6)


@pytest.mark.parametrize(
    "regression",
    [
        problems.polynomial_fit(0),
        problems.polynomial_fit(1, num_inputs=2, num_terms=5, degree=2, num_points=50),
        problems.teacher_network(0),
        problems.teacher_network(1, features=(5, 6, 6, 1), activation=jax.nn.relu),
    ],
)
def test_regressions_are_solved_by_their_solution_only(regression):
    assert regression.loss(regression.solution) == 0
    np.testing.assert_allclose(jnp.std(regression.y), 1.0, rtol=1e-5)
    params = pranam_optax.replicate(regression.init, 2, 8)
    values, grads = pranam_optax.replica_value_and_grad(regression.loss)(params)
    assert jnp.all(values > 0.1)
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads))


def test_polynomial_by_hand():
    regression = problems.polynomial_fit(0)
    assert regression.solution.size == 45
    params = jnp.array([[[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]])  # (x + 2y + 3) y
    x = jnp.array([[1.0, 2.0], [0.0, -1.0]])
    np.testing.assert_array_equal(regression.predict(params, x), [16.0, -1.0])


def test_teacher_network_needs_one_output():
    with pytest.raises(ValueError, match="the last one 1"):
        problems.teacher_network(0, features=(4, 5))
