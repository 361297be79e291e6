"""Helpers of tests that compute closed forms a second time, in NumPy."""

import numpy as np
import torch


def add_in_blocks(moments, image_ND, text_CND, block):
    """Add pairs of features to moments, some rows at a time; return the moments."""
    image_ND, text_CND = (torch.from_numpy(normed(each)) for each in (image_ND, text_CND))
    for start in range(0, len(image_ND), block):
        moments.add(image_ND[start : start + block], text_CND[:, start : start + block])
    return moments


def normed(features):
    """LayerNorm without weights, as a NumPy array."""
    x = features.numpy()
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
