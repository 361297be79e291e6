"""The report of runs: one self-contained page from what their folders hold."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sail_align.align.runs.folder import run_of, scores_folder
from sail_align.align.stats.charts import Points, line_chart
from sail_align.align.stats.tables import interval, number
from sail_align.evaluate.report.charts import marker, radar_chart, score_bar
from sail_align.evaluate.report.formats import HOW_TO_READ, REPORTED, cells, comma_separated, latex, markdown
from sail_align.evaluate.report.overview import (
    Key,
    Overview,
    ScoredRun,
    metric_of,
    overview,
    read_runs,
    records_by_key,
    style_of,
)
from sail_align.evaluate.results.scores import Record, examples_path, settings_of, unexpected
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


TASKS = {
    "classification": (
        "Zero-shot classification",
        "Below each picture the three classes whose prompts are closest to it, with their cosine.",
    ),
    "retrieval": (
        "Retrieval, text to image",
        "The five images closest to a caption, best first, with their cosine; the caption's own image is framed.",
    ),
    "representation": (
        "Images and captions as spaces",
        "How much of an image's neighbourhood its caption has too, before and behind the heads.",
    ),
    "winoground": (
        "Pairs of images and captions",
        "Text is right if each image prefers its own caption, image if each caption prefers its own image. A model "
        "that knows the words but not their order prefers one caption for both images, and so falls below chance.",
    ),
    "mmvp": (
        "Pairs of images that look alike to CLIP",
        "A pair is right if each of its two statements has the higher cosine with its own image.",
    ),
    "segmentation": (
        "Zero-shot segmentation",
        "Each pixel takes the class whose prompts are closest to its patch; pixels without a true class do not count.",
    ),
}
"""Title of a task's section, and how to read its examples."""

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
    """Write the report of a run that has been scored into it; return its path.

    Raises:
        UserError: The run has no scores.
    """
    path = scores_folder(run) / "report.html"
    write_atomically(path, page(read_runs([run])).encode())
    return path


def side_by_side(runs: Sequence[ScoredRun], suffix: str) -> str:
    """Return runs in the format of a file's ending.

    Raises:
        ValueError: There is no such format.
    """
    match suffix:
        case ".html":
            return page(runs)
        case ".md":
            return markdown(overview(runs))
        case ".tex":
            return latex(overview(runs))
        case ".csv":
            return comma_separated(runs)
    raise ValueError(f"no report has the ending {suffix!r}")


def page(runs: Sequence[ScoredRun]) -> str:
    """Return the page of one run, or of several side by side."""
    pages = Environment(
        loader=PackageLoader("sail_align.evaluate.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(number=number, interval=interval, unexpected=unexpected, short=lambda digest: digest[:12])
    shown = overview(runs)
    settings = [settings_of(run.path) for run in runs]
    about: list[dict[str, Any]] = [
        {
            "name": run.name,
            "style": style_of(place),
            "summary": summary(run.scores, own),
            "settings": flat(own),
            "curves": training_curves(run_of(run.path)),
            "records": run.records,
        }
        for place, (run, own) in enumerate(zip(runs, settings, strict=True))
    ]
    return pages.get_template("report.html.j2").render(
        title=" and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs",
        runs=about,
        terms=list(dict.fromkeys(term for run in about for term, _, _ in run["summary"])),
        shown=shown,
        cells=cells,
        radars=list(filter(None, map(radar_chart, shown.panels))),
        marker=marker,
        cards=_cards(shown),
        scores=_scores(runs, shown.marks),
        tasks=TASKS,
        sections=_sections(runs, shown.marks),
        reported=REPORTED,
        how_to_read=HOW_TO_READ,
        score_bar=score_bar,
    )


def _cards(shown: Overview) -> list[Card]:
    """Return a card for each protocol and set; a table never splits one."""
    cards = []
    for panel in shown.panels:
        texts = [cells(row) for row in panel.rows]
        for mark, group in groupby(enumerate(panel.columns), key=lambda each: each[1].mark):
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
            cards.append(Card(column.record, mark, bars))
    return cards


def _scores(runs: Sequence[ScoredRun], marks: Mapping[Key, str]) -> list[tuple[str, Record, list[Compared]]]:
    """Return for each protocol and set its mark, a record, and of each of its metrics that of every run."""
    found = []
    for key, records in records_by_key(runs).items():
        record = next(filter(None, records))
        metrics = [(metric, [metric_of(own, metric["name"]) for own in records]) for metric in record["metrics"]]
        found.append((marks[key], record, metrics))
    return found


def _sections(runs: Sequence[ScoredRun], marks: Mapping[Key, str]) -> list[dict[str, Any]]:
    """Return for each task what there is to look at: of each set of each run, examples and details."""
    sections = []
    for task, (title, how_to_read) in TASKS.items():
        parts = [
            {
                "run": run.name,
                "style": style_of(place),
                "record": record,
                "mark": marks[key],
                "groups": _groups(run.path, record),
                "kinds": record["details"].get("by_tag") or record["details"].get("by_category") or {},
            }
            for key, records in records_by_key(runs).items()
            for place, (run, record) in enumerate(zip(runs, records, strict=True))
            if record and record["task"] == task
        ]
        if parts := [part for part in parts if part["groups"] or part["kinds"]]:
            sections.append({"task": task, "title": title, "how_to_read": how_to_read, "parts": parts})
    return sections


def _groups(run: Path, record: Record) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return a record's examples under headings: what was right, what was wrong, and what is neither."""
    path = examples_path(run, record)
    examples: list[dict[str, Any]] = json.loads(path.read_bytes()) if path.is_file() else []
    headings = {True: "Right", False: "Wrong", None: ""}
    grouped = [
        (heading, [example for example in examples if example["right"] is right]) for right, heading in headings.items()
    ]
    return [(heading, found) for heading, found in grouped if found]
