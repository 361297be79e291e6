"""Progress on a terminal as a bar, in a log as an occasional line."""

import io
import sys
from typing import NoReturn

from tqdm import tqdm

LOG_SECONDS = 30.0


def progress(total: int, what: str, *, unit: str = "samples", done: int = 0, quiet: bool = False) -> "tqdm[NoReturn]":
    """Return a bar over `total` units of which `done` were there before; it shows the rate and the time left."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=f" {unit}",
        disable=quiet,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else LOG_SECONDS,
        maxinterval=LOG_SECONDS,
        file=sys.stderr if terminal else _Lines(),
    )


class _Lines(io.StringIO):
    """Turns the bar's rewriting of one terminal line into lines of a log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)
