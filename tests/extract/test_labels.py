"""Labels and groups of samples in columns of tables and in tars, in sources and in the index of a store."""

import csv
import io
import json
import tarfile

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from tars import picture

from sail_align.extract.data import Part, Sample
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest, TaskSettings
from sail_align.extract.sources.labels import Labels
from sail_align.extract.sources.table import TableConfig
from sail_align.extract.sources.table_files import Recaptions
from sail_align.extract.sources.webdataset import WebDatasetConfig
from sail_align.extract.store.open_or_create import open_or_create
from sail_align.extract.store.store import Store

ROWS = [("0.jpg", "dog", "1", "a", "test"), ("1.jpg", " cat", "0.0", "a", "test"), ("2.jpg", "", "", "b", "train")]


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    write(tmp_path, ROWS)
    return tmp_path


def write(folder, rows, name="t.csv"):
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows([("image", "word", "number", "clip", "split"), *rows])


def source(folder, **fields):
    return TableConfig(kind="table", **({"files": "t.csv"} | fields)).open(folder)


def labels(found):
    return [sample.label for sample in found.samples()]


def test_classes_are_the_distinct_texts_of_a_column(folder):
    found = source(folder, label="word")
    assert found.classes == ("cat", "dog")
    assert labels(found) == [1, 0, -1]
    kept = source(folder, label="word", split={"column": "split", "keep": "test"})
    assert labels(kept) == [1, 0]


@pytest.mark.parametrize(
    ("column", "classes", "names", "expected"),
    [
        ("word", ["dog", "cat"], ("dog", "cat"), [0, 1, -1]),
        ("number", ["cat", "dog"], ("cat", "dog"), [1, 0, -1]),
        ("number", "names.txt", ("a cat", "a dog"), [1, 0, -1]),
        ("number", {1: "one", 0: "zero"}, ("one", "zero"), [0, 1, -1]),
        ("word", {"dog": "a dog", "cat": "a cat"}, ("a dog", "a cat"), [0, 1, -1]),
    ],
)
def test_classes_have_names(folder, column, classes, names, expected):
    (folder / "names.txt").write_text("\ufeffa cat\n\na dog \n")
    found = source(folder, label=column, classes=classes)
    assert found.classes == names
    assert labels(found) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "number"}, r"'number' is invalid: got the numbers 0.0, 1, expected names.*Set source.classes"),
        ({"label": "nothing"}, "no column 'nothing'"),
        ({"label": "word", "classes": ["dog"]}, "Label of image '1.jpg' is invalid: got 'cat', expected 0 to 0 or dog"),
        ({"label": "number", "classes": ["cat"]}, "Label of image '0.jpg' is invalid: got '1', expected 0 to 0 or cat"),
        ({"label": "number", "classes": ["7", "1"]}, "Label of image '1.jpg' is invalid: got '0.0', expected 7, 1."),
        ({"label": "word", "classes": "none.txt"}, "none.txt is missing"),
    ],
)
def test_rejects_wrong_labels(folder, fields, message):
    with pytest.raises(UserError, match=message):
        list(source(folder, **fields).samples())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "word", "masks": "m"}, "Remove it or 'masks'"),
        ({"captions": {}, "classes": ["a"]}, "Without 'label', it maps the values of masks"),
        ({}, "'captions' is missing. Name their columns"),
        ({"label": "word", "classes": []}, "at least"),
    ],
)
def test_rejects_wrong_descriptions(folder, fields, message):
    with pytest.raises(ValidationError, match=message):
        source(folder, **fields)


def test_number_that_is_a_name_is_no_label():
    found = Labels.named(["7", "1"])
    assert [found.of(value, "x") for value in ("7", "1.0", None)] == [0, 1, -1]
    assert Labels.named(["7", "1"], numbers=True).of(1, "x") == 1


def test_facts_of_an_image_agree_in_all_its_rows(folder):
    write(folder, [*ROWS, ("0.jpg", "dog", "1", "a", "test")])
    found = source(folder, captions="word", label="word", group="clip")
    assert [(s.label, s.group) for s in found.samples()] == [(1, "a"), (0, "a"), (-1, "b")]
    write(folder, [*ROWS, ("0.jpg", "cat", "1", "a", "test")])
    with pytest.raises(UserError, match=r"Image '0.jpg' of .* has two labels, 'dog' and 'cat'"):
        list(source(folder, captions="word", label="word").samples())


def manifest(**fields):
    described = {"kind": "table", "files": "t.csv", "captions": {"raw": "word"}, **fields}
    about = {"name": "x", "purpose": "train", "title": "t", "licence": "l", "get": "g"}
    return Manifest.model_validate({**about, "source": described})


def test_stores_keep_groups(folder):
    about = manifest(group="clip")
    store = open_or_create(folder / "x.zarr", about, about.open_source(folder), quiet=True)
    assert store.index(["group"])["group"].to_pylist() == ["a", "a", "b"]
    assert [sample.group for sample in store.samples(0, 3)] == ["a", "a", "b"]
    write(folder, [(*row[:3], "c", row[4]) for row in ROWS])
    with pytest.raises(UserError, match=r"has sample '0.jpg' in row 0, but .*t.csv now has"):
        open_or_create(folder / "x.zarr", about, about.open_source(folder), quiet=True)


def test_joined_captions_keep_groups(folder):
    (folder / "more.csv").write_text("key,long\n0.jpg,a dog\n")
    tables = Recaptions(files="more.csv", key="key", captions={"long": "long"}).open(folder)
    found = source(folder, captions={"raw": "word"}, group="clip")
    about = {"dataset": "x", "manifest": {}, "captions": ["raw"], "groups": True, "quiet": True}
    store = Store.create(folder / "x.zarr", parts=found.parts(), recaptions=tables, **about)
    assert [(s.group, s.captions.get("long")) for s in store.samples(0, 3)] == [
        ("a", "a dog"),
        ("a", None),
        ("b", None),
    ]


def test_stores_without_groups_are_those_of_earlier_versions(folder):
    about = manifest()
    assert about.rows["source"].keys() == {
        "kind", "files", "root", "images", "image", "url", "captions", "split", "masks", "classes",
    }  # fmt: skip
    store = open_or_create(folder / "x.zarr", about, about.open_source(folder), quiet=True)
    names = pq.read_schema(folder / "x.zarr/index/part-00000.parquet").names
    assert names == ["key", "image", "label", "mask", "url", "caption.raw"]
    with pytest.raises(UserError, match="The index has no column 'group'"):
        store.index(["group"])
    plain = Part.of([Sample("a", "b", {"raw": "x"})])
    assert plain.name == "samples cf884f7b7007945c980f48d9e3bbf89c9e4ce918db65bfb62e9d1c2946319fa1"
    assert Part.of([Sample("a", "b", {"raw": "x"}, group="g")]).name != plain.name


def test_groups_of_tars(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, clip in enumerate(["a", 7, None]):
            for ending, content in (("jpg", picture(number)), ("json", json.dumps({"clip": clip}).encode())):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    found = WebDatasetConfig(kind="webdataset", captions={}, group="json:clip").open(tmp_path)
    assert [sample.group for sample in found.samples()] == ["a", "7", ""]
    assert found.has_groups


@pytest.mark.parametrize(
    ("given", "expected"),
    [("a {}.", ["a {}."]), ("{}", ["{}"]), ("open_clip:imagenet-80", "open_clip:imagenet-80"), (["{}"], ["{}"])],
)
def test_templates_may_be_one_text(given, expected):
    assert TaskSettings(kind="classification", templates=given).templates == expected


@pytest.mark.parametrize("given", ["a photo", "imagenet-80", "{} and {}", "{name}", ""])
def test_rejects_templates_without_a_place_for_the_class(given):
    with pytest.raises(ValidationError):
        TaskSettings(kind="classification", templates=given)
