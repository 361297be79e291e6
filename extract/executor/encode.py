"""Read, decode and encode the rows of one array: images through a vision encoder, captions through a text encoder."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sail_align.extract.data import Sample, Source, Status, UnreadableImageError
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.encoders.text import TextEncoder
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.errors import UserError
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.index import CAPTION
from sail_align.extract.store.store import Store

AHEAD = 2
"""Batches of images that are read and decoded while one is encoded."""

Advance = Callable[[int], object]
"""Progress callback; its argument is the number of rows finished since the last call."""


class EncodedRows(NamedTuple):
    """Features (n, dim) float16 and status (n,) uint8 of some rows. Features are NaN where the status is not OK."""

    features: NDArray[np.float16]
    status: NDArray[np.uint8]

    @classmethod
    def pending(cls, rows: int, dim: int) -> Self:
        """Return rows of which none is encoded."""
        return cls(np.full((rows, dim), np.nan, np.float16), np.full(rows, Status.PENDING, np.uint8))

    @classmethod
    def pending_for(cls, identity: Identity, rows: int) -> list[Self]:
        """Return rows of each encoder that is joined, none of them encoded."""
        return [cls.pending(rows, each.spec.dim) for each in identity.singles]

    def put(self, rows: NDArray[np.int64], features_BD: Tensor) -> None:
        """Store an encoder's output for these rows, and set their status."""
        with np.errstate(over="ignore"):  # values beyond float16 become infinity, which is then a status
            half = features_BD.numpy().astype(np.float16)
        finite = np.isfinite(half).all(axis=1)
        half[~finite] = np.nan
        self.features[rows] = half
        self.status[rows] = np.where(finite, Status.OK, Status.NON_FINITE)


@dataclass(frozen=True)
class ArrayTask:
    """Arrays of a store to fill in one pass, and the function that encodes rows of them, given by ascending numbers.

    It returns the rows of each array. Several arrays are those of joined encoders, such as layers of one network.
    """

    arrays: tuple[FeatureArray, ...]
    encode: Callable[[Sequence[int], Advance], Sequence[EncodedRows]]

    @classmethod
    def for_images(cls, store: Store, source: Source, encoder: VisionEncoder, threads: int) -> Self:
        """Return the task of encoding a store's images, decoded by `threads` threads. Create arrays that are missing.

        Raises:
            UserError: The store holds features of another encoder under the same name.
        """

        def encode(rows: Sequence[int], advance: Advance) -> list[EncodedRows]:
            samples = store.samples(rows[0], rows[-1] + 1, captions=[])
            return encode_images([samples[row - rows[0]] for row in rows], source, encoder, threads, advance)

        return cls(tuple(store.add(each) for each in encoder.identity.singles), encode)

    @classmethod
    def for_caption(cls, store: Store, caption: str, encoder: TextEncoder) -> Self:
        """Return the task of encoding one caption of a store's samples. Create arrays that are missing.

        Raises:
            UserError: The store has no such caption, or holds features of another encoder under the same name.
        """
        if caption not in store.captions:
            raise UserError(f"{store.path} has no caption {caption!r}. Pass another --out to index the data set again.")
        column = CAPTION + caption

        def encode(rows: Sequence[int], advance: Advance) -> list[EncodedRows]:
            texts = store.index([column], rows[0], rows[-1] + 1)[column].to_pylist()
            return encode_texts([texts[row - rows[0]] for row in rows], encoder, advance)

        return cls(tuple(store.add(each, caption) for each in encoder.identity.singles), encode)


def encode_images(
    samples: Sequence[Sample], source: Source, encoder: VisionEncoder, threads: int, advance: Advance
) -> list[EncodedRows]:
    """Encode the images of samples. While one batch is encoded, `threads` threads read and decode the next ones.

    Returns:
        The rows of the encoder, or of each encoder that is joined.
    """
    encoded = EncodedRows.pending_for(encoder.identity, len(samples))
    decoders = ThreadPoolExecutor(threads)
    try:
        for start, status, pixels_BHWC in _decode(samples, source, encoder, decoders):
            for rows in encoded:
                rows.status[start : start + len(status)] = status
            readable = np.flatnonzero(status == Status.OK)
            if len(readable):
                _put(encoded, start + readable, encoder.encode(pixels_BHWC)[readable])
            advance(len(status))
    finally:
        decoders.shutdown(cancel_futures=True)
    return encoded


def encode_texts(texts: Sequence[str | None], encoder: TextEncoder, advance: Advance) -> list[EncodedRows]:
    """Encode texts; None stands for a missing caption. Returns the rows of each encoder, as `encode_images` does."""
    encoded = EncodedRows.pending_for(encoder.identity, len(texts))
    status = encoded[0].status
    for row, text in enumerate(texts):
        if not text or not text.strip():
            status[row] = Status.MISSING
        elif "\N{REPLACEMENT CHARACTER}" in text:  # stands for bytes that were not valid UTF-8
            status[row] = Status.UNDECODABLE
    for rows in encoded[1:]:
        rows.status[:] = status
    valid = np.flatnonzero(status == Status.PENDING)
    advance(len(texts) - len(valid))
    if len(valid):
        _put(encoded, valid, encoder.encode([texts[row] or "" for row in valid.tolist()], advance))
    return encoded


def _put(encoded: Sequence[EncodedRows], rows: NDArray[np.int64], features_BD: Tensor) -> None:
    """Store the concatenated output of encoders for these rows."""
    dims = [each.features.shape[1] for each in encoded]
    for each, part_BD in zip(encoded, torch.split(features_BD, dims, dim=1), strict=True):
        each.put(rows, part_BD)


def _decode(
    samples: Sequence[Sample], source: Source, encoder: VisionEncoder, decoders: ThreadPoolExecutor
) -> Iterator[tuple[int, NDArray[np.uint8], Tensor]]:
    """Yield the first row, the statuses and the pixels of each batch, while the next `AHEAD` batches are decoded.

    An unreadable image becomes a black one: the features of an image must not depend on which others of its batch are
    readable. The memory of the pixels is reused after the next batch is requested.
    """

    def decode(sample: Sample, pixels_HWC: NDArray[np.uint8]) -> Status:
        try:
            pixels_HWC[:] = encoder.preprocess(source.image(sample.image, encoder.min_jpeg_side)).numpy()
            return Status.OK
        except UnreadableImageError as problem:
            pixels_HWC[:] = 0
            return problem.status

    size = min(encoder.batch_size, len(samples))
    buffers = [Runtime.host_buffer(size, *encoder.pixel_shape) for _ in range(1 + AHEAD)]
    waiting: deque[tuple[int, Iterator[Status], Tensor]] = deque()
    starts = range(0, len(samples), size)
    for number in range(len(starts) + AHEAD):
        if number < len(starts):
            start = starts[number]
            batch = samples[start : start + size]
            pixels_BHWC = buffers[number % len(buffers)][: len(batch)]
            waiting.append((start, decoders.map(decode, batch, pixels_BHWC.numpy()), pixels_BHWC))
        if number >= AHEAD:
            start, status, pixels_BHWC = waiting.popleft()
            yield start, np.array(list(status), dtype=np.uint8), pixels_BHWC
