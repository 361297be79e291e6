"""Bootstrap over items: numpy in, numbers out.

A statistic takes how often each item was drawn, (N,), and returns a number, NaN if the draw has none: with every item
once it is the score, with a resample's counts its bootstrap value.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Values = NDArray[np.number] | NDArray[np.bool_]
Statistic = Callable[[NDArray[np.float64]], float]
RESAMPLES = 1_000


def draws(items: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[NDArray[np.float64]]:
    """Yield how often each item occurs, (items,), in samples of `items` items drawn with replacement.

    The same seed gives the same draws, so that two models are compared on the same ones.
    """
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(generator.integers(items, size=items), minlength=items).astype(np.float64)


def bootstrap(
    statistics: Sequence[Statistic], items: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Return each statistic of each draw, (resamples, statistics)."""
    values = [[of(drawn_N) for of in statistics] for drawn_N in draws(items, resamples=resamples, seed=seed)]
    return np.array(values).reshape(resamples, len(statistics))


def interval(values_R: Floats) -> tuple[float, float]:
    """Return the 95 % percentile interval of bootstrap values; draws without a value do not count."""
    if np.isnan(values_R).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(values_R, [2.5, 97.5])
    return float(low), float(high)


def weighted_mean(values_N: Values, weights_N: Floats) -> float:
    """Return a weighted mean, NaN if all weights are zero."""
    total = weights_N.sum()
    return float(weights_N @ values_N / total) if total else float("nan")


def mean_interval(values_N: Values) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean over independent items."""
    means_R1 = bootstrap([lambda drawn_N: weighted_mean(values_N, drawn_N)], len(values_N))
    return interval(means_R1[:, 0])
