"""The correction for hubs: vectors of E + 2 dimensions whose dot products are the corrected similarities."""

import numpy as np
import pytest
import torch

from sail_align.align.model.alignment import Architecture
from sail_align.align.model.correction import Bank
from sail_align.extract.errors import UserError

DIM, ROWS, BETA = 5, 7, 12.0


def features(rows: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Architecture("linear", 6, 4, DIM, bank_rows=ROWS).build().eval().requires_grad_(False)
    model.correction.fill(
        model.image_head(torch.from_numpy(features(ROWS, 6, 1))),
        model.text_head(torch.from_numpy(features(ROWS, 4, 2))),
        BETA,
    )
    return model


def unit(rows: torch.Tensor) -> np.ndarray:
    wide = rows.double().numpy()
    return wide / np.linalg.norm(wide, axis=-1, keepdims=True)


def hubness(vectors: np.ndarray, bank: torch.Tensor, beta: float = BETA) -> np.ndarray:
    """Return 1/β log mean exp(β x·b), computed naively in float64."""
    return np.log(np.mean(np.exp(beta * vectors @ bank.double().numpy().T), axis=-1)) / beta


def test_dot_products_are_the_corrected_similarities(model):
    image, text = torch.from_numpy(features(9, 6, 3)), torch.from_numpy(features(8, 4, 4))
    x, y = unit(model.image_head(image)), unit(model.text_head(text))
    bank = model.correction
    expected = x @ y.T - hubness(x, bank.text_vectors)[:, None] - hubness(y, bank.image_vectors)
    found_image, found_text = model.corrected_image(image), model.corrected_text(text)
    assert found_image.shape == (9, DIM + 2)
    assert found_text.dtype == torch.float32
    np.testing.assert_allclose(found_image @ found_text.T, expected, atol=2e-6)
    np.testing.assert_array_equal(found_image[:, :DIM], model.encode_image(image))


def test_any_leading_dimensions(model):
    image = torch.from_numpy(features(6, 6, 5))
    flat = model.corrected_image(image)
    torch.testing.assert_close(model.corrected_image(image.reshape(2, 3, 6)), flat.reshape(2, 3, -1))
    torch.testing.assert_close(model.corrected_image(image[0]), flat[0])


def test_a_bank_of_copies_corrects_alike(model):
    """The correction is a mean over the bank, not a sum, so that banks of all sizes are on one scale."""
    bank = Bank(3 * ROWS, DIM)
    bank.fill(model.correction.image_vectors.repeat(3, 1), model.correction.text_vectors.repeat(3, 1), BETA)
    raw = torch.from_numpy(features(9, DIM, 6))
    torch.testing.assert_close(bank.extend(raw, "image"), model.correction.extend(raw, "image"), atol=1e-4, rtol=0)


def test_memory_is_bounded_for_large_banks(model, monkeypatch):
    raw = torch.from_numpy(features(9, DIM, 6))
    expected, compare, shapes = model.correction.extend(raw, "image"), Bank.compare, []
    monkeypatch.setattr("sail_align.align.model.correction.CELLS", 2 * ROWS)
    monkeypatch.setattr(Bank, "compare", lambda *given: shapes.append((found := compare(*given)).shape) or found)
    torch.testing.assert_close(model.correction.extend(raw, "image"), expected)
    assert shapes == [(2, ROWS)] * 4 + [(1, ROWS)]


@pytest.mark.parametrize(("beta", "limit"), [(1e-2, np.mean), (1e3, np.max)])
def test_sharpness_goes_from_the_mean_to_the_maximum(model, beta, limit):
    bank = Bank(ROWS, DIM)
    bank.fill(model.correction.image_vectors, model.correction.text_vectors, beta)
    raw = torch.from_numpy(features(9, DIM, 6))
    cosines = unit(raw) @ bank.text_vectors.double().numpy().T
    np.testing.assert_allclose(-bank.extend(raw, "image")[:, DIM], limit(cosines, axis=1), atol=5e-3)


def test_without_a_correction():
    model = Architecture("linear", 6, 4, DIM).build()
    assert model.correction is None
    assert not [name for name in model.state_dict() if "correction" in name]
    with pytest.raises(UserError, match="has no hub correction"):
        model.corrected_text(torch.ones(4))


def test_records_of_earlier_versions_have_no_correction():
    record = {"head": "linear", "image_dim": 6, "text_dim": 4, "dim": DIM}
    assert Architecture.from_json(record) == Architecture("linear", 6, 4, DIM)
    with pytest.raises(ValueError, match="bank_rows"):
        Architecture.from_json({**record, "bank_rows": 1 << 40})
