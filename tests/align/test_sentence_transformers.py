"""sentence-transformers loads an exported run, and its embeddings are those of `sail_align.load`."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from released_file import save_encoders
from small_world import SHADES, draw, save_run
from tiny_models import save_image_processor, save_randomised
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTConfig, ViTModel
from typer.testing import CliRunner

import sail_align
from sail_align.align.cli import app
from sail_align.align.hub import sentence_transformers as exporting
from sail_align.align.runs.checkpoint import load_run
from sail_align.extract.encoders.catalogue import TransformersText
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig

library = pytest.importorskip("sentence_transformers", reason="the extra sentence-transformers is not installed")
pytestmark = pytest.mark.slow
IMAGES = [draw(seed, colour) for seed, colour in enumerate(SHADES.values())]
TEXTS = ["a dog", "the cat sleeps under a red bench and the green grass", "a", "a cat " * 60]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture
def export(encoders, tmp_path, monkeypatch):
    """Save a run on tiny encoders and export it; return the run and the folder."""
    monkeypatch.chdir(tmp_path)

    def make(image=encoders[0], *, image_pooling="cls+mean", text_pooling="mean", precision="float32", **shape):
        image = ImageEncoderConfig(f"hf:{image}", pooling=image_pooling, precision=precision).load()
        text = TextEncoderConfig(f"hf:{encoders[1]}", pooling=text_pooling).load()
        run = save_run(Path("runs/photos"), image.identity, text.identity, **shape)
        result = CliRunner().invoke(app, ["export", str(run), "--to", "sentence-transformers", "--out", "st"])
        assert result.exit_code == 0, (result.output, result.exception)
        return run, result.output

    return make


def check(run, model, atol, **options):
    ours = sail_align.load(run, device="cpu")
    mixed = [IMAGES[0], TEXTS[0], IMAGES[1], TEXTS[1], TEXTS[2]]
    np.testing.assert_allclose(model.encode(IMAGES), ours.encode_image(IMAGES), atol=atol)
    np.testing.assert_allclose(model.encode(TEXTS), ours.encode_text(TEXTS), atol=atol)
    image_NE, text_NE = ours.encode_image(IMAGES[:2]), ours.encode_text(TEXTS[:3])
    expected = np.stack([image_NE[0], text_NE[0], image_NE[1], text_NE[1], text_NE[2]])
    np.testing.assert_allclose(model.encode(mixed, **options), expected, atol=atol)
    np.testing.assert_allclose(model.encode_query(TEXTS), ours.encode_text(TEXTS), atol=atol)
    np.testing.assert_allclose(model.encode_document(IMAGES), ours.encode_image(IMAGES), atol=atol)
    assert model.get_embedding_dimension() == ours.dim
    np.testing.assert_allclose(
        model.similarity(model.encode(IMAGES), model.encode(TEXTS)), ours.similarity(IMAGES, TEXTS), atol=2 * atol
    )


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize(("image_pooling", "text_pooling"), [("cls", "last"), ("mean", "cls"), ("cls+mean", "mean")])
def test_native_modules(export, head, image_pooling, text_pooling):
    run, output = export(image_pooling=image_pooling, text_pooling=text_pooling, head=head)
    assert "wrote st: modules of sentence-transformers alone, within" in output
    check(run, library.SentenceTransformer("st", device="cpu"), exporting.TOLERANCE, batch_size=1)
    types = {each["type"] for each in json.loads(Path("st/modules.json").read_bytes())}
    types |= set(json.loads(Path("st/router_config.json").read_bytes())["types"].values())
    assert all(each.startswith("sentence_transformers.") for each in types)
    assert not [path for path in Path("st").rglob("*") if path.suffix in (".py", ".bin", ".pt", ".pkl")]


def test_native_folder_works_without_sail_align(export):
    run, _ = export(head="linear", linear_path=True)
    IMAGES[0].save("photo.png")
    code = (
        "import sys; sys.modules['sail_align'] = None\n"
        "import numpy; from PIL import Image; from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer('st', device='cpu')\n"
        "numpy.save('found.npy', numpy.stack([model.encode(Image.open('photo.png')), model.encode('a dog')]))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    ours = sail_align.load(run, device="cpu")
    expected = np.concatenate([ours.encode_image(IMAGES[0]), ours.encode_text("a dog")])
    np.testing.assert_allclose(np.load("found.npy"), expected, atol=exporting.TOLERANCE)


def test_prefix_is_put_before_texts_alone(export, encoders, monkeypatch):
    entry = TransformersText(encoders[1], pooling="mean", prefix="query : ", token_limit=12)
    text = TextEncoderConfig(f"hf:{encoders[1]}", pooling="mean").load(entry=entry)
    image = ImageEncoderConfig(f"hf:{encoders[0]}", pooling="cls").load()
    monkeypatch.setattr(exporting, "load_recorded", lambda identity: image if identity is run.image else text)
    run = load_run(save_run(Path("runs/e5"), image.identity, text.identity, head="linear"))
    assert not exporting.write_sentence_transformers(run, Path("st"), lambda usage: usage).not_native
    model = library.SentenceTransformer("st", device="cpu")
    with torch.no_grad():
        expected = run.model.encode_text(text.encode(TEXTS).half())
        pixels = run.model.encode_image(image.encode(torch.stack([image.preprocess(each) for each in IMAGES])).half())
    for encode in (model.encode, model.encode_query, model.encode_document):
        np.testing.assert_allclose(encode(TEXTS), expected, atol=exporting.TOLERANCE)
        np.testing.assert_allclose(encode(IMAGES), pixels, atol=exporting.TOLERANCE)
    assert np.abs(model.encode(TEXTS, prompt="") - expected.numpy()).max() > 0.01


def save_registers(folder):
    tiny = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 70, "patch_size": 14}
    save_randomised(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=2, **tiny)), folder)
    save_image_processor(folder)


def save_vit(folder):
    tiny = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 70, "patch_size": 14}
    save_randomised(ViTModel(ViTConfig(intermediate_size=48, **tiny)), folder)
    save_image_processor(folder)


@pytest.mark.parametrize(
    ("save", "options", "reason"),
    [
        (None, {"head": "glu"}, "the heads are GLUs"),
        (None, {"head": "mlp", "linear_path": True}, "the heads have a linear path"),
        (None, {"head": "linear", "image_power": 0.5}, "the image head takes powers of its input"),
        (None, {"head": "linear", "precision": "bfloat16"}, "the image encoder runs in bfloat16"),
        (save_registers, {"head": "linear"}, "the image encoder has registers, which are not part of its mean"),
        (save_vit, {"head": "linear"}, "the image encoder interpolates its positions"),
    ],
    ids=["glu", "linear path", "power", "bfloat16", "registers", "interpolated"],
)
def test_module_of_ours_for_the_rest(export, encoders, tmp_path, save, options, reason):
    if save:
        save(tmp_path / "image")
    run, output = export(tmp_path / "image" if save else encoders[0], **options)
    assert f"wrote st: with a module of sail-align, because {reason}\n" in output
    assert not list(Path("st").rglob("*.py"))
    model = library.SentenceTransformer("st", device="cpu", trust_remote_code=True)
    check(run, model, 1e-5 if options.get("precision") is None else 2e-2)
    if save or options["head"] != "glu":
        return
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        library.SentenceTransformer("st")
    module = importlib.import_module("sail_align.sentence_transformers")
    check(run, module.load("st", device="cpu"), 1e-5)
    assert sail_align.load("st", image_folder="st/image_encoder", text_folder="st/text_encoder").dim == 16
    model.save_pretrained("again", create_model_card=False)
    check(run, library.SentenceTransformer("again", device="cpu", trust_remote_code=True), 1e-5)
    with pytest.raises(ValueError, match="expected a text or an image"):
        model.encode([{"role": "user", "content": "a cat"}])
    Path("broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="Image 0 cannot be used"):
        model.encode("broken.png")
    assert (model.max_seq_length, model.modalities) == (64, ["text", "image", "message"])
    assert model.tokenizer.pad_token == "[PAD]"


def test_registers_are_native_with_the_class_token(export, tmp_path):
    save_registers(tmp_path / "image")
    run, output = export(tmp_path / "image", image_pooling="cls", head="linear")
    assert "modules of sentence-transformers alone" in output
    check(run, library.SentenceTransformer("st", device="cpu"), exporting.TOLERANCE, batch_size=1)


def test_folder_that_differs_is_not_written(export, monkeypatch):
    monkeypatch.setattr(exporting, "_difference", lambda *_: 0.01)
    with pytest.raises(AssertionError, match=r"embeddings differ from ours by 0\.01; expected at most 0\.002"):
        export(head="linear")
    assert [path.name for path in Path().iterdir()] == ["runs"]


def test_missing_library_names_the_extra(export, monkeypatch):
    def import_module(name, *package):
        if name == "sentence_transformers":
            raise ImportError(name)
        return imported(name, *package)

    imported = importlib.import_module

    monkeypatch.setattr("importlib.import_module", import_module)
    with pytest.raises(AssertionError, match=r"pip install 'sail-align\[sentence-transformers\]'"):
        export()
