"""Progress as a bar on a terminal, and as an occasional line in a log."""

import io
import sys
from typing import NoReturn

from tqdm import tqdm

from sail_align.extract.errors import printable

LOG_SECONDS = 30.0


def progress(
    total: int | None, what: str, *, unit: str = "row", done: int = 0, quiet: bool = False, delay: float = 0
) -> "tqdm[NoReturn]":
    """Return a progress bar with rate and remaining time.

    Args:
        total: Number of units, None if unknown.
        what: Name of the work.
        unit: Name of one unit. Slow work is shown as in 158.43s/step.
        done: Units done before.
        quiet: Show nothing.
        delay: Show nothing for work that takes fewer seconds.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        disable=quiet,
        delay=delay,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else LOG_SECONDS,
        maxinterval=LOG_SECONDS,
        file=sys.stderr if terminal else _Lines(),
    )


def note(message: str) -> None:
    """Print a message to stderr, above a progress bar if there is one."""
    tqdm.write(printable(message), file=sys.stderr)


class _Lines(io.StringIO):
    """A stream that turns rewrites of one terminal line into lines of a log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)
