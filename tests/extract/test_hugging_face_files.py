"""Data files of a Hugging Face data set by name, and parquet files that are streamed instead of copied."""

import io
import json
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, FakeHub
from PIL import Image
from pydantic import ValidationError
from tars import grey, picture

from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest
from sail_align.extract.recognise.columns import Choices
from sail_align.extract.recognise.hub import recognise_hub_folder
from sail_align.extract.sources import hugging_face_rows
from sail_align.extract.sources.hugging_face import HuggingFaceConfig
from sail_align.extract.sources.hugging_face_load import _short_names, open_rows
from sail_align.extract.store.open_or_create import open_or_create

SIZES = {"train-0.parquet": 11, "train-1.parquet": 1, "train-2.parquet": 17}
ROWS = sum(SIZES.values())
GREYS = [number % 16 for number in range(ROWS)]  # `picture` has 16 shades


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """A folder as from the hub: files of row groups of four rows, and a test split of three rows."""
    (tmp_path / "hub/data").mkdir(parents=True)
    first = 0
    for name, size in {**SIZES, "test-0.parquet": 3}.items():
        write(tmp_path / "hub/data" / name, range(first, first + size))
        first += size
    return tmp_path


def write(path, numbers):
    features = {
        "image": datasets.Image(),
        "title": datasets.Value("string"),
        "kind": datasets.ClassLabel(names=["a", "b"]),
    }
    features["others"] = datasets.List(datasets.Value("string"))
    columns = {
        "image": [{"bytes": picture(number), "path": None} for number in numbers],
        "title": [f"title {number}" for number in numbers],
        "kind": [number % 2 for number in numbers],
        "others": [[f"{number} {other}" for other in range(number % 3)] for number in numbers],
    }
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features)).data.table
    pq.write_table(table, path, row_group_size=4)


def source(data_root, **fields):
    fields = {"root": "hub", "captions": {"raw": "title", "alt": "others"}, "label": "kind"} | fields
    return HuggingFaceConfig(**{"kind": "hugging-face", **fields}).open(data_root)


def test_streamed_rows_equal_loaded_ones(folder, cache):
    streamed = source(folder, streaming=True)
    samples = list(streamed.samples())
    assert [grey(streamed.image(sample.image)) for sample in samples] == GREYS
    assert streamed.captions == ("raw", "alt0", "alt1")
    assert streamed.classes == ("a", "b")
    assert not list(cache.rglob("*.arrow"))
    loaded = source(folder)
    assert [replace(sample, image="") for sample in samples] == [replace(each, image="") for each in loaded.samples()]
    assert list(cache.rglob("*.arrow"))
    assert samples[12].image == "data/train-2.parquet:0"
    assert [(part.name, [file.name for file in part.files]) for part in streamed.parts()] == [
        (f"data/{name}", [name]) for name in SIZES
    ]


def test_each_image_is_read_once(folder, monkeypatch):
    monkeypatch.setattr(hugging_face_rows, "LEAST_ROWS", 2)
    monkeypatch.setattr(hugging_face_rows, "MOST_ROWS", 2)
    read = []

    class Counted(pq.ParquetFile):
        def iter_batches(self, *args, **options):
            for batch in super().iter_batches(*args, **options):
                read.append(len(batch))
                yield batch

    monkeypatch.setattr(pq, "ParquetFile", Counted)
    streamed = source(folder, streaming=True)
    locations = [sample.image for sample in streamed.samples()]
    read.clear()
    assert [grey(streamed.image(location)) for location in locations] == GREYS
    assert sum(read) == ROWS
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda location: grey(streamed.image(location)), 9 * locations)) == 9 * GREYS


def test_images_in_any_order(folder, monkeypatch):
    monkeypatch.setattr(hugging_face_rows, "LEAST_ROWS", 1)
    monkeypatch.setattr(hugging_face_rows, "MOST_ROWS", 1)
    streamed = source(folder, streaming=True)
    numbered = [(number, sample.image) for number, sample in enumerate(streamed.samples())] * 3
    random.Random(0).shuffle(numbered)
    assert [grey(streamed.image(location)) for _, location in numbered] == [number % 16 for number, _ in numbered]
    read = [0]
    last = source(folder, streaming=True)
    whole = pq.ParquetFile.iter_batches

    def count(self, *args, **options):
        for batch in whole(self, *args, **options):
            read[0] += len(batch)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", count)
    assert grey(last.image("data/train-2.parquet:14")) == 26 % 16
    assert read == [3]  # of its row group, 12 to 15


def test_streamed_store(folder):
    """An index is built, resumed and compared as for any files."""
    about = {"name": "x", "purpose": "train", "title": "t", "licence": "l", "get": "g"}
    fields = {"kind": "hugging-face", "root": "hub", "captions": {"raw": "title"}, "streaming": True}
    manifest = Manifest.model_validate({**about, "source": fields})
    store = open_or_create(folder / "x.zarr", manifest, manifest.open_source(folder), quiet=True)
    assert store.rows == ROWS
    write(folder / "hub/data/train-2.parquet", range(50, 67))
    with pytest.raises(UserError, match=r"has sample '12' in row 12, but .*train-2.parquet now has"):
        open_or_create(folder / "x.zarr", manifest, manifest.open_source(folder), quiet=True)
    plain = Manifest.model_validate({**about, "source": {"kind": "hugging-face", "root": "hub"}})
    assert not {"streaming", "data_files", "key", "group"} & plain.rows["source"].keys()


def test_streams_files_at_urls(folder):
    memory = fsspec.filesystem("memory")
    for name in SIZES:
        memory.pipe(f"/bucket/{name}", (folder / "hub/data" / name).read_bytes())
    try:
        config = HuggingFaceConfig(
            kind="hugging-face", data_files="memory://bucket/train-{0..2}.parquet", streaming=True
        )
        assert config.urls == ["memory://bucket/train-{0..2}.parquet"]
        streamed = config.open(folder)
        samples = list(streamed.samples())
        assert [grey(streamed.image(sample.image)) for sample in samples] == GREYS
        assert [(part.name, part.files) for part in streamed.parts()][1] == ("memory:///bucket/train-1.parquet", ())
        with pytest.raises(UserError, match="the data set has no such file"):
            streamed.image("memory://bucket/other.parquet:0")
    finally:
        memory.rm("/bucket", recursive=True)


READ_FROM_HUB = """
import json, sys
from pathlib import Path
from sail_align.extract.sources.hugging_face import HuggingFaceConfig

found = HuggingFaceConfig(kind="hugging-face", name="owner/photos", streaming=True, captions="title").open(Path())
samples = [(sample.image, sample.captions["c0"]) for sample in found.samples()]
print(json.dumps([samples, [part.name for part in found.parts()]]), flush=True)
sys.stdin.readline()
print(json.dumps([found.image(samples[119][0]).getpixel((x, 0)) for x in range(90)]))
"""


@pytest.mark.slow
def test_streams_a_data_set_of_the_hub(tmp_path):
    """With the real clients. Captions are indexed without transferring images, and nothing is copied to the disk."""
    noise, files = np.random.default_rng(0), {}
    for part in range(2):
        pixels = noise.integers(0, 256, (60, 90, 90, 3), dtype=np.uint8)
        table = pa.table({"image": [encode(each) for each in pixels], "title": [f"{part} {row}" for row in range(60)]})
        pq.write_table(table, tmp_path / "part.parquet", row_group_size=20)
        files[f"data/train-{part}.parquet"] = (tmp_path / "part.parquet").read_bytes()
    home = tmp_path / "home"
    with FakeHub(files) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", READ_FROM_HUB], env={**os.environ, **settings}, **piped) as child:
            samples, parts = json.loads(child.stdout.readline())
            for_index, hub.sent = hub.sent, 0
            row, _ = child.communicate("\n", timeout=60)
        hub.shutdown()
    assert samples == [[f"data/train-{part}.parquet:{row}", f"{part} {row}"] for part in range(2) for row in range(60)]
    assert parts == [f"hf://datasets/owner/photos@{COMMIT}/{name}" for name in files]
    assert json.loads(row) == pixels[-1, 0].tolist()
    assert for_index < sum(map(len, files.values())) / 4
    assert hub.sent < len(files["data/train-1.parquet"]) / 2  # its row group
    assert sum(file.stat().st_size for file in home.rglob("*") if file.is_file()) < 10_000


def encode(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_names_of_files_on_the_hub(tmp_path):
    hub = "hf://datasets/owner/photos@0123abcd/"
    names = [f"{hub}data/train-0.parquet", "hf://datasets/old@refs%2Fconvert%2Fparquet/b/0.parquet", "s3://x/y.parquet"]
    short = ["data/train-0.parquet", "b/0.parquet", "s3://x/y.parquet"]
    assert _short_names(names, tmp_path) == dict(zip(short, names, strict=True))
    twins = [f"{hub}0.parquet", "hf://datasets/owner/other@1/0.parquet"]
    assert _short_names(twins, tmp_path) == dict(zip(twins, twins, strict=True))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"data_files": "data/train-1.parquet"}, 1),
        ({"data_files": "data/train-{0..1}.parquet"}, 12),
        ({"data_files": ["data/train-1.parquet", "data/test*"]}, 4),
        ({"data_files": {"train": "data/test*", "other": "none"}}, 3),
        ({"data_files": {"a": "none", "b": ["**/train-[01].parquet"]}, "split": "b"}, 12),
        ({"root": "hub/data/test-0.parquet"}, 3),
        ({"root": ".", "data_files": "a [1]*.parquet"}, 5),
    ],
)
def test_data_files(folder, fields, rows, streaming):
    write(folder / "a [1]*.parquet", range(5))
    assert len(list(source(folder, streaming=streaming, **fields).samples())) == rows


def test_other_files_are_loaded(folder):
    (folder / "images").mkdir()
    (folder / "images/7.jpg").write_bytes(picture(7))
    for name, text in {
        "t.csv": "image,title\nimages/7.jpg,hello\n",
        "t.tsv": "image\ttitle\nimages/7.jpg\thello\n",
        "t.json": '[{"image": "images/7.jpg", "title": "hello"}]',
    }.items():
        (folder / name).write_text(text)
        found = source(folder, root=name, captions={"raw": "title"}, label=None)
        (sample,) = found.samples()
        assert (grey(found.image(sample.image)), sample.captions) == (7, {"raw": "hello"})


def test_recognises_lists_of_captions_and_images_that_were_not_cast(tmp_path):
    (tmp_path / "hub").mkdir()
    sentences = [["a red house", "the house"], ["two dogs"]]
    columns = {
        "picture": [picture(0), picture(1)],
        "title": ["a house by a lake", "dogs at play"],
        "sentences": sentences,
    }
    pq.write_table(pa.table(columns), tmp_path / "hub/train.parquet")
    found = recognise_hub_folder(tmp_path / "hub", Choices())
    assert found.source["image"] == "picture"
    assert found.source["captions"] == {"title": "title", "sentences": "sentences"}
    assert source(tmp_path, **found.source, label=None).captions == ("title", "sentences0", "sentences1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_files": "../*.parquet", "root": "."}, r"Path '../\*.parquet' is outside the data root"),
        ({"data_files": "/etc/*.parquet"}, "outside the data root"),
        ({"data_files": "none*.parquet"}, r"No file matches .*none\*.parquet. Correct source.data_files"),
        ({"data_files": "t.md"}, r"t.md is invalid: got the ending '.md', expected .parquet, .csv"),
        ({"data_files": ["t.csv", "data/test-0.parquet"]}, "expected one format"),
        ({"data_files": "../x.parquet", "name": "owner/x"}, "'../x.parquet' is invalid: expected a path in owner/x"),
        ({"data_files": "s3://x/y.parquet", "name": "owner/x"}, "expected a path in owner/x"),
        ({"split": "other", "streaming": True}, "hub has no split 'other'. Its splits are train, test"),
        ({"data_files": "t.csv", "streaming": True}, "cannot be streamed: got the format 'csv', expected parquet"),
        ({"data_files": "torn.parquet", "streaming": True}, "Data file torn.parquet cannot be read: .* Restore it"),
        (
            {"data_files": ["data/test-0.parquet", "bare.parquet"], "streaming": True},
            "bare.parquet has no column 'title'",
        ),
    ],
)
def test_rejects_wrong_data_files(folder, fields, message):
    for name in ("t.md", "t.csv", "torn.parquet"):
        (folder / "hub" / name).write_text("image,title\n")
    pq.write_table(pa.table({"image": [b""]}), folder / "hub/bare.parquet")
    with pytest.raises(UserError, match=message):
        list(source(folder, **fields).samples())


def test_rejects_data_files_without_the_split():
    with pytest.raises(ValidationError, match="It has no files of the split 'train'"):
        HuggingFaceConfig(kind="hugging-face", data_files={"test": "x.parquet"})


def test_rejects_rows_of_a_changed_file(folder):
    streamed = source(folder, streaming=True)
    write(folder / "hub/data/train-0.parquet", range(2))
    with pytest.raises(UserError, match=r"train-0.parquet has changed since it was indexed: it has no row 5"):
        streamed.image("data/train-0.parquet:5")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", '{"_data_files": [{"filename": "../other/data.arrow"}]}', "'../other/data.arrow', outside"),
        ("state.json", '{"_data_files": [{"filename": "/other/data.arrow"}]}', "'/other/data.arrow', outside"),
        ("dataset_dict.json", '{"splits": ["../other"]}', "'../other', outside"),
        ("dataset_dict.json", '{"splits": ["/other"]}', "'/other', outside"),
        ("README.md", "---\nconfigs: &a [*a]\n---\n", "with aliases expanded"),
        ("README.md", f"---\na: &a [{'x,' * 400}]\nconfigs: [{'*a,' * 400}]\n---\n", "with aliases expanded"),
    ],
)
def test_saved_data_sets_name_only_their_own_files(tmp_path, file, content, message):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    (tmp_path / "saved" / file).write_text(content)
    config = HuggingFaceConfig(kind="hugging-face", root="saved")
    with pytest.raises(UserError, match=re.escape(message)):
        open_rows(config, tmp_path)


def test_saved_data_sets_with_a_fifo_are_refused(tmp_path):
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    os.mkfifo(tmp_path / "data.arrow")
    with pytest.raises(UserError, match=r"data\.arrow is invalid: it is not a regular file"):
        open_rows(HuggingFaceConfig(kind="hugging-face", root="."), tmp_path)
