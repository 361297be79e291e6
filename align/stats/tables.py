"""Tables in Markdown that also read well on a terminal, and the numbers in them."""

from collections.abc import Sequence
from typing import Literal

Sign = Literal["-", "+"]
"""What a number stands with: a minus where it is below 0, or a plus too where it is above."""


def number(value: float, *, beside: float | None = None, sign: Sign = "-") -> str:
    """Return a percentage or a rank with one digit; small ones keep two, so that chance does not read as none.

    What stands `beside` another number, as an interval does, gets as many digits as that one.
    """
    digits = 2 if 0 < abs(value if beside is None else beside) < 0.995 else 1
    return f"{value:{sign}z.{digits}f}".replace("-", "−")


def interval(bounds: Sequence[float] | None, value: float | None = None, *, sign: Sign = "-") -> str:
    """Return an interval, with the digits of its value; a dash where there is none."""
    return " – ".join(number(bound, beside=value, sign=sign) for bound in bounds) if bounds else "–"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """Return rows under a header, columns padded to one width; the first `words` columns to the left, others right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if column < words else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
