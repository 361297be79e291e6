"""Image encoders against transformers' and timm's own forward pass, on small models with random weights."""

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

from sail_align.extract.encoders import load
from sail_align.extract.encoders import weights as checkpoints
from sail_align.extract.encoders.base import Identity
from sail_align.extract.encoders.catalogue import IMAGENET_MEAN, IMAGENET_STD, Normalisation
from sail_align.extract.encoders.load import load_image_encoder, load_recorded
from sail_align.extract.encoders.value_path import NoValuePathError, values_of_patches
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


def own_tokens(kind, model, pixels):
    """The class token and the patches, by position: registers stand between."""
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.inference_mode():
        tokens = model(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD), **options).last_hidden_state
    return tokens[:, 0], tokens[:, 1 + REGISTERS[kind] :]


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_features_are_those_of_the_model_itself(saved, pooling):
    kind, model, folder = saved
    encoder = load_image_encoder(f"hf:{folder}", pooling=pooling)
    pixels = random_pixels(3, 56, 56, seed=1)
    cls_BD, patches_BND = own_tokens(kind, model, pixels)
    expected = {"cls": cls_BD, "mean": patches_BND.mean(1), "cls+mean": torch.cat([cls_BD, patches_BND.mean(1)], 1)}
    torch.testing.assert_close(encoder.encode(pixels), expected[pooling], rtol=1e-5, atol=1e-5)
    assert encoder.identity.spec.dim == expected[pooling].shape[1]


@pytest.mark.parametrize("size", [(56, 56), (28, 84), (98, 56)])
def test_dense_features_pair_the_class_token_with_each_patch_in_reading_order(saved, size):
    kind, model, folder = saved
    encoder = load_image_encoder(f"hf:{folder}", pooling="cls+mean")
    pixels = random_pixels(2, *size, seed=2)
    cls_BD, patches_BND = own_tokens(kind, model, pixels)
    dense = encoder.encode_dense(pixels)
    height, width = size[0] // 14, size[1] // 14
    assert dense.shape == (2, height, width, 64)
    for row in range(height):
        for column in range(width):
            expected = torch.cat([cls_BD, patches_BND[:, row * width + column]], dim=1)
            torch.testing.assert_close(dense[:, row, column], expected, rtol=1e-5, atol=1e-5)


def test_preprocessing_is_that_of_the_published_processor(saved, photo):
    _, _, folder = saved
    encoder = load_image_encoder(f"hf:{folder}", pooling="cls")
    published = BitImageProcessor.from_pretrained(folder)(photo, return_tensors="pt")["pixel_values"]
    ours = normalised(encoder.preprocess(photo)[None], IMAGENET_MEAN, IMAGENET_STD)
    assert ours.shape == published.shape
    assert (ours - published).abs().mean() < 0.01  # theirs resizes tensors, ours pictures: rounding differs


def test_what_is_cut_from_the_middle_is_what_the_processors_cut(saved):
    _, _, folder = saved
    encoder = load_image_encoder(f"hf:{folder}", pooling="cls")
    pixels = random_pixels(64, 64)
    assert torch.equal(encoder.preprocess(Image.fromarray(pixels.numpy())), pixels[4:60, 4:60])
    assert encoder.size == 56


def test_pixels_that_are_no_multiple_of_the_stride_get_a_frame_of_zeros(saved):
    kind, model, folder = saved
    encoder = load_image_encoder(f"hf:{folder}", pooling="mean")
    pixels = random_pixels(1, 59, 56)
    framed = F.pad(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD), (0, 0, 5, 6))
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.inference_mode():
        tokens = model(framed, **options).last_hidden_state[:, 1 + REGISTERS[kind] :]
    torch.testing.assert_close(encoder.encode_dense(pixels).flatten(1, 2), tokens, rtol=1e-5, atol=1e-5)


def test_another_normalisation_is_what_the_network_sees(saved):
    _, _, folder = saved
    encoder = load_image_encoder(f"hf:{folder}", pooling="mean")
    pixels, other = random_pixels(1, 56, 56), Normalisation(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    save_image_processor(folder, image_mean=other.mean, image_std=other.std)
    trained_so = load_image_encoder(f"hf:{folder}", pooling="mean")
    assert torch.equal(encoder.encode_dense(pixels, normalisation=other), trained_so.encode_dense(pixels))
    assert not torch.equal(encoder.encode_dense(pixels), trained_so.encode_dense(pixels))


def test_without_the_last_attention_patches_change_and_the_class_token_does_not(saved):
    encoder = load_image_encoder(f"hf:{saved[2]}", pooling="cls+mean")
    pixels = random_pixels(2, 56, 70, seed=4)
    plain, values = encoder.encode_dense(pixels), encoder.encode_dense(pixels, last_attention=False)
    torch.testing.assert_close(plain[..., :32], values[..., :32])
    assert (plain[..., 32:] - values[..., 32:]).abs().mean() > 0.01
    assert torch.equal(encoder.encode_dense(pixels), plain)  # nothing stays behind in the network


@pytest.mark.parametrize("kind", ["dinov2", "dinov2-reg"])
def test_without_the_last_attention_a_patch_is_its_own_value(kind, tmp_path):
    """MaskCLIP's last block, computed from the hidden state before it."""
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
    dense = load_image_encoder(f"hf:{tmp_path}", pooling="mean").encode_dense(pixels, last_attention=False)
    torch.testing.assert_close(dense.flatten(1, 2), x_BTD, rtol=1e-4, atol=1e-4)


def test_clips_own_tower_is_read_as_maskclip_reads_it(tmp_path):
    """The same, of transformers' CLIP; its last norm is the class token's alone there."""
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
    dense = load_image_encoder(f"hf:{tmp_path}", pooling="mean").encode_dense(pixels, last_attention=False)
    torch.testing.assert_close(dense.flatten(1, 2), x_BTD, rtol=1e-4, atol=1e-4)


def test_a_network_without_attention_has_no_path_around_it(tmp_path):
    config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=64)
    save_randomised(ConvNextModel(config), tmp_path)
    save_image_processor(tmp_path, crop_size={"height": 64, "width": 64})
    encoder = load_image_encoder(f"hf:{tmp_path}")
    with pytest.raises(UserError, match="has no last attention that its patches could skip"):
        encoder.encode_dense(random_pixels(1, 64, 64), last_attention=False)


def test_windowed_attention_has_no_path_around_it(tmp_path):
    """Swin's last block sees its windows apart: what comes out of it is no row of patches."""
    backbone = timm.create_model("swin_tiny_patch4_window7_224", img_size=448, embed_dim=24, depths=(1, 1, 1, 2)).eval()
    with pytest.raises(NoValuePathError), values_of_patches(backbone, 14 * 14):
        backbone.forward_features(torch.zeros(1, 3, 448, 448))


def test_a_feature_map_is_its_own_dense_feature(tmp_path):
    config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=64)
    model = save_randomised(ConvNextModel(config), tmp_path)
    save_image_processor(tmp_path, crop_size={"height": 64, "width": 64})
    encoder = load_image_encoder(f"hf:{tmp_path}")
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
def test_timm_models_give_their_own_tokens(name, pooling, tmp_path, monkeypatch):
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3} if name.startswith("vit") else {}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **small, **options))
    model = timm.create_model(name).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fetched = checkpoints.Checkpoint(tmp_path, {"loader": "hub", "repository": "timm/x", "revision": "0" * 40}, "1")
    monkeypatch.setattr(load, "fetch", lambda origin: fetched)
    encoder = load_image_encoder(f"timm:{name}", pooling=pooling)

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


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_changes_the_identity_and_little_else(saved, precision):
    _, _, folder = saved
    exact = load_image_encoder(f"hf:{folder}", pooling="cls")
    half = load_image_encoder(f"hf:{folder}", pooling="cls", precision=precision)
    pixels = random_pixels(2, 56, 56, seed=4)
    assert half.encode(pixels).dtype == torch.float32
    assert torch.cosine_similarity(exact.encode(pixels), half.encode(pixels)).min() > 0.99
    assert half.identity.spec.fingerprint != exact.identity.spec.fingerprint


def test_a_local_folder_is_known_by_its_content_wherever_it_lies(saved, tmp_path):
    _, _, folder = saved
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in folder.glob("*.*"):
        (moved / file.name).write_bytes(file.read_bytes())
    here, there = (load_image_encoder(f"hf:{path}", pooling="cls").identity for path in (folder, moved))
    assert here.spec == there.spec
    assert here.location != there.location


def test_a_recorded_encoder_is_loaded_again_and_a_changed_one_refused(saved):
    _, _, folder = saved
    identity = load_image_encoder(f"hf:{folder}", pooling="cls+mean").identity
    recorded = Identity.from_json(json.loads(json.dumps(identity.to_json())))
    assert load_recorded(recorded).identity == identity

    forged = Identity(recorded.spec, [-value for value in recorded.golden], recorded.versions, recorded.location)
    with pytest.raises(UserError, match="answers its fixed test input differently"):
        load_recorded(forged)

    save_image_processor(folder, size={"shortest_edge": 56})
    with pytest.raises(UserError, match="whose preprocessing is"):
        load_recorded(recorded)


def test_pooling_is_part_of_the_identity(saved):
    _, _, folder = saved
    prints = {load_image_encoder(f"hf:{folder}", pooling=p).identity.spec.fingerprint for p in ("cls", "mean")}
    assert len(prints) == 2


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    model = MODELS["dinov2"]()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "layer.1.mlp.fc1" not in name}
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    save_image_processor(tmp_path)
    with pytest.raises(UserError, match=r"2 tensors are missing or of another shape.*layer.1.mlp.fc1"):
        load_image_encoder(f"hf:{tmp_path}", pooling="cls")


def test_weights_of_another_shape_are_refused(tmp_path):
    MODELS["dinov2"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp_ratio": 2}))
    save_image_processor(tmp_path)
    with pytest.raises(UserError, match="another shape"):
        load_image_encoder(f"hf:{tmp_path}", pooling="cls")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"size": {"longest_edge": 64}}, "unknown form"),
        ({"resample": 17}, "unknown form"),
        ({"crop_size": {"height": 56, "width": 70}}, "only squares"),
    ],
)
def test_preprocessing_of_an_unknown_form_is_refused(saved, changes, problem):
    _, _, folder = saved
    save_image_processor(folder, **changes)
    with pytest.raises(UserError, match=problem):
        load_image_encoder(f"hf:{folder}", pooling="cls")


def test_a_class_token_asks_for_a_choice_of_pooling(saved):
    with pytest.raises(UserError, match="needs a pooling; use one of: cls, mean, cls\\+mean"):
        load_image_encoder(f"hf:{saved[2]}")
