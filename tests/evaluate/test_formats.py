"""Runs side by side in every format, beside what the paper reports; the records are made by hand."""

import csv
import io
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.report.formats import comma_separated, latex, score_table, text
from sail_align.evaluate.report.overview import WIDTH, Overview
from sail_align.evaluate.results.reported import Reported
from sail_align.evaluate.results.scores import SCHEMA, RunScores
from sail_align.evaluate.tasks.task import find_task
from sail_align.extract.manifest import find_manifest
from sail_align.extract.sources import class_names as published

WINOGROUND = "winoground/strict@1/winoground/captions=all"
NASTY = r"50% & a_b #1|{x}^~\<b>*"


def metric(name, value, chance=25.0, interval=(1.0, 4.5), unit="%", label=None):
    shown = {"name": name, "label": label or name, "value": value, "chance": chance, "unit": unit}
    return {**shown, **({"interval": list(interval)} if interval else {})}


def record(task, protocol, metrics, *, digest="a" * 64, rows=800, expected=800, **fields):
    return {
        "dataset": protocol.split("/")[2],
        "title": "T",
        "task": task,
        "protocol": protocol,
        "items": 400,
        "data": {"digest": digest, "rows": rows, "expected_rows": expected, "captions": 1, "expected_captions": None},
        "metrics": metrics,
        "details": {},
        "run": "r" * 64,
        "encoders": {"image": "i" * 64, "text": "t" * 64},
        "stores": {},
        "versions": {},
        **fields,
    }


def winoground(**fields):
    metrics = [metric("text", 30.5), metric("image", 12.25, interval=None), metric("group", 9.0, 100 / 6)]
    return record("winoground", WINOGROUND, metrics, **fields)


def top1(templates="openai-80", value=61.2):
    return record(
        "classification", f"classification/prompt-ensemble@2/birds/templates={templates}", [metric("top1", value)]
    )


@pytest.fixture
def runs(tmp_path):
    """Give a function that writes runs of these records and reads them."""

    def write(**records):
        paths = []
        for name, own in records.items():
            paths.append(tmp_path / name)
            paths[-1].mkdir(parents=True, exist_ok=True)
            scores = {"schema": SCHEMA, "run": {"name": name, "digest": "r" * 64}, "encoders": {}, "records": own}
            (paths[-1] / "scores.json").write_text(json.dumps(scores))
        return RunScores.read_all(paths)

    return write


def rows_of(shown, panel=0):
    return {row.name: row for row in shown.panels[panel].rows}


def test_reported_protocols_match_packaged_manifests():
    """Were one of ours to change, the paper's numbers would stand beside nothing; this finds it."""

    def measured(name, variant=None):
        about, _ = find_manifest(name)
        rule = find_task(about.task.kind)
        about = rule.variant(about, variant) if variant else about
        named = getattr(about.source, "classes", None) or []
        names = published.class_names if ":" in named else lambda table: list(published.label_names(table).values())
        data = EvaluationSet.__new__(EvaluationSet)  # without the files of its source
        data.manifest, data.task = about, about.task
        data.source = SimpleNamespace(classes=names(named) if named else [])
        items = about.expected_rows // (2 if about.task.kind in ("winoground", "mmvp") else 1)
        return rule.protocol_id(data), items

    sets = ("imagenet1k", "coco-karpathy", "flickr30k", "winoground", "mmvp", "voc20-authors")
    ours = {measured(name) for name in sets} | {
        measured(name, "authors-normalisation") for name in ("ade20k", "coco-stuff")
    }
    assert {(protocol, items) for model in Reported.read_all() for protocol, _, items in model.scores} == ours


def test_reported_scores_need_the_same_protocol(runs):
    other = record(
        "winoground", WINOGROUND + "/prompt=a-{}", [metric(name, 1.0) for name in ("text", "image", "group")]
    )
    rows = rows_of(Overview(runs(ours=[winoground(), other])))
    assert [value for value, _ in rows["SAIL, 7.4M pairs"].cells] == [33.25, 13, 11, None, None, None]
    assert [value for value, _ in rows["ours"].cells] == [30.5, 12.25, 9.0, 1.0, 1.0, 1.0]
    assert [value for value, _ in rows["chance"].cells][:3] == [25, 25, 100 / 6]


def test_reported_scores_need_the_same_counts(runs):
    shown = Overview(runs(ours=[winoground(rows=798)]))
    assert not shown.with_reported
    assert shown.faults == ["winoground has 798 rows, not 800: its scores are of another set."]
    assert not Overview(runs(ours=[winoground(items=3, rows=6, expected=None)])).with_reported


def test_other_protocols_or_data_get_own_columns(runs):
    of_other_data = record("winoground", WINOGROUND, winoground()["metrics"], digest="b" * 64)
    shown = Overview(runs(a=[top1("openai-80"), winoground()], b=[top1("class-name", 50.0), of_other_data]))
    assert [row.cells[0][0] for row in shown.panels[0].rows[:2]] == [61.2, None]
    rows = [row for panel in shown.panels for row in panel.rows if row.name in ("a", "b")]
    assert all(sum(row.cells[at][0] is not None for row in rows[:2]) == 1 for at in range(len(rows[0].cells)))
    assert len({mark for mark, _ in shown.notes}) == 4


def test_wide_tables_are_split_between_protocols(runs):
    many = [
        winoground() | {"protocol": f"winoground/strict@1/set{i}/captions=all", "dataset": f"set{i}"} for i in range(40)
    ]
    shown = Overview(runs(ours=many))
    assert sum(len(panel.columns) for panel in shown.panels) == 120
    for panel in shown.panels:
        assert len(panel.columns) <= WIDTH
        assert len(panel.columns) % 3 == 0
    assert [mark for mark, _ in shown.notes][25:28] == ["z", "aa", "ab"]


def test_markdown_cells_are_in_place_and_escaped(runs):
    error = {"dataset": "coco-karpathy", "title": "C", "task": "retrieval", "error": "a|b is corrupt"}
    shown = text(Overview(runs(**{NASTY: [winoground(), error]})), markdown=True)
    table = [line for line in shown.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    assert {len(row) for row in cells} == {4}
    assert cells[0] == ["model", "winoground<br>text (a)", "winoground<br>image (a)", "winoground<br>group (a)"]
    unescaped = re.sub(r"\\(.)", r"\1", cells[2][0])
    assert (unescaped, cells[2][1:]) == (NASTY, ["30.5 ± 1.8", "12.2", "9.0 ± 1.8"])
    assert cells[5] == [r"SAIL, 7.4M pairs (SAIL's table 2) \*", "33.25", "13.0", "11.0"]
    assert cells[-1] == ["chance", "25.0", "25.0", "16.7"]
    assert f"- (a) {WINOGROUND}, n = 400, data aaaaaaaaaaaa" in shown
    assert r"coco-karpathy (retrieval) was not scored with" in shown
    assert r"a\|b is corrupt" in shown
    assert "reported by the paper, not measured here" in shown


def test_text_is_aligned(runs):
    lines = text(Overview(runs(ours=[winoground()]))).splitlines()
    assert lines[0].split() == ["model", *["winoground"] * 3]
    assert lines[1].split() == ["text", "(a)", "image", "(a)", "group", "(a)"]
    assert lines[3].startswith("ours ")
    ends = {len(line) for line in (lines[0], lines[1], lines[2], lines[4])}
    assert len(ends) == 1


def test_latex_is_escaped(runs):
    written = latex(Overview(runs(**{NASTY: [winoground()], "other": [top1()]})))
    assert r"50\% \& a\_b \#1\textbar{}\{x\}\textasciicircum{}\textasciitilde{}\textbackslash{}\textless{}b" in written
    assert r"\multicolumn{3}{c}{winoground$^{a}$} & \multicolumn{1}{c}{birds$^{b}$} \\" in written
    assert r"\cmidrule(lr){2-4} \cmidrule(lr){5-5}" in written
    assert r"30.5\,{\scriptsize$\pm$1.8} & 12.2 & 9.0\,{\scriptsize$\pm$1.8} & -- \\" in written
    assert r"\emph{reported by the paper, not measured here: SAIL's later version}" in written
    assert r"winoground/\allowbreak{}strict@1/\allowbreak{}winoground" in written
    bare = re.sub(r"\\[&%$#_{}\\]", "", written)
    assert bare.count("{") == bare.count("}")
    for line in bare.splitlines():
        assert line.count("$") % 2 == 0, line
        if "&" in line:
            spanned = sum(int(span) - 1 for span in re.findall(r"multicolumn{(\d)}", line))
            assert line.count("&") + spanned == 4, line
    assert written.isascii()


def test_latex_stacks_labels_of_several_words(runs):
    labelled = record("winoground", WINOGROUND, [metric("text", 1.0, label="a b→c R@1"), metric("image", 2.0)])
    assert r"model & \shortstack[r]{a b$\to$c\\R@1} & image \\" in latex(Overview(runs(ours=[labelled])))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not on PATH")
@pytest.mark.parametrize("encoding", ["OT1", "T1"])
def test_latex_compiles_within_the_text_width(runs, tmp_path, encoding):
    wide = [top1(f"t{number}") | {"dataset": f"a set with a long name, {number}"} for number in range(9)]
    error = {"dataset": "coco", "title": "C", "task": "retrieval", "error": f'{NASTY} "quoted" is – not … there'}
    written = latex(Overview(runs(**{f'{NASTY}"ü': [winoground(), *wide, error], "other": [top1()]})))
    packages = re.search(r"\\usepackage{.*?}", written)[0]
    head = rf"\documentclass{{article}}\usepackage[{encoding}]{{fontenc}}{packages}\begin{{document}}"
    (tmp_path / "page.tex").write_text(f"{head}\n{written}\\end{{document}}")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout
    assert "Overfull" not in ended.stdout


def test_csv_has_one_row_per_run_set_and_metric(runs):
    error = {"dataset": "coco-karpathy", "title": "C", "task": "retrieval", "error": 'a "broken", file'}
    rows = list(
        csv.DictReader(io.StringIO(comma_separated(Overview(runs(**{NASTY: [winoground(), error]}, b=[top1()])))))
    )
    measured = [row for row in rows if row["origin"] == "measured"]
    assert [(row["model"], row["data set"], row["metric"]) for row in measured] == [
        (NASTY, "winoground", "text"),
        (NASTY, "winoground", "image"),
        (NASTY, "winoground", "group"),
        (NASTY, "coco-karpathy", ""),
        ("b", "birds", "top1"),
    ]
    first, without_interval, _, failed, _ = measured
    assert [first[name] for name in ("score", "low", "high", "chance", "n")] == ["30.5", "1.0", "4.5", "25.0", "400"]
    assert (first["protocol"], first["data digest"], first["run digest"]) == (WINOGROUND, "a" * 64, "r" * 64)
    assert (first["image encoder"], first["text encoder"]) == ("i" * 64, "t" * 64)
    assert (without_interval["low"], without_interval["high"]) == ("", "")
    assert (failed["error"], failed["score"]) == ('a "broken", file', "")
    told = {(row["model"], row["metric"]): row for row in rows if row["origin"] != "measured"}
    assert len(told) == 6 * 3
    assert told["SAIL, 7.4M pairs", "text"]["score"] == "33.25"
    assert told["SAIL, 7.4M pairs", "text"]["origin"] == "reported: SAIL's table 2"
    assert {row["protocol"] for row in told.values()} == {WINOGROUND}


def test_csv_notes_unfinished_runs_and_other_sets(runs):
    (ours,) = runs(ours=[winoground(rows=798)])
    ours.content["run"]["unfinished"] = "unfinished: step 1 of 9"
    rows = list(csv.DictReader(io.StringIO(comma_separated(Overview([ours])))))
    assert {row["origin"] for row in rows} == {"measured, unfinished: step 1 of 9"}
    assert {row["note"] for row in rows} == {"winoground has 798 rows, not 800: its scores are of another set."}


def test_tables_omit_runs_without_scores(runs):
    other = [top1(f"t{number}") for number in range(WIDTH)]
    first, *_, last = Overview(runs(a=[winoground()], b=other)).panels
    assert [row.name for row in first.rows if row.kind == "run"] == ["a", "b"]
    assert [row.name for row in last.rows if row.kind == "run"] == ["b"]


def test_note_on_a_set_appears_once(runs):
    (ours,) = runs(ours=[winoground(rows=798), top1() | {"dataset": "winoground"} | winoground(rows=798)])
    assert score_table(ours.records).count("note: winoground has 798 rows, not 800") == 1


@pytest.mark.parametrize(
    ("value", "bounds", "said"), [(61.2, [60.8, 61.6], "61.2 ± 0.4"), (0.2, [0.1, 0.36], "0.20 ± 0.13")]
)
def test_interval_has_the_digits_of_its_score(runs, value, bounds, said):
    shown = Overview(runs(ours=[record("mmvp", "mmvp/a/b", [metric("pairs", value, interval=bounds)])]))
    assert rows_of(shown)["ours"].texts == [said]


def test_runs_have_unique_names_and_appear_once(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for path in paths:
        path.mkdir(parents=True)
        about = {"name": "run", "digest": "r" * 64, "unfinished": "unfinished: step 1 of 9"}
        scores = {"schema": SCHEMA, "run": about, "encoders": {}, "records": [top1()]}
        (path / "scores.json").write_text(json.dumps(scores))
    assert [run.name for run in RunScores.read_all(paths)] == [str(path) for path in paths]
    assert [run.name for run in RunScores.read_all([paths[0], tmp_path / "b" / ".." / "a" / "run"])] == ["run"]
    assert "run (unfinished: step 1 of 9)" in rows_of(Overview(RunScores.read_all(paths[:1])))
