"""Encoders that compute something simple and real, in no time."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sail_align.extract.encoders.base import EncoderSpec, Identity


def identity(modality: str, pooling: str = "mean", dim: int = 4, golden: float = 1.0) -> Identity:
    spec = EncoderSpec(f"fake-{modality}", modality, {"loader": "test"}, "0" * 64, {}, pooling, "float32", dim)
    return Identity(spec, [golden, 2.0, 3.0, 4.0], {"torch": "test"})


class FakeVision:
    """Features are the mean of each channel, and 1."""

    stride = 1

    def __init__(self, **changes):
        self.identity = identity("image", **changes)

    def preprocess(self, image: Image.Image) -> Tensor:
        return self.normalize(torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1) / 255)

    def normalize(self, pixels: Tensor) -> Tensor:
        return pixels

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        means = pixels_BCHW.mean(dim=(2, 3))
        return torch.cat([means, torch.ones(len(means), 1)], dim=1)

    def encode_dense(self, pixels_BCHW: Tensor) -> Tensor:
        maps = pixels_BCHW.permute(0, 2, 3, 1)
        return torch.cat([maps, torch.ones(*maps.shape[:3], 1)], dim=3)


class FakeText:
    """Features are length, number of spaces, first and last character; a text of "inf" overflows."""

    def __init__(self, **changes):
        self.identity = identity("text", **changes)

    def encode(self, texts: list[str]) -> Tensor:
        rows = [[len(t), t.count(" "), ord(t[0]), np.inf if t == "inf" else ord(t[-1])] for t in texts]
        return torch.tensor(rows, dtype=torch.float32)
