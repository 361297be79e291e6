"""Samples and pixels out of tars."""

import csv
import json
import random
import tarfile
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import FakeText, FakeVision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tars import grey, img2dataset_members, picture, write_tar

from sail_align.extract.data import Source, Status, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.executor.run import extract
from sail_align.extract.manifest import Manifest
from sail_align.extract.sources.webdataset import WebDatasetConfig
from sail_align.extract.store.open_or_create import open_or_create

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "flickr8k-dev"


def source(root: Path, **fields) -> Source:
    return WebDatasetConfig(kind="webdataset", **({"captions": {"raw": "txt"}} | fields)).open(root)


def read(root: Path, **fields):
    return list(source(root, **fields).samples())


def test_reads_img2dataset_output(tmp_path):
    for tar in range(2):
        write_tar(tmp_path / f"{tar:05d}.tar", img2dataset_members(range(tar * 5, tar * 5 + 5)))
    tars = source(tmp_path, captions={"raw": "txt", "again": "json:caption"})
    samples = list(tars.samples())
    assert [s.key for s in samples] == [f"{i // 5:05d}/{i:09d}" for i in range(10)]
    assert [s.url for s in samples] == [f"http://example.org/{i}.jpg" for i in range(10)]
    assert [dict(s.captions) for s in samples] == [{"raw": f"picture {i}", "again": f"picture {i}"} for i in range(10)]
    assert [grey(tars.image(s.image)) for s in samples] == list(range(10))
    assert samples[5].image == f"00001.tar:512:{len(picture(5))}"
    assert [(part.name, part.files) for part in tars.parts()] == [
        (name, (tmp_path / name,)) for name in ("00000.tar", "00001.tar")
    ]


def test_texts_are_captions_unless_the_manifest_says_otherwise(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [*img2dataset_members(range(2)), ("x.jpg", picture(2))])
    fields = {"name": "made", "purpose": "train", "title": "Made", "licence": "none", "get": "made by a test"}
    manifest = fields | {"source": {"kind": "webdataset"}}

    def opened(**changes):
        caplog.clear()
        return Manifest.model_validate(manifest | changes).open_source(tmp_path)

    tars = opened()
    assert [dict(s.captions) for s in tars.samples()] == [{"raw": "picture 0"}, {"raw": "picture 1"}, {}]
    assert tars.captions == ("raw",)
    assert caplog.text.count("The .txt of each sample becomes its caption 'raw'.") == 1
    (tmp_path / "c.csv").write_text("url,text\nhttp://example.org/0.jpg,a\n")
    joined = opened(recaptions={"files": "c.csv", "url": "url", "captions": {"raw": "text"}})
    for source in (joined, opened(source={"kind": "webdataset", "captions": {}})):
        assert [dict(s.captions) for s in source.samples()] == [{}] * 3
        assert (source.captions, caplog.text) == ((), "")
    write_tar(tmp_path / "1.tar", img2dataset_members(range(2)))
    write_tar(tmp_path / "0.tar", [])
    assert opened().captions == ("raw",)
    (tmp_path / "1.tar").unlink()
    write_tar(tmp_path / "0.tar", [("0.jpg", picture(0)), ("0.cls", b"0"), ("0.txt", b""), ("0.long.txt", b"a")])
    for source in (opened(), opened(source={"kind": "webdataset", "classes": ["a"]})):
        assert [dict(s.captions) for s in source.samples()] == [{}]
        assert (source.captions, caplog.text) == ((), "")


@pytest.mark.slow
@given(order=st.permutations(range(12)), form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]))
def test_member_order_does_not_matter(tmp_path_factory, order, form):
    root = tmp_path_factory.mktemp("any")
    members = img2dataset_members(range(4))
    write_tar(root / "a.tar", [members[i] for i in order], form)
    tars = source(root)
    found = {s.key: (grey(tars.image(s.image)), dict(s.captions), s.url) for s in tars.samples()}
    assert found == {f"a/{i:09d}": (i, {"raw": f"picture {i}"}, f"http://example.org/{i}.jpg") for i in range(4)}


def test_keys_contain_the_path_of_the_tar(tmp_path):
    for tar in ("train/0.tar", "train/1.tar", "more/0.tar"):
        (tmp_path / tar).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / tar, [("./a/0.jpg", picture(1)), ("./a/0.txt", b"one")])
    keys = [s.key for s in read(tmp_path, files=["train/{0..1}.tar", "more/*.tar"])]
    assert keys == ["train/0/a/0", "train/1/a/0", "more/0/a/0"]
    absolute = [s.key for s in read(Path("/"), files=str(tmp_path / "train" / "*.tar"))]
    assert absolute == [f"{tmp_path}/train/0/a/0", f"{tmp_path}/train/1/a/0"]


def test_long_names_and_unusual_endings(tmp_path):
    key = "folder/" * 20 + "k" * 120
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write_tar(
            tmp_path / "a.tar",
            [
                (f"{key}.JPG", picture(3)),
                (f"{key}.seg.png", b"mask"),
                (f"{key}.long.txt", b"a story"),
                ("._x.jpg", b""),
            ],
            form,
        )
        (sample,) = read(tmp_path, captions={"long": "long.txt"})
        assert (sample.key, sample.captions) == (f"a/{key}", {"long": "a story"})
        assert grey(source(tmp_path).image(sample.image)) == 3


def test_table_beside_tar_replaces_json(tmp_path):
    members = [member for member in img2dataset_members(range(3)) if member[0] != "000000001.json"]
    write_tar(tmp_path / "0.tar", [member for member in members if member[0] != "000000002.json"])
    rows = [{"key": f"{i:09d}", "url": f"http://table.org/{i}", "caption": f"table {i}"} for i in (2, 1, 0)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    tars = source(tmp_path, captions={"raw": "json:caption"})
    assert [(s.url, s.captions["raw"]) for s in tars.samples()] == [
        ("http://example.org/0.jpg", "picture 0"),
        ("http://table.org/1", "table 1"),
        ("http://table.org/2", "table 2"),
    ]
    assert tars.parts()[0].files == (tmp_path / "0.tar", tmp_path / "0.parquet")


def test_nan_is_absent(tmp_path):
    """pandas writes it for a missing text, into the json or into the table beside the tar."""
    values = [float("nan"), None, "", "nan", "text"]
    members = [(f"{i}.jpg", picture(i)) for i in range(6)]
    row = b'{"caption": NaN, "url": NaN, "label": NaN, "texts": ["a", NaN]}'
    write_tar(tmp_path / "0.tar", [*members, ("5.json", row)])
    rows = [{"key": str(i), "caption": value, "url": value} for i, value in enumerate(values)]
    pq.write_table(
        pa.table({name: pa.array([r[name] for r in rows], from_pandas=True) for name in rows[0]}),
        tmp_path / "0.parquet",
    )
    samples = read(tmp_path, captions={"raw": "json:caption"}, label="json:label", classes=["cat"])
    assert [(s.captions.get("raw"), s.url) for s in samples] == [
        (None, ""),
        (None, ""),
        (None, ""),
        ("nan", "nan"),
        ("text", "text"),
        (None, ""),
    ]
    assert {s.label for s in samples} == {-1}
    assert dict(read(tmp_path, captions="json:texts")[5].captions) == {"c0": "a"}
    pq.write_table(pa.table({"key": ["0", "1"], "caption": [float("nan"), 2.5]}), tmp_path / "0.parquet")
    assert [dict(s.captions) for s in read(tmp_path, captions={"raw": "json:caption"})[:2]] == [{}, {"raw": "2.5"}]


def test_ambiguous_rows_beside_tar_are_not_used(tmp_path, caplog):
    """Its captions would be paired with other images."""
    keys = ["a/1", "b/1", "a/2", "3", "c/4", "5"]
    write_tar(tmp_path / "0.tar", [(f"{key}.jpg", picture(i)) for i, key in enumerate(keys)])
    rows = [{"key": key, "caption": f"row {key}"} for key in ("1", "a/2", "3", "3", "4", "5")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    samples = read(tmp_path, captions={"raw": "json:caption"})
    assert {s.key: s.captions.get("raw") for s in samples} == {
        "0/a/1": None,
        "0/b/1": None,
        "0/a/2": "row a/2",
        "0/3": None,
        "0/c/4": "row 4",
        "0/5": "row 5",
    }
    assert "has 3 samples whose row in 0.parquet is ambiguous, left without its fields" in caplog.text


def test_warns_of_unreadable_table_beside_tar(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [("0.jpg", picture(0)), ("0.txt", b"text")])
    (tmp_path / "0.parquet").write_bytes(b"cut")
    assert [(s.url, dict(s.captions)) for s in read(tmp_path)] == [("", {"raw": "text"})]
    assert "has a table 0.parquet that cannot be read" in caplog.text


def test_invalid_texts_and_json(tmp_path, caplog):
    members = [
        *((f"{i}.jpg", picture(i)) for i in range(5)),
        ("0.txt", b"caf\xe9\n"),
        ("1.txt", b" \n"),
        ("2.txt", b"ok"),
        ("2.json", b'{"url": "http://example.org/\\ud800"}'),
        ("3.json", b"{cut"),
        ("4.json", b"[" * 100_000),
    ]
    write_tar(tmp_path / "0.tar", members)
    samples = read(tmp_path)
    assert [dict(s.captions) for s in samples] == [{"raw": "caf\ufffd"}, {}, {"raw": "ok"}, {}, {}]
    assert samples[2].url.startswith("http://example.org/\ufffd")
    assert "has 2 .json members that are not JSON objects" in caplog.text


def test_first_listed_image_ending_wins(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", picture(2)), ("0.jpg", picture(1)), ("0.txt", b"x")])
    assert [grey(source(tmp_path).image(s.image)) for s in read(tmp_path)] == [1]
    assert [grey(source(tmp_path).image(s.image)) for s in read(tmp_path, images=["png", "jpg"])] == [2]


def test_duplicate_members_are_left_out(tmp_path, caplog):
    members = img2dataset_members(range(3))
    write_tar(tmp_path / "0.tar", [*members, ("000000001.jpg", picture(9))])
    assert [s.key for s in read(tmp_path)] == ["0/000000000", "0/000000002"]
    assert "0.tar has two members of the same name for 1 keys, left out (the first: '000000001.jpg')" in caplog.text


def test_caption_without_image_keeps_its_row(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [("0.txt", b"alone"), ("1.npy", b"??"), ("2.jpg", picture(2)), ("2.txt", b"both")])
    samples = read(tmp_path)
    assert [(s.key, s.image != "") for s in samples] == [("0/0", False), ("0/2", True)]
    with pytest.raises(UnreadableImageError) as problem:
        source(tmp_path).image(samples[0].image)
    assert problem.value.status is Status.MISSING
    assert "0.tar has 1 keys with neither image nor caption, left out" in caplog.text


def test_truncated_tar_keeps_its_intact_samples(tmp_path, caplog):
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    write_tar(whole, img2dataset_members(range(4)))
    expected = read(tmp_path, files="whole.tar")
    offset, size = map(int, expected[2].image.split(":")[1:])
    cut.write_bytes(whole.read_bytes()[: offset + size // 2])
    tars = source(tmp_path, files="cut.tar")
    samples = list(tars.samples())
    assert [dict(s.captions) for s in samples] == [{"raw": "picture 0"}, {"raw": "picture 1"}, {}]
    assert [grey(tars.image(s.image)) for s in samples[:2]] == [0, 1]
    with pytest.raises(UnreadableImageError) as problem:
        tars.image(samples[2].image)
    assert problem.value.status is Status.UNDECODABLE
    assert "cut.tar is truncated at byte" in caplog.text


@pytest.mark.parametrize("ending", ["jpg", "txt", "json"])
@pytest.mark.parametrize("size", [1 << 36, 8_000_000])
def test_sizes_beyond_the_end_are_not_allocated(tmp_path, caplog, ending, size):
    write_tar(tmp_path / "0.tar", img2dataset_members(range(2)))
    header = tarfile.TarInfo(f"2.{ending}")
    header.size = size
    content = (tmp_path / "0.tar").read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512)
    (tmp_path / "0.tar").write_bytes(content + header.tobuf(tarfile.GNU_FORMAT) + b"short")
    tars = source(tmp_path)
    tracemalloc.start()
    try:
        samples = list(tars.samples())
        for sample in samples[2:]:
            with pytest.raises(UnreadableImageError, match="the tar is truncated"):
                tars.image(sample.image)
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally:
        tracemalloc.stop()
    assert len(samples) == (3 if ending == "jpg" else 2)
    assert "in the middle of a member" in caplog.text
    assert ("has a text of 68,719,476,736 bytes, left out" in caplog.text) == (ending != "jpg" and size == 1 << 36)


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>" * 100])
def test_warns_of_a_file_that_is_not_a_tar(tmp_path, caplog, content):
    (tmp_path / "0.tar").write_bytes(content)
    write_tar(tmp_path / "1.tar", img2dataset_members(range(2)))
    assert len(read(tmp_path)) == 2
    assert "0.tar is " in caplog.text


def test_empty_first_tar_does_not_hide_a_wrong_manifest(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", img2dataset_members(range(2)))
    assert len(read(tmp_path)) == 2
    assert "0.tar contains no samples." in caplog.text
    with pytest.raises(UserError, match=r"No sample of 1\.tar has a caption 'text'"):
        read(tmp_path, captions="text")


def test_rejects_tar_changed_since_indexing(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, img2dataset_members(range(4)))
    tars = source(tmp_path)
    location = list(tars.samples())[2].image
    write_tar(path, [("0.txt", b"one more"), *img2dataset_members(range(4))])
    with pytest.raises(UserError, match=r"0\.tar has changed since it was indexed"):
        tars.image(location)
    path.unlink()
    with pytest.raises(UserError, match=r"0\.tar is missing"):
        tars.image(location)


ODD = {"tags": ["a"], "width": 20, "size": {"a": 1}, "sizes": ["a", {"a": 1}], "kept": True, "digits": "9" * 5_000}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"files": "*.zip"}, r"No file matches .*\.zip\. Correct source\.files"),
        ({"files": "{0..1}.tar"}, r"No file matches .*1\.tar"),
        (
            {"captions": {"raw": "caption"}},
            "No sample of 0.tar has a caption 'caption'. Its members end in jpg, json, txt",
        ),
        ({"captions": {"raw": "json:captoin"}}, "has a caption 'json:captoin'"),
        ({"captions": "text"}, "has a caption 'text'"),
        ({"images": ["png"]}, "0.tar contains no png. Its members end in"),
        ({"classes": "classnames.txt"}, r"classnames\.txt is missing"),
        (
            {"captions": {"raw": "json:tags"}},
            "'json:tags' of 0/000000000 is not text. If it is a list, write `captions: json",
        ),
        ({"captions": {"raw": "json:size"}}, "'json:size' of 0/000000000 is invalid: got {'a': 1}, expected text"),
        ({"captions": "json:size"}, "'json:size' of 0/000000000 is invalid: got {'a': 1}, expected text"),
        ({"captions": "json:sizes"}, "'json:sizes' of 0/000000000 is invalid: got {'a': 1}, expected text"),
        ({"captions": {"raw": "json:kept"}}, "'json:kept' of 0/000000000 is invalid: got True, expected text"),
        ({"classes": ["cat"], "label": "json:width"}, "Label of 0/000000000 is invalid: got '20', expected 0 to 0"),
        (
            {"classes": ["cat"], "label": "json:digits"},
            r"Label of 0/000000000 is invalid: got '9{40}', expected 0 to 0",
        ),
        ({"files": "nowhere://bucket/0.tar"}, "nowhere://bucket/0.tar cannot be opened: Protocol not known"),
    ],
)
def test_rejects_wrong_description(tmp_path, fields, message):
    members = img2dataset_members(range(2))
    members[1] = ("000000000.json", json.dumps(ODD).encode())
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=message):
        read(tmp_path, **fields)


def test_labels_and_class_names(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("tabby cat\ndog\n")
    members = [
        (f"s{i}.{ending}", data)
        for i in range(4)
        for ending, data in ((["webp", "jpg", "png", "jpeg"][i], picture(i)), ("cls", str(i % 2).encode()))
    ]
    write_tar(tmp_path / "test" / "0.tar", members)
    tars = source(tmp_path, files="test/*.tar", classes="classnames.txt", captions={})
    assert tars.classes == ("tabby cat", "dog")
    assert tars.captions == ()
    assert [(s.key, s.label, grey(tars.image(s.image))) for s in tars.samples()] == [
        (f"test/0/s{i}", i % 2, i) for i in range(4)
    ]


def test_needs_without_opening_files():
    about = WebDatasetConfig(
        kind="webdataset", files=["{00..03}.tar", "/abs/*.tar", "s3://bucket/{0..3}.tar"], classes="classnames.txt"
    )
    assert about.needs == ["*.tar", "classnames.txt"]
    assert WebDatasetConfig(kind="webdataset", classes="open_clip:imagenet").needs == ["*.tar"]


def test_one_caption_per_line(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        [("0.jpg", picture(0)), ("0.txt", b"a\r\nb\n\nc\n"), ("1.jpg", picture(1)), ("1.txt", "d\u2028e".encode())],
    )
    tars = source(tmp_path, captions="txt")
    assert tars.captions == ("c0", "c1", "c2")
    assert [dict(s.captions) for s in tars.samples()] == [{"c0": "a", "c1": "b", "c2": "c"}, {"c0": "d\u2028e"}]


def test_json_list_gives_several_captions(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.jpg", picture(0)), ("0.json", b'{"captions": ["a\\nb", "", "c"]}')])
    assert [dict(s.captions) for s in read(tmp_path, captions="json:captions")] == [{"c0": "a\nb", "c1": "c"}]


def test_tars_at_urls(tmp_path):
    memory = fsspec.filesystem("memory")
    for tar in range(2):
        write_tar(tmp_path / f"{tar:05d}.tar", img2dataset_members(range(tar * 3, tar * 3 + 3)))
        memory.pipe_file(f"/bucket/{tar:05d}.tar", (tmp_path / f"{tar:05d}.tar").read_bytes())
    here = read(tmp_path)
    for files in ("memory://bucket/{00000..00001}.tar", "memory://bucket/*.tar"):
        tars = source(tmp_path, files=files)
        there = list(tars.samples())
        assert [s.key.split("/bucket/")[1] for s in there] == [s.key for s in here]
        assert [(s.captions, s.url) for s in there] == [(s.captions, s.url) for s in here]
        assert [grey(tars.image(s.image)) for s in there] == list(range(6))
        assert tars.parts()[0].files == ()
    memory.rm("/bucket", recursive=True)
    with pytest.raises(UserError, match=r"00000\.tar is missing"):
        read(tmp_path, files="memory://bucket/{00000..00001}.tar")


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photos beside the repository")
def test_features_of_photos_in_tars(tmp_path):
    with (PHOTOS / "captions.csv").open(newline="") as table:
        captions = {row["image"]: row["caption"].strip() for row in csv.DictReader(table)}
    photos = sorted(captions)[:60]
    random.Random(0).shuffle(photos)
    for tar in range(3):
        members = [
            (f"{row:09d}.{ending}", data)
            for row, photo in enumerate(photos)
            if row % 3 == tar
            for ending, data in (
                ("txt", captions[photo].encode()),
                ("jpg", (PHOTOS / "images" / photo).read_bytes()),
                ("json", json.dumps({"url": photo}).encode()),
            )
        ]
        random.Random(tar).shuffle(members)
        write_tar(tmp_path / f"{tar:05d}.tar", members, tarfile.PAX_FORMAT)
    data = (tmp_path / "00002.tar").read_bytes()
    (tmp_path / "00002.tar").write_bytes(data[: len(data) * 2 // 3])
    about = Manifest.model_validate(
        {
            "name": "photos",
            "purpose": "train",
            "title": "Photos in tars",
            "licence": "research",
            "get": "made by a test",
            "source": {"kind": "webdataset", "captions": {"raw": "txt"}},
        }
    )
    tars = about.open_source(tmp_path)
    store = open_or_create(tmp_path / "photos.zarr", about, tars)
    extract(store, tars, image=FakeVision(), text=FakeText(), captions=["raw"], quiet=True)
    features, status = store.image().read(0, store.rows)
    rows = list(store.samples(0, store.rows))
    assert 40 < (status == Status.OK).sum() < store.rows <= 60
    assert set(status) <= {Status.OK, Status.MISSING, Status.UNDECODABLE}
    vision = FakeVision()
    for row in np.flatnonzero(status == Status.OK):
        photo = photos[int(rows[row].key.split("/")[1])]
        with Image.open(PHOTOS / "images" / photo) as image:
            expected = vision.encode(vision.preprocess(image.convert("RGB"))[None])[0].numpy().astype(np.float16)
        np.testing.assert_array_equal(features[row], expected)
        assert rows[row].captions.get("raw", captions[photo]) == captions[photo]
