"""Samples and pixels out of data sets of the library `datasets`."""

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from tars import grey, picture

from sail_align.extract.data import Source, Status, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.sources import hugging_face_rows
from sail_align.extract.sources.hugging_face import HuggingFaceConfig

ROWS = 7


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(number))).save(file, "PNG")
    return file.getvalue()


def rows() -> datasets.Dataset:
    """Rows of which 2 has no image, 3 a broken one, 4 no captions."""
    images = [{"bytes": png(i), "path": None} for i in range(ROWS)]
    images[2], images[3]["bytes"] = None, b"broken"
    columns = {
        "image": images,
        "title": [None if i == 4 else f"title {i} " for i in range(ROWS)],
        "sentences": [[] if i == 4 else [f"{i} a", "", f"{i} b"][: 3 - i % 2] for i in range(ROWS)],
        "label": [-1 if i == 5 else i % 2 for i in range(ROWS)],
        "number": list(range(ROWS)),
        "link": [f"http://example.org/{i}" for i in range(ROWS)],
    }
    features = {
        "image": datasets.Image(),
        "title": datasets.Value("string"),
        "sentences": datasets.List(datasets.Value("string")),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "number": datasets.Value("int64"),
        "link": datasets.Value("string"),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The rows in two files, as the split `train` of what is saved."""
    root = tmp_path_factory.mktemp("saved")
    datasets.DatasetDict({"train": rows()}).save_to_disk(root / "photos", num_shards={"train": 2})
    rows().save_to_disk(root / "alone")
    return root


def source(data_root, **fields) -> Source:
    fields = {"root": "photos", "captions": {"raw": "title"}} | fields
    return HuggingFaceConfig(kind="hugging-face", **fields).open(data_root)


def test_data_set_saved_to_disk(saved):
    photos = source(saved, url="link", label="label")
    samples = list(photos.samples())
    assert [(s.key, s.image) for s in samples] == [(str(i), str(i)) for i in range(ROWS)]
    assert [dict(s.captions) for s in samples] == [{} if i == 4 else {"raw": f"title {i}"} for i in range(ROWS)]
    assert [s.url for s in samples] == [f"http://example.org/{i}" for i in range(ROWS)]
    assert [s.label for s in samples] == [0, 1, 0, 1, 0, -1, 0]
    assert photos.classes == ("cat", "dog")
    assert [grey(photos.image(s.image)) for s in samples if s.image not in "23"] == [0, 1, 4, 5, 6]
    (part,) = photos.parts()
    assert len(part.files) == 2
    assert all(file.is_file() for file in part.files)


@pytest.mark.parametrize(("row", "status"), [(2, Status.MISSING), (3, Status.UNDECODABLE)])
def test_status_of_unreadable_images(saved, row, status):
    with pytest.raises(UnreadableImageError) as problem:
        source(saved).image(str(row))
    assert problem.value.status is status


def test_numbered_captions(saved):
    lists = source(saved, captions="sentences")
    assert lists.captions == ("c0", "c1")
    found = [dict(s.captions) for s in lists.samples()]
    assert found[:2] == [{"c0": "0 a", "c1": "0 b"}, {"c0": "1 a"}]
    assert found[4] == {}
    alone = source(saved, captions="title")
    assert alone.captions == ("c0",)
    assert next(alone.samples()).captions == {"c0": "title 0"}


def test_named_lists_of_captions(saved):
    both = source(saved, captions={"raw": "title", "alt": "sentences"})
    assert both.captions == ("raw", "alt0", "alt1")
    found = [dict(s.captions) for s in both.samples()]
    assert found[:2] == [{"raw": "title 0", "alt0": "0 a", "alt1": "0 b"}, {"raw": "title 1", "alt0": "1 a"}]
    assert found[4] == {}


def test_keys_and_groups_are_columns(saved):
    found = source(saved, key="link", group="number")
    assert [(s.key, s.image, s.group) for s in found.samples()][1] == ("http://example.org/1", "1", "1")
    assert [s.key for s in source(saved, key="number").samples()] == [str(i) for i in range(ROWS)]
    assert found.has_groups
    assert not source(saved).has_groups


@pytest.mark.parametrize(
    ("fields", "classes", "labels"),
    [
        ({"label": "word"}, ("cat", "dog"), [1, 0, -1, 1]),
        ({"label": "word", "classes": ["dog", "cat"]}, ("dog", "cat"), [0, 1, -1, 0]),
        ({"label": "word", "classes": {"dog": "a dog", "cat": "a cat"}}, ("a dog", "a cat"), [0, 1, -1, 0]),
        ({"label": "word", "classes": "names.txt"}, ("cat", "dog"), [1, 0, -1, 1]),
        ({"label": "digit"}, ("9", "1"), [1, 0, -1, 0]),
        ({"label": "float", "classes": ["a", "b"]}, ("a", "b"), [1, 0, -1, 1]),
    ],
)
def test_labels_are_texts_or_numbers(tmp_path, fields, classes, labels):
    """A number counts classes even where the names are numbers too. pandas writes integers with gaps as floats."""
    columns = {"image": [png(0)] * 4, "word": ["dog", "cat", None, "dog"], "float": [1.0, 0.0, None, 1.0]}
    features = {"image": datasets.Value("binary"), "word": datasets.Value("string"), "float": datasets.Value("float64")}
    features["digit"] = datasets.ClassLabel(names=["9", "1"])
    rows = datasets.Dataset.from_dict({**columns, "digit": [1, 0, -1, 0]}, features=datasets.Features(features))
    rows.save_to_disk(tmp_path / "photos")
    (tmp_path / "photos/names.txt").write_text("cat\ndog\n")
    found = source(tmp_path, captions={}, **fields)
    assert found.classes == classes
    assert [sample.label for sample in found.samples()] == labels


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["binary", "large_binary", "bytes", "both", "path", "text"])
def test_images_that_were_not_cast(tmp_path, cache, kind, streaming):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/6.png").write_bytes(png(6))
    pair = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    types = {"binary": pa.binary(), "large_binary": pa.large_binary(), "text": pa.string(), "both": pair}
    types |= {each: pa.struct({each: pair.field(each).type}) for each in ("bytes", "path")}
    content, path = png(6), "images/6.png"
    value = {"text": path, "both": {"bytes": None, "path": path}, "path": {"path": path}, "bytes": {"bytes": content}}
    column = pa.array([value.get(kind, content), None], types[kind])
    pq.write_table(pa.table({"image": column, "title": ["a", "b"]}), tmp_path / "t.parquet")
    found = source(tmp_path, root="t.parquet", streaming=streaming)
    first, second = found.samples()
    assert grey(found.image(first.image)) == 6
    with pytest.raises(UnreadableImageError) as problem:
        found.image(second.image)
    assert problem.value.status is Status.MISSING


def test_parts_are_ranges_of_rows(saved, monkeypatch):
    expected = list(source(saved, captions="sentences").samples())
    monkeypatch.setattr(hugging_face_rows, "PART_ROWS", 3)
    photos = source(saved, captions="sentences")
    assert [part.name for part in photos.parts()] == ["rows from 0", "rows from 3", "rows from 6"]
    assert list(photos.samples()) == expected
    assert [s.key for s in source(saved, captions={}).samples()] == [s.key for s in expected]


def test_data_set_without_splits(saved):
    assert len(list(source(saved, root="alone").samples())) == ROWS


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_folder_of_parquet_files(tmp_path, cache):
    (tmp_path / "named").mkdir()
    rows().to_parquet(tmp_path / "named" / "test.parquet")
    found = source(tmp_path, root="named", split="test")
    samples = list(found.samples())
    assert len(samples) == ROWS
    assert grey(found.image("6")) == 6
    with pytest.raises(UserError, match=r"named cannot be opened: Unknown split"):
        source(tmp_path, root="named", split="nope")


@pytest.mark.parametrize("name", ["./photos", "/photos", "photos/", "a/b/c", ""])
def test_name_is_one_of_the_hub(tmp_path, name):
    with pytest.raises(ValidationError):
        source(tmp_path, name=name)


@pytest.mark.parametrize("name", ["photos", "owner/photos", "imagefolder", "csv"])
def test_name_never_reads_the_current_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "photos").mkdir(parents=True)
    rows().to_parquet(tmp_path / "owner/photos/train.parquet")
    (tmp_path / "photos").symlink_to("owner/photos")
    with pytest.raises(UserError, match=rf"Name '{name}' is that of a format or of a file here.*write `root`"):
        source(tmp_path, name=name)


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("files", ["../elsewhere/*.parquet", "/etc/*.parquet", "https://example.org/x.parquet"])
def test_card_of_a_folder_names_no_files_elsewhere(tmp_path, files, name):
    (tmp_path / "named").mkdir()
    line = "---\n" if name.endswith(".md") else ""
    (tmp_path / "named" / name).write_text(f"{line}configs:\n- config_name: default\n  data_files: {files}\n{line}")
    with pytest.raises(UserError, match=r"(README\.md|\.yaml) names .* outside its folder.*allow_outside"):
        source(tmp_path, root="named")


@pytest.mark.parametrize("root", ["named", "../here/named", "../../above/here/named"])
def test_card_of_a_folder_at_a_relative_path(tmp_path, cache, monkeypatch, root):
    folder = tmp_path / "above" / "here" / "named"
    for files in (folder / "data", folder.parent / "other"):
        files.mkdir(parents=True)
        rows().select_columns(["image", "title"]).to_parquet(files / "train.parquet")
    monkeypatch.chdir(folder.parent)
    card = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
    (folder / "README.md").write_text(card.format("../other/*.parquet"))
    with pytest.raises(UserError, match=r"names '\.\./other/\*\.parquet', outside its folder"):
        source(Path(), root=root)
    (folder / "README.md").write_text(card.format("data/*.parquet"))
    assert len(list(source(Path(), root=root).samples())) == ROWS


def test_images_stored_as_paths(tmp_path, cache):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "metadata.csv").write_text("file_name,title\n6.jpg,a\n7.jpg,b\n")
    for number in (6, 7):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    by_path = source(tmp_path, root=folder.name)
    assert [dict(s.captions) for s in by_path.samples()] == [{"raw": "a"}, {"raw": "b"}]
    np.testing.assert_array_equal(by_path.image("0"), Image.open(folder / "6.jpg"))
    (folder / "7.jpg").unlink()
    with pytest.raises(UnreadableImageError) as problem:
        by_path.image("1")
    assert problem.value.status is Status.MISSING


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"root": "nowhere"}, "Data set .*nowhere cannot be opened"),
        ({"split": "test"}, "photos has no split 'test'. Its splits are train"),
        ({"image": "picture"}, "no column 'picture'. Its columns are image, title"),
        (
            {"image": "title"},
            r"'title' is invalid: none of its first 6 texts is the path .* \(the first is 'title 0 '\)",
        ),
        ({"image": "number"}, "'number' is invalid: got int64, expected an Image, bytes, or paths"),
        ({"image": "sentences"}, "'sentences' is invalid: got list<.*>, expected an Image"),
        ({"captions": {"raw": "captoin"}}, "no column 'captoin'"),
        ({"captions": {"a": "sentences", "a1": "title"}}, "Caption 'a1' occurs twice in source.captions"),
        ({"captions": "number"}, "'number' is invalid: got int64, expected text"),
        (
            {"label": "number"},
            "'number' is invalid: got the numbers 0, 1, 2, 3, 4 and 2 more, expected names of classes",
        ),
        ({"label": "image"}, "'image' is invalid: got struct<.*>, expected numbers or names of classes"),
        ({"label": "title", "classes": ["a"]}, "Label of row 0 is invalid: got 'title 0', expected 0 to 0 or a"),
        ({"label": "number", "classes": ["a", "b"]}, "Label of row 2 is invalid: got '2', expected 0 to 1"),
        ({"key": "title"}, "Column 'title' is empty in row 4. Every row needs a key"),
        ({"key": "sentences"}, "'sentences' is invalid: got list<.*>, expected text or whole numbers"),
        ({"group": "image"}, "'image' is invalid: got struct<.*>, expected text or whole numbers"),
    ],
)
def test_rejects_wrong_description(saved, fields, message):
    def read():
        found = source(saved, **fields)
        return list(found.samples()), found.captions

    with pytest.raises(UserError, match=message):
        read()
