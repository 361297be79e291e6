"""Data that flows through an extraction: samples, the parts they are read in, and their sources."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.errors import UserError

SHOWN = 8
"""Kinds of files that a text about files left out names."""
IGNORED = 255
"""Value of mask pixels that belong to no class."""


class Status(IntEnum):
    """Outcome of encoding a row, stored as uint8. The features of a row are NaN unless it is `OK`."""

    OK = 0
    PENDING = 1
    """The row's shard has not been written yet."""
    MISSING = 2
    """There is no image file, or the sample lacks this caption."""
    UNDECODABLE = 3
    """The bytes are not an image that can be decoded, or the caption contains U+FFFD."""
    TOO_LARGE = 4
    """The image has more pixels than the limit."""
    NON_FINITE = 5
    """The encoder's output contains NaN or infinity, or exceeds the range of float16."""

    @property
    def label(self) -> str:
        """The name in reports and markers, such as `too-large`."""
        return self.name.lower().replace("_", "-")


FAILURES = tuple(status for status in Status if status not in (Status.OK, Status.PENDING))
"""Statuses of rows that were tried and could not be encoded."""


class UnreadableImageError(Exception):
    """An image cannot be used. Its row gets the `status` of this error."""

    def __init__(self, status: Status, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, repr=False)
class Sample:
    """One row of a store, without its pixels.

    Attributes:
        key: Unique in the data set.
        image: Location of the image, which only its source can open; "" if there is none.
        captions: Text of each caption by the caption's name. Captions that the sample lacks are left out.
        label: Index into the source's `classes`; −1 if the sample has no label.
        mask: Location of the segmentation mask; "" if there is none.
        url: Address from which the image was downloaded; "" if unknown.
        group: Name of the samples that are not independent of this one, such as the frames of a video; "" if it is
            independent of all others.
    """

    key: str
    image: str
    captions: Mapping[str, str] = field(default_factory=dict)
    label: int = -1
    mask: str = ""
    url: str = ""
    group: str = ""

    def __repr__(self) -> str:
        # Names of parts are digests of this text. Without a group, it is that of versions that had no groups.
        texts = [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.name != "group"]
        return f"Sample({', '.join(texts)}{f', group={self.group!r}' if self.group else ''})"


@dataclass(frozen=True)
class Part:
    """A consecutive range of a source's samples, such as those of one table or one tar.

    Attributes:
        name: Unique in the source.
        read: Yields the samples. Every call yields the same samples in the same order.
        files: The files that the samples are read from. While these are unchanged, the samples are not read again. A
            part without files counts as unchanged while its name is the same.
    """

    name: str
    read: Callable[[], Iterator[Sample]]
    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Part":
        """Return a part of samples that are in memory."""
        digest = hashlib.sha256("\n".join(map(repr, samples)).encode("utf-8", "surrogatepass"))
        return cls(f"samples {digest.hexdigest()}", lambda: iter(samples))


@dataclass(frozen=True)
class CaptionTables:
    """Tables of further captions, joined to the samples of a source.

    Attributes:
        files: The tables, in the order in which they are read.
        field: Field of the samples to join by.
        column: Column of the tables to join by.
        captions: Column of each caption, by the caption's name.
        delimiter: Delimiter of the tables, if they are CSV or TSV and it is not found out.
        encoding: Encoding of such tables without a byte order mark, by default UTF-8.
    """

    files: tuple[Path, ...]
    field: Literal["url", "key"]
    column: str
    captions: Mapping[str, str]
    delimiter: str | None = None
    encoding: str | None = None


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Return a text about the files that a source leaves out; "" if there are none."""
    counts = [f"{count:,} {what}" for what, count in left_out.items()]
    more = f" and {len(counts) - SHOWN} more kinds" if len(counts) > SHOWN else ""
    return f"{sum(left_out.values()):,} files are left out: {', '.join(counts[:SHOWN])}{more}" if counts else ""


class Source(ABC):
    """Samples in a fixed order, and access to their pixels."""

    classes: tuple[str, ...] = ()
    """The names of the classes. Label i and mask value i stand for `classes[i]`."""
    caption_origins: str | Collection[str] = ()
    """The names of the captions, or a mapping from them. A string is the one origin of numbered captions: c0, c1, …."""
    has_groups: bool = False
    """Whether the manifest names the group of each sample."""
    recaptions: CaptionTables | None = None
    """Tables whose captions are joined to the samples in the index of a store."""

    @property
    def left_out(self) -> Mapping[str, int]:
        """Numbers of files among those of the samples that are not used, by extension or reason."""
        return {}

    @property
    def captions(self) -> tuple[str, ...]:
        """The names of all captions that a sample may have; c0, c1, … go up to the most captions of any sample."""
        if isinstance(self.caption_origins, str):
            return tuple(self.numbered([""] * self._most_captions))
        return tuple(self.caption_origins)

    @staticmethod
    def numbered(texts: Sequence[str]) -> dict[str, str]:
        """Name captions that have no name in the data set: c0, c1, …."""
        return {f"c{number}": text for number, text in enumerate(texts)}

    @property
    def all_captions(self) -> tuple[str, ...]:
        """The names of the captions of a store: the samples' own, and those joined from tables."""
        return (*self.captions, *(self.recaptions.captions if self.recaptions else ()))

    @cached_property
    def _most_captions(self) -> int:
        return max((len(sample.captions) for sample in self.samples()), default=0)

    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """Return the parts in the order of the samples, without reading any sample."""

    def samples(self) -> Iterator[Sample]:
        """Yield all samples, part by part."""
        for part in self.parts():
            yield from part.read()

    @abstractmethod
    def image(self, location: str, least: int = 0) -> Image.Image:
        """Open an image as upright RGB.

        Args:
            location: The `image` of a sample.
            least: If given, the image may be decoded at a smaller scale, as long as both sides keep at least this many
                pixels; see `read_image`.

        Raises:
            UnreadableImageError: The image is missing or cannot be decoded.
        """

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Open a segmentation mask.

        Returns:
            Class indices, (H, W); `IGNORED` where a pixel belongs to no class.

        Raises:
            UnreadableImageError: The mask is missing or cannot be decoded.
            UserError: The mask does not match the source's description.
        """
        raise UserError(f"This source has no masks: got {location!r}. Use kind 'mask-folder', or 'table' with 'masks'.")
