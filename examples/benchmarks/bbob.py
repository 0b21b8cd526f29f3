"""The 24 noiseless functions of COCO (bbob), with gradients.

`make(function, dim, instance)` is the problem that COCO has under these numbers, f1 to
f24. It is a pytree whose arrays are the instance: instances of one function and
dimension share a compiled program, and may be stacked and run under `jax.vmap`.

    problem = make(8, dim=10, instance=1)
    value, gradient = jax.value_and_grad(problem.fun)(x)

`excess` is the value above the minimum, written so that it loses no digits there, where
the textbook form subtracts large numbers. At cusps and ridges the gradient is finite.
Outside the box [-5, 5] the functions continue as those of COCO do.

References:
  N. Hansen, S. Finck, R. Ros, A. Auger, `Real-parameter black-box optimization
  benchmarking 2009: Noiseless functions definitions
  <https://inria.hal.science/inria-00362633>`_, 2009: the functions.

  N. Hansen et al., `COCO: A platform for comparing continuous optimizers in a black-box
  setting <https://doi.org/10.1080/10556788.2020.1808977>`_, 2021: instances, targets
  and runtimes; its source has the generator of the instances.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Problem:
    """An instance of a function of COCO.

    Attributes:
      function: its number, 1 to 24.
      minimum: the least value, a scalar array.
      arrays: minimiser `x_opt`, and the rotations and peaks of the functions that have
        them.
    """

    function: int = field(metadata={"static": True})
    minimum: jax.Array
    arrays: dict[str, jax.Array]

    @property
    def minimizer(self) -> jax.Array:
        return self.arrays["x_opt"]

    @property
    def low(self) -> jax.Array:
        return jnp.full_like(self.minimizer, -5)

    @property
    def high(self) -> jax.Array:
        return jnp.full_like(self.minimizer, 5)

    def init(self, key: jax.Array) -> jax.Array:
        """A point drawn uniformly from the box."""
        x = self.minimizer
        return jax.random.uniform(key, x.shape, x.dtype, -5.0, 5.0)

    def excess(self, x: jax.Array) -> jax.Array:
        """The value above the minimum, also where `fun` rounds it away."""
        arrays = {name: a.astype(x.dtype) for name, a in self.arrays.items()}
        return FUNCTIONS[self.function](x, **arrays)

    def fun(self, x: jax.Array) -> jax.Array:
        return self.excess(x) + self.minimum.astype(x.dtype)


# The transformations of the definitions


def safe_power(x: jax.Array, exponent: float) -> jax.Array:
    """x to a power for x >= 0, with gradient zero at zero."""
    positive = x > jnp.finfo(x.dtype).tiny
    return jnp.where(positive, jnp.where(positive, x, 1.0) ** exponent, 0.0)


def t_osz(x: jax.Array) -> jax.Array:
    """Oscillations: a monotone map that is rough around the identity."""
    nonzero = jnp.abs(x) > jnp.finfo(x.dtype).tiny
    log = jnp.log(jnp.abs(jnp.where(nonzero, x, 1.0)))
    c1, c2 = jnp.where(x > 0, 10, 5.5), jnp.where(x > 0, 7.9, 3.1)
    c1, c2 = c1.astype(x.dtype), c2.astype(x.dtype)
    size = jnp.exp(log + 0.049 * (jnp.sin(c1 * log) + jnp.sin(c2 * log)))
    return jnp.where(nonzero, jnp.sign(x) * size, 0.0)


def t_asy(beta: float, x: jax.Array) -> jax.Array:
    """Asymmetry: coordinates above zero grow faster, the last the most."""
    positive = x > 0
    safe = jnp.where(positive, x, 1.0)
    return jnp.where(positive, safe ** (1 + beta * ramp(x) * jnp.sqrt(safe)), x)


def ramp(x: jax.Array) -> jax.Array:
    """From 0 for the first coordinate to 1 for the last."""
    return jnp.arange(x.shape[0]).astype(x.dtype) / (x.shape[0] - 1)


def scales(alpha: float, x: jax.Array) -> jax.Array:
    r"""Diagonal of :math:`\Lambda^\alpha`, from 1 to the root of alpha."""
    return alpha ** (ramp(x) / 2)


def turn(matrix: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.matmul(matrix, x, precision=jax.lax.Precision.HIGHEST)


def penalty(x: jax.Array) -> jax.Array:
    """The squared distance from the box."""
    return jnp.sum((x - jnp.clip(x, -5, 5)) ** 2)


def rosenbrock_terms(z: jax.Array) -> jax.Array:
    return 100 * (z[:-1] ** 2 - z[1:]) ** 2 + (z[:-1] - 1) ** 2


def rosenbrock_scale(x: jax.Array) -> float:
    return max(1.0, x.shape[0] ** 0.5 / 8)


def rastrigin_sum(z: jax.Array) -> jax.Array:
    # 10 - 10 cos 2 a = 20 sin^2 a
    return jnp.sum(20 * jnp.sin(jnp.pi * z) ** 2 + z**2)


# The functions, above their minimum. `q` is the rotation of the instance's own seed and
# `r` that of a second one; which of the two comes first follows the source of COCO.


def sphere(x: jax.Array, x_opt: jax.Array) -> jax.Array:
    """f1."""
    return jnp.sum((x - x_opt) ** 2)


def ellipsoid(x: jax.Array, x_opt: jax.Array) -> jax.Array:
    """f2: condition 1e6, separable."""
    z = t_osz(x - x_opt)
    return jnp.sum(1e6 ** ramp(x) * z**2)


def rastrigin(x: jax.Array, x_opt: jax.Array) -> jax.Array:
    """f3: separable."""
    z = scales(10, x) * t_asy(0.2, t_osz(x - x_opt))
    return rastrigin_sum(z)


def bueche_rastrigin(x: jax.Array, x_opt: jax.Array) -> jax.Array:
    """f4: every other coordinate is ten times steeper above its minimiser."""
    z = t_osz(x - x_opt)
    even = jnp.arange(x.shape[0]) % 2 == 0
    z = jnp.where(even & (z > 0), 10.0, 1.0).astype(x.dtype) * scales(10, x) * z
    return rastrigin_sum(z) + 100 * penalty(x)


def linear_slope(x: jax.Array, x_opt: jax.Array) -> jax.Array:
    """f5: the minimiser is a corner of the box; beyond it, the function is flat."""
    slopes = jnp.sign(x_opt) * scales(100, x)
    return jnp.sum(slopes * (x_opt - jnp.where(x * x_opt < 25, x, x_opt)))


def attractive_sector(
    x: jax.Array, x_opt: jax.Array, r: jax.Array, q: jax.Array
) -> jax.Array:
    """f6: low in one orthant only."""
    z = turn(r, scales(10, x) * turn(q, x - x_opt))
    s = jnp.where(z * x_opt > 0, 100.0, 1.0).astype(x.dtype)
    return safe_power(t_osz(jnp.sum((s * z) ** 2)), 0.9)


def step_ellipsoid(
    x: jax.Array, x_opt: jax.Array, r: jax.Array, q: jax.Array
) -> jax.Array:
    """f7: plateaus, on which the gradient is (but for |z_1| / 1e5) zero."""
    z_hat = scales(10, x) * turn(q, x - x_opt)
    coarse, fine = jnp.floor(z_hat + 0.5), jnp.floor(10 * z_hat + 0.5) / 10
    z = turn(r, jnp.where(jnp.abs(z_hat) > 0.5, coarse, fine))
    steps = jnp.sum(100 ** ramp(x) * z**2)
    slope = jnp.abs(z_hat[0]) / 1e4
    return 0.1 * jnp.where(slope > steps, slope, steps) + penalty(x)


def rosenbrock(x: jax.Array, x_opt: jax.Array) -> jax.Array:
    """f8."""
    z = rosenbrock_scale(x) * (x - x_opt) + 1
    return jnp.sum(rosenbrock_terms(z))


def rotated_rosenbrock(x: jax.Array, x_opt: jax.Array, q: jax.Array) -> jax.Array:
    """f9."""
    z = rosenbrock_scale(x) * turn(q, x - x_opt) + 1
    return jnp.sum(rosenbrock_terms(z))


def rotated_ellipsoid(x: jax.Array, x_opt: jax.Array, r: jax.Array) -> jax.Array:
    """f10: condition 1e6."""
    z = t_osz(turn(r, x - x_opt))
    return jnp.sum(1e6 ** ramp(x) * z**2)


def discus(x: jax.Array, x_opt: jax.Array, r: jax.Array) -> jax.Array:
    """f11: one short axis."""
    z = t_osz(turn(r, x - x_opt))
    return 1e6 * z[0] ** 2 + jnp.sum(z[1:] ** 2)


def bent_cigar(x: jax.Array, x_opt: jax.Array, r: jax.Array) -> jax.Array:
    """f12: a narrow, bent ridge."""
    z = turn(r, t_asy(0.5, turn(r, x - x_opt)))
    return z[0] ** 2 + 1e6 * jnp.sum(z[1:] ** 2)


def sharp_ridge(
    x: jax.Array, x_opt: jax.Array, r: jax.Array, q: jax.Array
) -> jax.Array:
    """f13: a ridge whose slope does not shrink towards it."""
    z = turn(r, scales(10, x) * turn(q, x - x_opt))
    return z[0] ** 2 + 100 * safe_power(jnp.sum(z[1:] ** 2), 0.5)


def different_powers(x: jax.Array, x_opt: jax.Array, r: jax.Array) -> jax.Array:
    """f14: exponents from 2 to 6."""
    z = turn(r, x - x_opt)
    return safe_power(jnp.sum(jnp.abs(z) ** (2 + 4 * ramp(x))), 0.5)


def rotated_rastrigin(
    x: jax.Array, x_opt: jax.Array, r: jax.Array, q: jax.Array
) -> jax.Array:
    """f15."""
    z = t_asy(0.2, t_osz(turn(r, x - x_opt)))
    return rastrigin_sum(turn(r, scales(10, x) * turn(q, z)))


def weierstrass(
    x: jax.Array, x_opt: jax.Array, r: jax.Array, q: jax.Array
) -> jax.Array:
    """f16: rough at every scale."""
    z = turn(r, scales(0.01, x) * turn(q, t_osz(turn(r, x - x_opt))))
    k = jnp.arange(12).astype(x.dtype)[:, None]
    # The definition's cos 2 pi 3^k (z + 1/2) less its value at 0.
    waves = 0.5**k * 2 * jnp.sin(jnp.pi * 3.0**k * z[None]) ** 2
    mean = jnp.sum(waves) / x.shape[0]
    return 10 * mean**3 + 10 / x.shape[0] * penalty(x)


def schaffers(
    condition: float, x: jax.Array, x_opt: jax.Array, r: jax.Array, q: jax.Array
) -> jax.Array:
    """f17 and f18."""
    z = scales(condition, x) * turn(q, t_asy(0.5, turn(r, x - x_opt)))
    s = z[:-1] ** 2 + z[1:] ** 2
    waves = safe_power(s, 0.25) * (1 + jnp.sin(50 * safe_power(s, 0.1)) ** 2)
    return jnp.mean(waves) ** 2 + 10 * penalty(x)


def griewank_rosenbrock(x: jax.Array, x_opt: jax.Array, q: jax.Array) -> jax.Array:
    """f19: a valley with bumps on its floor."""
    z = rosenbrock_scale(x) * turn(q, x - x_opt) + 1
    s = rosenbrock_terms(z)
    return 10 * jnp.mean(s / 4000 + 2 * jnp.sin(s / 2) ** 2)  # 1 - cos s


def schwefel(x: jax.Array, x_opt: jax.Array) -> jax.Array:
    """f20: minima in the corners, far from each other."""
    x_hat, best = 2 * jnp.sign(x_opt) * x, 2 * jnp.abs(x_opt)
    previous = jnp.concatenate([jnp.zeros_like(x[:1]), (x_hat - best)[:-1]])
    z = 100 * (scales(10, x) * (x_hat + 0.25 * previous - best) + best)
    waves = jnp.mean(z * jnp.sin(safe_power(jnp.abs(z), 0.5)))
    return 4.189828872724339 - waves / 100 + 100 * penalty(z / 100)


def gallagher(
    x: jax.Array, x_opt: jax.Array, q: jax.Array, peaks: jax.Array, widths: jax.Array
) -> jax.Array:
    """f21 and f22: 101 and 21 Gaussian peaks at random."""
    num_peaks, dim = peaks.shape
    rest = jnp.linspace(1.1, 9.1, num_peaks - 1, dtype=x.dtype)
    heights = jnp.concatenate([jnp.full_like(rest[:1], 10), rest])
    distances = turn(q, x - x_opt)[None] - peaks
    exponents = jnp.sum(widths * distances**2, axis=1) / (-2 * dim)
    logs = exponents + jnp.log(heights / 10)
    # 10 less the highest peak; by its index, since the gradient of a maximum looks for
    # the operand that equals it, which a compiled program may have rounded differently.
    depth = -10 * jnp.expm1(logs[jnp.argmax(logs)])
    return t_osz(depth) ** 2 + penalty(x)


def katsuura(x: jax.Array, x_opt: jax.Array, r: jax.Array, q: jax.Array) -> jax.Array:
    """f23: a continuous function that is nowhere smooth."""
    dim = x.shape[0]
    z = turn(r, scales(100, x) * turn(q, x - x_opt))
    powers = 2.0 ** jnp.arange(1, 33).astype(x.dtype)[:, None]
    y = powers * z[None]
    rough = jnp.sum(jnp.abs(y - jnp.floor(y + 0.5)) / powers, axis=0)
    log_product = jnp.sum(jnp.log1p(jnp.arange(1, dim + 1).astype(x.dtype) * rough))
    return 10 / dim**2 * jnp.expm1(10 / dim**1.2 * log_product) + penalty(x)


def lunacek(x: jax.Array, x_opt: jax.Array, r: jax.Array, q: jax.Array) -> jax.Array:
    """f24: Rastrigin's ripples on two bowls, the wider of them the wrong one."""
    dim = x.shape[0]
    s = 1 - 0.5 / ((dim + 20) ** 0.5 - 4.1)
    mu_1 = -(((2.5**2 - 1) / s) ** 0.5)
    x_hat = 2 * jnp.sign(x_opt) * x
    z = turn(r, scales(100, x) * turn(q, x_hat - 2.5))
    right, wrong = jnp.sum((x_hat - 2.5) ** 2), jnp.sum((x_hat - mu_1) ** 2)
    ripples = jnp.sum(20 * jnp.sin(jnp.pi * z) ** 2)
    wrong = dim + s * wrong
    bowls = jnp.where(right < wrong, right, wrong)
    return bowls + ripples + 1e4 * penalty(x)


FUNCTIONS: dict[int, Callable[..., jax.Array]] = {
    1: sphere,
    2: ellipsoid,
    3: rastrigin,
    4: bueche_rastrigin,
    5: linear_slope,
    6: attractive_sector,
    7: step_ellipsoid,
    8: rosenbrock,
    9: rotated_rosenbrock,
    10: rotated_ellipsoid,
    11: discus,
    12: bent_cigar,
    13: sharp_ridge,
    14: different_powers,
    15: rotated_rastrigin,
    16: weierstrass,
    17: lambda x, **arrays: schaffers(10, x, **arrays),
    18: lambda x, **arrays: schaffers(1000, x, **arrays),
    19: griewank_rosenbrock,
    20: schwefel,
    21: gallagher,
    22: gallagher,
    23: katsuura,
    24: lunacek,
}


# The instances, in NumPy: the generator of 2009


def uniform(num: int, seed: int) -> np.ndarray:
    """Lehmer's generator (multiplier 16807, modulus 2^31 - 1), shuffled by a table."""
    modulus, state = 2**31 - 1, max(abs(seed), 1)
    table = [0] * 32
    for i in reversed(range(40)):
        state = 16807 * state % modulus
        if i < 32:
            table[i] = state
    last, numbers = table[0], np.empty(num)
    for i in range(num):
        state = 16807 * state % modulus
        slot = last // 67108865
        last, table[slot] = table[slot], state
        numbers[i] = last / modulus
    return np.where(numbers == 0, 1e-99, numbers)


def normal(num: int, seed: int) -> np.ndarray:
    u, v = uniform(2 * num, seed).reshape(2, num)
    g = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
    return np.where(g == 0, 1e-99, g)


def rotation(dim: int, seed: int) -> np.ndarray:
    """Normal columns, made orthogonal one after the other."""
    columns = normal(dim * dim, seed).reshape(dim, dim)
    for i in range(dim):
        for j in range(i):
            columns[i] -= (columns[i] @ columns[j]) * columns[j]
        columns[i] /= np.linalg.norm(columns[i])
    return columns.T


def minimum_of(function: int, instance: int) -> float:
    seed = {4: 3, 18: 17}.get(function, function) + 10000 * instance
    ratio = normal(1, seed)[0] / normal(1, seed + 1)[0]
    return float(np.clip(np.floor(1e4 * ratio + 0.5) / 100, -1000, 1000))


def minimizer_of(function: int, dim: int, seed: int) -> np.ndarray:
    """Of all functions but Gallagher's."""
    if function in (9, 19):
        return rotation(dim, seed).sum(0) / (2 * max(1.0, dim**0.5 / 8))
    if function == 20:
        return np.where(uniform(dim, seed) < 0.5, -1, 1) * 4.2096874637 / 2
    if function == 24:
        return np.where(normal(dim, seed) < 0, -1.25, 1.25)
    u = uniform(dim, seed + 1_000_000 if function == 12 else seed)
    x_opt = 8 * np.floor(1e4 * u) / 1e4 - 4
    x_opt = np.where(x_opt == 0, -1e-5, x_opt)
    if function == 4:
        x_opt[::2] = np.abs(x_opt[::2])
    if function == 5:
        return np.where(x_opt < 0, -5.0, 5.0)
    return 0.75 * x_opt if function == 8 else x_opt


def peaks_of(function: int, dim: int, seed: int) -> dict[str, np.ndarray]:
    """The peaks of Gallagher's functions, seen from the highest, and their widths."""
    num, side, first = (101, 10.0, 1000**0.5) if function == 21 else (21, 9.8, 1000.0)
    order = np.argsort(uniform(num - 1, seed), kind="stable")
    conditions = np.append(first, 1000.0 ** (order / (num - 2)))
    widths = [
        condition ** (np.argsort(uniform(dim, seed + 1000 * i)) / (dim - 1) - 0.5)
        for i, condition in enumerate(conditions)
    ]
    where = side * uniform(num * dim, seed).reshape(num, dim) - side / 2
    where[0] *= 0.8
    peaks = (where - where[0]) @ rotation(dim, seed).T
    return {"x_opt": where[0], "peaks": peaks, "widths": np.array(widths)}


def make(function: int, dim: int, instance: int) -> Problem:
    """The problem of COCO's suite bbob.

    Args:
      function: 1 to 24.
      dim: at least 2; COCO has 2, 3, 5, 10, 20 and 40.
      instance: 1, 2, ...

    Raises:
      ValueError: if there is no such function, or `dim` or `instance` is too small.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"function must be 1 to 24, got {function!r}")
    if dim < 2 or instance < 1:
        raise ValueError(f"need dim >= 2 and instance >= 1, got {dim} and {instance}")
    seed = {4: 3, 18: 17}.get(function, function) + 10000 * instance
    if function in (21, 22):
        arrays = peaks_of(function, dim, seed)
    else:
        arrays = {"x_opt": minimizer_of(function, dim, seed)}
    if function in (6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 23, 24):
        arrays["r"] = rotation(dim, seed + 1_000_000)
    if function in (6, 7, 9, 13, 15, 16, 17, 18, 19, 21, 22, 23, 24):
        arrays["q"] = rotation(dim, seed)
    minimum = jnp.asarray(minimum_of(function, instance), float)
    return Problem(
        function, minimum, {name: jnp.asarray(a, float) for name, a in arrays.items()}
    )
