"""Alignment of a store's features before training, compared with a closed-form fit, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fakes import identity
from typer.testing import CliRunner

from sail_align.align.analysis import measure as measuring
from sail_align.align.analysis.measure import RowSample, measure_store
from sail_align.align.cli import app
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store

ASKED = {"rows": 8_192, "neighbours": 5, "held_out": 0.2, "seed": 0}


def typed(*words):
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.mark.slow
def test_recall_equals_that_of_a_cca_fit(make_store, tmp_path):
    path = make_store("photos", rows=600, bad=[3, 77])
    words = ["--features", path, "--out", tmp_path / "run", "--head", "cca", "--ridge", 2, "--held-out", 0.2]
    words += ["--image-power", 1, "--quiet"]
    assert typed("fit", *words).exit_code == 0
    fitted = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    (found,) = measure_store(Store.open(path), **ASKED)["measures"]
    assert (found["rows"], found["held_out"]) == (598, 120)
    assert found["t2i_r1"] == pytest.approx(fitted["t2i_r1"])
    assert found["i2t_r1"] == pytest.approx(fitted["i2t_r1"])
    assert found["t2i_interval"][0] < found["t2i_r1"] < found["t2i_interval"][1]
    assert found["chance"] == pytest.approx(100 / 120)


@pytest.mark.slow
def test_matching_captions_score_higher_than_shifted_ones(make_store):
    path = make_store("photos", rows=600, captions={"raw": (), "long": range(300)})
    store = Store.open(path)
    raw, long = measure_store(store, **ASKED)["measures"]
    assert (raw["caption"], raw["rows"], long["caption"], long["rows"]) == ("raw", 600, "long", 300)
    for found in (raw, long):
        assert found["mutual_knn"] > 10 * found["mutual_knn_chance"]
        assert 0.5 < found["cka"] < 1
        assert found["t2i_r1"] > 10 * found["chance"]
    array = store.text("raw")
    features, status = array.read()
    for shard in array.shards:
        span = slice(*array.span(shard))
        array.write(shard, np.roll(features, 7, axis=0)[span], status[span])
    shifted, _ = measure_store(Store.open(path), **ASKED)["measures"]
    assert shifted["mutual_knn"] < 3 * shifted["mutual_knn_chance"]
    assert abs(shifted["cka"]) < 0.1
    assert shifted["t2i_r1"] < 6 * shifted["chance"]


@pytest.mark.slow
def test_each_image_encoder_is_measured_with_each_caption(make_store):
    path = make_store("photos", captions={"raw": (), "long": ()})
    store = Store.open(path)
    same = identity("image", dim=12)
    array = store.add(replace(same, spec=replace(same.spec, id="other-image")))
    features, status = store.image("fake-image").read()
    for shard in array.shards:
        span = slice(*array.span(shard))
        array.write(shard, features[span], status[span])
    found = measure_store(Store.open(path), **ASKED)["measures"]
    assert [(each["image"], each["caption"]) for each in found] == [
        (image, caption) for image in ("fake-image", "other-image") for caption in ("raw", "long")
    ]
    assert found[0]["cka"] == found[2]["cka"]


@pytest.mark.slow
def test_sample_depends_on_its_seed_and_covers_whole_spans(make_store, monkeypatch):
    monkeypatch.setattr(measuring, "SPAN_ROWS", 16)
    store = Store.open(make_store("photos", rows=1_000, numbered=True))
    one, same, other = (RowSample.draw(store, 100, seed) for seed in (0, 0, 1))
    assert one.spans == same.spans != other.spans
    assert len(one.spans) == 7
    assert len(one.hashes) == sum(stop - start for start, stop in one.spans)
    numbers = one.read(store.image())[0][:, 0]
    assert numbers.tolist() == [row for span in one.spans for row in range(*span)]
    assert RowSample.draw(store, 5_000, 3).spans[-1] == (992, 1_000)


def test_command_prints_a_table_and_writes_json(make_store, tmp_path):
    path = make_store("photos")
    result = typed("measure", path, "--out", tmp_path / "measure.json")
    assert result.exit_code == 0, result.output
    header, _, line, about, _, following = result.output.splitlines()
    assert "mutual k-NN (chance)" in header
    assert [cell.strip() for cell in line.split("|")][1:5] == ["fake-image", "fake-text", "raw", "300"]
    assert about.startswith("300 of 300 rows, seed 0.")
    assert following == f"Next: sail-align fit --features {path}"
    content = json.loads((tmp_path / "measure.json").read_text())
    assert (content["format"], content["protocol"], content["held_out"]) == (1, "measure-1", 0.2)
    assert content["store_digest"] == Store.open(path).digest
    assert content["measures"][0]["rows"] == 300


def test_actual_sample_size_is_reported(make_store, tmp_path):
    path = make_store("photos", rows=600)
    result = typed("measure", path, "--rows", 300, "--out", tmp_path / "measure.json")
    _, _, line, about, *_ = result.output.splitlines()
    content = json.loads((tmp_path / "measure.json").read_text())
    drawn = content["rows"]
    assert drawn in (512, 256 + 600 % 256)
    assert about.startswith(f"{drawn} of 600 rows, seed 0.")
    assert f" {drawn} |" in line
    assert (content["measures"][0]["drawn"], content["measures"][0]["rows"]) == (drawn, drawn)


def test_command_rejects_stores_it_cannot_measure(make_store):
    few = typed("measure", make_store("few", rows=40)).exception
    assert isinstance(few, UserError)
    assert "have only 40 of 40 rows in common; 50 are needed" in str(few)
    for words in (["no.zarr"], ["--features", "no.zarr"]):
        assert "no.zarr is not a feature store" in str(typed("measure", *words).exception)
    assert str(typed("measure", "a", "--features", "b").exception) == "a and --features b are two stores. Give one."
    assert "The store is missing. Name one" in str(typed("measure").exception)
    assert "needs image and text features" in str(typed("measure", make_store("t", captions={})).exception)


def test_non_finite_features_and_unwritable_files_are_reported(make_store, poison, tmp_path):
    path = make_store("photos")
    sound = CliRunner().invoke(app, ["measure", str(path), "--out", str(tmp_path)])
    assert str(sound.exception) == f"--out is invalid: {tmp_path} is a folder. Name a file."
    (tmp_path / "file").write_text("")
    beyond = CliRunner().invoke(app, ["measure", str(path), "--out", str(tmp_path / "file" / "x.json")])
    assert "x.json cannot be written (File exists). Pass another --out." in str(beyond.exception)
    poison(path)
    result = CliRunner().invoke(app, ["measure", str(path)])
    assert str(result.exception) == (
        f"{path} contains NaN or inf in rows marked ok. Check it with `sail-extract verify`."
    )
