"""Exports load as models of transformers, without a warning and with the numbers of sail_align.load and sail-eval."""

import json
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from released_file import save_encoders
from small_world import SHADES, draw, save_run, write_classes
from tiny_open_clip import save_open_clip
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    VisionTextDualEncoderModel,
    pipeline,
)
from typer.testing import CliRunner

import sail_align
from sail_align.align.cli import app as align
from sail_align.align.runs.folder import record_digest
from sail_align.evaluate.cli import app as evaluation
from sail_align.evaluate.results.scores import RunScores
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.errors import UserError
from sail_align.transformers import SailConfig, SailImageProcessor, SailModel, SailProcessor, SailTokenizer

TEXTS = ["a red cat", "the dog sleeps on the green bench", "a"]
TEMPLATES = ["a {}", "the {} on the bench"]


@pytest.fixture
def no_warnings():
    """Let warnings fail, and whatever transformers logs."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run on encoders of local folders and its export; the options name these folders."""
    folder = tmp_path_factory.mktemp("world")
    image, text = save_encoders(folder)
    encoders = (
        ImageEncoderConfig(f"hf:{image}", pooling="cls+mean").load(),
        TextEncoderConfig(f"hf:{text}", pooling="mean").load(),
    )
    run = save_run(folder / "runs" / "photos-glu", *(encoder.identity for encoder in encoders))
    export(run, folder / "hub")
    return run, folder / "hub", {"image_folder": image, "text_folder": text}


@pytest.fixture(scope="module")
def pictures():
    return [draw(seed, colour) for seed, colour in enumerate(SHADES.values())]


def export(run, out):
    result = CliRunner().invoke(align, ["export", str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output


def load_pair(folder, options):
    """Return model and processor, as the auto classes load them."""
    return (
        AutoModel.from_pretrained(folder, **options),
        AutoProcessor.from_pretrained(folder, text_folder=options.get("text_folder")),
    )


def top1(run, manifest):
    words = ["classification", str(manifest), "--run", str(run), "--device", "cpu", "--quiet"]
    result = CliRunner().invoke(evaluation, words)
    assert result.exit_code == 0, (result.output, result.exception)
    (record,) = RunScores.read(run).records
    return next(metric["value"] for metric in record["metrics"] if metric["name"] == "top1") / 100


def test_auto_classes_load_an_export(world, no_warnings):
    _, folder, options = world
    model, processor = load_pair(folder, options)
    assert isinstance(model, SailModel)
    assert isinstance(processor, SailProcessor)
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, SailConfig)
    assert config.projection_dim == 16
    assert isinstance(AutoImageProcessor.from_pretrained(folder), SailImageProcessor)
    tokenizer = AutoTokenizer.from_pretrained(folder, text_folder=options["text_folder"])
    assert isinstance(tokenizer, SailTokenizer)
    assert not any(module.training for module in model.train().modules() if module is not model)
    assert "SailTokenizer" in repr(processor)


def test_outputs_equal_the_loaded_model(world, pictures, no_warnings):
    run, folder, options = world
    model, processor = load_pair(folder, options)
    inputs = processor(images=pictures, text=TEXTS, padding=True, return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "input_ids", "pixel_values"]
    output = model(**inputs)
    expected = sail_align.load(run, device="cpu")
    images_IE, texts_TE = expected.encode_image(pictures), expected.encode_text(TEXTS)
    torch.testing.assert_close(output.image_embeds, images_IE, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.text_embeds, texts_TE, atol=1e-6, rtol=1e-5)
    logits_IT = expected.logit_scale * expected.similarity(pictures, TEXTS) + expected.logit_bias
    torch.testing.assert_close(output.logits_per_image, logits_IT, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(output.logits_per_text, logits_IT.T, atol=1e-4, rtol=1e-5)
    assert [part.shape for part in model(**inputs, return_dict=False)] == [(5, 3), (3, 5), (3, 16), (5, 16)]
    image = model.get_image_features(inputs["pixel_values"]).pooler_output
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(image, expected.encode_image(pictures, normalize=False), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(text, expected.encode_text(TEXTS, normalize=False), atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu"):
        assert torch.equal(model(**inputs).logits_per_image, output.logits_per_image)
    alone = processor(text=TEXTS[0], return_tensors="pt")  # no padding, and no mask needed
    torch.testing.assert_close(
        F.normalize(model.get_text_features(alone["input_ids"]).pooler_output, dim=-1), texts_TE[:1], atol=1e-5, rtol=0
    )


@pytest.mark.slow
def test_pipeline_has_the_accuracy_of_sail_eval(world, tmp_path, monkeypatch, no_warnings):
    run, folder, options = world
    monkeypatch.chdir(tmp_path)
    expected = top1(run, write_classes(tmp_path / "classes"))
    names = sorted(SHADES)
    files = [(path, name) for name in names for path in sorted((tmp_path / "classes" / "val" / name).iterdir())]
    model, processor = load_pair(folder, options)
    means_CE = []
    for name in names:
        inputs = processor(text=[each.replace("{}", name) for each in TEMPLATES], padding=True, return_tensors="pt")
        means_CE.append(F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1).mean(dim=0))
    images = processor(images=[path for path, _ in files], return_tensors="pt")
    scores_NC = model.get_image_features(**images).pooler_output @ F.normalize(torch.stack(means_CE), dim=-1).T
    hits = [names[best] == name for best, (_, name) in zip(scores_NC.argmax(dim=1).tolist(), files, strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(expected, abs=1e-9)
    assert 0 < expected < 1

    classify = pipeline("zero-shot-image-classification", model=str(folder), device="cpu", model_kwargs={**options})
    found = classify([str(path) for path, _ in files], candidate_labels=names, hypothesis_template="a {}", batch_size=4)
    loaded = sail_align.load(run, device="cpu")
    for best, probabilities_C in zip(found, loaded.classify([p for p, _ in files], names, "a {}"), strict=True):
        scores = {each["label"]: each["score"] for each in best}
        assert [scores[name] for name in names] == pytest.approx(probabilities_C.tolist(), abs=1e-5)


@pytest.mark.slow
def test_pipeline_needs_only_the_folder(tmp_path, no_warnings):
    image, text = ImageEncoderConfig("efficientnet-lite0").load(), TextEncoderConfig("minilm-l6").load()
    run = save_run(tmp_path / "packaged", image.identity, text.identity, expansion=1)
    export(run, tmp_path / "hub")
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "hub"), device="cpu")
    labels = ["a red car", "two people on a bench"]
    found = {each["label"]: each["score"] for each in classify(draw(0, SHADES["red"]), candidate_labels=labels)}
    expected = sail_align.load(run, device="cpu").classify(
        draw(0, SHADES["red"]), [f"This is a photo of {label}." for label in labels]
    )
    assert [found[label] for label in labels] == pytest.approx(expected[0].tolist(), abs=1e-5)


def test_saved_model_and_processor_load_again(world, pictures, tmp_path, no_warnings):
    _, folder, options = world
    model, processor = load_pair(folder, options)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    again, same = load_pair(tmp_path / "saved", options)
    inputs = processor(images=pictures, text=TEXTS, padding=True, return_tensors="pt")
    for name, tensor in same(images=pictures, text=TEXTS, padding=True, return_tensors="pt").items():
        assert torch.equal(tensor, inputs[name])
    assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)
    assert sail_align.load(tmp_path / "saved", device="cpu", **options).run.digest == model.sail.run.digest
    model.config.save_pretrained(tmp_path / "config")
    assert json.loads((tmp_path / "config" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    with pytest.raises(UserError, match="The heads differ from those of the export"):
        model.half().save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_half_precision(world, pictures, no_warnings):
    _, folder, options = world
    model, processor = load_pair(folder, options)
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, **options)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    inputs = processor(images=pictures, text=TEXTS, padding=True, return_tensors="pt")
    found, expected = half(**inputs.to(torch.bfloat16)), model(**inputs)
    assert F.cosine_similarity(found.image_embeds, expected.image_embeds).min() > 0.999
    assert F.cosine_similarity(found.text_embeds, expected.text_embeds).min() > 0.999


def test_other_models_do_not_load_an_export(world):
    _, folder, _ = world
    for other in (VisionTextDualEncoderModel, CLIPModel):
        with pytest.raises(Exception, match="Field 'text_config' with value '"):
            other.from_pretrained(folder)


def test_exports_of_earlier_versions_are_read(world, tmp_path, pictures):
    run, folder, options = world
    record = json.loads((folder / "config.json").read_text())
    for name in ("model_type", "architectures", "vision_config", "text_config"):
        del record[name]
    (tmp_path / "config.json").write_text(json.dumps({**record, "digest": record_digest(record)}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    model = sail_align.load(tmp_path, device="cpu", **options)
    assert torch.equal(model.encode_image(pictures), sail_align.load(run, device="cpu").encode_image(pictures))
    with pytest.raises(ValueError, match="Should have a `model_type` key"):
        AutoModel.from_pretrained(tmp_path, **options)


def test_tokens_are_those_of_training(tmp_path, world):
    _, folder, options = world
    tokenizer = AutoTokenizer.from_pretrained(folder, text_folder=options["text_folder"])
    assert tokenizer("a red cat")["input_ids"] == [2, 6, 14, 9, 3]
    assert tokenizer(["a red cat"])["input_ids"] == [[2, 6, 14, 9, 3]]
    assert len(tokenizer("a " * 100)["input_ids"]) == 64
    padded = tokenizer(TEXTS, padding="max_length", max_length=9, return_tensors="pt")
    assert padded["input_ids"].shape == (3, 9)
    assert tokenizer.decode([6, 14, 9]) == "a red cat"
    assert tokenizer.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens([6]) == ["a"]
    assert len(tokenizer) == len(tokenizer.get_vocab()) == 20
    with pytest.raises(ValueError, match=r"truncation=False is invalid: texts end after 64 tokens"):
        tokenizer("a", truncation=False)
    with pytest.raises(UserError, match=r"is a local folder\. Pass its path with text_folder"):
        AutoTokenizer.from_pretrained(folder)
    prefixed = json.loads((folder / "tokenizer_config.json").read_text())
    prefixed["encoder"]["preprocessing"]["prefix"] = "query: "
    query = SailTokenizer(prefixed["encoder"], text_folder=options["text_folder"])
    assert query("a red cat")["input_ids"] == [2, 4, 5, 6, 14, 9, 3]
    encoder = prefixed["encoder"]
    for changed, message in (
        ({"dim": "many"}, r"tokenizer_config\.json is invalid: .*dim"),
        ({"preprocessing": {"prefix": ""}}, r"tokenizer_config\.json is invalid: .*token_limit"),
        ({"source": {}}, "its source has no 'loader'"),
        ({"source": {"loader": "hub", "repository": "a/b"}}, "its source has no 'revision'"),
    ):
        with pytest.raises(UserError, match=message):
            SailTokenizer({**encoder, **changed})


def test_invalid_options_are_named(world, pictures):
    _, folder, options = world
    for given, error, message in (
        ({"device_map": {"sail": 0, "head": 1}}, ValueError, "device_map is invalid: .*expected one device"),
        ({"dtype": "int8"}, ValueError, "dtype is invalid: got 'int8'"),
        ({"load_in_8bit": True}, TypeError, "Option load_in_8bit=True has no meaning for SailModel"),
    ):
        with pytest.raises(error, match=message):
            SailModel.from_pretrained(folder, **options, **given)
    with pytest.raises(UserError, match=r"is a local folder\. Pass its path with image_folder"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(UserError, match=r"A config has no weights\. Use SailModel\.from_pretrained"):
        AutoModel.from_config(AutoConfig.from_pretrained(folder))
    model, processor = load_pair(folder, options)
    with pytest.raises(ValueError, match="There is nothing to process"):
        processor()
    with pytest.raises(ValueError, match=r"Pixels are invalid: got shape \(1, 3, 28, 28\)"):
        model.get_image_features(torch.zeros(1, 3, 28, 28))
    with pytest.raises(ValueError, match=r"Image 0 is invalid: got 'absent\.jpg'"):
        processor(images="absent.jpg")


@pytest.mark.slow
def test_towers_of_open_clip_load(tmp_path, pictures, no_warnings):
    pytest.importorskip("open_clip")
    folder = tmp_path / "clip"
    save_open_clip(folder)
    image, text = (
        ImageEncoderConfig(f"open_clip:{folder}").load(),
        TextEncoderConfig(f"open_clip:{folder}").load(),
    )
    run = save_run(tmp_path / "runs" / "towers", image.identity, text.identity)
    export(run, tmp_path / "hub")
    model, processor = load_pair(tmp_path / "hub", {"image_folder": folder, "text_folder": folder})
    wide = [Image.effect_mandelbrot((90, 61), (-3, -2.5, 2, 2.5), 100).convert("RGB"), *pictures]
    output = model(**processor(images=wide, text=TEXTS, padding=True, return_tensors="pt"))
    expected = sail_align.load(run, device="cpu")
    torch.testing.assert_close(output.image_embeds, expected.encode_image(wide), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.text_embeds, expected.encode_text(TEXTS), atol=1e-5, rtol=1e-5)
