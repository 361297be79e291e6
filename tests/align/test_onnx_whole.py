"""ONNX graphs of encoders with heads give the embeddings of `sail_align.load`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from released_file import save_encoders
from small_world import SHADES, draw, save_run
from tiny_models import save_image_processor, save_randomised, save_tokenizer
from transformers import AutoImageProcessor, ModernBertConfig, ModernBertModel, ViTConfig, ViTModel
from typer.testing import CliRunner

import sail_align
from sail_align.align.cli import app
from sail_align.align.hub import onnx_graph, onnx_whole
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.errors import UserError

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytestmark = pytest.mark.slow
IMAGES = [draw(seed, colour) for seed, colour in enumerate(SHADES.values())]
TEXTS = ["a dog", "the cat sleeps under a red bench and the green grass", "a", "a cat " * 60]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Save a run on encoders in folders."""
    monkeypatch.chdir(tmp_path)

    def run(image, text, *, image_pooling="cls+mean", text_pooling="mean", precision="float32", **shape):
        image = ImageEncoderConfig(f"hf:{image}", pooling=image_pooling, precision=precision).load()
        text = TextEncoderConfig(f"hf:{text}", pooling=text_pooling, precision=precision).load()
        return save_run(Path("runs/photos"), image.identity, text.identity, **shape)

    return run


def export(run, *words):
    return CliRunner().invoke(app, ["export", str(run), "--to", "onnx", "--whole", "--out", "onnx", *words])


def tokenize(texts):
    encoded = tokenizer().encode_batch(texts)
    arrays = {"input_ids": [each.ids for each in encoded], "attention_mask": [each.attention_mask for each in encoded]}
    return {name: np.array(rows) for name, rows in arrays.items()}


def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file("onnx/tokenizer.json")


def check(run, atol):
    model = sail_align.load(run, device="cpu").float()
    image_graph, text_graph = (onnxruntime.InferenceSession(f"onnx/{side}.onnx") for side in ("image", "text"))
    pixels = torch.stack([model.preprocess(image) for image in IMAGES])
    for batch in (pixels[:1], pixels):
        (found,) = image_graph.run(None, {"pixels": batch.numpy()})
        np.testing.assert_allclose(found, model.encode_image(batch), atol=atol)
    for texts in (TEXTS[:1], TEXTS[2:3], TEXTS):
        (found,) = text_graph.run(None, tokenize(texts))
        np.testing.assert_allclose(found, model.encode_text(texts), atol=atol)
    return model, image_graph


def test_graphs_and_readme_give_the_embeddings_of_the_model(make, tmp_path):
    run = make(*save_encoders(tmp_path / "encoders"))
    result = export(run)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "wrote onnx: image.onnx, text.onnx, tokenizer and README.md, within" in result.output
    model, image_graph = check(run, onnx_whole.TOLERANCE)
    for side, identity in (("image", model.run.image), ("text", model.run.text)):
        graph = onnx.load(f"onnx/{side}.onnx")
        onnx.checker.check_model(graph, full_check=True)
        about = {entry.key: entry.value for entry in graph.metadata_props}
        assert (about["run_digest"], about["encoder_fingerprint"]) == (model.run.digest, identity.spec.fingerprint)
        content = graph.SerializeToString()
        assert str(Path(onnx_whole.__file__).parent).encode() not in content
        assert str(tmp_path).encode() not in content
        assert b".py" not in content

    # transformers' image processor gives the pixels, with its axes in another order
    values = AutoImageProcessor.from_pretrained("onnx")(IMAGES, return_tensors="np")["pixel_values"]
    assert values.dtype == np.uint8
    (found,) = image_graph.run(None, {"pixels": values.transpose(0, 2, 3, 1)})
    np.testing.assert_allclose(found, model.encode_image(IMAGES), atol=1e-3)

    # the program in the README
    photo = Image.new("RGB", (90, 70), "red")
    photo.paste(IMAGES[2].resize((50, 40)), (20, 10))
    photo.save("onnx/photo.jpg", quality=95)
    (program,) = re.findall(r"```python\n(.*?)```", Path("onnx/README.md").read_text(), flags=re.S)
    ran = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['torch'] = None\n" + program],
        cwd="onnx",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    expected = model.similarity("onnx/photo.jpg", ["a cat", "a dog"])
    found = np.array(json.loads(re.sub(r"\s+", ",", ran.stdout.strip().replace("[ ", "[").replace(" ]", "]"))))
    np.testing.assert_allclose(found, expected, atol=2e-3)


def save_vit(folder):
    tiny = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 70, "patch_size": 14}
    save_randomised(ViTModel(ViTConfig(intermediate_size=48, **tiny)), folder)
    save_image_processor(folder)
    return folder


def save_modern_bert(folder):
    config = ModernBertConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,  # with global and with local attention
        num_attention_heads=4,
        local_attention=8,
        pad_token_id=0,
        max_position_embeddings=64,
    )
    save_randomised(ModernBertModel(config), folder)
    save_tokenizer(folder, padding_side="left")
    return folder


@pytest.mark.thorough
def test_interpolated_positions_rotary_texts_and_weights_in_a_second_file(make, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 1_000)
    image, text = save_vit(tmp_path / "vit"), save_modern_bert(tmp_path / "modern")
    run = make(image, text, image_pooling="mean", text_pooling="last", precision="bfloat16", head="linear")
    result = export(run)
    assert result.exit_code == 0, (result.output, result.exception)
    assert {path.name for path in Path("onnx").iterdir()} >= {"image.onnx.data", "text.onnx.data"}
    assert Path("onnx/image.onnx.data").stat().st_size > Path("onnx/image.onnx").stat().st_size / 10
    check(run, onnx_whole.TOLERANCE)


def test_differing_graph_is_not_written(make, tmp_path, monkeypatch):
    run = make(*save_encoders(tmp_path / "encoders"))
    monkeypatch.setattr(onnx_whole, "_write_image", lambda *_: float("nan"))
    monkeypatch.setattr(onnx_whole, "_write_text", lambda *_: 0.0)
    assert "differ from PyTorch's by nan; expected at most 0.0002" in str(export(run).exception)
    assert not Path("onnx").exists()


def test_bad_options_are_rejected(make, tmp_path, monkeypatch):
    run = make(*save_encoders(tmp_path / "encoders"))
    result = CliRunner().invoke(app, ["export", str(run), "--whole"])
    assert str(result.exception) == (
        "--whole has no effect with --to hub-folder, only with --to onnx. Leave one of them out."
    )
    text = TextEncoderConfig(f"hf:{tmp_path / 'encoders' / 'text'}", pooling="mean").load()
    text.tokenizer = len  # such as OpenCLIP's function
    with monkeypatch.context() as loading:
        loading.setattr(onnx_whole, "load_recorded", lambda _: text)
        assert "whose tokenizer cannot be written as tokenizer.json" in str(export(run).exception)
    Path("onnx").mkdir()
    Path("onnx/mine").touch()
    assert isinstance(export(run).exception, UserError)
    assert "onnx exists already" in str(export(run).exception)


def test_module_that_cannot_be_exported_is_an_error():
    class Branches(torch.nn.Module):
        def forward(self, features):
            return features if features.sum() > 0 else -features

    with pytest.raises(UserError, match=r"PyTorch cannot export this model to ONNX .*Leave out --whole"):
        onnx_graph.export_graph(Branches(), {"features": torch.ones(2, 3)}, {"features": {}}, {})
