"""Folders of images, with captions in text files beside them or without any."""

import os
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sail_align.align.data.pairs import open_pairs
from sail_align.extract.build import build_store
from sail_align.extract.errors import UserError
from sail_align.extract.sources.image_folder import ImagesConfig, ImagesSource


@pytest.fixture
def photos(tmp_path) -> Path:
    """A messy folder: subfolders, upper-case endings, spaces, hidden files, a store, a link to itself."""
    folder = tmp_path / "My photos"
    for name in ("b.jpg", "a b.JPG", "trip/day 1/c.jpeg", "trip/d.webp", "trip/.thumbnails/d.jpg", "café/e.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, path.suffix[1:].replace("JPG", "jpeg").replace("jpg", "jpeg"))
    (folder / "broken.jpg").write_text("no image")
    (folder / "unknown").write_bytes((folder / "b.jpg").read_bytes())
    (folder / "features" / "old.zarr" / "c").mkdir(parents=True)
    (folder / "features" / "old.zarr" / "zarr.json").write_text("{}")
    (folder / "features" / "old.zarr" / "c" / "0.png").write_text("a chunk")
    (folder / "trip" / "loop").symlink_to(folder)
    (folder / "trip" / "notes.doc").write_text("no image")
    return folder


KEYS = ["a b.JPG", "b.jpg", "broken.jpg", "unknown", "café/e.png", "trip/d.webp", "trip/day 1/c.jpeg"]


def opened(folder: Path, **fields) -> ImagesSource:
    return ImagesConfig(kind="images", root=folder.name, **fields).open(folder.parent)


def test_images_of_all_folders_are_listed(photos):
    source = opened(photos)
    assert [sample.key for sample in source.samples()] == KEYS
    assert (source.captions, source.left_out) == ((), {".doc": 1})
    assert source.image("café/e.png").size == (4, 4)


def test_texts_beside_the_images_are_captions(photos):
    (photos / "a b.txt").write_text("\ufeffA dog\n  on grass \n", encoding="utf-8")
    (photos / "b.jpg.TXT").write_text("ein Bär", encoding="utf-16")
    (photos / "broken.txt").write_text("  \n")
    (photos / "trip" / "d.txt").write_bytes(b"caf\xe9")
    (photos / "trip" / "day 1" / "c.txt").write_text("x" * 2_000_000)
    (photos / "nothing.txt").write_text("no image")
    source = opened(photos)
    assert source.captions == ("raw",)
    captions = {sample.key: sample.captions["raw"] for sample in source.samples() if sample.captions}
    assert captions == {"a b.JPG": "A dog\n  on grass", "b.jpg": "ein Bär", "trip/d.webp": "caf\ufffd"}
    assert source.left_out == {".doc": 1, ".txt": 1}

    source = opened(photos, captions="txt")
    assert source.captions == ("c0", "c1")
    assert next(source.samples()).captions == {"c0": "A dog", "c1": "on grass"}

    (photos / "a b.long.txt").write_text("A dog that sleeps")
    source = opened(photos, captions={"short": "txt", "long": "long.txt"})
    assert next(source.samples()).captions == {"short": "A dog\n  on grass", "long": "A dog that sleeps"}
    source = opened(photos, captions={})
    assert (source.captions, source.left_out) == ((), {".doc": 1, ".txt": 7})


def test_a_changed_text_changes_the_part(photos):
    path = photos / "trip" / "d.txt"
    path.write_text("a dog")
    before = [part.name for part in opened(photos).parts()]
    assert before == [part.name for part in opened(photos).parts()]
    path.write_text("a cat")
    os.utime(path, ns=(0, 0))
    after = [part.name for part in opened(photos).parts()]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False, True]


@pytest.mark.parametrize(
    ("root", "message"),
    [("nowhere", "nowhere is missing"), ("trip/.thumbnails/..", None), ("features", "features contains no images")],
)
def test_folder_without_images_is_rejected(photos, root, message):
    config = ImagesConfig(kind="images", root=root)
    if message is None:
        assert next(config.open(photos).samples()).key == "d.webp"
        return
    with pytest.raises(UserError, match=message):
        config.open(photos)


@pytest.mark.slow
def test_store_of_images_alone_is_complete(photos, typed, fake_encoders, monkeypatch):
    monkeypatch.chdir(photos.parent)
    content = {"name": "photos", "source": {"kind": "images", "root": "My photos"}}
    Path("photos.yaml").write_text(yaml.safe_dump(content))
    assert typed("check", "photos.yaml")[0] == 0
    code, out, _ = typed("run", "photos.yaml", "--quiet")
    assert code == 0
    assert "image/fake-image: 1/1 shards, dim 4: 6 ok, 1 undecodable" in out
    assert out.endswith("run with another --out.\nNext: sail-extract status features/photos.zarr\n")
    assert typed("export", "features/photos.zarr")[0] == 0
    code, out, _ = typed("status", "features/photos.zarr")
    assert code == 0
    assert "complete: image features only, because there are no captions\n" in out
    with pytest.raises(UserError, match=r"photos\.zarr has image features only, and training needs captions\. Put a"):
        open_pairs([Path("features/photos.zarr")])
    assert build_store("photos.yaml", quiet=True).rows == 7  # resumes

    (photos / "b.txt").write_text("a dog")  # which the store lacks
    code, _, err = typed("run", "photos.yaml", "--quiet")
    assert code == 2
    assert err.endswith("or another caption of it. Pass another --out.\n")
    code, out, _ = typed("run", "photos.yaml", "--out", "other.zarr", "--quiet")
    assert "text/fake-text/raw: 1/1 shards, dim 4: 6 missing, 1 ok" in out
    (photos / "b.txt").write_text("another dog")
    code, _, err = typed("run", "photos.yaml", "--out", "other.zarr", "--quiet")
    assert code == 2
    assert "other.zarr has sample 'b.jpg' in row 1, but the data set now has sample 'b.jpg', or another caption" in err
