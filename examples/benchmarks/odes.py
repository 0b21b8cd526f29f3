"""Time of a fit whose model solves a differential equation, by how it is derived.

python examples/benchmarks/odes.py
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint

import pranam_optax

Params = dict[str, jax.Array]
Model = Callable[[Params, jax.Array], jax.Array]

TRUTH = {"a": 1.3, "b": 0.9, "c": 0.8, "d": 0.7}
START = np.ones(2)


def slope(y: jax.Array, p: Params) -> jax.Array:
    """Hares and lynxes, by Lotka and Volterra."""
    eaten = y[0] * y[1]
    return jnp.stack([p["a"] * y[0] - p["b"] * eaten, p["d"] * eaten - p["c"] * y[1]])


def scan(p: Params, t: jax.Array) -> jax.Array:
    """Ten steps of Runge and Kutta between two data."""

    def step(y: jax.Array, h: jax.Array) -> tuple[jax.Array, None]:
        k1 = slope(y, p)
        k2 = slope(y + h / 2 * k1, p)
        k3 = slope(y + h / 2 * k2, p)
        k4 = slope(y + h * k3, p)
        return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    def to_next(y: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = jax.lax.scan(step, y, jnp.full(10, h / 10))[0]
        return y, y

    return jax.lax.scan(to_next, jnp.asarray(START), jnp.diff(t, prepend=t[:1]))[1]


def by_odeint(p: Params, t: jax.Array) -> jax.Array:
    """JAX's own solver."""
    return odeint(lambda y, t, p: slope(y, p), jnp.asarray(START), t, p)


def by_diffrax(name: str) -> Model:
    """diffrax with one of its adjoints."""

    def model(p: Params, t: jax.Array) -> jax.Array:
        import diffrax

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: slope(y, p)),
            diffrax.Tsit5(),
            t0=t[0],
            t1=t[-1],
            dt0=None,
            y0=jnp.asarray(START),
            args=p,
            saveat=diffrax.SaveAt(ts=t),
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8),
            adjoint=getattr(diffrax, name)(),
            max_steps=1000,
            throw=False,
        )
        assert solution.ys is not None
        return solution.ys

    return model


ADJOINTS = "ForwardMode", "DirectAdjoint", "RecursiveCheckpointAdjoint"
MODELS: dict[str, Model] = {
    "Runge-Kutta in a scan": scan,
    **{f"diffrax.{name}": by_diffrax(name) for name in ADJOINTS},
    "odeint": by_odeint,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    t = np.linspace(0, 10, 25)
    truth = {name: jnp.asarray(x) for name, x in TRUTH.items()}
    rng = np.random.default_rng(0)
    y = np.asarray(scan(truth, jnp.asarray(t))) + 0.05 * rng.normal(size=(25, 2))
    models = dict(list(MODELS.items())[:1]) if args.quick else MODELS
    print("| model | first call | compiled | a | error of a | evaluations |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, model in models.items():
        seconds = []
        for key in range(2):
            began = time.perf_counter()
            result = pranam_optax.fit(
                model,
                t,
                y,
                bounds=dict.fromkeys(TRUTH, (0.2, 3.0)),
                num_replicas=16,
                num_steps=10 if args.quick else 100,
                key=key,
            )
            seconds.append(time.perf_counter() - began)
        errors: Any = result.standard_errors
        print(
            f"| {name} | {seconds[0]:.1f} s | {seconds[1]:.2f} s "
            f"| {float(result.params['a']):.5f} "
            f"| {float(errors['a']):.3g} "
            f"| {int(result.num_evaluations)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
