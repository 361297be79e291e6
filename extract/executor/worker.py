"""The loop of one worker: lease a shard, encode it, write it, commit it, release the lease; until no shard is left.

Every executor runs this loop: in one process, in several on one machine, or on many machines that share a store. A
shard is the unit of work. It is written once, whole, and its marker is written last.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sail_align.extract.errors import UserError, WorkersFailedError
from sail_align.extract.executor.encode import ArrayTask, EncodedRows
from sail_align.extract.executor.tally import Event, Shard
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import report_write_errors
from sail_align.extract.system.leases import POLL, Lease, LeaseLostError
from sail_align.extract.system.memory import keep_freed_memory
from sail_align.extract.system.progress import note

LONGEST_PAUSE = 10 * POLL
MAX_FAILURES = 3
"""Failed shards after which a worker gives up: so many are not the fault of the shards."""


@dataclass(frozen=True)
class Share:
    """Every `count`-th shard of each array, beginning with shard `number` (counted from 1)."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Parse a share such as `3/16`. Raises `UserError` for anything else."""
        number, _, count = text.partition("/")
        if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
            return cls(int(number), int(count))
        raise UserError(f"--worker {text!r} is invalid: expected N/OF, such as 3/16 for the third of sixteen workers.")

    def shards(self, array: FeatureArray) -> range:
        """Return the numbers of this share's shards of an array."""
        return array.shards[self.number - 1 :: self.count]

    def rows(self, store: Store) -> int:
        """Return the number of rows of each array that are in this share."""
        starts = range((self.number - 1) * store.shard_rows, store.rows, self.count * store.shard_rows)
        return sum(min(store.shard_rows, store.rows - start) for start in starts)


class _Leased(NamedTuple):
    """The rows of a shard, and the lease to write them."""

    shard: Shard
    rows: EncodedRows
    lease: Lease


class Worker:
    """Encodes shards of a store and reports each step through `send`, from its own and from its writing thread."""

    def __init__(self, store: Store, tasks: Sequence[ArrayTask], send: Callable[[Event], object], share: Share):
        keep_freed_memory()
        self.store = store
        self.tasks = {task.arrays[0].path: task for task in tasks}
        self._arrays = {array.path: array for task in tasks for array in task.arrays}
        self.send = send
        self.shards = [Shard(path, n) for path, task in self.tasks.items() for n in share.shards(task.arrays[0])]
        self.failures: dict[Shard, WorkersFailedError] = {}
        self._bytes_read = _bytes_read()
        for array in self._arrays.values():
            array.markers.read_ahead(share.shards(array))
        for shard in self.shards:
            for each in self._encoded_with(shard):
                if each.number in self._arrays[each.array].markers:
                    self._report_found(each)

    def pending(self) -> list[Shard]:
        """Return the shards that are neither known to be committed, by any worker, nor failed in this one.

        A shard of the first array of a task stands for those of all arrays of that task.
        """

        def is_known(shard: Shard) -> bool:
            return all(each.number in self._arrays[each.array].markers for each in self._encoded_with(shard))

        return [shard for shard in self.shards if shard not in self.failures and not is_known(shard)]

    def run(self) -> None:
        """Return when all shards are committed, by this worker or by others. Encode one while the last is written.

        Raises:
            WorkersFailedError: Some shards cannot be encoded. All others are committed, unless `MAX_FAILURES` failed.
            UserError: The disk is full, or encoding failed for a reason that concerns all shards.
        """
        pause = POLL
        with report_write_errors(self.store.path, during_run=True):
            try:
                with ThreadPoolExecutor(1, "write") as writer:
                    while pending := self.pending():
                        if self._try_each(pending, writer):
                            pause = POLL
                        elif left := self.pending():
                            self.send(Event("waiting", len(left)))
                            time.sleep(pause)
                            pause = min(2 * pause, LONGEST_PAUSE)
            finally:
                self._end()
            self.store.record_again(self._arrays.values())
            self.store.tidy()
        for failure in self.failures.values():
            raise failure

    def run_one(self, shard: Shard) -> bool:
        """Encode, write and commit one shard; return False if another worker holds it.

        Raises:
            WorkersFailedError: The shard cannot be encoded.
            UserError: The disk is full, or encoding failed for a reason that concerns all shards.
        """
        with report_write_errors(self.store.path, during_run=True):
            try:
                if leased := self._lease_and_encode(shard):
                    self._write(leased)
            finally:
                self._end()
        return self._is_done(shard)

    def _try_each(self, shards: Sequence[Shard], writer: ThreadPoolExecutor) -> bool:
        """Try each shard once, and set those aside that fail. Return False if other workers hold all of them."""
        busy = False
        writing: Future[None] | None = None
        for shard in shards:
            try:
                leased = self._lease_and_encode(shard)
            except WorkersFailedError as failure:
                busy = True
                self.failures[shard] = failure
                cause = "".join(traceback.format_exception(failure.__cause__))
                note(f"{cause}{failure} Continuing with the other shards.")
                if len(self.failures) == MAX_FAILURES:
                    raise
                continue
            if leased:
                busy = True
                if writing:
                    writing.result()
                writing = writer.submit(self._write, leased)
        if writing:
            writing.result()
        return busy

    def _lease_and_encode(self, shard: Shard) -> list["_Leased"]:
        """Return the rows of a shard, and of the shards encoded with it, with the leases to write them.

        Shards that another worker holds or committed are left out.

        Raises:
            WorkersFailedError: The shard cannot be encoded. Its leases are released.
            UserError: Encoding failed for a reason that concerns all shards.
        """
        together = self._encoded_with(shard)
        leases = [self._take(each) for each in together]
        held = [lease for lease in leases if lease]
        if not held:
            return []
        task = self.tasks[shard.array]
        span = task.arrays[0].span(shard.number)
        try:
            encoded = task.encode(range(*span), lambda count: self.send(Event("encoded", count * len(held))))
        except (UserError, MemoryError):
            raise
        except Exception as problem:  # sources and networks raise all kinds of errors
            for lease in held:
                self.store.leases.release(lease)
            raise WorkersFailedError(f"{shard} failed ({type(problem).__name__}: {problem}).") from problem
        found = zip(together, encoded, leases, strict=True)
        return [_Leased(each, rows, lease) for each, rows, lease in found if lease]

    def _take(self, shard: Shard) -> Lease | None:
        """Return the lease of a shard, None if another worker holds or committed it."""
        if self._is_committed(shard):
            return None
        lease = self.store.leases.take(shard.lease)
        if lease and self._is_committed(shard):  # between the check above and the lease
            self.store.leases.release(lease)
            return None
        return lease

    def _write(self, leased: Sequence["_Leased"]) -> None:
        for shard, rows, lease in leased:
            try:
                written = self._arrays[shard.array].write(shard.number, *rows, lease)
            except LeaseLostError:
                self.send(Event("encoded", -len(rows.status)))  # another worker encodes them again
            else:
                self.send(Event("committed", len(rows.status), shard, written))
            finally:
                self.store.leases.release(lease)

    def _encoded_with(self, shard: Shard) -> list[Shard]:
        """Return the shards with the same rows of all arrays of a task; the given one is that of its first array."""
        return [Shard(array.path, shard.number) for array in self.tasks[shard.array].arrays]

    def _is_done(self, shard: Shard) -> bool:
        """Return whether a shard and those encoded with it are committed."""
        return all(self._is_committed(each) for each in self._encoded_with(shard))

    def _is_committed(self, shard: Shard) -> bool:
        """Return whether a shard is committed, and report it if another worker has just done that."""
        array = self._arrays[shard.array]
        if shard.number in array.markers:
            return True
        if array.refresh(shard.number):
            self._report_found(shard)
            return True
        return False

    def _report_found(self, shard: Shard) -> None:
        start, stop = self._arrays[shard.array].span(shard.number)
        self.send(Event("found", stop - start, shard))

    def _end(self) -> None:
        self.store.leases.release_all()
        before, self._bytes_read = self._bytes_read, _bytes_read()
        self.send(Event("read", self._bytes_read - before))


def _bytes_read() -> int:
    """Return the bytes that this process and its ended children have read from files and pipes; 0 if unknown."""
    with suppress(OSError):
        return int(Path("/proc/self/io").read_text().split()[1])  # proc(5): rchar
    return 0
