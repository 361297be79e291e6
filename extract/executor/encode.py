"""Read → decode → encode the rows of one shard."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sail_align.extract.data import Sample, Source, Status, UnreadableImageError
from sail_align.extract.encoders.base import TextEncoder, VisionEncoder
from sail_align.extract.encoders.runtime import batch_memory

AHEAD = 2
"""Batches of images that are read and decoded while one is encoded."""

Rows = tuple[NDArray[np.float16], NDArray[np.uint8]]
"""Features (n, dim), NaN where the status (n,) is not OK."""

Advance = Callable[[int], object]
"""Told how many more rows are done."""


def encode_images(
    samples: Sequence[Sample],
    source: Source,
    encoder: VisionEncoder,
    decoders: ThreadPoolExecutor,
    advance: Advance,
) -> Rows:
    """Encode the images of a shard; while a batch is encoded, `decoders` read and decode the next ones."""
    rows = _Shard(len(samples), encoder.identity.spec.dim)
    for start, status, pixels_BHWC in _decoded(samples, source, encoder, decoders):
        rows.status[start : start + len(status)] = status
        readable = np.flatnonzero(status == Status.OK)
        if len(readable):
            rows.put(start + readable, encoder.encode(pixels_BHWC)[readable])
        advance(len(status))
    return rows.features, rows.status


def encode_texts(texts: Sequence[str | None], encoder: TextEncoder, advance: Advance) -> Rows:
    """Encode one caption of a shard's rows."""
    rows = _Shard(len(texts), encoder.identity.spec.dim)
    rows.status[:] = [_of_text(text) for text in texts]
    there = np.flatnonzero(rows.status == Status.PENDING)
    advance(len(texts) - len(there))
    if len(there):
        rows.put(there, encoder.encode([texts[row] or "" for row in there.tolist()], advance))
    return rows.features, rows.status


def _of_text(text: str | None) -> Status:
    """Return what becomes of a caption; one whose bytes were no UTF-8 holds the character that stands for those."""
    if not text or not text.strip():
        return Status.MISSING
    return Status.UNDECODABLE if "\N{REPLACEMENT CHARACTER}" in text else Status.PENDING


class _Shard:
    """The rows of one shard, NaN until they are put."""

    def __init__(self, rows: int, dim: int):
        self.features = np.full((rows, dim), np.nan, dtype=np.float16)
        self.status = np.full(rows, Status.PENDING, dtype=np.uint8)

    def put(self, rows: NDArray[np.int64], features_BD: Tensor) -> None:
        with np.errstate(over="ignore"):  # beyond float16 becomes infinity, and then a status
            half = features_BD.numpy().astype(np.float16)
        finite = np.isfinite(half).all(axis=1)
        half[~finite] = np.nan
        self.features[rows] = half
        self.status[rows] = np.where(finite, Status.OK, Status.NON_FINITE)


def _decoded(
    samples: Sequence[Sample], source: Source, encoder: VisionEncoder, decoders: ThreadPoolExecutor
) -> Iterator[tuple[int, NDArray[np.uint8], Tensor]]:
    """Yield each batch's first row, statuses and pixels, while `decoders` are at work on the next `AHEAD` batches.

    An unreadable picture stands in its batch as a black one: what is computed for a picture does not depend on its
    neighbours' faults. The pixels are overwritten after the next batch is asked for.
    """

    def decode(sample: Sample, place_HWC: NDArray[np.uint8]) -> Status:
        try:
            place_HWC[:] = encoder.preprocess(source.image(sample.image, encoder.least)).numpy()
            return Status.OK
        except UnreadableImageError as problem:
            place_HWC[:] = 0
            return problem.status

    size = min(encoder.batch_size, len(samples))
    buffers = [batch_memory(size, encoder.size, encoder.size, 3) for _ in range(1 + AHEAD)]
    waiting: deque[tuple[int, list[Future[Status]], Tensor]] = deque()
    for number, start in enumerate(range(0, len(samples), size)):
        batch = samples[start : start + size]
        pixels_BHWC = buffers[number % len(buffers)][: len(batch)]
        work = [decoders.submit(decode, *pair) for pair in zip(batch, pixels_BHWC.numpy(), strict=True)]
        waiting.append((start, work, pixels_BHWC))
        if len(waiting) > AHEAD:
            yield _finished(*waiting.popleft())
    while waiting:
        yield _finished(*waiting.popleft())


def _finished(start: int, work: list[Future[Status]], pixels_BHWC: Tensor) -> tuple[int, NDArray[np.uint8], Tensor]:
    return start, np.array([future.result() for future in work], dtype=np.uint8), pixels_BHWC
