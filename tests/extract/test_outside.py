"""Paths and URLs that data name: what is opened, and what is not unless the manifest says so."""

import json
import os
import shutil
import socket
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sail_align.extract.data import Status, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest, find_manifest, packaged_manifests
from sail_align.extract.sources.annotated import KarpathyConfig
from sail_align.extract.sources.file_set import Fence, FileSet, is_inside
from sail_align.extract.sources.images import read_image
from sail_align.extract.sources.mask_folder import MaskFolderConfig
from sail_align.extract.sources.table import TableConfig
from sail_align.extract.sources.table_files import read_batches
from sail_align.extract.sources.webdataset import WebDatasetConfig
from sail_align.extract.system.files import open_regular, read_json
from sail_align.extract.system.yaml_files import read_yaml


@pytest.fixture
def root(tmp_path):
    """A data root with one picture, beside one that is outside."""
    (tmp_path / "data" / "images" / "more").mkdir(parents=True)
    for path in ("data/images/1.png", "data/images/more/2.png", "data/3.png", "outside.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / path)
    return tmp_path / "data"


def table(root, *images, **fields):
    (root / "t.csv").write_text("image,caption\n" + "".join(f"{image},a\n" for image in images))
    about = {"kind": "table", "files": "t.csv", "images": "images", "captions": {"raw": "caption"}, **fields}
    return TableConfig(**about).open(root)


def karpathy(root, *images, **fields):
    entries = [{"filename": image, "split": "test", "sentences": [{"raw": "a"}]} for image in images]
    (root / "k.json").write_text(json.dumps({"images": entries}))
    return KarpathyConfig(kind="karpathy", annotations="k.json", images="images", **fields).open(root)


SOURCES = pytest.mark.parametrize("source", [table, karpathy])


@SOURCES
@pytest.mark.parametrize("image", ["../../outside.png", "{outside}", "more/../../../outside.png"])
def test_paths_out_of_the_data_root_need_permission(root, source, image):
    image = image.replace("{outside}", str(root.parent / "outside.png"))
    with pytest.raises(UserError, match=r"outside\.png' is outside the data root .*allow_outside: true"):
        list(source(root, "1.png", image).samples())
    allowed = source(root, "1.png", image, allow_outside=True)
    assert [allowed.image(sample.image).size for sample in allowed.samples()] == [(4, 4)] * 2


@SOURCES
def test_paths_within_the_data_root_are_opened(root, source):
    images = ["1.png", "more/2.png", "more/../1.png", "../3.png", str(root / "3.png")]
    found = source(root, *images)
    assert [found.image(sample.image).size for sample in found.samples()] == [(4, 4)] * 5


@SOURCES
def test_links_of_the_user_are_followed(root, source):
    (root / "images" / "link.png").symlink_to(root.parent / "outside.png")
    shutil.move(root / "images" / "more", root.parent / "elsewhere")
    (root / "images" / "more").symlink_to(root.parent / "elsewhere")
    found = source(root, "link.png", "more/2.png")
    assert [found.image(sample.image).size for sample in found.samples()] == [(4, 4)] * 2
    with pytest.raises(UserError, match=r"more/\.\./1\.png' is outside the data root"):
        list(source(root, "more/../1.png").samples())  # the system would open elsewhere/../1.png


def test_row_of_a_path_outside_is_named(root):
    images = [f"{number}.png" for number in range(150)]
    with pytest.raises(UserError, match=r"Row 121 of .*t\.csv is invalid: Path '/etc/passwd' is outside"):
        list(table(root, "1.png", *images[:119], "/etc/passwd", *images).samples())


def test_path_that_leaves_only_by_its_mask_is_rejected(root):
    (root.parent / "m.png").touch()
    (root / "masks").mkdir()
    with pytest.raises(UserError, match="outside the data root"):
        table(root, "../../m.png", images="images/more", masks="masks", classes={0: "a"})


@pytest.mark.parametrize("location", ["/etc/passwd", "../../outside.png"])
def test_locations_of_a_foreign_store_do_not_lead_outside(root, location):
    with pytest.raises(UserError, match="outside the data root"):
        table(root, "1.png").image(location)
    (root / "masks").mkdir()
    Image.new("L", (4, 4)).save(root / "masks" / "1.png")
    masked = MaskFolderConfig(kind="mask-folder", images="images", masks="masks", classes={0: "a"}).open(root)
    for open_ in (masked.image, masked.mask):
        with pytest.raises(UserError, match="outside the data root"):
            open_(location)


def test_lists_of_names_do_not_lead_outside(root):
    (root / "masks").mkdir()
    Image.new("L", (4, 4)).save(root / "masks" / "1.png")
    (root / "names.txt").write_text("1\n../../outside\n")
    masks = MaskFolderConfig(kind="mask-folder", images="images", masks="masks", names="names.txt", classes={0: "a"})
    with pytest.raises(UserError, match=r"has no picture '\.\./\.\./outside'"):
        masks.open(root)


@given(st.lists(st.sampled_from(["..", ".", "a", "images", "", "data"]), max_size=7).map("/".join))
def test_fence_agrees_with_the_file_system(location):
    root = Path("/base/data")
    resolved = Path(os.path.normpath(root / "images" / location))
    if resolved.is_relative_to(root):
        assert Path(os.path.normpath(Fence(root).path(root / "images", location))) == resolved
    else:
        with pytest.raises(UserError):
            Fence(root).path(root / "images", location)
    assert Fence(root, is_open=True).path(root, location) == root / location


def test_permission_is_not_part_of_the_rows(tmp_path):
    about = {"kind": "table", "files": "t.csv", "captions": {"raw": "c"}}
    content = {"name": "x", "purpose": "train", "title": "t", "licence": "l", "get": "g"}
    plain, allowed = (
        Manifest.model_validate({**content, "source": {**about, **more}}) for more in ({}, {"allow_outside": True})
    )
    assert allowed.source.allow_outside
    assert allowed.rows == plain.rows
    assert Manifest.model_validate_json(json.dumps({**content, "source": about})) == plain


# Patterns.


@pytest.mark.parametrize(
    "pattern", ["t?.csv", "t[1-2].csv", "*.csv", "t{1..2}.csv", "**/t1.csv", "{root}/t*.csv", "../data/t1.csv"]
)
def test_check_and_run_agree_on_patterns(root, pattern):
    for number in (1, 2):
        (root / f"t{number}.csv").write_text(f"image,caption\n{number}.png,a\n")
    pattern = pattern.replace("{root}", str(root))
    about = TableConfig(kind="table", files=pattern, images="images", captions={"raw": "caption"})
    assert all(about.requirements(root).values())
    assert next(about.open(root).samples()).image == "1.png"
    assert FileSet(root).find(pattern)


@given(st.text(st.sampled_from("*?[]{}.0123/\\~-!ax \0é"), max_size=12) | st.just("x" * 5000))
def test_any_pattern_gives_files_or_a_message(tmp_path_factory, pattern):
    root = tmp_path_factory.getbasetemp() / "patterns"
    root.mkdir(exist_ok=True)
    (root / "a.csv").touch()
    if pattern.startswith("/"):
        pattern = f"{root}{pattern}"  # not a search of the whole disk
    about = TableConfig(kind="table", files=pattern or "x", captions={"raw": "caption"})
    present = all(about.requirements(root).values())
    try:
        found = FileSet(root).find(pattern)
    except UserError:
        found = []
    assert present >= bool(found)


# Only regular files are opened.


@pytest.fixture(params=["fifo", "device", "socket", "folder"])
def special(request, tmp_path, monkeypatch):
    """The name of something that is not a regular file."""
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    match request.param:
        case "fifo":
            os.mkfifo("special")
        case "device":
            Path("special").symlink_to("/dev/zero")
        case "socket":
            server = socket.socket(socket.AF_UNIX)
            server.bind("special")
        case "folder":
            Path("special").mkdir()
    yield tmp_path / "special"
    if request.param == "socket":
        server.close()


def test_pictures_are_regular_files(special):
    with pytest.raises(UnreadableImageError, match="special") as problem:
        read_image(special)
    assert problem.value.status is Status.UNDECODABLE


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_are_regular_files(special, ending):
    path = special.rename(special.with_suffix(ending))
    with pytest.raises(UserError, match=r"Table .*special.* cannot be read"):
        list(read_batches(path, ["a"]))


def test_other_files_are_regular(special):
    for read in (read_json, read_yaml):
        with pytest.raises(UserError, match=r"special cannot be read"):
            read(special)
    with pytest.raises(OSError, match=r"(not a regular file|Is a directory|No such device)"):
        open_regular(special)
    with pytest.raises(OSError, match=r"(not a regular file|Is a directory|No such device)"):
        FileSet(special.parent).open(special.name)


def test_annotations_are_regular_files(root):
    os.mkfifo(root / "fifo")
    source = KarpathyConfig(kind="karpathy", annotations="fifo", images="images").open(root)
    with pytest.raises(UserError, match="not a regular file"):
        list(source.samples())
    masks = MaskFolderConfig(kind="mask-folder", images="images", masks="images", names="fifo", classes={0: "a"})
    with pytest.raises(UserError, match="not a regular file"):
        masks.open(root)


# URLs come from the manifest, never from data.


@pytest.fixture
def fetched(monkeypatch):
    """The URLs of which a file system is looked for."""
    seen = []
    real = fsspec.core.url_to_fs
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: seen.append(url) or real(url))
    return seen


def test_only_named_urls_are_opened(tmp_path, fetched):
    files = FileSet(tmp_path)
    for name in ("memory://bucket/0.tar", "https://example.org/0.tar", "memory://bucket/0.parquet"):
        for call in (files.open, files.exists, lambda name: files.read(name, 0, 1)):
            with pytest.raises(UserError, match="the manifest does not name it"):
                call(name)
    assert fetched == []
    files.find("memory://bucket/{0..1}.tar")
    assert not files.exists("memory://bucket/1.tar")
    assert not files.exists("memory://bucket/1.parquet")
    with pytest.raises(UserError, match="the manifest does not name it"):
        files.exists("memory://bucket/2.tar")


@pytest.mark.parametrize("location", ["https://example.org/0.tar:512:9", "/etc/passwd:512:9", "../0.tar:512:9"])
def test_locations_of_a_foreign_store_are_not_fetched(tmp_path, fetched, location):
    (tmp_path / "0.tar").write_bytes(b"\0" * 1024)
    source = WebDatasetConfig(kind="webdataset").open(tmp_path)
    with pytest.raises(UserError, match="the manifest does not name it"):
        source.image(location)
    assert fetched == []


def test_rows_of_a_data_set_are_not_fetched(tmp_path, fetched):
    datasets = pytest.importorskip("datasets")
    from sail_align.extract.sources.hugging_face import HuggingFaceConfig

    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    paths = ["https://example.org/a.png", "/etc/passwd", str(tmp_path / "photos" / "1.png")]
    features = datasets.Features({"image": datasets.Image(), "title": datasets.Value("string")})
    content = {"image": [{"bytes": None, "path": path} for path in paths], "title": ["a"] * 3}
    rows = datasets.Dataset.from_dict(content, features=features)
    (tmp_path / "photos").mkdir()
    shutil.copy(tmp_path / "1.png", tmp_path / "photos" / "1.png")
    pq.write_table(rows.data.table, tmp_path / "photos" / "train.parquet")
    source = HuggingFaceConfig(kind="hugging-face", root="photos", captions={"raw": "title"}).open(tmp_path)
    for row in ("0", "1"):
        with pytest.raises(UserError, match="the manifest does not name it"):
            source.image(row)
    assert source.image("2").size == (4, 4)
    assert not [url for url in fetched if "example.org" in url]


def test_tables_at_urls_are_refused(root):
    with pytest.raises(UserError, match=r"Table https://example\.org/t\.csv is invalid: got a URL, expected a file"):
        table(root, files="https://example.org/t.csv")


def test_packaged_manifests_name_no_urls():
    """So `sail-eval all` and `sail-eval trace`, which open those whose data are here, fetch nothing."""
    assert {name for name in packaged_manifests() if find_manifest(name)[0].source.urls} == set()


def test_manifests_name_their_urls():
    files = ["0.tar", "s3://bucket/{0..3}.tar"]
    about = WebDatasetConfig(kind="webdataset", files=files, classes="https://example.org/classes.txt")
    assert about.urls == ["s3://bucket/{0..3}.tar", "https://example.org/classes.txt"]
    assert WebDatasetConfig(kind="webdataset", classes="open_clip:imagenet").urls == []


def test_paths_are_compared_by_whole_names():
    assert is_inside(Path("/a/data"), "/a/data/x")
    assert not is_inside(Path("/a/data"), "/a/database/x")
    assert is_inside(Path("/"), "/x")
    assert np.all([is_inside(Path("."), name) for name in ("a", "./a", "a/../b", str(Path.cwd() / "a"))])


def test_image_without_a_name_has_no_mask(root):
    (root / "masks").mkdir()
    assert [(sample.image, sample.mask) for sample in table(root, "1.png", ".", masks="masks").samples()] == [
        ("1.png", "1.png"),
        (".", ""),
    ]
