"""Metrics against hand-made tables, closed forms and plain float64 loops."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sail_align.align.stats.bootstrap import bootstrap, interval, weighted_mean
from sail_align.evaluate.tasks.metrics import (
    chance_mean_iou,
    chance_mean_rank,
    chance_median_rank,
    chance_recall,
    confusion_matrix,
    iou_per_class,
    mean_iou,
    mean_per_class,
    pair_hits,
    ranking,
    top_k_hits,
    weighted_median,
)
from sail_align.extract.data import IGNORED

SCORES = np.array(
    [
        [0.9, 0.1, 0.2, 0.3],  # label 0: first
        [0.5, 0.1, 0.6, 0.3],  # label 0: second
        [0.4, 0.4, 0.1, 0.0],  # label 1: tied for first
        [0.1, 0.2, 0.3, 0.0],  # label 3: last
    ]
)
LABELS = np.array([0, 0, 1, 3])


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [1, 0, 0, 0]), (2, [1, 1, 1, 0]), (3, [1, 1, 1, 0]), (4, [1, 1, 1, 1])]
)
def test_top_k_hits_count_a_tie_as_a_miss(k, expected):
    assert top_k_hits(SCORES, LABELS, k).tolist() == [bool(hit) for hit in expected]


def test_equal_or_nan_scores_are_misses():
    assert not top_k_hits(np.zeros((3, 5)), np.array([0, 1, 2]), 4).any()
    assert not top_k_hits(np.full((3, 5), np.nan), np.array([0, 1, 2]), 4).any()


def test_ranking_agrees_with_top_k_hits():
    scores = np.random.default_rng(4).integers(0, 4, (200, 5)) / 3  # small integers: many ties
    labels = np.random.default_rng(5).integers(0, 5, 200)
    for k in (1, 3):
        found = [label in ranking(row, label)[:k] for row, label in zip(scores, labels, strict=True)]
        assert found == top_k_hits(scores, labels, k).tolist()
    assert ranking(np.array([0.1, 0.9, 0.5]), 1).tolist() == [1, 2, 0]


def test_mean_per_class_weights_classes_equally():
    hits, labels = np.array([True, True, True, False, False]), np.array([0, 0, 0, 0, 2])
    assert mean_per_class(hits, labels) == pytest.approx((3 / 4 + 0) / 2)


def test_mean_per_class_with_weights_equals_repeated_rows():
    hits, labels = np.array([True, False, True, False]), np.array([0, 0, 1, 2])
    drawn = np.array([3, 1, 2, 0])
    assert mean_per_class(hits, labels, drawn.astype(float)) == pytest.approx(
        mean_per_class(np.repeat(hits, drawn), np.repeat(labels, drawn))
    )


@pytest.mark.parametrize(
    ("scores", "text", "image"),
    [
        ([[0.9, 0.1], [0.2, 0.8]], True, True),
        ([[0.9, 0.95], [0.2, 0.97]], True, False),
        ([[0.9, 0.1], [0.95, 0.97]], False, True),
        ([[0.1, 0.9], [0.8, 0.2]], False, False),
        ([[0.5, 0.5], [0.5, 0.5]], False, False),
        ([[0.5, 0.4], [0.5, 0.6]], False, True),  # a tie in one comparison is no success
    ],
)
def test_pair_hits_on_hand_made_scores(scores, text, image):
    """scores[caption][image]"""
    assert [bool(hit[0]) for hit in pair_hits(np.array([scores]))] == [text, image, text and image]


def test_pair_chance_is_exact():
    from sail_align.evaluate.tasks.winoground import CHANCE

    orders = np.array(list(permutations(range(4))), dtype=float).reshape(-1, 2, 2)
    text, image, group = pair_hits(orders)
    assert {"text": text.mean(), "image": image.mean(), "group": group.mean()} == CHANCE


def test_confusion_matrix_equals_a_loop_over_pixels():
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, (13, 17)).astype(np.uint8)
    truth[generator.random(truth.shape) < 0.2] = IGNORED
    predicted = generator.integers(0, 4, truth.shape)
    expected = np.zeros((4, 4), dtype=np.int64)
    for y in range(truth.shape[0]):
        for x in range(truth.shape[1]):
            if truth[y, x] != 255:
                expected[truth[y, x], predicted[y, x]] += 1
    assert (confusion_matrix(truth, predicted, 4) == expected).all()


def test_confusion_matrix_rejects_an_unknown_class():
    with pytest.raises(ValueError, match="mask value 7, expected one of 3 classes"):
        confusion_matrix(np.array([[0, 7]], dtype=np.uint8), np.zeros((1, 2), dtype=int), 3)


def test_ignored_pixels_are_not_counted():
    assert confusion_matrix(np.full((2, 2), IGNORED, dtype=np.uint8), np.zeros((2, 2), dtype=int), 3).sum() == 0


def test_iou_by_hand():
    # Class 0: 3 right of 4 true and 3 predicted. Class 1: 2 right of 2 true and 4 predicted. Class 2: only predicted.
    hits, truth, predicted = np.array([3, 2, 0, 0]), np.array([4, 2, 0, 0]), np.array([3, 4, 1, 0])
    iou = iou_per_class(hits, truth, predicted)
    assert iou[:3].tolist() == [3 / 4, 2 / 4, 0.0]
    assert math.isnan(iou[3])
    assert mean_iou(hits, truth, predicted) == pytest.approx((3 / 4 + 2 / 4) / 2)


def test_chance_iou_equals_random_labels():
    generator = np.random.default_rng(1)
    truth = generator.choice(4, size=400_000, p=[0.6, 0.3, 0.1, 0.0]).astype(np.uint8)
    confusion = confusion_matrix(truth, generator.integers(0, 4, truth.shape), 4)
    measured = mean_iou(np.diagonal(confusion), confusion.sum(1), confusion.sum(0))
    assert chance_mean_iou(np.bincount(truth, minlength=4)) == pytest.approx(measured, abs=2e-3)


@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 12))
def test_chance_recall_equals_its_closed_form(items, positives, k):
    positives = [min(p, items) for p in positives]
    misses = [math.comb(items - p, min(k, items)) / math.comb(items, min(k, items)) for p in positives]
    assert chance_recall(items, np.array(positives), k) == pytest.approx(1 - sum(misses) / len(misses))


def test_chance_recall_with_one_positive_is_k_over_n():
    assert chance_recall(500, np.ones(7, dtype=int), 10) == pytest.approx(0.02)


def test_bootstrap_interval_is_seeded_and_close_to_normal():
    hits = np.arange(400) % 4 == 0
    mean = [lambda drawn: weighted_mean(hits, drawn)]
    low, high = interval(bootstrap(mean, 400)[:, 0])
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == interval(bootstrap(mean, 400)[:, 0])
    assert low == pytest.approx(0.25 - half, abs=0.01)
    assert high == pytest.approx(0.25 + half, abs=0.01)


def test_bootstrap_draws_items_with_replacement():
    totals = []
    bootstrap([lambda drawn: totals.append(drawn.sum()) or 0.0], 30, resamples=20)
    assert totals == [30.0] * 20


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_weighted_median_equals_repeated_values(values, seed):
    weights = np.random.default_rng(seed).integers(0, 4, len(values))
    repeated = np.repeat(values, weights)
    expected = np.median(repeated) if len(repeated) else math.nan
    assert weighted_median(np.array(values), weights.astype(float)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("items", "positives"), [(7, [1, 1]), (24, [1]), (40, [5, 5, 6]), (9, [9, 1])])
def test_chance_ranks_equal_random_rankings(items, positives):
    """All placements of the right items are equally likely; their best place, counted out."""
    best = []
    for p in positives:
        counts = [math.comb(items - place - 1, p - 1) for place in range(items)]  # the other p − 1 lie behind
        best.append([count / math.comb(items, p) for count in counts])
    odds = np.mean(best, axis=0)
    assert chance_mean_rank(items, np.array(positives)) == pytest.approx(odds @ np.arange(1, items + 1))
    assert chance_median_rank(items, np.array(positives)) == np.argmax(np.cumsum(odds) >= 0.5 - 1e-12) + 1


def test_top_k_and_mean_per_class_equal_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    generator = np.random.default_rng(2)
    scores, labels = generator.normal(size=(300, 11)), generator.integers(0, 11, 300)
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=range(11))
        assert top_k_hits(scores, labels, k).mean() == pytest.approx(expected)
    expected = balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert mean_per_class(top_k_hits(scores, labels, 1), labels) == pytest.approx(expected)
