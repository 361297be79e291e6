"""Encoders that compute simple features of their input, quickly."""

import hashlib
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sail_align.extract.encoders.identity import EncoderSpec, Identity
from sail_align.extract.errors import UserError

PREPROCESSING = {"crop": 8, "resize": 8, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
"""What exports need of an image encoder."""


def identity(
    modality: str, pooling: str = "mean", dim: int = 4, golden: float = 1.0, preprocessing: dict | None = None
) -> Identity:
    source, weights = {"loader": "test"}, "0" * 64
    spec = EncoderSpec(f"fake-{modality}", modality, source, weights, preprocessing or {}, pooling, "float32", dim)
    return Identity(spec, [golden, 2.0, 3.0, 4.0], {"torch": "test"})


class FakeVision:
    """Features are the mean of each channel and 1."""

    stride, size, batch_size, min_jpeg_side = 1, 8, 32, 0
    pixel_shape = (8, 8, 3)

    def __init__(self, **changes):
        self.identity = identity("image", **changes)

    def preprocess(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((self.size, self.size))))

    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        return self.encode_dense(pixels_BHWC).mean(dim=(1, 2))

    def encode_dense(self, pixels_BHWC: Tensor) -> Tensor:
        return torch.cat([pixels_BHWC / 255, torch.ones(*pixels_BHWC.shape[:3], 1)], dim=3)


class FakeText:
    """Features are length (at most 1,000), number of spaces, first and last character. "inf" gives infinity."""

    def __init__(self, **changes):
        self.identity = identity("text", **changes)

    def encode(self, texts: list[str], advance=lambda done: None) -> Tensor:
        advance(len(texts))
        rows = [[min(len(t), 1000), t.count(" "), ord(t[0]), np.inf if t == "inf" else ord(t[-1])] for t in texts]
        return torch.tensor(rows, dtype=torch.float32)


@dataclass(frozen=True)
class FakeChoice:
    """Loads a fake encoder in any process. With a `log`, each batch takes `seconds` and appends its digest there."""

    modality: str
    log: Path | None = None
    seconds: float = 0
    entry = None
    layers = (-1,)

    def load(self, device: str) -> FakeVision | FakeText:
        if self.modality not in ("image", "text"):
            raise UserError(f"There is no encoder of {self.modality}.")
        encoder = FakeVision() if self.modality == "image" else FakeText()
        if self.log is not None:
            encoder.encode = partial(self._log_and_encode, encoder.encode)
        return encoder

    def matches(self, spec: EncoderSpec) -> bool:
        return spec == identity(self.modality).spec

    def _log_and_encode(self, encode, batch, *advance) -> Tensor:
        content = batch.numpy().tobytes() if isinstance(batch, Tensor) else repr(batch).encode()
        with self.log.open("a") as log:  # short lines of several processes do not mix
            log.write(f"{hashlib.sha256(content).hexdigest()}\n")
        time.sleep(self.seconds)
        return encode(batch, *advance)
