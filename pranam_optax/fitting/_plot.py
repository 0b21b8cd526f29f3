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
    """Loss curves and minima of a `MinimizeResult`."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    _plot_history(axes[0], result)
    _plot_minima(axes[1], result)
    return figure


def plot_fit(result: Any) -> Any:
    """Loss curves, minima, and the fit over its residuals, of a `FitResult`."""
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
    history = np.asarray(result.history)
    history = np.where(np.isfinite(history), history, np.nan)
    axes.plot(history, color="0.7", linewidth=0.5)
    with np.errstate(all="ignore"):
        axes.plot(np.fmin.reduce(history, axis=1), label="lowest")
    axes.axhline(float(result.value), color="C1", linestyle="--", label="polished")
    axes.set(xlabel="step", ylabel="value", title="replicas")
    if result.value > 0:
        axes.set_yscale("log")
    axes.legend()


def _plot_minima(axes: Any, result: Any) -> None:
    minima = result.minima[:20]
    axes.scatter(
        range(1, len(minima) + 1),
        [minimum.value for minimum in minima],
        s=[20 * minimum.num_replicas for minimum in minima],
        alpha=0.6,
    )
    for i, minimum in enumerate(minima, 1):
        axes.annotate(str(minimum.num_replicas), (i, minimum.value))
    axes.set(xlabel="minimum", ylabel="value", title="minima, with numbers of replicas")
    if minima and minima[0].value > 0:
        axes.set_yscale("log")
