"""Scores of runs and of papers side by side: one row per model, one column per metric.

A column has scores by one protocol on the same data. A paper's score is in it only if protocol and metric are the same,
and the counts of the set are those of the published one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product
from string import ascii_lowercase
from typing import Any, Literal

from sail_align.align.stats.tables import number
from sail_align.evaluate.results.reported import Reported
from sail_align.evaluate.results.scores import Key, Record, RunScores
from sail_align.evaluate.tasks.task import find_task, without_unknown

WIDTH = 8
"""Maximum number of columns in a table. Further ones go into another table."""
COLOURS = 6
"""Number of runs with colours of their own."""
MARKS = [*ascii_lowercase, *map("".join, product(ascii_lowercase, repeat=2))]

Interval = Sequence[float] | None


@dataclass(frozen=True)
class Column:
    """One metric of one protocol on one data set, with the mark of the note that names them."""

    mark: str
    record: Record
    metric: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The scores of one model by column, each with its 95 % interval. Both are None if there is none.

    `style` is the CSS class of its colour, `source` the paper of a reported model.
    """

    name: str
    kind: Literal["run", "reported", "chance"]
    style: str
    cells: Sequence[tuple[float | None, Interval]]
    source: str = ""

    @property
    def texts(self) -> list[str]:
        """The cells as text. Reported scores have the digits that were published."""

        def text(value: float | None, bounds: Interval) -> str:
            if value is None:
                return "–"
            if self.kind == "reported":
                return f"{value:.1f}" if round(value, 1) == value else f"{value:g}"
            half = f" ± {number((bounds[1] - bounds[0]) / 2, beside=value)}" if bounds else ""
            return number(value) + half

        return [text(*cell) for cell in self.cells]


@dataclass(frozen=True)
class Panel:
    """A table of some columns."""

    columns: Sequence[Column]
    rows: Sequence[Row]

    @property
    def groups(self) -> list[list[tuple[int, Column]]]:
        """The columns with their places, grouped by protocol and set."""
        return [list(group) for _, group in groupby(enumerate(self.columns), key=lambda each: each[1].mark)]


class Overview:
    """The headline metrics of runs, beside what papers report by the same protocols.

    Attributes:
        runs: The scores of the runs.
        records: For each protocol and set the record of each run, None where a run has none.
        marks: The mark of each protocol and set.
        panels: The tables.
        notes: Marks and what they stand for.
        faults: Messages on sets that are incomplete or could not be scored.
    """

    def __init__(self, runs: Sequence[RunScores]):
        self.runs = runs = [without_unknown(run) for run in runs]
        own = [{record.key: record for record in run.scored} for run in runs]
        self.records = {
            key: [records.get(key) for records in own] for key in dict.fromkeys(k for each in own for k in each)
        }
        self.marks: dict[Key, str] = dict(zip(self.records, MARKS, strict=False))
        marked = [(mark, self.any_record(key)) for key, mark in self.marks.items()]
        columns: list[list[Column]] = []
        for mark, record in marked:
            metrics = (record.metric(name) for name in find_task(record["task"]).headlines)
            group = [Column(mark, record, metric) for metric in metrics if metric]
            if columns and len(columns[-1]) + len(group) <= WIDTH:
                columns[-1] += group
            else:
                columns.append(group)
        self.panels = [Panel(group, self._rows(group)) for group in columns]
        self.notes = [
            (mark, f"{record['protocol']}, {record.size}, data {record.key[1][:12]}") for mark, record in marked
        ]
        errors = [
            f"{record.name} was not scored with {run.name}: {record.error}"
            for run in runs
            for record in run.records
            if record.error
        ]
        mismatches = [record.mismatch for _, record in marked if record.mismatch]
        self.faults = list(dict.fromkeys([*mismatches, *errors]))

    @property
    def with_reported(self) -> bool:
        """Whether a model of a paper is among the rows."""
        return any(row.kind == "reported" for panel in self.panels for row in panel.rows)

    def any_record(self, key: Key) -> Record:
        """Return the record of the first run that has scores by a protocol on a set."""
        return next(record for record in self.records[key] if record)

    @staticmethod
    def style(place: int) -> str:
        """Return the CSS class of the colour of the run at a place."""
        return f"line-{place % COLOURS + 1}"

    def _rows(self, columns: Sequence[Column]) -> list[Row]:
        rows = []
        for place, run in enumerate(self.runs):
            cells: list[tuple[float | None, Interval]] = []
            for column in columns:
                record = self.records[column.record.key][place]
                metric = record.metric(column.metric["name"]) if record else None
                cells.append((metric["value"], metric.get("interval")) if metric else (None, None))
            rows.append(Row(run.label, "run", self.style(place), cells))
        for model in Reported.read_all():
            scores = [(model.score(column.record, column.metric["name"]), None) for column in columns]
            rows.append(Row(model.name, "reported", "reported", scores, model.source))
        chance = Row("chance", "chance", "chance", [(column.metric["chance"], None) for column in columns])
        return [*(row for row in rows if any(value is not None for value, _ in row.cells)), chance]
