"""The report of runs: one self-contained HTML page."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sail_align.align.runs.folder import RunFolder
from sail_align.align.stats.charts import Points, line_chart
from sail_align.align.stats.tables import format_interval, number
from sail_align.evaluate.report.charts import MARKERS, radar_chart
from sail_align.evaluate.report.formats import HOW_TO_READ, REPORTED, comma_separated, latex, text
from sail_align.evaluate.report.overview import Overview
from sail_align.evaluate.results.scores import RunScores
from sail_align.evaluate.tasks.task import all_tasks
from sail_align.extract.system.files import write_atomically

CURVE_ROWS = 12
"""Maximum number of rows of a curve as a table."""


def write_report(run: Path) -> Path:
    """Write the report of a run into its folder. Return its path.

    Raises:
        UserError: The run has no scores.
    """
    path = RunFolder(run).scores / "report.html"
    write_atomically(path, html(Overview(RunScores.read_all([run]))).encode())
    return path


def html(overview: Overview) -> str:
    """Return the HTML page of one run, or of several side by side."""
    environment = Environment(
        loader=PackageLoader("sail_align.evaluate.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, interval=format_interval, short=lambda digest: digest[:12])
    runs = [
        {
            "name": run.name,
            "style": overview.style(place),
            "summary": summarise_run(run.content, settings := run.settings),
            "settings": flatten(settings),
            "curves": training_curves(RunFolder(run.path).run.metrics),
            "records": run.scored,
        }
        for place, run in enumerate(overview.runs)
    ]
    names = [run.name for run in overview.runs]
    return environment.get_template("report.html.j2").render(
        title=" and ".join(names) if len(names) < 3 else f"{len(names)} runs",
        runs=runs,
        overview=overview,
        radars=[Markup(chart) for panel in overview.panels if (chart := radar_chart(panel))],
        markers={style: text for style, (_, text) in MARKERS.items()},
        tasks=all_tasks(),
        sections=_sections(overview),
        reported=REPORTED,
        how_to_read=HOW_TO_READ,
    )


FORMATS: dict[str, Callable[[Overview], str]] = {
    ".html": html,
    ".md": partial(text, markdown=True),
    ".tex": latex,
    ".csv": comma_separated,
}
"""Formats of a report on several runs, by the ending of the file."""


def training_curves(log: Path) -> list[dict[str, Any]]:
    """Return the loss and the held-out recall over the steps of a run, each as a chart and as a table.

    Curves with fewer than two points are left out.
    """
    *lines, _ = log.read_text().split("\n") if log.is_file() else [""]  # a killed run may leave part of a line
    entries = [json.loads(line) for line in lines]

    def points(kind: str, field: str) -> Points:
        return [(entry["step"], entry[field]) for entry in entries if entry["kind"] == kind and field in entry]

    loss = {"training": points("train", "loss"), "held out": points("heldout", "loss")}
    recall = {"text→image": points("heldout", "t2i_r1"), "image→text": points("heldout", "i2t_r1")}
    curves = []
    for title, label, series in (("Loss", "loss", loss), ("Held-out R@1", "R@1 (%)", recall)):
        drawn = {name: line for name, line in series.items() if len(line) > 1}
        if not drawn:
            continue
        fewest = min(drawn.values(), key=len)
        chosen = np.linspace(0, len(fewest) - 1, min(CURVE_ROWS, len(fewest))).astype(int)
        values = [dict(line) for line in drawn.values()]
        table = [
            [f"{step:,g}", *(f"{each[step]:.4g}" if step in each else "–" for each in values)]
            for step in dict.fromkeys(fewest[place][0] for place in chosen)
        ]
        chart = line_chart(drawn, "step", label, allow_log=label == "loss", inline=True)
        curves.append({"title": title, "names": list(drawn), "chart": Markup(chart), "table": table})
    return curves


def summarise_run(scores: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return encoders, heads, training data and checkpoint of a run as (term, value, detail)."""
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


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as dotted names and values as text."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            rows.append((prefix + name, ", ".join(map(str, value)) or "–"))
        else:
            rows.append((prefix + name, "–" if value is None else str(value)))
    return rows


def _sections(overview: Overview) -> list[dict[str, Any]]:
    """Return for each task the examples and details of each set of each run."""
    sections = []
    for task in all_tasks().values():
        parts = []
        for key, records in overview.records.items():
            for place, (run, record) in enumerate(zip(overview.runs, records, strict=True)):
                if not record or record["task"] != task.kind:
                    continue
                examples = run.examples(record)
                headings = {"Right": True, "Wrong": False, "": None}
                groups = {
                    name: [each for each in examples if each["right"] is right] for name, right in headings.items()
                }
                kinds = record["details"].get("by_tag") or record["details"].get("by_category") or {}
                if examples or kinds:
                    part = {"run": run.name, "style": overview.style(place), "record": record, "kinds": kinds}
                    parts.append(part | {"mark": overview.marks[key], "groups": groups})
        if parts:
            sections.append({"task": task, "parts": parts})
    return sections
