"""Cached features, scores and identity of a set when files are damaged, changed or shared."""

import threading
from itertools import product

import numpy as np
import pytest
from PIL import Image

from sail_align.evaluate.evaluator import evaluate_sets
from sail_align.evaluate.report.formats import score_table
from sail_align.evaluate.results import writer
from sail_align.evaluate.results.scores import Record, RunScores
from sail_align.evaluate.tasks.task import find_task
from sail_align.extract.errors import UserError, WorkersFailedError
from sail_align.extract.manifest import find_manifest

DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "gone": None,
    "a bit": lambda content: content[: (at := len(content) // 3)] + bytes([content[at] ^ 64]) + content[at + 1 :],
}
REMEDIES = ("Remove that folder", "rerun the extraction", "exists and is not a feature store")


@pytest.fixture
def score(world, run):
    def score(*manifests, **options):
        sets = [find_manifest(str(path)) for path in manifests]
        return list(evaluate_sets(run, sets, features=world.folder / "features", quiet=True, **options))

    return score


@pytest.fixture
def caps(world):
    rows = [("red", ["red", "cyan"]), ("green", ["green", "pink"]), ("blue", ["blue"])]
    return world.squares("caps", rows, {"kind": "retrieval"}, captions="caption")


@pytest.fixture
def squares(world):
    return world.class_folders("squares", [("red", "red"), ("green", "green")], {"kind": "classification"})


@pytest.mark.slow
def test_damaged_features_are_never_scored(world, caps):
    """Every file of both stores, damaged in four ways: the same embeddings, or a sentence."""

    def embeddings_or_sentence():
        data = world.open(caps)
        try:
            return np.concatenate([data.images(), data.texts().embeddings]), ""
        except UserError as problem:
            return None, str(problem)

    right, _ = embeddings_or_sentence()
    stores = [*(world.folder / "features" / "eval").iterdir()]
    files = [file for store in stores for file in store.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(stores) == 2
    assert len(files) > 15
    mended = 0
    for file, (name, damage) in product(files, DAMAGE.items()):
        content = file.read_bytes()
        file.write_bytes(damage(content)) if damage else file.unlink()
        found, said = embeddings_or_sentence()
        if said:
            assert any(remedy in said for remedy in REMEDIES), (file, name, said)
        else:
            np.testing.assert_array_equal(found, right, err_msg=f"{file} {name}")
            mended += 1
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert mended > len(files)


@pytest.mark.slow
def test_damaged_store_fails_only_its_set(world, score, caps, squares):
    score(caps)
    (metadata,) = (world.folder / "features" / "eval").glob("caps-captions-*/text/*/text/features/zarr.json")
    metadata.write_text("{")
    damaged, whole = score(caps, squares)
    assert f"{metadata.parents[4]} cannot be used (" in damaged["error"]
    assert damaged["error"].endswith(". Remove that folder.")
    assert whole["metrics"][0]["value"] == 100


def test_source_captions_are_not_read_per_sample(world, caps):
    """Some sources count the captions of all their samples for it: quadratic, 20 s for the 5,000 images of COCO."""
    data, asked = world.open(caps), []

    class Counting(type(data.source)):
        @property
        def captions(self):
            asked.append(1)
            return super().captions

    data.source.__class__ = Counting
    assert len(data.samples) == 3
    assert len(asked) <= 3


def test_duplicate_samples_are_rejected(world, monkeypatch):
    """Segmentation keeps no store of images, which would refuse it."""
    data = world.open(world.halves("seg", [("red", "green")], {"kind": "segmentation"}))
    samples = list(data.source.samples())
    monkeypatch.setattr(data.source, "samples", lambda: iter(2 * samples))
    with pytest.raises(UserError, match=r"seg has two samples with the key '000\.png'"):
        find_task("segmentation").score(data)


@pytest.mark.slow
def test_failing_encoder_fails_only_its_set(world, score, caps, squares, monkeypatch):
    text = type(world.open(caps).encoders.text)
    encode = text.encode

    def fail(self, texts, *told):
        if any("cyan" in text for text in texts):
            raise RuntimeError("no kernel image is available")
        return encode(self, texts, *told)

    monkeypatch.setattr(text, "encode", fail)
    broken, whole = score(caps, squares)
    assert "no kernel image is available" in broken["error"]
    assert whole["metrics"][0]["value"] == 100
    with pytest.raises(WorkersFailedError) as failed:
        score(caps, stop_at_fault=True)
    assert failed.value.__cause__ is not failed.value


@pytest.mark.slow
def test_changed_masks_change_the_data_digest(world, score, run, tmp_path):
    manifest = world.halves("seg", [("red", "green")], {"kind": "segmentation"})
    (first,) = score(manifest)
    assert score(manifest)[0]["data"] == first["data"]
    path = tmp_path / "seg" / "masks" / "000.png"
    mask = np.array(Image.open(path))
    mask[5] = 255
    Image.fromarray(mask).save(path)
    (second,) = score(manifest)
    assert second["protocol"] == first["protocol"]
    assert second["data"]["digest"] != first["data"]["digest"]


@pytest.mark.slow
def test_ties_are_wrong_in_examples(world):
    """Two equal images: either caption's own image is not ahead of the other."""
    manifest = world.squares("twins", [("red", "red"), ("red", "red or so")], {"kind": "retrieval"})
    result = find_task("retrieval").score(world.open(manifest))
    assert [example.right for example in result.examples] == [False, False]
    assert [example.pictures[1].mark for example in result.examples] == ["right", "right"]
    classes = world.class_folders("same", [("red like", "red"), ("red as", "red")], {"kind": "classification"})
    result = find_task("classification").score(world.open(classes))
    assert [example.right for example in result.examples] == [False, False]


def test_similar_templates_have_different_protocol_ids(world):
    ids = set()
    templates = ["a photo of {}", "a photo-of {}", "a photo  of {}", "a photo of {} ", "a/photo of {}"]
    for number, template in enumerate(templates):
        task = {"kind": "classification", "templates": [template]}
        data = world.open(world.class_folders(f"c{number}", [("red", "red")], task))
        ids.add(find_task("classification").protocol_id(data).split("/templates=")[1])
    assert "a-photo-of-{}" in ids
    assert len(ids) == len(templates)


def test_concurrent_writers_lose_no_record(run, monkeypatch):
    write = writer.write_atomically
    monkeypatch.setattr(writer, "write_atomically", lambda *given: (threading.Event().wait(0.02), write(*given)))
    records = [{"dataset": f"set-{number}", "task": "retrieval", "error": "x"} for number in range(8)]
    threads = [threading.Thread(target=writer.ScoreWriter(run).merge, args=(Record(record),)) for record in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = RunScores.read(run.path).records
    assert sorted(record["dataset"] for record in found) == [record["dataset"] for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_scores_are_rejected(run, score, squares, content):
    path = run.path / "scores.json"
    path.write_text(content)
    for read in (lambda: score(squares), lambda: RunScores.read(run.path)):
        with pytest.raises(UserError, match=r"scores.json is damaged: .* Remove it and evaluate again"):
            read()


def test_files_left_out_are_recorded(world):
    path = world.class_folders("squares", [("a", "red"), ("b", "green")], {"kind": "classification"})
    assert "left_out" not in world.open(path).describe("")
    (path.parent / "a" / "notes.txt").write_text("no image")
    (path.parent / "a" / "0.png").rename(path.parent / "0.png")
    (path.parent / "a" / "1.png").write_bytes((path.parent / "0.png").read_bytes())
    data = world.open(path).describe("")
    assert data["left_out"] == {".png outside the class folders": 1, ".txt": 1}
    record = Record(dataset="squares", task="classification", items=2, metrics=[], data=data)
    note = "note: squares: 2 files are left out: 1 .png outside the class folders, 1 .txt."
    assert score_table([record]).splitlines()[-1] == note
