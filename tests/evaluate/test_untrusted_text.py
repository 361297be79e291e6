"""Titles, captions, names and errors reach terminals, pages and tables as text, never as something they obey."""

import csv
import io
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sail_align.align.stats.tables import one_line
from sail_align.evaluate.report.formats import FIELDS, comma_separated, latex, score_table, text
from sail_align.evaluate.report.overview import Overview
from sail_align.evaluate.report.page import html
from sail_align.evaluate.results.scores import SCHEMA, RunScores

ESCAPE = "\x1b]0;owned\x07\x1b[31mred\x9b0m\u202e"
HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>"
MARKDOWN = "[x](javascript:alert) | # `code` ![i](u) *b* ~~s~~ &lt; $m$"
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def metric(name, value, label="top-1"):
    return {"name": name, "label": label, "value": value, "chance": 10.0, "unit": "%", "interval": [1.0, 4.5]}


def record(task, protocol, metrics, title="T"):
    return {
        "dataset": "birds",
        "title": title,
        "task": task,
        "protocol": protocol,
        "items": 400,
        "data": {"digest": "a" * 64, "rows": 800, "expected_rows": 801},
        "metrics": metrics,
        "details": {},
        "run": "r" * 64,
        "encoders": {"image": "i" * 64, "text": "t" * 64},
        "stores": {},
        "versions": {},
    }


@pytest.fixture
def runs(tmp_path):
    """Give a function that writes runs of these records and reads them."""

    def write(**records):
        for name, own in records.items():
            (tmp_path / name).mkdir(exist_ok=True)
            scores = {"schema": SCHEMA, "run": {"name": name, "digest": "r" * 64}, "encoders": {}, "records": own}
            (tmp_path / name / "scores.json").write_text(json.dumps(scores))
        return RunScores.read_all([tmp_path / name for name in records])

    return write


def overview(runs, nasty):
    own = record(
        "classification", "classification/prompt-ensemble@2/birds", [metric("top1", 61.2, label=nasty)], title=nasty
    )
    failed = {"dataset": "flowers", "title": nasty, "task": "classification", "error": nasty}
    return Overview(runs(one=[{**own, "dataset": nasty}, failed], two=[own]))


@pytest.mark.parametrize("nasty", [ESCAPE, HTML, MARKDOWN, "=1+2", "a\nb\tc", "\u2028x"])
def test_every_output_is_free_of_control_characters(runs, nasty):
    shown = overview(runs, nasty)
    tables = [text(shown), text(shown, markdown=True), latex(shown), comma_separated(shown)]
    for output in (*tables, score_table(shown.runs[0].records)):
        assert not CONTROLS.search(output)


def test_markdown_has_no_html_and_no_links(runs):
    output = text(overview(runs, HTML + MARKDOWN), markdown=True)
    assert not re.search(r"(?<!\\)<(?!br>)|(?<!\\)\[", output)
    assert not re.search(r"(?<!\\)[`~&$#]", output)


def test_markdown_items_are_no_lists_or_headings(runs):
    for nasty, expected in (("- x", r"\- x"), ("1. x", r"1\. x"), ("# x", r"\# x"), ("+ x", r"\+ x")):
        shown = overview(runs, nasty)
        assert f"- {expected} (classification)" not in text(shown)
        assert f"{expected}<br>" in text(shown, markdown=True)


def test_page_has_no_markup_of_its_data(runs, tmp_path):
    shown = overview(runs, HTML.replace("/", "") + ESCAPE)  # a name with a slash is damage
    for run in shown.runs:
        (run.path / "settings.json").write_text('{"model": "<b>m\\u001b"}')
        run.content["encoders"] = {}
        for each in run.content["records"]:
            each.update(stores={}, versions={})
    page = html(shown)
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)


def test_no_cell_is_a_formula(runs):
    for start in ("=", "+", "-", "@", " =", "\t="):
        (line, failed, *_) = csv.DictReader(io.StringIO(comma_separated(overview(runs, f"{start}cmd()"))))
        for cell in (line["data set"], failed["error"]):
            assert cell.startswith("'")
            assert cell.endswith("cmd()")
        assert list(line) == list(FIELDS)


def test_negative_numbers_stay_numbers(runs):
    shown = Overview(runs(one=[record("classification", "classification/x@2/birds", [metric("top1", -0.5)])]))
    (line,) = csv.DictReader(io.StringIO(comma_separated(shown)))
    assert line["score"] == "-0.5"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_one_line_has_no_controls_and_leaves_others(given_text):
    shown = one_line(given_text)
    assert not CONTROLS.search(shown)
    assert "\n" not in shown
    assert one_line(shown) == shown
    if given_text.isprintable():
        assert shown == given_text


def test_one_line_shows_what_was_there():
    assert one_line("a\x1b[0m\r\nb\u202ec é 猫") == r"a\x1b[0m  b\u202ec é 猫"
