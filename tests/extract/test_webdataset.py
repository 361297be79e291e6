"""Samples and pixels out of tars."""

import csv
import json
import random
import tarfile
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

from sail_align.extract.data import Status, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.executor.run import extract
from sail_align.extract.manifest import Manifest
from sail_align.extract.schema import WebDatasetSource as Description
from sail_align.extract.sources import open_source
from sail_align.extract.sources.webdataset import WebDatasetSource
from sail_align.extract.store.open_or_create import open_or_create

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "flickr8k-dev"


def source(root: Path, **fields) -> WebDatasetSource:
    return WebDatasetSource(Description(kind="webdataset", **({"captions": {"raw": "txt"}} | fields)), root)


def read(root: Path, **fields):
    return list(source(root, **fields).samples())


def test_img2dataset_output_is_read_as_it_lies(tmp_path):
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


@given(order=st.permutations(range(12)), form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]))
def test_members_in_any_order_give_the_same_samples(tmp_path_factory, order, form):
    root = tmp_path_factory.mktemp("any")
    members = img2dataset_members(range(4))
    write_tar(root / "a.tar", [members[i] for i in order], form)
    tars = source(root)
    found = {s.key: (grey(tars.image(s.image)), dict(s.captions), s.url) for s in tars.samples()}
    assert found == {f"a/{i:09d}": (i, {"raw": f"picture {i}"}, f"http://example.org/{i}.jpg") for i in range(4)}


def test_tars_that_count_alike_give_keys_of_their_own(tmp_path):
    for tar in ("train/0.tar", "train/1.tar", "more/0.tar"):
        (tmp_path / tar).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / tar, [("./a/0.jpg", picture(1)), ("./a/0.txt", b"one")])
    keys = [s.key for s in read(tmp_path, files=["train/{0..1}.tar", "more/*.tar"])]
    assert keys == ["train/0/a/0", "train/1/a/0", "more/0/a/0"]
    absolute = [s.key for s in read(Path("/"), files=str(tmp_path / "train" / "*.tar"))]
    assert absolute == [f"{tmp_path}/train/0/a/0", f"{tmp_path}/train/1/a/0"]


def test_long_names_endings_with_dots_and_capitals(tmp_path):
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


def test_the_table_beside_a_tar_stands_in_for_json(tmp_path):
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


def test_a_row_beside_a_tar_is_nobodys_where_it_may_be_of_several(tmp_path, caplog):
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
    assert "has 3 samples whose row in 0.parquet is not clear, left without its fields" in caplog.text


def test_a_table_that_cannot_be_read_is_said_and_costs_only_its_fields(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [("0.jpg", picture(0)), ("0.txt", b"text")])
    (tmp_path / "0.parquet").write_bytes(b"cut")
    assert [(s.url, dict(s.captions)) for s in read(tmp_path)] == [("", {"raw": "text"})]
    assert "0.parquet beside it that cannot be read" in caplog.text


def test_texts_that_are_no_text(tmp_path, caplog):
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
    assert "holds 2 members .json that are no mapping in JSON" in caplog.text


def test_of_several_images_the_first_listed_ending_counts(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", picture(2)), ("0.jpg", picture(1)), ("0.txt", b"x")])
    assert [grey(source(tmp_path).image(s.image)) for s in read(tmp_path)] == [1]
    assert [grey(source(tmp_path).image(s.image)) for s in read(tmp_path, images=["png", "jpg"])] == [2]


def test_doubled_members_are_left_out_and_counted(tmp_path, caplog):
    members = img2dataset_members(range(3))
    write_tar(tmp_path / "0.tar", [*members, ("000000001.jpg", picture(9))])
    assert [s.key for s in read(tmp_path)] == ["0/000000000", "0/000000002"]
    assert "0.tar holds two members of one name for 1 keys, left out (the first: '000000001.jpg')" in caplog.text


def test_a_text_without_its_image_keeps_its_row_and_a_key_with_neither_is_said(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [("0.txt", b"alone"), ("1.npy", b"??"), ("2.jpg", picture(2)), ("2.txt", b"both")])
    samples = read(tmp_path)
    assert [(s.key, s.image != "") for s in samples] == [("0/0", False), ("0/2", True)]
    with pytest.raises(UnreadableImageError) as problem:
        source(tmp_path).image(samples[0].image)
    assert problem.value.status is Status.MISSING
    assert "0.tar holds 1 keys with neither image nor caption, left out" in caplog.text


def test_a_cut_tar_serves_its_whole_samples_and_keeps_the_row_of_the_cut_one(tmp_path, caplog):
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
    assert "cut.tar is cut at byte" in caplog.text


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>" * 100])
def test_a_file_that_is_no_tar_is_said_and_the_others_are_read(tmp_path, caplog, content):
    (tmp_path / "0.tar").write_bytes(content)
    write_tar(tmp_path / "1.tar", img2dataset_members(range(2)))
    assert len(read(tmp_path)) == 2
    assert "0.tar is " in caplog.text


def test_an_empty_tar_is_said_and_a_first_one_does_not_hide_a_wrong_manifest(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", img2dataset_members(range(2)))
    assert len(read(tmp_path)) == 2
    assert "0.tar holds no sample." in caplog.text
    with pytest.raises(UserError, match=r"No sample of 1\.tar has a caption 'text'"):
        read(tmp_path, captions="text")


def test_a_tar_written_anew_since_it_was_indexed_is_noticed(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, img2dataset_members(range(4)))
    tars = source(tmp_path)
    location = list(tars.samples())[2].image
    write_tar(path, [("0.txt", b"one more"), *img2dataset_members(range(4))])
    with pytest.raises(UserError, match=r"0\.tar is no longer what was indexed"):
        tars.image(location)
    path.unlink()
    with pytest.raises(UserError, match=r"0\.tar is not there any more"):
        tars.image(location)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"files": "*.zip"}, r"No file .*\.zip; correct source\.files"),
        ({"files": "{0..1}.tar"}, r"No file .*1\.tar"),
        (
            {"captions": {"raw": "caption"}},
            "No sample of 0.tar has a caption 'caption'; its members end in jpg, json, txt",
        ),
        ({"captions": {"raw": "json:captoin"}}, "has a caption 'json:captoin'"),
        ({"captions": "text"}, "has a caption 'text'"),
        ({"images": ["png"]}, "0.tar holds no png; its members end in"),
        ({"classes": "classnames.txt"}, r"classnames\.txt is not there"),
        (
            {"captions": {"raw": "json:tags"}},
            "'json:tags' of 0/000000000 is no text; if it is a list, write `captions: json",
        ),
        ({"classes": ["cat"], "label": "json:width"}, "The label of 0/000000000 is '20'; the 1 classes count from 0"),
        ({"files": "nowhere://bucket/0.tar"}, "nowhere://bucket/0.tar cannot be opened: Protocol not known"),
    ],
)
def test_what_is_not_there_is_said(tmp_path, fields, said):
    members = img2dataset_members(range(2))
    members[1] = ("000000000.json", json.dumps({"tags": ["a"], "width": 20}).encode())
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=said):
        read(tmp_path, **fields)


def test_classification_tars_have_labels_and_named_classes(tmp_path):
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


def test_what_a_manifest_needs_can_be_looked_for_without_opening_anything():
    about = Description(
        kind="webdataset", files=["{00..03}.tar", "/abs/*.tar", "s3://bucket/{0..3}.tar"], classes="classnames.txt"
    )
    assert about.needs == ["*.tar", "classnames.txt"]
    assert Description(kind="webdataset", classes="open_clip:imagenet").needs == ["*.tar"]


def test_retrieval_tars_hold_a_caption_a_line(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        [("0.jpg", picture(0)), ("0.txt", b"a\r\nb\n\nc\n"), ("1.jpg", picture(1)), ("1.txt", "d\u2028e".encode())],
    )
    tars = source(tmp_path, captions="txt")
    assert tars.captions == ("c0", "c1", "c2")
    assert [dict(s.captions) for s in tars.samples()] == [{"c0": "a", "c1": "b", "c2": "c"}, {"c0": "d\u2028e"}]


def test_a_list_in_json_counts_as_several_captions(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.jpg", picture(0)), ("0.json", b'{"captions": ["a\\nb", "", "c"]}')])
    assert [dict(s.captions) for s in read(tmp_path, captions="json:captions")] == [{"c0": "a\nb", "c1": "c"}]


def test_tars_at_urls_give_the_same_and_are_read_by_range(tmp_path):
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
    with pytest.raises(UserError, match=r"00000\.tar is not there"):
        read(tmp_path, files="memory://bucket/{00000..00001}.tar")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photos beside the repository")
def test_a_store_of_real_photos_in_tars_is_that_of_the_photos(tmp_path):
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
    tars = open_source(about, tmp_path)
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
