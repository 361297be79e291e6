"""Read → decode → encode the rows of one shard."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sail_align.extract.encoders.base import TextEncoder, VisionEncoder
from sail_align.extract.sources.base import Sample, Source, UnreadableImageError
from sail_align.extract.status import Status

IMAGE_BATCH = 32
TEXT_BATCH = 64

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

    def prepare(sample: Sample) -> Tensor | Status:
        try:
            return encoder.preprocess(source.image(sample.image))
        except UnreadableImageError as problem:
            return problem.status

    batches = [range(start, min(start + IMAGE_BATCH, len(samples))) for start in range(0, len(samples), IMAGE_BATCH)]
    for batch, prepared in _ahead(decoders, batches, lambda row: prepare(samples[row])):
        readable = []
        for row, result in zip(batch, prepared, strict=True):
            if isinstance(result, Status):
                rows.status[row] = result
            else:
                readable.append((row, result))
        if readable:
            numbers, pixels = zip(*readable, strict=True)
            rows.put(numbers, encoder.encode(torch.stack(pixels)))
        advance(len(batch))
    return rows.features, rows.status


def encode_texts(texts: Sequence[str | None], encoder: TextEncoder, advance: Advance) -> Rows:
    """Encode one caption of a shard's rows, texts of like length together so that little is spent on padding."""
    rows = _Shard(len(texts), encoder.identity.spec.dim)
    rows.status[:] = Status.MISSING
    there = [(row, text) for row, text in enumerate(texts) if text and text.strip()]
    advance(len(texts) - len(there))
    there.sort(key=lambda item: len(item[1]))
    for start in range(0, len(there), TEXT_BATCH):
        numbers, batch = zip(*there[start : start + TEXT_BATCH], strict=True)
        rows.put(numbers, encoder.encode(list(batch)))
        advance(len(batch))
    return rows.features, rows.status


class _Shard:
    """The rows of one shard, NaN until they are put."""

    def __init__(self, rows: int, dim: int):
        self.features = np.full((rows, dim), np.nan, dtype=np.float16)
        self.status = np.full(rows, Status.PENDING, dtype=np.uint8)

    def put(self, rows: Sequence[int], features_BD: Tensor) -> None:
        with np.errstate(over="ignore"):  # beyond float16 becomes infinity, and then a status
            half = features_BD.numpy().astype(np.float16)
        finite = np.isfinite(half).all(axis=1)
        half[~finite] = np.nan
        self.features[list(rows)] = half
        self.status[list(rows)] = np.where(finite, Status.OK, Status.NON_FINITE)


def _ahead(
    workers: ThreadPoolExecutor, batches: Sequence[range], work: Callable[[int], Tensor | Status]
) -> Iterator[tuple[range, list[Tensor | Status]]]:
    """Yield each batch with its results, in order, with the work on the next two batches already handed out."""
    waiting: deque[tuple[range, list[Future[Tensor | Status]]]] = deque()
    todo = iter(batches)
    while True:
        while len(waiting) < 3 and (batch := next(todo, None)) is not None:
            waiting.append((batch, [workers.submit(work, row) for row in batch]))
        if not waiting:
            return
        batch, futures = waiting.popleft()
        yield batch, [future.result() for future in futures]
