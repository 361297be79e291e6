"""Tables of scores as plain text, Markdown and LaTeX, and all scores as CSV."""

import csv
import io
import re
from collections.abc import Iterable, Iterator

from jinja2 import Environment, PackageLoader

from sail_align.align.stats.tables import format_interval, format_table, number, one_line
from sail_align.evaluate.report.overview import Overview
from sail_align.evaluate.results.reported import Reported
from sail_align.evaluate.results.scores import Record

REPORTED = "reported by the paper, not measured here"
HOW_TO_READ = "Per cent; ± is half of the 95 % bootstrap interval."
FIELDS = (
    "model", "origin", "data set", "task", "protocol", "metric", "score", "low", "high", "chance", "unit", "n",
    "data digest", "run digest", "image encoder", "text encoder", "note", "error",
)  # fmt: skip
LATEX_CHARACTERS = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}", "→": r"$\to$", "–": "--", "…": r"\ldots{}",
    "×": r"$\times$", "±": r"$\pm$", "−": "$-$", "\n": " ",
}  # fmt: skip


def score_table(records: Iterable[Record]) -> str:
    """Return a table with one line per metric, and notes on failed or incomplete sets below it."""
    rows, notes = [], []
    for record in records:
        if record.error:
            notes.append(f"{record.name} ERROR: {record.error}")
            continue
        first = (record.set, record["task"], str(record["items"]))
        for metric in record["metrics"]:
            value, chance = number(metric["value"]), number(metric["chance"])
            rows.append(
                (*first, metric["label"], value, chance, format_interval(metric.get("interval"), metric["value"]))
            )
            first = ("", "", "")
        if record.mismatch:
            notes.append(f"note: {record.mismatch}")
        if record.resampled:
            notes.append(f"note: {record.set}: {record.resampled}.")
        if record.left_out:
            notes.append(f"note: {record.left_out}")
    header = ("data set", "task", "n", "metric", "score", "chance", "95% interval")
    return "\n".join([format_table(header, rows, "llrl", style="simple"), *map(one_line, dict.fromkeys(notes))])


def text(overview: Overview, *, markdown: bool = False) -> str:
    """Return the tables as aligned columns or in Markdown, with notes below."""

    def escape(text: str) -> str:
        text = one_line(text)
        if not markdown:
            return text
        escaped = re.sub(r"[<>\\`*_|\[\]&#~$]", r"\\\g<0>", " ".join(text.split()))
        return re.sub(r"^([-+=]|\d+[.)])", lambda found: f"{found[0][:-1]}\\{found[0][-1]}", escaped)

    parts = []
    for panel in overview.panels:
        headings = [
            (escape(each.record.set), escape(f"{each.metric['label']} ({each.mark})")) for each in panel.columns
        ]
        header = ("model", *map(("<br>" if markdown else "\n").join, headings))
        names = [f"{row.name} ({row.source}) *" if row.source else row.name for row in panel.rows]
        rows = [(escape(name), *row.texts) for name, row in zip(names, panel.rows, strict=True)]
        parts.append(format_table(header, rows, style="pipe" if markdown else "simple"))
    notes = [f"({mark}) {note}" for mark, note in overview.notes] + [HOW_TO_READ]
    notes += [f"* {REPORTED}."] if overview.with_reported else []
    parts.append("\n".join(("- " if markdown else "") + escape(note) for note in [*notes, *overview.faults]))
    return "\n\n".join(parts) + ("\n" if markdown else "")


def latex(overview: Overview) -> str:
    """Return the tables for `booktabs`, no wider than the text, with notes below. All text is escaped."""

    def tex(text: str) -> str:
        return "".join(LATEX_CHARACTERS.get(character, character) for character in one_line(text))

    def stacked(label: str) -> str:
        """Return a label of several words in two lines."""
        first, _, last = tex(label).rpartition(" ")
        return rf"\shortstack[r]{{{first}\\{last}}}" if first else last

    def score(cell: str) -> str:
        """Return a score with its interval in smaller type."""
        value, _, half = cell.partition(" ± ")
        return tex(value) + (rf"\,{{\scriptsize$\pm${half}}}" if half else "")

    environment = Environment(
        loader=PackageLoader("sail_align.evaluate.report", "."),
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters.update(tex=tex, stacked=stacked, score=score)
    template = environment.get_template("report.tex.j2")
    return template.render(overview=overview, reported=REPORTED, how_to_read=HOW_TO_READ)


def score_lines(overview: Overview) -> Iterator[dict[str, object]]:
    """Yield every score of the runs, and what papers report by the same protocols, with the names of `FIELDS`."""
    for run in overview.runs:
        origin = f"measured, {run.unfinished}" if run.unfinished else "measured"
        for record in run.records:
            line: dict[str, object] = {"model": run.name, "origin": origin, **_provenance(record)}
            if record.error:
                yield line | {"error": record.error}
                continue
            encoders = record["encoders"]
            line |= {"run digest": record["run"], "image encoder": encoders["image"], "text encoder": encoders["text"]}
            for metric in record["metrics"]:
                low, high = metric.get("interval") or (None, None)
                score = {"metric": metric["name"], "score": metric["value"], "low": low, "high": high}
                yield line | score | {"chance": metric["chance"], "unit": metric["unit"]}
    for key in overview.records:
        record = overview.any_record(key)
        for model in Reported.read_all():
            line = {"model": model.name, "origin": f"reported: {model.source}", **_provenance(record), "unit": "%"}
            scores = {metric["name"]: model.score(record, metric["name"]) for metric in record["metrics"]}
            for name, value in scores.items():
                if value is not None:
                    yield line | {"metric": name, "score": value}


def comma_separated(overview: Overview) -> str:
    """Return every score of the runs, one per line, and what papers report by the same protocols."""
    file = io.StringIO()
    table = csv.DictWriter(file, FIELDS, lineterminator="\n")
    table.writeheader()
    for line in score_lines(overview):
        table.writerow({name: _cell(value) for name, value in line.items()})
    return file.getvalue()


def _cell(value: object) -> object:
    """Return a value as a cell that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def _provenance(record: Record) -> dict[str, object]:
    return {
        "data set": record["dataset"],
        "task": record["task"],
        "protocol": record.get("protocol", ""),
        "n": record.get("items", ""),
        "data digest": record.get("data", {}).get("digest", ""),
        "note": " ".join(filter(None, [record.mismatch, record.resampled])),
    }
