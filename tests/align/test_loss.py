"""The losses equal their formulas, in float32 and at extreme values."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lion_pytorch import Lion

from sail_align.align.model.loss import infonce_loss, sigmoid_loss

LOSSES = pytest.mark.parametrize("loss", [sigmoid_loss, infonce_loss])


def batch(captions=2, size=7, dim=5, seed=0):
    made = torch.Generator().manual_seed(seed)
    image_BE = F.normalize(torch.randn(size, dim, generator=made), dim=-1)
    text_CBE = F.normalize(torch.randn(captions, size, dim, generator=made), dim=-1)
    return image_BE, text_CBE, torch.tensor(math.log(20.0)), torch.tensor(-10.0)


def by_double_loop(image_BE, text_CBE, log_scale, bias):
    x, y, t, b = image_BE.double().numpy(), text_CBE.double().numpy(), math.exp(log_scale), float(bias)
    total = 0.0
    for caption in y:
        for i in range(len(x)):
            for j in range(len(x)):
                z = 1 if i == j else -1
                total += np.log1p(np.exp(-z * (t * (x[i] @ caption[j]) + b)))
    return total / len(x) ** 2


@pytest.mark.parametrize("captions", [1, 2, 5])
def test_sigmoid_loss_equals_the_double_loop(captions):
    inputs = batch(captions)
    assert sigmoid_loss(*inputs).total.item() == pytest.approx(by_double_loop(*inputs), rel=1e-5)
    assert sigmoid_loss(*inputs, divisor="batch").total.item() == pytest.approx(7 * by_double_loop(*inputs), rel=1e-5)


def test_infonce_equals_the_mean_of_both_cross_entropies():
    image_BE, text_CBE, log_scale, bias = batch(3)
    expected = 0.0
    for text_BE in text_CBE:
        p = np.exp(20 * (image_BE.double() @ text_BE.double().T).numpy())
        expected -= (np.log(np.diag(p) / p.sum(0)).mean() + np.log(np.diag(p) / p.sum(1)).mean()) / 2
    assert infonce_loss(image_BE, text_CBE, log_scale, bias).total.item() == pytest.approx(expected, rel=1e-5)


@LOSSES
@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(7)), captions=st.integers(1, 3))
def test_loss_does_not_depend_on_the_order_of_the_batch(loss, order, captions):
    image_BE, text_CBE, log_scale, bias = batch(captions)
    permuted = loss(image_BE[order], text_CBE[:, order], log_scale, bias).total
    torch.testing.assert_close(permuted, loss(image_BE, text_CBE, log_scale, bias).total, rtol=1e-5, atol=0)


@LOSSES
def test_repeated_captions_double_the_loss(loss):
    image_BE, text_CBE, log_scale, bias = batch(1)
    once = loss(image_BE, text_CBE, log_scale, bias).total
    assert loss(image_BE, text_CBE.repeat(2, 1, 1), log_scale, bias).total == 2 * once


@pytest.mark.parametrize("bias", [-200.0, 200.0])
def test_sigmoid_loss_and_gradients_are_finite_at_extreme_logits(bias):
    image_BE, text_CBE, log_scale, _ = batch(1)
    image_BE.requires_grad_()
    loss = sigmoid_loss(image_BE, text_CBE, log_scale, torch.tensor(bias)).total
    loss.backward()
    assert loss.item() == pytest.approx(by_double_loop(image_BE.detach(), text_CBE, log_scale, bias), rel=1e-5)
    assert image_BE.grad.isfinite().all()


def trained(divisor, optimizer_of):
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 5)
    optimizer = optimizer_of(layer.parameters(), lr=1e-3)
    for step in range(20):
        # A batch of a power of two: the divisors then differ by an exact factor in float32.
        image_BE, text_CBE, log_scale, bias = batch(size=8, seed=step)
        optimizer.zero_grad()
        sigmoid_loss(F.normalize(layer(image_BE), dim=-1), text_CBE, log_scale, bias, divisor).total.backward()
        optimizer.step()
    return layer.weight.detach()


@pytest.mark.parametrize("optimizer", [Lion, partial(torch.optim.AdamW, eps=0.0)], ids=["lion", "adamw without ε"])
def test_divisors_train_alike_with_lion_and_with_adamw_without_epsilon(optimizer):
    assert torch.equal(trained("pairs", optimizer), trained("batch", optimizer))


def test_divisors_differ_with_adamw_if_gradients_are_as_small_as_epsilon():
    # 1/|B|² makes gradients |B| times smaller: ε then takes a larger share of each step.
    start, *found = (
        trained(divisor, partial(torch.optim.AdamW, eps=eps, weight_decay=0))
        for divisor, eps in (("pairs", 1e9), ("pairs", 1.0), ("batch", 1.0))
    )
    moved_by_pairs, moved_by_batch = ((weights - start).norm() for weights in found)
    assert moved_by_pairs < 0.5 * moved_by_batch
