"""Features that were computed elsewhere, from import to scores: with encoders that are named, and without."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from released_file import save_encoders
from small_world import SHADES, captions_of, draw, write_captioned
from typer.testing import CliRunner

from sail_align.align import pretrained
from sail_align.align.cli import app as align
from sail_align.align.hub import embeddings
from sail_align.align.runs.checkpoint import load_run
from sail_align.evaluate.cli import app as evaluate
from sail_align.extract.cli import app as extract
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store

ROWS = 60


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Pictures, and a table of their features: those of two tiny encoders, computed without a store."""
    root = tmp_path_factory.mktemp("outside")
    folders = save_encoders(root / "encoders")
    image = ImageEncoderConfig(f"hf:{folders[0]}", pooling="cls").load()
    text = TextEncoderConfig(f"hf:{folders[1]}", pooling="mean").load()
    pictures = [draw(row, list(SHADES.values())[row % 5]) for row in range(ROWS)]
    (root / "images").mkdir()
    for row, picture in enumerate(pictures):
        picture.save(root / "images" / f"{row}.png")
    captions = [captions_of(row)[0] for row in range(ROWS)]
    image_ND = image.encode(torch.stack([image.preprocess(each) for each in pictures])).numpy()
    text_ND = text.encode(captions).numpy()
    table = {"image_path": [f"{row}.png" for row in range(ROWS)], "caption": captions}
    columns = {
        "image_embedding": image_ND,
        "image_unit": image_ND / np.linalg.norm(image_ND, axis=1, keepdims=True),
        "image_shifted": np.roll(image_ND, 1, axis=0),
        "image_failed": np.where(np.arange(ROWS)[:, None] % 5 == 0, 0, image_ND),
        "text_embedding": text_ND,
    }
    lists = {name: pa.array(list(values)) for name, values in columns.items()}
    pq.write_table(pa.table({**table, **lists}), root / "all.parquet")
    return root, [f"hf:{folder}" for folder in folders]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def imported(outside, *words, vector="image_embedding"):
    file = outside[0] / "all.parquet"
    common = ["--image-features", file, "--text-features", file, "--image-vector", vector, "--device", "cpu"]
    both = [*common, "--text-vector", "text_embedding", "--out", "x.zarr", "--quiet"]
    return CliRunner().invoke(extract, ["import", *map(str, [*both, *words])])


def encoders(outside):
    image, text = outside[1]
    named = ["--image-encoder", image, "--image-pooling", "cls", "--text-encoder", text, "--text-pooling", "mean"]
    return [*named, "--images", outside[0] / "images"]


def fit():
    words = ["fit", "--features", "x.zarr", "--head", "linear", "--steps", "3", "--out", "runs/x", "--device", "cpu"]
    result = CliRunner().invoke(align, [*words, "--start", "random", "--quiet"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


@pytest.mark.slow
def test_run_on_features_of_named_encoders_is_scored_and_exported(outside, tmp_path):
    result = imported(outside, *encoders(outside))
    assert result.exit_code == 0, result.output + repr(result.exception)
    for side, what in (("image", "images"), ("text", "texts")):
        line = f"{side} features agree with their encoder: mean cosine 1.0000 with 32 {what} encoded again"
        assert line in result.output
    store = Store.open("x.zarr")
    assert store.image().identity.golden
    fit()
    manifest = write_captioned(tmp_path / "test")
    scored = CliRunner().invoke(evaluate, ["retrieval", str(manifest), "--run", "runs/x", "--device", "cpu"])
    assert scored.exit_code == 0, scored.output + repr(scored.exception)
    assert CliRunner().invoke(align, ["export", "runs/x", "--out", "hub"]).exit_code == 0
    traced = CliRunner().invoke(evaluate, ["trace", "runs/x"])
    assert traced.exit_code == 0, traced.output
    assert re.search(r"not here +imported files of all: recorded all.parquet [0-9a-f]{12}", traced.output)
    model = pretrained.load("runs/x", device="cpu")
    heads = model.run.model
    with torch.no_grad():
        expected = heads.encode_text(torch.from_numpy(store.text("raw").read(0, 3)[0]))
    torch.testing.assert_close(model.encode_text([captions_of(row)[0] for row in range(3)]), expected)
    verified = CliRunner().invoke(extract, ["verify", "x.zarr"])
    assert verified.output.count("reproduces its golden vector") == 2
    assert verified.exit_code == 0


def test_normalised_features_are_accepted_and_recorded(outside):
    output = imported(outside, *encoders(outside), vector="image_unit").output
    assert "note: the image features are L2-normalised." in output
    record = Store.open("x.zarr").attributes["manifest"]["source"]["encoders"]
    assert record["image"]["compared"] == {"rows": 32, "cosine": 1.0, "norms": "unit-norm"}
    assert record["text"]["compared"]["norms"] == "as encoded"


def test_rows_of_zeros_are_not_compared(outside):
    result = imported(outside, *encoders(outside), vector="image_failed")
    assert result.exit_code == 0, repr(result.exception)
    assert "warning: 12 rows of image features are all zeros, as some programs write for failures." in result.output
    assert "image features agree with their encoder: mean cosine 1.0000 with 32 images encoded again" in result.output


def test_features_of_another_encoder_are_refused_with_their_cosine(outside):
    message = str(imported(outside, *encoders(outside), vector="image_shifted").exception)
    found = re.search(r"got a mean cosine of (\S+) with 32 images encoded again, expected at least 0.99", message)
    assert float(found[1]) < 0.99
    assert "The least similar is '" in message
    message = str(imported(outside, "--image-encoder", outside[1][0], "--image-pooling", "cls+mean").exception)
    assert "got 24 dimensions, expected 48" in message
    assert not Path("x.zarr").exists()


def test_missing_images_are_reported_before_the_store_is_made(outside, tmp_path):
    words = encoders(outside)
    (tmp_path / "empty").mkdir()
    message = str(imported(outside, *words[:-1], "empty").exception)
    assert message.startswith("None of 60 images can be opened; the first is '0.png'")
    assert not Path("x.zarr").exists()
    output = imported(outside, *words[:4]).output
    assert "note: the image features were not compared with their encoder. Pass --images to do that." in output


def test_unknown_encoders_allow_all_that_needs_features_only(outside):
    assert imported(outside).exit_code == 0
    output = fit()
    assert "held out" in output
    assert output.splitlines()[-1] == "Next: sail-align embed x.zarr --run runs/x"
    unknown = "The image and text features were computed elsewhere by encoders that are unknown"
    for command, words in ((align, ["export", "runs/x"]), (evaluate, ["all", "--run", "runs/x"])):
        result = CliRunner().invoke(command, words)
        assert str(result.exception).startswith(unknown)
        assert "--image-encoder NAME --text-encoder NAME" in str(result.exception)
    with pytest.raises(UserError, match=unknown):
        pretrained.load("runs/x")
    measured = CliRunner().invoke(align, ["measure", "x.zarr"])
    assert measured.exit_code == 0, measured.output + repr(measured.exception)


def test_one_unknown_encoder_is_named(outside):
    words = encoders(outside)[:4]
    assert imported(outside, *words).exit_code == 0
    fit()
    with pytest.raises(UserError, match="The text features were computed elsewhere by an encoder that is unknown"):
        pretrained.load("runs/x")


def test_embed_writes_the_numbers_of_a_run(outside, monkeypatch):
    assert imported(outside, *encoders(outside)).exit_code == 0
    fit()
    result = CliRunner().invoke(align, ["embed", "x.zarr", "--run", "runs/x", "--out", "out", "--device", "cpu"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert result.output.splitlines()[-1] == "wrote out: 60 rows"
    store, run = Store.open("x.zarr"), load_run("runs/x")
    for file, encode, array in (
        ("img_emb", run.model.encode_image, store.image()),
        ("text_emb", run.model.encode_text, store.text("raw")),
    ):
        written = np.load(f"out/{file}/{file}_0.npy")
        with torch.inference_mode():
            expected = encode(torch.from_numpy(array.read()[0]).float()).numpy()
        assert written.tobytes() == expected.tobytes()
        assert np.allclose(np.linalg.norm(written, axis=1), 1, atol=1e-6)
    about = json.loads(Path("out/about.json").read_text())
    assert about["run_digest"] == run.digest
    monkeypatch.setattr(embeddings, "HEAD_BATCH", 7)
    words = ["embed", "x.zarr", "--run", "runs/x", "--device", "cpu", "--to", "parquet"]
    assert CliRunner().invoke(align, words).exit_code == 0
    table = pq.read_table("exports/x-x-parquet/part-0.parquet")
    assert table["key"].to_pylist() == store.index(["key"])["key"].to_pylist()
    assert np.allclose(np.stack(table["text_embedding"].to_numpy()), written, atol=1e-6)


def test_embed_refuses_features_of_another_encoder(outside):
    assert imported(outside, *encoders(outside)).exit_code == 0
    fit()
    Path("x.zarr").rename("before.zarr")
    assert imported(outside).exit_code == 0
    result = CliRunner().invoke(align, ["embed", "x.zarr", "--run", "runs/x", "--out", "out", "--device", "cpu"])
    assert "which runs/x was made with, cannot be compared" in str(result.exception)
    assert not Path("out").exists()
