"""One worker: take a lease on a shard, encode it, write it, commit it, release it; until nothing is left.

Every way of running comes down to this loop: one process, several on one machine, many machines on one store.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from sail_align.extract.errors import UserError, WorkersFailedError
from sail_align.extract.executor.encode import Advance, Rows
from sail_align.extract.executor.tally import bytes_read
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.store import Store
from sail_align.extract.system.leases import POLL, Lease, LeaseLostError
from sail_align.extract.system.progress import note

EncodeRows = Callable[[int, int, Advance], Rows]
"""Encodes rows start … stop − 1."""

_LONGEST_PAUSE = 10 * POLL

FAILURES = 3
"""Shards that may fail before a worker gives up: more is not the shards' fault."""


class ShardFailedError(WorkersFailedError):
    """The rows of a shard cannot be encoded, for a reason that is in no row's status."""


@dataclass(frozen=True)
class Task:
    """An array to fill and what encodes its rows; None where nothing is left to encode."""

    array: FeatureArray
    encode: EncodeRows | None


@dataclass(frozen=True)
class Share:
    """Worker `number` of `count` takes every count-th shard of each array; the first has number 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Read `3/16`. Raises `UserError` for anything else."""
        number, _, count = text.partition("/")
        if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
            return cls(int(number), int(count))
        raise UserError(f"--worker {text!r} is no share; the third of sixteen workers is 3/16, and the last 16/16.")

    def shards(self, array: FeatureArray) -> range:
        """Return the shards of an array that are this worker's."""
        return array.shards[self.number - 1 :: self.count]

    def rows(self, store: Store) -> int:
        """Return how many rows of each array are this worker's."""
        starts = range((self.number - 1) * store.shard_rows, store.rows, self.count * store.shard_rows)
        return sum(min(store.shard_rows, store.rows - start) for start in starts)


class Report(Protocol):
    """Is told what a worker does, from its main thread and from the one that writes."""

    def found(self, array: str, shard: int, rows: int) -> None:
        """Tell that a shard is committed that this worker has not written."""

    def encoded(self, rows: int) -> None:
        """Tell of rows encoded, or with a negative number of rows that have to be encoded again by another."""

    def committed(self, array: str, shard: int, rows: int, written: int) -> None:
        """Tell that a shard is written (in bytes) and committed."""

    def read(self, size: int) -> None:
        """Tell how many bytes were read."""

    def waiting(self, shards: int) -> None:
        """Tell that others have all shards that are left."""


def work(store: Store, tasks: Sequence[Task], report: Report, share: Share | None = None) -> None:
    """Return when every shard of the tasks (of this worker's share of them) is committed, by this worker or others.

    Raises:
        ShardFailedError: All others are committed, or too many failed.
    """
    share = share or Share()
    for task in tasks:
        for shard in task.array.markers:
            if shard in share.shards(task.array):
                report.found(task.array.path, shard, _rows(task.array, shard))
    before = bytes_read()
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="write") as thread:
            Loop(store, report, thread).run([(task, shard) for task in tasks for shard in share.shards(task.array)])
    finally:
        store.leases.release_all()
        report.read(bytes_read() - before)
    store.tidy()


class Loop:
    """The loop of one worker; while a shard is encoded, the one before it is written by `thread`."""

    def __init__(self, store: Store, report: Report, thread: ThreadPoolExecutor):
        self.leases = store.leases
        self.report = report
        self.thread = thread
        self.writing: Future[None] | None = None
        self.failed: dict[tuple[str, int], ShardFailedError] = {}

    def run(self, shards: Sequence[tuple[Task, int]]) -> None:
        """Return when all of these shards are committed.

        Raises:
            ShardFailedError: All but those that failed are committed, or too many failed.
        """
        pause = POLL
        while left := [each for each in shards if not self._is_over(*each)]:
            done = sum(self._try(task, shard) for task, shard in left)
            self.finish_writing()
            if done:
                pause = POLL
            else:
                self.report.waiting(len(left))
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        for failure in self.failed.values():
            raise failure

    def _is_over(self, task: Task, shard: int) -> bool:
        return self.is_there(task.array, shard) or (task.array.path, shard) in self.failed

    def _try(self, task: Task, shard: int) -> bool:
        """Do one shard; one that fails is set aside, so that it does not keep the others from being done."""
        try:
            return self.do(task, shard)
        except ShardFailedError as failure:
            self.failed[task.array.path, shard] = failure
            note(
                "".join(traceback.format_exception(failure.__cause__)) + f"{failure} The other shards are gone on with."
            )
            if len(self.failed) == FAILURES:
                raise
            return True

    def is_there(self, array: FeatureArray, shard: int) -> bool:
        """Whether a shard is committed, and tell of it if another worker has done that."""
        if shard in array.markers:
            return True
        if array.refresh(shard):
            self.report.found(array.path, shard, _rows(array, shard))
            return True
        return False

    def do(self, task: Task, shard: int) -> bool:
        """Encode one shard and hand it over to be written; return False if another worker has it or has done it.

        Raises:
            ShardFailedError: It cannot be encoded; its lease is given back.
            UserError: What is wrong is no matter of this shard.
        """
        array = task.array
        if task.encode is None or self.is_there(array, shard):
            return False
        lease = self.leases.take(f"{array.path}/{shard:05d}")
        if lease is None:
            return False
        if self.is_there(array, shard):  # committed between the look and the lease
            self.leases.release(lease)
            return False
        try:
            rows = task.encode(*array.span(shard), self.report.encoded)
        except (UserError, MemoryError):
            raise
        except Exception as problem:  # whatever a network or a source may raise
            self.leases.release(lease)
            raise ShardFailedError(
                f"{array.path} shard {shard} failed ({type(problem).__name__}: {problem})."
            ) from problem
        self.finish_writing()
        self.writing = self.thread.submit(self._write, array, shard, rows, lease)
        return True

    def _write(self, array: FeatureArray, shard: int, rows: Rows, lease: Lease) -> None:
        try:
            written = array.write(shard, *rows, lease)
        except LeaseLostError:
            self.report.encoded(-_rows(array, shard))
        else:
            self.report.committed(array.path, shard, _rows(array, shard), written)
        finally:
            self.leases.release(lease)

    def finish_writing(self) -> None:
        """Wait until the shard that was handed over last is written."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()


def _rows(array: FeatureArray, shard: int) -> int:
    start, stop = array.span(shard)
    return stop - start
