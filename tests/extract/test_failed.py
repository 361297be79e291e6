"""Rows that could not be encoded are listed by array, with the reason."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import identity
from typer.testing import CliRunner

from sail_align.extract.cli import app
from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    """1,000 rows in shards of 256: three images failed, in shards 0 and 3, and 30 captions."""
    samples = [Sample(f"key {i}", f"{i}.jpg", {"raw": "…"}, url=f"https://example.org/{i}") for i in range(1_000)]
    store = Store.create(tmp_path / "s.zarr", dataset="s", manifest={}, parts=[Part.of(samples)], captions=["raw"])
    bad = {3: Status.MISSING, 255: Status.TOO_LARGE, 999: Status.UNDECODABLE}
    write(store.add(identity("image")), bad, [0, 1, 2, 3])
    write(store.add(identity("text"), "raw"), dict.fromkeys(range(300, 330), Status.MISSING), [1, 2, 3])
    return store


def write(array, bad, shards):
    features, status = np.ones((1_000, array.dim), dtype=np.float16), np.zeros(1_000, dtype=np.uint8)
    features[list(bad)], status[list(bad)] = np.nan, list(bad.values())
    for shard in shards:
        rows = slice(*array.span(shard))
        array.write(shard, features[rows], status[rows])


def test_status_shows_counts_and_the_first_twenty_rows(store):
    lines = CliRunner().invoke(app, ["status", "--failed", str(store.path)]).output.splitlines()
    assert lines[:4] == [
        "image/fake-image: 3 of 1,000 rows failed: 1 missing, 1 too-large, 1 undecodable",
        "  missing  key 3",
        "  too-large  key 255",
        "  undecodable  key 999",
    ]
    assert lines[4] == "text/fake-text/raw: 30 of 1,000 rows failed: 30 missing"
    assert lines[5:25] == [f"  missing  key {row}" for row in range(300, 320)]
    assert lines[25:] == ["  … and 10 more; --out failed.parquet writes all of them"]


def test_parquet_file_lists_every_failed_row(store, tmp_path):
    out = tmp_path / "lists/failed.parquet"
    done = CliRunner().invoke(app, ["status", "--failed", str(store.path), "--out", str(out)])
    assert done.output.splitlines()[-1] == f"wrote {out}: 33 rows"
    rows = pq.read_table(out).to_pylist()
    assert rows[1] == {
        "key": "key 255",
        "url": "https://example.org/255",
        "image": "255.jpg",
        "array": "image/fake-image",
        "status": "too-large",
    }
    assert [row["key"] for row in rows] == [f"key {row}" for row in (3, 255, 999, *range(300, 330))]
    assert [file.name for file in out.parent.iterdir()] == [out.name]


def test_shards_without_failures_are_not_read(store, monkeypatch):
    array = store.image()
    read = []
    monkeypatch.setattr(type(array), "read_status", lambda self, *span: read.append(span) or original(self, *span))
    CliRunner().invoke(app, ["status", "--failed", str(store.path)])
    assert read == [(0, 256), (768, 1_000), (256, 512)]


def original(array, start, stop):
    return np.asarray(array._status.zarr[start:stop])


def test_invalid_out_is_rejected(store, tmp_path):
    (tmp_path / "file").write_text("")
    for words, message in (
        (["--out", "x.parquet"], "no effect without --failed"),
        (["--failed", "--out", str(tmp_path / "file/x.parquet")], "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, ["status", str(store.path), *words], catch_exceptions=False)
