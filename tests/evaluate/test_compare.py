"""Runs beside each other: the same items drawn for both, and never another protocol's."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from sail_align.align.stats.bootstrap import weighted_mean
from sail_align.evaluate.cli import app
from sail_align.evaluate.compare import Comparison, Difference, paired_difference
from sail_align.evaluate.evaluator import evaluate_sets
from sail_align.evaluate.results.metric import Metric
from sail_align.evaluate.results.scores import RunScores
from sail_align.evaluate.tasks import retrieval
from sail_align.evaluate.tasks.task import find_task
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest


def share(hits):
    return [Metric("hits", "hits", 0.5, lambda drawn: weighted_mean(hits, drawn))]


def test_paired_interval_equals_a_loop_over_the_same_draws():
    generator = np.random.default_rng(0)
    first, second = generator.random(60) < 0.5, generator.random(60) < 0.7
    [(bounds, p)] = paired_difference(share(first), share(second), 60)
    draws, differences = np.random.default_rng(0), []
    for _ in range(1000):
        rows = draws.integers(60, size=60)
        differences.append(100 * (second[rows].mean() - first[rows].mean()))
    assert bounds == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))
    below, above = (sum(side) for side in zip(*((d <= 1e-9, d >= -1e-9) for d in differences), strict=True))
    assert p == pytest.approx(2 * (min(below, above) + 1) / 1001, abs=0.01)


def test_draws_without_a_value_do_not_lower_p():
    """One of three images has a caption, so about three in ten draws contain no query and do not count."""
    first, second = (
        retrieval.TASK.metrics(
            {"image_rank": np.array([rank, 1, 1]), "text_rank": np.array([rank]), "owner": np.array([0])}
        )[:1]
        for rank in (0, 1)
    )
    generator = np.random.default_rng(0)
    asked = sum(0 in generator.integers(3, size=3) for _ in range(1000))
    assert 600 < asked < 800
    assert paired_difference(first, second, 3) == [((-100.0, -100.0), pytest.approx(2 / (asked + 1)))]


@pytest.mark.slow
def test_saved_outcomes_reproduce_the_scores(scored):
    """To the digit, though integers are kept in the smallest type that holds them."""
    scores = RunScores.read(scored)
    assert len(scores.records) == 4
    for record in scores.records:
        metrics = find_task(record["task"]).metrics(scores.outcomes(record))
        values = [metric.compute(np.ones(record["items"])) * metric.scale for metric in metrics]
        assert values == [metric["value"] for metric in record["metrics"]]


def test_run_does_not_differ_from_itself():
    hits = np.arange(40) % 3 == 0
    assert paired_difference(share(hits), share(hits), 40) == [((0.0, 0.0), 1.0)]


def test_paired_difference_is_significant_where_intervals_overlap():
    """Two models of 60 and 62 right of 100, whose intervals overlap; on no item is the second behind the first."""
    [((low, _), p)] = paired_difference(share(np.arange(100) < 50), share(np.arange(100) < 58), 100)
    assert low > 0
    assert p < 0.01


def compare(first, second):
    return Comparison.between(RunScores.read(first.path), RunScores.read(second.path))


@pytest.fixture
def two_runs(world, run):
    """A run scored on squares and captions, and another that prefers other colours."""
    other_path = run.path.with_name("colours-other")
    shutil.copytree(run.path, other_path)
    model = type(run.model)()
    model.encode_image = lambda features: run.model.encode_image(features.flip(-1))
    other = replace(run, path=other_path, model=model, digest="e" * 64)
    squares = world.class_folders(
        "squares", [("red", "red"), ("green", "green"), ("blue", "blue")], {"kind": "classification"}
    )
    caps = world.squares("caps", [("red", "red"), ("green", "green"), ("blue", "blue")], {"kind": "retrieval"})

    def score(which, *manifests):
        sets = [find_manifest(str(path)) for path in manifests]
        for record in evaluate_sets(which, sets, features=world.folder / "features", quiet=True):
            assert "error" not in record

    score(run, squares, caps)
    score(other, squares, caps)
    return run, other, squares, score


@pytest.mark.slow
def test_differences_cover_all_common_sets(two_runs):
    run, other, _, _ = two_runs
    comparison = compare(run, other)
    found = {(each.dataset, each.label): each for each in comparison.differences}
    assert found["squares", "top-1"].first == 100
    assert found["squares", "top-1"].second == pytest.approx(100 / 3)
    assert found["caps", "text→image median rank"].unit == "rank"
    assert comparison.refusals == []
    table = comparison.table()
    assert table.splitlines()[0].split()[:4] == ["data", "set", "metric", "first"]
    assert "−66.7" in table
    assert "(less is better)" in table


def test_differences_have_signs():
    drawn = (-3.04, -0.26), (-1.2, 0.04), (-0.04, 1.0)
    found = [
        Difference("x", "p", "top-1", "%", 50.0, 50.0 + by, bounds, 0.5)
        for by, bounds in zip((-1.6, -0.004, 0.0), drawn, strict=True)
    ]
    lines = Comparison(found, []).table().splitlines()[2:]
    assert [re.split(r"\s{2,}", line.strip())[-3:-1] for line in lines] == [
        ["−1.6", "−3.0 – −0.3"],
        ["+0.00", "−1.20 – +0.04"],
        ["+0.0", "+0.0 – +1.0"],
    ]


@pytest.mark.slow
def test_compare_marks_unfinished_runs(two_runs):
    run, other, _, _ = two_runs
    path = other.path / "scores.json"
    scores = json.loads(path.read_bytes())
    scores.pop("digest")
    path.write_text(json.dumps({**scores, "run": {**scores["run"], "unfinished": "unfinished: step 84 of 139"}}))
    output = CliRunner().invoke(app, ["compare", str(run.path), str(other.path)]).output
    assert output.startswith(f"first: {run.path}, second: {other.path} (unfinished: step 84 of 139)\n")


@pytest.mark.slow
def test_different_protocols_are_not_compared(two_runs):
    run, other, squares, score = two_runs
    (other.path / "scores.json").unlink()
    squares.write_text(squares.read_text().replace("kind: classification", "kind: classification\n  templates: ['{}']"))
    score(other, squares)
    with pytest.raises(UserError, match=r"squares \(classification\) was scored by two protocols, .*photo.* and .*{}"):
        compare(run, other)


@pytest.mark.slow
def test_runs_without_a_common_set_are_rejected(two_runs):
    run, other, _, _ = two_runs
    for which, tasks in ((run, {"classification"}), (other, {"retrieval", "representation"})):
        scores = RunScores.read(which.path).content
        kept = [record for record in scores["records"] if record["task"] in tasks]
        (which.path / "scores.json").write_text(json.dumps({**scores, "records": kept}))
    with pytest.raises(UserError) as refused:
        compare(run, other)
    one, two = f"{run.path} (scored on squares (classification))", f"{other.path} (on caps (retrieval))"
    assert str(refused.value) == f"{one} and {two} have no set in common. Score both on one with `sail-eval`."


@pytest.mark.slow
def test_different_data_are_not_compared(two_runs):
    run, other, _, _ = two_runs
    path = other.path / "scores.json"
    scores = json.loads(path.read_bytes())
    scores.pop("digest")
    scores["records"][0]["data"]["digest"] = "f" * 64
    path.write_text(json.dumps(scores))
    comparison = compare(run, other)
    assert {each.dataset for each in comparison.differences} == {"caps"}
    assert "squares (classification) had other data" in comparison.table()


@pytest.mark.slow
def test_outcomes_of_another_evaluation_are_rejected(two_runs):
    run, other, _, _ = two_runs
    for file in (other.path / "outcomes").iterdir():
        shutil.copy(run.path / "outcomes" / file.name, file)
    with pytest.raises(UserError, match=r"is of another evaluation than the scores\. Score squares again"):
        compare(run, other)
    shutil.rmtree(other.path / "outcomes")
    with pytest.raises(UserError, match="is missing, but a comparison needs it"):
        compare(run, other)
