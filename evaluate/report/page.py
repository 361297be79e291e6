"""The report of runs: one self-contained HTML page."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from sail_align.align.runs.folder import RunFolder
from sail_align.align.stats.charts import Points, line_chart
from sail_align.align.stats.pages import page_environment
from sail_align.align.stats.tables import format_interval, number
from sail_align.evaluate.report.charts import MARKERS, radar_chart
from sail_align.evaluate.report.formats import HOW_TO_READ, REPORTED, comma_separated, latex, text
from sail_align.evaluate.report.overview import Overview
from sail_align.evaluate.results.scores import RunScores
from sail_align.evaluate.tasks.task import all_tasks
from sail_align.extract.system.files import report_write_errors, write_atomically

CURVE_ROWS = 12
"""Maximum number of rows of a curve as a table."""


def write_report(run: Path) -> Path:
    """Write the report of a run into its folder. Return its path.

    Raises:
        UserError: The run has no scores.
    """
    path = RunFolder(run).scores / "report.html"
    page = html(Overview(RunScores.read_all([run]))).encode()
    with report_write_errors(path.parent, has_out=False):
        write_atomically(path, page)
    return path


def html(overview: Overview) -> str:
    """Return the HTML page of one run, or of several side by side."""
    environment = page_environment("sail_align.evaluate.report")
    environment.filters.update(number=number, interval=format_interval, short=lambda digest: digest[:12])
    runs = [
        {
            "name": run.name,
            "style": overview.style(place),
            "summary": run.summary,
            "settings": run.settings,
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
    entries: list[dict[str, Any]] = []
    for line in log.read_bytes().decode(errors="replace").split("\n") if log.is_file() else ():
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            break  # a killed run may leave part of a line

    def points(kind: str, field: str) -> Points:
        found = [(entry.get("step"), entry.get(field)) for entry in entries if entry.get("kind") == kind]
        return [(x, y) for x, y in found if isinstance(x, int | float) and isinstance(y, int | float)]

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


def _sections(overview: Overview) -> list[dict[str, Any]]:
    """Return for each task the examples and details of each set of each run."""
    parts: dict[str, list[dict[str, Any]]] = {kind: [] for kind in all_tasks()}
    for key, records in overview.records.items():
        for place, (run, record) in enumerate(zip(overview.runs, records, strict=True)):
            if not record:
                continue
            examples, details = run.examples(record), record["details"]
            kinds = details.get("by_tag") or details.get("by_category") or {}
            if examples or kinds:
                about = {"run": run.name, "style": overview.style(place), "mark": overview.marks[key]}
                parts[record["task"]].append({**about, "record": record, "examples": examples, "kinds": kinds})
    return [{"task": task, "parts": parts[kind]} for kind, task in all_tasks().items() if parts[kind]]
