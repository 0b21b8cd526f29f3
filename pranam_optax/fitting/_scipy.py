"""`minimize` as a method of `scipy.optimize.minimize`."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from pranam_optax.fitting._minimize import minimize


def scipy_method(
    fun: Callable[..., Any],
    x0: Any,
    args: tuple[Any, ...] = (),
    bounds: Any = None,
    callback: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """For `scipy.optimize.minimize(fun, x0, method=scipy_method, options=...)`.

    `fun(x, *args)` must be written with `jax.numpy`: its gradients are JAX's, and a
    `jac` is not used.

    Args:
      fun: takes a vector and returns a scalar.
      x0: the first start.
      args: further arguments of `fun`.
      bounds: SciPy's `Bounds` or list of pairs; None on a side for no bound.
      callback: called with the best vector so far.
      **options: those of `pranam_optax.minimize`, such as `max_evaluations`, `key` or
        `num_replicas`. SciPy's `maxfun` is `max_evaluations`.

    Returns:
      SciPy's `OptimizeResult`, with the `MinimizeResult` as `result`.

    Raises:
      ValueError: for constraints, which `minimize` does not know.

    Examples:
      >>> import jax.numpy as jnp, scipy.optimize, pranam_optax
      >>> found = scipy.optimize.minimize(
      ...     lambda x: jnp.sum((x**2 - 1) ** 2 + 0.1 * x), [0.5, 0.5],
      ...     bounds=[(-2, 2), (-2, 2)], method=pranam_optax.fitting.scipy_method,
      ...     options={"num_replicas": 8, "num_steps": 50})
      >>> found.x.round(2)
      array([-1.01, -1.01], dtype=float32)
    """
    from scipy.optimize import OptimizeResult

    if len(options.pop("constraints", ())):
        raise ValueError(
            "scipy_method takes bounds but no constraints: add a penalty to fun"
        )
    for unused in ("jac", "hess", "hessp", "tol"):
        options.pop(unused, None)
    if "maxfun" in options:
        options["max_evaluations"] = options.pop("maxfun")

    def seen(progress: Any) -> None:
        assert callback is not None
        best = np.nanargmin(np.asarray(progress.values))
        callback(np.asarray(progress.params)[best])

    result = minimize(
        lambda x: jnp.asarray(fun(x, *args)),
        jnp.asarray(x0, float),
        bounds=bounds,
        callback=None if callback is None else seen,
        **options,
    )
    best, message = result.confirmed, result.ended or "all steps made"
    return OptimizeResult(
        x=np.asarray(result.params),
        fun=float(result.value),
        nfev=int(result.num_evaluations),
        success=bool(np.isfinite(result.value)),
        message=f"{message}; the best value was {'' if best else 'not '}confirmed",
        result=result,
    )
