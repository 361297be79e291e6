"""The rows of each batch, as a pure function of seed, epoch and batch number."""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

ALL_ROWS = 1 << 60
"""Size of a buffer that holds all rows of any store, so that an epoch is one permutation."""


class StreamState(NamedTuple):
    """The position of a stream: its next batch is number `batch` of `epoch`. JSON stores it as a list."""

    epoch: int = 0
    batch: int = 0


def split(count: int, parts: int) -> list[slice]:
    """Return the slices that divide `count` rows among processes; the first ones may have a row more."""
    size, larger = divmod(count, parts)
    ends = [number * size + min(number, larger) for number in range(parts + 1)]
    return [slice(*span) for span in pairwise(ends)]


class Order:
    """The order in which the rows of all stores are served; rows are numbered 0 … rows − 1 in disk order.

    An epoch permutes the chunks of all stores and divides them into buffers of about `buffer_rows` rows. The rows of a
    buffer are permuted. So each row is served once, and a chunk is needed only while its buffer is served. The first
    buffer has half as many rows. The rows after the last full batch of an epoch are dropped; they differ by epoch.
    """

    def __init__(self, counts: Numbers, *, batch_size: int, seed: int, buffer_rows: int):
        """Order chunks of `counts` rows each, given in disk order. No chunk is empty.

        Raises:
            ValueError: There are fewer rows than the batch size.
        """
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.rows = int(self.starts[-1])
        self.batch_size = batch_size
        self.batches_per_epoch = self.rows // batch_size
        if self.batches_per_epoch == 0:
            raise ValueError(f"{self.rows} rows do not fill a batch of {batch_size}.")
        self._seed = seed
        self._buffer_rows = buffer_rows
        self._buffers = lru_cache(maxsize=2)(self._cut_buffers)
        self._permutation = lru_cache(maxsize=3)(self._permute_buffer)
        self.batch = lru_cache(maxsize=4)(self._batch)

    def following(self, state: StreamState) -> StreamState:
        """Return the state after the batch of a state."""
        if state.batch + 1 < self.batches_per_epoch:
            return StreamState(state.epoch, state.batch + 1)
        return StreamState(state.epoch + 1, 0)

    def in_next_buffer(self, state: StreamState) -> tuple[StreamState, float]:
        """Return the first batch that needs the next buffer, and the fraction of the current buffer already served.

        The current buffer is the one in which the batch of `state` ends. If no batch of the epoch needs a later buffer,
        return the following batch.
        """
        _, ends = self._buffers(state.epoch)
        served = (state.batch + 1) * self.batch_size
        buffer = int(np.searchsorted(ends, served))
        begin = int(ends[buffer - 1]) if buffer else 0
        first = StreamState(state.epoch, int(ends[buffer]) // self.batch_size)
        if first.batch >= self.batches_per_epoch or first.batch <= state.batch:
            return self.following(state), 1.0
        return first, (served - begin) / (int(ends[buffer]) - begin)

    def pieces(self, numbers: Numbers) -> list[tuple[int, int, int]]:
        """Return (chunk, start, stop) for each chunk: `numbers`, which rise, has its rows from start to stop − 1."""
        edges = np.searchsorted(numbers, self.starts)
        chunks = np.flatnonzero(np.diff(edges))
        return list(zip(chunks.tolist(), edges[chunks].tolist(), edges[chunks + 1].tolist(), strict=True))

    def random(self, *position: int) -> np.random.Generator:
        """Return a random generator that depends only on the seed and on a position."""
        return np.random.default_rng([self._seed, *position])

    def buffered(self, state: StreamState) -> set[int]:
        """Return the chunks of the buffers that the batch of a state comes from."""
        chunks, _ = self._buffers(state.epoch)
        return {int(chunk) for buffer, _, _ in self._spans(state) for chunk in chunks[buffer]}

    def _batch(self, state: StreamState) -> Numbers:
        """Return the row numbers (batch_size,) of a batch in rising order."""
        spans = self._spans(state)
        return np.sort(np.concatenate([self._permutation(state.epoch, buffer)[a:b] for buffer, a, b in spans]))

    def _spans(self, state: StreamState) -> list[tuple[int, int, int]]:
        """Return (buffer, start, stop) for each buffer of a batch: positions of its rows in the permuted buffer."""
        _, ends = self._buffers(state.epoch)
        first = state.batch * self.batch_size
        stop = first + self.batch_size
        buffers = range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, stop)) + 1)
        begins = [int(ends[buffer - 1]) if buffer else 0 for buffer in buffers]
        return [(buffer, max(first - begin, 0), stop - begin) for buffer, begin in zip(buffers, begins, strict=True)]

    def _cut_buffers(self, epoch: int) -> tuple[list[Numbers], Numbers]:
        """Return the chunks of each buffer of an epoch, and the total rows up to the end of each buffer."""
        order = self.random(epoch, 0).permutation(len(self.starts) - 1)
        counts = np.diff(self.starts)[order]
        ends = np.cumsum(counts)
        # The first buffer is half as large, so that the first batch of an epoch waits for less of the disk.
        buffer_of = (ends - counts + self._buffer_rows // 2) // self._buffer_rows
        lasts = np.flatnonzero(np.diff(buffer_of, append=-1))
        return np.split(order, lasts[:-1] + 1), ends[lasts]

    def _permute_buffer(self, epoch: int, buffer: int) -> Numbers:
        """Return the row numbers of a buffer in the order in which they are served."""
        chunks, _ = self._buffers(epoch)
        spans = [np.arange(self.starts[chunk], self.starts[chunk + 1]) for chunk in chunks[buffer]]
        return self.random(epoch, buffer + 1).permutation(np.concatenate(spans))
