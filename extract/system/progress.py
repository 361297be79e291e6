"""Progress as a bar on a terminal and in a notebook, and as an occasional line in a log."""

import io
import sys
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import TqdmWarning, tqdm

from sail_align.extract.errors import printable

if TYPE_CHECKING:
    Bar = tqdm[NoReturn]

LOG_SECONDS = 30.0


def progress(
    total: int | None, what: str, *, unit: str = "row", done: int = 0, quiet: bool = False, delay: float = 0
) -> "Bar":
    """Return a progress bar with rate and remaining time.

    Args:
        total: Number of units, None if unknown.
        what: Name of the work.
        unit: Name of one unit. Slow work is shown as in 158.43s/step.
        done: Units done before.
        quiet: Show nothing.
        delay: Show nothing for work that takes fewer seconds.
    """
    terminal, notebook = sys.stderr.isatty(), in_notebook()
    is_live = terminal or notebook
    options: dict[str, Any] = {
        "total": total,
        "initial": done,
        "desc": what,
        "unit": unit,
        "disable": quiet,
        "delay": delay,
        "dynamic_ncols": terminal,
        "mininterval": 0.2 if is_live else LOG_SECONDS,
        "maxinterval": LOG_SECONDS,
        "file": sys.stderr if is_live else _Lines(),
    }
    return _notebook_bar(options) if notebook else tqdm(**options)


def note(message: str) -> None:
    """Print a message to stderr, above a progress bar if there is one. A notebook shows it as ordinary output."""
    tqdm.write(printable(message), file=sys.stdout if in_notebook() else sys.stderr)


def in_notebook() -> bool:
    """Return whether this is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


def _notebook_bar(options: dict[str, Any]) -> "Bar":
    """Return a bar of `tqdm.auto`: a widget where ipywidgets is installed, text elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # text is fine
        from tqdm.auto import tqdm as bar

    return bar(**options)


class _Lines(io.StringIO):
    """A stream that turns rewrites of one terminal line into lines of a log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)
