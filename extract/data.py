"""What a source of samples is."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Status(IntEnum):
    """Stored as uint8; every value but `OK` means that the row's features are NaN."""

    OK = 0
    PENDING = 1
    """Its shard has not been written."""
    MISSING = 2
    """The image file is not there, or the sample has no such caption."""
    UNDECODABLE = 3
    """The bytes are no image that can be decoded, or no text: the caption holds U+FFFD."""
    TOO_LARGE = 4
    """More pixels than the limit."""
    NON_FINITE = 5
    """The encoder's output held NaN or infinity, or left float16's range."""

    @property
    def failed(self) -> bool:
        """Whether the row was tried and could not be encoded."""
        return self not in (Status.OK, Status.PENDING)

    @property
    def label(self) -> str:
        """The name in reports and markers: `too-large`."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class Sample:
    """One row of a store: where its image is and what is said about it. Holds no pixels.

    `key` is unique in the data set. `image` and `mask` are locations that the source itself can open ("" if there is
    none). `captions` maps a caption's name to its text; a caption that a sample lacks is left out. `label` indexes the
    source's `classes`, −1 if the sample has no label. `url` is where the image was downloaded from, "" where unknown.
    """

    key: str
    image: str
    captions: Mapping[str, str] = field(default_factory=dict)
    label: int = -1
    mask: str = ""
    url: str = ""


@dataclass(frozen=True)
class Part:
    """A stretch of a source's samples, such as what one table or one tar gives.

    `read` yields the same samples in the same order each time. `files` are what they are read from: while none of these
    has changed, the samples need not be read again; where there are none, while the part has the same name. `name` is
    unique in the source.
    """

    name: str
    read: Callable[[], Iterator[Sample]]
    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Part":
        """Return a part of samples that are there already."""
        digest = hashlib.sha256("\n".join(map(repr, samples)).encode("utf-8", "surrogatepass"))
        return cls(f"samples {digest.hexdigest()}", lambda: iter(samples))


@dataclass(frozen=True)
class CaptionTables:
    """Tables whose `captions` (name → column) join the samples whose `field` is what a row has in `column`."""

    files: tuple[Path, ...]
    field: Literal["url", "key"]
    column: str
    captions: Mapping[str, str]


class Source(Protocol):
    """Samples in a fixed order, and the pixels behind them.

    `captions` names every caption that a sample may have, `classes` what labels and mask values stand for: label i is
    `classes[i]`, and a mask pixel holds i, or `IGNORED` where it counts for nothing. `recaptions` are tables of further
    captions, which samples get in the index of a store.
    """

    recaptions: CaptionTables | None = None

    @property
    def captions(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def classes(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def all_captions(self) -> tuple[str, ...]:
        """The captions of a store's rows: the samples' own, and those that join them."""
        return (*self.captions, *(self.recaptions.captions if self.recaptions else ()))

    def parts(self) -> Sequence[Part]:
        """Return the parts, in the order of the samples; none of their samples is read for it."""

    def samples(self) -> Iterator[Sample]:
        """Yield all samples, part after part."""
        for part in self.parts():
            yield from part.read()

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Open an image as upright RGB. Raises `UnreadableImageError` with the row's status.

        With `least`, one whose sides keep at least so many pixels may be smaller than it is: see `read_image`.
        """

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Open a segmentation mask, (H, W) of class indices."""


IGNORED = 255


class UnreadableImageError(Exception):
    """A sample's image cannot be used; `status` says why, and its row keeps that status."""

    def __init__(self, status: Status, reason: str):
        super().__init__(reason)
        self.status = status
