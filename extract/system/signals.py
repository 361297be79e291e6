"""Clean ends of a run on SIGTERM and Ctrl-C, within seconds."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from sail_align.extract.system.progress import note

HURRY_SECONDS = 1.0
"""A second signal within this time is ignored: a launcher and a terminal may both send one. A later one kills."""
AGAIN_SECONDS = 0.02
"""Time after which a signal is delivered again whose error a finaliser swallowed."""
RERUN = "Rerun the same command to continue."
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(SystemExit):
    """A signal asked the process to end. Unless handled, the exit code is the one that a shell reports for that signal.

    Attributes:
        number: The signal's number.
        name: The signal, as in "SIGTERM" or "Ctrl-C".
        left: Unfinished work in words, set by whoever can count it.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number
        self.left = ""
        self.name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def report_stop(
    how_to_resume: Callable[[], str | None] = lambda: None, signals: Sequence[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """Raise `StoppedError` in the main thread on the first of these signals, after a note on how to resume, if any."""

    def stop(number: int) -> None:
        raise StoppedError(number)

    try:
        with _on_first(signals, stop):
            yield
    except StoppedError as stopped:
        if how := how_to_resume():
            note(f"Stopped by {stopped.name}{stopped.left}. {how}")
        raise


@contextmanager
def defer_signals() -> Iterator[Callable[[], StoppedError | None]]:
    """Yield a function that returns the error of the first signal received, None before.

    The caller can finish its unit of work and then raise the error.
    """
    received: list[StoppedError] = []
    with _on_first(STOP_SIGNALS, lambda number: received.append(StoppedError(number))):
        yield lambda: received[0] if received else None


@contextmanager
def _on_first(signals: Sequence[signal.Signals], react: Callable[[int], None]) -> Iterator[None]:
    first: list[float] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            react(number)
        elif time.monotonic() - first[0] > HURRY_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def deliver_again(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(error := unraisable.exc_value, StoppedError):  # Python ignores errors of finalisers
            first.clear()
            threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), error.number)).start()
        else:
            hook(unraisable)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {each: signal.signal(each, handle) for each in signals}
    hook, sys.unraisablehook = sys.unraisablehook, deliver_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for each, handler in before.items():
            signal.signal(each, handler)
