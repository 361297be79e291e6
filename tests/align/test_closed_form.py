"""The closed form is canonical correlation analysis, for any order and blocks of pairs."""

import numpy as np
import pytest
import torch
from closed_form_reference import add_in_blocks, normed

from sail_align.align.model import closed_form
from sail_align.align.model.alignment import Architecture
from sail_align.align.model.closed_form import Moments
from sail_align.align.model.correction import Gaussian
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
    return add_in_blocks(Moments(IMAGE_DIM, TEXT_DIM), image_ND, text_CND, block)


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


def log_density(values_ND, covariance_DD):
    """Log density of a Gaussian of mean 0, in numpy."""
    mahalanobis = np.sum(values_ND @ np.linalg.inv(covariance_DD) * values_ND, axis=-1)
    return -(mahalanobis + np.linalg.slogdet(2 * np.pi * covariance_DD)[1]) / 2


def gaussian_pairs(rows=300, captions=1):
    """Pairs, their model of probabilistic CCA in float64, and its correlations."""
    image_ND, text_CND = pairs(rows=rows, captions=captions)
    image_map, text_map, correlations = moments_of(image_ND, text_CND).cca(TEXT_DIM, ridge=1e-6, unit_norm=False)
    correction = Gaussian(TEXT_DIM).double()
    correction.fill(correlations)
    return image_ND, text_CND, image_map, text_map, correction


def test_gaussian_scores_are_log_likelihood_ratios():
    """For all pairs (i, j), log N([x, y]) − log N(x) − log N(y) with the full covariances, up to one constant."""
    image_ND, text_CND, image_map, text_map, correction = gaussian_pairs()
    x, y = normed(image_ND), normed(text_CND[0])
    # LayerNorm makes the features sum to 0: density exists in the others.
    x, y = (x - x.mean(0))[:, 1:], (y - y.mean(0))[:, 1:]
    both = np.concatenate([x, y], axis=1)
    covariance = both.T @ both / len(both)
    split = x.shape[1]
    joint = np.concatenate([np.repeat(x, len(y), axis=0), np.tile(y, (len(x), 1))], axis=1)
    expected = (
        log_density(joint, covariance).reshape(len(x), len(y))
        - log_density(x, covariance[:split, :split])[:, None]
        - log_density(y, covariance[split:, split:])
    )
    (image, image_terms), (text, text_terms) = (
        correction(linear_map(closed_form.normed(features)), side)
        for linear_map, features, side in ((image_map, image_ND, "image"), (text_map, text_CND[0], "text"))
    )
    found = (image @ text.T + image_terms[:, None] + text_terms).numpy()
    constant = -0.5 * np.log(1 - correction.correlations.numpy() ** 2).sum()
    np.testing.assert_allclose(found + constant, expected, rtol=1e-3, atol=1e-3)


def test_gaussian_scores_separate_pairs():
    """The mean over pairs is the mutual information, and lower for texts of other images."""
    image_ND, text_CND, image_map, text_map, correction = gaussian_pairs()
    image, text = (
        correction(image_map(closed_form.normed(image_ND)), "image"),
        correction(text_map(closed_form.normed(text_CND[0])), "text"),
    )
    scores = image[0] @ text[0].T + image[1][:, None] + text[1]
    information = -0.5 * (1 - correction.correlations.square()).log().sum()
    assert scores.diagonal().mean() + information == pytest.approx(float(information), abs=1e-3)
    assert (scores.mean() + information) < 0


def test_correlations_of_zero_and_one_give_finite_scores():
    model = Architecture("linear", IMAGE_DIM, TEXT_DIM, 2, correction="gaussian").build()
    model.correction.fill(torch.tensor([1.0, 0.0]))
    assert model.corrected_image(torch.randn(3, IMAGE_DIM)).isfinite().all()


def test_wide_head_computes_the_closed_form_of_its_features_and_hidden_units():
    image_ND, text_CND = pairs()
    torch.manual_seed(0)
    head = Architecture("linear", IMAGE_DIM, TEXT_DIM, 4, text_hidden=20).build().text_head.eval()
    x_CND = normed(text_CND)
    hidden_CNH = np.clip(x_CND @ head.hidden.weight.detach().double().numpy().T, 0, 6)
    basis_CNX = np.concatenate([x_CND, hidden_CNH], axis=-1)
    np.testing.assert_allclose(head.basis(text_CND.float()), basis_CNX, atol=1e-5)
    moments = Moments(IMAGE_DIM, head.basis_dim)
    moments.add(torch.from_numpy(normed(image_ND)), torch.from_numpy(basis_CNX))
    _, text_map, correlations = moments.cca(4, 1.0)
    text_map.copy_to(head)
    expected = basis_CNX @ text_map.weight.numpy().T + text_map.bias.numpy()
    np.testing.assert_allclose(head(text_CND.float()).detach(), expected, atol=1e-4)
    plain = moments_of(image_ND, text_CND).cca(4, 1.0)[2]
    assert correlations[0] > plain[0]  # more inputs, of which the features are a part


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_leading_singular_vectors_are_those_of_the_decomposition(shape):
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, right, values = closed_form._singular_vectors(matrix, 3)
    u, s, vt = np.linalg.svd(matrix.numpy())
    np.testing.assert_allclose(values, s[:3], rtol=1e-10)
    signs = np.sign(np.sum(left.numpy() * u[:, :3], axis=0))
    np.testing.assert_allclose(left.numpy() * signs, u[:, :3] * s[:3], atol=1e-10)
    np.testing.assert_allclose(right.numpy() * signs, vt[:3].T * s[:3], atol=1e-10)
