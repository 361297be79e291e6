"""From a picture to a network's input."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sail_align.extract.encoders.catalogue import ImagePreprocessing


def preprocess(image: Image.Image, how: ImagePreprocessing) -> Tensor:
    """Resize, crop the centre and normalise an RGB picture: (3, crop, crop) float32."""
    return normalize(to_tensor(_resize_and_crop(image, how)), how)


def normalize(pixels: Tensor, how: ImagePreprocessing) -> Tensor:
    """Normalise RGB in [0, 1], (…, 3, H, W) float32, of any size."""
    mean = torch.tensor(how.mean, dtype=pixels.dtype, device=pixels.device)[:, None, None]
    std = torch.tensor(how.std, dtype=pixels.dtype, device=pixels.device)[:, None, None]
    return (pixels - mean) / std


def to_tensor(image: Image.Image) -> Tensor:
    """Turn an RGB picture into (3, H, W) float32 in [0, 1]."""
    pixels_HWC = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels_HWC.permute(2, 0, 1).contiguous().to(torch.float32) / 255


def _resize_and_crop(image: Image.Image, how: ImagePreprocessing) -> Image.Image:
    filter_ = Image.Resampling[how.interpolation.upper()]
    if how.resize is None:
        return image.resize((how.crop, how.crop), filter_)
    width, height = image.size
    # The long side and an odd margin are rounded down, as in the processors that transformers models come with.
    size = tuple(how.resize * side // min(width, height) for side in (width, height))
    left, top = (size[0] - how.crop) // 2, (size[1] - how.crop) // 2
    return image.resize((size[0], size[1]), filter_).crop((left, top, left + how.crop, top + how.crop))
