"""Features of a store for other programs, read with these programs, and imported again."""

import json
import tarfile
from io import BytesIO
from itertools import groupby
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from embedding_reader import EmbeddingReader
from fakes import identity
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from typer.testing import CliRunner

from sail_align.extract.cli import app
from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.exchange import writing
from sail_align.extract.store.store import Store

DIMS = {"": 12, "raw": 8, "long": 8}


@pytest.fixture(autouse=True)
def _small_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(writing, "PART_ROWS", 40)


def make_store(path, rows=430, captions=("raw",), missing=None, seed=0) -> Store:
    """Make a store of random bits that are finite; `missing` maps arrays to rows that have no features."""
    samples = [
        Sample(f"key/{row}.x", f"{row}.jpg", {name: f"{name} {row} ü" for name in captions}, url=f"http://{row}")
        for row in range(rows)
    ]
    store = Store.create(
        path, dataset="photos", manifest={}, parts=[Part.of(samples)], captions=captions, shard_rows=64, chunk_rows=16
    )
    random = np.random.default_rng(seed)
    for name in ("", *captions):
        bits = random.integers(0, 1 << 16, (rows, DIMS[name]), dtype=np.uint16)
        features = (bits & np.where(bits & 0x7C00 == 0x7C00, 0x83FF, 0xFFFF).astype(np.uint16)).view(np.float16)
        status = np.zeros(rows, np.uint8)
        gone = list((missing or {}).get(name, ()))
        features[gone], status[gone] = np.nan, Status.MISSING
        array = store.add(identity("text" if name else "image", dim=DIMS[name]), name)
        for shard in array.shards:
            span = slice(*array.span(shard))
            array.write(shard, features[span], status[span])
    return store


def run(*words):
    result = CliRunner().invoke(app, [*map(str, words), "--quiet"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def expected(store, name, missing=()):
    features = (store.text(name) if name else store.image()).read()[0]
    return np.delete(features, list(missing), axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["npy", "parquet", "safetensors"])
def test_import_of_an_export_gives_the_same_bytes(form, tmp_path_factory):
    @settings(max_examples=6)
    @given(st.integers(1, 130), st.lists(st.integers(0, 129), max_size=9), st.booleans(), st.integers(0, 9))
    def check(rows, missing, several, seed):
        folder = tmp_path_factory.mktemp("example")
        gone = {row for row in missing if row < rows}
        captions = ("raw", "long") if several else ("raw",)
        store = make_store(folder / "x.zarr", rows, captions, {"": gone, captions[-1]: [0]}, seed)
        left_out = gone | {0}
        if len(left_out) == rows:
            return
        run("export", folder / "x.zarr", "--to", form, "--out", folder / "out")
        texts = [word for name in captions for word in ("--text-features", f"{name}={folder / 'out'}")]
        run("import", "--image-features", folder / "out", *texts, "--out", folder / "y.zarr")
        again = Store.open(folder / "y.zarr")
        for name in ("", *captions):
            features, status = (again.text(name) if name else again.image()).read()
            assert features.tobytes() == expected(store, name, left_out).tobytes()
            assert not status.any()
        kept = [sample for row, sample in enumerate(store.samples(0, rows)) if row not in left_out]
        assert again.samples(0, again.rows) == kept

    check()


def test_embedding_reader_reads_the_layout_of_clip_retrieval():
    store = make_store("x.zarr", missing={"raw": [3, 77]})
    output = run("export", "x.zarr", "--out", "out")
    assert output.splitlines()[-1] == "wrote out: 428 rows"
    assert "note: 2 rows of photos are left out" in output
    assert sorted(path.name for path in Path("out/img_emb").iterdir())[:2] == ["img_emb_00.npy", "img_emb_01.npy"]
    keys = [f"key/{row}.x" for row in range(430) if row not in (3, 77)]
    for name, folder in (("", "img_emb"), ("raw", "text_emb")):
        reader = EmbeddingReader(f"out/{folder}", "parquet_npy", None, ["key", "caption"], "out/metadata")
        assert (reader.count, reader.dimension) == (428, DIMS[name])
        batches = list(reader(batch_size=100, show_progress=False))
        features = np.concatenate([features for features, _ in batches])
        assert np.array_equal(features, expected(store, name, (3, 77)).astype(np.float32))
        assert [key for _, table in batches for key in table["key"]] == keys
        assert batches[0][1]["caption"][0] == "raw 0 ü"


def test_duckdb_and_polars_and_embedding_reader_read_parquet():
    store = make_store("x.zarr", captions=("raw", "long"))
    run("export", "x.zarr", "--to", "parquet", "--captions", "long", "--out", "out")
    images, texts = (expected(store, name).astype(np.float32) for name in ("", "long"))
    rows = duckdb.sql(
        "select key, caption, image_embedding, text_embedding from 'out/*.parquet' order by url"
    ).fetchall()
    order = sorted(range(430), key=lambda row: f"http://{row}")
    assert [row[:2] for row in rows] == [(f"key/{row}.x", f"long {row} ü") for row in order]
    assert np.array_equal(np.array([row[2] for row in rows], np.float32), images[order])
    assert np.array_equal(np.array([row[3] for row in rows], np.float32), texts[order])
    table = pl.read_parquet("out/*.parquet")
    assert table.columns == ["key", "image_path", "url", "caption", "image_embedding", "text_embedding"]
    assert np.array_equal(table["text_embedding"].to_numpy(), texts)
    reader = EmbeddingReader("out", "parquet", "image_embedding", ["key"])
    ((features, keys),) = reader(batch_size=430, show_progress=False)
    assert np.array_equal(features, images)
    assert keys["key"].tolist() == store.index(["key"])["key"].to_pylist()


def test_safetensors_and_tars_hold_the_same_numbers():
    store = make_store("x.zarr", rows=90)
    run("export", "x.zarr", "--to", "safetensors", "--out", "tensors")
    parts = [load_file(f"tensors/text_emb/text_emb_{part}.safetensors")["text_emb"] for part in range(3)]
    assert np.concatenate(parts).tobytes() == expected(store, "raw").tobytes()
    assert len(pq.read_table("tensors/metadata/metadata_2.parquet")) == 10
    run("export", "x.zarr", "--to", "webdataset", "--out", "tars")
    members = []
    for path in sorted(Path("tars").glob("*.tar")):
        with tarfile.open(path) as tar:
            members += [(member.name, tar.extractfile(member).read()) for member in tar]
    samples = [dict(group) for _, group in groupby(members, key=lambda member: member[0].split(".")[0])]
    samples = [{name.partition(".")[2]: content for name, content in each.items()} for each in samples]
    assert [json.loads(each["json"])["key"] for each in samples] == [f"key/{row}.x" for row in range(90)]
    assert samples[7]["txt"].decode() == "raw 7 ü"
    vectors = np.stack([np.load(BytesIO(each["image.npy"])) for each in samples])
    assert vectors.tobytes() == expected(store, "").tobytes()


def test_about_names_the_origin():
    store = make_store("x.zarr", rows=50)
    run("export", "x.zarr", "--out", "out")
    about = json.loads(Path("out/about.json").read_text())
    assert about["store_digest"] == store.digest
    assert about["arrays"]["image/fake-image"]["weights"] == "0" * 64
    assert (about["rows"], about["left_out"]) == (50, 0)


def test_folder_is_written_whole_or_not_at_all(monkeypatch):
    make_store("x.zarr", rows=90)

    def stop(folder, part):
        writing._write_npy(folder, part)
        if part.name == "1":
            raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setitem(writing.FORMATS, "npy", stop)
    result = CliRunner().invoke(app, ["export", "x.zarr", "--out", "out"])
    assert "No space is left for out" in str(result.exception)
    assert [path.name for path in Path().iterdir()] == ["x.zarr"]


def test_mistakes_are_named():
    make_store("x.zarr", rows=50, missing={"": range(50)})

    def refused(*words):
        result = CliRunner().invoke(app, ["export", *words])
        assert type(result.exception).__name__ == "UserError"
        return str(result.exception)

    Path("full").mkdir()
    Path("full/precious").touch()
    assert refused("x.zarr", "--out", "full") == "full exists already. Remove it, or pass another --out."
    assert "got 'zip', expected npy, parquet, safetensors, webdataset" in refused("x.zarr", "--to", "zip")
    assert "--captions 'short' is invalid: x.zarr has text features of raw." in refused("x.zarr", "--captions", "short")
    assert "has no row with all of image/fake-image, text/fake-text/raw" in refused("x.zarr", "--out", "out")
    assert "nothing.zarr is not a feature store" in refused("nothing.zarr")
    assert sorted(path.name for path in Path().iterdir()) == ["full", "x.zarr"]
