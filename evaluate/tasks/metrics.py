"""Metrics of labels, masks and rankings: numpy in, numbers out. Ranks are in `sail_align.align.stats.metrics`.

A tie is never a hit: a model that gives every class the same score, or NaN, has no hits. Values are fractions.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sail_align.align.stats.metrics import TIE
from sail_align.extract.data import IGNORED

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Numbers = NDArray[np.number]


def top_k_hits(scores_NC: Floats, labels_N: Ints, k: int) -> NDArray[np.bool_]:
    """Return whether the label of each row is among its k best classes, (N,). Scores closer than `TIE` are equal."""
    own_N1 = np.take_along_axis(scores_NC, labels_N[:, None], axis=1)
    others_not_worse_N = np.sum(~(scores_NC < own_N1 - TIE), axis=1) - 1
    hits_N: NDArray[np.bool_] = others_not_worse_N < k
    return hits_N


def ranking(scores_N: Floats, own: int) -> Ints:
    """Return the indices of scores from best to worst, (N,). Scores that tie with index `own` come before it."""
    is_own_N = np.arange(len(scores_N)) == own
    return np.lexsort((is_own_N, TIE * is_own_N - scores_N))


def count_pixels(truth: NDArray[np.uint8], predicted: Ints, classes: int) -> NDArray[np.int64]:
    """Return the numbers of right, true and predicted pixels by class, (3, C), without `IGNORED` ones."""
    counted = truth != IGNORED
    truth, predicted = truth[counted], predicted[counted]
    right = truth[truth == predicted]
    return np.stack([np.bincount(labels, minlength=classes) for labels in (right, truth, predicted)])


def iou_per_class(hits_C: Numbers, truth_C: Numbers, predicted_C: Numbers) -> NDArray[np.float64]:
    """Return intersection over union by class, (C,), from right, true and predicted pixels. NaN without pixels."""
    union_C = np.asarray(truth_C + predicted_C - hits_C, dtype=np.float64)
    return np.divide(hits_C, union_C, out=np.full_like(union_C, np.nan), where=union_C > 0)


def chance_ranks(items: int, positives: Ints, ks: Sequence[int]) -> tuple[list[float], float, float]:
    """Return recall@k for each k, median rank and mean rank that random rankings of `items` give on average.

    Ranks are from 1 and those of the best right item. The probability that a query with p positives misses them in the
    first k places is Π_{j<k} (items − p − j) / (items − j). Its expected rank is (items + 1) / (p + 1).

    Args:
        items: Number of ranked items.
        positives: Number of right items of each query.
        ks: The k.
    """
    values_V, counts_V = np.unique(positives, return_counts=True)
    steps_I = np.arange(items)
    misses_VI = np.cumprod(np.maximum(items - values_V[:, None] - steps_I, 0) / (items - steps_I), axis=1)
    recalls = [float(1 - np.average(misses_VI[:, min(k, items) - 1], weights=counts_V)) for k in ks]
    found_I = 1 - np.average(misses_VI, axis=0, weights=counts_V)
    median_rank = float(np.argmax(found_I >= 0.5 - 1e-9) + 1)  # 1e-9: rounding of the product
    return recalls, median_rank, float(np.mean((items + 1) / (positives + 1)))
