"""The report of runs: one self-contained page from what their folders hold."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sail_align.align.runs.folder import run_of, scores_folder
from sail_align.align.stats.charts import Points, line_chart
from sail_align.align.stats.tables import interval, number
from sail_align.evaluate.report.charts import marker, radar_chart, score_bar
from sail_align.evaluate.report.formats import HOW_TO_READ, REPORTED, comma_separated, latex, markdown
from sail_align.evaluate.report.overview import Overview
from sail_align.evaluate.results.scores import Record, RunScores
from sail_align.evaluate.tasks.task import all_tasks
from sail_align.extract.system.files import write_atomically

ROWS = 12
"""A curve as a table has at most so many rows."""


@dataclass(frozen=True)
class Curves:
    """Lines over the steps of a run, as a chart and as a table: step and values, "" where a line has none."""

    title: str
    lines: Mapping[str, Points]
    chart: Markup
    table: Sequence[Sequence[str]]


def training_curves(run: Path) -> list[Curves]:
    """Return the loss and the held-out recall, those that have two points or more."""
    path = run / "metrics.jsonl"
    lines_and_rest = path.read_text().split("\n") if path.is_file() else [""]
    entries = [json.loads(line) for line in lines_and_rest[:-1]]  # a killed run may leave part of a line

    def points(kind: str, field: str) -> Points:
        return [(entry["step"], entry[field]) for entry in entries if entry["kind"] == kind and field in entry]

    wanted = (
        ("Loss", "loss", {"training": points("train", "loss"), "held out": points("heldout", "loss")}),
        (
            "Held-out R@1",
            "R@1 (%)",
            {"text→image": points("heldout", "t2i_r1"), "image→text": points("heldout", "i2t_r1")},
        ),
    )
    curves = []
    for title, label, lines in wanted:
        drawn = {name: line for name, line in lines.items() if len(line) > 1}
        if drawn:
            chart = line_chart(drawn, "step", label, allow_log=label == "loss", inline=True)
            curves.append(Curves(title, drawn, Markup(chart), _as_table(list(drawn.values()))))
    return curves


def summary(scores: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what the run is, as (term, value, detail)."""
    facts = [
        (
            f"{modality} encoder",
            encoder["id"],
            f"{encoder['pooling']} pooling, {encoder['dim']:,} dimensions, {encoder['fingerprint'][:12]}",
        )
        for modality, encoder in scores["encoders"].items()
    ]
    checkpoint = ("checkpoint", scores["run"]["digest"][:12], scores["run"].get("unfinished", ""))
    if imported := settings.get("imported"):
        origin = ("imported from", imported["file"], f"SHA-256 {imported['sha256'][:12]}")
        return [*facts, ("heads", f"{settings['head']}, {settings['dim']:,} dimensions", ""), origin, checkpoint]
    if model := settings.get("model"):
        return [*facts, ("model", model, "embeds pictures and texts by itself"), checkpoint]
    if settings["head"] == "cca":
        made = f"computed in closed form, ridge {settings['ridge']:g}"
    else:
        made = (
            f"{settings['loss']} loss, {settings['optimizer']} at {settings['lr']:g}, "
            f"{settings['steps']:,} steps of {settings['batch_size']:,}, {settings['start']} start"
        )
    digests = settings["store_digests"]
    stores = zip(settings.get("stores", ["store"] * len(digests)), digests, strict=True)  # an export leaves out paths
    return [
        *facts,
        ("heads", f"{settings['head']}, {settings['dim']:,} dimensions", made),
        (
            "trained on",
            f"{settings['training_rows']:,} pairs, {settings['held_out_rows']:,} held out",
            f"captions {', '.join(settings['captions'])}; "
            + "; ".join(f"{path} {digest[:12]}" for path, digest in stores),
        ),
        checkpoint,
    ]


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as dotted names and values in words."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            rows.append((prefix + name, ", ".join(map(str, value)) or "–"))
        else:
            rows.append((prefix + name, "–" if value is None else str(value)))
    return rows


def _as_table(lines: Sequence[Points]) -> list[list[str]]:
    """Return step and values of some steps, of those that most of the lines have."""
    fewest = min(lines, key=len)
    chosen = np.linspace(0, len(fewest) - 1, min(ROWS, len(fewest))).astype(int)
    values = [dict(line) for line in lines]
    steps = [fewest[place][0] for place in chosen]
    return [
        [f"{step:,g}", *(f"{each[step]:.4g}" if step in each else "–" for each in values)]
        for step in dict.fromkeys(steps)
    ]


Compared = tuple[dict[str, Any], list[dict[str, Any] | None]]
"""A metric, and that of every run."""


@dataclass(frozen=True)
class Bars:
    """One headline metric: every model's score as name, text and bar."""

    label: str
    chance: str
    models: Sequence[tuple[str, str, Markup]]


@dataclass(frozen=True)
class Card:
    """The headline metrics of one protocol on one data set: a record of it, and its note's mark."""

    record: Record
    mark: str
    measures: Sequence[Bars]


def write_report(run: Path) -> Path:
    """Write the report of a run into its folder. Return its path.

    Raises:
        UserError: The run has no scores.
    """
    path = scores_folder(run) / "report.html"
    write_atomically(path, page(Overview(RunScores.read_all([run]))).encode())
    return path


def page(overview: Overview) -> str:
    """Return the HTML page of one run, or of several side by side."""
    pages = Environment(
        loader=PackageLoader("sail_align.evaluate.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(number=number, interval=interval, short=lambda digest: digest[:12])
    runs = overview.runs
    about: list[dict[str, Any]] = [
        {
            "name": run.name,
            "style": overview.style(place),
            "summary": summary(run.content, run.settings),
            "settings": flat(run.settings),
            "curves": training_curves(run_of(run.path)),
            "records": run.scored,
        }
        for place, run in enumerate(runs)
    ]
    return pages.get_template("report.html.j2").render(
        title=" and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs",
        runs=about,
        terms=list(dict.fromkeys(term for run in about for term, _, _ in run["summary"])),
        shown=overview,
        radars=list(filter(None, map(radar_chart, overview.panels))),
        marker=marker,
        cards=_cards(overview),
        scores=_scores(overview),
        tasks=all_tasks(),
        sections=_sections(overview),
        reported=REPORTED,
        how_to_read=HOW_TO_READ,
        score_bar=score_bar,
    )


FORMATS: dict[str, Callable[[Overview], str]] = {
    ".html": page,
    ".md": markdown,
    ".tex": latex,
    ".csv": comma_separated,
}
"""Writers of several runs, by the ending of the file."""


def _cards(overview: Overview) -> list[Card]:
    """Return a card for each protocol and set."""
    cards = []
    for panel in overview.panels:
        texts = [row.texts for row in panel.rows]
        for group in panel.groups:
            bars = []
            for place, column in group:
                chance = column.metric["chance"]
                drawn = [
                    (row.name, text[place], score_bar(value, chance, bounds, row.style))
                    for row, text in zip(panel.rows, texts, strict=True)
                    for value, bounds in (row.cells[place],)
                    if row.kind != "chance" and value is not None
                ]
                bars.append(Bars(column.label, number(chance), drawn))
            cards.append(Card(column.record, column.mark, bars))
    return cards


def _scores(overview: Overview) -> list[tuple[str, Record, list[Compared]]]:
    """Return for each protocol and set its mark, a record, and of each of its metrics that of every run."""
    found = []
    for key, records in overview.records.items():
        record = overview.any_record(key)
        metrics = [
            (metric, [own.metric(metric["name"]) if own else None for own in records]) for metric in record["metrics"]
        ]
        found.append((overview.marks[key], record, metrics))
    return found


def _sections(overview: Overview) -> list[dict[str, Any]]:
    """Return for each task the examples and details of each set of each run."""
    sections = []
    for task in all_tasks().values():
        parts = [
            {
                "run": run.name,
                "style": overview.style(place),
                "record": record,
                "mark": overview.marks[key],
                "groups": _groups(run, record),
                "kinds": record["details"].get("by_tag") or record["details"].get("by_category") or {},
            }
            for key, records in overview.records.items()
            for place, (run, record) in enumerate(zip(overview.runs, records, strict=True))
            if record and record["task"] == task.kind
        ]
        if parts := [part for part in parts if part["groups"] or part["kinds"]]:
            sections.append({"task": task, "parts": parts})
    return sections


def _groups(run: RunScores, record: Record) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the examples of a record under headings, without empty groups."""
    headings = {True: "Right", False: "Wrong", None: ""}
    examples = run.examples(record)
    groups = [(heading, [each for each in examples if each["right"] is right]) for right, heading in headings.items()]
    return [(heading, found) for heading, found in groups if found]
