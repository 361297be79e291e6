"""Retrieval by corrected similarities: a protocol of its own beside the cosine's, where a run has a correction."""

import json

import numpy as np
import pytest
import torch

from sail_align.align.model.correction import Bank
from sail_align.evaluate.compare import Comparison
from sail_align.evaluate.evaluator import evaluate_sets
from sail_align.evaluate.report.formats import score_table, text
from sail_align.evaluate.report.overview import Overview
from sail_align.evaluate.report.page import write_report
from sail_align.evaluate.results.scores import RunScores
from sail_align.evaluate.score import Scores
from sail_align.evaluate.tasks.retrieval import TASK
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest

ROWS = [("red", "red"), ("green", "green"), ("blue", "blue"), ("pink", "red blue green")]


@pytest.fixture
def corrected(run):
    """Give the run a bank of three colours."""
    bank = Bank(3, 3)
    bank.fill(
        torch.tensor([[1.0, 1, -1], [1, -1, 1], [-1, 1, 1]]), torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 1, 0]]), 5
    )
    model = run.model
    model.correction = bank
    model.corrected_image = lambda features: bank.extend(features, "image")
    model.corrected_text = lambda features: bank.extend(features, "text")
    return run


def score(world, run, manifest):
    return list(evaluate_sets(run, [find_manifest(str(manifest))], features=world.folder / "features", quiet=True))


@pytest.mark.slow
def test_both_protocols_are_scored(world, corrected):
    manifest = world.squares("caps", ROWS, {"kind": "retrieval"})
    records = score(world, corrected, manifest)
    assert [record["protocol"] for record in records] == [
        "retrieval/any-positive@1/caps/captions=all",
        "retrieval/any-positive@1/caps/similarity=hub-corrected/captions=all",
    ]
    assert [record.name for record in records] == ["caps (retrieval)", "caps, hub-corrected (retrieval)"]
    assert list(Scores(corrected.path, records).metrics) == [record.name for record in records]
    assert "caps, hub-corrected" in score_table(records)
    score(world, corrected, manifest)  # replaces both
    written = json.loads((corrected.path / "scores.json").read_bytes())["records"]
    assert [record["protocol"] for record in written] == [record["protocol"] for record in records]
    scores = RunScores.read(corrected.path)
    assert "caps, hub-corrected" in text(Overview([scores]))
    assert "caps, hub-corrected" in write_report(corrected.path).read_text()
    comparison = Comparison.between(scores, scores)
    assert len({each.protocol for each in comparison.differences}) == 2
    assert "caps, hub-corrected" in comparison.table()
    content = {**scores.content, "records": [{**each, "variants": []} for each in scores.content["records"]]}
    comparison = Comparison.between(RunScores(scores.path, scores.name, content), scores)  # earlier ones name none
    assert len({each.protocol for each in comparison.differences}) == 2
    assert not comparison.refusals


@pytest.mark.slow
def test_ranks_are_those_of_the_corrected_similarity(world, corrected):
    data = world.open(world.squares("caps", ROWS, {"kind": "retrieval", "variants": ["hub-corrected"]}))
    found = TASK.evaluate(data).outcomes
    bank = corrected.model.correction

    def corrections(embeddings, bank_vectors):
        return np.log(np.exp(5 * embeddings @ bank_vectors.double().numpy().T).mean(axis=1)) / 5

    x, y = (each.astype(np.float64) for each in (data.images(), data.texts().embeddings))
    scores = x @ y.T - corrections(x, bank.text_vectors)[:, None] - corrections(y, bank.image_vectors)
    right = np.diag(scores)
    np.testing.assert_array_equal(found["image_rank"], (scores >= right[:, None] - 1e-6).sum(axis=1) - 1)
    np.testing.assert_array_equal(found["text_rank"], (scores >= right - 1e-6).sum(axis=0) - 1)
    assert (scores.argmax(axis=1) != (x @ y.T).argmax(axis=1)).any(), "this bank changes nothing"


@pytest.mark.slow
def test_without_a_correction(world, run):
    run.model.require_correction = lambda: None
    manifest = world.squares("caps", ROWS, {"kind": "retrieval"})
    assert len(score(world, run, manifest)) == 1
    about, _ = find_manifest(str(manifest))
    with pytest.raises(UserError, match="expected hub-corrected"):
        TASK.variant(about, "hub-correct")


def test_an_error_is_recorded_once(world, corrected):
    manifest = world.squares("caps", ROWS, {"kind": "retrieval"})
    (manifest.parent / "images" / "000.png").write_bytes(b"no image")
    assert [record.name for record in score(world, corrected, manifest)] == ["caps (retrieval)"]
