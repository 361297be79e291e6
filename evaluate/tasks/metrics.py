"""Metrics of labels, masks and pairs: numpy in, numbers out. Ranks are in `sail_align.align.stats.metrics`.

A tie is never a hit: a model that gives every class the same score, or NaN, has no hits. Values are fractions.
"""

import numpy as np
from numpy.typing import NDArray

from sail_align.align.stats.bootstrap import weighted_mean
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


def mean_per_class(hits_N: NDArray[np.bool_], labels_N: Ints, weights_N: Floats | None = None) -> float:
    """Return the mean, over the classes that occur, of the share of hits. Rows may have weights."""
    weights_N = np.ones(len(hits_N)) if weights_N is None else weights_N
    rows_C = np.bincount(labels_N, weights_N)
    right_C = np.bincount(labels_N, weights_N * hits_N)
    return float((right_C[rows_C > 0] / rows_C[rows_C > 0]).mean())


def pair_hits(scores_KCI: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the text, image and group hits of Winoground, (K,) each, from scores (K, 2 captions, 2 images).

    Text: each image prefers its own caption. Image: each caption prefers its own image. Group: both. Comparisons are
    strict, as in Thrush et al. 2022, "Winoground", section 3.2.
    """
    c0_i0, c0_i1, c1_i0, c1_i1 = (scores_KCI[:, caption, image] for caption in (0, 1) for image in (0, 1))
    text_K = (c0_i0 > c1_i0) & (c1_i1 > c0_i1)
    image_K = (c0_i0 > c0_i1) & (c1_i1 > c1_i0)
    return text_K, image_K, text_K & image_K


def confusion_matrix(truth: NDArray[np.uint8], predicted: Ints, classes: int) -> NDArray[np.int64]:
    """Count pixels by true class (row) and predicted class (column), (C, C), without `IGNORED` ones.

    Raises:
        ValueError: A mask has a value that is neither a class nor `IGNORED`.
    """
    counted = truth != IGNORED
    if counted.any() and (highest := int(truth[counted].max())) >= classes:
        raise ValueError(f"mask value {highest}, expected one of {classes} classes (0 … {classes - 1}) or {IGNORED}")
    cells = truth[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def iou_per_class(hits_C: Numbers, truth_C: Numbers, predicted_C: Numbers) -> NDArray[np.float64]:
    """Return intersection over union by class, (C,), from right, true and predicted pixels. NaN without pixels."""
    union_C = np.asarray(truth_C + predicted_C - hits_C, dtype=np.float64)
    return np.divide(hits_C, union_C, out=np.full_like(union_C, np.nan), where=union_C > 0)


def mean_iou(hits_C: Numbers, truth_C: Numbers, predicted_C: Numbers) -> float:
    """Return the mean IoU over the classes in the truth. Predictions of other classes lower it through the unions."""
    iou_C = iou_per_class(hits_C, truth_C, predicted_C)
    return weighted_mean(iou_C[truth_C > 0], np.ones(np.count_nonzero(truth_C)))


def chance_mean_iou(truth_pixels_C: Ints) -> float:
    """Return the mIoU of labels drawn uniformly at random, from the pixels of each true class (C,).

    For a class with a share p of the pixels, the share of hits is p / C and that of the union p + 1 / C − p / C. This
    is exact in the limit of many pixels. Classes that do not occur are left out, as in `mean_iou`.
    """
    share_C = truth_pixels_C[truth_pixels_C > 0] / truth_pixels_C.sum()
    classes = len(truth_pixels_C)
    return float((share_C / (classes * share_C + 1 - share_C)).mean())


def chance_recall(items: int, positives: Ints, k: int) -> float:
    """Return the expected recall@k of a random ranking of `items`, over queries with these numbers of positives.

    The probability that a query with p positives misses is Π_{j<k} (items − p − j) / (items − j).
    """
    values, counts = np.unique(positives, return_counts=True)
    steps_k = np.arange(min(k, items))
    misses = np.prod(np.maximum(items - values[:, None] - steps_k, 0) / (items - steps_k), axis=1)
    return float(1 - np.average(misses, weights=counts))


def chance_median_rank(items: int, positives: Ints) -> float:
    """Return the median rank, from 1, of the best right item in a random ranking of `items`, over such queries."""
    values, counts = np.unique(positives, return_counts=True)
    steps_I = np.arange(items)
    kept_VI = np.maximum(items - values[:, None] - steps_I, 0) / (items - steps_I)
    found_I = 1 - np.average(np.cumprod(kept_VI, axis=1), axis=0, weights=counts)
    return float(np.argmax(found_I >= 0.5 - 1e-9) + 1)  # 1e-9: rounding of the product


def chance_mean_rank(items: int, positives: Ints) -> float:
    """Return the expected rank, from 1, of the best right item in a random ranking: (items + 1) / (p + 1)."""
    return float(np.mean((items + 1) / (positives + 1)))


def weighted_median(values_N: Numbers, weights_N: Floats, order_N: Ints | None = None) -> float:
    """Return the median of values that are repeated by their weights. NaN if all weights are zero.

    Args:
        values_N: The values.
        weights_N: Whole numbers ≥ 0.
        order_N: Indices that sort the values, if they are known.
    """
    order_N = np.argsort(values_N) if order_N is None else order_N
    upto_N = np.cumsum(weights_N[order_N])
    if not len(upto_N) or not upto_N[-1]:
        return float("nan")
    middle = (upto_N[-1] + 1) / 2  # between two values if their number is even
    places = np.searchsorted(upto_N, [np.floor(middle), np.ceil(middle)])
    return float(values_N[order_N[places]].mean())
