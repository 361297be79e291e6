"""Models of OpenCLIP are rows beside ours: the same tasks, the same stores, the numbers that the model itself gives."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_world import SHADES, write_captioned, write_classes
from typer.testing import CliRunner

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

from tiny_open_clip import save_open_clip  # noqa: E402

from sail_align.align.runs.folder import RunFolder  # noqa: E402
from sail_align.align.stats.metrics import ranks  # noqa: E402
from sail_align.evaluate.cli import app  # noqa: E402
from sail_align.evaluate.results.scores import RunScores  # noqa: E402
from sail_align.extract.errors import UserError  # noqa: E402

RUN = Path("runs/open_clip-tiny")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return save_open_clip(tmp_path / "tiny")


def scored(*words):
    return CliRunner().invoke(app, [*words, "--model", "open_clip:tiny", "--device", "cpu", "--quiet"])


def metrics():
    return {metric["name"]: metric["value"] for record in RunScores.read(RUN).records for metric in record["metrics"]}


def embed(model, pictures, texts):
    """Return what the model itself makes of pictures and texts, of unit length."""
    transform = open_clip.create_model_and_transforms("local-dir:tiny")[2]
    pixels_BCHW = torch.stack(
        [transform(Image.open(path).convert("RGB")) for path in pictures] or [torch.zeros(3, 32, 32)]
    )
    tokens_BT = open_clip.get_tokenizer("local-dir:tiny")(texts, context_length=16)
    with torch.no_grad():
        return F.normalize(model.encode_image(pixels_BCHW), dim=-1), F.normalize(model.encode_text(tokens_BT), dim=-1)


@pytest.mark.slow
def test_classification_equals_the_model_itself(model, tmp_path):
    manifest = write_classes(tmp_path / "shades")
    result = scored("classification", str(manifest))
    assert result.exit_code == 0, (result.output, result.exception)
    names = sorted(SHADES)
    pictures = [path for name in names for path in sorted((tmp_path / "shades" / "val" / name).iterdir())]
    labels_N = torch.tensor([names.index(path.parent.name) for path in pictures])
    templates = ("a {}", "the {} on the bench")
    images_NE, texts_PE = embed(model, pictures, [each.format(name) for name in names for each in templates])
    classes_CE = F.normalize(texts_PE.reshape(len(names), 2, -1).mean(1), dim=-1)
    right_N = (images_NE @ classes_CE.T).argmax(1) == labels_N
    assert metrics()["top1"] == pytest.approx(100 * right_N.float().mean().item())


@pytest.mark.slow
def test_all_tasks_share_stores_and_report_names_the_model(model, tmp_path):
    photos, shades = write_captioned(tmp_path / "photos"), write_classes(tmp_path / "shades")
    first = scored("all", "--manifest", str(photos), "--manifest", str(shades))
    assert first.exit_code == 0, (first.output, first.exception)
    tasks = {record["task"] for record in RunScores.read(RUN).records}
    assert tasks >= {"retrieval", "classification", "representation"}
    report = (RUN / "report.html").read_text()
    assert "open_clip:tiny" in report
    assert "embeds pictures and texts by itself" in report
    images_NE, texts_ME = embed(
        model, sorted((tmp_path / "photos" / "images").iterdir()), [t for c in ("short", "long") for t in captions(c)]
    )
    _, text_ranks_M = ranks(images_NE.numpy(), texts_ME.numpy(), np.tile(np.arange(12), 2))
    assert metrics()["t2i_r1"] == pytest.approx(100 * (text_ranks_M == 0).mean())


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [None, "maskclip"])
def test_segmentation_equals_the_model_itself(model, tmp_path, protocol):
    """A square photo is one window: the forward pass, the cosines and the pixels written out."""
    manifest = write_halves(tmp_path / "halves")
    result = scored("segmentation", str(manifest), *(["--protocol", protocol] if protocol else []))
    assert result.exit_code == 0, (result.output, result.exception)
    (record,) = RunScores.read(RUN).records
    assert ("/last-attention=none/" in record["protocol"]) == (protocol == "maskclip")

    photo = Image.open(tmp_path / "halves" / "images" / "0.png").resize((448, 448), Image.Resampling.BILINEAR)
    normalise = open_clip.create_model_and_transforms("local-dir:tiny")[2].transforms[-2:]
    pixels_CHW = normalise[1](normalise[0](photo))
    visual = model.visual
    block = visual.transformer.resblocks[-1]
    with torch.no_grad():
        grid_1Dhw = visual.positional_embedding[1:].T.reshape(1, -1, 4, 4)
        grid_TD = F.interpolate(grid_1Dhw, (56, 56), mode="bicubic", antialias=True).flatten(2)[0].T
        x_TD = torch.cat([visual.class_embedding[None], visual.conv1(pixels_CHW[None]).flatten(2)[0].T])
        x_TD = x_TD + torch.cat([visual.positional_embedding[:1], grid_TD])
        x_BTD = visual.transformer.resblocks[0](visual.ln_pre(x_TD)[None])
        if protocol == "maskclip":
            value = F.linear(block.ln_1(x_BTD), block.attn.in_proj_weight[64:], block.attn.in_proj_bias[64:])
            x_BTD = x_BTD + block.attn.out_proj(value)
            x_BTD = x_BTD + block.mlp(block.ln_2(x_BTD))
        else:
            x_BTD = block(x_BTD)
        patches_TE = F.normalize(visual.ln_post(x_BTD[0, 1:]) @ visual.proj, dim=-1)
    _, classes_CE = embed(model, [], ["a photo of a red.", "a photo of a cat."])
    scores_1Chw = (classes_CE @ patches_TE.T).reshape(1, 2, 56, 56)
    for size in (448, 64):
        scores_1Chw = F.interpolate(scores_1Chw, (size, size), mode="bilinear")
    right = scores_1Chw[0].argmax(0).numpy() == np.array(Image.open(tmp_path / "halves" / "masks" / "0.png"))
    assert metrics()["pixel_accuracy"] == pytest.approx(100 * right.mean(), abs=0.1)
    assert 1 < metrics()["pixel_accuracy"] < 99


def write_halves(folder):
    """Write one square photo of noise, and a mask of its halves; return the manifest."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC).save(folder / "images" / "0.png")
    Image.fromarray(np.repeat([[0] * 32 + [1] * 32], 64, axis=0).astype(np.uint8)).save(folder / "masks" / "0.png")
    path = folder / "halves.yaml"
    path.write_text("""
name: halves
purpose: evaluate
title: noise
licence: none
get: draw it
source: {kind: mask-folder, images: images, masks: masks, classes: {0: red, 1: cat}}
task: {kind: segmentation}
""")
    return path


def captions(column):
    with Path("photos/captions.csv").open() as file:
        return [row[column] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_second_evaluation_loads_no_tower(model, tmp_path, monkeypatch):
    manifest = write_captioned(tmp_path / "photos")
    assert scored("retrieval", str(manifest)).exit_code == 0
    before = metrics()

    def load(*_, **__):
        raise AssertionError("a tower was loaded")

    for name in ("models.ImageEncoderConfig", "models.TextEncoderConfig", "models.load_recorded"):
        monkeypatch.setattr(f"sail_align.evaluate.{name}", load)
    assert scored("retrieval", str(manifest)).exit_code == 0
    assert metrics() == before


@pytest.mark.slow
def test_model_is_not_the_newest_run(model, tmp_path):
    scored("retrieval", str(write_captioned(tmp_path / "photos")))
    assert json.loads((RUN / "settings.json").read_bytes()) == {"model": "open_clip:tiny"}
    with pytest.raises(UserError, match="There is no run"):
        RunFolder.newest()


def test_invalid_model_options_are_rejected(model, tmp_path):
    manifest = str(write_captioned(tmp_path / "photos"))
    both = CliRunner().invoke(app, ["retrieval", manifest, "--run", "runs/x", "--model", "open_clip:tiny"])
    assert str(both.exception) == "--run runs/x and --model open_clip:tiny exclude each other. Remove one."
    other = CliRunner().invoke(app, ["retrieval", manifest, "--model", "clip"])
    assert "is invalid: expected open_clip:<model>@<weights>" in str(other.exception)
