"""The preprocessing of an image encoder in the form of transformers."""

from typing import Any, Self

import torch
from transformers import BaseImageProcessor, BatchFeature

from sail_align.align.inputs import ImageInput, list_images, read_picture
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.open_clip_models import open_clip_resize
from sail_align.extract.encoders.preprocessing import ImagePreprocessing, Normalisation, as_pixels
from sail_align.extract.errors import UserError


class SailImageProcessor(BaseImageProcessor):
    """Image processor that gives the pixel values that an image encoder was fed with in training.

    Args:
        crop_size: Height and width of the result.
        resize: Length of the short side before the crop. None squashes the image.
        interpolation: Name of a `PIL.Image.Resampling` in lower case.
        image_mean: Mean of RGB values in [0, 1].
        image_std: Standard deviation of RGB values in [0, 1].
        library: Whose resizing it is: `open_clip`, or `pillow` for all other encoders. They differ by rounding.
        least: Length that both sides keep if a JPEG file is decoded at reduced scale; 0 for full scale.
    """

    def __init__(
        self,
        crop_size: dict[str, int],
        resize: int | None,
        interpolation: str,
        image_mean: list[float],
        image_std: list[float],
        library: str = "pillow",
        least: int = 0,
        **_of_transformers: Any,
    ):
        super().__init__()
        self.crop_size, self.resize, self.interpolation = dict(crop_size), resize, interpolation
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.library, self.least = library, least

    @classmethod
    def of(cls, identity: Identity) -> Self:
        """Return the processor of a recorded image encoder. Raises `UserError` if the record lacks a field."""
        recorded, source = identity.spec.preprocessing, identity.spec.source
        try:
            side = recorded["crop"]
            return cls(
                crop_size={"height": side, "width": side},
                resize=recorded["resize"],
                interpolation=recorded["interpolation"],
                image_mean=recorded["mean"],
                image_std=recorded["std"],
                library="open_clip" if source.get("loader") == "open_clip" else "pillow",
                least=recorded.get("jpeg_least", 0),
            )
        except KeyError as problem:
            raise UserError(
                f"Record of encoder {identity.spec.id!r} is invalid: its preprocessing has no {problem}. Encode the "
                "images again."
            ) from problem

    @property
    def size(self) -> dict[str, int]:
        """Height and width of the result."""
        return self.crop_size

    def preprocess(self, images: ImageInput, return_tensors: str | None = None) -> BatchFeature:
        """Return `pixel_values` (B, 3, height, width) float32, normalised.

        Args:
            images: One image or many, of the types that `PretrainedModel.encode_image` takes.
            return_tensors: `pt` for a tensor, `np` for an array, None for a list of arrays.

        Raises:
            TypeError: An item is not an image.
            ValueError: There are no images, or one cannot be used.
        """
        preprocessing = ImagePreprocessing(
            self.crop_size["height"], self.resize, self.interpolation, tuple(self.image_mean), tuple(self.image_std)
        )
        resize = open_clip_resize(preprocessing) if self.library == "open_clip" else preprocessing.resize_and_crop
        pictures = (read_picture(image, i, least=self.least) for i, image in enumerate(list_images(images)))
        pixels_BHWC = torch.stack([as_pixels(resize(picture)) for picture in pictures])
        values_BCHW = Normalisation(preprocessing.mean, preprocessing.std).apply(pixels_BHWC).contiguous()
        if return_tensors == "pt":
            return BatchFeature({"pixel_values": values_BCHW})
        return BatchFeature({"pixel_values": list(values_BCHW.numpy())}, tensor_type=return_tensors)
