"""Faulty entries in annotation files of published forms: an absent caption, or an error that names the entry."""

import csv
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

from sail_align.extract.check import check
from sail_align.extract.data import Source
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest
from sail_align.extract.sources.annotated import MmvpConfig

COCO = {
    "images": [{"id": i, "file_name": f"{i}.png", "coco_url": f"http://images/{i}"} for i in range(2)],
    "annotations": [{"id": 2 * i + n, "image_id": i, "caption": f"{n} of {i}"} for i in range(2) for n in range(2)],
}
KARPATHY = {
    "images": [
        {"filename": f"{i}.png", "split": "test", "sentences": [{"raw": f"{n} of {i}"} for n in range(2)]}
        for i in range(2)
    ]
}
WINOGROUND = [
    {f"{what}_{side}": f"{side}" for what in ("image", "caption") for side in (0, 1)}
    | {"id": 0, "collapsed_tag": "Object"}
]
MMVP = [["id", "type", "statement"], ["0", "one", "a thing"], ["1", "one", "another"]]
FORMS = {"coco-captions": COCO, "karpathy": KARPATHY, "winoground": WINOGROUND, "mmvp": MMVP}
FIELDS = {"coco-captions": "annotations", "karpathy": "annotations", "winoground": "examples", "mmvp": "questions"}


def described(kind: str, folder: Path, content: Any) -> Manifest:
    """Write an annotation file and pictures, and return a manifest of them."""
    for picture in ("0.png", "1.png", "one/0.jpg", "one/1.jpg"):
        path = folder / "images" / picture
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            Image.new("RGB", (2, 2)).save(path)
    with (folder / "made").open("w", newline="") as file:
        if kind == "mmvp":
            csv.writer(file).writerows(content)
        elif kind == "winoground":
            file.writelines(json.dumps(line) + "\n" for line in content)
        else:
            json.dump(content, file)
    fields = {"name": "made", "purpose": "evaluate", "title": "Made", "licence": "none", "get": "made by a test"}
    source = {"kind": kind, "images": "images", FIELDS[kind]: "made"}
    return Manifest.model_validate({**fields, "source": source, "task": {"kind": "retrieval"}})


def opened(kind: str, folder: Path, content: Any) -> Source:
    return described(kind, folder, content).open_source(folder)


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path to each value in nested lists and dictionaries."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in inside:
        yield (*path, name)
        yield from places(value, (*path, name))


def changed(content: Any, path: tuple, value: Any) -> Any:
    """Return a copy with another value at a path; without it if the value is `...`."""
    content = deepcopy(content)
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


VALUES = [..., None, "", " ", 3, -1, 1.5, float("nan"), True, [], [1], {}, {"raw": 1}, "\ud83d", 10**30, "0"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_anywhere_is_absent_or_an_error(tmp_path, kind, data):
    content = FORMS[kind]
    path = data.draw(st.sampled_from(list(places(content))))
    values = [value for value in VALUES if kind != "mmvp" or value != "\ud83d"]
    content = changed(content, path, data.draw(st.sampled_from(values)))
    if kind == "mmvp":
        content = [row if isinstance(row, list) else [row] for row in content]
    manifest = described(kind, tmp_path, content)
    findings = list(check(manifest, tmp_path))
    assert all("Error" not in text for _, text in findings), findings
    try:
        source = manifest.open_source(tmp_path)
        samples = list(source.samples())
    except UserError:
        assert any(not good and str(tmp_path / "made") in text for good, text in findings)
        return
    for sample in samples:
        TypeAdapter(str).validate_python(sample.key)
        assert set(sample.captions) <= set(source.captions)
        assert all(isinstance(text, str) and text.strip() for text in sample.captions.values())
        assert all(text.encode() for text in sample.captions.values())  # else `run` would stop where `check` is ready


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("coco-captions", ("annotations", 1, "caption"), 3, r"annotations\[1\]\.caption: got 3, expected text"),
        ("coco-captions", ("annotations", 1, "image_id"), 9, "annotation 1 names image 9, which 'images' does not"),
        ("coco-captions", ("images", 1, "id"), 0, "image id 0 is listed 2 times"),
        ("coco-captions", ("images", 1, "file_name"), "0.png", r"sample '0\.png' is listed 2 times"),
        ("coco-captions", ("images", 0), None, r"images\[0\]: got None"),
        ("coco-captions", ("images",), ..., "images: got no value"),
        ("karpathy", ("images", 1, "sentences", 0), "text", r"images\[1\]\.sentences\[0\]: got 'text'"),
        ("winoground", (0, "caption_1"), None, r"line 1\.caption_1: got None"),
        ("winoground", (0, "caption_1"), " ", r"line 1\.caption_1: got ' '"),
        ("mmvp", (2, 2), "", r"line 3: got \['1', 'one', ''\]"),
    ],
)
def test_error_names_the_entry(tmp_path, kind, path, value, message):
    with pytest.raises(UserError, match=rf"made is not of the published form \({message}"):
        opened(kind, tmp_path, changed(FORMS[kind], path, value)).parts()[0].read()


@pytest.mark.parametrize("absent", [None, "", " \n"])
def test_absent_captions_do_not_hide_later_ones(tmp_path, absent):
    content = changed(COCO, ("annotations", 0, "caption"), absent)
    content["annotations"][3]["caption"] = absent
    source = opened("coco-captions", tmp_path, content)
    assert [dict(sample.captions) for sample in source.samples()] == [{"c0": "1 of 0"}, {"c0": "0 of 1"}]
    assert source.captions == ("c0",)


def test_file_without_captions_is_an_error(tmp_path):
    content = deepcopy(COCO)
    for annotation in content["annotations"]:
        annotation["caption"] = None
    with pytest.raises(UserError, match="made contains no captions"):
        opened("coco-captions", tmp_path, content).parts()[0].read()


def test_deep_nesting_is_not_json(tmp_path):
    manifest = described("coco-captions", tmp_path, COCO)
    (tmp_path / "made").write_text("[" * 100_000)
    with pytest.raises(UserError, match="made is not valid JSON"):
        list(manifest.open_source(tmp_path).samples())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('id,type,statement\n1,c,"s1\n2,c,s2\n3,c,s3"\n4,c,s4\n', "quotation mark may be missing"),
        ('id,type,statement\n1,c,"s1\n2,c,s2\n', "line 3: unexpected end of data"),
        ('id,type,statement\n1,c,"s1" x\n2,c,s2\n', "line 2: "),
        ("1,c,s1\n2,c,s2\n", "does not begin with the names of its columns"),
    ],
)
def test_questions_of_mmvp_with_stray_quotation_marks_are_an_error(tmp_path, text, message):
    path = tmp_path / "Questions.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        MmvpConfig(kind="mmvp").read(path)
