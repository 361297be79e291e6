"""Bootstrap over items: numpy in, numbers out.

A statistic takes the number of times each item was drawn, (N,), and returns a number, or NaN if it is undefined for the
draw. With every item drawn once, it returns the score.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Values = NDArray[np.number] | NDArray[np.bool_]
Statistic = Callable[[NDArray[np.float64]], float]


def bootstrap(statistics: Sequence[Statistic], items: int, *, resamples: int = 1_000) -> NDArray[np.float64]:
    """Return the bootstrap values (resamples, statistics): each statistic of each draw of `items` with replacement.

    Each call makes the same draws, so two models can be compared on them.
    """
    generator = np.random.default_rng(0)
    values = []
    for _ in range(resamples):
        drawn_N = np.bincount(generator.integers(items, size=items), minlength=items).astype(np.float64)
        values.append([statistic(drawn_N) for statistic in statistics])
    return np.array(values).reshape(resamples, len(statistics))


def interval(values_R: Floats) -> tuple[float, float]:
    """Return the 95 % percentile interval of bootstrap values, ignoring NaN."""
    if np.isnan(values_R).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(values_R, [2.5, 97.5])
    return float(low), float(high)


def weighted_mean(values_N: Values, weights_N: Floats) -> float:
    """Return the weighted mean, or NaN if all weights are zero."""
    total = weights_N.sum()
    return float(weights_N @ values_N / total) if total else float("nan")


def mean_interval(values_N: Values) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of independent items."""
    means_R1 = bootstrap([lambda drawn_N: weighted_mean(values_N, drawn_N)], len(values_N))
    return interval(means_R1[:, 0])
