"""Error messages about manifests name file, field and value."""

import pytest

from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest, find_manifest, packaged_manifests


@pytest.mark.parametrize("name", packaged_manifests())
def test_packaged_manifests_are_valid(name):
    manifest, _ = find_manifest(name)
    assert manifest.name == name
    assert manifest.licence
    assert manifest.get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("kind: table", "kind: tabel"),
            "yaml: field 'source.kind' is invalid: got 'tabel', expected .*demo, .*\\. Did you mean 'table'\\?$",
        ),
        (("kind: table", "root: ."), "field 'source.kind' is missing"),
        (("images: images", "imagse: images"), "field 'source.table.imagse' is unknown: got value 'images'"),
        (
            ("purpose: train", "purpose: training"),
            "'purpose' is invalid: got 'training', expected train, evaluate\\. Did you mean 'train'\\?$",
        ),
        (("purpose: train", "porpose: train"), "field 'porpose' is unknown: got value 'train'"),
        (("licence: none", ""), "field 'licence' is missing"),
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
