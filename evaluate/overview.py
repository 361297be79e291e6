"""Runs and the paper's models side by side: a row a model, a column a measure.

A column has scores of one protocol on the same data and never others. What a paper reports stands in it only if
protocol and metric are the same, and the data are those of the published set as far as their counts say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Literal

from sail_align.evaluate.reported import reported
from sail_align.evaluate.scores import Record, read_scores, unexpected

HEADLINES = {
    "classification": ("top1",),
    "retrieval": ("i2t_r1", "t2i_r1"),
    "representation": ("knn_aligned", "cka_aligned"),
    "winoground": ("text", "image", "group"),
    "mmvp": ("pairs",),
    "segmentation": ("miou",),
}
"""The metrics of a task that papers put into their tables."""
WIDTH = 8
"""A table that would have more columns is continued in another."""

Key = tuple[str, str]
"""What scores must share to be put in one column: protocol id and data digest."""


@dataclass(frozen=True)
class ScoredRun:
    """A run with what its `scores.json` holds; `name` is no other run's."""

    path: Path
    name: str
    scores: dict[str, Any]

    @property
    def records(self) -> list[Record]:
        """The records of sets that were scored."""
        return [record for record in self.scores["records"] if "error" not in record]

    @property
    def errors(self) -> list[Record]:
        """The records of sets that could not be scored."""
        return [record for record in self.scores["records"] if "error" in record]


@dataclass(frozen=True)
class Column:
    """One metric of one protocol on one data set; `mark` is that of the note that says which."""

    mark: str
    dataset: str
    label: str
    key: Key
    metric: str


@dataclass(frozen=True)
class Row:
    """One model's scores by column, each with its 95 % interval: both None where there is none.

    `source` says where a reported model's are from.
    """

    name: str
    kind: Literal["run", "reported", "chance"]
    cells: Sequence[tuple[float | None, Sequence[float] | None]]
    source: str = ""


@dataclass(frozen=True)
class Panel:
    """A table of some columns."""

    columns: Sequence[Column]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Overview:
    """Tables, what their columns' marks mean, and sentences on what is missing or unlike what was expected."""

    panels: Sequence[Panel]
    notes: Sequence[tuple[str, str]]
    faults: Sequence[str]

    @property
    def with_reported(self) -> bool:
        """Whether a paper's model is among the rows."""
        return any(row.kind == "reported" for panel in self.panels for row in panel.rows)


def read_runs(paths: Sequence[Path]) -> list[ScoredRun]:
    """Read the scores of runs, each once; those whose folders have the same name are told apart by their paths.

    Raises:
        UserError: A run has no scores.
    """
    paths = list({path.resolve(): path for path in paths}.values())
    names = [path.resolve().name for path in paths]
    return [
        ScoredRun(path, name if names.count(name) == 1 else str(path), read_scores(path))
        for path, name in zip(paths, names, strict=True)
    ]


def key_of(record: Record) -> Key:
    """Return what another record must have too to be put in one column with this one."""
    return record["protocol"], record["data"]["digest"]


def overview(runs: Sequence[ScoredRun]) -> Overview:
    """Return the headline metrics of all runs, beside what papers report of the same protocols."""
    records: dict[Key, Record] = {}
    for run in runs:
        for record in run.records:
            records.setdefault(key_of(record), record)
    marks = dict(zip(records, _marks(), strict=False))
    groups = [
        [
            Column(marks[key], record["dataset"], metric["label"], key, metric["name"])
            for name in HEADLINES[record["task"]]
            for metric in record["metrics"]
            if metric["name"] == name
        ]
        for key, record in records.items()
    ]
    notes = [
        (marks[key], f"{record['protocol']}, n = {record['items']:,}, data {record['data']['digest'][:12]}")
        for key, record in records.items()
    ]
    faults = dict.fromkeys(filter(None, map(unexpected, records.values())))
    faults |= dict.fromkeys(
        f"{error['dataset']} ({error['task']}) was not scored with {run.name}: {error['error']}"
        for run in runs
        for error in run.errors
    )
    return Overview([_panel(columns, runs, records) for columns in _filled(groups)], notes, list(faults))


def _marks() -> Iterator[str]:
    """Yield a … z, aa … zz."""
    yield from ascii_lowercase
    yield from (first + second for first in ascii_lowercase for second in ascii_lowercase)


def _filled(groups: Sequence[list[Column]]) -> list[list[Column]]:
    """Put the columns of whole groups together, up to `WIDTH` of them."""
    filled: list[list[Column]] = []
    for group in groups:
        if filled and len(filled[-1]) + len(group) <= WIDTH:
            filled[-1] += group
        else:
            filled.append(list(group))
    return filled


def _panel(columns: Sequence[Column], runs: Sequence[ScoredRun], records: dict[Key, Record]) -> Panel:
    rows = []
    for run in runs:
        own = {key_of(record): record for record in run.records}
        unfinished = run.scores["run"].get("unfinished")
        name = f"{run.name} ({unfinished})" if unfinished else run.name
        rows.append(Row(name, "run", [_cell(own.get(column.key), column) for column in columns]))
    for model in reported():
        values = [
            None if unexpected(records[column.key]) else model.scores.get((column.key[0], column.metric))
            for column in columns
        ]
        rows.append(Row(model.name, "reported", [(value, None) for value in values], model.source))
    chances = [(_metric(records[column.key], column)["chance"], None) for column in columns]
    rows.append(Row("chance", "chance", chances))
    return Panel(columns, [row for row in rows if row.kind != "reported" or any(value for value, _ in row.cells)])


def _cell(record: Record | None, column: Column) -> tuple[float | None, Sequence[float] | None]:
    if record is None:
        return None, None
    metric = _metric(record, column)
    return metric["value"], metric.get("interval")


def _metric(record: Record, column: Column) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in record["metrics"] if each["name"] == column.metric)
    return found
