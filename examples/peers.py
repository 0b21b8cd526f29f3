"""Other methods to minimise a function in a box or to fit a curve.

`search` runs a method of `PEERS` until its evaluations are spent: it counts them all in
the same way, those of gradients too. `multi_start`, `refine` and `polish` are
Levenberg-Marquardt. Packages that only one method needs are imported when it is called.
"""

import contextlib
import functools
import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

Fun = Callable[[jax.Array], jax.Array]
Residuals = Callable[[jax.Array], jax.Array]


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'pranam-optax[study]'") from error


class BudgetSpentError(Exception):
    """Raised by `Counter` when the evaluations are used up."""


class Counter:
    """A function on the unit cube that counts its evaluations and keeps the best.

    A value with its gradient counts `gradient_cost`, a value alone 1. Values that are
    not finite become the largest number.
    """

    def __init__(self, fun: Fun, budget: int, gradient_cost: int = 1) -> None:
        def finite(u: jax.Array) -> jax.Array:
            value = fun(u)
            worst = jnp.finfo(value.dtype).max
            return jnp.where(jnp.isfinite(value), value, worst)

        self._value = jax.jit(finite)
        self._values = jax.jit(jax.vmap(finite))
        self._value_and_grad = jax.jit(jax.value_and_grad(finite))
        self._dtype = jax.dtypes.canonicalize_dtype(float)
        self._gradient_cost, self._last = gradient_cost, np.array([])
        self.left, self.best, self.where = budget, np.inf, np.array([])

    def _spend(self, cost: int) -> None:
        if self.left < cost:
            raise BudgetSpentError
        self.left -= cost

    def _keep(self, value: float, u: np.ndarray) -> float:
        if value < self.best:
            self.best, self.where = value, np.array(u)
        return value

    def value(self, u: np.ndarray) -> float:
        self._spend(1)
        self._last = np.array(u)
        return self._keep(float(self._value(np.asarray(u, self._dtype))), u)

    def values(self, points: Any) -> np.ndarray:
        """Of a population, `[points, dim]`, as far as it can be paid for."""
        points = np.asarray(points, self._dtype)
        values = np.asarray(self._values(points), float)
        paid = values[: self.left]
        if len(paid):
            self._keep(float(paid.min()), points[paid.argmin()])
        self.left -= len(paid)
        if len(paid) < len(values):
            raise BudgetSpentError
        return values

    def value_and_grad(self, u: np.ndarray) -> tuple[float, np.ndarray]:
        self._spend(self._gradient_cost)
        value, grad = self._value_and_grad(np.asarray(u, self._dtype))
        return self._keep(float(value), u), np.nan_to_num(np.asarray(grad, float))

    def grad(self, u: np.ndarray) -> np.ndarray:
        """Costs less where the value has just been computed."""
        self._spend(self._gradient_cost - np.array_equal(self._last, u))
        _, grad = self._value_and_grad(np.asarray(u, self._dtype))
        return np.nan_to_num(np.asarray(grad, float))


Peer = Callable[[Counter, int, int], Any]


def restarted_lbfgs(
    counter: Counter, dim: int, seed: int, tolerance: float | None = None
) -> None:
    """L-BFGS-B from uniform starts, until the budget is spent."""
    rng = np.random.default_rng(seed)
    while True:
        scipy.optimize.minimize(
            counter.value_and_grad,
            rng.uniform(size=dim),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, 1)] * dim,
            tol=tolerance,
        )


def basin_hopping(
    counter: Counter, dim: int, seed: int, tolerance: float | None = None
) -> None:
    """SciPy's, with L-BFGS-B and steps of a quarter of the box."""
    rng = np.random.default_rng(seed)
    scipy.optimize.basinhopping(
        counter.value_and_grad,
        rng.uniform(size=dim),
        niter=1_000_000,
        stepsize=0.25,
        minimizer_kwargs={
            "jac": True,
            "method": "L-BFGS-B",
            "bounds": [(0, 1)] * dim,
            "tol": tolerance,
        },
        rng=rng,
    )


def dual_annealing(
    counter: Counter, dim: int, seed: int, tolerance: float | None = None
) -> None:
    """SciPy's, whose local searches are given the gradient."""
    scipy.optimize.dual_annealing(
        counter.value,
        [(0, 1)] * dim,
        rng=seed,
        maxiter=1_000_000,
        maxfun=1_000_000_000,
        minimizer_kwargs={
            "jac": counter.grad,
            "method": "L-BFGS-B",
            "bounds": [(0, 1)] * dim,
            "tol": tolerance,
        },
    )


def differential_evolution(counter: Counter, dim: int, seed: int) -> None:
    """SciPy's, with the population size of its default (15 per dimension)."""
    scipy.optimize.differential_evolution(
        lambda points: counter.values(points.T),
        [(0, 1)] * dim,
        rng=seed,
        vectorized=True,
        updating="deferred",
        polish=False,
        tol=0,
        maxiter=1_000_000,
    )


def cma_es(counter: Counter, dim: int, seed: int) -> None:
    """CMA-ES of `cma` with restarts in two regimes (BIPOP)."""
    cma = package("cma")
    rng = np.random.default_rng(seed)
    for restart in itertools.count():
        cma.fmin2(
            None,
            lambda: rng.uniform(size=dim),
            0.3,
            {
                "bounds": [0, 1],
                "seed": 1 + seed + 1000 * restart,
                "verbose": -9,
                "verb_log": 0,
                "verb_disp": 0,
            },
            parallel_objective=lambda points: list(counter.values(np.array(points))),
            restarts=9,
            bipop=True,
        )


@functools.cache  # since each strategy compiles programs of its own
def sep_cma_strategy(size: int, dim: int) -> Any:
    return package("evosax.algorithms").Sep_CMA_ES(
        population_size=size, solution=jnp.zeros(dim)
    )


def sep_cma_es(counter: Counter, dim: int, seed: int) -> None:
    """Sep-CMA-ES of evosax, restarted with twice the points where it stagnates."""
    for restart in itertools.count():
        size = (4 + int(3 * np.log(dim))) * 2**restart
        strategy = sep_cma_strategy(size, dim)
        params = strategy.default_params.replace(std_init=0.3)
        key, start_key = jax.random.split(jax.random.key(1000 * seed + restart))
        state = strategy.init(key, jax.random.uniform(start_key, (dim,)), params)
        # As long as CMA-ES waits for a change of its best values.
        patience = 10 + 30 * dim // size
        generations(counter, strategy, params, state, key, patience)


def particle_swarm(counter: Counter, dim: int, seed: int) -> None:
    """PSO of evosax: 64 particles."""
    strategy = package("evosax.algorithms").PSO(
        population_size=64, solution=jnp.zeros(dim)
    )
    params = strategy.default_params
    key, start_key = jax.random.split(jax.random.key(seed))
    points = jax.random.uniform(start_key, (64, dim))
    values = jnp.asarray(counter.values(points))
    state = strategy.init(key, points, values, params)
    generations(counter, strategy, params, state, key)


def generations(
    counter: Counter,
    strategy: Any,
    params: Any,
    state: Any,
    key: jax.Array,
    patience: float = math.inf,
) -> None:
    """Until the budget is spent, or the best values of so many generations agree."""
    lowest: list[float] = []
    while True:
        key, ask_key, tell_key = jax.random.split(key, 3)
        points, state = strategy.ask(ask_key, state, params)
        values = counter.values(points)
        state, _ = strategy.tell(tell_key, points, jnp.asarray(values), state, params)
        lowest.append(float(values.min()))
        if len(lowest) > patience:
            recent = np.array(lowest[-int(patience) :])
            if not np.ptp(recent) > 1e-12:  # or they are not numbers
                return


def consensus(counter: Counter, dim: int, seed: int) -> None:
    """Consensus-based optimisation with anisotropic noise, 64 particles.

    References:
      J. Carrillo, S. Jin, L. Li, Y. Zhu, `A consensus-based global optimization method
      for high dimensional machine learning problems
      <https://doi.org/10.1051/cocv/2020046>`_, 2021; drift and noise are theirs.
    """
    rng = np.random.default_rng(seed)
    points, step, noise = rng.uniform(size=(64, dim)), 0.01, 5.1
    while True:
        values = counter.values(points)
        # Their weights, with the temperature in units of the spread of the values.
        weights = np.exp(-30 * (values - values.min()) / (values.std() + 1e-30))
        away = points - weights @ points / weights.sum()
        drawn = rng.normal(size=points.shape)
        points = points - step * away + noise * step**0.5 * away * drawn


PEERS: dict[str, Peer] = {
    "multi-start L-BFGS": restarted_lbfgs,
    "basin hopping": basin_hopping,
    "dual annealing": dual_annealing,
    "differential evolution": differential_evolution,
    "CMA-ES": cma_es,
    "Sep-CMA-ES": sep_cma_es,
    "PSO": particle_swarm,
    "consensus": consensus,
}
GRADIENT_PEERS = ("multi-start L-BFGS", "basin hopping", "dual annealing")


class Found(NamedTuple):
    """The best point of a search, its value, and how many evaluations were spent."""

    params: np.ndarray
    value: float
    num_evaluations: int


def search(
    peer: Peer,
    fun: Fun,
    low: np.ndarray,
    high: np.ndarray,
    *,
    num_evaluations: int,
    seed: int,
    gradient_cost: int = 1,
) -> Found:
    """Runs one of `PEERS` on a function of a vector in a box."""

    def scaled(u: jax.Array) -> jax.Array:
        return fun(low + u * (high - low))

    counter = Counter(scaled, num_evaluations, gradient_cost)
    with np.errstate(all="ignore"), contextlib.suppress(BudgetSpentError):
        peer(counter, len(low), seed)
    params = low + counter.where * (high - low)
    return Found(params, counter.best, num_evaluations - counter.left)


class Starts(NamedTuple):
    """Levenberg-Marquardt from independent random starts.

    Attributes:
      params: where each start ended, `[starts, num_params]`.
      values: sums of squares there, `[starts]`.
      num_steps: evaluations of residuals and Jacobian that each took, `[starts]`.
    """

    params: np.ndarray
    values: np.ndarray
    num_steps: np.ndarray

    def success_at(self, hits: np.ndarray, num_evaluations: float) -> float:
        """Chance that at least one start of as many as the budget pays for is a hit."""
        starts = num_evaluations / self.num_steps.mean()
        return float(1 - (1 - hits.mean()) ** starts)


def multi_start(
    residuals: Residuals,
    low: np.ndarray,
    high: np.ndarray,
    *,
    num_starts: int,
    max_steps: int,
    seed: int,
) -> Starts:
    """Levenberg-Marquardt from uniform starts."""
    keys = jax.random.split(jax.random.key(seed), num_starts)
    draw = jax.vmap(lambda key: jax.random.uniform(key, low.shape, low.dtype))
    starts = low + (high - low) * np.asarray(draw(keys))
    return refine(residuals, low, high, starts, max_steps=max_steps)


def refine(
    residuals: Residuals,
    low: np.ndarray,
    high: np.ndarray,
    starts: np.ndarray,
    *,
    max_steps: int,
) -> Starts:
    """Levenberg-Marquardt, in the coordinates and with the solver that `fit` uses."""
    lineax, optimistix = package("lineax"), package("optimistix")
    center, half = (low + high) / 2, (high - low) / 2
    solver = optimistix.LevenbergMarquardt(
        rtol=1e-11, atol=1e-14, linear_solver=lineax.Normal(lineax.Cholesky())
    )

    def to_params(z: jax.Array) -> jax.Array:
        return center + half * jnp.sin(z)

    @jax.jit
    @jax.vmap
    def run(start: jax.Array) -> Any:
        # On a bound itself the sine is stationary.
        u = jnp.clip((start - center) / half, -0.999, 0.999)
        solution = optimistix.least_squares(
            lambda z, _: residuals(to_params(z)),
            solver,
            jnp.arcsin(u),
            max_steps=max_steps,
            throw=False,
        )
        b = to_params(solution.value)
        return b, jnp.sum(residuals(b) ** 2), solution.stats["num_steps"]

    return Starts(*map(np.asarray, run(starts)))


def polish(residuals: Residuals, b: np.ndarray) -> np.ndarray:
    """SciPy's Levenberg-Marquardt, from where another method ended."""
    with np.errstate(all="ignore"):
        jacobian = jax.jit(jax.jacfwd(residuals))
        try:
            found = scipy.optimize.least_squares(
                jax.jit(residuals), b, jac=jacobian, method="lm", x_scale="jac",
                ftol=1e-14, xtol=1e-14, gtol=1e-14,
            )  # fmt: skip
        except ValueError:  # not finite at the start
            return b
    return np.asarray(found.x)
