"""Shuffled batches out of one or several stores: gathered by a thread into a few reused buffers, ahead of their use."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sail_align.align.data.captions import CaptionPolicy
from sail_align.align.data.pairs import Half, Pairs, Rows
from sail_align.align.data.sampler import Numbers, Order, StreamState

try:
    from sail_align.align.data._gather import gather
except ImportError:
    gather = None  # type: ignore[assignment]


def take_rows(
    chunks: Sequence[NDArray[Any]], of: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[Any]
) -> None:
    """Copy row `rows[n]` of `chunks[of[n]]` to `out[n]`, for all n: chunks (·, …), `of` and `rows` (N,), out (N, …).

    Raises:
        IndexError: A chunk has no such row.
        ValueError: The rows of a chunk have another shape than those of `out`.
    """
    plain = out.flags.c_contiguous and all(
        each.flags.c_contiguous and each.dtype == out.dtype and each.shape[1:] == out.shape[1:] for each in chunks
    )
    if gather is not None and plain and len(out):
        gather(tuple(chunks), of, rows, out)
        return
    for number in np.unique(of).tolist():
        places = np.flatnonzero(of == number)
        out[places] = chunks[number][rows[places]]


BUFFER_ROWS = 131_072
"""Rows that are mixed: about 1 GB of page cache for an image and two captions of 2,048 + 2 × 1,024 dimensions."""

PREFETCH = 2
"""Batches that are asked for ahead; there is one buffer more."""

GATHER_THREADS = 2
BLOCK_ROWS = 8_192

CAPTIONS = 1 << 16
"""More than a store has: chunk × CAPTIONS + caption is one number for both."""


class Batch(NamedTuple):
    """Features as stored, float16: images (B, D_I), and texts (C, B, D_T), row i of every caption for image i."""

    images: Tensor
    texts: Tensor


class Stream:
    """An endless sequence of batches; `Order` says which rows make which.

    A batch is a set of rows: they lie in it as they lie on the disk. Batches are of `batch_size` rows over all ranks;
    rank r has the r-th part of each, so that the parts of all ranks, one behind the other, are one process's batch.

    Raw local shards are mapped: their rows are copied once, into the batch, and what is read with them is kept by the
    page cache alone. Of other stores the chunks of the buffer that is being served are kept decoded.
    """

    def __init__(
        self,
        pairs: Sequence[Pairs],
        rows: Sequence[Rows],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        policy: CaptionPolicy | None = None,
        buffer_rows: int = BUFFER_ROWS,
        pin: bool = False,
    ):
        """Serve the chosen rows of each store, with all captions or those of a policy.

        Only where captions are drawn may the stores have different ones. `pin` makes the batches page-locked, for
        copies to a GPU.

        Raises:
            ValueError: There are fewer rows than one batch holds.
        """
        self._pairs = pairs
        chunks = [(source, number) for source, each in enumerate(pairs) for number in range(len(each.chunks()))]
        spans = [span for each in pairs for span in each.chunks()]
        counts = [np.count_nonzero(rows[source][slice(*span)]) for (source, _), span in zip(chunks, spans, strict=True)]
        used = [number for number, count in enumerate(counts) if count]
        self._chunks = [chunks[number] for number in used]
        self._served = [rows[chunks[number][0]][slice(*spans[number])] for number in used]
        self._order = Order(
            np.array([counts[number] for number in used], np.int64),
            batch_size=batch_size,
            seed=seed,
            buffer_rows=buffer_rows,
        )
        of_store = np.searchsorted([source for source, _ in self._chunks], range(len(pairs) + 1))
        self._starts = self._order.starts[of_store]  # number of each store's first row, and behind the last
        self._part = slice(*part_span(batch_size, rank, world))
        self._policy = policy or CaptionPolicy.all_alike(pairs[0].captions)
        self._pin = pin
        self._expected: set[int] = set()
        self._decoded: dict[tuple[int, int], Half] = {}
        self._copies: list[Future[None]] = []
        self._producer = ThreadPoolExecutor(1, "stream")
        self._gatherers = ThreadPoolExecutor(GATHER_THREADS, "gather")
        self.rows = self._order.rows
        self.batches_per_epoch = self._order.batches_per_epoch
        self.bytes_read = 0
        self.wait_seconds = 0.0

    def batches(self, state: StreamState | None = None) -> Iterator[tuple[Batch, StreamState]]:
        """Yield this rank's part of the batches from a state on, for ever, each with the state behind it.

        A batch is valid until the next but one is asked for. `bytes_read` counts what was served, `wait_seconds` how
        long it was waited for.
        """
        state = state or StreamState.start()
        rows = self._part.stop - self._part.start
        buffers = [self._allocate(rows, self._policy.positives) for _ in range(PREFETCH + 1)]
        pending: deque[tuple[Future[list[Future[None]]], Batch, StreamState]] = deque()
        looking: Future[None] | None = None
        while True:
            while len(pending) < PREFETCH:
                batch = buffers[0]
                filling = self._producer.submit(self._fill, batch, state, looking)
                looking = self._producer.submit(self._look_ahead, state)
                state = self._order.following(state)
                pending.append((filling, batch, state))
                buffers = [*buffers[1:], batch]
            filling, batch, behind = pending.popleft()
            begun = time.perf_counter()
            for copy in filling.result():
                copy.result()
            self.wait_seconds += time.perf_counter() - begun
            self.bytes_read += sum(part.numel() * part.element_size() for part in batch)
            yield batch, behind

    def blocks(self) -> Iterator[Batch]:
        """Yield every row once with all captions of its store, store by store: for sums over all of them."""
        for pairs, (first, stop) in zip(self._pairs, pairwise(self._starts.tolist()), strict=True):
            for start in range(first, stop, BLOCK_ROWS):
                numbers = np.arange(start, min(start + BLOCK_ROWS, stop))
                block = self._allocate(len(numbers), len(pairs.texts))
                for copy in self._gather(block, numbers):
                    copy.result()
                self._decoded.clear()
                self._expected.clear()  # it may have left the page cache when the batches ask for it
                yield block

    def close(self) -> None:
        """End the threads; what is being copied is waited for."""
        self._producer.shutdown(cancel_futures=True)
        self._gatherers.shutdown(cancel_futures=True)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _allocate(self, rows: int, captions: int) -> Batch:
        first = self._pairs[0]
        shapes = (rows, first.image.dim), (captions, rows, first.texts[0].dim)
        return Batch(*(torch.empty(shape, dtype=torch.float16, pin_memory=self._pin) for shape in shapes))

    def _fill(self, batch: Batch, state: StreamState, looked: Future[None] | None) -> list[Future[None]]:
        """Begin to copy this rank's part of a batch, once the look ahead before it is known not to have failed."""
        if looked:
            looked.result()
        if self._decoded:
            wait(self._copies)  # of the batch before: they use what is decoded
            buffered = self._order.buffered(state)
            self._decoded = {key: value for key, value in self._decoded.items() if key[0] in buffered}
        self._copies = self._gather(batch, self._numbers(state), self._draw(state))
        return self._copies

    def _look_ahead(self, state: StreamState) -> None:
        """Have the disk go on with what comes behind a batch: all of the next, and its share of the next buffer."""
        later, share = self._order.in_next_buffer(state)
        in_next_buffer = self._chunks_of(later)
        ahead = [*self._chunks_of(self._order.following(state)), *in_next_buffer[: round(share * len(in_next_buffer))]]
        self._expect(ahead)
        self._expected = {*self._chunks_of(state), *ahead}

    def _draw(self, state: StreamState) -> Numbers | None:
        """Return the captions of this rank's rows of a batch, (positives, rows); None where all are served.

        Number k is caption k of the row's store.
        """
        if not self._policy.drawn:
            return None
        random = self._order.random(state.epoch, state.batch, 1)  # the order's own have two places
        counts = np.diff(np.searchsorted(self._order.batch(state), self._starts)).tolist()
        drawn = [
            self._policy.draw(pairs.captions, rows, random) for pairs, rows in zip(self._pairs, counts, strict=True)
        ]
        return np.concatenate(drawn, axis=1)[:, self._part]

    def _numbers(self, state: StreamState) -> Numbers:
        return self._order.batch(state)[self._part]

    def _chunks_of(self, state: StreamState) -> list[int]:
        return [chunk for chunk, _, _ in self._order.pieces(self._numbers(state))]

    def _expect(self, chunks: Sequence[int]) -> None:
        """Have the system read those of the chunks that it was not told of lately."""
        new = sorted(set(chunks) - self._expected)
        self._expected.update(new)
        for source, pairs in enumerate(self._pairs if new else ()):
            numbers = [self._chunks[chunk][1] for chunk in new if self._chunks[chunk][0] == source]
            for array in pairs.arrays:
                array.expect(numbers)

    def _gather(self, batch: Batch, numbers: Numbers, drawn: Numbers | None = None) -> list[Future[None]]:
        """Begin to copy the rows of these numbers, which rise, with all captions or those drawn (K, N), to a batch."""
        pieces = self._order.pieces(numbers)
        chunks = [chunk for chunk, _, _ in pieces]
        of = np.repeat(np.arange(len(pieces)), [stop - start for _, start, stop in pieces])
        rows = self._rows_within(chunks, of, numbers)
        images, texts = batch.images.numpy(), batch.texts.numpy()

        def copy(part: slice) -> None:
            span = slice(pieces[part][0][1], pieces[part][-1][2])
            within = of[span] - part.start
            take_rows([self._chunk(chunk, 0) for chunk in chunks[part]], within, rows[span], images[span])
            for slot, text in enumerate(texts):
                if drawn is None:
                    parts, its = [self._chunk(chunk, slot + 1) for chunk in chunks[part]], within
                else:
                    found, its = np.unique(within * CAPTIONS + drawn[slot, span], return_inverse=True)
                    parts = [self._chunk(chunks[part][at // CAPTIONS], at % CAPTIONS + 1) for at in found.tolist()]
                take_rows(parts, its, rows[span], text[span])

        step = -(-len(pieces) // (4 * GATHER_THREADS))
        copies = []
        for part in (slice(at, at + step) for at in range(0, len(pieces), step)):
            self._expect(chunks[part])
            copies.append(self._gatherers.submit(copy, part))
        return copies

    def _rows_within(self, chunks: list[int], of: Numbers, numbers: Numbers) -> Numbers:
        """Return where in its chunk, `chunks[of[n]]`, the row of each number is: they rise."""
        masks = [self._served[chunk] for chunk in chunks]
        starts = self._order.starts[chunks]
        counts = self._order.starts[np.add(chunks, 1)] - starts
        first = np.cumsum([0, *counts[:-1]]) - starts  # of a chunk among the rows of all of them that are served
        begin = np.cumsum([0, *map(len, masks[:-1])])
        rows: Numbers = np.flatnonzero(np.concatenate(masks))[numbers + first[of]] - begin[of]
        return rows

    def _chunk(self, chunk: int, number: int) -> Half:
        """Return the rows of a chunk of array `number` (the images, then the captions): mapped, or decoded and kept."""
        source, place = self._chunks[chunk]
        array = self._pairs[source].arrays[number]
        if array.mapped:
            return array.chunk(place)
        key = (chunk, number)
        if key not in self._decoded:
            self._decoded[key] = array.chunk(place)
        return self._decoded[key]


def part_span(batch_size: int, rank: int, world: int) -> tuple[int, int]:
    """Return the first row of a rank's part of a batch, and the row behind its last: parts differ by at most one."""
    size, larger = divmod(batch_size, world)
    first = rank * size + min(rank, larger)
    return first, first + size + (rank < larger)


def batches_on(
    device: torch.device, batches: Iterator[tuple[Batch, StreamState]]
) -> Iterator[tuple[Batch, StreamState]]:
    """Yield batches on a device: to a GPU each is copied, from page-locked memory, while the one before is worked on.

    On a CPU they are passed on as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin_copy() -> tuple[Batch, StreamState, torch.cuda.Event]:
        batch, behind = next(batches)
        with torch.cuda.stream(copying):
            return Batch(*(part.to(device, non_blocking=True) for part in batch)), behind, copying.record_event()

    coming = begin_copy()
    while True:
        batch, behind, copied = coming
        copied.synchronize()  # before the next but one is asked for, which may reuse the memory that is copied from
        for part in batch:
            part.record_stream(torch.cuda.current_stream(device))
        coming = begin_copy()
        yield batch, behind
