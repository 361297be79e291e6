"""Towers of OpenCLIP models against open_clip's own transform, tokenizer and forward pass, on small random weights."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import random_pixels

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

from tiny_open_clip import CLIP, SIGLIP, SIGLIP_PREPROCESSING, save_open_clip  # noqa: E402

from sail_align.extract.encoders import open_clip_models as open_clip_model  # noqa: E402
from sail_align.extract.encoders.base import EncoderChangedError, Identity  # noqa: E402
from sail_align.extract.encoders.load import load_image_encoder, load_recorded, load_text_encoder  # noqa: E402
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


def test_towers_give_what_the_model_itself_gives(saved, photos):
    model, folder = saved
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    image, text = load_image_encoder(f"open_clip:{folder}"), load_text_encoder(f"open_clip:{folder}")
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
    text = load_text_encoder(f"open_clip:{folder}")
    expected_BE = text.encode(TEXTS)
    monkeypatch.setitem(text.__dict__, "batch_size", 2)
    done = []
    torch.testing.assert_close(text.encode(TEXTS, done.append), expected_BE, rtol=1e-4, atol=1e-4)
    assert done == [2, 1]


def test_an_identity_finds_its_towers_again_and_no_others(saved):
    _, folder = saved
    for load in (load_image_encoder, load_text_encoder):
        identity = load(f"open_clip:{folder}").identity
        again = load_recorded(Identity.from_json(json.loads(json.dumps(identity.to_json()))))
        assert again.identity == identity
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(EncoderChangedError):
        load_recorded(identity)


def test_patches_go_the_way_of_the_class_token(tmp_path):
    """By a forward pass written out: the last norm and the projection, on every token."""
    model = save_open_clip(tmp_path / "model")
    encoder = load_image_encoder(f"open_clip:{tmp_path / 'model'}")
    pixels_BHWC = random_pixels(2, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder._how.mean, encoder._how.std))
    visual = model.visual
    with torch.no_grad():
        x = visual.conv1((pixels_BHWC.permute(0, 3, 1, 2) / 255 - mean) / std).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(2, 1, -1), x], dim=1) + visual.positional_embedding
        expected_BTE = visual.ln_post(visual.transformer(visual.ln_pre(x))) @ visual.proj
    torch.testing.assert_close(encoder.encode(pixels_BHWC), expected_BTE[:, 0], rtol=1e-4, atol=1e-4)
    patches_BhwE = encoder.encode_dense(pixels_BHWC)
    torch.testing.assert_close(patches_BhwE.flatten(1, 2), expected_BTE[:, 1:], rtol=1e-4, atol=1e-4)


def test_without_the_last_attention_a_patch_is_its_own_value(tmp_path):
    """MaskCLIP's last block, written out on the tokens before it; the class token goes its way."""
    model = save_open_clip(tmp_path / "model")
    encoder = load_image_encoder(f"open_clip:{tmp_path / 'model'}")
    pixels_BHWC = random_pixels(2, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder._how.mean, encoder._how.std))
    block, before = model.visual.transformer.resblocks[-1], []
    block.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    with torch.no_grad():
        model.visual((pixels_BHWC.permute(0, 3, 1, 2) / 255 - mean) / std)
        x_BTD, value = before[0][:, 1:], slice(2 * 32, None)
        values_BTD = block.ln_1(x_BTD) @ block.attn.in_proj_weight[value].T + block.attn.in_proj_bias[value]
        x_BTD = x_BTD + values_BTD @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        expected_BTE = model.visual.ln_post(x_BTD + block.mlp(block.ln_2(x_BTD))) @ model.visual.proj
    plain = encoder.encode(pixels_BHWC), encoder.encode_dense(pixels_BHWC)
    patches_BhwE = encoder.encode_dense(pixels_BHWC, last_attention=False)
    torch.testing.assert_close(patches_BhwE.flatten(1, 2), expected_BTE, rtol=1e-4, atol=1e-4)
    assert (patches_BhwE - plain[1]).abs().mean() > 0.01
    assert torch.equal(encoder.encode(pixels_BHWC), plain[0])
    assert torch.equal(encoder.encode_dense(pixels_BHWC), plain[1])  # nothing stays behind in the network


def test_an_attention_with_norms_of_its_own_has_no_such_path(tmp_path):
    config = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "qk_norm": True}}
    save_open_clip(tmp_path / "model", config)
    encoder = load_image_encoder(f"open_clip:{tmp_path / 'model'}")
    assert encoder.encode_dense(random_pixels(1, 32, 32)).shape == (1, 4, 4, 24)
    with pytest.raises(UserError, match="has no last attention that its patches could skip"):
        encoder.encode_dense(random_pixels(1, 32, 32), last_attention=False)


def test_other_sizes_have_their_positions_interpolated(tmp_path):
    save_open_clip(tmp_path / "model")
    encoder = load_image_encoder(f"open_clip:{tmp_path / 'model'}")
    positions_TD = encoder._backbone.visual.positional_embedding
    assert encoder.encode_dense(random_pixels(1, 64, 40)).shape == (1, 8, 5, 24)
    grid_TD = encoder._backbone._positions((8, 5))[1:]
    for channel in range(3):
        own_1hw = positions_TD[1:, channel].reshape(1, 1, 4, 4)
        expected = F.interpolate(own_1hw, (8, 5), mode="bicubic", antialias=True)
        torch.testing.assert_close(grid_TD[:, channel], expected.flatten())
    assert encoder._backbone.visual.positional_embedding is positions_TD


def test_a_tower_whose_patches_have_no_embedding_says_so(tmp_path):
    save_open_clip(tmp_path / "model", SIGLIP, SIGLIP_PREPROCESSING)
    encoder = load_image_encoder(f"open_clip:{tmp_path / 'model'}")
    for last_attention in (True, False):
        with pytest.raises(UserError, match="gives a single one no embedding"):
            encoder.encode_dense(random_pixels(1, 160, 160), last_attention=last_attention)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("open_clip:ViT-L-14", "is neither a folder that exists nor a model with weights"),
        ("open_clip:ViT-L@openai", r"has no model 'ViT-L'; did you mean ViT-L-1"),
        ("open_clip:ViT-L-14@laion", "has no weights 'laion' of ViT-L-14; there are: openai, "),
        (
            "open_clip:ViT-B-32@openai",
            "another activation than ViT-B-32 has; write open_clip:ViT-B-32-quickgelu@openai",
        ),
        ("open_clip:{folder}", "is no folder of an OpenCLIP model"),
    ],
)
def test_what_is_no_model_is_refused_in_a_sentence(tmp_path, name, sentence):
    for load in (load_image_encoder, load_text_encoder):
        with pytest.raises(UserError, match=sentence):
            load(name.format(folder=tmp_path))


def test_weights_that_do_not_fit_or_pool_otherwise_are_refused(tmp_path):
    save_open_clip(tmp_path / "model")
    with pytest.raises(UserError, match="pools as it was trained to, which is called 'cls' here, not 'mean'"):
        load_image_encoder(f"open_clip:{tmp_path / 'model'}", pooling="mean")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["visual.proj"]
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"cannot load local-dir.*visual\.proj"):
        load_image_encoder(f"open_clip:{tmp_path / 'model'}")


def test_without_open_clip_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    def import_module(name):
        raise ImportError(name)

    monkeypatch.setattr(open_clip_model.importlib, "import_module", import_module)
    with pytest.raises(UserError, match=r"pip install 'sail-align\[eval\]'"):
        load_image_encoder("open_clip:ViT-L-14@openai")
