from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pranam_optax
from conftest import assert_close, assert_equal, refused
from pranam_optax import problems

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
FUNCTIONS = {name: getattr(problems, name) for name in VALUES}


# Programs of all functions at once, since most of the time is that of compilation.


def test_values_at_a_point():
    x = jnp.array([0.5, 1.0, 1.5])
    values = jax.jit(lambda x: {n: f(3).fun(x) for n, f in FUNCTIONS.items()})(x)
    assert_close(values, VALUES, 2e-6)


@pytest.mark.parametrize("dim", [2, 20])
def test_minimum(dim, x64):
    made = {name: make(dim) for name, make in FUNCTIONS.items()}

    def look(problem, key):
        value, grad = jax.value_and_grad(problem.fun)(problem.minimizer)
        # A random search in the box, wide and close by.
        points = jax.vmap(problem.init)(jax.random.split(key, 5000))
        near = problem.minimizer[None] + 1e-2 * (points - problem.minimizer[None])
        near = jnp.clip(near, problem.low[None], problem.high[None])
        values = jax.vmap(problem.fun)(jnp.concatenate([points, near]))
        return value, grad, values.min()

    look_at_all = jax.jit(lambda made, key: {n: look(p, key) for n, p in made.items()})
    found = look_at_all(made, jax.random.key(0))
    for name, (value, grad, lowest) in found.items():
        problem = made[name]
        scale = max(1.0, abs(problem.minimum))
        assert_close({name: value}, {name: problem.minimum}, 1e-7, 1e-9 * scale)
        assert_close({name: grad}, {name: 0.0}, 1e-7, 1e-5)
        assert np.all(problem.minimizer >= problem.low)
        assert np.all(problem.minimizer <= problem.high)
        assert lowest >= problem.minimum - 1e-9 * scale


@pytest.mark.parametrize(
    ("dim", "minimum"), [(2, -1.8013), (5, -4.687658), (10, -9.66015)]
)
def test_michalewicz_minima_of_the_literature(dim, minimum):
    assert problems.michalewicz(dim).minimum == pytest.approx(minimum, abs=5e-5)


def test_gradients_are_finite_everywhere():
    def gradients(problem):
        values = jnp.array([0.0, -0.0, 1e-30, -1e-30, 1.0, 421.0])
        values = jnp.concatenate([values, problem.low[:1], problem.high[:1]])
        same = jnp.repeat(values[:, None], 4, axis=1)
        points = jnp.concatenate([same, same.at[:, 1].set(0.0).at[:, 2].set(1.0)])
        functions = problem.fun, problems.bound(problem).fun
        return [jax.vmap(jax.grad(fun))(points) for fun in functions]

    found = jax.jit(lambda: {n: gradients(f(4)) for n, f in FUNCTIONS.items()})()
    for name, grads in found.items():
        assert np.all(np.isfinite(grads)), name
    # At the cusps: the first point is the origin.
    assert np.all(found["ackley"][0][0] == 0)
    assert np.all(found["schwefel"][0][0] == 0)


def test_dim_errors():
    refused("dim must be an int >= 1, got 0", problems.sphere, 0)
    refused("dim must be an int >= 2, got 1", problems.rosenbrock, 1)


def test_shift_flip_and_rotate_by_hand():
    problem = problems.shift(problems.sphere(2), jnp.array([1.0, 2.0]))
    assert problem.fun(jnp.array([1.0, 3.0])) == 1.0
    assert_equal(problem.minimizer, [1.0, 2.0])

    flipped = problems.flip(problem, jnp.array([-1.0, 1.0]))
    assert flipped.fun(jnp.array([-1.0, 3.0])) == 1.0
    assert_equal(flipped.minimizer, [-1.0, 2.0])

    # Flipping is about the centre of the box, which for Rosenbrock is 2.5.
    flipped = problems.flip(problems.rosenbrock(2), jnp.array([-1.0, 1.0]))
    assert_equal(flipped.minimizer, [4.0, 1.0])
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
        expected = problems.schwefel(2).fun(jnp.array(mirrored)) + excess**2 / 20000
        assert_close(problem.fun(jnp.array(outside)), expected, 1e-5)
    # The raw function falls below its minimum outside the box, this one does not.
    far = 1e4 * jax.random.normal(jax.random.key(0), (1000, 2))
    assert jax.vmap(problems.schwefel(2).fun)(far).min() < 0
    assert jax.vmap(problem.fun)(far).min() > 0


@pytest.mark.parametrize("rotated", [False, True])
def test_random_instances_are_one_program(rotated, x64):
    made = {name: problems.bound(make(6)) for name, make in FUNCTIONS.items()}

    randomize = partial(problems.randomize, spread=0.4, rotated=rotated)

    def draw(key):
        drawn = {name: randomize(problem, key) for name, problem in made.items()}
        return drawn, {n: p.fun(p.minimizer) for n, p in drawn.items()}

    keys = jax.random.split(jax.random.key(0), 5)
    drawn, values = jax.jit(jax.vmap(draw))(keys)
    for name, problem in made.items():
        center = (problem.low + problem.high) / 2
        half = (problem.high - problem.low) / 2
        position = (np.asarray(drawn[name].minimizer) - center[None]) / half[None]
        assert np.all(np.abs(position) <= 0.4)
        assert np.all(np.any(np.abs(position) > 0.1, axis=1))
        assert len(np.unique(position[:, 0])) == 5
        scale = max(1.0, abs(problem.minimum))
        expected = np.full(5, problem.minimum)
        assert_close({name: values[name]}, {name: expected}, 1e-7, 1e-9 * scale)
        assert_equal(drawn[name].low[0], problem.low)
    # One of them alone is the same as in the batch.
    one = randomize(made["levy"], keys[3])
    assert_close(drawn["levy"].minimizer[3], one.minimizer, 1e-12)


def test_instances_of_a_family_may_be_stacked():
    sphere = problems.bound(problems.sphere(3))
    for make in (
        partial(problems.randomize, sphere, rotated=True),
        problems.polynomial_fit,
        partial(problems.teacher_network, features=(2, 3, 1)),
    ):
        first, second = (jax.eval_shape(partial(make, key=seed)) for seed in (0, 1))
        assert jax.tree.structure(first) == jax.tree.structure(second)


def test_plain_functions_make_problems():
    problem = problems.Problem(
        lambda x: jnp.sum(x**4), -jnp.ones(2), jnp.ones(2), jnp.zeros(2), 0.0
    )
    moved = problems.shift(problem, 0.5)
    found = jax.jit(lambda problem, x: problem.fun(x))(moved, jnp.array([0.5, 2.5]))
    assert found == 16.0
    assert_equal(moved.minimizer, [0.5, 0.5])


def test_randomize_is_a_function_of_the_key():
    problem = problems.ackley(4)
    minimizers = [problems.randomize(problem, seed).minimizer for seed in (0, 0, 1)]
    assert_equal(minimizers[0], minimizers[1])
    assert jnp.all(minimizers[0] != minimizers[2])
    traced = jax.jit(lambda key: problems.randomize(problem, key).minimizer)
    assert_close(traced(jax.random.key(1)), minimizers[2], 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        problems.polynomial_fit,
        partial(
            problems.teacher_network, features=(5, 6, 6, 1), activation=jax.nn.relu
        ),
    ],
)
def test_regressions_are_solved_by_their_solution_only(make):
    @jax.jit
    def look(key):
        regression = make(key)
        params = pranam_optax.replicate(regression.init, 2, 8)
        grad_fn = pranam_optax.replica_value_and_grad(regression.loss)
        loss = regression.loss(regression.solution)
        return loss, jnp.std(regression.y), *grad_fn(params)

    loss, deviation, values, grads = look(jax.random.key(0))
    assert loss == 0
    assert_close(deviation, 1.0, 1e-5)
    assert np.all(values > 0.1)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_polynomial_by_hand():
    regression = problems.polynomial_fit(0)
    assert regression.solution.size == 45
    params = jnp.array([[[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]])  # (x + 2y + 3) y
    x = jnp.array([[1.0, 2.0], [0.0, -1.0]])
    assert_equal(regression.predict(params, x), [16.0, -1.0])


def test_teacher_network_needs_one_output():
    refused("the last one 1", problems.teacher_network, 0, features=(4, 5))
