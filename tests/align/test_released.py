"""Heads published by the paper's authors become a run with the same outputs."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from released_file import DIM, IMAGE_DIM, TEXT_DIM, released_tensors, save_encoders, save_released, their_forward
from typer.testing import CliRunner

from sail_align.align.cli import app
from sail_align.align.hub.released import OUR_NAMES, Released
from sail_align.align.model.loss import sigmoid_loss
from sail_align.align.runs.checkpoint import load_run
from sail_align.extract.errors import UserError

GOLDEN = Path(__file__).parents[2] / "../shared/golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is missing")


@pytest.fixture
def typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, text = save_encoders(tmp_path)

    def run(file, *words, encoders=f"hf:{image},hf:{text}"):
        poolings = ["--image-pooling", "cls+mean", "--text-pooling", "mean"]
        arguments = ["import-released", str(file), "--encoders", encoders, *poolings, "--device", "cpu", *words]
        return CliRunner().invoke(app, arguments)

    return run


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(1)
    return {
        "vision": torch.randn(9, IMAGE_DIM, generator=generator),
        "text": torch.randn(9, TEXT_DIM, generator=generator),
    }


def close(ours, theirs):
    return (ours - theirs.reshape(ours.shape)).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("expansion", [8, 3])
def test_imported_run_has_the_same_outputs(typed, tmp_path, features, expansion):
    tensors = released_tensors(expansion)
    result = typed(save_released(tmp_path / "sail.pt", tensors))
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "Next: sail-eval all --run runs/sail"
    run = load_run("runs/sail")
    assert run.model.image_head.out.in_features == expansion * IMAGE_DIM
    ours = run.model.encode_image(features["vision"]), run.model.encode_text(features["text"])
    for side, embedded in zip(("vision", "text"), ours, strict=True):
        assert close(embedded, F.normalize(their_forward(tensors, side, features[side]), dim=-1))
    assert run.model.log_scale.exp().item() == pytest.approx(35)
    assert run.model.bias.item() == -9
    assert run.finished
    assert run.settings["imported"]["name"] == "synthetic"
    assert len(run.settings["imported"]["sha256"]) == 64
    assert (run.image.spec.dim, run.text.spec.dim, run.image.spec.pooling) == (IMAGE_DIM, TEXT_DIM, "cls+mean")


@pytest.mark.slow
def test_import_never_overwrites_another(typed, tmp_path):
    file = save_released(tmp_path / "sail.pt", released_tensors())
    typed(file)
    digest = load_run("runs/sail").digest
    assert "\nalready imported: runs/sail: glu heads" in f"\n{typed(file).output}"
    save_released(file, released_tensors(seed=1))
    assert "wrote runs/sail-2" in typed(file).output
    assert load_run("runs/sail").digest == digest != load_run("runs/sail-2").digest


@needs_golden
def test_golden_file_agrees(typed):
    """Outputs and losses equal those of the authors' code up to float32 rounding."""
    assert typed(GOLDEN / "released_head.pt", "--out", "runs/golden").exit_code == 0
    model = load_run("runs/golden").model
    with np.load(GOLDEN / "released_expected.npz") as arrays:
        expected = {name: torch.from_numpy(arrays[name]) for name in arrays}
    image_BE, texts = (
        model.encode_image(expected["image"]),
        [model.encode_text(expected[n]) for n in ("text", "extra_text")],
    )
    for ours, name in zip((image_BE, *texts), ("image_out", "text_out", "extra_text_out"), strict=True):
        assert close(ours, F.normalize(expected[name], dim=-1))
    one = sigmoid_loss(image_BE, texts[0][None], model.log_scale, model.bias).total
    two = sigmoid_loss(image_BE, torch.stack(texts), model.log_scale, model.bias).total
    assert close(one, expected["loss_one"])
    assert close(two / 2, expected["loss_two"])  # theirs averages two captions


@needs_golden
def test_clamp_has_no_effect_on_the_golden_file():
    """The hidden units stay within the bound, which is far below the clamp of ±1000."""
    released = Released.read(GOLDEN / "released_head.pt")
    assert not released.needs_clamp
    with np.load(GOLDEN / "released_expected.npz") as arrays:
        for head, name in ((released.model.image_head, "image"), (released.model.text_head, "text")):
            normed_BD = head.norm(torch.from_numpy(arrays[name]))
            reached = head.value(normed_BD).abs().max().item()
            assert reached <= head.value_bound() < 100
            assert head.gate(normed_BD).abs().max() < 1000


@pytest.mark.slow
def test_weights_that_the_clamp_may_affect_are_noted(typed, tmp_path, features):
    tensors = released_tensors()
    assert "clamps" not in typed(save_released(tmp_path / "a.pt", tensors)).output
    tensors["text_mapping_network.f2.weight"] *= 2000
    released = Released.read(save_released(tmp_path / "b.pt", tensors))
    head = released.model.text_head
    assert head.value(head.norm(features["text"])).abs().max().item() <= head.value_bound()
    assert "note: The authors' code clamps hidden units at ±1,000" in typed(tmp_path / "b.pt").output


def _without(tensors):
    del tensors["text_mapping_network.f2.bias"]


def _more(tensors):
    tensors["vision_mapping_network.f3.weight"] = torch.zeros(2)


def _wrong_shape(tensors):
    tensors["text_mapping_network.g.weight"] = torch.zeros(DIM + 1, 8 * TEXT_DIM)


def _other_expansion(tensors):
    tensors.update({name: t for name, t in released_tensors(4).items() if name.startswith("text_")})


def _no_multiple(tensors):
    tensors["vision_mapping_network.f1.weight"] = torch.zeros(8 * IMAGE_DIM + 1, IMAGE_DIM)


def _not_finite(tensors):
    tensors["vision_layer_norm.bias"][3] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, "has no tensor 'text_mapping_network.f2.bias'"),
        (_more, "has an unknown tensor 'vision_mapping_network.f3.weight'"),
        (
            _wrong_shape,
            r"text_mapping_network.g.weight in .* has shape \(25, 256\); expected \(24, 256\)",
        ),
        (_other_expansion, r"text_mapping_network.f1.weight in .* has shape \(128, 32\); expected \(256, 32\)"),
        (_no_multiple, "385 hidden units for 48 inputs"),
        (_not_finite, "vision_layer_norm.bias in .* is not a dense tensor of finite numbers"),
    ],
)
def test_first_difference_is_named(tmp_path, damage, message):
    tensors = released_tensors()
    damage(tensors)
    with pytest.raises(UserError, match=message):
        Released.read(save_released(tmp_path / "sail.pt", tensors))


def test_other_files_are_rejected(tmp_path):
    (tmp_path / "text.pt").write_text("weights")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": Path("code")}, tmp_path / "pickled.pt")
    (tmp_path / "short.pt").write_bytes(save_released(tmp_path / "whole.pt", released_tensors()).read_bytes()[:5000])
    for name, message in {
        "absent.pt": "cannot be read",
        "text.pt": "is not a complete file of torch.save",
        "pickled.pt": "is not a complete file of torch.save",
        "short.pt": "is not a complete file of torch.save",
        "list.pt": "no 'state_dict'",
    }.items():
        with pytest.raises(UserError, match=message):
            Released.read(tmp_path / name)


def test_encoders_of_another_size_are_rejected(typed, tmp_path):
    file = save_released(tmp_path / "sail.pt", released_tensors())
    result = typed(file, "--image-pooling", "cls")
    assert isinstance(result.exception, UserError)
    assert "takes 48 dimensions, but encoder 'folder:dinov2-" in str(result.exception)
    assert "with pooling 'cls' has 24" in str(result.exception)
    assert not Path("runs").exists()


@pytest.mark.parametrize("encoders", ["dinov2-large", "a,b,c", "dinov2-large,"])
def test_encoders_must_be_a_pair(typed, tmp_path, encoders):
    assert "expected IMAGE,TEXT as in" in str(typed(tmp_path / "x.pt", encoders=encoders).exception)


def test_each_tensor_has_one_of_our_names(tmp_path):
    model = Released.read(save_released(tmp_path / "sail.pt", released_tensors())).model
    assert sorted(OUR_NAMES.values()) == sorted(model.state_dict())


@needs_golden
def test_damaged_file_is_rejected(tmp_path):
    golden, choose = GOLDEN / "released_head.pt", random.Random(0)
    content = golden.read_bytes()
    file = tmp_path / "heads.pt"
    for _ in range(60):
        damaged = bytearray(content)
        damaged[choose.randrange(200, len(content))] ^= 1 << choose.randrange(8)
        file.write_bytes(damaged[: choose.choice([len(content), choose.randrange(len(content))])])
        try:
            same = Released.read(file).model.state_dict()
        except UserError:
            continue
        for name, tensor in Released.read(golden).model.state_dict().items():  # between the parts of the archive
            assert torch.equal(same[name], tensor)
    sparse = torch.load(golden, weights_only=True)
    sparse["state_dict"]["vision_mapping_network.f1.bias"] = torch.zeros(3).to_sparse()
    torch.save(sparse, file)
    with pytest.raises(UserError, match=r"f1.bias in .* is not a dense tensor of finite numbers"):
        Released.read(file)
