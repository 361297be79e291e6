"""Samples and pixels out of data sets of the library `datasets`."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image
from tars import grey, picture

from sail_align.extract.data import Status, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.schema import HuggingFaceSource as Description
from sail_align.extract.sources import hugging_face
from sail_align.extract.sources.hugging_face import HuggingFaceSource

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


def source(data_root, **fields) -> HuggingFaceSource:
    fields = {"root": "photos", "captions": {"raw": "title"}} | fields
    return HuggingFaceSource(Description(kind="hugging-face", **fields), data_root)


def test_rows_saved_to_disk_are_samples(saved):
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
def test_an_image_that_cannot_be_used_says_why(saved, row, status):
    with pytest.raises(UnreadableImageError) as problem:
        source(saved).image(str(row))
    assert problem.value.status is status


def test_a_column_of_lists_and_one_of_text_become_numbered_captions(saved):
    lists = source(saved, captions="sentences")
    assert lists.captions == ("c0", "c1")
    found = [dict(s.captions) for s in lists.samples()]
    assert found[:2] == [{"c0": "0 a", "c1": "0 b"}, {"c0": "1 a"}]
    assert found[4] == {}
    alone = source(saved, captions="title")
    assert alone.captions == ("c0",)
    assert next(alone.samples()).captions == {"c0": "title 0"}


def test_parts_are_stretches_of_rows(saved, monkeypatch):
    expected = list(source(saved, captions="sentences").samples())
    monkeypatch.setattr(hugging_face, "PART_ROWS", 3)
    photos = source(saved, captions="sentences")
    assert [part.name for part in photos.parts()] == ["rows from 0", "rows from 3", "rows from 6"]
    assert list(photos.samples()) == expected
    assert [s.key for s in source(saved, captions={}).samples()] == [s.key for s in expected]


def test_a_data_set_saved_without_splits_is_used_whole(saved):
    assert len(list(source(saved, root="alone").samples())) == ROWS


def test_a_name_is_loaded_by_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "named").mkdir()
    rows().to_parquet(tmp_path / "named" / "test.parquet")
    named = source(tmp_path, root=".", name=str(tmp_path / "named"), split="test")
    samples = list(named.samples())
    assert len(samples) == ROWS
    assert grey(named.image("6")) == 6


def test_images_that_rows_name_by_path_are_opened_there(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "metadata.csv").write_text("file_name,title\n6.jpg,a\n7.jpg,b\n")
    for number in (6, 7):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    by_path = source(tmp_path, name=str(folder))
    assert [dict(s.captions) for s in by_path.samples()] == [{"raw": "a"}, {"raw": "b"}]
    np.testing.assert_array_equal(by_path.image("0"), Image.open(folder / "6.jpg"))
    (folder / "7.jpg").unlink()
    with pytest.raises(UnreadableImageError) as problem:
        by_path.image("1")
    assert problem.value.status is Status.MISSING


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"root": "nowhere"}, "Data set .*nowhere cannot be opened"),
        ({"split": "test"}, "photos has no split 'test'; it has train"),
        ({"image": "picture"}, "no column 'picture'; it has image, title"),
        ({"image": "title"}, r"Column 'title' holds Value\('string'\); cast it to an Image"),
        ({"captions": {"raw": "captoin"}}, "no column 'captoin'"),
        ({"captions": {"raw": "sentences"}}, "'sentences' holds lists; write `captions: sentences`"),
        ({"captions": "number"}, "'number' holds int64; captions are text"),
        ({"label": "number"}, "labels are numbers, named by the data set"),
        ({"label": "title", "classes": ["a"]}, "labels are numbers, named by the data set"),
        ({"label": "number", "classes": ["a", "b"]}, "The label of row 2 is 2; the 2 classes count from 0"),
    ],
)
def test_what_does_not_fit_is_said(saved, fields, said):
    with pytest.raises(UserError, match=said):
        list(source(saved, **fields).samples())
