"""Exports and released heads from someone else, whose digests are those of their content: one clear error each."""

import io
import json
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from fakes import identity
from released_file import released_tensors, save_released
from safetensors.torch import load_file, save
from small_world import save_run

from sail_align.align.hub.folder import read_hub_folder, write_hub_folder
from sail_align.align.hub.released import Released
from sail_align.align.runs.checkpoint import load_run
from sail_align.align.runs.folder import record_digest
from sail_align.evaluate.models import load_open_clip
from sail_align.extract.encoders.load import load_recorded
from sail_align.extract.errors import UserError


class Encoder:
    def __init__(self, modality):
        plain = identity(modality)
        recorded = {"crop": 8, "resize": None, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
        self.spec = replace(plain.spec, preprocessing=recorded if modality == "image" else {})
        self.identity = replace(plain, spec=self.spec)

    def to_json(self):
        return self.identity.to_json()


@pytest.fixture
def hub(tmp_path):
    run = save_run(tmp_path / "run", Encoder("image"), Encoder("text"))
    write_hub_folder(load_run(run), tmp_path / "hub", "# card")
    return tmp_path / "hub"


def reseal(hub: Path, record, weights=None):
    """Write a record and weights with digests that fit."""
    if weights is not None:
        (hub / "model.safetensors").write_bytes(weights)
        record["weights_sha256"] = sha256(weights).hexdigest()
    record["digest"] = record_digest(record)
    (hub / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("architecture", "head"), "transformer", "architecture: head: got 'transformer', expected 'linear', 'mlp'"),
        (("architecture", "dim"), "16", "architecture: dim: got '16', expected a whole number"),
        (("architecture", "dim"), 17, r"does not fit this model: image_head\.out\.weight is of shape \(16, 8\)"),
        (("architecture", "dim"), 1 << 40, "architecture: dim: got 1099511627776, expected a number less than"),
        (("architecture", "image_dim"), 1 << 20, "does not fit this model"),
        (("architecture", "image_dropout"), [0], r"architecture: image_dropout: got \[0\], expected a number"),
        (("architecture", "image_power"), None, "architecture: image_power: got None, expected a number"),
        (("architecture", "text_hidden"), 8, "architecture: text_hidden is only for a linear head, got glu"),
        (("architecture", "layers"), 3, "architecture: layers: got 3, expected no such field"),
        (("architecture",), None, "architecture: got None, expected a mapping"),
        (("image", "spec", "dim"), 8, "the image head takes 4 features, its encoder has 8"),
        (("image", "spec", "modality"), "sound", "image: spec.modality: got 'sound', expected 'image' or 'text'"),
        (("image", "golden"), ["x"], r"image: golden\[0\]: got 'x', expected a number"),
        (("text", "spec", "source"), {"loader": 3}, "text: spec.source.loader: got 3, expected text"),
        (("text", "spec"), ..., "text: spec: got no value, expected a value"),
        (("settings",), [], r"settings: got \[\], expected a mapping"),
        (("settings", "steps"), "9", "settings.steps: got '9', expected a whole number"),
        (("step",), -1, "step: got -1, expected a number greater than or equal to 0"),
        (("finished",), "yes", "finished: got 'yes', expected true or false"),
        (("run_digest",), "../../x", r"got run_digest '../../x', expected 64 hexadecimal digits"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_field_of_an_export_is_named(hub, path, value, message):
    record = json.loads((hub / "config.json").read_bytes())
    *above, last = path
    place = record
    for name in above:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    reseal(hub, record)
    with pytest.raises(UserError, match=message):
        read_hub_folder(hub)


WEIGHT = "image_head.out.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(WEIGHT), rf"{WEIGHT} is missing in the file"),
        (lambda w: w.update(more=torch.zeros(2)), r"more is of shape \(2,\) in the file and missing in the model"),
        (lambda w: w.update({WEIGHT: w[WEIGHT].half()}), r"\(16, 8\) and type float16 in the file"),
        (lambda w: w.update({WEIGHT: torch.zeros(16, 8, dtype=torch.int64)}), "and type int64 in the file"),
        (lambda w: w[WEIGHT].fill_(float("nan")), f"{WEIGHT} contains NaN or infinity"),
        (lambda w: w["bias"].fill_(float("inf")), "bias contains NaN or infinity"),
    ],
    ids=["missing", "more", "half", "int64", "nan", "inf"],
)
def test_tensor_of_an_export_is_named(hub, change, message):
    weights = load_file(hub / "model.safetensors")
    change(weights)
    reseal(hub, json.loads((hub / "config.json").read_bytes()), save(weights))
    with pytest.raises(UserError, match=message):
        read_hub_folder(hub)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}more"], ids=["empty", "long", "more"])
def test_weights_that_are_no_safetensors_are_damaged(hub, content):
    reseal(hub, json.loads((hub / "config.json").read_bytes()), content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        read_hub_folder(hub)


def test_deeply_nested_config_is_damaged(hub):
    (hub / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        read_hub_folder(hub)


@pytest.mark.parametrize("source", [{}, {"loader": "hub"}, {"loader": "hub", "repository": "a/b"}], ids=str)
def test_encoder_without_a_source_is_rejected(source):
    recorded = identity("image")
    recorded.spec.source.clear()
    recorded.spec.source.update(source)
    with pytest.raises(UserError, match="Record of encoder 'fake-image' is invalid: its source has no"):
        load_recorded(recorded)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(300_000, 300_000),
        torch.empty(1 << 40, device="meta"),
        torch.zeros(8, 8, dtype=torch.complex64),
        "text",
    ],
    ids=["expanded", "meta", "complex", "text"],
)
def test_tensor_that_is_not_what_its_file_holds_is_rejected(tmp_path, tensor):
    tensors = {**released_tensors(2), "vision_mapping_network.f1.weight": tensor}
    with pytest.raises(UserError, match=r"f1\.weight in .* is not a dense tensor of finite numbers"):
        Released.read(save_released(tmp_path / "heads.pt", tensors))


def test_compressed_file_of_heads_is_rejected(tmp_path):
    file = save_released(tmp_path / "heads.pt", released_tensors(2))
    with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"is not a complete file of torch\.save"):
        Released.read(file)


@pytest.mark.parametrize(
    ("name", "kept"), [("\ud800", "?"), ("x" * 9_999, "x" * 200), (torch.zeros(2), ""), (None, "")], ids=range(4)
)
def test_name_in_a_file_of_heads_is_text_of_bounded_length(tmp_path, name, kept):
    saved = {"state_dict": released_tensors(2), "name": name, "epoch": 1 << 70}
    torch.save(saved, tmp_path / "heads.pt")
    imported = Released.read(tmp_path / "heads.pt").imported
    assert (imported["name"], imported["epoch"]) == (kept, None)


@pytest.mark.parametrize("towers", [{}, {"image": 3, "text": {}}, {"image": {"spec": []}, "text": {}}], ids=str)
def test_damaged_record_of_a_compared_model_is_named(tmp_path, monkeypatch, towers):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/open_clip-tiny")
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text('{"model": "open_clip:tiny"}')
    (folder / "encoders.json").write_text(json.dumps(towers))
    with pytest.raises(UserError, match=r"encoders\.json is invalid: .* Remove runs/open_clip-tiny\."):
        load_open_clip("open_clip:tiny", "cpu")
