"""Shuffled batches from one or several stores, copied ahead of use by threads into a few reused buffers."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain, cycle, pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sail_align.align.data.captions import CaptionPolicy
from sail_align.align.data.pairs import Half, Pairs, Rows, fill_missing
from sail_align.align.data.sampler import Numbers, Order, StreamState, split
from sail_align.extract.store.joined import StoredFeatures

try:
    from sail_align.align.data._gather import gather
except ImportError:
    gather = None  # type: ignore[assignment]

BUFFER_ROWS = 131_072
"""Rows per shuffle buffer: about 1 GB of page cache for an image and two captions of 2,048 + 2 × 1,024 dimensions."""

PREFETCH = 2
"""Number of batches prepared in advance. There is one more buffer, for the batch in use."""

GATHER_THREADS = 2
SCAN_ROWS = 8_192

CAPTION_LIMIT = 1 << 16
"""More captions than any store has: chunk × CAPTION_LIMIT + caption identifies a chunk of a caption."""


class Batch(NamedTuple):
    """Float16 features as stored: images (B, D_I) and texts (C, B, D_T). Row i of each caption belongs to image i."""

    images: Tensor
    texts: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; a copy from page-locked memory to a GPU may still be in progress."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


def take_rows(
    chunks: Sequence[NDArray[Any]], chunk_of: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[Any]
) -> None:
    """Copy row `rows[n]` of `chunks[chunk_of[n]]` to `out[n]` for all n.

    Args:
        chunks: Arrays (·, …).
        chunk_of: Chunk of each row, (N,).
        rows: Position of each row in its chunk, (N,).
        out: Array (N, …) to write to.

    Raises:
        IndexError: A row is outside its chunk.
        ValueError: The shape of the chunks' rows differs from that of the rows of `out`.
    """
    if rows.min(initial=0) < 0:
        raise IndexError(f"row {rows.min()} is outside its chunk")
    plain = out.flags.c_contiguous and all(
        each.flags.c_contiguous and each.dtype == out.dtype and each.shape[1:] == out.shape[1:] for each in chunks
    )
    if gather is not None and plain and len(out):
        gather(tuple(chunks), chunk_of, rows, out)
        return
    rising = bool((np.diff(chunk_of) >= 0).all())
    for number in np.unique(chunk_of).tolist():
        chunk = chunks[number]
        places: Any
        if rising:
            places = slice(*np.searchsorted(chunk_of, (number, number + 1)).tolist())
        else:
            places = np.flatnonzero(chunk_of == number)
        taken = rows[places]
        if rising and plain and taken.max() < len(chunk):
            chunk.take(taken, axis=0, out=out[places], mode="clip")  # any other mode copies twice
        else:
            out[places] = chunk[taken]


def _columns(array: StoredFeatures) -> list[slice]:
    """Return the columns of each part of joined features in a batch."""
    ends = np.cumsum([0, *(part.dim for part in array.parts)]).tolist()
    return [slice(*span) for span in pairwise(ends)]


class Source(ABC):
    """An endless sequence of batches.

    Attributes:
        rows: Number of rows of all batches of an epoch.
        bytes_read: Bytes of the batches served.
        wait_seconds: Time spent waiting for batches.
    """

    rows: int
    bytes_read = 0
    wait_seconds = 0.0

    @abstractmethod
    def batches(self, state: StreamState | None = None) -> Iterator[tuple[Batch, StreamState]]:
        """Yield this rank's part of each batch from a state on, without end, with the state after the batch.

        A batch stays valid until the next but one is requested.
        """

    @abstractmethod
    def scan(self) -> Iterator[Batch]:
        """Yield each row once, store by store, with all captions of its store: the row's first one for any it lacks."""

    @abstractmethod
    def close(self) -> None:
        """End the threads after the copies in progress."""

    def batches_on(self, device: torch.device, state: StreamState | None = None) -> Iterator[tuple[Batch, StreamState]]:
        """Yield `batches` on a device: each is copied to a GPU while the previous is in use. A CPU needs no copy."""
        batches = self.batches(state)
        if device.type != "cuda":
            yield from batches
            return
        copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

        def begin_copy() -> tuple[Batch, StreamState, torch.cuda.Event]:
            batch, next_state = next(batches)
            with torch.cuda.stream(copying):
                return batch.to(device), next_state, copying.record_event()

        upcoming = begin_copy()
        while True:
            batch, next_state, copied = upcoming
            copied.synchronize()  # requesting the next but one may overwrite the memory that is copied from
            for part in batch:
                part.record_stream(torch.cuda.current_stream(device))
            upcoming = begin_copy()
            yield batch, next_state

    def _count(self, batch: Batch, asked: float) -> None:
        """Count a batch, requested at a time of `time.perf_counter`."""
        self.wait_seconds += time.perf_counter() - asked
        self.bytes_read += sum(part.numel() * part.element_size() for part in batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class Stream(Source):
    """An endless sequence of batches read from stores, in the order defined by `Order`.

    The rows of a batch are in disk order. `batch_size` counts the rows of all ranks: rank r serves the r-th part of
    each batch, so that the parts of all ranks, concatenated, are the batch of a single process.

    Raw local shards are memory-mapped. Their rows are copied once, into the batch, and only the page cache keeps what
    was read. For other stores, the decoded chunks of the current buffer are kept in memory.

    Attributes:
        pairs: The stores.
        policy: The captions served.
        order: The order of the rows.
        starts: Number of the first row of each store, then the number of all rows.
        rank: Rank of this process.
        parts: Part of a batch that each rank serves.
        pin: Whether batches are in page-locked memory.
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
        """Prepare to serve the chosen rows of each store.

        Args:
            pairs: Stores to read. They may have different captions only if captions are sampled.
            rows: Rows to serve of each store.
            batch_size: Rows per batch, over all ranks.
            seed: Seed of the order and of the sampled captions.
            rank: Rank of this process.
            world: Number of processes.
            policy: Captions to serve; all by default.
            buffer_rows: Rows per shuffle buffer.
            pin: Use page-locked memory, for copies to a GPU.

        Raises:
            ValueError: There are fewer rows than the batch size.
        """
        self.pairs = pairs
        self._chunks: list[tuple[int, int]] = []
        self._served: list[Rows] = []
        for source, (each, chosen) in enumerate(zip(pairs, rows, strict=True)):
            for number, span in enumerate(each.chunks()):
                if chosen[span].any():
                    self._chunks.append((source, number))
                    self._served.append(chosen[span])
        counts = np.array([np.count_nonzero(served) for served in self._served], np.int64)
        self.order = Order(counts, batch_size=batch_size, seed=seed, buffer_rows=buffer_rows)
        first_chunks = np.searchsorted([source for source, _ in self._chunks], range(len(pairs) + 1))
        self.starts = self.order.starts[first_chunks]  # number of each store's first row, then the total
        self.rank, self.parts = rank, split(batch_size, world)
        self._part = self.parts[rank]
        self.policy = policy or CaptionPolicy.uniform(pairs[0].captions)
        self._present: list[Rows | None] = [None] * len(pairs)  # by row number within the store
        if self.policy.drawn:
            present = (each.present()[:, chosen] for each, chosen in zip(pairs, rows, strict=True))
            self._present = [None if has_CN.all() else has_CN for has_CN in present]
        self._image_columns, self._text_columns = (_columns(array) for array in pairs[0].arrays[:2])
        self.pin = pin
        self._expected: set[int] = set()
        self._decoded: dict[tuple[int, int, int], Half] = {}
        self._copies: list[Future[None]] = []
        self._producer = ThreadPoolExecutor(1, "stream")
        self._gatherers = ThreadPoolExecutor(GATHER_THREADS, "gather")
        self.rows = self.order.rows
        self.batches_per_epoch = self.order.batches_per_epoch

    def batches(self, state: StreamState | None = None) -> Iterator[tuple[Batch, StreamState]]:  # noqa: D102
        state = state or StreamState()
        rows = self._part.stop - self._part.start
        buffers = cycle([self.allocate(rows, self.policy.positives) for _ in range(PREFETCH + 1)])
        pending: deque[tuple[Future[list[Future[None]]], Batch, StreamState]] = deque()
        look_ahead: Future[None] | None = None
        while True:
            while len(pending) < PREFETCH:
                batch = next(buffers)
                filling = self._producer.submit(self._fill, batch, state, look_ahead)
                look_ahead = self._producer.submit(self._look_ahead, state)
                state = self.order.following(state)
                pending.append((filling, batch, state))
            filling, batch, next_state = pending.popleft()
            start = time.perf_counter()
            for copy in filling.result():
                copy.result()
            self._count(batch, start)
            yield batch, next_state

    def scan(self, rows: slice = slice(None)) -> Iterator[Batch]:
        """Yield rows as `Source.scan` does, by default all. A slice of their numbers has no step."""
        begin, end, _ = rows.indices(self.rows)
        for pairs, has_CN, (first, stop) in zip(self.pairs, self._present, pairwise(self.starts.tolist()), strict=True):
            last = min(stop, end)
            for start in range(max(first, begin), last, SCAN_ROWS):
                numbers = np.arange(start, min(start + SCAN_ROWS, last))
                batch = self.allocate(len(numbers), len(pairs.texts))
                for copy in self._gather(batch, numbers):
                    copy.result()
                if has_CN is not None:
                    fill_missing(batch.texts.numpy(), has_CN[:, numbers - first])
                self._decoded.clear()
                self._expected.clear()  # the page cache may have dropped it by the time a batch needs it
                yield batch

    def close(self) -> None:  # noqa: D102
        self._producer.shutdown(cancel_futures=True)
        self._gatherers.shutdown(cancel_futures=True)

    def allocate(self, rows: int, captions: int) -> Batch:
        """Return an empty batch in the memory of this machine."""
        first = self.pairs[0]
        shapes = (rows, first.image.dim), (captions, rows, first.texts[0].dim)
        return Batch(*(torch.empty(shape, dtype=torch.float16, pin_memory=self.pin) for shape in shapes))

    def _fill(self, batch: Batch, state: StreamState, look_ahead: Future[None] | None) -> list[Future[None]]:
        """Start to copy this rank's part of a batch. Raise the error of the preceding look-ahead, if it failed."""
        if look_ahead:
            look_ahead.result()
        if state.batch == 0 and any(pairs.verify == "always" for pairs in self.pairs):
            wait(self._copies)  # those of the previous epoch
            for array in chain.from_iterable(pairs.parts for pairs in self.pairs):
                array.check_again()
        if self._decoded:
            wait(self._copies)  # the copies of the previous batch read the decoded chunks
            buffered = self.order.buffered(state)
            self._decoded = {key: value for key, value in self._decoded.items() if key[0] in buffered}
        drawn = self.drawn(state)
        self._copies = self._gather(batch, self._numbers(state), None if drawn is None else drawn[:, self._part])
        return self._copies

    def _look_ahead(self, state: StreamState) -> None:
        """Ask the system to read ahead: all of the next batch, and a growing part of the next buffer."""
        later, share = self.order.in_next_buffer(state)
        in_next_buffer = self._chunks_of(later)
        ahead = [*self._chunks_of(self.order.following(state)), *in_next_buffer[: round(share * len(in_next_buffer))]]
        self._expect(ahead)
        self._expected = {*self._chunks_of(state), *ahead}

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a batch."""
        first = self.pairs[0]
        return 2 * (first.image.dim + self.policy.positives * first.texts[0].dim)

    def drawn(self, state: StreamState) -> Numbers | None:
        """Return the captions (positives, batch_size) sampled for the rows of a batch; None if all are served.

        Number k is caption k of the row's store.
        """
        if not self.policy.drawn:
            return None
        random = self.order.random(state.epoch, state.batch, 1)  # `Order` itself uses positions of two numbers
        numbers = self.order.batch(state)
        drawn = []
        for pairs, start, (first, stop), has_CN in zip(
            self.pairs, self.starts, pairwise(np.searchsorted(numbers, self.starts)), self._present, strict=False
        ):
            present = None if has_CN is None else has_CN[:, numbers[first:stop] - start]
            drawn.append(self.policy.draw(pairs.captions, stop - first, random, present))
        return np.concatenate(drawn, axis=1)

    def _numbers(self, state: StreamState) -> Numbers:
        return self.order.batch(state)[self._part]

    def _chunks_of(self, state: StreamState) -> list[int]:
        return [chunk for chunk, _, _ in self.order.pieces(self._numbers(state))]

    def _expect(self, chunks: Sequence[int]) -> None:
        """Ask the system to read chunks, except those that were requested recently."""
        new = sorted(set(chunks) - self._expected)
        self._expected.update(new)
        for source, pairs in enumerate(self.pairs if new else ()):
            numbers = [self._chunks[chunk][1] for chunk in new if self._chunks[chunk][0] == source]
            for array in pairs.parts:
                array.prefetch(numbers)

    def _gather(self, batch: Batch, numbers: Numbers, drawn: Numbers | None = None) -> list[Future[None]]:
        """Start to copy rows into a batch.

        Args:
            batch: Batch to fill.
            numbers: Row numbers (N,) in rising order.
            drawn: Captions (K, N) sampled for each row. All captions are copied by default.
        """
        pieces = self.order.pieces(numbers)
        chunks = [chunk for chunk, _, _ in pieces]
        chunk_of = np.repeat(np.arange(len(pieces)), [stop - start for _, start, stop in pieces])
        rows = self._rows_within(chunks, chunk_of, numbers)
        images, texts = batch.images.numpy(), batch.texts.numpy()

        def copy(part: slice) -> None:
            span = slice(pieces[part][0][1], pieces[part][-1][2])
            within = chunk_of[span] - part.start
            for number, columns in enumerate(self._image_columns):
                sources = [self._chunk(chunk, 0, number) for chunk in chunks[part]]
                take_rows(sources, within, rows[span], images[span, columns])
            for slot, text in enumerate(texts):
                if drawn is None:
                    keys, source_of = [(place, slot) for place in range(len(chunks[part]))], within
                else:
                    found, source_of = np.unique(within * CAPTION_LIMIT + drawn[slot, span], return_inverse=True)
                    keys = [divmod(key, CAPTION_LIMIT) for key in found.tolist()]
                for number, columns in enumerate(self._text_columns):
                    sources = [self._chunk(chunks[part][place], caption + 1, number) for place, caption in keys]
                    take_rows(sources, source_of, rows[span], text[span, columns])

        step = -(-len(pieces) // (4 * GATHER_THREADS))
        copies = []
        for part in (slice(at, at + step) for at in range(0, len(pieces), step)):
            self._expect(chunks[part])
            copies.append(self._gatherers.submit(copy, part))
        return copies

    def _rows_within(self, chunks: list[int], chunk_of: Numbers, numbers: Numbers) -> Numbers:
        """Return the position of each row number in its chunk, `chunks[chunk_of[n]]`; numbers rise."""
        masks = [self._served[chunk] for chunk in chunks]
        starts = self.order.starts[chunks]
        counts = self.order.starts[np.add(chunks, 1)] - starts
        shift = np.cumsum([0, *counts[:-1]]) - starts  # from a row number to a position among the chunks' served rows
        begin = np.cumsum([0, *map(len, masks[:-1])])
        rows: Numbers = np.flatnonzero(np.concatenate(masks))[numbers + shift[chunk_of]] - begin[chunk_of]
        return rows

    def _chunk(self, chunk: int, number: int, part: int) -> Half:
        """Return a chunk of a part of array `number` (0: images, then the captions), mapped or decoded and kept."""
        source, place = self._chunks[chunk]
        array = self.pairs[source].arrays[number].parts[part]
        if array.mapped:
            return array.chunk(place)
        key = (chunk, number, part)
        if key not in self._decoded:
            self._decoded[key] = array.chunk(place)
        return self._decoded[key]
