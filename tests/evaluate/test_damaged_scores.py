"""Damaged, older and unknown records of scores: one message each, and nothing else is lost."""

import errno
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sail_align.evaluate.cli import app
from sail_align.evaluate.compare import Comparison
from sail_align.evaluate.evaluator import evaluate_sets
from sail_align.evaluate.report.overview import Overview
from sail_align.evaluate.report.page import write_report
from sail_align.evaluate.results.scores import Record, RunScores
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest


@pytest.fixture
def squares(world):
    return world.class_folders("squares", [("red", "red"), ("green", "green")], {"kind": "classification"})


@pytest.fixture
def scored_run(world, run, squares):
    """Score the run on squares; return its folder."""
    list(evaluate_sets(run, [find_manifest(str(squares))], features=world.folder / "features", quiet=True))
    return run.path


def rewrite(folder, change, *, keep_digest=False):
    path = folder / "scores.json"
    scores = json.loads(path.read_bytes())
    if not keep_digest:
        scores.pop("digest")
    change(scores)
    path.write_text(json.dumps(scores))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_of_the_scores_is_noticed(scored_run, place, bit):
    path = scored_run / "scores.json"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[int(place * len(whole))] ^= 1 << bit
    try:
        path.write_bytes(changed)
        try:
            same = json.loads(changed) == json.loads(whole)  # a blank may become a line break
        except ValueError:
            same = False
        if same:
            assert RunScores.read(scored_run).records
        else:
            with pytest.raises(UserError, match=r"scores.json (is damaged|is invalid)"):
                RunScores.read(scored_run)
    finally:
        path.write_bytes(whole)


def test_scores_without_digests_are_read(scored_run):
    rewrite(scored_run, lambda scores: scores["records"][0].pop("outcomes_sha256"))
    scores = RunScores.read(scored_run)
    assert scores.outcomes(scores.records[0])
    assert len(Overview([scores]).panels) == 1


@pytest.mark.slow
def test_every_flipped_bit_of_the_outcomes_is_noticed(scored_run):
    scores = RunScores.read(scored_run)
    (record,) = scores.records
    path = record.file(scored_run, "outcomes")
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"Score squares again"):
            scores.outcomes(record)
    path.write_bytes(whole)
    assert scores.outcomes(record)


@pytest.mark.slow
@pytest.mark.parametrize("records", [{}, [1], [{}], None])
def test_records_of_another_form_are_damaged(scored_run, records):
    rewrite(scored_run, lambda scores: scores.update(records=records))
    with pytest.raises(UserError, match=r"scores.json is (damaged|invalid)"):
        RunScores.read(scored_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("records", 0, "metrics"), {}, r"records\[0\]\.metrics: got {}, expected a list"),
        (
            ("records", 0, "metrics", 0, "value"),
            "12",
            r"records\[0\]\.metrics\[0\]\.value: got '12', expected a number",
        ),
        (
            ("records", 0, "metrics", 0, "value"),
            float("nan"),
            r"metrics\[0\]\.value: got nan, expected a finite number",
        ),
        (("records", 0, "metrics", 0, "interval"), [1], r"interval: got \[1\], expected at least 2 entries"),
        (("records", 0, "metrics", 0, "unit"), "m", r"unit: got 'm', expected '%' or 'rank'"),
        (("records", 0, "stores"), {"images": "x"}, r"records\[0\]\.stores\.images: got 'x', expected a mapping"),
        (("records", 0, "details"), 3, r"records\[0\]\.details: got 3, expected a mapping"),
        (("records", 0, "details", "confusions"), [3], r"details\.confusions\[0\]: got 3, expected a mapping"),
        (("records", 0, "items"), 1 << 60, r"items: got 1152921504606846976, expected a number less than"),
        (("records", 0, "data"), {}, r"records\[0\]\.data\.digest: got no value"),
        (("run",), {}, r"run\.name: got no value"),
        (("encoders",), {"image": {}}, r"encoders\.image\.id: got no value"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_field_of_scores_is_named(scored_run, path, value, message):
    def change(scores):
        *above, last = path
        for name in above:
            scores = scores[name]
        scores[last] = value

    rewrite(scored_run, change)
    with pytest.raises(UserError, match=rf"scores\.json is invalid: .*{message}"):
        RunScores.read(scored_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    ["3", "[3]", '[{"title": "x"}]', '[{"title": "x", "right": 3, "pictures": [], "legend": []}]', "[" * 9_999],
)
def test_examples_of_another_form_are_damaged(scored_run, content):
    scores = RunScores.read(scored_run)
    scores.records[0].file(scored_run, "examples").write_text(content)
    with pytest.raises(UserError, match=r"is damaged: .* Remove it to leave the examples out"):
        scores.examples(scores.records[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("head", None, "no 'head'"),
        ("lr", "fast", "lr: got 'fast', expected a number"),
        ("stores", ["a", "b"], "shorter"),
    ],
)
def test_settings_of_another_form_are_named(scored_run, name, value, message):
    path = scored_run / "settings.json"
    changed = {**json.loads(path.read_bytes()), name: value}
    path.write_text(json.dumps({key: each for key, each in changed.items() if each is not None}))
    with pytest.raises(UserError, match=message):
        _ = RunScores.read(scored_run).summary


@pytest.mark.slow
def test_unknown_task_does_not_stop_the_report(scored_run):
    def add(scores):
        scores["records"].insert(0, {**scores["records"][0], "task": "telepathy", "dataset": "minds"})

    rewrite(scored_run, add)
    result = CliRunner().invoke(app, ["report", str(scored_run)])
    assert result.exit_code == 0, result.output
    assert "minds (telepathy) ERROR: this version has no such task. Update sail-align." in result.output
    assert "top-1" in result.output
    assert "telepathy" in (scored_run / "report.html").read_text()
    own = RunScores.read(scored_run)
    table = Comparison.between(own, own).table()
    assert "minds (telepathy) is not compared: this version has no such task" in table
    assert "top-1" in table


def test_metrics_are_compared_by_name(scored_run, tmp_path):
    first = RunScores.read(scored_run)

    def change(scores):
        metrics = scores["records"][0]["metrics"]
        metrics[:] = [*metrics[:0:-1], {**metrics[0], "name": "novel"}]  # reversed, the first one renamed

    rewrite(scored_run, change)
    second = RunScores.read(scored_run)
    comparison = Comparison.between(first, second)
    names = [metric["label"] for metric in first.records[0]["metrics"]]
    assert [each.label for each in comparison.differences] == names[1:]
    assert all(each.first == each.second for each in comparison.differences)
    (refusal,) = comparison.refusals
    assert refusal.startswith("squares (classification): not both runs have scores of top1, novel.")


def test_runs_without_a_common_metric_are_refused(scored_run):
    first = RunScores.read(scored_run)
    rewrite(scored_run, lambda scores: scores["records"][0].update(metrics=[]))
    with pytest.raises(UserError, match="not both runs have scores of"):
        Comparison.between(first, RunScores.read(scored_run))


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_failed_write_is_one_message(world, run, squares, monkeypatch, code):
    def fail(path, *_, **__):
        raise OSError(code, "no", str(path))

    monkeypatch.setattr("sail_align.evaluate.results.writer.write_atomically", fail)
    with pytest.raises(UserError, match=r"(No space is left for|cannot be written)") as failed:
        list(evaluate_sets(run, [find_manifest(str(squares))], features=world.folder / "features", quiet=True))
    assert "--out" not in str(failed.value)


def test_missing_file_of_a_set_is_named(world, run, squares, monkeypatch):
    def fail(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "captions.csv")

    monkeypatch.setattr("sail_align.evaluate.evaluator.EvaluationSet", fail)
    (record,) = evaluate_sets(run, [find_manifest(str(squares))], features=world.folder / "new", quiet=True)
    assert "captions.csv" in record.error


def test_full_disk_of_features_is_one_message(world, run, squares, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr("sail_align.evaluate.evaluator.EvaluationSet", fail)
    sets = [find_manifest(str(squares))]
    with pytest.raises(UserError, match=r"No space is left for .*features"):
        list(evaluate_sets(run, sets, features=world.folder / "features", quiet=True, stop_at_fault=True))


def test_report_that_cannot_be_written_is_one_message(scored_run, monkeypatch):
    def fail(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("sail_align.evaluate.report.page.write_atomically", fail)
    result = CliRunner().invoke(app, ["report", str(scored_run)])
    assert isinstance(result.exception, UserError)
    assert "report.html cannot be written (Permission denied). Change its permissions." in str(result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["{", "[1]", '{"kind": "train", "step": "x", "loss": null}', "\x00"])
def test_damaged_log_ends_the_curves(scored_run, line):
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1.0}) for step in range(3)]
    (scored_run / "metrics.jsonl").write_text("\n".join([*lines, line, ""]))
    assert CliRunner().invoke(app, ["report", str(scored_run)]).exit_code == 0
    assert np.char.count((scored_run / "report.html").read_text(), "<svg") > 0


@pytest.mark.parametrize("names", [{"dataset": "../../x"}, {"task": "/etc/x"}, {"dataset": "a\0"}])
def test_names_in_scores_do_not_lead_out_of_the_folder(tmp_path, names):
    record = Record({"dataset": "x", "task": "retrieval", "protocol": "p", **names})
    for kind in ("examples", "outcomes"):
        with pytest.raises(UserError, match=r"scores\.json is damaged"):
            record.file(tmp_path, kind)


@pytest.mark.slow
def test_scoring_again_writes_equal_bytes(world, run, squares):
    """Also in another process, whose hashes have another order."""
    caps = world.squares("caps", [("red", "red"), ("green", "green"), ("blue", "blue")], {"kind": "retrieval"})
    halves = world.halves("halves", [("red", "green"), ("blue", "red")], {"kind": "segmentation"})

    def score():
        sets = [find_manifest(str(path)) for path in (squares, caps, halves)]
        list(evaluate_sets(run, sets, features=world.folder / "features", quiet=True))
        write_report(run.path)
        return {path.relative_to(run.path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    first = score()
    assert {path.name for path in first} > {"scores.json", "report.html", "settings.json"}
    for again in range(4):  # safetensors draws a new order each time
        for name in ("scores.json", "outcomes", "examples"):
            gone = run.path / name
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        if again == 3:
            shutil.rmtree(world.folder / "features")
        assert score() == first
