"""Blockwise losses and gradients equal the dense formulas in each precision, and parts add up to the whole."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_loss import dense_infonce, dense_sigmoid
from hypothesis import given, settings
from hypothesis import strategies as st

from sail_align.align.model import pair_blocks as blocks
from sail_align.align.model.loss import infonce_loss, sigmoid_loss

BOTH = pytest.mark.parametrize(
    ("loss", "dense"), [(sigmoid_loss, dense_sigmoid), (infonce_loss, dense_infonce)], ids=["sigmoid", "infonce"]
)
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Bounds of a value's relative error, for each unit of |logit|: an error of a logit is a relative one of its loss."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Make blocks of at most four rows and columns, so that small batches have several, and edges."""
    monkeypatch.setitem(blocks.BLOCK_SIZE, "cpu", 4)


def batch(captions=2, size=11, dim=8, seed=0, dtype=torch.float32, scale=20.0, bias=-10.0):
    """Return inputs that require gradients; texts are near their images."""
    made = torch.Generator().manual_seed(seed)
    image_BE = torch.randn(size, dim, generator=made)
    text_CBE = image_BE + torch.randn(captions, size, dim, generator=made)
    normalised = [F.normalize(each, dim=-1).to(dtype) for each in (image_BE, text_CBE)]
    inputs = (*normalised, torch.tensor(math.log(scale)), torch.tensor(bias))
    return [each.requires_grad_() for each in inputs]


def as_float64(inputs):
    return [each.detach().double().numpy() for each in inputs]


def values_and_gradients(loss, inputs, **options):
    value = loss(*inputs, **options)
    value.total.backward()
    return value._asdict(), [each.grad for each in inputs]


def assert_agree(found, expected, rounding):
    """Compare values, and gradients relative to the sizes of their terms."""
    for name, value in expected[0].items():
        smallest = rounding if name.endswith("logit") else 1e-12
        assert found[0][name].item() == pytest.approx(value, rel=rounding, abs=smallest), name
    for gradient, right, size in zip(found[1], *expected[1:], strict=True):
        assert np.linalg.norm(gradient.double().numpy() - right) <= rounding * np.linalg.norm(size) + 1e-12


@pytest.mark.slow
@BOTH
@settings(max_examples=50, deadline=None)
@given(captions=st.integers(1, 3), size=st.integers(2, 14), dim=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_shape_agrees_with_the_dense_formula(loss, dense, captions, size, dim, seed):
    inputs = batch(captions, size, dim, seed)
    assert_agree(values_and_gradients(loss, inputs), dense(*as_float64(inputs)), 30 * ROUNDING[torch.float32])


@BOTH
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("bias", [-300.0, 0.0, 300.0])
def test_extreme_logits_agree(loss, dense, scale, bias):
    inputs = batch(scale=scale, bias=bias)
    largest = scale + abs(bias)
    assert_agree(values_and_gradients(loss, inputs), dense(*as_float64(inputs)), largest * ROUNDING[torch.float32])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_agree(loss, dense, dtype):
    inputs = batch(size=40, dim=32, dtype=dtype)
    found = values_and_gradients(loss, inputs)
    assert found[0]["total"].dtype == torch.float32
    assert [each.dtype for each in found[1]] == [dtype, dtype, torch.float32, torch.float32]
    assert_agree(found, dense(*as_float64(inputs)), 20 * ROUNDING[dtype])


@BOTH
def test_autocast_uses_half_precision_products_and_returns_float32(loss, dense):
    inputs = batch(size=40, dim=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values_and_gradients(loss, inputs)
    assert {each.dtype for each in found[1]} == {torch.float32}
    expected = dense(*as_float64(inputs))
    assert_agree(found, expected, 20 * ROUNDING[torch.bfloat16])
    with pytest.raises(AssertionError):
        assert_agree(found, expected, 20 * ROUNDING[torch.float32])


@BOTH
def test_positive_logits_are_exact_under_autocast(loss, dense):
    inputs = batch(size=40, dim=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*inputs)
    assert found.positive_logit.item() == pytest.approx(dense(*as_float64(inputs))[0]["positive_logit"], rel=1e-6)


@BOTH
def test_float64_stays_float64(loss, dense):
    inputs = [each.detach().double().requires_grad_() for each in batch()]
    assert_agree(values_and_gradients(loss, inputs), dense(*as_float64(inputs)), 1e-13)


@BOTH
def test_weights_multiply_the_losses_of_caption_sets(loss, dense):
    inputs, weights = batch(captions=3), (1.0, 0.25, 0.0)
    found = values_and_gradients(loss, inputs, weights=weights)
    assert_agree(found, dense(*as_float64(inputs), weights=weights), 30 * ROUNDING[torch.float32])
    assert not found[1][1][2].any()


@BOTH
@pytest.mark.parametrize("ends", [(0, 6, 11), (0, 1, 4, 11), (0, 3, 6, 9, 11)])
def test_parts_add_up_to_the_whole(loss, dense, ends):
    inputs = batch()
    parts = [slice(*each) for each in pairwise(ends)]
    found = add_up(loss, inputs, parts)
    assert_agree(found, dense(*as_float64(inputs)), 40 * ROUNDING[torch.float32])


def add_up(loss, inputs, parts):
    """Return the sums of the parts' values, and the gradients of the sum of their totals."""
    image_BE, text_CBE, *others = inputs
    options = [{"first": part.start} for part in parts]
    if loss is infonce_loss:
        # A first round collects what each part would send to the others.
        sent = []
        for part, option in zip(parts, options, strict=True):
            loss(image_BE, text_CBE[:, part], *others, **option, across=lambda tensor: sent.append(tensor) or tensor)
        for option in options:
            option["across"] = lambda tensor: torch.stack(sent).logsumexp(0)
    values = [loss(image_BE, text_CBE[:, part], *others, **option) for part, option in zip(parts, options, strict=True)]
    sum(value.total for value in values).backward()
    summed = {name: sum(getattr(value, name).detach() for value in values) for name in values[0]._fields}
    return summed, [each.grad for each in inputs]


@BOTH
def test_no_gradient_products_without_gradients(loss, dense, monkeypatch):
    inputs = batch()
    expected = loss(*inputs)
    monkeypatch.setattr(blocks, "_add_product", None)
    with torch.no_grad():
        found = loss(*inputs)
    assert not found.total.requires_grad
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))


@BOTH
def test_gradients_are_available_once_and_without_second_derivatives(loss, dense):
    inputs = batch()
    total = loss(*inputs).total
    gradient, *_ = torch.autograd.grad(2 * total, inputs, create_graph=True)
    assert not gradient.requires_grad
    with pytest.raises(RuntimeError, match="have been used already"):
        total.backward()


@BOTH
def test_nan_propagates_to_the_loss(loss, dense):
    image_BE, *others = batch()
    with torch.no_grad():
        image_BE[3, 0] = torch.nan
    assert loss(image_BE, *others).total.isnan()


@BOTH
def test_loss_rejects_texts_without_image_and_missing_weights(loss, dense):
    inputs = batch(captions=2, size=5)
    with pytest.raises(ValueError, match="need images 1 to 5, but there are only 5 images"):
        loss(*inputs, first=1)
    with pytest.raises(ValueError, match="Got 1 weights for 2 caption sets"):
        loss(*inputs, weights=[1.0])


@pytest.mark.slow
def test_half_precision_keeps_gradients_that_dividing_first_would_lose(monkeypatch):
    monkeypatch.setitem(blocks.BLOCK_SIZE, "cpu", 2_048)
    # A part of the paper's batch, the start of training, and a loss scaler's usual factor.
    batch_size, texts, loss_scale = 36_864, 32, 2.0**16
    image_BE, text_CBE, log_scale, bias = batch(captions=1, size=batch_size, dim=64, dtype=torch.float16)
    inputs = [image_BE, text_CBE[:, :texts].detach().requires_grad_(), log_scale, bias]
    (loss_scale * sigmoid_loss(*inputs).total).backward()
    x_ME, y_CNE, tau, b = as_float64(inputs)
    _, expected, _ = dense_sigmoid(x_ME, y_CNE, tau, b)

    logit_MN = np.exp(tau) * x_ME @ y_CNE[0].T + b
    positive_MN = np.eye(batch_size, texts)
    g_MN = (1 / (1 + np.exp(-logit_MN)) - positive_MN) * (loss_scale / batch_size**2)
    divided_first_MN = torch.from_numpy(g_MN).half().double().numpy()
    theirs_NE, theirs_bias = np.exp(tau) * divided_first_MN.T @ x_ME, divided_first_MN.sum()

    def error(found, right):
        return np.linalg.norm(found / loss_scale - right) / np.linalg.norm(right)

    assert error(inputs[1].grad[0].double().numpy(), expected[1][0]) < 0.002
    assert error(inputs[3].grad.item(), expected[3]) < 1e-4
    assert error(theirs_NE, expected[1][0]) > 0.01
    assert error(theirs_bias, expected[3]) > 0.03
