"""From an image to the input of a network."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sail_align.extract.errors import UserError

if TYPE_CHECKING:  # the catalogue is listed without waiting for torch
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BLACK, _UNSCALED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of RGB values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, pixels_BHWC: "Tensor") -> "Tensor":
        """Normalise uint8 pixels of any size on their device: (B, 3, H, W) float32, channels last in memory."""
        batch, height, width, channels = pixels_BHWC.shape
        import torch

        # By rows: four times as fast on a CPU as by pixels, whose three values are too few for vector instructions.
        mean, std = (torch.tensor(values, device=pixels_BHWC.device).repeat(width) for values in (self.mean, self.std))
        rows = pixels_BHWC.reshape(batch, height, width * channels).float().div_(255).sub_(mean).div_(std)
        return rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImagePreprocessing:
    """Resize with Pillow, crop the centre, and normalise.

    Attributes:
        crop: Height and width of the result.
        resize: Length of the short side before the crop. None squashes the image to `crop` × `crop`.
        interpolation: Name of a `PIL.Image.Resampling` in lower case.
        mean: See `Normalisation`.
        std: See `Normalisation`.
    """

    crop: int
    resize: int | None
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @classmethod
    def from_processor(cls, config: dict[str, Any]) -> "ImagePreprocessing":
        """Read the `preprocessor_config.json` of a transformers model.

        Raises:
            UserError: It asks for anything but resizing, centre cropping and normalising to squares, or lacks a value.
        """
        size, crop = config.get("size", {}), config.get("crop_size", {})
        try:
            interpolation = Image.Resampling(config["resample"]).name.lower()
            mean, std = _BLACK, _UNSCALED  # a network such as RADIO normalises by itself
            if config.get("do_normalize", True):
                mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
            if config.get("do_center_crop"):
                height, width, resize = crop["height"], crop["width"], size["shortest_edge"]
            else:
                height, width, resize = size["height"], size["width"], None
        except (KeyError, TypeError, ValueError) as problem:
            raise UserError(
                f"preprocessor_config.json with size {size!r} and crop_size {crop!r} is invalid ({problem!r}). "
                "Use an encoder of the catalogue, or a timm one."
            ) from problem
        if abs(255 * config.get("rescale_factor", 1 / 255) - 1) > 1e-3 or not config.get("do_rescale", True):
            raise UserError(
                f"preprocessor_config.json is invalid: got do_rescale {config.get('do_rescale')!r} and rescale_factor "
                f"{config.get('rescale_factor')!r}, only values in [0, 1] are supported."
            )
        if height != width:
            raise UserError(
                f"preprocessor_config.json is invalid: got images of {crop or size}, only squares are supported."
            )
        return cls(height, resize, interpolation, mean, std)

    def at(self, size: int | None) -> "ImagePreprocessing":
        """Return the same steps for images of `size` × `size`, cropped as tightly. None changes nothing."""
        if size is None:
            return self
        return replace(self, crop=size, resize=None if self.resize is None else round(self.resize * size / self.crop))

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Return the image as `crop` × `crop` pixels.

        Only the pixels inside the crop are computed, so an image of 1 × 10,000 needs no more memory than any other.
        Compared with resizing the whole image first, single pixels differ by the rounding of Pillow's two passes.
        """
        resampling = Image.Resampling[self.interpolation.upper()]
        if self.resize is None:
            return image.resize((self.crop, self.crop), resampling)
        width, height = image.size
        # The long side and an odd margin are rounded down, as in the image processors of transformers.
        resized = [self.resize * side // min(width, height) for side in (width, height)]
        left, top = ((side - self.crop) // 2 for side in resized)
        scale_x, scale_y = width / resized[0], height / resized[1]
        box = (left * scale_x, top * scale_y, (left + self.crop) * scale_x, (top + self.crop) * scale_y)
        return image.resize((self.crop, self.crop), resampling, box=box)


def check_image_size(size: int | None, patch: int) -> None:
    """Raise `UserError` with the nearest valid sizes unless a user's image size is a multiple of the patch size."""
    if size is not None and size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        nearest = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"Image size {size} is invalid: the encoder's patches have {patch} × {patch} pixels, expected a multiple "
            f"of {patch}. Use {nearest}."
        )


def as_pixels(image: Image.Image) -> "Tensor":
    """Return an image as pixels (H, W, 3) uint8."""
    import torch

    return torch.from_numpy(np.array(image.convert("RGB")))


def margins(side: int, multiple: int) -> tuple[int, int]:
    """Return the padding before and after `side` up to the next multiple. If it is odd, the larger part comes after."""
    missing = -side % multiple
    return missing // 2, missing - missing // 2


def pad_to_multiple(pixels_BCHW: "Tensor", multiple: int) -> "Tensor":
    """Pad normalised pixels with zeros on all sides, up to the next multiple of both sides (see `margins`)."""
    import torch.nn.functional as F

    vertical, horizontal = (margins(side, multiple) for side in pixels_BCHW.shape[-2:])
    padding = (*horizontal, *vertical)
    return F.pad(pixels_BCHW, padding) if any(padding) else pixels_BCHW
