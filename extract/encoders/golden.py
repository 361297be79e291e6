"""Fixed inputs, and what an encoder makes of them: the test that a changed library or weights file cannot pass."""

from importlib import metadata

import numpy as np
from PIL import Image
from torch import Tensor

SENTENCE = "Two brown dogs chase a red ball across the wet grass, and a child in a yellow coat watches them."


def golden_image() -> Image.Image:
    """Return an RGB picture (240 × 320) of gradients, a checkerboard and a disc, in integers only."""
    y, x = np.mgrid[0:240, 0:320]
    red = x * 255 // 319
    green = y * 255 // 239
    blue = ((x // 16 + y // 16) % 2) * 160 + 40
    disc = (x - 210) ** 2 + (y - 110) ** 2 < 70**2
    pixels_HWC = np.stack([np.where(disc, 230, red), np.where(disc, 60, green), np.where(disc, 30, blue)], axis=-1)
    return Image.fromarray(pixels_HWC.astype(np.uint8))


def golden_vector(features_1D: Tensor) -> list[float]:
    """Return the output for a fixed input as JSON-able numbers of six digits."""
    return [float(f"{value:.6g}") for value in features_1D[0].tolist()]


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages, by name."""
    return {package: metadata.version(package) for package in packages}
