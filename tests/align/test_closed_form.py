"""The closed form is canonical correlation analysis, for any order and blocks of pairs."""

import numpy as np
import pytest
import torch

from sail_align.align.model.closed_form import Moments
from sail_align.extract.errors import UserError

IMAGE_DIM, TEXT_DIM = 9, 6


def pairs(rows=400, captions=2, seed=0):
    """Images and captions that share three factors, under noise."""
    random = np.random.default_rng(seed)
    factors = random.normal(size=(rows, 3))
    image = factors @ random.normal(size=(3, IMAGE_DIM)) + random.normal(size=(rows, IMAGE_DIM))
    text = factors @ random.normal(size=(3, TEXT_DIM)) + random.normal(size=(captions, rows, TEXT_DIM))
    return torch.tensor(image), torch.tensor(text)


def moments_of(image_ND, text_CND, block=400):
    moments = Moments(IMAGE_DIM, TEXT_DIM)
    for start in range(0, len(image_ND), block):
        moments.add(image_ND[start : start + block], text_CND[:, start : start + block])
    return moments


def normed(features):
    x = features.numpy()
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def by_eigenproblem(image_ND, text_CND, dim, ridge):
    """The textbook's generalised eigenproblem over the explicit list of pairs, in numpy."""
    x = np.concatenate([normed(image_ND)] * len(text_CND))
    y = np.concatenate(list(normed(text_CND)))
    x, y = x - x.mean(0), y - y.mean(0)
    xx, yy, xy = x.T @ x / len(x), y.T @ y / len(y), x.T @ y / len(x)
    xx += ridge / len(image_ND) * np.trace(xx) * np.eye(len(xx))
    yy += ridge / len(image_ND) * np.trace(yy) * np.eye(len(yy))
    values, vectors = np.linalg.eig(np.linalg.solve(xx, xy) @ np.linalg.solve(yy, xy.T))
    order = np.argsort(-values.real)[:dim]
    correlations, a = np.sqrt(values.real[order]), vectors.real[:, order]
    a = a / np.sqrt(np.sum(a * (xx @ a), axis=0))
    b = np.linalg.solve(yy, xy.T) @ a / correlations
    return x @ a * correlations, y @ b * correlations, correlations


@pytest.mark.parametrize("ridge", [0.5, 2.0])
def test_cca_solves_the_generalised_eigenproblem(ridge):
    image_ND, text_CND = pairs()
    image_map, text_map, found = moments_of(image_ND, text_CND).cca(4, ridge)
    expected_x, expected_y, correlations = by_eigenproblem(image_ND, text_CND, 4, ridge)
    np.testing.assert_allclose(found, correlations, rtol=1e-8)
    for features, linear_map, expected in [
        (np.concatenate([normed(image_ND)] * 2), image_map, expected_x),
        (np.concatenate(list(normed(text_CND))), text_map, expected_y),
    ]:
        output = features @ linear_map.weight.numpy().T + linear_map.bias.numpy()
        assert np.mean(np.sum(output**2, axis=1)) == pytest.approx(1)
        cosine = np.sum(output * expected, axis=0) / np.linalg.norm(output, axis=0) / np.linalg.norm(expected, axis=0)
        np.testing.assert_allclose(np.abs(cosine), 1, rtol=1e-6)
        np.testing.assert_allclose(
            np.linalg.norm(output, axis=0) / np.linalg.norm(output),
            np.linalg.norm(expected, axis=0) / np.linalg.norm(expected),
            rtol=1e-6,
        )


def test_both_sides_agree_in_sign():
    image_ND, text_CND = pairs()
    image_map, text_map, _ = moments_of(image_ND, text_CND).cca(3)
    x = normed(image_ND) @ image_map.weight.numpy().T + image_map.bias.numpy()
    y = normed(text_CND[0]) @ text_map.weight.numpy().T + text_map.bias.numpy()
    assert (np.sum(x * y, axis=0) > 0).all()


def test_blocks_and_the_order_of_rows_do_not_matter():
    image_ND, text_CND = pairs()
    order = torch.randperm(len(image_ND), generator=torch.Generator().manual_seed(0))
    whole_map, _, whole = moments_of(image_ND, text_CND).cca(5)
    blocks_map, _, blocks = moments_of(image_ND[order], text_CND[:, order], block=37).cca(5)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(blocks_map.weight.abs(), whole_map.weight.abs(), rtol=1e-6, atol=1e-9)


def test_repeated_captions_change_nothing():
    image_ND, text_CND = pairs(captions=1)
    *_, once = moments_of(image_ND, text_CND).cca(4)
    *_, twice = moments_of(image_ND, text_CND.repeat(2, 1, 1)).cca(4)
    torch.testing.assert_close(twice, once)


def test_cca_works_with_fewer_pairs_than_dimensions():
    image_ND, text_CND = pairs(rows=4)
    image_map, _, correlations = moments_of(image_ND, text_CND).cca(TEXT_DIM)
    assert image_map.weight.isfinite().all()
    assert (correlations <= 1).all()


@pytest.mark.parametrize("side", ["image", "text"])
def test_cca_rejects_features_that_are_equal_in_all_rows(side):
    image_ND, text_CND = pairs()
    if side == "image":
        image_ND = image_ND[:1].expand_as(image_ND)
    else:
        text_CND = text_CND[:1, :1].expand_as(text_CND)
    with pytest.raises(UserError, match=f"The {side} features are the same in all rows"):
        moments_of(image_ND, text_CND, block=37).cca(4)
