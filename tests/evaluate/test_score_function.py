"""`sail_align.score`: the commands' function, and its result as text, HTML, dictionary and table."""

import json

import pytest

import sail_align
from sail_align.evaluate.results.scores import Record
from sail_align.evaluate.score import Scores
from sail_align.extract.errors import UserError


@pytest.fixture
def squares(world, run, monkeypatch, tmp_path):
    """A set for the run, which any path of a run stands for."""
    monkeypatch.setattr("sail_align.align.runs.checkpoint.load_run", lambda path: run)
    monkeypatch.setattr("sail_align.extract.manifest.packaged_manifests", dict)
    monkeypatch.chdir(tmp_path)
    return world.class_folders("squares", [("red", "red"), ("green", "green")], {"kind": "classification"})


@pytest.mark.slow
def test_scores_are_those_of_scores_json(squares, run, capfd):
    scores = sail_align.score(run.path, squares)
    out, err = capfd.readouterr()
    assert out == ""
    assert f"scoring {run.path} on squares\n" in err
    written = json.loads(scores.file.read_bytes())["records"]
    assert json.loads(json.dumps(scores.to_dict()["records"])) == written
    assert scores.metrics["squares (classification)"]["top1"] == 100.0
    assert scores.report.read_text().startswith("<!doctype html>")
    frame = scores.to_pandas()
    assert list(frame["metric"]) == [metric["name"] for metric in written[0]["metrics"]]
    assert list(frame["value"]) == [metric["value"] for metric in written[0]["metrics"]]
    assert frame["low"][0] == written[0]["metrics"][0]["interval"][0]
    assert " ".join(repr(scores).splitlines()[0].split()) == "data set task n metric score chance 95% interval"


@pytest.mark.slow
def test_a_named_task_and_protocol(squares, run, capfd):
    scores = sail_align.score(run.path, [str(squares)], task="classification", protocol="class-name", quiet=True)
    assert capfd.readouterr() == ("", "")
    assert scores.records[0]["protocol"].endswith("/templates={}")


@pytest.mark.slow
def test_without_sets_faults_are_in_the_result(squares, run, monkeypatch):
    broken = squares.parent / "red" / "0.png"
    broken.write_bytes(b"no image")
    scores = sail_align.score(run.path, manifest=[squares], quiet=True)
    assert list(scores.errors) == ["squares (classification)"]
    assert scores.metrics == {}
    with pytest.raises(UserError, match="squares"):
        sail_align.score(run.path, squares, quiet=True)


def test_nothing_to_score_is_an_empty_result(squares, run, capfd):
    scores = sail_align.score(run.path)
    assert repr(scores) == f"Scores: nothing was scored with {run.path}"
    assert "nothing to score: get one of these" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sets": "circles"}, "Manifest 'circles' is unknown"),
        ({"sets": 3}, "sets is invalid: got 3, expected a path or several."),
        ({"sets": []}, "sets is invalid: got an empty list"),
        ({"task": "retrieval"}, "task needs sets. Name those to score on."),
        ({"protocol": "x"}, "protocol needs sets. Name those to score on."),
        ({"sets": "a.yaml", "manifest": "b.yaml"}, "`manifest` adds to the packaged sets. Leave it out if you name"),
        ({"sets": "a.yaml", "task": "retrival"}, "Task kind 'retrival' is invalid"),
        ({"model": "open_clip:x@y", "run": "r"}, "`run` r and `model` open_clip:x@y exclude each other. Remove one."),
        ({"run": "missing"}, "missing is not a run. Train one with `sail-align fit`."),
    ],
)
def test_mistakes_name_the_argument(squares, options, message):
    with pytest.raises(UserError) as raised:
        sail_align.score(**options)
    assert str(raised.value).startswith(message)


def test_html_escapes_names_and_errors(tmp_path):
    label = {"name": "x", "label": "<i>R@1</i>", "value": 12.34, "chance": 0.5, "interval": [11, 13], "unit": "%"}
    about = {"dataset": "<script>alert(1)</script>", "task": "retrieval"}
    scores = Scores(
        tmp_path, [Record(**about, items=4, metrics=[label]), Record(dataset="b", task="t", error="<b>no</b>\x1b[1m")]
    )
    page = scores._repr_html_()
    assert "<script>" not in page
    assert "<i>" not in page
    assert "<b>" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; (retrieval)" in page
    assert "<td>12.3</td><td>0.50</td><td>11.0 – 13.0</td>" in page
    assert "<td>error</td><td>&lt;b&gt;no&lt;/b&gt;\\x1b[1m</td>" in page
