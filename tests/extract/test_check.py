"""sail-extract check as typed: what is here, what is missing, and the command that gets it."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from sail_align.extract.manifest import find_manifest, packaged_manifests
from sail_align.extract.sources.class_names import templates

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


def test_a_whole_data_set_is_ready(photos, typed):
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
        "  ok   33 of 33 images looked at are readable",
        "  ok   33 of these have a caption (captions are named c0, c1)",
        "ready",
    ]


def test_what_is_missing_is_named_with_the_commands_that_get_it(photos, typed):
    (photos.parent / "photos" / "captions.json").unlink()
    code, out, _ = typed("check", str(photos))
    assert code == 1
    assert f"  NOT  {photos.parent}/photos/captions.json is missing\n  ok   {photos.parent}/photos/images\n" in out
    assert out.endswith("not ready; to get it:\n    cd data\n    wget http://nowhere/photos.zip\n")


def test_images_that_cannot_be_read_are_found_and_named(photos, typed):
    for image in sorted((photos.parent / "photos" / "images").iterdir())[10:]:
        image.write_text("no picture")
    code, out, _ = typed("check", str(photos))
    assert code == 1
    assert "of 33 images looked at are readable; the first problem: " in out
    assert "cannot identify image file" in out


def test_a_part_of_an_evaluation_set_is_not_ready_but_of_a_training_set_is(photos, typed):
    content = {**yaml.safe_load(PHOTOS), "expected_rows": 60}
    photos.write_text(yaml.safe_dump(content))
    code, out, _ = typed("check", str(photos))
    assert (code, "  NOT  50 rows; 60 are expected\n" in out) == (1, True)
    del content["task"]
    photos.write_text(yaml.safe_dump({**content, "purpose": "train"}))
    code, out, _ = typed("check", str(photos))
    assert (code, "  ok   50 rows; 60 are expected\n" in out) == (0, True)


def test_a_file_of_another_form_is_a_finding(photos, typed):
    (photos.parent / "photos" / "captions.json").write_text("[]")
    code, out, _ = typed("check", str(photos))
    assert code == 1
    assert "captions.json is not of the published form (TypeError" in out


def test_lists_that_a_manifest_refers_to_are_looked_up(photos, typed):
    content = yaml.safe_load(PHOTOS)
    content["task"] = {"kind": "classification", "templates": "open_clip:imagenet-80"}
    photos.write_text(yaml.safe_dump(content))
    assert "  ok   80 templates (open_clip:imagenet-80)\n" in typed("check", str(photos))[1]
    content["task"]["templates"] = "open_clip:imagenet-81"
    photos.write_text(yaml.safe_dump(content))
    code, out, _ = typed("check", str(photos))
    assert (code, "  NOT  No templates 'open_clip:imagenet-81'; give" in out) == (1, True)


@pytest.mark.parametrize(("tried", "code", "left"), [(120, 0, "0 are"), (117, 1, "3 are")])
def test_of_many_tars_some_are_looked_at_and_the_download_must_be_finished(typed, tmp_path, tried, code, left):
    (tmp_path / "tars").mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "JPEG")
    for number in range(40):
        with tarfile.open(tmp_path / "tars" / f"{number:05}.tar", "w") as tar:
            for key in range(2):
                for ending, content in (("jpg", picture.getvalue()), ("txt", b"said"), ("json", b"{}")):
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
    assert f"download: {tried * 2 // 3} images came of {tried} URLs (66.7%); {left} still to try\n" in out
    assert "  ok   40 tars, of which some are looked at; `run` counts their rows\n" in out
    assert "  ok   33 of 33 images looked at are readable\n" in out


@pytest.mark.parametrize("name", packaged_manifests())
def test_what_packaged_manifests_refer_to_is_published(name):
    manifest = find_manifest(name)[0]
    reference = manifest.task and manifest.task.templates
    if not isinstance(reference, str):
        return
    library = reference.split(":")[0]
    pytest.importorskip(library, reason=f"{library} is not installed (extra eval)")
    assert all(template.count("{}") == 1 for template in templates(reference))


def test_without_a_name_every_packaged_manifest_has_a_line(typed, tmp_path):
    (tmp_path / "ADEChallengeData2016" / "images" / "validation").mkdir(parents=True)
    (tmp_path / "ADEChallengeData2016" / "annotations" / "validation").mkdir(parents=True)
    code, out, _ = typed("check", "--data-root", str(tmp_path))
    lines = {line.split()[1]: line.split()[0] for line in out.splitlines()[:-1]}
    assert code == 0
    assert (lines["demo"], lines["ade20k"], lines["voc20"]) == ("here", "here", "missing")


def test_a_name_that_is_not_known_is_a_mistake(typed):
    code, _, err = typed("check", "coco-val2018")
    assert (code, err.count("\n")) == (2, 1)
    assert "No manifest 'coco-val2018'" in err
