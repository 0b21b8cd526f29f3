"""Test problems: functions with known minima, and regressions with a known solution.

`Problem`: a function of a vector, with the box to search, its minimiser and minimum.
`Regression`: a model and the data to fit it to. Both are pytrees: shift, signs,
rotation, box and data are arrays, so that many instances are one under `jax.vmap`.

Every function is finite and has a finite gradient everywhere, also where the textbook
formula has none: at the cusps of `ackley` and `schwefel` it is zero.

Examples:
  >>> import jax, pranam_optax
  >>> from pranam_optax import problems
  >>> problem = problems.ackley(2)
  >>> print(round(float(problem.fun(problem.minimizer)), 5), problem.minimum)
  0.0 0.0
  >>> params = pranam_optax.replicate(problem.init, key=0, num_replicas=8)
  >>> values, grads = pranam_optax.replica_value_and_grad(problem.fun)(params)
  >>> values.shape, grads.shape
  ((8,), (8, 2))

  A hundred random instances at once:

  >>> keys = jax.random.split(jax.random.key(0), 100)
  >>> instances = jax.vmap(lambda key: problems.randomize(problem, key))(keys)
  >>> instances.minimizer.shape
  (100, 2)
  >>> values = jax.vmap(lambda problem: problem.fun(problem.minimizer))(instances)
  >>> values.shape
  (100,)

References:
  [SB] S. Surjanovic, D. Bingham, `Virtual Library of Simulation Experiments: Test
  Functions and Datasets <https://www.sfu.ca/~ssurjano/optimization.html>`_, 2013:
  formulas, domains and minima of the functions.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from pranam_optax._replicas import as_key

Fun = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Problem:
    """A function to minimise.

    Attributes:
      fun: takes a vector of shape `[dim]` and returns a scalar. A
        `jax.tree_util.Partial`, whose arguments are the arrays of the instance; a
        plain function becomes one.
      low: lower corner of the box to search, `[dim]`.
      high: upper corner of the box to search, `[dim]`.
      minimizer: where in the box `fun` is least, `[dim]`.
      minimum: the value of `fun` there.
    """

    fun: Fun
    low: jax.Array
    high: jax.Array
    minimizer: jax.Array
    minimum: float = field(metadata={"static": True})

    def __post_init__(self) -> None:
        if callable(self.fun) and not isinstance(self.fun, Partial):
            object.__setattr__(self, "fun", Partial(self.fun))

    def init(self, key: jax.Array) -> jax.Array:
        """A point drawn uniformly from the box."""
        return jax.random.uniform(
            key, self.low.shape, self.low.dtype, self.low, self.high
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Regression:
    """A model to fit to data that some setting of its parameters explains exactly.

    Attributes:
      predict: `predict(params, x)`, the model's output, `[num_points]`, for inputs
        `x`, `[num_points, num_inputs]`.
      init: `init(key)` draws parameters as those of the solution were drawn.
      x: inputs, `[num_points, num_inputs]`.
      y: targets, `[num_points]`.
      solution: parameters with zero loss.
    """

    predict: Callable[[Any, jax.Array], jax.Array] = field(metadata={"static": True})
    init: Callable[[jax.Array], Any] = field(metadata={"static": True})
    x: jax.Array
    y: jax.Array
    solution: Any

    def loss(self, params: Any) -> jax.Array:
        """Mean squared error; its minimum is zero."""
        return jnp.mean(jnp.square(self.predict(params, self.x) - self.y))


def _family(
    *,
    low: float,
    high: float,
    minimizer: float | Callable[[int], float] = 0.0,
    minimum: float | Callable[[int], float] = 0.0,
    min_dim: int = 1,
) -> Callable[[Fun], Callable[[int], Problem]]:
    """Makes the problems of a function, given its box and its minimum.

    Args:
      minimizer: of every coordinate, or of the i-th one, i = 1, ..., dim.
      minimum: the part of every coordinate, or of the i-th one.
    """

    def parts(value: float | Callable[[int], float], dim: int) -> list[float]:
        return [value(i) if callable(value) else value for i in range(1, dim + 1)]

    def decorate(fun: Fun) -> Callable[[int], Problem]:
        def make(dim: int) -> Problem:
            if not isinstance(dim, int) or dim < min_dim:
                raise ValueError(f"dim must be an int >= {min_dim}, got {dim!r}")
            corners = jnp.full(dim, low, float), jnp.full(dim, high, float)
            where = jnp.array(parts(minimizer, dim), float)
            return Problem(fun, *corners, where, sum(parts(minimum, dim)))

        names = "__module__", "__name__", "__qualname__", "__doc__"
        for name in names:
            setattr(make, name, getattr(fun, name))
        return make

    return decorate


@_family(low=-5.12, high=5.12)
def sphere(x: jax.Array) -> jax.Array:
    r""":math:`\sum_i x_i^2` on [-5.12, 5.12]; minimum 0 at 0 [SB]."""
    return jnp.sum(x**2)


@_family(low=-5.0, high=10.0, minimizer=1.0, min_dim=2)
def rosenbrock(x: jax.Array) -> jax.Array:
    r""":math:`\sum_{i<d} 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2` on [-5, 10], dim >= 2.

    Minimum 0 at (1, ..., 1) [SB].
    """
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


@_family(low=-32.768, high=32.768)
def ackley(x: jax.Array) -> jax.Array:
    r"""Ackley's function on [-32.768, 32.768]; minimum 0 at 0 [SB].

    .. math::
      -20 \exp\bigl(-0.2 \sqrt{\textstyle\frac1d \sum_i x_i^2}\bigr)
      - \exp\bigl(\textstyle\frac1d \sum_i \cos 2 \pi x_i\bigr) + 20 + e
    """
    radius = optax.safe_root_mean_squares(x, 0.0)
    ripples = jnp.mean(jnp.cos(2 * jnp.pi * x))
    # Written with expm1, since 20 - 20 exp(-r) loses all digits at small r.
    return -20 * jnp.expm1(-0.2 * radius) - jnp.e * jnp.expm1(ripples - 1)


@_family(low=-500.0, high=500.0, minimizer=420.96874635998199)
def schwefel(x: jax.Array) -> jax.Array:
    r""":math:`\sum_i 418.98\ldots - x_i \sin \sqrt{|x_i|}` on [-500, 500].

    Minimum 0 at (420.97, ..., 420.97) [SB]. Outside the box it falls without bound;
    see `bound`.
    """
    # A square root with gradient zero at zero.
    nonzero = x != 0
    root = jnp.where(nonzero, jnp.sqrt(jnp.abs(jnp.where(nonzero, x, 1.0))), 0.0)
    # The constant per coordinate, so that the sum does not cancel large numbers.
    return jnp.sum(418.98288727243369 - x * jnp.sin(root))


@_family(low=-5.12, high=5.12)
def rastrigin(x: jax.Array) -> jax.Array:
    r""":math:`\sum_i 10 + x_i^2 - 10 \cos 2 \pi x_i` on [-5.12, 5.12].

    Minimum 0 at 0 [SB].
    """
    return jnp.sum(10 + x**2 - 10 * jnp.cos(2 * jnp.pi * x))


@_family(low=-10.0, high=10.0, minimizer=1.0)
def levy(x: jax.Array) -> jax.Array:
    r"""Levy's function on [-10, 10]; minimum 0 at (1, ..., 1) [SB].

    With :math:`w_i = 1 + (x_i - 1) / 4`,

    .. math::
      \sin^2 \pi w_1 + \sum_{i<d} (w_i - 1)^2 (1 + 10 \sin^2(\pi w_i + 1))
      + (w_d - 1)^2 (1 + \sin^2 2 \pi w_d)
    """
    w = 1 + (x - 1) / 4
    first = jnp.sin(jnp.pi * w[0]) ** 2
    inner = (w[:-1] - 1) ** 2 * (1 + 10 * jnp.sin(jnp.pi * w[:-1] + 1) ** 2)
    last = (w[-1] - 1) ** 2 * (1 + jnp.sin(2 * jnp.pi * w[-1]) ** 2)
    return first + jnp.sum(inner) + last


@_family(low=-5.0, high=5.0, minimizer=-2.9035340277711772, minimum=-39.166165703771415)
def styblinski_tang(x: jax.Array) -> jax.Array:
    r""":math:`\frac12 \sum_i x_i^4 - 16 x_i^2 + 5 x_i` on [-5, 5].

    Minimum -39.166... d at (-2.9035..., ...) [SB].
    """
    return 0.5 * jnp.sum(x**4 - 16 * x**2 + 5 * x)


@functools.cache
def _michalewicz_minimum(i: int) -> tuple[float, float]:
    """Minimiser and minimum of Michalewicz's i-th term, in float64."""

    def term(x: np.ndarray) -> np.ndarray:
        return -np.sin(x) * np.sin(i * x**2 / np.pi) ** 20

    # A grid finer than the term's i pi/2 ripples, refined around its lowest point.
    low, high = 0.0, np.pi
    for _ in range(12):
        x = np.linspace(low, high, 100 * i + 101)
        k = int(np.argmin(term(x)))
        low, high = x[max(k - 1, 0)], x[min(k + 1, len(x) - 1)]
    return float(x[k]), float(term(x[k]))


@_family(
    low=0.0,
    high=np.pi,
    minimizer=lambda i: _michalewicz_minimum(i)[0],
    minimum=lambda i: _michalewicz_minimum(i)[1],
)
def michalewicz(x: jax.Array) -> jax.Array:
    r""":math:`-\sum_i \sin(x_i) \sin^{20}(i x_i^2 / \pi)` on [0, pi].

    Minimum -1.8013 for d = 2, -4.6877 for d = 5, -9.6602 for d = 10 [SB]; the sum
    is separable, so for any d it is found one coordinate at a time. Outside the box
    there are lower values; see `bound`.
    """
    i = jnp.arange(1, x.shape[0] + 1).astype(x.dtype)
    return -jnp.sum(jnp.sin(x) * jnp.sin(i * x**2 / jnp.pi) ** 20)


@_family(low=-600.0, high=600.0)
def griewank(x: jax.Array) -> jax.Array:
    r""":math:`\frac{1}{4000} \sum_i x_i^2 - \prod_i \cos(x_i / \sqrt i) + 1`.

    On [-600, 600]; minimum 0 at 0 [SB].
    """
    i = jnp.arange(1, x.shape[0] + 1).astype(x.dtype)
    return jnp.sum(x**2) / 4000 - jnp.prod(jnp.cos(x / jnp.sqrt(i))) + 1


def shift(problem: Problem, offset: float | jax.Array) -> Problem:
    """Moves the function, not the box, by `offset` (a number or `[dim]`)."""
    offset = jnp.asarray(offset, problem.minimizer.dtype)
    fun = Partial(_shifted, problem.fun, offset)
    return replace(problem, fun=fun, minimizer=problem.minimizer + offset)


def _shifted(fun: Fun, offset: jax.Array, x: jax.Array) -> jax.Array:
    return fun(x - offset.astype(x.dtype))


def flip(problem: Problem, signs: jax.Array) -> Problem:
    """Mirrors the function at the box's centre where `signs` (`[dim]`) is -1."""
    center = (problem.low + problem.high) / 2
    fun = Partial(_turned, problem.fun, signs, center)
    return replace(problem, fun=fun, minimizer=_turn(signs, center, problem.minimizer))


def rotate(problem: Problem, rotation: jax.Array) -> Problem:
    """Turns the function by an orthogonal matrix (`[dim, dim]`) about its minimiser."""
    fun = Partial(_turned, problem.fun, rotation, problem.minimizer)
    return replace(problem, fun=fun)


def _turned(fun: Fun, matrix: jax.Array, center: jax.Array, x: jax.Array) -> jax.Array:
    return fun(_turn(matrix, center, x))


def _turn(matrix: jax.Array, center: jax.Array, x: jax.Array) -> jax.Array:
    """About a centre, by a matrix or (`[dim]`) its diagonal."""
    matrix, center = jnp.asarray(matrix, x.dtype), center.astype(x.dtype)
    if matrix.ndim == 1:
        return center + matrix * (x - center)
    turned = jnp.matmul(matrix, x - center, precision=jax.lax.Precision.HIGHEST)
    return center + turned


def bound(problem: Problem) -> Problem:
    r"""Continues the function outside its box, where it may fall below its minimum.

    The function is mirrored at the faces of the box, and a penalty is added that
    grows with the distance :math:`e_i` from the box, of width :math:`b_i`:

    .. math:: 100 \; \tfrac1d \sum_i (e_i / b_i)^2

    For `schwefel` that is :math:`e_i^2 / (10000 d)` per coordinate, as in the
    modified Schwefel function of the CEC 2014 competition.

    References:
      J. Liang, B. Qu, P. Suganthan, `Problem definitions and evaluation criteria for
      the CEC 2014 special session and competition on single objective
      real-parameter numerical optimization`, 2013.
    """

    fun = Partial(_bounded, problem.fun, problem.low, problem.high)
    return replace(problem, fun=fun)


def _bounded(fun: Fun, low: jax.Array, high: jax.Array, x: jax.Array) -> jax.Array:
    low, high = low.astype(x.dtype), high.astype(x.dtype)
    width = high - low
    position = jnp.mod(x - low, 2 * width)
    inside = low + jnp.minimum(position, 2 * width - position)
    excess = (x - jnp.clip(x, low, high)) / width
    return fun(inside) + 100 * jnp.mean(excess**2)


def randomize(
    problem: Problem,
    key: int | jax.Array,
    *,
    spread: float = 0.4,
    rotated: bool = False,
) -> Problem:
    """A random instance of a problem, in which no centre or axis helps.

    The function is flipped along random axes and shifted, so that its minimiser is
    uniform in the middle of the box, and on request rotated.

    Args:
      problem: the problem; `bound` it first if it falls outside its box.
      key: seed or PRNG key of the instance.
      spread: the part of each side of the box, about its centre, from which the
        minimiser is drawn: 0 puts it at the centre, 1 anywhere.
      rotated: whether to apply a random rotation (or reflection) as well.

    Returns:
      The instance; its box is that of `problem`.
    """
    flip_key, shift_key, rotation_key = jax.random.split(as_key(key), 3)
    dtype, (dim,) = problem.low.dtype, problem.low.shape
    problem = flip(problem, jax.random.rademacher(flip_key, (dim,), dtype))
    center, half = (problem.low + problem.high) / 2, (problem.high - problem.low) / 2
    unit = jax.random.uniform(shift_key, (dim,), dtype, -spread, spread)
    problem = shift(problem, center + unit * half - problem.minimizer)
    if rotated:
        problem = rotate(problem, jax.random.orthogonal(rotation_key, dim, dtype=dtype))
    return problem


def polynomial_fit(
    key: int | jax.Array,
    *,
    num_inputs: int = 4,
    num_terms: int = 3,
    degree: int = 3,
    num_points: int = 256,
) -> Regression:
    r"""A random polynomial, to be fitted as a sum of products of linear forms.

    .. math:: y(x) = \sum_{j=1}^{t} \prod_{k=1}^{g} (a_{jk} \cdot x + b_{jk})

    With t terms of degree g in m inputs there are :math:`t g (m + 1)` coefficients,
    drawn from a standard normal over :math:`\sqrt{m + 1}`; the inputs are uniform on
    [-1, 1] and the targets are scaled to variance 1, by scaling the coefficients.

    References:
      After the random polynomial fits of the original `TensorFlow program
      <https://github.com/SKorablyov/Pranam>`_.
    """
    predict, init = _polynomials(num_terms, degree, num_inputs)
    x_key, solution_key = jax.random.split(as_key(key))
    x = jax.random.uniform(x_key, (num_points, num_inputs), minval=-1.0, maxval=1.0)
    solution = init(solution_key)
    solution = solution / jnp.std(predict(solution, x)) ** (1 / degree)
    return Regression(predict, init, x, predict(solution, x), solution)


# Cached, so that problems of one family have the same functions and may be stacked.
@functools.cache
def _polynomials(num_terms: int, degree: int, num_inputs: int) -> tuple[Any, Any]:
    shape = (num_terms, degree, num_inputs + 1)

    def init(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape) / (num_inputs + 1) ** 0.5

    def predict(params: jax.Array, x: jax.Array) -> jax.Array:
        # Points on the last axis and factors apart: several times faster on a CPU.
        forms = params[..., :-1] @ x.T + params[..., -1:]
        factors = [forms[:, k] for k in range(forms.shape[1])]
        return jnp.sum(functools.reduce(jnp.multiply, factors), axis=0)

    return predict, init


def teacher_network(
    key: int | jax.Array,
    *,
    features: Sequence[int] = (4, 5, 1),
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
    num_points: int = 256,
) -> Regression:
    r"""Targets from a random network, to be fitted by one of the same shape.

    The hidden layers are :math:`a(h W + b)` with the entries of W drawn from a normal
    of variance 2 over the number of inputs and those of b from a standard normal over
    2; the output is linear. The inputs are standard normal and the targets are
    scaled to variance 1, by scaling the last layer.

    Args:
      key: seed or PRNG key of the problem.
      features: sizes of the layers, from the inputs to the single output.
      activation: such as `jnp.tanh` or `jax.nn.relu`.
      num_points: number of data points.

    Raises:
      ValueError: if there are fewer than two sizes, or the last one is not 1.

    References:
      The student-teacher set-up: E. Gardner, B. Derrida, `Three unfinished works on
      the optimal storage capacity of networks
      <https://doi.org/10.1088/0305-4470/22/12/004>`_, 1989.
    """
    sizes = tuple(features)
    if len(sizes) < 2 or sizes[-1] != 1:
        raise ValueError(
            f"features must be the sizes of two or more layers, the last one 1; got "
            f"{features!r}"
        )

    predict, init = _networks(sizes, activation)
    x_key, solution_key = jax.random.split(as_key(key))
    x = jax.random.normal(x_key, (num_points, sizes[0]))
    *hidden, last = init(solution_key)
    scale = jnp.std(predict([*hidden, last], x))
    solution = [*hidden, jax.tree.map(lambda p: p / scale, last)]
    return Regression(predict, init, x, predict(solution, x), solution)


@functools.cache
def _networks(
    sizes: tuple[int, ...], activation: Callable[[jax.Array], jax.Array]
) -> tuple[Any, Any]:
    def init(key: jax.Array) -> list[dict[str, jax.Array]]:
        keys = jax.random.split(key, (len(sizes) - 1, 2))
        return [
            {
                "w": jax.random.normal(k[0], (n, m)) * (2 / n) ** 0.5,
                "b": jax.random.normal(k[1], (m,)) / 2,
            }
            for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    def predict(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
        *hidden, last = params
        # Points on the last axis: faster on a CPU.
        x = x.T
        for layer in hidden:
            x = activation(layer["w"].T @ x + layer["b"][:, None])
        return (last["w"].T @ x)[0] + last["b"]

    return predict, init
