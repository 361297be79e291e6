"""`report.html` of a run: one self-contained page from what the run's folder holds."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sail_align.align.charts import Series, line_chart, score_bar
from sail_align.evaluate.scores import Record, examples_path, read_scores
from sail_align.evaluate.table import interval, number
from sail_align.extract.files import write_atomically

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
"""Title of a task's examples, and how to read them."""


def write_report(run: Path) -> Path:
    """Write the report of a run that has been scored; return its path.

    Raises:
        UserError: The run has no scores.
    """
    scores = read_scores(run)
    pages = Environment(
        loader=PackageLoader("sail_align.evaluate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(number=number, interval=interval, short=lambda digest: digest[:12])
    settings = json.loads((run / "settings.json").read_bytes())
    page = pages.get_template("report.html.j2").render(
        name=run.resolve().name,
        scores=scores,
        scored=[record for record in scores["records"] if "error" not in record],
        errors=[record for record in scores["records"] if "error" in record],
        summary=summary(scores, settings),
        settings=_flat(settings),
        curves=training_curves(run),
        examples={_told_apart(record): _examples(run, record) for record in scores["records"]},
        told_apart=_told_apart,
        tasks=TASKS,
        score_bar=score_bar,
    )
    path = run / "report.html"
    write_atomically(path, page.encode())
    return path


def training_curves(run: Path) -> list[tuple[str, list[Series], Markup]]:
    """Return title, legend and chart of the loss and of the held-out recall, those that have two points or more."""
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
            curves.append((title, drawn, line_chart(drawn, "step", label, may_be_log=may_be_log)))
    return curves


def summary(scores: dict[str, Any], settings: dict[str, Any]) -> list[tuple[str, str, str]]:
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
    stores = zip(settings["stores"], settings["store_digests"], strict=True)
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


def _told_apart(record: Record) -> str:
    """Return what no other record of the page has: one set may be scored by several protocols."""
    return f"{record['dataset']} {record['task']} {record.get('protocol')}"


def _examples(run: Path, record: Record) -> list[dict[str, Any]]:
    path = examples_path(run, record)
    examples: list[dict[str, Any]] = json.loads(path.read_bytes()) if path.is_file() else []
    return examples


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as dotted names and values in words."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            rows.append((prefix + name, ", ".join(map(str, value)) or "–"))
        else:
            rows.append((prefix + name, "–" if value is None else str(value)))
    return rows
