"""Image encoders, against the forward pass of transformers and timm on small models with random weights."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_models import normalised, random_pixels, save_image_processor, save_randomised
from transformers import (
    BitImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTModel,
)

from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.load import ImageEncoderConfig, load_recorded
from sail_align.extract.encoders.maskclip import skip_last_attention
from sail_align.extract.encoders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Normalisation
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY, image_size=70, patch_size=14)),
    "dinov2-reg": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**TINY, image_size=70, patch_size=14, num_register_tokens=3)
    ),
    "dinov3": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**TINY, intermediate_size=64, image_size=56, patch_size=14, num_register_tokens=4)
    ),
    "vit": lambda: ViTModel(ViTConfig(**TINY, intermediate_size=64, image_size=56, patch_size=14)),
}
REGISTERS = {"dinov2": 0, "dinov2-reg": 3, "dinov3": 4, "vit": 0}


@pytest.fixture
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return coarse.resize((101, 77), Image.Resampling.BICUBIC)


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    model = save_randomised(MODELS[request.param](), tmp_path)
    save_image_processor(tmp_path)
    return request.param, model, tmp_path


def reference_tokens(kind, model, pixels):
    """Return the class token and the patches by position; registers are between them."""
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.inference_mode():
        tokens = model(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD), **options).last_hidden_state
    return tokens[:, 0], tokens[:, 1 + REGISTERS[kind] :]


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_features_agree_with_the_model(saved, pooling):
    kind, model, folder = saved
    encoder = ImageEncoderConfig(f"hf:{folder}", pooling=pooling).load()
    pixels = random_pixels(3, 56, 56, seed=1)
    cls_BD, patches_BND = reference_tokens(kind, model, pixels)
    expected = {"cls": cls_BD, "mean": patches_BND.mean(1), "cls+mean": torch.cat([cls_BD, patches_BND.mean(1)], 1)}
    torch.testing.assert_close(encoder.encode(pixels), expected[pooling], rtol=1e-5, atol=1e-5)
    assert encoder.identity.spec.dim == expected[pooling].shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(56, 56), (28, 84), (98, 56)])
def test_dense_features_pair_the_class_token_with_each_patch(saved, size):
    kind, model, folder = saved
    encoder = ImageEncoderConfig(f"hf:{folder}", pooling="cls+mean").load()
    pixels = random_pixels(2, *size, seed=2)
    cls_BD, patches_BND = reference_tokens(kind, model, pixels)
    dense = encoder.encode_dense(pixels)
    height, width = size[0] // 14, size[1] // 14
    assert dense.shape == (2, height, width, 64)
    for row in range(height):
        for column in range(width):
            expected = torch.cat([cls_BD, patches_BND[:, row * width + column]], dim=1)
            torch.testing.assert_close(dense[:, row, column], expected, rtol=1e-5, atol=1e-5)


def test_preprocessing_agrees_with_the_published_processor(saved, photo):
    _, _, folder = saved
    encoder = ImageEncoderConfig(f"hf:{folder}", pooling="cls").load()
    published = BitImageProcessor.from_pretrained(folder)(photo, return_tensors="pt")["pixel_values"]
    ours = normalised(encoder.preprocess(photo)[None], IMAGENET_MEAN, IMAGENET_STD)
    assert ours.shape == published.shape
    assert (ours - published).abs().mean() < 0.01  # it resizes tensors instead of images, so rounding differs


def test_centre_crop(saved):
    _, _, folder = saved
    encoder = ImageEncoderConfig(f"hf:{folder}", pooling="cls").load()
    pixels = random_pixels(64, 64)
    assert torch.equal(encoder.preprocess(Image.fromarray(pixels.numpy())), pixels[4:60, 4:60])
    assert encoder.size == 56


def test_images_are_padded_to_a_multiple_of_the_stride(saved):
    kind, model, folder = saved
    encoder = ImageEncoderConfig(f"hf:{folder}", pooling="mean").load()
    pixels = random_pixels(1, 59, 56)
    padded = F.pad(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD), (0, 0, 5, 6))
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.inference_mode():
        tokens = model(padded, **options).last_hidden_state[:, 1 + REGISTERS[kind] :]
    torch.testing.assert_close(encoder.encode_dense(pixels).flatten(1, 2), tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_dense_features_with_another_normalisation(saved):
    _, _, folder = saved
    encoder = ImageEncoderConfig(f"hf:{folder}", pooling="mean").load()
    pixels, other = random_pixels(1, 56, 56), Normalisation(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    save_image_processor(folder, image_mean=other.mean, image_std=other.std)
    with_other = ImageEncoderConfig(f"hf:{folder}", pooling="mean").load()
    assert torch.equal(encoder.encode_dense(pixels, normalisation=other), with_other.encode_dense(pixels))
    assert not torch.equal(encoder.encode_dense(pixels), with_other.encode_dense(pixels))


def test_without_last_attention_patches_change_and_the_class_token_does_not(saved):
    encoder = ImageEncoderConfig(f"hf:{saved[2]}", pooling="cls+mean").load()
    pixels = random_pixels(2, 56, 70, seed=4)
    plain, values = encoder.encode_dense(pixels), encoder.encode_dense(pixels, last_attention=False)
    torch.testing.assert_close(plain[..., :32], values[..., :32])
    assert (plain[..., 32:] - values[..., 32:]).abs().mean() > 0.01
    assert torch.equal(encoder.encode_dense(pixels), plain)  # no hook is left in the network


@pytest.mark.parametrize("kind", ["dinov2", "dinov2-reg"])
def test_without_last_attention_a_patch_is_its_projected_value(kind, tmp_path):
    """Compute MaskCLIP's last block from the hidden state before it."""
    model = save_randomised(MODELS[kind](), tmp_path)
    save_image_processor(tmp_path)
    pixels = random_pixels(2, 56, 70, seed=5)
    block = model.encoder.layer[-1]
    with torch.inference_mode():
        before = []
        block.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
        model(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD))
        x_BTD = before[0][:, 1 + REGISTERS[kind] :]
        x_BTD = x_BTD + block.layer_scale1(block.attention.o_proj(block.attention.v_proj(block.norm1(x_BTD))))
        x_BTD = model.layernorm(x_BTD + block.layer_scale2(block.mlp(block.norm2(x_BTD))))
    dense = ImageEncoderConfig(f"hf:{tmp_path}", pooling="mean").load().encode_dense(pixels, last_attention=False)
    torch.testing.assert_close(dense.flatten(1, 2), x_BTD, rtol=1e-4, atol=1e-4)


def test_without_last_attention_of_clip(tmp_path):
    """The last norm of transformers' CLIP applies only to the class token."""
    config = CLIPVisionConfig(**TINY, intermediate_size=64, image_size=56, patch_size=14)
    model = save_randomised(CLIPVisionModel(config), tmp_path)
    save_image_processor(tmp_path)
    pixels, before = random_pixels(2, 56, 56, seed=5), []
    block = next(module for name, module in model.named_modules() if name.endswith("layers.1"))
    block.register_forward_pre_hook(
        lambda _, inputs, named: before.append((*inputs, *named.values())[0]), with_kwargs=True
    )
    with torch.inference_mode():
        model(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD))
        x_BTD = before[0][:, 1:]
        x_BTD = x_BTD + block.self_attn.out_proj(block.self_attn.v_proj(block.layer_norm1(x_BTD)))
        x_BTD = x_BTD + block.mlp(block.layer_norm2(x_BTD))
    dense = ImageEncoderConfig(f"hf:{tmp_path}", pooling="mean").load().encode_dense(pixels, last_attention=False)
    torch.testing.assert_close(dense.flatten(1, 2), x_BTD, rtol=1e-4, atol=1e-4)


def test_network_without_attention_cannot_skip_it(tmp_path):
    config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=64)
    save_randomised(ConvNextModel(config), tmp_path)
    save_image_processor(tmp_path, crop_size={"height": 64, "width": 64})
    encoder = ImageEncoderConfig(f"hf:{tmp_path}").load()
    with pytest.raises(UserError, match="has no last attention that its patches could skip"):
        encoder.encode_dense(random_pixels(1, 64, 64), last_attention=False)


def test_windowed_attention_cannot_be_skipped(tmp_path):
    """Swin's last block attends within windows, so its output is not one row of patches."""
    backbone = timm.create_model("swin_tiny_patch4_window7_224", img_size=448, embed_dim=24, depths=(1, 1, 1, 2)).eval()
    with pytest.raises(UserError, match="has no last attention"), skip_last_attention(backbone, 14 * 14):
        backbone.forward_features(torch.zeros(1, 3, 448, 448))


def test_dense_features_of_a_convolutional_network(tmp_path):
    config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=64)
    model = save_randomised(ConvNextModel(config), tmp_path)
    save_image_processor(tmp_path, crop_size={"height": 64, "width": 64})
    encoder = ImageEncoderConfig(f"hf:{tmp_path}").load()
    pixels = random_pixels(2, 64, 96)
    with torch.inference_mode():
        map_BDhw = model(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state
    torch.testing.assert_close(encoder.encode_dense(pixels), map_BDhw.permute(0, 2, 3, 1))
    torch.testing.assert_close(encoder.encode(pixels), map_BDhw.mean((2, 3)))
    assert encoder.stride == 32


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("vit_tiny_patch16_224", "cls+mean"), ("vit_base_patch16_siglip_224", None), ("test_byobnet", None)],
)
def test_timm_models_give_their_reference_tokens(name, pooling, tmp_path, monkeypatch):
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3} if name.startswith("vit") else {}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **small, **options))
    model = timm.create_model(name).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fetched = EncoderFiles(tmp_path, {"loader": "hub", "repository": "timm/x", "revision": "0" * 40}, "1")
    monkeypatch.setattr(EncoderFiles, "fetch", lambda origin: fetched)
    encoder = ImageEncoderConfig(f"timm:{name}", pooling=pooling).load()

    config = model.pretrained_cfg
    side = config["input_size"][1]
    pixels = random_pixels(2, side, side, seed=3)
    with torch.inference_mode():
        features = model.forward_features(normalised(pixels, config["mean"], config["std"]))
    if features.ndim == 4:
        cls_BD, patches_BND = None, features.flatten(2).transpose(1, 2)
    else:
        prefix = model.num_prefix_tokens
        cls_BD, patches_BND = (features[:, 0] if prefix else None), features[:, prefix:]
    mean_BD = patches_BND.mean(1)
    expected = mean_BD if pooling is None else torch.cat([cls_BD, mean_BD], dim=1)
    torch.testing.assert_close(encoder.encode(pixels), expected, rtol=1e-4, atol=1e-5)
    wide = encoder.encode_dense(random_pixels(1, 2 * encoder.stride, 3 * encoder.stride))
    assert wide.shape == (1, 2, 3, encoder.identity.spec.dim)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_changes_the_identity(saved, precision):
    _, _, folder = saved
    exact = ImageEncoderConfig(f"hf:{folder}", pooling="cls").load()
    half = ImageEncoderConfig(f"hf:{folder}", pooling="cls", precision=precision).load()
    pixels = random_pixels(2, 56, 56, seed=4)
    assert half.encode(pixels).dtype == torch.float32
    assert torch.cosine_similarity(exact.encode(pixels), half.encode(pixels)).min() > 0.99
    assert half.identity.spec.fingerprint != exact.identity.spec.fingerprint


def test_spec_of_a_local_folder_does_not_depend_on_its_path(saved, tmp_path):
    _, _, folder = saved
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in folder.glob("*.*"):
        (moved / file.name).write_bytes(file.read_bytes())
    here, there = (ImageEncoderConfig(f"hf:{path}", pooling="cls").load().identity for path in (folder, moved))
    assert here.spec == there.spec
    assert here.location != there.location


@pytest.mark.slow
def test_recorded_encoder_is_loaded_and_a_changed_one_rejected(saved):
    _, _, folder = saved
    identity = ImageEncoderConfig(f"hf:{folder}", pooling="cls+mean").load().identity
    recorded = Identity.from_json(json.loads(json.dumps(identity.to_json())))
    assert load_recorded(recorded).identity == identity

    forged = Identity(recorded.spec, [-value for value in recorded.golden], recorded.versions, recorded.location)
    with pytest.raises(UserError, match="features of a fixed input have a cosine of"):
        load_recorded(forged)

    save_image_processor(folder, size={"shortest_edge": 56})
    with pytest.raises(UserError, match="was made with preprocessing"):
        load_recorded(recorded)


def test_pooling_is_part_of_the_identity(saved):
    _, _, folder = saved
    fingerprints = {
        ImageEncoderConfig(f"hf:{folder}", pooling=p).load().identity.spec.fingerprint for p in ("cls", "mean")
    }
    assert len(fingerprints) == 2


def test_missing_tensors_are_rejected(tmp_path):
    model = MODELS["dinov2"]()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "layer.1.mlp.fc1" not in name}
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    save_image_processor(tmp_path)
    with pytest.raises(UserError, match=r"2 tensors are missing or of another shape.*layer.1.mlp.fc1"):
        ImageEncoderConfig(f"hf:{tmp_path}", pooling="cls").load()


def test_tensors_of_another_shape_are_rejected(tmp_path):
    MODELS["dinov2"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp_ratio": 2}))
    save_image_processor(tmp_path)
    with pytest.raises(UserError, match="another shape"):
        ImageEncoderConfig(f"hf:{tmp_path}", pooling="cls").load()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"size": {"longest_edge": 64}}, "is invalid"),
        ({"resample": 17}, "is invalid"),
        ({"crop_size": {"height": 56, "width": 70}}, "only squares"),
    ],
)
def test_unknown_preprocessing_is_rejected(saved, changes, problem):
    _, _, folder = saved
    save_image_processor(folder, **changes)
    with pytest.raises(UserError, match=problem):
        ImageEncoderConfig(f"hf:{folder}", pooling="cls").load()


def test_network_with_class_token_needs_a_pooling(saved):
    with pytest.raises(UserError, match=r"needs a pooling. Choose one of: cls, mean, cls\+mean"):
        ImageEncoderConfig(f"hf:{saved[2]}").load()
