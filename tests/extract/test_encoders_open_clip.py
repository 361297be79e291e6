"""Towers of OpenCLIP models, against open_clip's own transform, tokenizer and forward pass on small random weights."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import normalised, random_pixels

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

from tiny_open_clip import CLIP, SIGLIP, SIGLIP_PREPROCESSING, save_open_clip  # noqa: E402

from sail_align.extract.encoders import open_clip_models  # noqa: E402
from sail_align.extract.encoders.identity import EncoderChangedError, Identity  # noqa: E402
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig, load_recorded  # noqa: E402
from sail_align.extract.errors import UserError  # noqa: E402

TEXTS = ["a red cat on the grass", "the dog", "the red cat sleeps on the green bench and a dog runs on the grass " * 3]
MODELS = {"clip": (CLIP, {}), "siglip": (SIGLIP, SIGLIP_PREPROCESSING)}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    return save_open_clip(tmp_path / "model", *MODELS[request.param]), tmp_path / "model"


@pytest.fixture
def photos():
    rng = np.random.default_rng(0)
    sizes = ((203, 177), (75, 108), (64, 64))  # margins of the crop that are odd, and even
    noise = [Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(noise, sizes, strict=True)]


@pytest.mark.slow
def test_towers_agree_with_the_model(saved, photos):
    model, folder = saved
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    image, text = ImageEncoderConfig(f"open_clip:{folder}").load(), TextEncoderConfig(f"open_clip:{folder}").load()
    with torch.no_grad():
        images_BE = model.encode_image(torch.stack([transform(photo) for photo in photos]))
        texts_BE = model.encode_text(tokenizer(TEXTS, context_length=16))
    found_BE = image.encode(torch.stack([image.preprocess(photo) for photo in photos]))
    torch.testing.assert_close(found_BE, images_BE, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(text.encode(TEXTS), texts_BE, rtol=1e-4, atol=1e-4)
    assert torch.equal(text.encode_tokens(text.tokenize(TEXTS)), text.encode(TEXTS))
    assert image.identity.spec.dim == text.identity.spec.dim == images_BE.shape[1]


def test_texts_are_encoded_in_batches_and_counted(saved, monkeypatch):
    _, folder = saved
    text = TextEncoderConfig(f"open_clip:{folder}").load()
    assert "batch_size" not in vars(text)  # not searched for the golden vectors
    expected_BE = text.encode(TEXTS)
    monkeypatch.setitem(text.__dict__, "batch_size", 2)
    done = []
    torch.testing.assert_close(text.encode(TEXTS, done.append), expected_BE, rtol=1e-4, atol=1e-4)
    assert done == [2, 1]


@pytest.mark.slow
def test_recorded_towers_are_loaded_and_changed_ones_rejected(saved):
    _, folder = saved
    for config in (ImageEncoderConfig, TextEncoderConfig):
        identity = config(f"open_clip:{folder}").load().identity
        again = load_recorded(Identity.from_json(json.loads(json.dumps(identity.to_json()))))
        assert again.identity == identity
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(EncoderChangedError):
        load_recorded(identity)


def test_dense_features_match_an_explicit_forward_pass(tmp_path):
    """The last norm and the projection apply to every token."""
    model = save_open_clip(tmp_path / "model")
    encoder = ImageEncoderConfig(f"open_clip:{tmp_path / 'model'}").load()
    pixels_BHWC = random_pixels(2, 32, 32)
    normalised_BCHW = normalised(pixels_BHWC, encoder._normalisation.mean, encoder._normalisation.std)
    visual = model.visual
    with torch.no_grad():
        x = visual.conv1(normalised_BCHW).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(2, 1, -1), x], dim=1) + visual.positional_embedding
        expected_BTE = visual.ln_post(visual.transformer(visual.ln_pre(x))) @ visual.proj
    torch.testing.assert_close(encoder.encode(pixels_BHWC), expected_BTE[:, 0], rtol=1e-4, atol=1e-4)
    patches_BhwE = encoder.encode_dense(pixels_BHWC)
    torch.testing.assert_close(patches_BhwE.flatten(1, 2), expected_BTE[:, 1:], rtol=1e-4, atol=1e-4)


def test_without_last_attention_a_patch_is_its_projected_value(tmp_path):
    """Compute MaskCLIP's last block from the tokens before it; the class token does not change."""
    model = save_open_clip(tmp_path / "model")
    encoder = ImageEncoderConfig(f"open_clip:{tmp_path / 'model'}").load()
    pixels_BHWC = random_pixels(2, 32, 32)
    normalised_BCHW = normalised(pixels_BHWC, encoder._normalisation.mean, encoder._normalisation.std)
    block, before = model.visual.transformer.resblocks[-1], []
    block.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    with torch.no_grad():
        model.visual(normalised_BCHW)
        x_BTD, value = before[0][:, 1:], slice(2 * 32, None)
        values_BTD = block.ln_1(x_BTD) @ block.attn.in_proj_weight[value].T + block.attn.in_proj_bias[value]
        x_BTD = x_BTD + values_BTD @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        expected_BTE = model.visual.ln_post(x_BTD + block.mlp(block.ln_2(x_BTD))) @ model.visual.proj
    plain = encoder.encode(pixels_BHWC), encoder.encode_dense(pixels_BHWC)
    patches_BhwE = encoder.encode_dense(pixels_BHWC, last_attention=False)
    torch.testing.assert_close(patches_BhwE.flatten(1, 2), expected_BTE, rtol=1e-4, atol=1e-4)
    assert (patches_BhwE - plain[1]).abs().mean() > 0.01
    assert torch.equal(encoder.encode(pixels_BHWC), plain[0])
    assert torch.equal(encoder.encode_dense(pixels_BHWC), plain[1])  # no hook is left in the network


def test_attention_with_norms_cannot_be_skipped(tmp_path):
    config = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "qk_norm": True}}
    save_open_clip(tmp_path / "model", config)
    encoder = ImageEncoderConfig(f"open_clip:{tmp_path / 'model'}").load()
    assert encoder.encode_dense(random_pixels(1, 32, 32)).shape == (1, 4, 4, 24)
    with pytest.raises(UserError, match="has no last attention that its patches could skip"):
        encoder.encode_dense(random_pixels(1, 32, 32), last_attention=False)


def test_positions_are_interpolated_for_other_sizes(tmp_path):
    save_open_clip(tmp_path / "model")
    encoder = ImageEncoderConfig(f"open_clip:{tmp_path / 'model'}").load()
    positions_TD = encoder.network.visual.positional_embedding
    assert encoder.encode_dense(random_pixels(1, 64, 40)).shape == (1, 8, 5, 24)
    grid_TD = encoder.network._positions((8, 5))[1:]
    for channel in range(3):
        own_1hw = positions_TD[1:, channel].reshape(1, 1, 4, 4)
        expected = F.interpolate(own_1hw, (8, 5), mode="bicubic", antialias=True)
        torch.testing.assert_close(grid_TD[:, channel], expected.flatten())
    assert encoder.network.visual.positional_embedding is positions_TD


def test_tower_without_patch_embeddings_rejects_dense_features(tmp_path):
    save_open_clip(tmp_path / "model", SIGLIP, SIGLIP_PREPROCESSING)
    encoder = ImageEncoderConfig(f"open_clip:{tmp_path / 'model'}").load()
    for last_attention in (True, False):
        with pytest.raises(UserError, match="gives a single one no embedding"):
            encoder.encode_dense(random_pixels(1, 160, 160), last_attention=last_attention)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-L-14", "neither an existing folder nor a model with weights"),
        ("open_clip:ViT-L@openai", r"has no model 'ViT-L'. Did you mean ViT-L-1"),
        ("open_clip:ViT-L-14@laion", "has no weights 'laion' for ViT-L-14. Choose one of: openai, "),
        (
            "open_clip:ViT-B-32@openai",
            "another activation than ViT-B-32 has. Use open_clip:ViT-B-32-quickgelu@openai",
        ),
        ("open_clip:{folder}", "is not the folder of an OpenCLIP model"),
    ],
)
def test_invalid_model_is_rejected(tmp_path, name, message):
    for config in (ImageEncoderConfig, TextEncoderConfig):
        with pytest.raises(UserError, match=message):
            config(name.format(folder=tmp_path)).load()


def test_incomplete_weights_and_other_poolings_are_rejected(tmp_path):
    save_open_clip(tmp_path / "model")
    with pytest.raises(UserError, match=r"has no pooling 'mean'. Choose one of: cls"):
        ImageEncoderConfig(f"open_clip:{tmp_path / 'model'}", pooling="mean").load()
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["visual.proj"]
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"cannot load local-dir.*visual\.proj"):
        ImageEncoderConfig(f"open_clip:{tmp_path / 'model'}").load()


def test_missing_open_clip_is_reported_with_what_to_install(tmp_path, monkeypatch):
    def import_module(name):
        raise ImportError(name)

    monkeypatch.setattr(open_clip_models.importlib, "import_module", import_module)
    with pytest.raises(UserError, match=r"pip install 'sail-align\[eval\]'"):
        ImageEncoderConfig("open_clip:ViT-L-14@openai").load()
