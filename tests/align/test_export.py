"""Export of a run as a hub folder, and loading it as a model that embeds images and texts."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from released_file import save_encoders
from safetensors.torch import load_file, save_file
from small_world import SHADES, draw, save_run, write_captioned
from typer.testing import CliRunner

from sail_align.align import pretrained
from sail_align.align.cli import app
from sail_align.align.hub.model_card import model_card
from sail_align.align.runs.checkpoint import load_run
from sail_align.align.runs.folder import RunFolder, record_digest
from sail_align.evaluate.cli import app as evaluation
from sail_align.extract.encoders.identity import EncoderChangedError
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.errors import UserError
from sail_align.extract.system.folders import lock_folder

FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json"]
TEXTS = ["a red cat", "the dog sleeps on the green bench", "a"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    image, text = save_encoders(tmp_path_factory.mktemp("encoders"))
    return ImageEncoderConfig(f"hf:{image}", pooling="cls+mean").load(), TextEncoderConfig(
        f"hf:{text}", pooling="mean"
    ).load()


@pytest.fixture
def run(tmp_path, monkeypatch, encoders):
    monkeypatch.chdir(tmp_path)
    return save_run(Path("runs/photos-glu"), *(encoder.identity for encoder in encoders))


@pytest.fixture
def pictures():
    return [draw(seed, colour) for seed, colour in enumerate(SHADES.values())]


@pytest.fixture
def folders(encoders):
    return {f"{side}_folder": each.identity.location for side, each in zip(("image", "text"), encoders, strict=True)}


def export(run, *words):
    return CliRunner().invoke(app, ["export", str(run), *words])


def embeddings(model, pictures):
    return torch.cat([model.encode_image(pictures), model.encode_text(TEXTS)])


@pytest.mark.slow
def test_exported_folder_gives_the_same_embeddings(run, encoders, pictures, folders):
    result = export(run, "--out", "hub")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "To publish it: hf upload OWNER/photos-glu hub"
    assert sorted(path.name for path in Path("hub").iterdir()) == FILES
    heads, (image, text) = load_run(run).model, encoders
    pixels_BHWC = torch.stack([image.preprocess(picture) for picture in pictures])
    with torch.no_grad():
        expected = torch.cat(
            [heads.encode_image(image.encode(pixels_BHWC).half()), heads.encode_text(text.encode(TEXTS).half())]
        )
    checkpoint = next((run / "checkpoints").iterdir())
    for reference, where in ((run, {}), (checkpoint, {}), ("hub", folders)):
        model = pretrained.load(reference, device="cpu", **where)
        torch.testing.assert_close(embeddings(model, pictures), expected, rtol=1e-4, atol=1e-4)
        assert model.run.digest == load_run(run).digest
        assert model.logit_scale.item() == pytest.approx(20)
        assert model.logit_bias.item() == -10


@pytest.mark.slow
def test_tensors_and_raw_inputs_give_the_same_embeddings(run, pictures):
    model = pretrained.load(run, device="cpu")
    pixels_BHWC = torch.stack([model.preprocess(picture) for picture in pictures])
    assert torch.equal(model.encode_image(pixels_BHWC), model.encode_image(pictures))
    assert torch.equal(model.encode_text(model.tokenizer(TEXTS)), model.encode_text(TEXTS))
    assert torch.equal(model.encode_image(pictures[0]), model.encode_image(pictures[:1]))
    assert model.encode_text("a cat").shape == (1, 16)


def test_preprocess_takes_pictures_only(run):
    model = pretrained.load(run, device="cpu")
    with pytest.raises(TypeError, match=r"got 'a\.jpg'\. Open a file with PIL\.Image\.open"):
        model.preprocess("a.jpg")


def test_autocast_has_no_effect(run, pictures):
    model = pretrained.load(run, device="cpu")
    plain = embeddings(model, pictures)
    with torch.autocast("cpu"):
        assert torch.equal(embeddings(model, pictures), plain)


def test_many_images_are_encoded_in_batches(run, pictures, monkeypatch):
    model = pretrained.load(run, device="cpu")
    expected = model.encode_image(pictures)
    monkeypatch.setitem(model.image_encoder.__dict__, "batch_size", 2)
    torch.testing.assert_close(model.encode_image(pictures), expected, rtol=1e-4, atol=1e-4)


def test_export_has_no_local_paths(run, encoders, tmp_path):
    output = export(run, "--out", "hub").output
    assert "note: The text encoder is a local folder" in output
    for file in FILES:
        if file == "model.safetensors":
            continue
        content = (tmp_path / "hub" / file).read_text()
        assert "/somewhere" not in content
        assert not any(encoder.identity.location in content for encoder in encoders)
    with pytest.raises(UserError, match=r"is a local folder\. Pass its path with image_folder"):
        pretrained.load("hub")


@pytest.mark.slow
def test_card_has_scores_and_provenance(run, tmp_path):
    assert "note: runs/photos-glu has no scores" in export(run, "--out", "unscored").output
    manifest = write_captioned(tmp_path / "holiday")
    words = ["retrieval", str(manifest), "--run", str(run), "--device", "cpu", "--quiet"]
    assert CliRunner().invoke(evaluation, words).exit_code == 0
    assert "with scores of 1 set\n" in export(run, "--out", "hub", "--licence", "apache-2.0").output
    card = ModelCard.load("hub/README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "sail-align"
    metrics = json.loads((run / "scores.json").read_bytes())["records"][0]["metrics"]
    assert [result.metric_value for result in card.data.eval_results] == [round(m["value"], 4) for m in metrics]
    assert {result.dataset_name for result in card.data.eval_results} == {"Noise of holiday"}
    loaded = load_run(run)
    for fact in (loaded.digest, loaded.image.spec.fingerprint, loaded.text.spec.fingerprint, "c" * 64, "photos.zarr"):
        assert fact in card.text
    text = re.sub(" +", " ", card.text)
    assert f"| Noise of holiday | {metrics[0]['label']} | {metrics[0]['value']:.1f} |" in text
    assert {result.task_type for result in card.data.eval_results} == {"retrieval"}
    assert "| data | metric | score | 95 % interval | chance |" in text
    assert "None" not in card.text


def test_card_formats_small_chances_like_score_tables(run):
    metric = {"name": "r1", "label": "R@1", "value": 12.04, "interval": [9.96, 15.0], "chance": 2 / 3}
    record = {"dataset": "x", "title": "X", "task": "segmentation", "protocol": "p", "items": 150, "metrics": [metric]}
    card = re.sub(" +", " ", model_card(load_run(run), [record], "mit"))
    assert "| X | R@1 | 12.0 | 10.0 – 15.0 | 0.67 | 150 | `p` |" in card
    assert "type: image-segmentation" in card


def test_scores_of_other_weights_are_left_out(run, encoders, tmp_path):
    write = {"schema": 1, "run": {"digest": "f" * 64}, "encoders": {}, "records": [{"metrics": []}]}
    (run / "scores.json").write_text(json.dumps(write))
    assert "which are for other weights" in export(run, "--out", "hub").output
    assert ModelCard.load("hub/README.md").data.eval_results is None
    for damaged in ("[]", "{}", '{"run": 1}', "{"):
        (run / "scores.json").write_text(damaged)
        assert "scores.json is damaged: its content is not what was written. Remove it and score" in str(
            export(run.resolve(), "--out", ".").exception
        )


def test_modified_export_is_rejected(run, folders):
    export(run, "--out", "hub")
    weights = load_file("hub/model.safetensors")
    weights["bias"] += 1
    save_file(weights, "hub/model.safetensors")
    with pytest.raises(UserError, match=r"hub/model\.safetensors is damaged"):
        pretrained.load("hub", **folders)
    export(run, "--out", "hub2")
    config = Path("hub2/config.json")
    config.write_text(config.read_text().replace('"pooling": "cls+mean"', '"pooling": "cls"'))
    with pytest.raises(UserError, match=r"hub2/config\.json is damaged: .* Export or download it again"):
        pretrained.load("hub2", **folders)
    export(run, "--out", "hub3")
    record = json.loads(Path("hub3/config.json").read_text())
    record["architecture"]["head"] = "linear"
    Path("hub3/config.json").write_text(json.dumps({**record, "digest": record_digest(record)}))
    with pytest.raises(UserError, match=r"hub3 does not fit this model: image_head\.out\.weight is of shape"):
        pretrained.load("hub3", **folders)


def test_export_does_not_name_folders_of_this_machine(run, encoders):
    export(run, "--out", "hub")
    record = json.loads(Path("hub/config.json").read_text())
    record["image"]["location"] = encoders[0].identity.location
    Path("hub/config.json").write_text(json.dumps({**record, "digest": record_digest(record)}))
    assert pretrained.read("hub").image.location == ""
    with pytest.raises(UserError, match=r"is a local folder\. Pass its path with image_folder"):
        pretrained.load("hub")


def test_other_encoder_is_rejected(run, folders, tmp_path):
    export(run, "--out", "hub")
    other, _ = save_encoders(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["layernorm.bias"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderChangedError):
        pretrained.load("hub", **{**folders, "image_folder": other})


def test_hub_repository_is_read_like_a_folder(run, folders, pictures, monkeypatch):
    export(run, "--out", "hub")
    asked = []

    def snapshot_download(repository, revision, allow_patterns, ignore_patterns):
        asked.append((repository, revision, allow_patterns))
        return "hub"

    monkeypatch.setattr("sail_align.extract.encoders.weights.snapshot_download", snapshot_download)
    model = pretrained.load("someone/photos-glu", revision="0" * 40, device="cpu", **folders)
    assert asked == [("someone/photos-glu", "0" * 40, ["config.json", "model.safetensors", "README.md"])]
    assert torch.equal(embeddings(model, pictures), embeddings(pretrained.load(run, device="cpu"), pictures))


@pytest.mark.slow
def test_packaged_encoders_need_only_the_folder(tmp_path):
    image, text = ImageEncoderConfig("efficientnet-lite0").load(), TextEncoderConfig("minilm-l6").load()
    run = save_run(tmp_path / "packaged", image.identity, text.identity, expansion=1)
    export(run, "--out", str(tmp_path / "hub"))
    model = pretrained.load(tmp_path / "hub", device="cpu")
    assert model.encode_image(draw(0, (200, 30, 30))).norm().item() == pytest.approx(1, abs=1e-5)
    expected = load_run(run).model.encode_text(text.encode(TEXTS).half())
    torch.testing.assert_close(model.encode_text(TEXTS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        ("absent", {}, "is neither a folder nor a repository"),
        ("./a/b", {}, "is neither a folder nor a repository"),
        (".", {}, "has no config.json"),
        ("other", {}, "was not written by `sail-align export`"),
        ("runs/photos-glu", {"revision": "main"}, "has no revision 'main'"),
    ],
)
def test_load_rejects_other_references(run, reference, options, message):
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=message):
        pretrained.load(reference, **options)


def test_misspelt_run_is_reported_as_missing_folder_and_repository(run, monkeypatch):
    def nowhere(repository, revision, patterns):
        raise UserError(f"No repository {repository!r} on the hub; correct its name.")

    monkeypatch.setattr("sail_align.align.hub.reference.download", nowhere)
    with pytest.raises(UserError, match=r"runs/photso is not a local folder\. As a repository: No repository"):
        pretrained.load("runs/photso")


def test_export_never_overwrites(run):
    assert export(run).exit_code == 0
    assert Path("exports/photos-glu-hub-folder/config.json").is_file()
    assert "exports/photos-glu-hub-folder exists already" in str(export(run).exception)
    assert "expected hub-folder, sentence-transformers, onnx." in str(export(run, "--to", "zip").exception)
    Path("empty").mkdir()
    there = run.resolve()
    with contextlib.chdir("empty"):
        assert ". exists already" in str(export(there, "--out", ".").exception)


@pytest.mark.parametrize(
    "digest", ["../../../tmp/x", "a/b", "0" * 63, "0" * 65, "A" * 64, "0" * 63 + "\n", "", None, 7, []]
)
def test_run_digest_that_is_none_never_becomes_a_path(run, digest):
    export(run, "--out", "hub")
    record = json.loads(Path("hub/config.json").read_text()) | {"run_digest": digest}
    Path("hub/config.json").write_text(json.dumps({**record, "digest": record_digest(record)}))
    message = r"hub/config\.json is invalid: got run_digest .*, expected 64 hexadecimal digits"
    for read in (lambda: pretrained.read("hub"), lambda: RunFolder(Path("hub")).scores):
        with pytest.raises(UserError, match=message):
            read()
    before = sorted(Path().rglob("*"))
    words = ["retrieval", str(write_captioned(Path("holiday"), 3)), "--run", "hub", "--device", "cpu", "--quiet"]
    assert re.search(message, str(CliRunner().invoke(evaluation, words).exception))
    assert [path for path in sorted(Path().rglob("*")) if "holiday" not in path.parts] == before


def test_export_removes_no_folder_of_another(run):
    Path(".hub.new").mkdir()
    Path(".hub.new/precious").touch()
    Path("elsewhere").mkdir()
    Path("elsewhere/config.json").touch()
    hexadecimal = "0" * 32
    Path(f".hub.{hexadecimal}.new").symlink_to("elsewhere")  # planted
    half = Path(f".hub.{'1' * 32}.new")  # of a killed export, with a file that is not its own
    half.mkdir()
    for name in ("model.safetensors", "precious", f".config.json.{hexadecimal}.tmp"):
        (half / name).touch()
    empty = Path(f".hub.{'2' * 32}.new")
    empty.mkdir()
    (empty / "config.json").touch()
    assert export(run, "--out", "hub").exit_code == 0
    assert Path(".hub.new/precious").exists()
    assert Path("elsewhere/config.json").exists()
    assert [path.name for path in half.iterdir()] == ["precious"]
    assert not empty.exists()
    assert sorted(path.name for path in Path("hub").iterdir()) == FILES


def test_running_export_is_not_disturbed(run):
    written = Path(f".hub.{'3' * 32}.new")
    written.mkdir()
    (written / "config.json").touch()
    lock = lock_folder(written)
    assert export(run, "--out", "hub").exit_code == 0
    assert (written / "config.json").exists()
    os.close(lock)
    assert export(run, "--out", "hub").exception
    assert export(run, "--out", "hub2").exit_code == 0
    shutil.rmtree("hub")
    assert export(run, "--out", "hub").exit_code == 0
    assert not written.exists()


def test_failed_export_leaves_nothing(run, monkeypatch):
    def fail(path, content):
        path.write_bytes(content[:9])
        if path.name == "config.json":
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("sail_align.align.hub.folder.write_atomically", fail)
    assert "No space is left for hub" in str(export(run, "--out", "hub").exception)
    assert not list(Path().glob("*hub*"))
