"""The encoders of a run for queries, each loaded when it is first needed, with the libraries that it needs."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sail_align.align.runs.checkpoint import Run
from sail_align.extract.encoders.identity import require_known
from sail_align.extract.errors import UserError

if TYPE_CHECKING:
    from sail_align.align.pretrained_model import PretrainedModel
    from sail_align.extract.encoders.text import TextEncoder
    from sail_align.extract.encoders.vision import VisionEncoder

KEPT_TEXTS = 1_024
"""Texts whose features are kept."""


class QueryEncoders:
    """The encoders that a run records. It may be used by several threads: one query is encoded at a time.

    Args:
        run: The run.
        device: Their device.
        allow_remote_code: Repositories that may run their own code, each as `owner/name@commit`.
    """

    def __init__(self, run: Run, device: str, allow_remote_code: Sequence[str] = ()):
        self._run, self._device, self._code = run, device, tuple(allow_remote_code)
        self._loaded: dict[str, Any] = {}
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def text(self) -> "TextEncoder":
        """The text encoder. Raises `UserError` if it cannot be loaded."""
        return cast("TextEncoder", self._load("text"))

    @property
    def image(self) -> "VisionEncoder":
        """The image encoder. Raises `UserError` if it cannot be loaded."""
        return cast("VisionEncoder", self._load("image"))

    @property
    def model(self) -> "PretrainedModel":
        """Both encoders and the heads. Raises `UserError` if an encoder cannot be loaded."""
        from sail_align.align.pretrained_model import PretrainedModel  # its import takes seconds

        with self._lock:
            if "model" not in self._loaded:
                self._loaded["model"] = PretrainedModel(self._run, self.image, self.text)
        return cast(PretrainedModel, self._loaded["model"])

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the features (n, D) float16 of texts, as stores have them."""
        with self._lock, torch.inference_mode():
            new = [text for text in dict.fromkeys(texts) if text not in self._texts]
            if new:
                self._texts.update(zip(new, self.text.encode(new).half().cpu(), strict=True))
            found = []
            for text in texts:
                self._texts.move_to_end(text)
                found.append(self._texts[text])
            while len(self._texts) > KEPT_TEXTS:
                self._texts.popitem(last=False)
        return torch.stack(found)

    def encode_image(self, picture: Image.Image) -> Tensor:
        """Return the features (1, D) float16 of a picture, as stores have them.

        Raises:
            UserError: The picture's values have no defined black and white.
        """
        with self._lock, torch.inference_mode():
            encoder = self.image
            from sail_align.align.inputs import load_pixels

            try:
                pixels = load_pixels(picture, 0, encoder)
            except ValueError as problem:
                raise UserError(str(problem)) from problem
            features_1D: Tensor = encoder(encoder.normalise(pixels[None]))
        return features_1D.half().cpu()

    def segment(self, picture: Image.Image, labels: Sequence[str]) -> NDArray[np.integer]:
        """Return the label of each pixel of a picture, (H, W). See `PretrainedModel.segment`."""
        with self._lock:
            return self.model.segment(picture, list(labels)).labels

    def _load(self, side: str) -> Any:
        with self._lock:
            if side not in self._loaded:
                recorded = self._run.text if side == "text" else self._run.image
                require_known(recorded)
                for each in recorded.singles:
                    if "config" in each.spec.source and not each.location:
                        raise UserError(
                            f"The {side} encoder {each.spec.id} of {self._run.path} is a local folder, which is not "
                            "part of an export. Search with the run itself."
                        )
                from sail_align.extract.encoders.load import load_recorded  # its import takes seconds

                self._loaded[side] = load_recorded(recorded, self._device, allow_remote_code=self._code)
        return self._loaded[side]
