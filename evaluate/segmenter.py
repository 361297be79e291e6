"""Labels of the pixels of an evaluation set's pictures, by the protocol in its task settings."""

import numpy as np
import torch
from numpy.typing import NDArray

from sail_align.align.segmentation import BACKGROUND, ImageSegmenter
from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.models import RunError
from sail_align.extract.data import Sample
from sail_align.extract.errors import UserError


class Segmenter:
    """Labels the pixels of a set's pictures by the protocol in its task settings.

    Raises:
        UserError: The settings have a background threshold, but no class has that name.
    """

    def __init__(self, data: EvaluationSet):
        self._data = data
        names, task = data.source.classes, data.task
        if task.background is not None and BACKGROUND not in names:
            raise UserError(
                f"{data.manifest.name} has a background threshold, but no class {BACKGROUND!r}. Name one, or remove "
                "task.background."
            )
        classes_CE = torch.from_numpy(data.class_embeddings()).to(data.encoders.device)
        embed, encoder = data.run.model.encode_patches, data.encoders.image
        self._images = ImageSegmenter(
            names, classes_CE, encoder, embed, threshold=task.background, variants=task.variants
        )

    def label(self, sample: Sample, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return the class of each pixel of a picture.

        Args:
            sample: The picture and its mask.
            shape: Size (H, W) of the mask, and of the result.

        Raises:
            UserError: Picture and mask have different aspect ratios.
            RunError: The scores are not finite.
        """
        image = self._data.source.image(sample.image)
        if abs(image.width * shape[0] - image.height * shape[1]) > sum(image.size):  # more than rounding of the sides
            raise UserError(
                f"Mask {sample.mask!r} of {self._data.manifest.name} has {shape[1]} × {shape[0]} pixels, but its "
                f"picture {image.width} × {image.height} after its EXIF rotation. Correct the wrong file."
            )
        try:
            return self._images.label(image, shape).astype(np.uint8, copy=False)
        except FloatingPointError as problem:
            raise RunError.diverged(self._data.run) from problem
