"""A store returns what was written and shows nothing that was not committed."""

import errno
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from fakes import identity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.errors import UserError
from sail_align.extract.quality.verify import verify_store
from sail_align.extract.store import markers
from sail_align.extract.store.store import Store

ROWS = 1_000


@pytest.fixture
def store(tmp_path):
    samples = [
        Sample(f"key {i}", f"{i}.jpg", {"raw": f"text {i}"} | ({"long": "…"} if i % 3 else {})) for i in range(ROWS)
    ]
    return Store.create(
        tmp_path / "s.zarr", dataset="set", manifest={}, parts=[Part.of(samples)], captions=["raw", "long"]
    )


def fill(array, seed=0):
    features = np.random.default_rng(seed).normal(size=(ROWS, array.dim)).astype(np.float16)
    status = np.zeros(ROWS, dtype=np.uint8)
    features[5], status[5] = np.nan, Status.MISSING
    for shard in array.shards:
        rows = slice(*array.span(shard))
        array.write(shard, features[rows], status[rows])
    return features, status


def test_read_returns_written_rows_for_any_span(store):
    features, status = fill(store.add(identity("image")))
    array = Store.open(store.path).image()
    assert array.complete
    for start, stop in [(0, ROWS), (3, 700), (255, 257), (999, 1_000)]:
        read = array.read(start, stop)
        np.testing.assert_array_equal(read[0], features[start:stop])
        np.testing.assert_array_equal(read[1], status[start:stop])
    assert array.counts == {"ok": 999, "missing": 1}


def test_features_are_raw_float16_chunks_at_sequential_offsets(store):
    array = store.add(identity("image"))
    features, _ = fill(array)
    shard = (store.path / "image/fake-image/features/c/1/0").read_bytes()
    chunk = features[256:512].astype("<f2").tobytes()
    assert shard[: len(chunk)] == chunk
    assert json.loads((store.path / "image/fake-image/features/zarr.json").read_text())["fill_value"] == "NaN"


def test_samples_are_read_back_from_the_index(store):
    assert store.samples(2, 5) == [
        Sample("key 2", "2.jpg", {"raw": "text 2", "long": "…"}),
        Sample("key 3", "3.jpg", {"raw": "text 3"}),
        Sample("key 4", "4.jpg", {"raw": "text 4", "long": "…"}),
    ]
    assert store.index(["key"])["key"].to_pylist() == [f"key {i}" for i in range(ROWS)]


def test_shard_without_marker_is_ignored(store):
    array = store.add(identity("image"))
    fill(array)
    (store.path / "commits/image/fake-image/00001.json").unlink()
    features, status = Store.open(store.path).image().read(200, 600)
    assert np.isnan(features[56:312]).all()
    assert (status[56:312] == Status.PENDING).all()
    assert (status[:56] == Status.OK).all()
    assert (status[312:] == Status.OK).all()
    assert Store.open(store.path).image().counts["pending"] == 256


@pytest.mark.parametrize("readers", [1, 4])
def test_only_the_markers_of_the_shards_that_are_read_are_opened(store, monkeypatch, readers):
    features, _ = fill(store.add(identity("image")))
    store.image().discard(2)
    opened, read = [], markers.read_regular
    monkeypatch.setattr(markers, "read_regular", lambda path: opened.append(path.name) or read(path))
    monkeypatch.setattr(markers.Markers, "readers", readers)
    array = Store.open(store.path).image()
    np.testing.assert_array_equal(array.read(800, 850)[0], features[800:850])
    assert opened == ["00003.json"]
    assert list(array.markers) == [0, 1, 3]
    assert sorted(opened) == [f"{shard:05d}.json" for shard in array.shards]  # each once
    assert not array.refresh(2)
    store.image().write(2, features[512:768], np.zeros(256, np.uint8))
    assert 2 not in array.markers  # as they were at first
    assert array.refresh(2)
    assert array.complete


def test_marker_of_another_fingerprint_is_ignored(store):
    fill(store.add(identity("image")))
    marker = store.path / "commits/image/fake-image/00000.json"
    marker.write_text(marker.read_text().replace(identity("image").spec.fingerprint, "0" * 64))
    assert 0 not in Store.open(store.path).image().markers


def test_write_removes_leftovers_of_a_killed_writer(store):
    array = store.add(identity("image"))
    features, status = fill(array)
    folder = store.path / "image/fake-image/features/c/3"
    whole = (folder / "0").read_bytes()
    (folder / "0").write_bytes(whole[:100])
    (folder / f".0.{'deadbeef' * 4}.tmp").write_bytes(b"half a shard")
    array.write(3, features[768:], status[768:])
    assert (folder / "0").read_bytes() == whole
    assert [path.name for path in folder.iterdir()] == ["0"]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_verify_finds_any_flipped_byte_and_names_its_shard(tmp_path_factory, data):
    samples = [Sample(f"{i}", "") for i in range(600)]
    path = tmp_path_factory.mktemp("flip") / "s.zarr"
    store = Store.create(path, dataset="set", manifest={}, parts=[Part.of(samples)], captions=[])
    array = store.add(identity("image"))
    for shard in array.shards:
        start, stop = array.span(shard)
        array.write(shard, np.ones((stop - start, 4), dtype=np.float16), np.zeros(stop - start, dtype=np.uint8))
    shard = data.draw(st.sampled_from(array.shards))
    name = data.draw(st.sampled_from([f"features/c/{shard}/0", f"status/c/{shard}"]))
    file = path / "image/fake-image" / name
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    damage = [text for text, is_damage in verify_store(path) if is_damage]
    assert len(damage) == 1
    assert damage[0].startswith(f"image/fake-image shard {shard}: {name.split('/')[0]}")


def test_verify_accepts_an_intact_store_and_discards_damage(store):
    array = store.add(identity("image"))
    fill(array)
    assert not [text for text, is_damage in verify_store(store.path) if is_damage]
    (store.path / "image/fake-image/features/c/2/0").write_bytes(b"")
    assert sum(is_damage for _, is_damage in verify_store(store.path, discard=True)) == 1
    assert set(Store.open(store.path).image().markers) == {0, 1, 3}


def test_verify_continues_after_an_unreadable_file(store):
    fill(store.add(identity("image")))
    shards = store.path / "image/fake-image/features/c"
    for shard in (0, 2):  # stands for a bad sector
        (shards / f"{shard}/0").unlink()
        (shards / f"{shard}/0").mkdir()
    (shards / "3/0").write_bytes(b"")
    found = [text for text, is_damage in verify_store(store.path) if is_damage]
    assert [text.split(":")[0] for text in found] == [f"image/fake-image shard {shard}" for shard in (0, 2, 3)]
    assert f"{shards}/0/0 cannot be read (Is a directory)" in found[0]


def test_verify_finds_a_missing_array_and_a_changed_count(store):
    fill(store.add(identity("image")))
    fill(store.add(identity("text"), "raw"))
    shutil.rmtree(store.path / "text")
    marker = store.path / "commits/image/fake-image/00001.json"
    marker.write_text(marker.read_text().replace('"ok":256', '"ok":156'))
    found = [text for text, is_damage in verify_store(store.path) if is_damage]
    assert found[-1].startswith("image/fake-image shard 1: has a damaged commit")
    nodes = ("text", "text/fake-text", *(f"text/fake-text/raw{name}" for name in ("", "/features", "/status")))
    lost = sorted(str(store.path / node / "zarr.json") for node in nodes)
    assert sorted(text.split(" is missing")[0] for text in found[:-1]) == lost


def test_damaged_identity_is_rejected(store):
    fill(store.add(identity("image")))
    node = store.path / "image/fake-image/zarr.json"
    node.write_text(node.read_text().replace('"pooling":"mean"', '"pooling":"lean"'))
    with pytest.raises(UserError, match=r"image/fake-image/zarr\.json is damaged"):
        Store.open(store.path).image()


def test_write_rejects_a_shard_of_another_size(store):
    array = store.add(identity("image"))
    with pytest.raises(ValueError, match="shard 0 has shape"):
        array.write(0, np.ones((1, 4), dtype=np.float16), np.zeros(256, dtype=np.uint8))


def test_verify_finds_a_changed_index(store):
    part = store.path / "index/part-00000.parquet"
    part.write_bytes(part.read_bytes() + b" ")
    assert any("part-00000.parquet" in text for text, is_damage in verify_store(store.path) if is_damage)


def test_digest_depends_on_content_only(store):
    array = store.add(identity("image"))
    fill(array, seed=1)
    first = store.digest
    fill(array, seed=2)
    assert store.digest != first
    fill(array, seed=1)
    assert Store.open(store.path).digest == first


def test_adding_a_caption_changes_no_file_but_the_root(store):
    fill(store.add(identity("image")))
    fill(store.add(identity("text"), "raw"))
    root = store.path / "zarr.json"
    before = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file() and path != root}
    fill(store.add(identity("text"), "long"))
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [array.path for array in store.arrays()] == ["image/fake-image", "text/fake-text/raw", "text/fake-text/long"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pooling": "cls"}, "made with pooling 'mean', got 'cls'"), ({"golden": -1.0}, "fixed input")],
)
def test_another_encoder_of_the_same_name_is_rejected(store, changes, message):
    store.add(identity("image"))
    with pytest.raises(UserError, match=message):
        store.add(identity("image", **changes))


@pytest.mark.parametrize(("keys", "message"), [("aba", "'a' occurs more than once"), ("", "'set' has no samples")])
def test_rejected_data_leave_no_new_folder(tmp_path, keys, message):
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        parts = [Part.of([Sample(key, "") for key in keys])]
        with pytest.raises(UserError, match=message):
            Store.create(tmp_path / name, dataset="set", manifest={}, parts=parts, captions=[])
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_folder_of_something_else_is_neither_opened_nor_overwritten(tmp_path):
    (tmp_path / "precious.txt").write_text("!")
    with pytest.raises(UserError, match="is not a feature store"):
        Store.open(tmp_path)
    (tmp_path / "zarr.json").write_text('{"attributes": {"sail": {"format": 1}}}')
    with pytest.raises(UserError, match="is not a feature store"):
        Store.open(tmp_path)
    (tmp_path / "zarr.json").unlink()
    with pytest.raises(UserError, match="exists and is not a feature store"):
        Store.create(tmp_path, dataset="set", manifest={}, parts=[Part.of([Sample("a", "")])], captions=[])
    assert (tmp_path / "precious.txt").exists()


def test_write_does_not_recreate_a_missing_store(store):
    array = store.add(identity("image"))
    store.path.rename(store.path.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError):
        array.write(0, np.ones((256, 4), dtype=np.float16), np.zeros(256, dtype=np.uint8))
    assert not store.path.exists()


def test_unreadable_store_is_not_reported_as_missing(store, monkeypatch):
    def fail(_path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sail_align.extract.store.hierarchy.read_regular", fail)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)"):
        Store.open(store.path)


def test_unfinished_index_is_rewritten(tmp_path):
    (tmp_path / "s.zarr" / "index").mkdir(parents=True)
    (tmp_path / "s.zarr" / "index" / "part-00000.parquet").write_bytes(b"half a part")
    Store.create(tmp_path / "s.zarr", dataset="set", manifest={}, parts=[Part.of([Sample("a", "")])], captions=[])
    assert Store.open(tmp_path / "s.zarr").samples(0, 1) == [Sample("a", "")]


def test_newer_format_is_rejected(store):
    root = store.path / "zarr.json"
    root.write_text(root.read_text().replace('"format":2', '"format":3'))
    with pytest.raises(UserError, match="has store format 3, expected 2"):
        Store.open(store.path)


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1
    file.write_bytes(content)


@given(place=st.integers(0, 10**6))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_byte_of_the_index_is_damage_when_it_is_first_used(store, place):
    index = store.path / "index" / "part-00000.parquet"
    flip(index, place)
    with pytest.raises(UserError, match=r"part-00000\.parquet is missing or has changed since the store was made"):
        Store.open(store.path).samples(0, 1)
    flip(index, place)
    assert len(Store.open(store.path).samples(0, 1)) == 1


@pytest.mark.slow
@given(place=st.integers(0, 10**6))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_byte_of_statuses_is_damage_when_they_are_first_used(store, place):
    array = store.add(identity("image"))
    array.write(0, np.ones((256, 4), dtype=np.float16), np.zeros(256, dtype=np.uint8))
    flip(array._status.shard_file(0), place)
    with pytest.raises(UserError, match="status/c/0 is damaged"):
        Store.open(store.path).image().read_status()


def test_statuses_that_another_process_has_written_again_are_not_called_damaged(store):
    array = store.add(identity("image"))
    features, missing = np.full((256, 4), np.nan, dtype=np.float16), np.full(256, Status.MISSING, dtype=np.uint8)
    array.write(0, features, missing)
    other = Store.open(store.path).image()
    assert other.markers
    array.write(0, np.ones_like(features), np.zeros_like(missing))
    with pytest.raises(UserError, match="is being written again by another process"):
        other.read_status(0, 256)
    assert not Store.open(store.path).image().read_status(0, 256).any()


def test_unknown_column_of_the_index_is_rejected(store):
    with pytest.raises(UserError, match=r"The index has no column 'nope'\. Its columns are key, image,"):
        store.index(["key", "nope"])


@pytest.mark.slow
def test_shard_rows_grow_with_the_data_set(tmp_path):
    def shard_rows(rows):
        samples = [Sample(str(i), "") for i in range(rows)]
        path = tmp_path / str(rows)
        return Store.create(path, dataset="set", manifest={}, parts=[Part.of(samples)], captions=[]).shard_rows

    assert [shard_rows(rows) for rows in (1, 3_000, 70_000)] == [256, 256, 8_192]


def test_array_that_cannot_be_chosen_is_reported(store):
    with pytest.raises(UserError, match=r"has no image features\. Make them with `sail-extract run`\."):
        store.image()
    store.add(identity("image"))
    with pytest.raises(
        UserError, match=r"no image features of encoder 'x'\. Choose one with --image-encoder: fake-image\."
    ):
        store.image("x")


def test_encoder_id_becomes_a_folder_name(store):
    other = identity("image")
    spec = replace(other.spec, id="hf:facebook/dinov2-base@abc.cls+mean")
    assert store.add(replace(other, spec=spec)).path == "image/hf-facebook-dinov2-base@abc.cls+mean"
