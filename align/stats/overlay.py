"""Pictures whose pixels are tinted by their class."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.data import IGNORED

Colour = tuple[int, int, int]

PALETTE: tuple[Colour, ...] = (
    (0, 114, 178),
    (255, 136, 0),
    (136, 255, 255),
    (136, 0, 0),
    (170, 0, 255),
    (0, 0, 136),
    (238, 204, 136),
    (204, 51, 0),
    (204, 255, 102),
    (238, 102, 255),
)
"""Colours of classes that also differ for colour-blind readers, the first ones most."""
REST = (120, 120, 120)
TINT = 0.65
"""Share of the class's colour in a pixel of an overlay. The rest is the image in grey."""


def overlay(image: Image.Image, labels_HW: NDArray[np.integer], colours: Mapping[int, Colour]) -> Image.Image:
    """Return an image in grey with each pixel tinted by its class, in the size of the labels. Ignored pixels stay grey.

    Args:
        image: The image.
        labels_HW: Class of each pixel, or `IGNORED`.
        colours: Colours of the classes. Other classes share one.
    """
    size = (labels_HW.shape[1], labels_HW.shape[0])
    grey_HW3 = np.asarray(image.convert("L").resize(size).convert("RGB"), dtype=np.float64)
    tint_HW3 = np.full(grey_HW3.shape, REST, dtype=np.float64)
    for label, colour in colours.items():
        tint_HW3[labels_HW == label] = colour
    mixed_HW3 = np.where((labels_HW == IGNORED)[..., None], grey_HW3, (1 - TINT) * grey_HW3 + TINT * tint_HW3)
    return Image.fromarray(mixed_HW3.astype(np.uint8))
