"""Which rows make which batch: a function of seed, epoch and batch number, whoever reads them."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class StreamState(NamedTuple):
    """Where a stream stands: the next batch is number `batch` of `epoch`. It goes through JSON as a list."""

    epoch: int
    batch: int

    @classmethod
    def start(cls) -> "StreamState":
        """Where every stream begins."""
        return cls(0, 0)


class Order:
    """The order of the served rows of all stores, known by their numbers in disk order, 0 … rows − 1.

    An epoch permutes the chunks of all stores and cuts them into buffers of about `buffer_rows` rows (the first: half
    as many), whose rows are permuted: every row comes once, and no chunk is needed for longer than its buffer lasts.
    What an epoch leaves behind its last full batch is dropped; the next epoch leaves other rows.
    """

    def __init__(self, counts: Numbers, *, batch_size: int, seed: int, buffer_rows: int):
        """Order chunks that have `counts` rows each, in disk order, none of them empty.

        Raises:
            ValueError: There are fewer rows than one batch holds.
        """
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.rows = int(self.starts[-1])
        self.batch_size = batch_size
        self.batches_per_epoch = self.rows // batch_size
        if self.batches_per_epoch == 0:
            raise ValueError(f"{self.rows} rows do not fill a batch of {batch_size}")
        self._seed = seed
        self._buffer_rows = buffer_rows
        self._buffers = lru_cache(maxsize=2)(self._cut_buffers)
        self._permutation = lru_cache(maxsize=3)(self._permute_buffer)
        self.batch = lru_cache(maxsize=4)(self._batch)

    def following(self, state: StreamState) -> StreamState:
        """Return the state behind the batch of a state."""
        if state.batch + 1 < self.batches_per_epoch:
            return StreamState(state.epoch, state.batch + 1)
        return StreamState(state.epoch + 1, 0)

    def in_next_buffer(self, state: StreamState) -> tuple[StreamState, float]:
        """Return the first batch that reaches behind the buffer in which a batch ends, and how much of that is served.

        It is the following batch where the epoch has no such batch.
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
        """Return the chunks that rows, in rising order, belong to, each with its first row and its last + 1."""
        edges = np.searchsorted(numbers, self.starts)
        chunks = np.flatnonzero(np.diff(edges))
        return list(zip(chunks.tolist(), edges[chunks].tolist(), edges[chunks + 1].tolist(), strict=True))

    def random(self, *position: int) -> np.random.Generator:
        """Return the random numbers of a place in the order: they depend on it and on the seed alone."""
        return np.random.default_rng([self._seed, *position])

    def buffered(self, state: StreamState) -> set[int]:
        """Return the chunks of the buffers that a batch is drawn from."""
        chunks, _ = self._buffers(state.epoch)
        return {int(chunk) for buffer, _, _ in self._spans(state) for chunk in chunks[buffer]}

    def _batch(self, state: StreamState) -> Numbers:
        """Return the numbers of a batch's rows, rising: (batch_size,)."""
        spans = self._spans(state)
        return np.sort(np.concatenate([self._permutation(state.epoch, buffer)[a:b] for buffer, a, b in spans]))

    def _spans(self, state: StreamState) -> list[tuple[int, int, int]]:
        """Return the buffers that a batch is drawn from, each with the first and behind the last of its rows there."""
        _, ends = self._buffers(state.epoch)
        first = state.batch * self.batch_size
        stop = first + self.batch_size
        buffers = range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, stop)) + 1)
        begins = [int(ends[buffer - 1]) if buffer else 0 for buffer in buffers]
        return [(buffer, max(first - begin, 0), stop - begin) for buffer, begin in zip(buffers, begins, strict=True)]

    def _cut_buffers(self, epoch: int) -> tuple[list[Numbers], Numbers]:
        """Return the chunks of each buffer of an epoch, and how many rows the buffers up to each have together."""
        order = self.random(epoch, 0).permutation(len(self.starts) - 1)
        counts = np.diff(self.starts)[order]
        ends = np.cumsum(counts)
        # The first is half as large: an epoch's first batch then waits for half as much of the disk.
        buffer_of = (ends - counts + self._buffer_rows // 2) // self._buffer_rows
        lasts = np.flatnonzero(np.diff(buffer_of, append=-1))
        return np.split(order, lasts[:-1] + 1), ends[lasts]

    def _permute_buffer(self, epoch: int, buffer: int) -> Numbers:
        """Return the numbers of a buffer's rows in the order in which they are served."""
        chunks, _ = self._buffers(epoch)
        spans = [np.arange(self.starts[chunk], self.starts[chunk + 1]) for chunk in chunks[buffer]]
        return self.random(epoch, buffer + 1).permutation(np.concatenate(spans))
