"""Real photos under COCO's own annotations and under Karpathy's: two sets, two protocols, never one column."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sail_align.evaluate.compare import Comparison
from sail_align.evaluate.evaluator import evaluate_sets
from sail_align.evaluate.report.formats import score_table
from sail_align.evaluate.results.scores import RunScores
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest

MINI = Path(__file__).parents[2].parent / "shared" / "data" / "coco-mini"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MINI.is_dir(), reason="../shared/data/coco-mini is not there")]


class LetterText:
    """A stand-in: three counts of a text."""

    def __init__(self, identity):
        self.identity = identity

    def encode(self, texts, advance=lambda done: None):
        advance(len(texts))
        counts = [[len(text), text.lower().count("e") * 9, (text.count(" ") + 1) * 5] for text in texts]
        return torch.tensor(counts, dtype=torch.float32) / 50 - 0.8


@pytest.fixture
def coco(tmp_path):
    """The 80 captioned photos in COCO's layouts: Karpathy's test split has the last 60, val2017 all."""
    lines = [json.loads(line) for line in (MINI / "captions.jsonl").read_text().splitlines()]
    folder = tmp_path / "coco"
    for name in ("val2014", "val2017", "annotations"):
        (folder / name).mkdir(parents=True)
    images, annotations, karpathy = [], [], []
    for number, line in enumerate(lines):
        file = Path(line["image"]).name
        for name in ("val2014", "val2017"):
            shutil.copy(MINI / line["image"], folder / name / file)
        images.append({"id": number, "file_name": file})
        annotations += [
            {"id": 10 * number + i, "image_id": number, "caption": text}
            for i, text in enumerate([*line["captions"], "a sixth caption that does not count"])
        ]
        sentences = [{"raw": text} for text in line["captions"]]
        split = "val" if number < 20 else "test"
        karpathy.append({"filepath": "val2014", "filename": file, "split": split, "sentences": sentences})
    (folder / "annotations" / "captions_val2017.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": karpathy}))
    return tmp_path


@pytest.fixture
def records(world, run, coco, monkeypatch):
    """The packaged manifests' scores on that folder, by set and task."""
    from tests.evaluate.conftest import ColourVision

    def load(recorded, device="cpu", **_):
        return ColourVision() if recorded.spec.modality == "image" else LetterText(recorded)

    monkeypatch.setattr("sail_align.evaluate.models.load_recorded", load)
    sets = [find_manifest(name, str(coco)) for name in ("coco-karpathy", "coco-val2017")]
    sets += [(about.scored_as("representation"), root) for about, root in sets[:1]]
    scored = list(evaluate_sets(run, sets, features=world.folder / "features", quiet=True))
    assert [record.get("error") for record in scored] == [None, None, None]
    return {(record["dataset"], record["task"]): record for record in scored}


def test_both_sets_have_own_counts_protocols_and_digests(records):
    karpathy, own = records["coco-karpathy", "retrieval"], records["coco-val2017", "retrieval"]
    assert karpathy["protocol"] == "retrieval/any-positive@1/coco-karpathy/split=test/captions=all"
    assert own["protocol"] == "retrieval/any-positive@1/coco-val2017/split=val2017/captions=first-5"
    assert (karpathy["items"], karpathy["details"]["captions"], karpathy["data"]["expected_rows"]) == (60, 300, 5000)
    assert "note: coco-karpathy has 60 rows, not 5,000 and 300 captions, not 25,010" in score_table([karpathy])
    assert (own["items"], own["details"]["captions"]) == (80, 400)
    assert karpathy["data"]["digest"] != own["data"]["digest"]
    chance = {metric["name"]: metric["chance"] for metric in karpathy["metrics"]}
    assert chance["t2i_r1"] == pytest.approx(100 / 60)
    assert chance["t2i_median_rank"] == 30


def test_representation_has_its_own_record(records, run):
    record = records["coco-karpathy", "representation"]
    assert record["protocol"] == "representation/first-caption@1/coco-karpathy/split=test/captions=all"
    found = {metric["name"]: metric for metric in record["metrics"]}
    assert set(found) == {"knn_raw", "knn_aligned", "cka_raw", "cka_aligned"}
    assert found["knn_raw"]["chance"] == pytest.approx(1000 / 59)
    for metric in found.values():
        low, high = metric["interval"]
        assert low <= metric["value"] <= high
    kept = json.loads((run.path / "scores.json").read_bytes())["records"]
    assert [(each["dataset"], each["task"]) for each in kept] == list(records)


def test_different_splits_are_not_compared(records, run, tmp_path):
    """As if another run had scored val2017 under Karpathy's name."""
    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    scores = json.loads((other / "scores.json").read_bytes())
    scores.pop("digest")
    own = next(each for each in scores["records"] if each["dataset"] == "coco-val2017")
    scores["records"] = [{**own, "dataset": "coco-karpathy"}]
    (other / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(UserError, match=r"coco-karpathy .retrieval. was scored by two protocols, .*split=test"):
        Comparison.between(RunScores.read(run.path), RunScores.read(other))
