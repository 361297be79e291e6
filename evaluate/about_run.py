"""What a run is, and how its training went: from its folder, for its report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from sail_align.align.charts import Series, line_chart

ROWS = 12
"""A curve as a table has at most so many rows."""


@dataclass(frozen=True)
class Curves:
    """Lines over the steps of a run, as a chart and as a table: step and values, "" where a line has none."""

    title: str
    lines: Sequence[Series]
    chart: Markup
    table: Sequence[Sequence[str]]


def training_curves(run: Path) -> list[Curves]:
    """Return the loss and the held-out recall, those that have two points or more."""
    path = run / "metrics.jsonl"
    lines_and_rest = path.read_text().split("\n") if path.is_file() else [""]
    entries = [json.loads(line) for line in lines_and_rest[:-1]]  # a killed run may leave part of a line

    def series(name: str, kind: str, field: str, style: str) -> Series:
        rows = (entry for entry in entries if entry["kind"] == kind and field in entry)
        return Series(name, [(row["step"], row[field]) for row in rows], style)

    wanted = (
        (
            "Loss",
            "loss",
            True,
            [series("training", "train", "loss", "line-1"), series("held out", "heldout", "loss", "line-2")],
        ),
        (
            "Held-out R@1",
            "R@1 (%)",
            False,
            [series("text→image", "heldout", "t2i_r1", "line-1"), series("image→text", "heldout", "i2t_r1", "line-2")],
        ),
    )
    curves = []
    for title, label, may_be_log, lines in wanted:
        drawn = [line for line in lines if len(line.points) > 1]
        if drawn:
            chart = line_chart(drawn, "step", label, may_be_log=may_be_log)
            curves.append(Curves(title, drawn, chart, _as_table(drawn)))
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


def _as_table(lines: Sequence[Series]) -> list[list[str]]:
    """Return step and values of some steps, of those that most of the lines have."""
    fewest = min(lines, key=lambda line: len(line.points))
    chosen = np.linspace(0, len(fewest.points) - 1, min(ROWS, len(fewest.points))).astype(int)
    values = [dict(line.points) for line in lines]
    steps = [fewest.points[place][0] for place in chosen]
    return [
        [f"{step:,g}", *(f"{each[step]:.4g}" if step in each else "–" for each in values)]
        for step in dict.fromkeys(steps)
    ]
