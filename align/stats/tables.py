"""Tables in Markdown and for a terminal, and the numbers in them."""

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from tabulate import tabulate

from sail_align.extract.errors import printable

Sign = Literal["-", "+"]
"""`-` marks negative numbers only, `+` positive numbers too."""


def one_line(text: str) -> str:
    """Return a text in one line that no terminal, page or file takes for more than text: see `printable`."""
    shown = printable(re.sub("[\t\n\r\u061c\u2028\u2029]", " ", text))
    return shown.encode(errors="backslashreplace").decode()


def number(value: float, *, beside: float | None = None, sign: Sign = "-") -> str:
    """Format a percentage or a rank with one digit, or with two if it is small, so that chance does not read as 0.

    A number `beside` another one, such as the bound of an interval, gets as many digits as that one.
    """
    digits = 2 if 0 < abs(value if beside is None else beside) < 0.995 else 1
    return f"{value:{sign}z.{digits}f}".replace("-", "−")


def format_interval(bounds: Sequence[float] | None, value: float | None = None, *, sign: Sign = "-") -> str:
    """Format an interval with as many digits as its value. None gives a dash."""
    return " – ".join(number(bound, beside=value, sign=sign) for bound in bounds) if bounds else "–"


def mean_std(values: Sequence[float]) -> str:
    """Format the mean ± standard deviation of several runs; of one run, the value alone."""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def format_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    align: str = "l",
    *,
    style: Literal["pipe", "simple"] = "pipe",
) -> str:
    """Return rows under a header, with padded columns.

    Args:
        header: Headings. They may have several lines.
        rows: Cells. They are shown in `one_line`.
        align: `l` or `r` for each column. Columns beyond its end are aligned to the right.
        style: `pipe` for Markdown, `simple` for a terminal.
    """
    header = ["\n".join(map(one_line, heading.split("\n"))) for heading in header]
    rows = [[one_line(cell) for cell in row] for row in rows]
    sides = {"l": "left", "r": "right"}
    colalign = [sides[side] for side in align.ljust(len(header), "r")]
    return tabulate(rows, header, style, disable_numparse=True, colalign=colalign if rows else None)
