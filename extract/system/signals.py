"""SIGTERM and Ctrl-C end a run within seconds, cleanly."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HURRY_SECONDS = 1.0


class StoppedError(SystemExit):
    """A signal asked the process to end; what is not handled leaves the exit code that a shell gives that signal.

    `left` says, in words, what is left undone.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.left = ""
        self.name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def stopping_on(*signals: signal.Signals) -> Iterator[None]:
    """Raise `StoppedError` in the main thread on the first of these signals.

    One that follows within a second is the same wish told twice, as a launcher and a terminal do; a later one kills.
    """

    def stop(number: int) -> None:
        raise StoppedError(number)

    with _on_first(signals, stop):
        yield


@contextmanager
def noticing(*signals: signal.Signals) -> Iterator[Callable[[], StoppedError | None]]:
    """Yield a function that returns the error of the first of these signals once it came, for the caller to raise.

    So work that is better finished is; a signal that comes more than a second after the first kills all the same.
    """
    noticed: list[StoppedError] = []
    with _on_first(signals, lambda number: noticed.append(StoppedError(number))):
        yield lambda: noticed[0] if noticed else None


@contextmanager
def _on_first(signals: tuple[signal.Signals, ...], react: Callable[[int], None]) -> Iterator[None]:
    first: list[float] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            react(number)
        elif time.monotonic() - first[0] > HURRY_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {each: signal.signal(each, handle) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
