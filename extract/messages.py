"""What a worker reports, as messages to a tally in another process."""

from collections.abc import Callable
from typing import Any

from sail_align.extract.costs import Tally

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
