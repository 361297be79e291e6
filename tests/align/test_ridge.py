"""The ridge is cross-validated in one pass, and equals that of explicit refits."""

import numpy as np
import pytest
import torch
from closed_form_reference import add_in_blocks, normed

from sail_align.align.train import ridge
from sail_align.align.train.ridge import FOLDS, FoldedMoments, climb
from sail_align.extract.errors import UserError

IMAGE_DIM, TEXT_DIM, DIM = 30, 20, 10


def pairs(rows, noise=1.0, captions=2, seed=0):
    random = np.random.default_rng(seed)
    factors = random.normal(size=(rows, 6))
    image = factors @ random.normal(size=(6, IMAGE_DIM)) + noise * random.normal(size=(rows, IMAGE_DIM))
    text = factors @ random.normal(size=(6, TEXT_DIM)) + noise * random.normal(size=(captions, rows, TEXT_DIM))
    return torch.tensor(image), torch.tensor(text)


def folded(image_ND, text_CND, block=64):
    return add_in_blocks(FoldedMoments(IMAGE_DIM, TEXT_DIM, len(image_ND)), image_ND, text_CND, block)


def variates(x, y, rows, strength):
    """Regularised CCA of explicit lists of pairs by symmetric square roots, in numpy."""
    covariances = []
    for each in (x, y):
        centred = each - each.mean(0)
        covariance = centred.T @ centred / len(each)
        covariances.append(covariance + strength / rows * np.trace(covariance) * np.eye(len(covariance)))
    roots = []
    for covariance in covariances:
        values, vectors = np.linalg.eigh(covariance)
        roots.append(vectors / np.sqrt(values) @ vectors.T)
    cross = (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)
    left, rho, right = np.linalg.svd(roots[0] @ cross @ roots[1])
    a, b = roots[0] @ left[:, :DIM], roots[1] @ right[:DIM].T
    return (lambda z: (z - x.mean(0)) @ a), (lambda z: (z - y.mean(0)) @ b), rho[:DIM]


def refitted(image_ND, text_CND, strength, likelihood):
    """Mean reciprocal rank of each fold by maps of the others, with loops."""
    x_ND, y_CND, scores = normed(image_ND), normed(text_CND), []
    captions = len(y_CND)
    for fold in range(FOLDS):
        inside = np.arange(len(x_ND)) % FOLDS == fold
        x, y = x_ND[~inside], y_CND[:, ~inside]
        image, text, rho = variates(np.tile(x, (captions, 1)), y.reshape(-1, TEXT_DIM), len(x), strength)
        u, w = image(x_ND[inside]), text(y_CND[:, inside].reshape(-1, TEXT_DIM))
        if likelihood:
            table = u * rho / (1 - rho**2) @ w.T
            table -= (u**2 @ (rho**2 / (1 - rho**2)))[:, None] / 2 + (w**2 @ (rho**2 / (1 - rho**2))) / 2
        else:
            u, w = u * rho, w * rho
            table = u / np.linalg.norm(u, axis=1, keepdims=True) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
        owner = np.tile(np.arange(len(u)), captions)
        by_text = [1 / (1 + sum(table[:, j] > table[i, j])) for j, i in enumerate(owner)]
        by_image = [1 / (1 + sum(table[i, owner != i] > table[i, owner == i].max())) for i in range(len(u))]
        scores.append((np.mean(by_text) + np.mean(by_image)) / 2)
    return np.mean(scores)


@pytest.mark.parametrize("likelihood", [False, True])
@pytest.mark.parametrize("rows", [60, 153])
def test_choice_equals_that_of_explicit_refits(rows, likelihood):
    image_ND, text_CND = pairs(rows)
    found = folded(image_ND, text_CND).choose_ridge(DIM, likelihood=likelihood)
    scores = {
        each: refitted(image_ND, text_CND, each, likelihood) for each in (found / 2, found, found * 2, ridge.RIDGE)
    }
    assert scores[found] > max(scores.values()) - 1e-9


def test_blocks_and_folds_add_up_to_the_moments_of_all_pairs():
    image_ND, text_CND = pairs(153)
    expected, total = folded(image_ND, text_CND, block=1_000).total(), folded(image_ND, text_CND, block=31).total()
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(total, name), value, msg=name)
    assert total.rows == 153


def test_a_sample_of_many_pairs_covers_all_folds(monkeypatch):
    monkeypatch.setattr(ridge, "SAMPLE_ROWS", 25)
    image_ND, text_CND = pairs(250)  # every tenth pair, whose numbers are multiples of the number of folds
    moments = folded(image_ND, text_CND)
    sizes = [sum(len(image_BD) for image_BD, _ in sample) for sample in moments._sample]
    assert sizes == [5] * FOLDS
    assert [each.rows for each in moments.folds] == [50] * FOLDS
    assert moments.choose_ridge(DIM) > 0


def test_more_noise_needs_no_smaller_ridge():
    few, many = (folded(*pairs(100, noise)).choose_ridge(DIM) for noise in (0.3, 4.0))
    assert few <= many


def test_few_pairs_take_the_default():
    assert folded(*pairs(20)).choose_ridge(DIM) == ridge.RIDGE


def test_equal_features_are_rejected():
    image_ND, text_CND = pairs(60)
    with pytest.raises(UserError, match="The image features are the same in all rows"):
        folded(image_ND[:1].expand_as(image_ND), text_CND).choose_ridge(DIM)


@pytest.mark.parametrize("peak", [-10, -3, 0, 4, 12])
def test_climb_finds_the_peak(peak):
    assert climb(lambda n: -abs(n - peak), 10) == min(peak, 10)
