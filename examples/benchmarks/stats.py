"""The statistics of the study: intervals, paired tests, corrections, profiles."""

from collections.abc import Sequence

import numpy as np
import scipy.stats


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean over seeds."""
    if len(values) < 2:
        return float(values[0]), float(values[0])
    found = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def log_floored(values: np.ndarray, floor: float) -> np.ndarray:
    """log10 of scores above a floor; a NaN is as bad as the largest float32."""
    worst = float(np.finfo(np.float32).max)
    filled = np.nan_to_num(values, nan=worst, posinf=worst)
    return np.log10(np.clip(filled, floor, worst))


def geometric_mean(values: np.ndarray, floor: float) -> np.ndarray:
    """Over seeds, the last axis, of scores above a floor."""
    return 10 ** log_floored(values, floor).mean(axis=-1)


def paired_p(ours: np.ndarray, theirs: np.ndarray, floor: float) -> float:
    """Two-sided p of a paired t-test on the logarithms of scores, a pair per seed.

    Scores of a problem spread over decades, and their ratio is what counts.
    """
    difference = log_floored(ours, floor) - log_floored(theirs, floor)
    if np.allclose(difference, difference[0], rtol=0, atol=1e-12):
        # Without scatter there is no test: equal, or better on every seed alike.
        return 1.0 if abs(difference[0]) < 1e-12 else 0.0
    return float(scipy.stats.ttest_1samp(difference, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted p values after Holm: the k-th smallest of n is multiplied by n - k + 1.

    References:
      S. Holm, `A simple sequentially rejective multiple test procedure
      <https://www.jstor.org/stable/4615733>`_, 1979.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def profile(ratios: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Part of the cells in which a score is within each limit of the best one's.

    References:
      E. Dolan, J. More, `Benchmarking optimization software with performance profiles
      <https://doi.org/10.1007/s101070100263>`_, 2002.
    """
    return np.mean(ratios[:, None] <= limits[None], axis=0)
