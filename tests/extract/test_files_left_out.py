"""Files among the samples that are not images, or not where images are looked for."""

import os
import random
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sail_align.extract.data import Sample, describe_left_out
from sail_align.extract.errors import UserError
from sail_align.extract.sources.class_folder import ClassFolderConfig, ClassFolderSource
from sail_align.extract.sources.file_set import FileSet
from sail_align.extract.store.index import Index

ABOUT = {"name": "made", "purpose": "evaluate", "title": "Made", "licence": "none", "get": "made by a test"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A class folder with one JPEG in each of two classes."""
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "val" / name / "a.jpg")
    return tmp_path / "val"


def opened(folder: Path) -> ClassFolderSource:
    return ClassFolderConfig(kind="class-folder", root=folder.name).open(folder.parent)


def test_content_decides_for_unknown_extensions(folder):
    for name in ("b.heic", "c.HEIC", "d", "e.txt"):
        shutil.copy(folder / "cat" / "a.jpg", folder / "cat" / name)
    for name in ("notes.txt", "f", "g.heic", ".DS_Store"):
        (folder / "cat" / name).write_text("BM P1 no image")
    (folder / "cat" / "broken.jpg").write_text("no image, but a row that is counted as undecodable")
    source = opened(folder)
    names = ["a.jpg", "b.heic", "broken.jpg", "c.HEIC", "d", "e.txt"]
    assert [sample.key for sample in source.samples()] == [*(f"cat/{name}" for name in names), "dog/a.jpg"]
    assert source.left_out == {".heic": 1, ".txt": 1, "without extension": 1}


def test_images_outside_the_class_folders_are_counted(folder, typed):
    (folder / "cat" / "more" / "deep").mkdir(parents=True)
    (folder / "cat" / "more" / ".hidden").mkdir()
    (folder / "README").write_text("no image")
    for name in ("a.jpg", "cat/more/b.jpg", "cat/more/deep/c.JPG", "d", "cat/more/.hidden/d.jpg"):
        shutil.copy(folder / "dog" / "a.jpg", folder / name)
    text = "4 files are left out: 2 .jpg in subfolders, 1 .jpg outside the class folders, 1 without extension outside"
    assert describe_left_out(opened(folder).left_out).startswith(text)
    manifest = folder.parent / "made.yaml"
    source = {"kind": "class-folder", "root": "val"}
    manifest.write_text(yaml.safe_dump({**ABOUT, "source": source, "task": {"kind": "classification"}}))
    code, out, _ = typed("check", str(manifest))
    assert code == 0
    assert f"  ok   {text}" in out


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False))
def test_every_file_is_a_sample_or_counted(tmp_path_factory, chance: random.Random):
    root = tmp_path_factory.mktemp("made") / "val"
    picture = root.parent / "a.png"
    Image.new("RGB", (1, 1)).save(picture)
    total = 0
    for name in ("one/a.png", "two/a.png", *(f"{i}" for i in range(chance.randrange(12)))):
        where = "" if "/" in name else chance.choice(["", "one/", "two/", "one/more/", "two/x.jpg/"])
        path = root / f"{where}{name}{chance.choice(['', '.jpg', '.TXT', '.heic', '.b.png', '.a b'])}"
        path.parent.mkdir(parents=True, exist_ok=True)
        is_image = chance.random() < 0.5 or "/" in name
        shutil.copy(picture if is_image else __file__, path)
        total += is_image or where in ("one/", "two/") or path.suffix in (".jpg", ".png")
    source = opened(root)
    assert len(list(source.samples())) + sum(source.left_out.values()) == total


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"caf\xe9", b"\xff.txt"])
def test_names_that_are_not_utf8_are_an_error(folder, name, typed):
    shutil.copy(os.fsencode(folder / "cat" / "a.jpg"), os.fsencode(folder / "cat") + b"/" + name)
    manifest = folder.parent / "made.yaml"
    fields = {**ABOUT, "source": {"kind": "class-folder", "root": "val"}, "task": {"kind": "classification"}}
    manifest.write_text(yaml.safe_dump(fields))
    shown = name.decode("utf-8", "backslashreplace")
    code, out, _ = typed("check", str(manifest))
    assert code == 1
    assert f"{shown} is invalid: it is not UTF-8. Rename the file." in out
    code, _, err = typed("run", str(manifest), "--out", str(folder.parent / "out.zarr"))
    assert code == 2
    assert f"{shown} is invalid: it is not UTF-8. Rename the file." in err


def test_unused_files_may_have_any_name(folder):
    before = opened(folder)
    rows, left_out = len(list(before.samples())), sum(before.left_out.values())
    (folder / "cat" / "old").mkdir()
    for place in (".", "cat/old"):
        shutil.copy(os.fsencode(folder / "cat" / "a.jpg"), os.fsencode(folder / place) + b"/caf\xe9.jpg")
    (folder / "cat" / os.fsdecode(b"n\xf6tes.txt")).write_text("no image")
    after = opened(folder)
    assert len(list(after.samples())) == rows
    assert sum(after.left_out.values()) == left_out + 3


def test_folders_and_tables_that_are_not_utf8_are_an_error(folder):
    (folder / "dog" / os.fsdecode(b"caf\xe9.csv")).touch()
    with pytest.raises(UserError, match=r"dog/caf\\xe9\.csv is invalid"):
        FileSet(folder).find("dog/*.csv")
    (folder / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(UserError, match=r"caf\\xe9 is invalid"):
        opened(folder)


def test_text_that_is_not_unicode_is_an_error():
    with pytest.raises(UserError, match=r"Text 'a \\ud83d' of a sample is invalid"):
        Index.table([Sample("a", "a.jpg", {"raw": "a \ud83d"})], ["raw"])
