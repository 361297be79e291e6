"""Format 2 binds every part of a store to its place, is a valid zarr hierarchy, and can be made from format 1."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import dask.array
import numpy as np
import pytest
import xarray
import zarr
from fakes import identity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.errors import UserError
from sail_align.extract.quality.verify import verify_store
from sail_align.extract.store.features import checksum
from sail_align.extract.store.hierarchy import array_paths, read_document, write_root
from sail_align.extract.store.index import IndexRecord
from sail_align.extract.store.store import Store
from sail_align.extract.store.upgrade import upgrade_store
from sail_align.extract.system.files import canonical_json
from sail_align.extract.system.leases import Lease, LeaseLostError, Leases

ROWS, SHARD, CHUNK = 300, 128, 32
OPTIONS = {
    "dataset": "old",
    "manifest": {"name": "old"},
    "captions": ["raw", "long"],
    "shard_rows": SHARD,
    "chunk_rows": CHUNK,
}
OLD_DIGEST = "cf40fc3fd7fdac46eddbc1cf36d10b9da2d819616559782893a4e43ffebbc942"
"""Digest of the store in format_1.zip, printed by the version that wrote it."""


def make(path, *, add=("image", "raw", "long"), seed=0):
    """Write the samples and features of format_1.zip with the present version."""
    samples = [
        Sample(f"key {n}", f"{n}.jpg", {"raw": f"text {n}"} | ({"long": f"a longer text {n}"} if n % 3 else {}))
        for n in range(ROWS)
    ]
    store = Store.create(
        path,
        parts=[Part.of(samples)],
        **OPTIONS,
    )
    for number, name in enumerate(("image", "raw", "long")):
        if name in add:
            encoder = identity("image") if name == "image" else identity("text", dim=6)
            fill(
                store.add(encoder, "" if name == "image" else name), seed + number, skip=(1,) if name == "long" else ()
            )
    store.tidy()
    return store


def fill(array, seed, skip=()):
    features = np.random.default_rng(seed).normal(size=(ROWS, array.dim)).astype(np.float16)
    status = np.zeros(ROWS, np.uint8)
    features[32:64], status[32:64] = np.nan, Status.MISSING
    features[5], status[5] = np.nan, Status.UNDECODABLE
    for shard in array.shards:
        if shard not in skip:
            rows = slice(*array.span(shard))
            array.write(shard, features[rows], status[rows])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "s.zarr").path


@pytest.fixture
def store(tmp_path, made):
    return Store.open(shutil.copytree(made, tmp_path / "s.zarr"))


@pytest.fixture
def old(tmp_path):
    """A store that the last version of format 1 wrote; shard 1 of caption long is not committed."""
    with zipfile.ZipFile(Path(__file__).with_name("format_1.zip")) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "format_1.zarr"


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def change(file, *keys, to):
    """Change a value of a JSON file."""
    content = json.loads(file.read_bytes())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    file.write_text(json.dumps(content))


def damage(path):
    return [text for text, is_damage in verify_store(path) if is_damage]


def read_all(path):
    for array in Store.open(path).arrays():
        array.read()


# A valid hierarchy


def test_zarr_xarray_and_dask_list_and_read_a_store_without_a_warning(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = zarr.open_group(store.path, mode="r")
        found = {name for name, _ in root.members(max_depth=None)}
        assert found == {
            *("image", "image/fake-image", "image/fake-image/features", "image/fake-image/status"),
            *("text", "text/fake-text"),
            *(f"text/fake-text/{name}" for name in ("raw", "raw/features", "raw/status")),
            *(f"text/fake-text/{name}" for name in ("long", "long/features", "long/status")),
        }
        assert "features (300, 6) float16" in str(root.tree())
        assert {name for name, _ in zarr.open_group(store.path / "text", mode="r").members(max_depth=None)} == {
            name.removeprefix("text/") for name in found if name.startswith("text/")
        }
        expected, status = store.image().read()
        one = xarray.open_zarr(store.path, group="image/fake-image")
        assert dict(one.sizes) == {"row": ROWS, "feature": 4}
        np.testing.assert_array_equal(one["features"].values, expected)
        np.testing.assert_array_equal(one["status"].values, status)
        tree = xarray.open_datatree(store.path, engine="zarr")
        assert tree["text/fake-text/raw/features"].dims == ("row", "feature")
        array = dask.array.from_zarr(str(store.path), component="image/fake-image/features")
        np.testing.assert_array_equal(array.compute(), expected)


def test_every_group_has_metadata_and_an_unfinished_store_is_a_valid_hierarchy_too(tmp_path):
    store = make(tmp_path / "s.zarr", add=())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zarr.open_group(store.path, mode="r").members(max_depth=None) == ()
        store.add(identity("text", dim=6), "raw")
        assert len(zarr.open_group(store.path, mode="r").members(max_depth=None)) == 5


def test_metadata_that_zarr_consolidated_again_are_accepted(store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store.path)
    assert not damage(store.path)
    read_all(store.path)


def test_array_of_which_creation_was_stopped_does_not_exist_and_is_created_again(tmp_path):
    store, whole = make(tmp_path / "s.zarr", add=("image",)), make(tmp_path / "whole.zarr", add=("image", "raw"))
    root = (store.path / "zarr.json").read_bytes()
    store.add(identity("text", dim=6), "raw")
    (store.path / "zarr.json").write_bytes(root)  # stopped before the last step
    again = Store.open(store.path)
    assert not again.texts("raw")
    fill(again.add(identity("text", dim=6), "raw"), 1)
    again.tidy()
    assert contents(store.path) == contents(whole.path)


def test_order_of_adding_arrays_does_not_change_a_byte(tmp_path, store):
    other = make(tmp_path / "other.zarr", add=())
    fill(other.add(identity("text", dim=6), "long"), 2, skip=(1,))
    fill(other.add(identity("image")), 0)
    fill(other.add(identity("text", dim=6), "raw"), 1)
    other.tidy()
    assert contents(other.path) == contents(store.path)


def test_a_caption_may_have_the_name_of_an_array(tmp_path):
    samples = [Sample("a", "", {"status": "one", "features": "two"})]
    store = Store.create(
        tmp_path / "s.zarr", dataset="x", manifest={}, parts=[Part.of(samples)], captions=["status", "features"]
    )
    for name in ("status", "features"):
        store.add(identity("text"), name)
    assert [array.path for array in Store.open(store.path).arrays()] == [
        "text/fake-text/status",
        "text/fake-text/features",
    ]


# Damage and exchanges


def exchange(one, other):
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def test_exchanged_captions_are_found(store):
    features, commits = (store.path / part / "text/fake-text" for part in ("", "commits"))
    exchange(features / "raw", features / "long")
    with pytest.raises(UserError, match=r"raw/features/c/1/0 is missing or damaged"):
        Store.open(store.path).text("raw").read()
    assert len(damage(store.path)) == 5  # two shards of each, and the one that only one of them has
    exchange(commits / "raw", commits / "long")
    assert not Store.open(store.path).text("raw").markers
    assert len(damage(store.path)) == 5


def test_exchanged_shards_are_found(store):
    array = store.path / "image/fake-image"
    for name in ("features", "status"):
        exchange(array / name / "c/0", array / name / "c/1")
    assert len(damage(store.path)) == 2
    commits = store.path / "commits/image/fake-image"
    exchange(commits / "00000.json", commits / "00001.json")
    assert set(Store.open(store.path).image().markers) == {2}
    assert len(damage(store.path)) == 2


def test_array_of_another_store_is_found(store, tmp_path):
    """Same encoder, same sizes, other samples: only the index differs."""
    samples = [Sample(f"other {n}", f"{n}.jpg", {"raw": "x", "long": "y"}) for n in range(ROWS)]
    other = Store.create(
        tmp_path / "o.zarr",
        parts=[Part.of(samples)],
        **OPTIONS,
    )
    fill(other.add(identity("image")), 7)
    for part in ("image", "commits/image"):
        shutil.rmtree(store.path / part)
        shutil.copytree(other.path / part, store.path / part)
    assert not Store.open(store.path).image().markers
    assert len(damage(store.path)) == 3


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["shard"], 1),
        (["array"], "text/fake-text/raw"),
        (["dtype"], "float32"),
        (["shape"], [300, 8]),
        (["chunks"], [128, 64]),
        (["rows"], [0, 127]),
        (["index"], "0" * 64),
        (["fingerprint"], "0" * 64),
        (["counts"], {"ok": 128}),
        (["counts"], {"ok": 96, "missing": 31, "undecodable": 1}),
        (["sha256", "features"], "0" * 64),
        (["sha256", "status"], None),
        (["crc32c"], []),
        (["crc32c", 2], 5),
        (["digest"], "0" * 64),
        (["new"], 1),
    ],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_edited_markers_do_not_commit_a_shard(store, keys, value, sealed):
    """Even if the marker's own digest is made to fit, as no accident does, the shard or its place does not."""
    marker = store.path / "commits/image/fake-image/00000.json"
    change(marker, *keys, to=value)
    if sealed and keys not in (["digest"], ["new"]):
        content = {name: part for name, part in json.loads(marker.read_bytes()).items() if name != "digest"}
        change(marker, "digest", to=hashlib.sha256(canonical_json(content)).hexdigest())
    else:
        assert 0 not in Store.open(store.path).image().markers
    assert damage(store.path)


@pytest.mark.parametrize(
    ("node", "keys", "value"),
    [
        ("image/fake-image/features", ["data_type"], "float32"),
        ("image/fake-image/features", ["fill_value"], 0.0),
        ("image/fake-image/features", ["shape"], [300, 8]),
        ("image/fake-image/features", ["dimension_names"], ["feature", "row"]),
        ("image/fake-image/status", ["fill_value"], 0),
        ("image/fake-image/status", ["attributes"], {"a": 1}),
        ("image/fake-image", ["attributes", "golden", 0], 0.5),
        ("image/fake-image", ["attributes", "location"], "/elsewhere"),
        ("text/fake-text/raw", ["attributes"], {"a": 1}),
        ("text/fake-text/raw", ["node_type"], "array"),
    ],
)
def test_edited_metadata_are_found_and_restored(store, node, keys, value):
    before = contents(store.path)
    change(store.path / node / "zarr.json", *keys, to=value)
    with pytest.raises(UserError, match=rf"{node}/zarr\.json is damaged: .*Rerun `sail-extract run`, which restores"):
        read_all(store.path)
    assert len(damage(store.path)) >= 1
    Store.open(store.path).restore()
    assert contents(store.path) == before


def test_metadata_of_a_group_that_only_others_read_are_compared_by_verify(store):
    before = contents(store.path)
    change(store.path / "text/zarr.json", "consolidated_metadata", to={"metadata": {"a": {}}})
    assert len(damage(store.path)) == 1
    Store.open(store.path).restore()
    assert contents(store.path) == before


def test_lost_metadata_are_restored(store):
    before = contents(store.path)
    for file in list((store.path / "text").rglob("zarr.json")):
        file.unlink()
    assert len(damage(store.path)) == 8
    Store.open(store.path).restore()
    assert contents(store.path) == before


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["attributes", "sail", "rows"], 299),
        (["attributes", "sail", "dataset"], "new"),
        (["attributes", "sail", "manifest", "name"], "new"),
        (["attributes", "sail", "captions"], ["long", "raw"]),
        (["attributes", "sail", "index_sha256", 0], "0" * 64),
        (["attributes", "sail", "metadata_sha256", "image/fake-image"], "0" * 64),
        (["attributes", "sail", "metadata_sha256"], {}),
        (["attributes", "sail", "sha256"], "0" * 64),
        (["attributes", "sail", "format"], 1),
        (["node_type"], "array"),
        (["zarr_format"], 2),
        (["consolidated_metadata", "kind"], "outline"),
        (["consolidated_metadata", "metadata", "image/fake-image/features", "shape"], [300, 8]),
        (["consolidated_metadata", "metadata"], {}),
    ],
)
def test_edited_root_is_damage(store, keys, value):
    change(store.path / "zarr.json", *keys, to=value)
    with pytest.raises(UserError, match=r"s\.zarr/zarr\.json is damaged: its content is not what was written"):
        Store.open(store.path)


@given(shard=st.integers(0, 2), place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bit_of_features_is_found_when_they_are_used(store, shard, place, bit):
    """In the rows that are used, or in the shard's index; rows beyond the last are never used."""
    array = store.image()
    file = array._features.shard_file(shard)
    start, stop = array.span(shard)
    content = bytearray(file.read_bytes())
    index = 16 * (SHARD // CHUNK) + 4
    used = [*range(len(content) - index, len(content)), *range(min(stop - start, 96) * 4 * 2)]
    place = used[place % len(used)]
    whole = bytes(content)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    for use in (lambda each: each.read(), lambda each: [each.chunk(n) for n in range(10)]):
        with pytest.raises(UserError, match=rf"features/c/{shard}/0 is damaged"):
            use(Store.open(store.path).image())
    file.write_bytes(whole)
    read_all(store.path)


def test_features_are_checked_on_first_use_and_again_on_request(store):
    array = Store.open(store.path).image()
    first, _ = array.read(0, 10)
    file = array._features.shard_file(0)
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    with file.open("r+b") as opened:  # in place: the file is mapped
        opened.write(content)
    assert array.read(0, 10)[0][0, 0] != first[0, 0]
    array.check_again()
    with pytest.raises(UserError, match="features/c/0/0 is damaged"):
        array.read(0, 10)
    unchecked = Store.open(store.path).image()
    unchecked.check = False
    assert len(unchecked.read(0, 10)[0]) == 10


def test_part_of_a_chunk_is_read_without_the_rest_of_its_shard(store):
    array = Store.open(store.path).image()
    array.read(100, 101)
    assert array._checked == {3}
    assert array.read(5, 5)[0].shape == (0, 4)
    assert array.read(400, 500)[0].shape == (0, 4)


@given(
    rows=st.integers(1, 40),
    values=st.lists(st.sampled_from([0x7E00, 0xFE00, 0x7E01, 0x0000, 0x3C00]), min_size=1, max_size=5),
)
@settings(max_examples=25, deadline=None)
def test_checksum_holds_for_any_features_that_are_written(tmp_path_factory, rows, values):
    """Zarr leaves out chunks of NaN, with any bits that mean NaN."""
    path = tmp_path_factory.mktemp("nan") / "s.zarr"
    samples = [Sample(str(n), "") for n in range(rows)]
    store = Store.create(path, dataset="x", manifest={}, parts=[Part.of(samples)], captions=[], chunk_rows=8)
    array = store.add(identity("image"))
    features = np.resize(np.array(values, np.uint16), (rows, 4)).view(np.float16)
    array.write(0, features, np.zeros(rows, np.uint8))
    read, _ = Store.open(path).image().read()
    np.testing.assert_array_equal(read, features)
    assert checksum(features) == checksum(read.copy())


def test_joined_captions_report_is_sealed(tmp_path):
    store = make(tmp_path / "s.zarr", add=())
    report = store.path / "index/recaptions.json"
    report.write_text("{}")
    assert store.recaptions() is None  # none were joined
    change(store.path / "zarr.json", "attributes", "sail", "recaptions_sha256", to="0" * 64)
    content = json.loads((store.path / "zarr.json").read_bytes())["attributes"]["sail"]
    del content["sha256"]
    change(
        store.path / "zarr.json",
        *("attributes", "sail", "sha256"),
        to=hashlib.sha256(canonical_json(content)).hexdigest(),
    )
    assert any("recaptions.json is missing or has changed" in text for text in damage(store.path))


# Format 1


def test_store_of_format_1_is_read(old):
    store = Store.open(old)
    assert (store.format, store.digest) == (1, OLD_DIGEST)
    assert [array.describe() for array in store.arrays()] == [
        "image/fake-image: 3/3 shards, dim 4: 32 missing, 267 ok, 1 undecodable",
        "text/fake-text/raw: 3/3 shards, dim 6: 32 missing, 267 ok, 1 undecodable",
        "text/fake-text/long: 2/3 shards, dim 6: 32 missing, 139 ok, 128 pending, 1 undecodable",
    ]
    assert not damage(old)
    assert store.samples(1, 2) == [Sample("key 1", "1.jpg", {"raw": "text 1", "long": "a longer text 1"})]


def test_store_of_format_1_is_not_written_to(old):
    before = contents(old)
    store = Store.open(old)
    for caption in ("long", "new"):
        with pytest.raises(
            UserError, match=r"has format 1, which is only read\. Convert it with `sail-extract upgrade"
        ):
            store.add(identity("text", dim=6), caption)
    with pytest.raises(UserError, match="has format 1"):
        store.image().write(0, np.ones((128, 4), np.float16), np.zeros(128, np.uint8))
    assert store.add(identity("image")).complete
    assert contents(old) == before


def test_upgraded_store_has_the_bytes_of_a_new_one(old, store):
    features = {name: file for name, file in contents(old).items() if "/c/" in name or name.startswith("index")}
    assert upgrade_store(Store.open(old), quiet=True)
    upgraded = contents(old)
    assert features.items() <= upgraded.items()
    assert upgraded == contents(store.path)
    assert Store.open(old).digest == OLD_DIGEST == store.digest
    assert not damage(old)
    assert not upgrade_store(Store.open(old), quiet=True)


@pytest.mark.parametrize("writes", range(16))
def test_stopped_upgrade_is_continued(old, store, monkeypatch, writes):
    left = writes

    def stop(path, content, **options):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return write(path, content, **options)

    from sail_align.extract.store import hierarchy, markers

    write = hierarchy.write_atomically
    with monkeypatch.context() as patch:
        for module in (hierarchy, markers):
            patch.setattr(module, "write_atomically", stop)
        with pytest.raises(KeyboardInterrupt):
            upgrade_store(Store.open(old), quiet=True)
    halfway = Store.open(old)
    assert (halfway.format, halfway.digest) == (1, OLD_DIGEST)
    assert not damage(old)
    read_all(old)
    assert upgrade_store(Store.open(old), quiet=True)
    assert contents(old) == contents(store.path)


@pytest.mark.parametrize("name", ["image/fake-image/features/c/1/0", "text/fake-text/raw/status/c/0"])
def test_upgrade_refuses_damage(old, name):
    file = old / name
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        upgrade_store(Store.open(old), quiet=True)
    assert Store.open(old).format == 1
    list(verify_store(old, discard=True))
    assert upgrade_store(Store.open(old), quiet=True)
    assert not damage(old)


def test_upgrade_refuses_a_store_that_may_be_in_use(old):
    lease = old / "leases/image/fake-image/00000.0.json"
    lease.parent.mkdir(parents=True)
    lease.write_text('{"machine": "another", "pid": 1, "start": "1", "token": "x"}\n')
    with pytest.raises(UserError, match=r"is in use: .* holds image/fake-image/00000\. When no extraction is running"):
        upgrade_store(Store.open(old), quiet=True)
    assert lease.exists()
    shutil.rmtree(old / "leases")
    assert upgrade_store(Store.open(old), quiet=True)


def test_upgrade_refuses_a_store_that_lacks_a_caption(old):
    change(old / "zarr.json", "attributes", "sail", "captions", to=["raw"])
    with pytest.raises(UserError, match="has commits of text/fake-text/long, but not that array or caption"):
        upgrade_store(Store.open(old), quiet=True)


def test_order_of_encoders_is_that_of_their_names():
    nodes = [f"text/{name}/raw/status" for name in ("gte-large", "gte", "gte.2")]
    assert array_paths(nodes) == ["text/gte/raw", "text/gte-large/raw", "text/gte.2/raw"]


def test_array_that_another_writer_of_the_root_lost_is_recorded_again(store):
    before = contents(store.path)
    make_root = store.attributes
    arrays = store.arrays()
    kept = {node: value for node, value in make_root["metadata_sha256"].items() if not node.startswith("text")}
    copies = read_document(store.path)["consolidated_metadata"]["metadata"]
    write_root(store.path, make_root, {node: copies[node] for node in kept})
    assert not Store.open(store.path).texts("raw")
    store.record_again(arrays)
    store.tidy()
    assert contents(store.path) == before


def test_counts_edited_in_format_1_are_found(old):
    change(old / "commits/image/fake-image/00000.json", "counts", to={"ok": 128})
    with pytest.raises(UserError, match="status/c/0 is damaged"):
        Store.open(old).image().read_status()
    assert len(damage(old)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", 10**9),
        ("rows", 0),
        ("rows", 600.0),
        ("shard_rows", 1 << 40),
        ("shard_rows", 100),
        ("chunk_rows", 0),
        ("chunk_rows", True),
        ("captions", ["raw", "../.."]),
        ("index_sha256", []),
    ],
)
def test_impossible_sizes_of_format_1_are_damage(old, name, value):
    change(old / "zarr.json", "attributes", "sail", name, to=value)
    with pytest.raises(UserError, match=r"zarr\.json is damaged: "):
        Store.open(old)


@pytest.mark.parametrize(
    ("array", "keys", "value"),
    [
        ("features", ["data_type"], "float32"),
        ("features", ["data_type"], "int16"),
        ("features", ["shape"], [300, 8]),
        ("features", ["shape"], [299, 4]),
        ("features", ["shape"], [10**9, 4]),
        ("features", ["fill_value"], 0.0),
        ("features", ["chunk_grid", "configuration", "chunk_shape"], [256, 4]),
        ("features", ["chunk_grid", "configuration", "chunk_shape"], [128, 1 << 30]),
        ("status", ["data_type"], "int8"),
        ("status", ["shape"], [301]),
        ("status", ["fill_value"], 0),
    ],
)
def test_changed_arrays_of_format_1_are_damage(old, array, keys, value):
    change(old / "image/fake-image" / array / "zarr.json", *keys, to=value)
    with pytest.raises(UserError, match=rf"{array}/zarr\.json is (missing or )?damaged"):
        Store.open(old).image()


def test_arrays_that_processes_add_at_once_are_all_recorded(tmp_path, monkeypatch):
    names = [f"c{number}" for number in range(6)]
    samples = [Sample("a", "", dict.fromkeys(names, "text"))]
    store = Store.create(tmp_path / "s.zarr", dataset="x", manifest={}, parts=[Part.of(samples)], captions=names)
    monkeypatch.setattr("sail_align.extract.system.leases.POLL", 0.01)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=Store.open(store.path).add, args=(identity("text"), name)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * len(names)
    assert [array.path for array in Store.open(store.path).arrays()] == [f"text/fake-text/{name}" for name in names]
    Store.open(store.path).tidy()
    assert not (store.path / "leases").exists()


def test_root_is_not_written_without_the_lease(tmp_path):
    store = make(tmp_path / "s.zarr", add=())
    before = (store.path / "zarr.json").read_bytes()
    with store.leases.hold("index") as lease:
        lease.file.unlink()  # another process has taken it over
        with pytest.raises(LeaseLostError):
            store.record([], lease)
    assert (store.path / "zarr.json").read_bytes() == before


class Interrupted:
    """Calls `other()` once, before the given moment of a write: a sync, a rename or a look at the lease."""

    def __init__(self, monkeypatch, moment, other):
        self.moment, self.other = moment, other
        for where, name in ((os, "fsync"), (Path, "replace"), (Lease, "confirm")):
            monkeypatch.setattr(where, name, self.before(getattr(where, name)))

    def before(self, original):
        def call(*arguments):
            self.moment -= 1
            if self.moment == -1:
                self.other()
            return original(*arguments)

        return call


@pytest.mark.parametrize("moment", range(16))
def test_shard_never_disagrees_with_its_marker_after_a_lost_lease(tmp_path, monkeypatch, moment):
    """A GPU encodes the same rows to other bits. Two processes write them, one while the other sleeps."""
    store = make(tmp_path / "s.zarr")
    rows, dim = store.image().span(0)[1], store.image().dim
    status = np.full(rows, Status.OK, np.uint8)
    slow, quick = (np.full((rows, dim), value, np.float16) for value in (1, 2))
    lease = store.leases.take("image")

    def take_over():
        newer = Lease(lease.path, lease.generation + 1)
        assert newer.create()
        Store.open(store.path).image().write(0, quick, status, newer)

    interrupted = Interrupted(monkeypatch, moment, take_over)
    lost = False
    try:
        store.image().write(0, slow, status, lease)
    except LeaseLostError:
        lost = True
    if interrupted.moment >= 0:
        assert not lost
        return
    array = Store.open(store.path).image()
    if 0 in array.markers:
        assert array.changed(0) is None
        features, _ = array.read(0, rows)
        assert np.array_equal(features, quick)
    else:
        assert lost  # the next run encodes the shard again


@pytest.mark.parametrize(
    "name",
    [
        "zarr.json",
        "index/part-00000.parquet",
        "index/sources.json",
        "image/fake-image/zarr.json",
        "image/fake-image/features/zarr.json",
        "image/fake-image/features/c/0/0",
        "image/fake-image/status/c/0",
        "commits/image/fake-image/00000.json",
        "leases/index.0.json",
    ],
)
def test_fifo_in_place_of_a_file_is_not_waited_for(store, name):
    """A store may come from somebody else; without a writer, opening a FIFO waits for ever."""
    (store.path / name).unlink(missing_ok=True)
    (store.path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(store.path / name)
    with suppress(UserError):
        opened = Store.open(store.path)
        opened.samples(0, 1)
        opened.image().read()
    with suppress(UserError):
        list(verify_store(store.path))
    assert IndexRecord.read(store.path / "index") is None or name != "index/sources.json"
    assert store.leases.take("index") is None or not name.startswith("leases")


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=6,
    ),
    field=st.sampled_from(["made_of", "stamps", "rows", "digests", "tables", "complete", ""]),
)
@settings(max_examples=60, deadline=None)
def test_record_of_an_index_of_another_form_is_none(tmp_path_factory, value, field):
    folder = tmp_path_factory.mktemp("record")
    record = IndexRecord("a", [[("b", 1, 2)]], [3], ["c"], [("d", 4, 5)], complete=True)
    record.write(folder)
    assert IndexRecord.read(folder) == record
    content = json.loads((folder / "sources.json").read_bytes())
    (folder / "sources.json").write_text(json.dumps({**content, field: value} if field else value))
    found = IndexRecord.read(folder)
    if found is not None:
        assert len(found.rows) == len(found.stamps)
        assert all(len(stamp) == 3 for stamps in found.stamps for stamp in stamps)
    (folder / "sources.json").write_text("[" * 100_000)
    assert IndexRecord.read(folder) is None


def test_lease_that_cannot_be_removed_is_not_waited_for(tmp_path, monkeypatch):
    leases = Leases(tmp_path / "leases")
    with monkeypatch.context() as patch, leases.hold("index"):
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
        leases.release_all()
    assert (tmp_path / "leases/index.0.json").exists()
    with leases.hold("index") as lease:
        assert lease.generation == 1
