"""Recall on hand-made matrices: several right items, and ties that count against the query."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sail_align.align import metrics
from sail_align.align.metrics import ranks, recall_at


def from_scores(scores_NM, owner_M):
    """Ranks of a given score matrix: one-hot texts pick the columns."""
    scores_NM = np.asarray(scores_NM, dtype=float)
    return [side.tolist() for side in ranks(scores_NM, np.eye(scores_NM.shape[1]), np.array(owner_M))]


# fmt: off
MATRICES = [
    pytest.param([[9, 1], [1, 9]], [0, 1], [0, 0], [0, 0], id="all right"),
    pytest.param([[1, 9], [9, 1]], [0, 1], [1, 1], [1, 1], id="all wrong"),
    pytest.param([[5, 5], [5, 5]], [0, 1], [1, 1], [1, 1], id="all tied: each wrong item is ahead"),
    pytest.param([[3, 8, 5, 5],
                  [7, 1, 2, 6]], [0, 0, 1, 1], [0, 1], [1, 0, 1, 0], id="two texts an image: the best one counts"),
    pytest.param([[8, 8, 8, 1],
                  [0, 0, 9, 9]], [0, 0, 1, 1], [1, 0], [0, 0, 0, 0], id="ties among right items do no harm"),
    pytest.param([[1, 5, 5],
                  [4, 2, 2],
                  [3, 2, 9]], [1, 0, 2], [1, 0, 0], [0, 0, 0], id="texts in another order than their images"),
    pytest.param([[2, 3],
                  [1, 4],
                  [9, 9]], [0, 1], [1, 0, 2], [1, 1], id="an image without texts ranks last"),
    pytest.param([[np.nan, 1], [1, 9]], [0, 1], [1, 0], [1, 1], id="not a number is no hit"),
]
# fmt: on


@pytest.mark.parametrize(("scores_NM", "owner_M", "image_ranks", "text_ranks"), MATRICES)
def test_ranks_of_a_matrix_of_scores(scores_NM, owner_M, image_ranks, text_ranks):
    assert from_scores(scores_NM, owner_M) == [image_ranks, text_ranks]


def test_recall_is_the_percentage_within_the_first_k():
    assert recall_at(np.array([0, 0, 4, 5, 9, 10, 50, 7]), (1, 5, 10)) == {1: 25.0, 5: 37.5, 10: 75.0}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_ranks_are_those_of_sorting(images, texts, seed):
    random = np.random.default_rng(seed)
    owner_M = random.integers(0, images, texts)
    images_NE = random.integers(-2, 3, (images, 3)).astype(float)  # small integers: many ties
    texts_ME = random.integers(-2, 3, (texts, 3)).astype(float)
    image_ranks, text_ranks = ranks(images_NE, texts_ME, owner_M)
    for j, owner in enumerate(owner_M):
        scores = images_NE @ texts_ME[j]
        order = sorted(range(images), key=lambda i: (-scores[i], i == owner))
        assert text_ranks[j] == order.index(owner)
    for i in range(images):
        scores, right = texts_ME @ images_NE[i], owner_M == i
        order = sorted(range(texts), key=lambda j: (-scores[j], right[j]))
        assert image_ranks[i] == next((place for place, j in enumerate(order) if right[j]), texts)


def test_blocks_do_not_change_ranks(monkeypatch):
    random = np.random.default_rng(0)
    inputs = random.normal(size=(50, 4)), random.normal(size=(150, 4)), np.repeat(np.arange(50), 3)
    whole = ranks(*inputs)
    monkeypatch.setattr(metrics, "BLOCK", 7)
    for ours, expected in zip(ranks(*inputs), whole, strict=True):
        np.testing.assert_array_equal(ours, expected)
