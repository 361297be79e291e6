"""The progress and cost of a run: its workers send events, the tally counts them, and a summary reports them."""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from sail_align.extract.errors import format_bytes
from sail_align.extract.system.files import is_remote
from sail_align.extract.system.progress import note, progress


class Shard(NamedTuple):
    """One shard of an array, named by the array's path in the store."""

    array: str
    number: int

    def __str__(self) -> str:
        return f"{self.array} shard {self.number}"

    @property
    def lease(self) -> str:
        """The name of the lease that a writer of this shard must hold."""
        return f"{self.array}/{self.number:05d}"


class Event(NamedTuple):
    """A step of one worker.

    `kind` determines what `amount` counts:

    - `encoded`: rows that were encoded. A negative number takes back rows that another worker encodes again.
    - `committed`: rows of `shard`, which this worker has committed; `written` is the size of its files in bytes.
    - `found`: rows of `shard`, which another worker or an earlier run has committed.
    - `read`: bytes that the worker's process has read.
    - `waiting`: shards that are left, all of them held by other workers.
    """

    kind: Literal["encoded", "committed", "found", "read", "waiting"]
    amount: int
    shard: Shard | None = None
    written: int = 0


@dataclass(frozen=True)
class Summary:
    """The work and the cost of a run.

    Attributes:
        encoded: Rows that the run has encoded and committed, over all arrays.
        left: Rows that are not committed, over all arrays.
        seconds: Duration of the run.
        read: Bytes that its processes have read, for any purpose; 0 if the system does not report it.
        written: Bytes of the shards that it has written.
        units: Number of GPUs or cores of the run.
        unit: `GPU` or `core`.
        arrays: Number of arrays that the run fills.
    """

    encoded: int
    left: int
    seconds: float
    read: int
    written: int
    units: int
    unit: str
    arrays: int = 1

    @property
    def hours_left(self) -> float | None:
        """Estimated hours for the rows that are left, at the rate of this run; None if it has encoded none."""
        return self.left * self.seconds / self.encoded / 3600 if self.encoded else None

    @property
    def rest(self) -> str:
        """Describe the rows that are left and the time that they will take."""
        if not self.hours_left:
            return f"{self.left:,} rows are left"
        minutes = round(60 * self.hours_left)
        time = f"{self.hours_left:.1f} hours" if minutes >= 120 else f"{max(minutes, 1)} min"
        return f"{self.left:,} rows are left, about {time}"

    def __str__(self) -> str:
        if not self.encoded:
            return f"0 rows encoded in {self.seconds:.0f} s"
        of_arrays = f" of {self.arrays} arrays" if self.arrays > 1 else ""
        return (
            f"{self.encoded:,} rows{of_arrays} encoded in {self.seconds:.0f} s, "
            f"{self.encoded / self.seconds:,.0f} per second, {self.units * self.seconds / 3600:.3g} {self.unit}-hours, "
            f"{format_bytes(self.read)} read, {format_bytes(self.written)} written"
        )

    def append_to_log(self, store: Path, end: str) -> None:
        """Append a line to `<store>.log.jsonl`, beside the store, whose own bytes do not depend on time.

        Failures to write the log are ignored.

        Args:
            store: Path of the store.
            end: `done`, `failed` or the name of the signal that stopped the run.
        """
        log = store.with_name(f"{store.name}.log.jsonl")
        line = {
            "schema": 1,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "end": end,
            "host": socket.gethostname(),
            **asdict(self),
            f"{self.unit}_hours": self.units * self.seconds / 3600,
            "hours_left": self.hours_left,
        }
        before = log.read_text() if is_remote(log) and log.exists() else ""  # remote objects cannot be appended to
        with suppress(OSError), log.open("w" if is_remote(log) else "a") as file:
            file.write(before + json.dumps(line) + "\n")


class Tally:
    """Counts the events of a run's workers and shows them as one progress bar.

    An executor passes the workers' events to `receive`. It sets `workers`, the number of processes that report, and
    `hardware`, the number and the unit of what the run occupies: GPUs or cores.

    Args:
        total: Rows of the run's share, over all arrays.
        description: Label of the progress bar. It counts items of the data set: rows divided by `arrays`.
        arrays: Number of arrays that the run fills.
        quiet: Show no progress bar.
    """

    def __init__(self, total: int, description: str, *, arrays: int = 1, quiet: bool = False):
        self.workers = 1
        self.hardware = (cores(), "core")
        self._lock = threading.Lock()
        self._arrays = max(arrays, 1)
        self._bar = progress(total // self._arrays, description, unit="item", quiet=quiet)
        self._done = 0  # rows that the bar shows
        self._started = time.monotonic()
        self._committed: dict[Shard | None, int] = {}
        self._encoded = self._written = self._read = 0
        self._waiting: set[int] = set()
        self._total = total

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()

    def receive(self, event: Event, worker: int = 0) -> None:
        """Count an event of worker number `worker`. Threads may call this at the same time."""
        with self._lock:
            known = event.shard in self._committed
            match event.kind:
                case "encoded":
                    self._bar.update(self._advance(event.amount))
                case "read":
                    self._read += event.amount
                case "committed":
                    self._encoded += event.amount
                    self._written += event.written
                    if known:  # another worker has found the shard before this event arrived
                        self._shift(-event.amount)
                    self._committed[event.shard] = event.amount
                case "found" if not known:
                    self._committed[event.shard] = event.amount
                    self._shift(event.amount)
                    self._bar.update(0)
                case "waiting" if worker not in self._waiting:
                    self._waiting.add(worker)
                    if len(self._waiting) == self.workers:
                        left = f"{event.amount} shard{'s' * (event.amount > 1)}"
                        note(f"Other runs on this store hold the {left} that are left. Waiting for them.")

    def summary(self) -> Summary:
        """Return the summary of the run until now."""
        left = self._total - sum(self._committed.values())
        seconds = time.monotonic() - self._started
        return Summary(self._encoded, left, seconds, self._read, self._written, *self.hardware, self._arrays)

    def _shift(self, rows: int) -> None:
        """Move the bar by rows that this run has not encoded, without a change of the rate."""
        items = self._advance(rows)
        if not self._bar.disable:
            self._bar.initial += items
            self._bar.n += items

    def _advance(self, rows: int) -> int:
        """Count rows, and return the number of whole items that the bar moves by."""
        before, self._done = self._done, self._done + rows
        return self._done // self._arrays - before // self._arrays


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
