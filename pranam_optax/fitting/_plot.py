"""Pictures of results; imports matplotlib, which the package itself does not need."""

from typing import Any

import jax
import numpy as np


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot needs matplotlib: pip install 'pranam-optax[fit]'"
        ) from error
    return plt


def plot_result(result: Any) -> Any:
    """Value over evaluations, and a waterfall, of a `MinimizeResult`."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    _plot_history(axes[0], result)
    _plot_minima(axes[1], result)
    return figure


def plot_fit(result: Any) -> Any:
    """The search, a waterfall, and the fit over its residuals, of a `FitResult`."""
    figure, axes = _pyplot().subplot_mosaic(
        [["history", "fit"], ["minima", "residuals"]],
        figsize=(9, 6),
        height_ratios=(3, 2),
        layout="constrained",
    )
    _plot_history(axes["history"], result.search)
    _plot_minima(axes["minima"], result.search)

    leaves = jax.tree.leaves(result.x)
    y = np.ravel(result.y)
    predictions, residuals = (
        np.ravel(result.predict(result.x)),
        np.ravel(result.residuals),
    )
    if len(leaves) == 1 and leaves[0].shape == result.y.shape and result.y.ndim == 1:
        x, label = np.asarray(leaves[0]), "x"
        order = np.argsort(x)
        axes["fit"].plot(x, y, ".", color="0.5", label="data")
        axes["fit"].plot(x[order], predictions[order], label="fit")
        axes["fit"].legend()
        axes["fit"].set(xlabel=label, ylabel="y")
    else:  # several inputs: against the predictions
        x, label = predictions, "prediction"
        axes["fit"].plot(predictions, y, ".", color="0.5")
        axes["fit"].axline((y[0], y[0]), slope=1)
        axes["fit"].set(xlabel=label, ylabel="y")
    axes["residuals"].plot(x, residuals, ".", color="0.5")
    axes["residuals"].axhline(0)
    axes["residuals"].set(xlabel=label, ylabel="residual")
    return figure


def _plot_history(axes: Any, result: Any) -> None:
    """Value over evaluations; of each replica, if they were recorded."""
    history = np.asarray(result.history)
    history = np.where(np.isfinite(history), history, np.nan)
    if result.evaluations is None:
        first = len(result.start_values)
        evaluations = first + history.shape[1] * (1 + np.arange(len(history)))
        axes.plot(evaluations, history, color="0.7", linewidth=0.5)
    else:
        evaluations = np.asarray(result.evaluations)[:, 0]
    with np.errstate(all="ignore"):
        axes.plot(evaluations, np.fmin.reduce(history, axis=1), label="lowest")
    axes.axhline(float(result.value), color="C1", linestyle="--", label="polished")
    axes.set(xlabel="evaluations", ylabel="value", title="search")
    if result.value > 0:
        axes.set_yscale("log")
    axes.legend()


def _plot_minima(axes: Any, result: Any) -> None:
    """A waterfall: sorted final values, steps of which are minima."""
    values = np.sort(np.asarray(result.replica_values))
    axes.plot(1 + np.arange(len(values)), values, ".-")
    axes.set(xlabel="replica, sorted", ylabel="final value", title="waterfall")
    if len(values) and values[0] > 0:
        axes.set_yscale("log")
