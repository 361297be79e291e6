"""What a source of samples is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.status import Status


@dataclass(frozen=True)
class Sample:
    """One row of a store: where its image is and what is said about it. Holds no pixels.

    `key` is unique in the data set. `image` and `mask` are locations that the source itself can open ("" if there is
    none). `captions` maps a caption's name to its text; a caption that a sample lacks is left out. `label` indexes the
    source's `classes`, −1 if the sample has no label.
    """

    key: str
    image: str
    captions: Mapping[str, str] = field(default_factory=dict)
    label: int = -1
    mask: str = ""


class Source(Protocol):
    """Samples in a fixed order, and the pixels behind them.

    `captions` names every caption that a sample may have, `classes` what labels and mask values stand for: label i is
    `classes[i]`, and a mask pixel holds i, or `IGNORED` where it counts for nothing.
    """

    @property
    def captions(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def classes(self) -> tuple[str, ...]: ...  # noqa: D102

    def samples(self) -> Iterator[Sample]:
        """Yield the samples; the same ones in the same order each time."""

    def image(self, location: str) -> Image.Image:
        """Open an image as upright RGB. Raises `UnreadableImageError` with the row's status."""

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Open a segmentation mask, (H, W) of class indices."""


IGNORED = 255


class UnreadableImageError(Exception):
    """A sample's image cannot be used; `status` says why, and its row keeps that status."""

    def __init__(self, status: Status, reason: str):
        super().__init__(reason)
        self.status = status
