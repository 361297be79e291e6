"""Mapped shards return what zarr reads from them, and damage is reported."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from fakes import identity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sail_align.extract.data import Status
from sail_align.extract.errors import UserError
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.mapped import MappedChunks

ROWS, DIM, SHARD, CHUNK = 300, 4, 64, 16


@pytest.fixture
def array(tmp_path):
    """Rows 16 … 47 and all of shard 2 are fill values; shard 3 is not committed."""
    array = make_array(tmp_path / "store")
    values = np.arange(ROWS * DIM, dtype=np.float16).reshape(ROWS, DIM)
    values[16:48] = values[128:192] = np.nan
    status = np.where(np.isnan(values[:, 0]), Status.MISSING, Status.OK).astype(np.uint8)
    for shard in array.shards:
        if shard != 3:
            span = slice(*array.span(shard))
            array.write(shard, values[span], status[span])
    return array


def make_array(store):
    FeatureArray.create(store / "image/fake", ROWS, DIM, SHARD, CHUNK)
    return FeatureArray(store, "image/fake", identity("image", dim=DIM))


def shard_file(array, shard, name="features") -> Path:
    return array._arrays[name].shard_file(shard)


def same(ours, theirs):
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


def test_every_chunk_equals_what_zarr_reads(array):
    assert array.mapped
    by_zarr = zarr.open_array(array._features.folder, mode="r")
    shard_file(array, 3).parent.mkdir(parents=True)
    shard_file(array, 3).write_bytes(b"half written")  # a shard without a marker is ignored
    for number in range(-(-ROWS // CHUNK)):
        rows = slice(number * CHUNK, (number + 1) * CHUNK)
        expected = np.full((CHUNK, DIM), np.nan, np.float16) if number // 4 == 3 else by_zarr[rows]
        assert same(array.chunk(number), expected)
        assert not array.chunk(number).flags.writeable
    assert not shard_file(array, 2).exists()
    assert len(array.chunk(18)) == ROWS % CHUNK


@pytest.mark.slow
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, ROWS), stop=st.integers(0, ROWS))
def test_any_rows_equal_what_zarr_reads(array, start, stop):
    stop = max(start, stop)
    expected = [zarr.open_array(array._arrays[name].folder, mode="r")[start:stop] for name in ("features", "status")]
    features, status = array.read(start, stop)
    assert same(features, expected[0])
    assert same(status, expected[1])


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"compressors": None, "serializer": zarr.codecs.BytesCodec(endian="big")},
        {"compressors": None, "chunks": (CHUNK, 2)},
        {"compressors": None, "shards": None},
        {"compressors": None, "shards": {"shape": (SHARD, DIM), "index_location": "start"}},
    ],
    ids=["compressed", "big-endian", "half rows", "no shards", "index first"],
)
def test_other_layouts_are_read_through_zarr(array, form):
    folder = array._features.folder
    expected, status = array.read()
    shutil.rmtree(folder)
    layout = {"dtype": "float16", "shards": (SHARD, DIM), "chunks": (CHUNK, DIM), **form}
    zarr.create_array(folder, shape=(ROWS, DIM), fill_value=np.nan, **layout)[:] = expected
    other = FeatureArray(array._store, array.path, array.identity)
    assert not other.mapped
    assert not MappedChunks.supports(zarr.open_array(folder, mode="r"))
    if (other.shard_rows, other.chunk_rows) == (SHARD, CHUNK):
        assert same(other.read()[0].astype(np.float16), expected)
        assert same(other.read()[1], status)
        chunks = np.concatenate([other.chunk(number) for number in range(19)])
        assert same(chunks.astype(np.float16), expected)


@pytest.mark.parametrize("zarrs", [True, False])
@pytest.mark.parametrize(
    "damage", [None, lambda content: b"", lambda content: content[:-9]], ids=["gone", "empty", "cut"]
)
def test_damage_to_a_decoded_array_is_not_read_as_fill_values(array, monkeypatch, zarrs, damage):
    if zarrs:
        pytest.importorskip("zarrs")
    else:
        monkeypatch.setattr("sail_align.extract.store.sharded.find_spec", lambda _: None)
    values, _ = array.read()
    folder = array._features.folder
    shutil.rmtree(folder)
    zarr.create_array(folder, data=values, shards=(SHARD, DIM), chunks=(CHUNK, DIM), fill_value=np.nan)
    file = shard_file(array, 1)
    file.write_bytes(damage(file.read_bytes())) if damage else file.unlink()
    other = FeatureArray(array._store, array.path, array.identity)
    assert not other.mapped
    for read in (lambda: other.chunk(4), lambda: other.read(64, 128)):
        with pytest.raises(UserError, match="c/1/0 is missing or damaged"):
            read()
    assert np.isnan(other.read(128, 192)[0]).all()  # only fill values, and no file


@pytest.mark.slow
@pytest.mark.parametrize("name", ["features", "status"])
@pytest.mark.parametrize("byte", range(1, 70, 3))
def test_flipped_byte_in_the_shard_index_is_damage(array, name, byte):
    file = shard_file(array, 1, name)
    content = bytearray(file.read_bytes())
    content[-byte] ^= 0x10
    file.write_bytes(content)
    again = FeatureArray(array._store, array.path, array.identity)
    with pytest.raises(UserError, match=r"is damaged: (the index at its end|its content) .*\. Discard"):
        again.read(64, 128)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:40], "it has 40 bytes, fewer than its index of 68 bytes"),
        (lambda content: content[128:], "its index lists 128 bytes at 384, expected a chunk of 128 bytes"),
    ],
)
def test_truncated_file_is_damage(array, damage, message):
    file = shard_file(array, 1)
    file.write_bytes(damage(file.read_bytes()))
    again = FeatureArray(array._store, array.path, array.identity)
    with pytest.raises(UserError, match=message):
        again.chunk(4)


def test_rewritten_shard_is_mapped_again(array):
    before = array.chunk(4)
    kept = before.copy()
    array.write(1, np.ones((SHARD, DIM), np.float16), np.zeros(SHARD, np.uint8))
    assert (array.chunk(4) == 1).all()
    assert same(before, kept)


def test_no_file_stays_open(array):
    open_files = len(os.listdir("/proc/self/fd"))
    array.read()
    array.prefetch([0, 1, 4, 9, 18])
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert len(array._features.mapped._shards) == 4


def test_unreadable_file_is_named(array, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pyarrow.memory_map", refuse)
    features = zarr.open_array(array._features.folder, mode="r")
    with pytest.raises(UserError, match=r"1/0 cannot be read \(Permission denied\)\. Fix this and try again"):
        MappedChunks(features, lambda shard: shard_file(array, shard))[4]
