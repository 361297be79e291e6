"""The rows of a stream in memory, of a GPU or of this machine, and its batches gathered from there."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import cycle, pairwise

import numpy as np
import torch
from torch import Tensor

from sail_align.align.data.loader import PREFETCH, SCAN_ROWS, Batch, Source, Stream, take_rows
from sail_align.align.data.sampler import Numbers, StreamState, split
from sail_align.extract.system.progress import progress

Move = Callable[[Tensor, list[slice], list[slice], Tensor], None]
"""Passes rows on between processes: see `World.move`."""


class Cache(Source):
    """The batches of a stream, gathered from memory that holds all of its rows.

    Of several processes, each holds an equal part of the rows. It gathers the rows of a batch that it holds, and the
    processes pass them on, so that each gets the rows that the stream would serve.
    """

    def __init__(self, stream: Stream, device: torch.device | None, move: Move | None = None, *, quiet: bool = True):
        """Load the rows of a stream.

        Args:
            stream: The stream.
            device: Device that holds the rows and gathers batches by index. None holds them in the memory of this
                machine, where a thread gathers batches in advance.
            move: Passes rows on, if there are several processes.
            quiet: Show no progress bar.

        Raises:
            UserError: The features are damaged.
        """
        self._stream, self._device, self._move = stream, device, move
        self.rows = stream.rows
        self._held = split(stream.rows, len(stream.parts))
        starts = np.clip(stream.starts, *self._own)
        self._rows = np.diff(starts)
        sizes = self._rows * [len(pairs.texts) for pairs in stream.pairs]
        # Caption k of row n, of store s, is in row n + k · rows[s] + shift[s] of the texts.
        self._shift = np.cumsum(sizes) - sizes - starts[:-1]
        first = stream.pairs[0]
        shapes = (int(self._rows.sum()), first.image.dim), (int(sizes.sum()), first.texts[0].dim)
        self._images, self._texts = (torch.empty(shape, dtype=torch.float16, device=device) for shape in shapes)
        self._load(quiet)
        self._thread = ThreadPoolExecutor(1, "cache")

    @staticmethod
    def bytes_of(stream: Stream) -> int:
        """Return the bytes that each process has to hold, at most."""
        rows = int(split(stream.rows, len(stream.parts))[0].stop)
        texts = max(len(pairs.texts) for pairs in stream.pairs)
        first = stream.pairs[0]
        return 2 * rows * (first.image.dim + texts * first.texts[0].dim)

    def batches(self, state: StreamState | None = None) -> Iterator[tuple[Batch, StreamState]]:  # noqa: D102
        state = state or StreamState()
        stream = self._stream
        part = stream.parts[stream.rank]
        allocate = partial(stream.allocate, part.stop - part.start, stream.policy.positives)
        buffers = cycle([allocate() for _ in range(PREFETCH + 1)]) if self._device is None else None
        pending: deque[tuple[Future[Callable[[], Batch]], StreamState]] = deque()
        while True:
            while len(pending) < PREFETCH:
                preparing = self._thread.submit(self._prepare, state, next(buffers) if buffers else None)
                state = stream.order.following(state)
                pending.append((preparing, state))
            preparing, next_state = pending.popleft()
            asked = time.perf_counter()
            batch = preparing.result()()
            self._count(batch, asked)
            yield batch, next_state

    def batches_on(self, device: torch.device, state: StreamState | None = None) -> Iterator[tuple[Batch, StreamState]]:
        """Yield `batches` on a device. Those that are gathered there are not copied."""
        return super().batches_on(device, state) if self._device is None else self.batches(state)

    def scan(self) -> Iterator[Batch]:  # noqa: D102
        if self._move:
            raise RuntimeError("this process holds only a part of the rows")
        for pairs, rows, shift, (first, stop) in zip(
            self._stream.pairs, self._rows, self._shift, pairwise(self._stream.starts), strict=True
        ):
            text_CND = self._texts[first + shift :][: len(pairs.texts) * rows].view(len(pairs.texts), rows, -1)
            for start in range(0, rows, SCAN_ROWS):
                part = slice(start, start + SCAN_ROWS)
                yield Batch(self._images[first:stop][part], text_CND[:, part])

    def close(self) -> None:  # noqa: D102
        self._thread.shutdown(cancel_futures=True)

    @property
    def _own(self) -> tuple[int, int]:
        """The first row that this process holds, and the row after its last."""
        held = self._held[self._stream.rank]
        return held.start, held.stop

    def _load(self, quiet: bool) -> None:
        at, stop = self._own
        with progress(stop - at, "load features", quiet=quiet, delay=1) as bar:
            for block in self._stream.scan(slice(at, stop)):
                rows = len(block.images)
                store = self._stores_of(at)
                self._images[at - self._own[0] :][:rows] = block.images
                for caption, text_ND in enumerate(block.texts):
                    self._texts[at + caption * self._rows[store] + self._shift[store] :][:rows] = text_ND
                at += rows
                bar.update(rows)

    def _stores_of(self, numbers: Numbers | int) -> Numbers:
        """Return the stores of rows."""
        stores: Numbers = np.searchsorted(self._stream.starts, numbers, "right") - 1
        return stores

    def _prepare(self, state: StreamState, buffer: Batch | None) -> Callable[[], Batch]:
        """Return a function that returns the batch of a state.

        Args:
            state: The state.
            buffer: Memory of this machine, into which the batch is gathered at once. None lets the function gather it
                on the device.
        """
        stream = self._stream
        numbers_B, drawn_CB = stream.order.batch(state), stream.drawn(state)
        edges = np.searchsorted(numbers_B, [0, *(held.stop for held in self._held)]).tolist()
        have = [slice(*span) for span in pairwise(edges)]
        own = have[stream.rank]
        numbers_N = numbers_B[own]
        captions_CN = np.arange(stream.policy.positives)[:, None] if drawn_CB is None else drawn_CB[:, own]
        stores_N = self._stores_of(numbers_N)
        texts_CN = numbers_N + captions_CN * self._rows[stores_N] + self._shift[stores_N]
        images_N = numbers_N - self._own[0]
        gather: Callable[[], Batch]
        if buffer is None:
            gather = partial(self._gather, *map(self._pinned, (images_N, texts_CN)))
        else:
            batch = stream.allocate(*texts_CN.shape[::-1]) if self._move else buffer
            self._copy(images_N, texts_CN, batch)
            gather = lambda: batch  # noqa: E731
        if not (move := self._move):
            return gather
        return lambda: self._exchange(move, gather(), have, buffer)

    def _copy(self, images_N: Numbers, texts_CN: Numbers, batch: Batch) -> None:
        """Copy rows to a batch in the memory of this machine."""
        same_N = np.zeros_like(images_N)
        take_rows([self._images.numpy()], same_N, images_N, batch.images.numpy())
        for rows_N, text_ND in zip(texts_CN, batch.texts, strict=True):
            take_rows([self._texts.numpy()], same_N, rows_N, text_ND.numpy())

    def _pinned(self, numbers: Numbers) -> Tensor:
        """Return numbers as a tensor, from which a copy to a GPU does not wait."""
        tensor = torch.from_numpy(numbers)
        return tensor.pin_memory() if self._images.is_cuda else tensor

    def _gather(self, images_N: Tensor, texts_CN: Tensor) -> Batch:
        """Return rows as a batch, gathered on the device."""
        images_N, texts_CN = (rows.to(self._images.device, non_blocking=True) for rows in (images_N, texts_CN))
        texts_XD = self._texts.index_select(0, texts_CN.flatten())
        return Batch(self._images.index_select(0, images_N), texts_XD.view(*texts_CN.shape, -1))

    def _exchange(self, move: Move, batch: Batch, have: list[slice], out: Batch | None) -> Batch:
        """Exchange the rows of a batch that each process has for those that each serves."""
        parts = self._stream.parts
        if out is None:
            images, texts = batch
            rows = parts[self._stream.rank].stop - parts[self._stream.rank].start
            out = Batch(images.new_empty(rows, images.shape[1]), texts.new_empty(len(texts), rows, texts.shape[2]))
        for from_ND, to_ND in zip((batch.images, *batch.texts), (out.images, *out.texts), strict=True):
            move(from_ND, have, parts, to_ND)
        return out
