"""The model object gives the numbers of sail-eval, also to the code of other programs."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from released_file import save_encoders
from small_world import SHADES, draw, save_run, write_classes
from typer.testing import CliRunner

from sail_align.align import pretrained
from sail_align.evaluate.cli import app
from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.models import Encoders
from sail_align.evaluate.results.scores import RunScores
from sail_align.evaluate.segmenter import Segmenter
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.manifest import find_manifest

TEMPLATES = ["a {}", "the {} on the bench"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, text = save_encoders(tmp_path / "encoders")
    encoders = (
        ImageEncoderConfig(f"hf:{image}", pooling="cls+mean").load(),
        TextEncoderConfig(f"hf:{text}", pooling="mean").load(),
    )
    return save_run(tmp_path / "runs" / "photos-glu", *(encoder.identity for encoder in encoders))


def score(run, task, manifest):
    result = CliRunner().invoke(app, [task, str(manifest), "--run", str(run), "--device", "cpu", "--quiet"])
    assert result.exit_code == 0, (result.output, result.exception)
    (record,) = RunScores.read(run).records
    return {metric["name"]: metric["value"] / 100 for metric in record["metrics"]}


def class_files(folder):
    """Return the files of `write_classes`, sorted by class, and their labels."""
    names = sorted(SHADES)
    files = [(path, label) for label, name in enumerate(names) for path in sorted((folder / "val" / name).iterdir())]
    return names, [path for path, _ in files], torch.tensor([label for _, label in files])


@pytest.mark.slow
def test_open_clip_builds_a_classifier_with_the_same_accuracy(run, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    expected = score(run, "classification", write_classes(tmp_path / "classes"))["top1"]
    model = pretrained.load(run, device="cpu")
    names, files, labels_N = class_files(tmp_path / "classes")
    classifier_EC = open_clip.build_zero_shot_classifier(
        model, tokenizer=model.tokenizer, classnames=names, templates=TEMPLATES, num_classes_per_batch=2, device="cpu"
    )
    torch.testing.assert_close(classifier_EC.T, model.encode_labels(names, TEMPLATES), atol=1e-5, rtol=1e-5)
    pixels_BHWC = torch.stack([model.preprocess(Image.open(path)) for path in files])
    hits = []
    for images, targets in zip(pixels_BHWC.split(7), labels_N.split(7), strict=True):  # as open_clip_train.zero_shot
        output = model(image=images)
        logits = 100.0 * output["image_features"] @ classifier_EC
        hits.append(logits.argmax(dim=1) == targets)
    assert torch.cat(hits).double().mean().item() == pytest.approx(expected, abs=1e-9)
    assert 0 < expected < 1
    legacy = open_clip.build_zero_shot_classifier_legacy(model, model.tokenizer, names, TEMPLATES)
    torch.testing.assert_close(legacy, classifier_EC, atol=1e-5, rtol=1e-5)


def test_forward_returns_what_open_clip_returns(run):
    model = pretrained.load(run, device="cpu")
    picture = draw(0, SHADES["red"])
    output = model(picture, "a red cat")
    assert list(output) == ["image_features", "text_features", "logit_scale", "logit_bias"]
    assert torch.equal(output["image_features"], model.encode_image(picture, normalize=True))
    assert torch.equal(output["text_features"], model.encode_text("a red cat", normalize=True))
    assert output["logit_scale"].item() == pytest.approx(20)
    assert output["logit_bias"].item() == -10
    assert model(text="a red cat")["image_features"] is None


@pytest.mark.slow
def test_classify_has_the_accuracy_of_sail_eval(run, tmp_path):
    expected = score(run, "classification", write_classes(tmp_path / "classes"))["top1"]
    names, files, labels_N = class_files(tmp_path / "classes")
    model = pretrained.load(run, device="cpu")
    found_N = model.classify(files, names, TEMPLATES).argmax(dim=1)
    assert (found_N == labels_N).double().mean().item() == pytest.approx(expected, abs=1e-9)


def write_masks(folder, task, rows=4):
    """Write pictures of two colours each with masks, and their manifest; return its path and the names."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    names = [*SHADES, "background"]
    for row in range(rows):
        left, right = row % 5, (row + 1 + row // 5) % 5
        picture, other = draw(row, SHADES[names[left]]), draw(row + 100, SHADES[names[right]])
        picture.paste(other.crop((40, 0, 80, 60)), (40, 0))
        mask = np.full((60, 80), left, dtype=np.uint8)
        mask[:, 40:], mask[0] = right, 255
        picture.save(folder / "images" / f"{row}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{row}.png")
    content = {
        "name": folder.name,
        "purpose": "evaluate",
        "title": "Halves",
        "licence": "none",
        "get": "Draw them.",
        "source": {
            "kind": "mask-folder",
            "images": "images",
            "masks": "masks",
            "classes": dict(enumerate(names)),
            "ignored": [255],
        },
        "task": {"kind": "segmentation", "templates": TEMPLATES, **task},
    }
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, names


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [{}, {"background": 0.21}, {"variants": ["whole-image"]}, {"variants": ["maskclip", "authors-normalisation"]}],
)
def test_segment_labels_pixels_as_sail_eval_does(run, tmp_path, task):
    manifest, names = write_masks(tmp_path / "halves", task)
    about, root = find_manifest(str(manifest))
    model = pretrained.load(run, device="cpu")
    data = EvaluationSet(about, root, Encoders(model.run), tmp_path / "features", quiet=True)
    segmenter = Segmenter(data)
    right = pixels = 0
    for sample in data.samples:
        file = tmp_path / "halves" / "images" / sample.image
        options = {"background": task.get("background"), "variants": task.get("variants", ())}
        found = model.segment(file, names, TEMPLATES, **options)
        expected = segmenter.label(sample, (60, 80))
        assert found.labels.dtype == np.uint8
        assert (found.labels == expected).mean() > 0.999  # class embeddings differ by rounding
        assert found.names == names
        assert len(np.unique(expected)) > 1
        truth = np.array(Image.open(tmp_path / "halves" / "masks" / sample.image))
        right += int(((found.labels == truth) & (truth != 255)).sum())
        pixels += int((truth != 255).sum())
    accuracy = score(run, "segmentation", manifest)["pixel_accuracy"]
    assert right / pixels == pytest.approx(accuracy, abs=1e-3)


def test_invalid_arguments_of_segment_are_named(run):
    model = pretrained.load(run, device="cpu")
    picture = draw(0, SHADES["red"])
    for arguments, options, error, message in (
        (([picture, picture], ["red", "cat"]), {}, TypeError, "got 2 images, expected one"),
        ((picture, "red"), {}, TypeError, "labels is invalid"),
        ((picture, ["red"]), {"background": 0.5}, ValueError, "no class 'background'"),
        ((picture, ["red"]), {"variants": ["wide"]}, ValueError, "got 'wide', expected some of whole-image, maskclip"),
    ):
        with pytest.raises(error, match=message):
            model.segment(*arguments, **options)
    many = model.segment(picture, [f"cat {number}" for number in range(300)])
    assert many.labels.dtype == np.int32


def test_vision_tower_gives_the_patches_of_sail_eval(run):
    model = pretrained.load(run, device="cpu")
    tower = model.vision_tower()
    pictures = [draw(seed, colour) for seed, colour in enumerate(SHADES.values())]
    values = tower.image_processor.preprocess(pictures, return_tensors="pt")["pixel_values"]
    assert values.shape == (5, 3, 56, 56)
    tokens_BNE = tower(values)
    assert tokens_BNE.shape == (5, tower.num_patches, tower.hidden_size) == (5, 16, 16)
    pixels_BHWC = torch.stack([model.preprocess(picture) for picture in pictures])
    with torch.no_grad():
        patches_BhwE = model.run.model.encode_patches(Encoders(model.run).image.encode_dense(pixels_BHWC))
    # The pixels have another memory layout, which some processors round differently.
    torch.testing.assert_close(tokens_BNE, patches_BhwE.flatten(1, 2), atol=1e-5, rtol=0)
    raw = model.vision_tower(normalize=False)(values)
    assert torch.equal(F.normalize(raw, dim=-1), tokens_BNE)
    one_by_one = tower(list(values))
    torch.testing.assert_close(torch.cat(one_by_one), tokens_BNE, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"Pixels are invalid: got shape \(5, 3, 28, 28\)"):
        tower(values[:, :, :28, :28])
    half = tower.half()
    assert half.dtype == torch.float16
    found = half(values.half())
    assert found.dtype == torch.float16
    assert F.cosine_similarity(found.float(), tokens_BNE, dim=-1).min() > 0.999
    assert not any(module.training for module in tower.train().modules())


def test_image_processor_survives_saving(run, tmp_path):
    processor = pretrained.load(run, device="cpu").vision_tower().image_processor
    processor.save_pretrained(tmp_path / "processor")
    again = type(processor).from_pretrained(tmp_path / "processor")
    picture = draw(0, SHADES["red"])
    for tensors in ("pt", "np", None):
        found, expected = (each(picture, return_tensors=tensors)["pixel_values"] for each in (again, processor))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert again.size == {"height": 56, "width": 56}
    assert json.loads((tmp_path / "processor" / "preprocessor_config.json").read_text())["image_mean"][0] == 0.485
