"""Metrics against hand-made tables, closed forms and plain float64 loops."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sail_align.align.stats.bootstrap import bootstrap, interval, weighted_mean
from sail_align.evaluate.tasks import classification, retrieval, segmentation, winoground
from sail_align.evaluate.tasks.metrics import chance_ranks, count_pixels, iou_per_class, ranking, top_k_hits
from sail_align.evaluate.tasks.pairs import CHANCE
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


def metric_of(task, outcomes, name):
    (metric,) = (metric for metric in task.metrics(outcomes) if metric.name == name)
    return metric


def mean_per_class(hits, labels, drawn=None):
    outcomes = {"top1": hits, "top5": hits, "label": labels, "classes": np.array([labels.max() + 1])}
    metric = metric_of(classification.TASK, outcomes, "mean_per_class")
    return metric.compute(np.ones(len(hits)) if drawn is None else drawn)


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
    found = {name: bool(hit[0]) for name, hit in winoground.TASK.hits(np.array([scores])).items()}
    assert found == {"text": text, "image": image, "group": text and image}


def test_pair_chance_is_exact():
    orders = np.array(list(permutations(range(4))), dtype=float).reshape(-1, 2, 2)
    assert {name: hits.mean() for name, hits in winoground.TASK.hits(orders).items()} == CHANCE


def test_pixel_counts_equal_a_loop_over_pixels():
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, (13, 17)).astype(np.uint8)
    truth[generator.random(truth.shape) < 0.2] = IGNORED
    predicted = generator.integers(0, 4, truth.shape)
    expected = np.zeros((3, 4), dtype=np.int64)
    for y in range(truth.shape[0]):
        for x in range(truth.shape[1]):
            if truth[y, x] != 255:
                expected[0, truth[y, x]] += truth[y, x] == predicted[y, x]
                expected[1, truth[y, x]] += 1
                expected[2, predicted[y, x]] += 1
    assert (count_pixels(truth, predicted, 4) == expected).all()


def test_ignored_pixels_are_not_counted():
    assert count_pixels(np.full((2, 2), IGNORED, dtype=np.uint8), np.zeros((2, 2), dtype=int), 3).sum() == 0


def test_iou_by_hand():
    # Class 0: 3 right of 4 true and 3 predicted. Class 1: 2 right of 2 true and 4 predicted. Class 2: only predicted.
    hits, truth, predicted = np.array([3, 2, 0, 0]), np.array([4, 2, 0, 0]), np.array([3, 4, 1, 0])
    iou = iou_per_class(hits, truth, predicted)
    assert iou[:3].tolist() == [3 / 4, 2 / 4, 0.0]
    assert math.isnan(iou[3])
    outcomes = {"hits": hits[None], "truth": truth[None], "predicted": predicted[None]}
    miou = metric_of(segmentation.TASK, outcomes, "miou")
    assert miou.compute(np.ones(1)) == pytest.approx((3 / 4 + 2 / 4) / 2)


def test_chance_iou_equals_random_labels():
    generator = np.random.default_rng(1)
    truth = generator.choice(4, size=400_000, p=[0.6, 0.3, 0.1, 0.0]).astype(np.uint8)
    counts = count_pixels(truth, generator.integers(0, 4, truth.shape), 4)
    outcomes = dict(zip(("hits", "truth", "predicted"), counts[:, None], strict=True))
    miou = metric_of(segmentation.TASK, outcomes, "miou")
    assert miou.chance == pytest.approx(miou.compute(np.ones(1)), abs=2e-3)


@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 12))
def test_chance_recall_equals_its_closed_form(items, positives, k):
    positives = [min(p, items) for p in positives]
    misses = [math.comb(items - p, min(k, items)) / math.comb(items, min(k, items)) for p in positives]
    ([recall], _, _) = chance_ranks(items, np.array(positives), [k])
    assert recall == pytest.approx(1 - sum(misses) / len(misses))


def test_chance_recall_with_one_positive_is_k_over_n():
    assert chance_ranks(500, np.ones(7, dtype=int), [5, 10])[0] == pytest.approx([0.01, 0.02])


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
def test_median_rank_equals_that_of_repeated_ranks(values, seed):
    weights = np.random.default_rng(seed).integers(0, 4, len(values))
    repeated = np.repeat(values, weights)
    expected = np.median(repeated) + 1 if len(repeated) else math.nan
    outcomes = {"image_rank": np.array(values), "text_rank": np.array(values), "owner": np.arange(len(values))}
    for name in ("t2i_median_rank", "i2t_median_rank"):
        metric = metric_of(retrieval.TASK, outcomes, name)
        assert metric.compute(weights.astype(float)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("items", "positives"), [(7, [1, 1]), (24, [1]), (40, [5, 5, 6]), (9, [9, 1])])
def test_chance_ranks_equal_random_rankings(items, positives):
    """All placements of the right items are equally likely; their best place, counted out."""
    best = []
    for p in positives:
        counts = [math.comb(items - place - 1, p - 1) for place in range(items)]  # the other p − 1 lie behind
        best.append([count / math.comb(items, p) for count in counts])
    odds = np.mean(best, axis=0)
    _, median, mean = chance_ranks(items, np.array(positives), [])
    assert mean == pytest.approx(odds @ np.arange(1, items + 1))
    assert median == np.argmax(np.cumsum(odds) >= 0.5 - 1e-12) + 1


def test_top_k_and_mean_per_class_equal_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    generator = np.random.default_rng(2)
    scores, labels = generator.normal(size=(300, 11)), generator.integers(0, 11, 300)
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=range(11))
        assert top_k_hits(scores, labels, k).mean() == pytest.approx(expected)
    expected = balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert mean_per_class(top_k_hits(scores, labels, 1), labels) == pytest.approx(expected)
