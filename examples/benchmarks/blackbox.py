"""What else minimises a function in a box: the peers of the study.

All search the unit cube, mapped to the box of the problem, and stop at the same number
of evaluations. The packages they need are imported when they are called.
"""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from tasks import Arrays, Task

Fun = Callable[[jax.Array], jax.Array]


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'pranam-optax[study]'") from error


class BudgetSpentError(Exception):
    """Raised by `Counter` when the evaluations are used up."""


class Counter:
    """Counts evaluations and keeps the lowest value.

    A value with its gradient counts `gradient_cost`, a value alone 1.
    """

    def __init__(self, fun: Fun, budget: int, gradient_cost: int) -> None:
        self._value = jax.jit(fun)
        self._values = jax.jit(jax.vmap(fun))
        self._value_and_grad = jax.jit(jax.value_and_grad(fun))
        self._left, self._gradient_cost = budget, gradient_cost
        self._last = np.array([])
        self.best = np.inf

    def _spend(self, cost: int, values: Any) -> None:
        if self._left < cost:
            raise BudgetSpentError
        self._left -= cost
        self.best = float(np.fmin(self.best, np.min(values)))

    def value(self, u: np.ndarray) -> float:
        value = float(self._value(np.asarray(u, np.float32)))
        self._spend(1, value)
        self._last = np.array(u)
        return value

    def values(self, points: Any) -> np.ndarray:
        values = np.asarray(self._values(np.asarray(points, np.float32)), float)
        # The part of a population that is still paid for counts.
        paid = values[: self._left]
        self._spend(len(paid), paid if len(paid) else np.inf)
        if len(paid) < len(values):
            raise BudgetSpentError
        return values

    def value_and_grad(self, u: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = self._value_and_grad(np.asarray(u, np.float32))
        self._spend(self._gradient_cost, float(value))
        return float(value), np.asarray(grad, float)

    def grad(self, u: np.ndarray) -> np.ndarray:
        _, grad = self._value_and_grad(np.asarray(u, np.float32))
        known = np.array_equal(self._last, u)
        self._spend(self._gradient_cost - known, np.inf)
        return np.asarray(grad, float)


Peer = Callable[[Counter, int, int], Any]


def multi_start(counter: Counter, dim: int, seed: int) -> None:
    """L-BFGS-B from uniform starts, until the budget is spent."""
    rng = np.random.default_rng(seed)
    while True:
        scipy.optimize.minimize(
            counter.value_and_grad,
            rng.uniform(size=dim),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, 1)] * dim,
        )


def basin_hopping(counter: Counter, dim: int, seed: int) -> None:
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
        },
        rng=rng,
    )


def dual_annealing(counter: Counter, dim: int, seed: int) -> None:
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


def sep_cma_es(counter: Counter, dim: int, seed: int) -> None:
    """Sep-CMA-ES of evosax: 64 points per generation, from the centre."""
    strategy = package("evosax.algorithms").Sep_CMA_ES(
        population_size=64, solution=jnp.zeros(dim)
    )
    params = strategy.default_params.replace(std_init=0.3)
    key = jax.random.key(seed)
    state = strategy.init(key, jnp.full(dim, 0.5), params)
    generations(counter, strategy, params, state, key)


def particle_swarm(counter: Counter, dim: int, seed: int) -> None:
    """PSO of evosax: 64 particles."""
    strategy = package("evosax.algorithms").PSO(
        population_size=64, solution=jnp.zeros(dim)
    )
    params = strategy.default_params
    key, start_key = jax.random.split(jax.random.key(seed))
    points = jax.random.uniform(start_key, (64, dim))
    values = jnp.asarray(counter.values(points), jnp.float32)
    state = strategy.init(key, points, values, params)
    generations(counter, strategy, params, state, key)


def generations(
    counter: Counter, strategy: Any, params: Any, state: Any, key: jax.Array
) -> None:
    while True:
        key, ask_key, tell_key = jax.random.split(key, 3)
        points, state = strategy.ask(ask_key, state, params)
        values = jnp.asarray(counter.values(points), jnp.float32)
        state, _ = strategy.tell(tell_key, points, values, state, params)


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
    "multi-start L-BFGS": multi_start,
    "basin hopping": basin_hopping,
    "dual annealing": dual_annealing,
    "differential evolution": differential_evolution,
    "CMA-ES": cma_es,
    "Sep-CMA-ES": sep_cma_es,
    "PSO": particle_swarm,
    "consensus": consensus,
}
GRADIENT_PEERS = ("multi-start L-BFGS", "basin hopping", "dual annealing")


def run_peer(
    task: Task, name: str, instances: Arrays, gradient_cost: int = 1
) -> dict[str, Any]:
    """The lowest score that a peer reaches on each instance.

    It may spend as many evaluations as the gradients of the task's steps count for.
    """
    assert task.box is not None
    low, high = task.box
    budget = task.num_replicas * task.num_steps * gradient_cost
    scores = []
    for seed in range(len(jax.tree.leaves(instances)[0])):
        instance = jax.tree.map(lambda x, seed=seed: x[seed], instances)

        def fun(u: jax.Array, instance: Arrays = instance) -> jax.Array:
            return task.score(task.data, instance, low + u * (high - low))

        counter = Counter(fun, budget, gradient_cost)
        try:
            PEERS[name](counter, len(low), seed)
        except BudgetSpentError:
            scores.append([counter.best])
    return {"scores": scores, "budget": budget}
