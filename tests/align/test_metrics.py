"""Metrics on hand-made matrices, and compared with direct implementations of their formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sail_align.align.stats import metrics
from sail_align.align.stats.bootstrap import mean_interval
from sail_align.align.stats.metrics import TIE, cka_by_row, effective_rank, mutual_knn, ranks, unit_rows


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
    pytest.param([[np.nan, 1], [1, 9]], [0, 1], [1, 0], [1, 1], id="NaN is not a hit"),
]
# fmt: on


@pytest.mark.parametrize(("scores_NM", "owner_M", "image_ranks", "text_ranks"), MATRICES)
def test_ranks_of_a_matrix_of_scores(scores_NM, owner_M, image_ranks, text_ranks):
    assert from_scores(scores_NM, owner_M) == [image_ranks, text_ranks]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_ranks_equal_sorting(images, texts, seed):
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


def test_identical_images_tie_anywhere_in_the_matrix():
    """A BLAS may give equal columns different scores; the detection of ties must not depend on it."""
    random = np.random.default_rng(0)
    images = random.normal(size=(501, 96)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    twins = np.concatenate([images, images[::-1]])
    image_ranks, text_ranks = ranks(twins, images, np.arange(501))
    assert (text_ranks == 1).all()
    assert (image_ranks[:501] == 0).all()


def test_ranks_equal_float64_except_for_differences_close_to_a_tie():
    """If scores differ by about `TIE`, float32 rounding may change a rank: about 1 in 10,000."""
    random = np.random.default_rng(0)
    images, texts = (unit_rows(random.normal(size=(rows, 512))) for rows in (600, 3000))
    owner = np.repeat(np.arange(600), 5)
    scores = images.astype(np.float64) @ texts.T.astype(np.float64)
    right = owner == np.arange(600)[:, None]
    wrong, own = np.where(right, -np.inf, scores), scores[owner, np.arange(3000)]
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)

    def expected(tie):
        return (wrong >= best - tie).sum(axis=1), (wrong >= own - tie).sum(axis=0)

    rounding = 1e-7
    ours = ranks(images, texts, owner)
    for found, exact, low, high in zip(
        ours, expected(TIE), expected(TIE - rounding), expected(TIE + rounding), strict=True
    ):
        assert ((low <= found) & (found <= high)).all()
        assert np.mean(found != exact) < 0.002


def test_tiles_do_not_change_ranks(monkeypatch):
    random = np.random.default_rng(0)
    inputs = random.normal(size=(50, 4)), random.normal(size=(150, 4)), np.repeat(np.arange(50), 3)
    whole = ranks(*inputs)
    monkeypatch.setattr(metrics, "TILE", 7)
    for ours, expected in zip(ranks(*inputs), whole, strict=True):
        np.testing.assert_array_equal(ours, expected)


SQUARE = np.array([[10, 1], [10, 2], [1, 10], [2, 10]], dtype=np.float16)  # two pairs of near directions


# fmt: off
SWAPPED = SQUARE[[0, 2, 1, 3]]
NEIGHBOURS = [
    pytest.param(SQUARE, 1, [1, 1, 1, 1], id="the same"),
    pytest.param(SQUARE * [3, 3], 1, [1, 1, 1, 1], id="lengths do not matter"),
    pytest.param(SWAPPED, 1, [0, 0, 0, 0], id="partners swapped"),
    pytest.param(SWAPPED, 2, [.5, .5, .5, 1], id="of two, one or both are the same"),
    pytest.param(SWAPPED, 3, [1, 1, 1, 1], id="all the others are everybody's neighbours"),
]
# fmt: on


@pytest.mark.parametrize(("y_ND", "k", "shared_N"), NEIGHBOURS)
def test_mutual_knn_of_four_rows(y_ND, k, shared_N):
    assert mutual_knn(SQUARE, y_ND, k).tolist() == shared_N


def test_mutual_knn_equals_sorting_and_has_the_expected_chance(monkeypatch):
    random = np.random.default_rng(0)
    x_ND = random.normal(size=(60, 5))
    y_ND = np.concatenate([x_ND[:, :3], random.normal(size=(60, 2))], axis=1)

    def neighbours(view_ND, row, k):
        cosine = [(view_ND[row] @ other) / np.linalg.norm(other) for other in view_ND]
        return set(sorted(set(range(60)) - {row}, key=lambda other: -cosine[other])[:k])

    monkeypatch.setattr(metrics, "QUERY_ROWS", 7)
    for k in (1, 10):
        expected = [len(neighbours(x_ND, row, k) & neighbours(y_ND, row, k)) / k for row in range(60)]
        np.testing.assert_allclose(mutual_knn(x_ND, y_ND, k), expected)
    unrelated = np.mean([mutual_knn(random.normal(size=(60, 5)), x_ND, 10).mean() for _ in range(50)])
    assert unrelated == pytest.approx(10 / 59, abs=0.01)
    with pytest.raises(ValueError, match="10 rows are too few for 10 nearest neighbours"):
        mutual_knn(x_ND[:10], y_ND[:10], 10)


def dense_cka(x_ND, y_ND):
    """Song et al. (2012), eq. 5, with the kernels written out."""
    rows, ones = len(x_ND), np.ones(len(x_ND))

    def hsic(k_NN, l_NN):
        k_NN, l_NN = (each - np.diag(np.diag(each)) for each in (k_NN, l_NN))
        mean = (ones @ k_NN @ ones) * (ones @ l_NN @ ones) / ((rows - 1) * (rows - 2))
        return (np.trace(k_NN @ l_NN) + mean - 2 / (rows - 2) * (ones @ k_NN @ l_NN @ ones)) / (rows * (rows - 3))

    k_NN, l_NN = x_ND @ x_ND.T, y_ND @ y_ND.T
    return hsic(k_NN, l_NN) / np.sqrt(hsic(k_NN, k_NN) * hsic(l_NN, l_NN))


def test_cka_equals_the_dense_formula():
    random = np.random.default_rng(1)
    x_ND = random.normal(size=(40, 9)) + 3
    y_ND = x_ND @ random.normal(size=(9, 6)) + random.normal(size=(40, 6))
    assert cka_by_row(x_ND, y_ND).mean() == pytest.approx(dense_cka(x_ND, y_ND), rel=1e-10)


def test_cka_is_1_up_to_rotation_scale_and_shift_and_0_for_unrelated_views():
    random = np.random.default_rng(2)
    x_ND = random.normal(size=(30, 8))
    rotation_DD, _ = np.linalg.qr(random.normal(size=(8, 8)))
    assert cka_by_row(x_ND, 5 * x_ND @ rotation_DD + 1).mean() == pytest.approx(1)
    views = [(random.normal(size=(30, 100)), random.normal(size=(30, 100))) for _ in range(100)]
    assert abs(np.mean([cka_by_row(*each) for each in views])) < 0.02  # the biased estimator has 0.77
    assert not cka_by_row(np.ones((6, 2)), x_ND[:6]).any()
    with pytest.raises(ValueError, match="4 rows are too few"):
        cka_by_row(x_ND[:4], x_ND[:4])


def test_cka_by_row_equals_leaving_out_each_row():
    generator = np.random.default_rng(4)
    x = generator.normal(size=(30, 6))
    y = x[:, :4] @ generator.normal(size=(4, 4)) + generator.normal(size=(30, 4)) + 3.0
    whole = dense_cka(x, y)
    without = np.array([dense_cka(np.delete(x, row, axis=0), np.delete(y, row, axis=0)) for row in range(30)])
    found = cka_by_row(x, y)
    np.testing.assert_allclose(found, whole + 29 * (without.mean() - without), rtol=1e-8)
    assert found.mean() == pytest.approx(whole)


@pytest.mark.slow
def test_interval_of_cka_covers_the_population_value():
    """About 38 of 40 intervals of 60 rows contain the value of 20,000 rows."""
    generator = np.random.default_rng(5)
    mixing = generator.normal(size=(5, 5))

    def views(rows):
        x = generator.normal(size=(rows, 5))
        return x, x @ mixing + 2 * generator.normal(size=(rows, 5))

    truth = cka_by_row(*views(20_000)).mean()
    held = 0
    for _ in range(40):
        by_row = cka_by_row(*views(60))
        low, high = mean_interval(by_row)
        held += low <= truth <= high
    assert held >= 33


def test_mean_interval_equals_the_binomial():
    hits_N = np.arange(400) < 100
    low, high = mean_interval(hits_N)
    error = np.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - 1.96 * error, abs=0.006)
    assert high == pytest.approx(0.25 + 1.96 * error, abs=0.006)
    assert mean_interval(np.ones(5)) == (1, 1)


def test_effective_rank_of_hand_made_embeddings():
    assert effective_rank(np.tile([3.0, 4.0], (5, 1))) == pytest.approx(1)
    assert effective_rank(np.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]]) == pytest.approx(4)
    # Singular values 3 and 1: entropy of (3/4, 1/4).
    expected = np.exp(0.75 * np.log(4 / 3) + 0.25 * np.log(4))
    assert effective_rank(np.diag([3.0, 1.0])) == pytest.approx(expected)
    wide = np.random.default_rng(0).normal(size=(20, 50))
    singular = np.linalg.svd(wide, compute_uv=False)
    shares = singular / singular.sum()
    assert effective_rank(wide.astype(np.float32)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert effective_rank(wide.T) == pytest.approx(effective_rank(wide))
    assert effective_rank(np.zeros((3, 2))) == 0
    assert effective_rank(np.array([[1.0, np.nan]])) == 0
