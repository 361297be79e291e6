"""Scores as aligned columns of plain text."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sail_align.align.table import interval, number
from sail_align.evaluate.scores import Record, unexpected

if TYPE_CHECKING:
    from sail_align.evaluate.compare import Comparison

HEADER = ("data set", "task", "n", "metric", "score", "chance", "95% interval")
DIFFERENCE_HEADER = ("data set", "metric", "first", "second", "difference", "95% interval", "p")
TO_THE_LEFT = {"task", "metric"}


def score_table(records: Iterable[Record]) -> str:
    """Return the table: one line a metric, the set's name on its first; the sentence of a set that failed instead.

    A note below it names each set that is not of the size that its manifest expects.
    """
    records = list(records)
    rows: list[tuple[str, ...]] = []
    for record in records:
        if "error" in record:
            rows.append((record["dataset"], record["task"], "", f"ERROR: {record['error']}"))
            continue
        first = (record["dataset"], record["task"], str(record["items"]))
        for metric in record["metrics"]:
            score, chance = number(metric["value"]), number(metric["chance"])
            bounds = interval(metric.get("interval"), metric["value"])
            rows.append((*first, metric["label"], score, chance, bounds))
            first = ("", "", "")
    notes = dict.fromkeys(filter(None, map(unexpected, records)))  # a set of two tasks is named once
    return "\n".join([aligned(HEADER, rows), *(f"note: {said}" for said in notes)])


def difference_table(comparison: "Comparison") -> str:
    """Return a comparison: one line a metric, and a sentence for each set that cannot be compared."""
    rows: list[tuple[str, ...]] = []
    said = ""
    for each in comparison.differences:
        difference = each.second - each.first
        values = (number(each.first), number(each.second), number(difference, sign="+"))
        lower_is_better = " (less is better)" if each.unit == "rank" else ""
        name = each.dataset if each.protocol != said else ""
        bounds = interval(each.interval, difference, sign="+")
        rows.append((name, each.label + lower_is_better, *values, bounds, f"{each.p:.3f}"))
        said = each.protocol
    return "\n".join([aligned(DIFFERENCE_HEADER, rows), *comparison.refusals])


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a header, whose cells may have several lines.

    Columns of words go to the left, as does the first. A row shorter than the header is a sentence and does not widen
    its last column.
    """
    headings = [cell.split("\n") for cell in header]
    height = max(map(len, headings))
    above = list(zip(*([""] * (height - len(lines)) + lines for lines in headings), strict=True))
    full = [*above, *(row for row in rows if len(row) == len(header))]
    short = [row[:-1] for row in rows if len(row) < len(header)]
    widths = [max(len(row[column]) for row in [*full, *short] if column < len(row)) for column in range(len(header))]
    to_the_left = [column == 0 or name in TO_THE_LEFT for column, name in enumerate(header)]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, to_the_left, strict=False)
        )
        return "  ".join(cells).rstrip()

    return "\n".join([*map(line, above), "  ".join("─" * width for width in widths), *map(line, rows)])
