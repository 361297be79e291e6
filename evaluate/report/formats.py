"""An overview of runs as plain text, Markdown and LaTeX, and every number of theirs as CSV."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from sail_align.align.stats.tables import interval, markdown_table, number
from sail_align.evaluate.report.overview import Overview, Panel, Row, ScoredRun, records_by_key
from sail_align.evaluate.results.reported import reported
from sail_align.evaluate.results.scores import Record, unexpected

if TYPE_CHECKING:
    from sail_align.evaluate.compare import Comparison

HEADER = ("data set", "task", "n", "metric", "score", "chance", "95% interval")
DIFFERENCE_HEADER = ("data set", "metric", "first", "second", "difference", "95% interval", "p")
TO_THE_LEFT = {"task", "metric"}


def score_table(records: Iterable[Record]) -> str:
    """Return the table: one line a metric, the set's name on its first; the sentence of a set that failed instead.

    A note below it names each set that is not of the size that its manifest expects.
    """
    records = list(records)
    rows: list[tuple[str, ...]] = []
    for record in records:
        if "error" in record:
            rows.append((record["dataset"], record["task"], "", f"ERROR: {record['error']}"))
            continue
        first = (record["dataset"], record["task"], str(record["items"]))
        for metric in record["metrics"]:
            score, chance = number(metric["value"]), number(metric["chance"])
            bounds = interval(metric.get("interval"), metric["value"])
            rows.append((*first, metric["label"], score, chance, bounds))
            first = ("", "", "")
    notes = dict.fromkeys(filter(None, map(unexpected, records)))  # a set of two tasks is named once
    return "\n".join([aligned(HEADER, rows), *(f"note: {said}" for said in notes)])


def difference_table(comparison: "Comparison") -> str:
    """Return a comparison: one line a metric, and a sentence for each set that cannot be compared."""
    rows: list[tuple[str, ...]] = []
    said = ""
    for each in comparison.differences:
        difference = each.second - each.first
        values = (number(each.first), number(each.second), number(difference, sign="+"))
        lower_is_better = " (less is better)" if each.unit == "rank" else ""
        name = each.dataset if each.protocol != said else ""
        bounds = interval(each.interval, difference, sign="+")
        rows.append((name, each.label + lower_is_better, *values, bounds, f"{each.p:.3f}"))
        said = each.protocol
    return "\n".join([aligned(DIFFERENCE_HEADER, rows), *comparison.refusals])


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a header, whose cells may have several lines.

    Columns of words go to the left, as does the first. A row shorter than the header is a sentence and does not widen
    its last column.
    """
    headings = [cell.split("\n") for cell in header]
    height = max(map(len, headings))
    above = list(zip(*([""] * (height - len(lines)) + lines for lines in headings), strict=True))
    full = [*above, *(row for row in rows if len(row) == len(header))]
    short = [row[:-1] for row in rows if len(row) < len(header)]
    widths = [max(len(row[column]) for row in [*full, *short] if column < len(row)) for column in range(len(header))]
    to_the_left = [column == 0 or name in TO_THE_LEFT for column, name in enumerate(header)]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, to_the_left, strict=False)
        )
        return "  ".join(cells).rstrip()

    return "\n".join([*map(line, above), "  ".join("─" * width for width in widths), *map(line, rows)])


REPORTED = "reported by the paper, not measured here"
HOW_TO_READ = "Per cent; ± is half of the 95 % bootstrap interval."
FIELDS = (
    "model", "origin", "data set", "task", "protocol", "metric", "score", "low", "high", "chance", "unit", "n",
    "data digest", "run digest", "image encoder", "text encoder", "note", "error",
)  # fmt: skip
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}", "→": r"$\to$", "–": "--", "…": r"\ldots{}",
    "×": r"$\times$", "±": r"$\pm$", "−": "$-$", "\n": " ",
}  # fmt: skip


def text(shown: Overview) -> str:
    """Return the tables as aligned columns, and the notes below."""
    tables = [
        aligned(
            ("model", *(f"{column.dataset}\n{column.label} ({column.mark})" for column in panel.columns)),
            [(_starred(row), *cells(row)) for row in panel.rows],
        )
        for panel in shown.panels
    ]
    return "\n\n".join([*tables, "\n".join(_below(shown))])


def markdown(shown: Overview) -> str:
    """Return the tables as pipe tables, and the notes below."""
    tables = [
        markdown_table(
            ["model", *(_plain(f"{column.dataset}<br>{column.label} ({column.mark})") for column in panel.columns)],
            [[_plain(_starred(row)), *cells(row)] for row in panel.rows],
        )
        for panel in shown.panels
    ]
    notes = "\n".join(f"- {_plain(line)}" for line in _below(shown))
    return "\n\n".join([*tables, notes]) + "\n"


def latex(shown: Overview) -> str:
    """Return the tables for `booktabs`, no wider than the text, each with its notes, and all text escaped."""
    notes = [rf"$^{{{mark}}}$~{{\ttfamily {_breakable(said)}}}" for mark, said in shown.notes]
    notes += [_tex(line) for line in (HOW_TO_READ, *shown.faults)]
    below = "\n".join(rf"{{\noindent\footnotesize\raggedright {note}\par}}" for note in notes)
    needs = "% Written by sail-eval report, for \\input. Needs \\usepackage{booktabs,graphicx}."
    return "\n\n".join([needs, *map(_tabular, shown.panels), below]) + "\n"


def comma_separated(runs: Sequence[ScoredRun]) -> str:
    """Return every metric of every record of the runs, one a line, and what papers report of the same protocols."""
    rows = [row for run in runs for record in run.scores["records"] for row in _lines(run, record)]
    for records in records_by_key(runs).values():
        about = _about(record := next(filter(None, records)))
        for model in reported():
            origin = {"model": model.name, "origin": f"reported: {model.source}", **about, "unit": "%"}
            scores = [(metric["name"], model.score(record, metric["name"])) for metric in record["metrics"]]
            rows += [{**origin, "metric": name, "score": score} for name, score in scores if score is not None]
    written = io.StringIO()
    table = csv.DictWriter(written, FIELDS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return written.getvalue()


def cells(row: Row) -> list[str]:
    """Return a row's scores as text: reported ones with the digits that were published."""

    def cell(value: float | None, bounds: Sequence[float] | None) -> str:
        if value is None:
            return "–"
        if row.kind == "reported":
            return f"{value:.1f}" if round(value, 1) == value else f"{value:g}"
        return number(value) + (f" ± {number((bounds[1] - bounds[0]) / 2, beside=value)}" if bounds else "")

    return [cell(*each) for each in row.cells]


def _name(row: Row) -> str:
    return f"{row.name} ({row.source})" if row.source else row.name


def _starred(row: Row) -> str:
    return f"{_name(row)} *" if row.kind == "reported" else row.name


def _below(shown: Overview) -> list[str]:
    lines = [f"({mark}) {said}" for mark, said in shown.notes]
    return [*lines, HOW_TO_READ, *([f"* {REPORTED}."] if shown.with_reported else []), *shown.faults]


def _plain(words: str) -> str:
    """Return words as Markdown that shows them as they are; `<br>` is kept."""
    return re.sub(r"<(?!br>)|[\\`*_|\[\]]", lambda found: "\\" + found[0], " ".join(words.split()))


def _tex(words: str) -> str:
    return "".join(_LATEX.get(character, character) for character in words)


def _breakable(words: str) -> str:
    return _tex(words).replace("/", r"/\allowbreak{}")


def _tabular(panel: Panel) -> str:
    groups, rules, first = [], [], 2
    for mark, columns in groupby(panel.columns, key=lambda column: column.mark):
        group = list(columns)
        groups.append(rf"\multicolumn{{{len(group)}}}{{c}}{{{_tex(group[0].dataset)}$^{{{mark}}}$}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + len(group) - 1}}}")
        first += len(group)
    lines = [
        r"{\noindent\footnotesize\setlength{\tabcolsep}{4pt}%",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * len(panel.columns)}}}",
        r"\toprule",
        f" & {' & '.join(groups)} \\\\",
        " ".join(rules),
        " & ".join(["model", *(_stacked(column.label) for column in panel.columns)]) + r" \\",
    ]
    for (kind, source), rows in groupby(panel.rows, key=lambda row: (row.kind, row.source)):
        lines.append(r"\midrule")
        if kind == "reported":
            said = _tex(f"{REPORTED}: {source}")
            lines.append(rf"\multicolumn{{{len(panel.columns) + 1}}}{{l}}{{\emph{{{said}}}}} \\")
        lines += [" & ".join([_tex(row.name), *map(_score, cells(row))]) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}\par\bigskip}"])


def _score(cell: str) -> str:
    """Return a score with its interval smaller."""
    value, _, off = cell.partition(" ± ")
    return _tex(value) + (rf"\,{{\scriptsize$\pm${off}}}" if off else "")


def _stacked(label: str) -> str:
    """Return a label of several words in two lines."""
    first, _, last = _tex(label).rpartition(" ")
    return rf"\shortstack[r]{{{first}\\{last}}}" if first else last


def _about(record: Record) -> dict[str, object]:
    data = record.get("data", {})
    return {
        "data set": record["dataset"],
        "task": record["task"],
        "protocol": record.get("protocol", ""),
        "n": record.get("items", ""),
        "data digest": data.get("digest", ""),
        "note": unexpected(record),
    }


def _lines(run: ScoredRun, record: Record) -> list[dict[str, object]]:
    unfinished = run.scores["run"].get("unfinished")
    origin = f"measured, {unfinished}" if unfinished else "measured"
    about = {"model": run.name, "origin": origin, **_about(record)}
    if "error" in record:
        return [{**about, "error": record["error"]}]
    encoders = record["encoders"]
    about |= {"run digest": record["run"], "image encoder": encoders["image"], "text encoder": encoders["text"]}
    lines = []
    for metric in record["metrics"]:
        low, high = metric.get("interval") or ("", "")
        scored = {
            "metric": metric["name"],
            "score": metric["value"],
            "chance": metric["chance"],
            "unit": metric["unit"],
        }
        lines.append({**about, **scored, "low": low, "high": high})
    return lines
