"""Bootstrap over items, or over groups of items: numpy in, numbers out.

A statistic takes the number of times each item was drawn, (N,), and returns a number, or NaN if it is undefined for the
draw. With every item drawn once, it returns the score.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Values = NDArray[np.number] | NDArray[np.bool_]
Statistic = Callable[[NDArray[np.float64]], float]


def bootstrap(
    statistics: Sequence[Statistic],
    items: int,
    *,
    groups_N: NDArray[np.integer] | None = None,
    resamples: int = 1_000,
) -> NDArray[np.float64]:
    """Return the bootstrap values (resamples, statistics): each statistic of each draw of `items` with replacement.

    Items that are not independent, such as the frames of a video, share a group. Whole groups are then drawn, as many
    as there are, each with all its items (cluster bootstrap: Davison and Hinkley 1997, section 3.8).

    Each call makes the same draws, so two models can be compared on them.

    Args:
        statistics: The statistics.
        items: Number of items.
        groups_N: Number of each item's group, (items,). Default: each item is a group of its own.
        resamples: Number of draws.
    """
    generator = np.random.default_rng(0)
    place_N = None if groups_N is None else np.unique(groups_N, return_inverse=True)[1]
    units = items if place_N is None else int(place_N.max()) + 1
    values = []
    for _ in range(resamples):
        drawn_U = np.bincount(generator.integers(units, size=units), minlength=units).astype(np.float64)
        drawn_N = drawn_U if place_N is None else drawn_U[place_N]
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
