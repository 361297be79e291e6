"""Image encoders of transformers: DINOv2, DINOv3 and whatever else turns pixels into a grid of patches."""

import inspect
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sail_align.extract.encoders.catalogue import ImagePreprocessing
from sail_align.extract.encoders.vision import Backbone
from sail_align.extract.errors import UserError


class TransformersBackbone(Backbone):
    """A transformers vision model up to its last tokens or feature map.

    Of the tokens, the last h · w are the patches. If there are more, the first one is the class token; registers stand
    between and are left out.
    """

    library = "transformers"

    def __init__(self, model: Any, size: int):
        super().__init__()
        if getattr(model, "main_input_name", None) != "pixel_values":
            raise UserError(f"{type(model).__name__} takes more than pixels; use an encoder of images alone.")
        self.model: Any = model
        accepted = inspect.signature(model.forward).parameters
        # ViT and its kin refuse other sizes than their own unless asked; DINOv2 and DINOv3 always take them.
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        with torch.inference_mode():
            features = self._features(torch.zeros(1, 3, size, size))
        if features.ndim == 4:
            self.stride, self.has_cls = size // features.shape[-1], False
        else:
            patch = model.config.patch_size
            self.stride = patch if isinstance(patch, int) else patch[0]
            self.has_cls = features.shape[1] > (size // self.stride) ** 2

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the class token, if there is one, and the map of patches."""
        features = self._features(pixels_BCHW)
        if features.ndim == 4:
            return None, features.permute(0, 2, 3, 1)
        height, width = (side // self.stride for side in pixels_BCHW.shape[-2:])
        patches_BhwD = features[:, -height * width :].reshape(len(features), height, width, -1)
        return (features[:, 0] if self.has_cls else None), patches_BhwD

    def _features(self, pixels_BCHW: Tensor) -> Tensor:
        features: Tensor = self.model(pixels_BCHW, **self._options).last_hidden_state
        return features


def published_preprocessing(config: dict[str, Any]) -> ImagePreprocessing:
    """Read a `preprocessor_config.json`.

    Raises:
        UserError: It asks for something else than resize, centre crop and normalise, or leaves out how.
    """
    size, crop = config.get("size", {}), config.get("crop_size", {})
    try:
        interpolation = Image.Resampling(config["resample"]).name.lower()
        mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
        if config.get("do_center_crop"):
            side, resize = crop["height"], size["shortest_edge"]
            square = crop["width"] == side
        else:
            side, resize = size["height"], None
            square = size["width"] == side
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(
            f"preprocessor_config.json with size {size!r} and crop_size {crop!r} is of an unknown form ({problem!r}); "
            f"use an encoder of the catalogue, or a timm one."
        ) from problem
    if not square:
        raise UserError(f"preprocessor_config.json asks for pictures of {crop or size}; only squares are supported.")
    return ImagePreprocessing(side, resize, interpolation, mean, std)
