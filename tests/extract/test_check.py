"""sail-extract check on complete, incomplete and damaged data sets."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest, packaged_manifests
from sail_align.extract.sources.class_names import templates
from sail_align.extract.sources.file_set import FileSet
from sail_align.extract.sources.table import TableConfig

PHOTOS = """
name: photos
purpose: evaluate
title: Photos of the group
licence: ours
get: |
  cd data
  wget http://nowhere/photos.zip
source: {kind: coco-captions, root: photos, annotations: captions.json, images: images}
task: {kind: retrieval}
expected_rows: 50
expected_captions: 100
"""


@pytest.fixture
def photos(tmp_path):
    """A manifest of fifty photos with two captions each, as it describes them."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i:03d}.jpg"} for i in range(50)]
    annotations = [{"id": 2 * i + n, "image_id": i, "caption": f"{n} of {i}"} for i in range(50) for n in range(2)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    for image in images:
        Image.new("RGB", (4, 4)).save(folder / "images" / image["file_name"])
    path = tmp_path / "photos.yaml"
    path.write_text(PHOTOS)
    return path


def test_complete_data_set_is_ready(photos, typed):
    code, out, _ = typed("check", str(photos))
    assert code == 0
    assert out.splitlines() == [
        "photos: Photos of the group",
        "licence: ours",
        f"data root: {photos.parent}",
        f"  ok   {photos.parent}/photos/captions.json",
        f"  ok   {photos.parent}/photos/images",
        "  ok   50 rows, as expected",
        "  ok   100 captions, as expected",
        "  ok   33 of 33 checked images are readable (a sample of 50 rows; `run` reads all)",
        "  ok   33 of these have a caption (named c0, c1)",
        "ready",
    ]


def test_prints_only_the_fields_that_are_there(photos, typed):
    source = next(line for line in PHOTOS.splitlines() if line.startswith("source"))
    photos.write_text(f"name: photos\n{source}\ntask: {{kind: retrieval}}\n")
    (photos.parent / "photos" / "captions.json").unlink()
    code, out, _ = typed("check", str(photos))
    assert code == 1
    assert out.splitlines() == [
        "photos",
        f"data root: {photos.parent}",
        f"  NOT  {photos.parent}/photos/captions.json is missing",
        f"  ok   {photos.parent}/photos/images",
        "not ready: files are missing",
    ]


def test_names_missing_files_and_how_to_get_them(photos, typed):
    (photos.parent / "photos" / "captions.json").unlink()
    code, out, _ = typed("check", str(photos))
    assert code == 1
    assert f"  NOT  {photos.parent}/photos/captions.json is missing\n  ok   {photos.parent}/photos/images\n" in out
    assert out.endswith("not ready: files are missing\nto get them:\n    cd data\n    wget http://nowhere/photos.zip\n")


def test_reports_unreadable_images(photos, typed):
    for image in sorted((photos.parent / "photos" / "images").iterdir())[10:]:
        image.write_text("no picture")
    code, out, _ = typed("check", str(photos))
    assert code == 1
    assert "of 33 checked images are readable (a sample of 50 rows; `run` reads all); first problem: " in out
    assert "cannot identify image file" in out


def test_rows_that_run_leaves_out_are_announced(tmp_path, typed):
    for number in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_text("no picture")
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{number}.png,a\n" for number in range(3)))
    content = {"name": "made", "purpose": "train", "title": "Made", "licence": "none", "get": "made by a test"}
    content["source"] = {"kind": "table", "files": "t.csv", "captions": {"raw": "caption"}}
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(content))
    code, out, _ = typed("check", str(tmp_path / "made.yaml"))
    assert code == 0
    (line,) = [line for line in out.splitlines() if "checked images" in line]
    assert line.startswith("  ok   2 of 3 checked images are readable; first problem: ")
    assert line.endswith("; `run` counts such images and leaves them without features")


def test_incomplete_set_is_ready_only_for_training(photos, typed):
    content = {**yaml.safe_load(PHOTOS), "expected_rows": 60}
    photos.write_text(yaml.safe_dump(content))
    code, out, _ = typed("check", str(photos))
    assert (code, "  NOT  50 rows; expected 60\n" in out) == (1, True)
    del content["task"]
    photos.write_text(yaml.safe_dump({**content, "purpose": "train"}))
    code, out, _ = typed("check", str(photos))
    assert (code, "  ok   50 rows; expected 60\n" in out) == (0, True)


def test_reports_file_of_another_form(photos, typed):
    (photos.parent / "photos" / "captions.json").write_text("[]")
    code, out, _ = typed("check", str(photos))
    assert code == 1
    assert "captions.json is invalid: got a list, expected a JSON object" in out


def test_looks_up_published_lists(photos, typed):
    content = yaml.safe_load(PHOTOS)
    content["task"] = {"kind": "classification", "templates": "open_clip:imagenet-80"}
    photos.write_text(yaml.safe_dump(content))
    assert "  ok   80 templates (open_clip:imagenet-80)\n" in typed("check", str(photos))[1]
    content["task"]["templates"] = "open_clip:imagenet-81"
    photos.write_text(yaml.safe_dump(content))
    code, out, _ = typed("check", str(photos))
    assert (code, "  NOT  Templates 'open_clip:imagenet-81' are unknown. Use" in out) == (1, True)


@pytest.mark.parametrize(("tried", "code", "left"), [(120, 0, 0), (117, 1, 3)])
def test_checks_some_of_many_tars_and_the_download(typed, tmp_path, tried, code, left):
    (tmp_path / "tars").mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "JPEG")
    for number in range(40):
        with tarfile.open(tmp_path / "tars" / f"{number:05}.tar", "w") as tar:
            for key in range(2):
                for ending, content in (("jpg", picture.getvalue()), ("txt", b"message"), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{number:05}{key:04}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        if 3 * number < tried:
            (tmp_path / "tars" / f"{number:05}_stats.json").write_text(json.dumps({"count": 3, "successes": 2}))
    pq.write_table(pa.table({"url": ["http://x"] * 120}), tmp_path / "tars-urls.parquet")
    content = {**yaml.safe_load(PHOTOS), "purpose": "train", "expected_rows": 120}
    content["source"] = {"kind": "webdataset", "root": "tars", "captions": {"raw": "txt"}}
    content["download"] = {"table": "captions.csv", "url": "url", "caption": "caption", "folder": "tars"}
    del content["task"], content["expected_captions"]
    (tmp_path / "tars.yaml").write_text(yaml.safe_dump(content))
    exit_code, out, _ = typed("check", str(tmp_path / "tars.yaml"))
    assert exit_code == code
    assert f"download: {tried * 2 // 3} images from {tried} URLs (66.7%); {left} URLs left\n" in out
    assert "  ok   40 tars, of which some are checked; `run` counts their rows\n" in out
    assert "  ok   33 of 33 checked images are readable (a sample of some tars; `run` reads all)\n" in out


@pytest.mark.parametrize("name", packaged_manifests())
def test_templates_of_packaged_manifests_are_published(name):
    manifest = find_manifest(name)[0]
    reference = manifest.task and manifest.task.templates
    if not isinstance(reference, str):
        return
    library = reference.split(":")[0]
    pytest.importorskip(library, reason=f"{library} is not installed (extra eval)")
    assert all(template.count("{}") == 1 for template in templates(reference))


def test_lists_all_packaged_manifests(typed, tmp_path):
    (tmp_path / "ADEChallengeData2016" / "images" / "validation").mkdir(parents=True)
    (tmp_path / "ADEChallengeData2016" / "annotations" / "validation").mkdir(parents=True)
    code, out, _ = typed("check", "--data-root", str(tmp_path))
    lines = {line.split()[1]: line.split()[0] for line in out.splitlines()[:-1]}
    assert code == 0
    assert (lines["demo"], lines["ade20k"], lines["voc20"]) == ("here", "here", "missing")


def test_rejects_unknown_name(typed):
    code, _, err = typed("check", "coco-val2018")
    assert (code, err.count("\n")) == (2, 1)
    assert "Manifest 'coco-val2018' is unknown" in err


def test_evaluation_sets_need_every_image_and_caption(photos, typed):
    path = photos.parent / "photos" / "captions.json"
    content = json.loads(path.read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 41]
    path.write_text(json.dumps(content))
    (photos.parent / "photos" / "images" / "040.jpg").unlink()
    code, out, _ = typed("check", str(photos))
    assert code == 1
    assert "  NOT  1 rows have no image file; the first is '040.jpg'\n" in out
    assert "  NOT  1 rows have no caption; the first is '041.jpg'\n" in out


def test_needs_of_a_table(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "t.csv").write_text("image,caption\n")
    fields = {"captions": {"raw": "caption"}, "masks": "masks", "split": {"column": "s", "keep": "1", "file": "s.csv"}}
    for files in ("t.csv", "*.csv", f"{tmp_path}/*.csv", f"{tmp_path}/t.csv"):
        config = TableConfig(kind="table", files=files, images="images", **fields)
        found = {"images": True, "masks": False, "s.csv": False}
        needed = {str(tmp_path / name): present for name, present in found.items()}
        assert config.requirements(tmp_path) == {str(tmp_path / files): True, **needed}
    assert TableConfig(kind="table", files="a**", **fields).requirements(tmp_path)[str(tmp_path / "a**")] is False
    with pytest.raises(UserError, match=r"Pattern 'a\*\*' is invalid"):
        FileSet(tmp_path).find("a**")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0.png,a\n0.png,b\n", "  NOT  key '0.png' occurs more than once; make the keys unique\n"),
        ("", "  NOT  0 of 0 checked images are readable\n"),
    ],
)
@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_table_that_run_would_reject_is_not_ready(tmp_path, typed, rows, message, purpose):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "t.csv").write_text(f"image,caption\n{rows}")
    fields = {"name": "made", "purpose": purpose, "title": "Made", "licence": "none", "get": "made by a test"}
    source = {"kind": "table", "files": "t.csv", "captions": {"raw": "caption"}}
    task = {"task": {"kind": "retrieval"}} if purpose == "evaluate" else {}
    (tmp_path / "made.yaml").write_text(yaml.safe_dump({**fields, "source": source, **task}))
    code, out, _ = typed("check", str(tmp_path / "made.yaml"))
    assert code == 1
    assert message in out
