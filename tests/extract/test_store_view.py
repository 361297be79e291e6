"""A store as a sequence, a table, a data set of torch, and text."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import identity
from torch.utils.data import DataLoader

import sail_align
from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.errors import UserError
from sail_align.extract.store import view
from sail_align.extract.store.store import Store

ROWS = 50
MISSING = {"image/fake-image": [3, 49], "text/fake-text/raw": [4], "text/fake-text/long": [3, 5]}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def features():
    """The features by array path, NaN where they are missing."""
    random = np.random.default_rng(0)
    arrays = {path: random.normal(size=(ROWS, 8 if "image" in path else 4)).astype(np.float16) for path in MISSING}
    for path, rows in MISSING.items():
        arrays[path][rows] = np.nan
    return arrays


@pytest.fixture
def samples():
    return [
        Sample(f"key <{n}>", f"{n}.jpg", {"raw": f"raw {n}", **({"long": f"long {n}"} if n != 5 else {})}, label=n % 3)
        for n in range(ROWS)
    ]


@pytest.fixture
def path(tmp_path, features, samples):
    store = Store.create(
        tmp_path / "photos.zarr",
        dataset="photos",
        manifest={},
        parts=[Part.of(samples)],
        captions=["raw", "long"],
        shard_rows=16,
        chunk_rows=4,
    )
    for name, values in features.items():
        modality, _, *caption = name.split("/")
        array = store.add(identity(modality, dim=values.shape[1]), *caption)
        status = np.where(np.isnan(values[:, 0]), Status.MISSING, Status.OK).astype(np.uint8)
        for shard in array.shards:
            span = slice(*array.span(shard))
            array.write(shard, values[span], status[span])
    return store.path


@pytest.fixture
def store(path):
    return sail_align.open_store(path)


def add_other(store):
    """Add the array of another image encoder."""
    known = identity("image", dim=8)
    return store.add(replace(known, spec=replace(known.spec, id="other")))


def check(row, number, samples, features):
    assert row.number == number
    assert {name: getattr(row, name) for name in vars(samples[0])} == vars(samples[number])
    for name, values in features.items():
        np.testing.assert_array_equal(row.features[name], values[number])
        assert row.features[name].dtype == np.float16
        assert row.status[name] == ("missing" if number in MISSING[name] else "ok")


def test_rows_have_samples_features_and_statuses(store, samples, features):
    assert len(store) == ROWS
    for number in (0, 3, 15, 16, 49, -1, -50, np.int64(7)):
        check(store[number], int(number) % ROWS, samples, features)
    for number, row in enumerate(store):
        check(row, number, samples, features)
    assert number == ROWS - 1


@pytest.mark.parametrize("place", [slice(None), slice(3, 20, 5), slice(None, None, -7), slice(-4, 99), slice(9, 2)])
@pytest.mark.parametrize("at_a_time", [7, view.READ_ROWS])
def test_slices_are_those_of_a_list(store, samples, features, monkeypatch, place, at_a_time):
    monkeypatch.setattr(view, "READ_ROWS", at_a_time)
    found = store[place]
    assert [row.number for row in found] == list(range(ROWS))[place]
    for row in found:
        check(row, row.number, samples, features)


def test_row_names_the_features_of_its_only_encoders(store, features):
    row = store[0]
    np.testing.assert_array_equal(row.image_features, features["image/fake-image"][0])
    np.testing.assert_array_equal(row.text_features["long"], features["text/fake-text/long"][0])
    assert [store[number].ok for number in (0, 3, 4, 5, 49)] == [True, False, False, False, False]
    assert repr(row).startswith(
        "Row(key='key <0>', image='0.jpg', captions={'raw': 'raw 0', 'long': 'long 0'}, label=0"
    )


def test_row_of_several_encoders_asks_for_a_path(store):
    add_other(store)
    row = sail_align.open_store(store.path)[0]
    with pytest.raises(UserError, match=r"features of 2 image encoders \(image/fake-image, image/other\)"):
        _ = row.image_features
    assert row.status["image/other"] == "pending"
    assert np.isnan(row.features["image/other"]).all()


def test_rows_of_an_unfinished_store_appear_when_committed(store):
    array = add_other(store)
    assert store[0].status["image/other"] == "pending"
    array.write(0, np.ones((16, 8), np.float16), np.zeros(16, np.uint8))
    assert store[0].status["image/other"] == "ok"


@pytest.mark.parametrize("number", [ROWS, -ROWS - 1])
def test_missing_row_raises_index_error(store, number):
    with pytest.raises(IndexError, match=f"photos.zarr has no row {number}: it has 50 rows"):
        _ = store[number]


def test_table_has_index_statuses_and_features(store, samples, features):
    frame = store.to_pandas(features=True)
    assert list(frame["key"]) == [sample.key for sample in samples]
    assert list(frame["caption.long"]) == [sample.captions.get("long") for sample in samples]
    assert list(frame.index[frame["text/fake-text/long.status"] == "missing"]) == [3, 5]
    for name, values in features.items():
        np.testing.assert_array_equal(np.stack(frame[name]), values)
    assert list(store.to_pandas().columns) == [name for name in frame.columns if name not in features]


@pytest.mark.parametrize(("start", "stop"), [(7, 19), (-3, None), (10, 10), (99, None)])
def test_table_of_some_rows(store, start, stop, samples):
    frame = store.to_pandas(start, stop, features="image/fake-image")
    assert list(frame["key"]) == [sample.key for sample in samples][start:stop]
    assert len(frame.columns) == 7 + 3 + 1


def test_table_of_an_unknown_array_is_refused(store):
    with pytest.raises(UserError, match=r"has no array 'image/x'\. It has image/fake-image, text/fake-text/raw"):
        store.to_pandas(features=["image/x"])


def test_table_without_pandas_asks_for_it(store, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(UserError, match="to_pandas needs pandas"):
        store.to_pandas()


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_pairs_of_rows_that_are_ok(store, features, workers):
    ok = [number for number in range(ROWS) if number not in (3, 4, 49)]
    dataset = store.torch_dataset("raw")
    assert list(dataset.rows) == ok
    batches = list(DataLoader(dataset, batch_size=8, num_workers=workers))
    for place, name in enumerate(["image/fake-image", "text/fake-text/raw"]):
        read = torch.cat([batch[place] for batch in batches])
        assert read.dtype == torch.float32
        np.testing.assert_array_equal(read.numpy(), features[name][ok].astype(np.float32))


def test_torch_pairs_of_several_captions(store, features):
    dataset = pickle.loads(pickle.dumps(store.torch_dataset()))  # noqa: S301 (its own)
    assert list(dataset.rows) == [number for number in range(ROWS) if number not in (3, 4, 5, 49)]
    image_D, texts = dataset[-1]
    np.testing.assert_array_equal(image_D.numpy(), features["image/fake-image"][48].astype(np.float32))
    assert list(texts) == ["raw", "long"]
    np.testing.assert_array_equal(texts["long"].numpy(), features["text/fake-text/long"][48].astype(np.float32))
    assert list(store.torch_dataset(["long"])[0][1]) == ["long"]
    assert list(store.torch_dataset([])[0][1]) == []
    with pytest.raises(IndexError):
        _ = dataset[len(dataset)]


def test_torch_pairs_of_unknown_caption_or_no_rows_are_refused(store, tmp_path):
    with pytest.raises(UserError, match="has no text features of caption 'c0'"):
        store.torch_dataset("c0")
    add_other(store)
    with pytest.raises(UserError, match="has no row with features of an image and caption 'raw'"):
        store.torch_dataset("raw", image_encoder="other")


def test_damaged_features_are_refused(store):
    file = store.path / "image/fake-image/features/c/0/0"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    for read in (lambda: store[0], lambda: store.torch_dataset("raw")[0], lambda: store.to_pandas(features=True)):
        with pytest.raises(UserError, match="damaged"):
            read()


def test_pickled_store_is_opened_again(store, samples, features):
    assert "rows" in repr(store)  # which opens the arrays
    check(pickle.loads(pickle.dumps(store))[7], 7, samples, features)  # noqa: S301 (its own)


def test_store_is_a_path(store):
    assert os.fspath(store) == str(store.path)
    assert len(sail_align.open_store(store)) == ROWS


def test_text_shows_the_contents(store):
    assert repr(store).splitlines() == [
        f"<store {store.path} of photos: 50 rows, captions: raw, long>",
        "  image  fake-image  8  48 ok, 2 missing",
        "  raw    fake-text   4  49 ok, 1 missing",
        "  long   fake-text   4  48 ok, 2 missing",
    ]


def test_html_escapes_everything(store):
    store.dataset = "<script>alert(1)</script>\x1b[1m"
    page = store._repr_html_()
    assert "<td>fake-image</td><td>8</td><td>48 ok, 2 missing</td>" in page
    assert "<script>" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[1m" in page


def test_text_of_a_damaged_store_says_so(store):
    (store.path / "image/fake-image/zarr.json").write_text("{}")
    assert "zarr.json is damaged" in repr(store)
    assert "zarr.json is damaged" in store._repr_html_()


def test_text_of_an_empty_store(tmp_path, samples):
    store = Store.create(tmp_path / "new.zarr", dataset="new", manifest={}, parts=[Part.of(samples)], captions=[])
    assert repr(store) == f"<store {store.path} of new: 50 rows, captions: none>"
    assert store._repr_html_().endswith("<p>No features yet.</p>")
    assert store[0].features == {}


@pytest.mark.parametrize("value", [3, None, ["a", "b"]])
def test_open_store_takes_one_path(value):
    with pytest.raises(UserError, match="path is invalid: got"):
        sail_align.open_store(value)
