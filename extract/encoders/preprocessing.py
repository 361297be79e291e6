"""From a picture to a network's input."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sail_align.extract.encoders.catalogue import ImagePreprocessing


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB picture's own bytes, (H, W, 3) uint8."""
    return torch.from_numpy(np.array(image.convert("RGB")))


def resize_and_crop(image: Image.Image, how: ImagePreprocessing) -> Image.Image:
    """Return a picture of `crop` × `crop`.

    Only what the crop keeps is computed, so that a picture of 1 × 10,000 needs no more memory than another; against
    resizing all of it first, single pixels differ by the rounding of Pillow's two passes.
    """
    filter_ = Image.Resampling[how.interpolation.upper()]
    if how.resize is None:
        return image.resize((how.crop, how.crop), filter_)
    width, height = image.size
    # The long side and an odd margin are rounded down, as in the processors that transformers models come with.
    resized = [how.resize * side // min(width, height) for side in (width, height)]
    left, top = ((side - how.crop) // 2 for side in resized)
    across, down = width / resized[0], height / resized[1]
    box = (left * across, top * down, (left + how.crop) * across, (top + how.crop) * down)
    return image.resize((how.crop, how.crop), filter_, box=box)


def margins(side: int, multiple: int) -> tuple[int, int]:
    """Return how many pixels to add before and after `side` so that it becomes a multiple; an odd one goes after."""
    missing = -side % multiple
    return missing // 2, missing - missing // 2


def normalize(pixels_BHWC: Tensor, how: ImagePreprocessing) -> Tensor:
    """Normalise uint8 pixels of any size on their device: (B, 3, H, W) float32, channels last in memory."""
    batch, height, width, channels = pixels_BHWC.shape
    # By rows: four times as fast on a CPU as by pixels, whose three numbers are too few for its vectors.
    mean, std = (torch.tensor(values, device=pixels_BHWC.device).repeat(width) for values in (how.mean, how.std))
    rows = pixels_BHWC.reshape(batch, height, width * channels).float().div_(255).sub_(mean).div_(std)
    return rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def frame(pixels_BCHW: Tensor, multiple: int) -> Tensor:
    """Put normalised pixels into an even frame of zeros, up to the next multiple of both sides."""
    down, across = (margins(side, multiple) for side in pixels_BCHW.shape[-2:])
    return F.pad(pixels_BCHW, (*across, *down)) if any((*across, *down)) else pixels_BCHW
