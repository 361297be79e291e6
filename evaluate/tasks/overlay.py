"""Segmentation masks drawn over their image in class colours."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.data import IGNORED

Colours = dict[int, tuple[int, int, int]]
PALETTE = (
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
"""Colours that also differ for colour-blind readers, the first ones most."""
REST = (120, 120, 120)


def class_colours(truth_C: NDArray[np.number], predicted_C: NDArray[np.number]) -> Colours:
    """Return colours for the classes of one image: the true ones by size, then those that are only predicted."""
    order = np.lexsort((-predicted_C, -truth_C))
    present = [int(label) for label in order if truth_C[label] or predicted_C[label]]
    return dict(zip(present, PALETTE, strict=False))


def overlay(image: Image.Image, labels: NDArray[np.integer], colours: Colours, strength: float = 0.65) -> Image.Image:
    """Return the image in grey with each pixel tinted by its class.

    Ignored pixels stay grey. Classes without a colour are darkened.
    """
    grey = image.convert("L").resize((labels.shape[1], labels.shape[0])).convert("RGB")
    tint = np.full((*labels.shape, 3), REST, dtype=np.float64)
    for label, colour in colours.items():
        tint[labels == label] = colour
    base = np.asarray(grey, dtype=np.float64)
    mixed = np.where((labels == IGNORED)[..., None], base, (1 - strength) * base + strength * tint)
    return Image.fromarray(mixed.astype(np.uint8))
