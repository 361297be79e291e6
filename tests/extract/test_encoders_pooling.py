"""Pooling, against loops over tokens in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sail_align.extract.encoders.pooling import pool_image, pool_patches, pool_tokens


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    left=st.booleans(),
    pooling=st.sampled_from(["cls", "mean", "last"]),
    seed=st.integers(0, 2**31),
)
def test_pool_tokens_ignores_padding(lengths, left, pooling, seed):
    hidden = np.random.default_rng(seed).standard_normal((len(lengths), 6, 3))
    mask = np.zeros((len(lengths), 6), dtype=np.int64)
    expected = []
    for row, length in enumerate(lengths):
        span = range(6 - length, 6) if left else range(length)
        mask[row, list(span)] = 1
        tokens = [hidden[row, t] for t in span]
        expected.append({"cls": tokens[0], "last": tokens[-1], "mean": sum(tokens) / length}[pooling])
        hidden[row, mask[row] == 0] = 1e6  # would show if padding counted
    found = pool_tokens(torch.from_numpy(hidden), torch.from_numpy(mask), pooling)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_pool_image():
    cls_BD, patches_BhwD = torch.tensor([[1.0, 2.0]]), torch.tensor([[[[0.0, 4.0], [2.0, 0.0]]]])
    assert pool_image(cls_BD, patches_BhwD, "cls").tolist() == [[1, 2]]
    assert pool_image(cls_BD, patches_BhwD, "mean").tolist() == [[1, 2]]
    assert pool_image(2 * cls_BD, patches_BhwD, "cls+mean").tolist() == [[2, 4, 1, 2]]
    assert pool_image(None, patches_BhwD, "mean").tolist() == [[1, 2]]


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_mean_of_pooled_patches_is_the_pooled_image(pooling):
    cls_BD, patches_BhwD = torch.randn(2, 4), torch.randn(2, 3, 5, 4)
    dense = pool_patches(cls_BD, patches_BhwD, pooling)
    pooled = pool_image(cls_BD, patches_BhwD, pooling)
    assert dense.shape == (2, 3, 5, pooled.shape[1])
    if pooling != "cls":
        torch.testing.assert_close(dense.mean(dim=(1, 2)), pooled)


def test_mean_of_a_long_text_does_not_overflow_float16():
    hidden_BTD = torch.full((1, 1024, 2), 70.0, dtype=torch.float16)
    assert pool_tokens(hidden_BTD, torch.ones(1, 1024, dtype=torch.long), "mean").tolist() == [[70.0, 70.0]]
