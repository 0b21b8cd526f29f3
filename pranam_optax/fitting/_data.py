"""Data that `fit` takes: arrays, lists, pandas and xarray; checked, as JAX arrays."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from pranam_optax._tree import PyTree, is_traced
from pranam_optax.fitting._coordinates import broadcasts_to, is_numbers

# How much of the range of the data may be lost when they are rounded to float32.
_ROUNDING = 1e-4


def check_inputs(x: PyTree) -> PyTree:
    """Inputs as arrays: a data frame as a dict of its columns, a dataset likewise."""

    def columns(x: Any) -> Any:
        if _is_of("pandas", "DataFrame", x):
            return {str(name): x[name].to_numpy() for name in x.columns}
        if _is_of("xarray", "Dataset", x):
            return {str(name): array.to_numpy() for name, array in x.items()}
        return x

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _to_array(leaf, f"x{keystr(path)}"),
        jax.tree.map(columns, x, is_leaf=is_numbers),
        is_leaf=is_numbers,
    )


def like(x: PyTree, y: jax.Array) -> Any:
    """Predictions with the index or the coordinates of their inputs, where they fit."""
    if _is_of("pandas", "Series", x) or _is_of("pandas", "DataFrame", x):
        if y.ndim == 1:
            return sys.modules["pandas"].Series(np.asarray(y), index=x.index)
    elif _is_of("xarray", "DataArray", x) and y.shape == x.shape:
        return x.copy(data=np.asarray(y))
    return y


def _is_of(module: str, name: str, x: Any) -> bool:
    """Whether this is an object of a class of a module that somebody imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(x, kind)


def check_data(
    x: PyTree, y: Any, sigma: Any
) -> tuple[PyTree, jax.Array, jax.Array | None]:
    """Inputs, data and their errors as arrays; x and y of one length."""
    x, y = check_inputs(x), _to_array(y, "y")
    if jnp.iscomplexobj(y):
        raise TypeError(
            f"y has dtype {y.dtype}; stack its real and imaginary parts, and those of "
            "the model, along a new last axis"
        )
    if not jnp.issubdtype(y.dtype, jnp.floating):
        y = y.astype(float)
    if not y.ndim or not len(y):
        raise ValueError(f"y has shape {y.shape}; expected one or more data on axis 0")
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if leaf.shape[:1] != y.shape[:1]:
            raise ValueError(
                f"x{keystr(path)} has shape {leaf.shape} and y has shape {y.shape}; "
                "expected the same length along axis 0"
            )
        _check_entries(leaf, lambda x: ~np.isnan(x), f"x{keystr(path)} must not be NaN")
    _check_entries(y, np.isfinite, "y must be finite")
    if sigma is None:
        return x, y, None
    if not isinstance(sigma, jax.Array):
        sigma = np.asarray(sigma)
    sigma = jnp.asarray(sigma, y.dtype)
    if not broadcasts_to(sigma.shape, y.shape):
        raise ValueError(
            f"sigma has shape {sigma.shape}, which does not broadcast to y's {y.shape}"
        )
    _check_entries(sigma, np.isfinite, "sigma must be finite")
    if not is_traced(sigma) and not bool(jnp.all(sigma > 0)):
        raise ValueError(
            f"sigma must be positive, but its least entry is {float(sigma.min())}"
        )
    return x, y, jnp.broadcast_to(sigma, y.shape)


def _to_array(x: Any, name: str) -> jax.Array:
    """An array of JAX, unless its dtypes cannot hold the data."""
    if isinstance(x, jax.Array):
        return x
    exact = np.asarray(x)
    dtype = jax.dtypes.canonicalize_dtype(exact.dtype)
    if jnp.issubdtype(dtype, jnp.integer) and np.any(exact.astype(dtype) != exact):
        dtype = jax.dtypes.canonicalize_dtype(np.float64)  # beyond int32
    array = exact.astype(dtype)
    if array.dtype != exact.dtype and array.size and np.isrealobj(exact):
        error = np.max(np.abs(array.astype(np.float64) - exact))
        # A column of equal numbers has no differences to lose.
        if error > _ROUNDING * np.ptp(exact) > 0:
            raise ValueError(
                f"{name} lies between {exact.min()} and {exact.max()}, and {dtype} is "
                f"off by up to {error:.2g} there: subtract an offset, or enable "
                "jax_enable_x64"
            )
    return jnp.asarray(array)


def _check_entries(x: jax.Array, are_good: Callable[[Any], Any], rule: str) -> None:
    # In NumPy: there is nothing to compile.
    if is_traced(x) or np.all(good := are_good(np.asarray(x))):
        return
    bad = np.argwhere(~good)
    raise ValueError(
        f"{rule}, but {len(bad)} of its {good.size} entries are not; the first "
        f"at index {tuple(bad[0].tolist())}"
    )
