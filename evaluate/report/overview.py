"""Runs and the paper's models side by side: a row a model, a column a measure.

A column has scores of one protocol on the same data and never others. What a paper reports stands in it only if
protocol and metric are the same, and the set is the published one as far as its counts say.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Literal

from sail_align.align.runs.folder import name_of, scores_folder
from sail_align.evaluate.results.reported import reported
from sail_align.evaluate.results.scores import Record, named, read_scores, unexpected

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
COLOURS = 6
"""So many runs have colours of their own."""

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


@dataclass(frozen=True)
class Column:
    """One metric of one protocol on one data set, as a record has it; `mark` is that of the note that says which."""

    mark: str
    record: Record
    metric: dict[str, Any]

    @property
    def dataset(self) -> str:
        """The data set's name."""
        return str(self.record["dataset"])

    @property
    def label(self) -> str:
        """The metric's name for people."""
        return str(self.metric["label"])


@dataclass(frozen=True)
class Row:
    """One model's scores by column, each with its 95 % interval: both None where there is none.

    `style` is the CSS class of its colour; `source` says where a reported model's scores are from.
    """

    name: str
    kind: Literal["run", "reported", "chance"]
    style: str
    cells: Sequence[tuple[float | None, Sequence[float] | None]]
    source: str = ""


@dataclass(frozen=True)
class Panel:
    """A table of some columns."""

    columns: Sequence[Column]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Overview:
    """Tables, each protocol's mark and what it means, and sentences on what is missing or unlike what was expected."""

    panels: Sequence[Panel]
    marks: Mapping[Key, str]
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
    paths = list({scores_folder(path).resolve(): path for path in paths}.values())
    names = [name_of(path) for path in paths]
    return [
        ScoredRun(path, name if names.count(name) == 1 else str(path), read_scores(path))
        for path, name in zip(paths, names, strict=True)
    ]


def style_of(place: int) -> str:
    """Return the CSS class of a run's colour."""
    return f"line-{place % COLOURS + 1}"


def key_of(record: Record) -> Key:
    """Return what another record must have too to be put in one column with this one."""
    return record["protocol"], record["data"]["digest"]


def metric_of(record: Record | None, name: str) -> dict[str, Any] | None:
    """Return a metric of a record, None if it has none of that name or there is no record."""
    return next((metric for metric in record["metrics"] if metric["name"] == name), None) if record else None


def records_by_key(runs: Sequence[ScoredRun]) -> dict[Key, list[Record | None]]:
    """Return for each protocol and set the records of all runs in their order, None where a run has none."""
    keys = dict.fromkeys(key_of(record) for run in runs for record in run.records)
    own = [{key_of(record): record for record in run.records} for run in runs]
    return {key: [records.get(key) for records in own] for key in keys}


def overview(runs: Sequence[ScoredRun]) -> Overview:
    """Return the headline metrics of all runs, beside what papers report of the same protocols."""
    scored = records_by_key(runs)
    marks = dict(zip(scored, _marks(), strict=False))
    groups, notes, faults = [], [], []
    for mark, records in zip(marks.values(), scored.values(), strict=True):
        record = next(filter(None, records))
        metrics = filter(None, (metric_of(record, name) for name in HEADLINES[record["task"]]))
        groups.append([Column(mark, record, metric) for metric in metrics])
        data = record["data"]["digest"][:12]
        notes.append((mark, f"{record['protocol']}, n = {record['items']:,}, data {data}"))
        faults.append(unexpected(record))
    faults += [
        f"{error['dataset']} ({error['task']}) was not scored with {run.name}: {error['error']}"
        for run in runs
        for error in run.scores["records"]
        if "error" in error
    ]
    panels = [_panel(columns, runs, scored) for columns in _filled(groups)]
    return Overview(panels, marks, notes, list(dict.fromkeys(filter(None, faults))))


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


def _panel(columns: Sequence[Column], runs: Sequence[ScoredRun], scored: dict[Key, list[Record | None]]) -> Panel:
    rows = []
    for place, run in enumerate(runs):
        found = [metric_of(scored[key_of(column.record)][place], column.metric["name"]) for column in columns]
        cells = [(metric["value"], metric.get("interval")) if metric else (None, None) for metric in found]
        rows.append(Row(named(run.name, run.scores), "run", style_of(place), cells))
    for model in reported():
        cells = [(model.score(column.record, column.metric["name"]), None) for column in columns]
        rows.append(Row(model.name, "reported", "reported", cells, model.source))
    chance = Row("chance", "chance", "chance", [(column.metric["chance"], None) for column in columns])
    return Panel(columns, [*(row for row in rows if any(value is not None for value, _ in row.cells)), chance])
