"""Shuffled batches out of one or several stores, without ever holding more of them than a buffer."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sail_align.align.data import Half, Pairs, Rows

BUFFER_ROWS = 131_072
"""About 1 GB for an image and two captions of 2,048 + 2 × 1,024 dimensions."""


class Batch(NamedTuple):
    """Features as stored, float16: images (B, D_I), and texts (C, B, D_T), row i of every caption for image i."""

    images: Tensor
    texts: Tensor


class Stream:
    """An endless sequence of batches. Batch i is a function of (stores, rows, seed, batch size, i) and nothing else.

    An epoch's order: the chunks of all stores are permuted and put together into buffers of about `buffer_rows` rows,
    and the rows of each buffer are permuted. So every row is served once an epoch, and a store is read in whole chunks.
    What an epoch leaves after its last full batch is dropped; the next epoch leaves other rows.

    The state of a stream is the number of batches served, the `start` that makes another one go on from there.
    """

    def __init__(
        self,
        pairs: Sequence[Pairs],
        rows: Sequence[Rows],
        *,
        batch_size: int,
        seed: int,
        buffer_rows: int = BUFFER_ROWS,
    ):
        """Serve the chosen rows of each store.

        Raises:
            ValueError: There are fewer rows than one batch holds.
        """
        self._sources = list(zip(pairs, rows, strict=True))
        self._chunks = [(source, start, stop) for source, each in enumerate(pairs) for start, stop in each.chunks()]
        self._counts = np.array([rows[source][start:stop].sum() for source, start, stop in self._chunks])
        self._batch_size = batch_size
        self._seed = seed
        chunk_rows = max(each.store.chunk_rows for each in pairs)
        self._buffer_chunks = max(1, buffer_rows // chunk_rows)
        self._buffer: tuple[list[int], Half, Half] | None = None
        self.rows = int(self._counts.sum())
        self.batches_per_epoch = self.rows // batch_size
        if self.batches_per_epoch == 0:
            raise ValueError(f"{self.rows} rows do not fill a batch of {batch_size}")

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches from number `start` on, for ever."""
        epoch, batch = divmod(start, self.batches_per_epoch)
        for later in count(epoch):
            yield from self._epoch(later, batch)
            batch = 0

    def blocks(self) -> Iterator[Batch]:
        """Yield every row once, in the order of the stores: for sums over all of them."""
        for start in range(0, len(self._chunks), self._buffer_chunks):
            images, texts = self._load(range(start, min(start + self._buffer_chunks, len(self._chunks))))
            yield Batch(torch.from_numpy(images), torch.from_numpy(texts))

    def _epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield an epoch's batches from its number `first` on."""
        skip = first * self._batch_size
        parts: list[Batch] = []
        missing = self._batch_size
        for number, chunks in enumerate(self._buffers(epoch), start=1):
            rows = int(self._counts[chunks].sum())
            if skip >= rows:
                skip -= rows
                continue
            images, texts = self._load(sorted(chunks))
            order = self._random(epoch, number).permutation(rows)[skip:]
            skip = 0
            while len(order):
                taken, order = order[:missing], order[missing:]
                missing -= len(taken)
                parts.append(Batch(torch.from_numpy(images[taken]), torch.from_numpy(texts[:, taken])))
                if missing == 0:
                    yield Batch(
                        torch.cat([part.images for part in parts]), torch.cat([part.texts for part in parts], 1)
                    )
                    parts, missing = [], self._batch_size

    def _buffers(self, epoch: int) -> Iterator[list[int]]:
        """Yield the chunks of each buffer of an epoch."""
        order = self._random(epoch, 0).permutation(len(self._chunks)).tolist()
        for start in range(0, len(order), self._buffer_chunks):
            yield order[start : start + self._buffer_chunks]

    def _load(self, chunks: Sequence[int]) -> tuple[Half, Half]:
        """Return the chunks' served rows, images (n, D) and texts (C, n, D); the last buffer is not read again."""
        if self._buffer is None or self._buffer[0] != list(chunks):
            self._buffer = None
            self._buffer = (list(chunks), *self._read(chunks))
        return self._buffer[1:]

    def _read(self, chunks: Sequence[int]) -> tuple[Half, Half]:
        first, _ = self._sources[0]
        rows = int(self._counts[list(chunks)].sum())
        images = np.empty((rows, first.image.dim), dtype=np.float16)
        texts = np.empty((len(first.texts), rows, first.texts[0].dim), dtype=np.float16)
        at = 0
        for chunk in chunks:
            source, start, stop = self._chunks[chunk]
            pairs, served = self._sources[source]
            behind = at + int(self._counts[chunk])
            images[at:behind], texts[:, at:behind] = pairs.read(start, stop, served)
            at = behind
        return images, texts

    def _random(self, *position: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *position])
