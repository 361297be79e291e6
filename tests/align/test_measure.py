"""What a store's features tell before training, against a fit of the same closed form, and as typed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fakes import identity
from typer.testing import CliRunner

from sail_align.align.analysis import measure as measuring
from sail_align.align.analysis.measure import Sample, measure
from sail_align.align.cli import app
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store

ASKED = {"rows": 8_192, "neighbours": 5, "held_out": 0.2, "seed": 0}


def typed(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def test_the_closed_forms_recall_is_that_of_a_fit_with_the_same_rows_held_out(make_store, tmp_path):
    path = make_store("photos", rows=600, bad=[3, 77])
    words = ["fit", "--features", path, "--out", tmp_path / "run", "--head", "cca", "--held-out", 0.2, "--quiet"]
    assert typed(*words).exit_code == 0
    fitted = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    (found,) = measure(Store.open(path), **ASKED)
    assert (found.rows, found.held_out) == (598, 120)
    assert found.t2i_r1 == pytest.approx(fitted["t2i_r1"])
    assert found.i2t_r1 == pytest.approx(fitted["i2t_r1"])
    assert found.t2i_interval[0] < found.t2i_r1 < found.t2i_interval[1]
    assert found.chance == pytest.approx(100 / 120)


def test_captions_that_belong_are_told_from_those_that_do_not(make_store):
    path = make_store("photos", rows=600, captions={"raw": (), "long": range(300)})
    store = Store.open(path)
    raw, long = measure(store, **ASKED)
    assert (raw.caption, raw.rows, long.caption, long.rows) == ("raw", 600, "long", 300)
    for found in (raw, long):
        assert found.mutual_knn > 10 * found.mutual_knn_chance
        assert 0.5 < found.cka < 1
        assert found.t2i_r1 > 10 * found.chance
    array = store.text("raw")
    features, status = array.read()
    for shard in array.shards:
        span = slice(*array.span(shard))
        array.write(shard, np.roll(features, 7, axis=0)[span], status[span])
    shifted, _ = measure(Store.open(path), **ASKED)
    assert shifted.mutual_knn < 3 * shifted.mutual_knn_chance
    assert abs(shifted.cka) < 0.1
    assert shifted.t2i_r1 < 6 * shifted.chance


def test_every_image_encoder_is_paired_with_every_text(make_store):
    path = make_store("photos", captions={"raw": (), "long": ()})
    store = Store.open(path)
    same = identity("image", dim=12)
    array = store.add_image(replace(same, spec=replace(same.spec, id="other-image")))
    features, status = store.image("fake-image").read()
    for shard in array.shards:
        span = slice(*array.span(shard))
        array.write(shard, features[span], status[span])
    found = list(measure(Store.open(path), **ASKED))
    assert [(each.image, each.caption) for each in found] == [
        (image, caption) for image in ("fake-image", "other-image") for caption in ("raw", "long")
    ]
    assert found[0].cka == found[2].cka


def test_a_sample_is_of_stretches_from_anywhere_and_known_by_its_seed(make_store, monkeypatch):
    monkeypatch.setattr(measuring, "SPAN_ROWS", 16)
    store = Store.open(make_store("photos", rows=1_000, numbered=True))
    one, same, other = (Sample.draw(store, 100, seed) for seed in (0, 0, 1))
    assert one.spans == same.spans != other.spans
    assert len(one.spans) == 7
    assert len(one.hashes) == sum(stop - start for start, stop in one.spans)
    numbers = one.read(store.image())[0][:, 0]
    assert numbers.tolist() == [row for span in one.spans for row in range(*span)]
    assert Sample.draw(store, 5_000, 3).spans[-1] == (992, 1_000)


def test_the_command_prints_a_table_and_writes_json(make_store, tmp_path):
    path = make_store("photos")
    result = typed("measure", path, "--out", tmp_path / "measure.json")
    assert result.exit_code == 0, result.output
    header, _, line, about, _, following = result.output.splitlines()
    assert "mutual k-NN (chance)" in header
    assert line.startswith("| fake-image | fake-text | raw     |  300 |        0.")
    assert about.startswith("300 of 300 rows, seed 0.")
    assert following == f"Next: sail-align fit --features {path}"
    content = json.loads((tmp_path / "measure.json").read_text())
    assert (content["format"], content["protocol"], content["held_out"]) == (1, "measure-1", 0.2)
    assert content["store_digest"] == Store.open(path).digest
    assert content["measures"][0]["rows"] == 300


def test_what_was_looked_at_is_said_where_whole_stretches_are_not_what_was_asked_for(make_store, tmp_path):
    path = make_store("photos", rows=600)
    result = typed("measure", path, "--rows", 300, "--out", tmp_path / "measure.json")
    _, _, line, about, *_ = result.output.splitlines()
    content = json.loads((tmp_path / "measure.json").read_text())
    drawn = content["rows"]
    assert drawn in (512, 256 + 600 % 256)
    assert about.startswith(f"{drawn} of 600 rows, seed 0.")
    assert f" {drawn} |" in line
    assert (content["measures"][0]["drawn"], content["measures"][0]["rows"]) == (drawn, drawn)


def test_what_cannot_be_measured_is_a_sentence(make_store):
    few = typed("measure", make_store("few", rows=40)).exception
    assert isinstance(few, UserError)
    assert "have 40 of 40 rows together, and it takes 50" in str(few)
    for words in (["no.zarr"], ["--features", "no.zarr"]):
        assert "no.zarr is not a feature store" in str(typed("measure", *words).exception)
    assert str(typed("measure", "a", "--features", "b").exception) == "a and --features b are two stores; give one."
    assert "There is no store to measure; name one" in str(typed("measure").exception)
    assert "has not both image and text features" in str(typed("measure", make_store("t", captions={})).exception)


def test_values_that_are_no_numbers_are_refused_and_files_that_cannot_be_written_said(make_store, poison, tmp_path):
    path = make_store("photos")
    sound = CliRunner().invoke(app, ["measure", str(path), "--out", str(tmp_path)])
    assert str(sound.exception) == f"--out {tmp_path} is a folder; name a file."
    (tmp_path / "file").write_text("")
    beyond = CliRunner().invoke(app, ["measure", str(path), "--out", str(tmp_path / "file" / "x.json")])
    assert "x.json cannot be written (File exists). Pass another --out." in str(beyond.exception)
    poison(path)
    result = CliRunner().invoke(app, ["measure", str(path)])
    assert str(result.exception) == (
        f"{path} contains NaN or inf in rows marked ok. Check it with `sail-extract verify`."
    )
