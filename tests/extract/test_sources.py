"""Samples and pixels from tables and folders."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sail_align.extract.data import IGNORED, Status, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.sources.class_folder import ClassFolderConfig
from sail_align.extract.sources.images import read_image
from sail_align.extract.sources.table import Split, TableConfig

COLUMNS = {"raw": "caption", "long": "story"}


def table(pictures, **fields):
    fields = {"files": "captions.csv", "images": "images", "captions": COLUMNS} | fields
    return TableConfig(kind="table", **fields).open(pictures)


def test_captions_by_column_name(pictures):
    samples = list(table(pictures).samples())
    assert len(samples) == 600
    assert samples[3].captions == {"raw": "picture 3", "long": "A long, long story of number 3"}
    assert samples[5].captions == {"raw": "picture 5"}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["tsv", "jsonl", "parquet"])
def test_all_table_formats_give_the_same_samples(pictures, ending):
    rows = [{"image": f"{i}.png", "caption": f"a, {i}\nb", "story": f'say "{i}"'} for i in range(20)]
    path = pictures / f"other.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        quoted = ["\t".join('"' + row[name].replace('"', '""') + '"' for name in rows[0]) for row in rows]
        path.write_text("\n".join(["\t".join(rows[0]), *quoted]) + "\n")
    samples = list(table(pictures, files=f"other.{ending}").samples())
    assert [s.captions for s in samples] == [{"raw": row["caption"], "long": row["story"]} for row in rows]


def test_captions_like_numbers_or_null_stay_text(pictures):
    (pictures / "odd.csv").write_text("image,caption,story\n1.png,007,NA\n2.png,null,1e5\n")
    samples = list(table(pictures, files="odd.csv").samples())
    assert [s.captions for s in samples] == [{"raw": "007", "long": "NA"}, {"raw": "null", "long": "1e5"}]


def test_several_rows_per_image(pictures):
    (pictures / "rows.csv").write_text("image,caption\n2.png,a\n1.png,b\n2.png,c\n")
    source = table(pictures, files="rows.csv", captions="caption")
    assert source.captions == ("c0", "c1")
    assert [(s.key, dict(s.captions)) for s in source.samples()] == [
        ("2.png", {"c0": "a", "c1": "c"}),
        ("1.png", {"c0": "b"}),
    ]


def test_column_of_lists(pictures):
    (pictures / "lists.jsonl").write_text('{"image": "1.png", "caption": ["a", "b"]}\n')
    assert next(table(pictures, files="lists.jsonl", captions="caption").samples()).captions == {"c0": "a", "c1": "b"}


def test_split_by_column_or_file(pictures):
    (pictures / "split.csv").write_text("image,part\n" + "".join(f"{i}.png,{i % 2}\n" for i in reversed(range(600))))
    own = list(table(pictures, split=Split(column="part", keep="1")).samples())
    other = list(table(pictures, split=Split(column="part", keep="1", file="split.csv")).samples())
    assert own == other
    assert [s.key for s in own] == [f"{i}.png" for i in range(1, 600, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"captions": {"raw": "captoin"}}, "no column 'captoin'. Its columns are image, caption, story, part"),
        ({"files": "*.tsv"}, r"No file matches /.*/\*\.tsv"),
        ({"images": "photos"}, "Image folder .*photos is missing"),
        ({"root": "empty"}, r"No file matches /"),
        ({"images": "."}, "None of the first 100 images is in"),
    ],
)
def test_rejects_wrong_description(pictures, fields, message):
    with pytest.raises(UserError, match=message):
        list(table(pictures, **fields).samples())


def test_masks_contain_class_indices(pictures):
    (pictures / "masks").mkdir()
    Image.fromarray(np.array([[0, 3], [9, 200]], dtype=np.uint8)).save(pictures / "masks" / "1.png")
    source = table(pictures, masks="masks", classes={3: "cat", 9: "dog"})
    sample = list(source.samples())[1]
    assert source.classes == ("cat", "dog")
    np.testing.assert_array_equal(source.mask(sample.mask), [[IGNORED, 0], [1, IGNORED]])


def test_folders_are_classes(pictures):
    for folder in ("tabby_cat", "dog"):
        (pictures / "classes" / folder).mkdir(parents=True)
        shutil.copy(pictures / "images" / "1.png", pictures / "classes" / folder / "x.png")
    (pictures / "classes" / "dog" / "notes.txt").write_text("no image")
    source = ClassFolderConfig(kind="class-folder", root="classes").open(pictures)
    assert source.classes == ("dog", "tabby cat")
    assert [(s.key, s.label) for s in source.samples()] == [("dog/x.png", 0), ("tabby_cat/x.png", 1)]
    names = {"tabby_cat": "cat", "dog": "hound"}
    listed = ClassFolderConfig(kind="class-folder", root="classes", classes=names).open(pictures)
    assert listed.classes == ("cat", "hound")
    assert [(s.key, s.label) for s in listed.samples()] == [("tabby_cat/x.png", 0), ("dog/x.png", 1)]


def test_rejects_empty_image_folder(pictures):
    (pictures / "nothing").mkdir()
    with pytest.raises(UserError, match="contains no images"):
        ClassFolderConfig(kind="class-folder", root="nothing").open(pictures)


@pytest.mark.parametrize(
    ("number", "status"), [(7, Status.MISSING), (11, Status.UNDECODABLE), (13, Status.UNDECODABLE)]
)
def test_status_of_unreadable_images(pictures, number, status):
    with pytest.raises(UnreadableImageError) as problem:
        read_image(pictures / "images" / f"{number}.png")
    assert problem.value.status is status


def test_bytes_and_file_give_the_same_image(pictures):
    path = pictures / "images" / "1.png"
    assert read_image(path.read_bytes()).tobytes() == read_image(path).tobytes()
    with pytest.raises(UnreadableImageError, match=r"0\.tar/1"):
        read_image(path.read_bytes()[:200], "0.tar/1")


@pytest.mark.slow
def test_rejects_decompression_bomb(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UnreadableImageError) as problem:
        read_image(tmp_path / "bomb.png")
    assert problem.value.status is Status.TOO_LARGE


def test_scales_16_bits_and_applies_exif_rotation(tmp_path):
    Image.fromarray(np.full((2, 3), 65_535 // 2, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.array(read_image(tmp_path / "deep.png")).mean() == pytest.approx(127, abs=1)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=turned)
    assert read_image(tmp_path / "turned.jpg").size == (2, 4)
