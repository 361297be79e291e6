"""What a run has done and what it cost: one bar, one summary, one line of a log."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sail_align.extract.system.files import is_remote
from sail_align.extract.system.progress import note, progress

GIGABYTE = 1e9


@dataclass(frozen=True)
class Summary:
    """What a run has encoded, and what for.

    `left` counts rows, over all arrays, that are still to be done. `read` and `written` are bytes, `read` with all
    that its processes read (0 where the system does not tell). `units` is how many `unit`s, cores or GPUs, it had.
    """

    encoded: int
    left: int
    seconds: float
    read: int
    written: int
    units: int
    unit: str

    @property
    def hours_left(self) -> float | None:
        """The estimate for the rows that are left at this run's rate; None if it has encoded none."""
        return self.left * self.seconds / self.encoded / 3600 if self.encoded else None

    @property
    def rest(self) -> str:
        """How much is left, in words."""
        if not self.hours_left:
            return f"{self.left:,} rows are left"
        minutes = round(60 * self.hours_left)
        time = f"{self.hours_left:.1f} hours" if minutes >= 120 else f"{max(minutes, 1)} min"
        return f"{self.left:,} rows are left, about {time}"

    def __str__(self) -> str:
        if not self.encoded:
            return f"0 rows encoded in {self.seconds:.0f} s"
        return (
            f"{self.encoded:,} rows encoded in {self.seconds:.0f} s, {self.encoded / self.seconds:,.0f} a second, "
            f"{self.units * self.seconds / 3600:.3g} {self.unit}-hours, {self.read / GIGABYTE:.3g} GB read, "
            f"{self.written / GIGABYTE:.3g} GB written"
        )

    def append_to_log(self, store: Path, end: str) -> None:
        """Add a line to the log beside the store, whose own bytes know nothing of time; leave it where that fails."""
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
        written = log.read_text() if is_remote(log) and log.exists() else ""  # objects cannot be appended to
        with suppress(OSError), log.open("w" if is_remote(log) else "a") as file:
            file.write(written + json.dumps(line) + "\n")


class Tally:
    """Adds up what workers report (see `worker.Report`) and shows it as one bar over `total` rows of all arrays."""

    def __init__(self, total: int, what: str, *, quiet: bool = False, workers: int = 1):
        self._workers = workers
        self._lock = threading.Lock()
        self._bar = progress(total, what, quiet=quiet)
        self._started = time.monotonic()
        self._there: set[tuple[str, int]] = set()
        self._rows_there = 0
        self._encoded = self._written = self._read = 0
        self._waiting: set[int] = set()
        self._total = total

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def found(self, array: str, shard: int, rows: int) -> None:
        """Count a shard that this run has not written."""
        with self._lock:
            if self._is_new(array, shard, rows):
                self._shift(rows)
                self._bar.update(0)

    def encoded(self, rows: int) -> None:
        """Show rows that are encoded."""
        with self._lock:
            self._bar.update(rows)

    def committed(self, array: str, shard: int, rows: int, written: int) -> None:
        """Count a shard that this run has written."""
        with self._lock:
            self._encoded += rows
            self._written += written
            if not self._is_new(array, shard, rows):  # another worker saw it before this one had told of it
                self._shift(-rows)

    def waiting(self, shards: int, worker: int = 0) -> None:
        """Say so, once, when all workers of this run wait for those of another."""
        with self._lock:
            if worker not in self._waiting:
                self._waiting.add(worker)
                if len(self._waiting) == self._workers:
                    left = f"{shards} shard{'s' * (shards > 1)}"
                    note(f"Other runs on this store have what is left, {left}; waiting for it.")

    def read(self, size: int) -> None:
        """Count bytes read."""
        with self._lock:
            self._read += size

    def gone(self) -> None:
        """Count on one worker less."""
        with self._lock:
            self._workers -= 1

    def summary(self, units: int, unit: str) -> Summary:
        """Return what was done until now."""
        seconds = time.monotonic() - self._started
        left = self._total - self._rows_there
        return Summary(self._encoded, left, seconds, self._read, self._written, units, unit)

    def _shift(self, rows: int) -> None:
        """Count rows as there without a change of the rate."""
        if not self._bar.disable:
            self._bar.initial += rows
            self._bar.n += rows

    def _is_new(self, array: str, shard: int, rows: int) -> bool:
        if (array, shard) in self._there:
            return False
        self._there.add((array, shard))
        self._rows_there += rows
        return True


def bytes_read() -> int:
    """Return how many bytes this process and its ended children have read from files and pipes; 0 if not told."""
    try:
        return int(Path("/proc/self/io").read_text().split()[1])  # proc(5): rchar
    except OSError:
        return 0


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Message = tuple[str, tuple[Any, ...]]
"""The name of a method of `Tally`, and its arguments."""


class Messenger:
    """A `worker.Report` that sends each call on as a message."""

    def __init__(self, send: Callable[[Message], object]):
        self._send = send

    def found(self, array: str, shard: int, rows: int) -> None:
        """Send on; see `Report`."""
        self._send(("found", (array, shard, rows)))

    def encoded(self, rows: int) -> None:
        """Send on; see `Report`."""
        self._send(("encoded", (rows,)))

    def committed(self, array: str, shard: int, rows: int, written: int) -> None:
        """Send on; see `Report`."""
        self._send(("committed", (array, shard, rows, written)))

    def read(self, size: int) -> None:
        """Send on; see `Report`."""
        self._send(("read", (size,)))

    def waiting(self, shards: int) -> None:
        """Send on; see `Report`."""
        self._send(("waiting", (shards,)))


def deliver(message: Message, tally: Tally, worker: int) -> None:
    """Call the tally as a worker would have called it."""
    name, arguments = message
    if name == "waiting":
        tally.waiting(arguments[0], worker)
    else:
        getattr(tally, name)(*arguments)
