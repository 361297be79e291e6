"""Progress on a terminal as a bar, in a log as an occasional line."""

import io
import sys
from typing import NoReturn

from tqdm import tqdm

LOG_SECONDS = 30.0


def progress(
    total: int | None,
    what: str,
    *,
    unit: str = "row",
    done: int = 0,
    quiet: bool = False,
    delay: float = 0,
) -> "tqdm[NoReturn]":
    """Return a bar over `total` units (None: not known) of which `done` were there before.

    `unit` is the name of one: slow work is told as in 158.43s/step. The bar shows the rate and the time left, and
    nothing at all for work that is over within `delay` seconds.
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


def note(sentence: str) -> None:
    """Say a sentence on stderr, above a bar if there is one."""
    tqdm.write(sentence, file=sys.stderr)


class _Lines(io.StringIO):
    """Turns the bar's rewriting of one terminal line into lines of a log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)
