"""A manifest's mistakes are named: file, field and value."""

import pytest

from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest, packaged_manifests, read_manifest


@pytest.mark.parametrize("name", packaged_manifests())
def test_every_packaged_manifest_is_valid_and_named_after_its_file(name):
    manifest, _ = find_manifest(name)
    assert manifest.name == name
    assert manifest.licence
    assert manifest.get


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("kind: table", "kind: tabel"),
            "yaml: field 'source.kind' is 'tabel'; did you mean 'table'\\? It can be table, .*, demo\\.$",
        ),
        (("kind: table", "files: a.csv"), "field 'source.kind' is missing"),
        (("images: images", "imagse: images"), "unknown field 'source.table.imagse' with value 'images'"),
        (
            ("purpose: train", "purpose: training"),
            "'purpose' is 'training'; did you mean 'train'\\? It can be train, evaluate\\.$",
        ),
        (("purpose: train", "porpose: train"), "unknown field 'porpose' with value 'train'"),
        (("licence: none", ""), "field 'licence' is missing"),
        (("name: pictures", "name: Pictures!"), "field 'name' is 'Pictures!'"),
        (("purpose: train", "purpose: evaluate"), "'task' belongs to"),
        (("source:", "source: ["), "is not valid YAML"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_file_field_and_value(pictures, change, said):
    path = pictures / "pictures.yaml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UserError, match=said) as mistake:
        read_manifest(path)
    assert "pictures.yaml" in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_captions_of_a_task_differ(pictures):
    path = pictures / "pictures.yaml"
    task = "{kind: retrieval, captions: [raw, raw]}"
    path.write_text(path.read_text().replace("purpose: train", f"purpose: evaluate\ntask: {task}"))
    with pytest.raises(UserError, match="'captions' names one twice: raw, raw"):
        read_manifest(path)


def test_any_kind_of_task_is_accepted(pictures):
    path = pictures / "pictures.yaml"
    path.write_text(path.read_text().replace("purpose: train", "purpose: evaluate\ntask: {kind: counting}"))
    assert read_manifest(path).task.kind == "counting"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"No manifest 'dmeo'.*demo"):
        find_manifest("dmeo")
    with pytest.raises(UserError, match=r"photso\.yaml is not there"):
        find_manifest("photso.yaml")


def test_the_flag_comes_before_the_variable_and_that_before_the_manifests_folder(pictures, monkeypatch):
    path = str(pictures / "pictures.yaml")
    assert find_manifest(path)[1] == pictures
    monkeypatch.setenv("SAIL_DATA_ROOT", "/from/variable")
    assert str(find_manifest(path)[1]) == "/from/variable"
    assert str(find_manifest(path, "/from/flag")[1]) == "/from/flag"
