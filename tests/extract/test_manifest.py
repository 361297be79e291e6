"""Error messages about manifests name file, field and value."""

import pytest

from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest, find_manifest, packaged_manifests


@pytest.mark.parametrize("name", packaged_manifests())
def test_packaged_manifests_are_valid(name):
    manifest, _ = find_manifest(name)
    assert manifest.name == name
    assert manifest.model_fields_set >= {"name", "purpose", "title", "licence", "get", "source"}
    assert all((manifest.title, manifest.licence, manifest.get))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("kind: table", "kind: tabel"),
            "yaml: field 'source.kind' is invalid: got 'tabel', expected .*demo, .*\\. Did you mean 'table'\\?$",
        ),
        (("kind: table", "root: ."), "field 'source.kind' is missing"),
        (("images: images", "imagse: images"), "field 'source.imagse' is unknown: got value 'images'"),
        (
            ("purpose: train", "purpose: training"),
            "'purpose' is invalid: got 'training', expected train, evaluate\\. Did you mean 'train'\\?$",
        ),
        (("purpose: train", "porpose: train"), "field 'porpose' is unknown: got value 'train'"),
        (("name: pictures", ""), "field 'name' is missing"),
        (("licence: none", "licens: none"), "'licens' is unknown: got value 'none'\\. Did you mean 'licence'\\?$"),
        (("source:", "sorce:"), "'sorce' is unknown: got value {.*}\\. Did you mean 'source'\\?$"),
        (
            ("purpose: train", "captions: a"),
            "'captions' is unknown: .* belongs under 'source' or 'recaptions' or 'task'",
        ),
        (("title: Noise", "license: MIT\ntitle: Noise"), "'license' is unknown: .* 'licence' is given too. Keep one"),
        (("name: pictures", "name: Pictures!"), "field 'name' is invalid: got 'Pictures!'"),
        (("purpose: train", "purpose: evaluate"), "'task' belongs to"),
        (("source:", "source: ["), "is not valid YAML"),
    ],
)
def test_invalid_manifest_names_file_field_and_value(pictures, change, message):
    path = pictures / "pictures.yaml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UserError, match=message) as mistake:
        Manifest.read(path)
    assert "pictures.yaml" in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_all_mistakes_are_reported_at_once(pictures):
    path = pictures / "pictures.yaml"
    for change in (
        ("name: pictures", "name: My pictures"),
        ("licence: none", "licens: none"),
        ("images: images", "imagse: images\n  files: []\n  classes: {x: a, y: b}"),
        ("  files: captions.csv\n", ""),
        ("{raw: caption, long: story}", "{raw: 3, long: [4]}\nrecaptions: {files: [1, 2, 3], captions: {a: b}}"),
    ):
        path.write_text(path.read_text().replace(*change))
    with pytest.raises(UserError) as problem:
        Manifest.read(path)
    first, *mistakes = str(problem.value).split("\n")
    assert first == f"{path} has 8 mistakes:"
    assert mistakes == [
        "  field 'source.imagse' is unknown: got value 'images'. Did you mean 'image'?",
        "  field 'licens' is unknown: got value 'none'. Did you mean 'licence'?",
        "  field 'name' is invalid: got 'My pictures'. Expected lower-case letters, digits, '.', '_' and '-', "
        "such as 'my-pictures'.",
        "  field 'source.files' is invalid: got [], expected text or at least one entry.",
        "  field 'source.captions.raw' is invalid: got 3, expected text.",
        "  field 'source.captions.long' is invalid: got [4], expected text.",
        "  field 'source.classes' is invalid: got {'x': 'a', 'y': 'b'}. Got the mask values x, y, expected 0 to 254.",
        "  field 'recaptions.files.0' is invalid: got 1, expected text. So are 2 more entries.",
    ]


def test_many_mistakes_are_counted(pictures):
    path = pictures / "pictures.yaml"
    path.write_text(path.read_text() + "".join(f"x{number}: {number}\n" for number in range(50)))
    with pytest.raises(UserError) as problem:
        Manifest.read(path)
    assert str(problem.value).startswith(f"{path} has 50 mistakes:")
    assert str(problem.value).endswith("\n  field 'x19' is unknown: got value 19. Remove or correct it.\n  and 30 more")


def test_fields_for_people_are_optional():
    source = {"kind": "class-folder"}
    manifest = Manifest.model_validate({"name": "photos", "source": source})
    assert (manifest.purpose, manifest.title, manifest.licence, manifest.get) == ("train", "photos", "", "")
    task = {"kind": "classification"}
    manifest = Manifest.model_validate({"name": "photos", "source": source, "task": task, "license": "MIT"})
    assert (manifest.purpose, manifest.licence) == ("evaluate", "MIT")


def test_captions_of_a_task_differ(pictures):
    path = pictures / "pictures.yaml"
    task = "{kind: retrieval, captions: [raw, raw]}"
    path.write_text(path.read_text().replace("purpose: train", f"purpose: evaluate\ntask: {task}"))
    with pytest.raises(UserError, match="'captions' names one twice: raw, raw"):
        Manifest.read(path)


def test_any_kind_of_task_is_accepted(pictures):
    path = pictures / "pictures.yaml"
    path.write_text(path.read_text().replace("purpose: train", "purpose: evaluate\ntask: {kind: counting}"))
    assert Manifest.read(path).task.kind == "counting"


def test_unknown_name_lists_known_ones():
    with pytest.raises(UserError, match=r"Manifest 'dmeo' is unknown.*demo"):
        find_manifest("dmeo")
    with pytest.raises(UserError, match=r"photso\.yaml is missing"):
        find_manifest("photso.yaml")


def test_precedence_of_data_roots(pictures, monkeypatch):
    path = str(pictures / "pictures.yaml")
    assert find_manifest(path)[1] == pictures
    monkeypatch.setenv("SAIL_DATA_ROOT", "/from/variable")
    assert str(find_manifest(path)[1]) == "/from/variable"
    assert str(find_manifest(path, "/from/flag")[1]) == "/from/flag"


def test_a_missing_task_is_named_together_with_other_mistakes(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("name: My Photos\npurpose: evaluate\nsource: {kind: images}\n")
    with pytest.raises(UserError, match=r"(?s)2 mistakes:.*'name' is invalid.*'task' belongs to") as raised:
        Manifest.read(path)
    assert str(raised.value).count("\n") == 2
