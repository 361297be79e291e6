"""Image encoders at another image size than their own, against the interpolation of the library that has them."""

import json
from dataclasses import replace

import pytest
import timm
import torch
import transformers
from tiny_models import normalised, random_pixels, save_image_processor, save_randomised, save_timm

from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.load import ImageEncoderConfig, load_recorded
from sail_align.extract.encoders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocessing
from sail_align.extract.errors import UserError

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = {**WIDTH, "intermediate_size": 64, "image_size": 56, "patch_size": 14}
MODELS = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**TINY)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**WIDTH, image_size=70, patch_size=14)),
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**TINY)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY)),
    "radio": lambda: transformers.RadioModel(transformers.RadioConfig(**TINY, max_img_size=112)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_positions_are_interpolated_as_in_transformers(kind, tmp_path):
    model = save_randomised(MODELS[kind](), tmp_path)
    save_image_processor(tmp_path)
    encoder = ImageEncoderConfig(f"hf:{tmp_path}", pooling="mean", image_size=84).load()
    pixels = random_pixels(2, 84, 84)
    options = {"interpolate_pos_encoding": True} if kind in ("vit", "siglip", "clip") else {}
    with torch.inference_mode():
        tokens = model(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD), **options).last_hidden_state
    torch.testing.assert_close(encoder.encode(pixels), tokens[:, -36:].mean(1), rtol=1e-5, atol=1e-5)
    assert encoder.encode_dense(pixels).shape == (2, 6, 6, 32)
    spec = encoder.identity.spec
    assert (encoder.size, spec.preprocessing["crop"], spec.preprocessing["resize"]) == (84, 84, 96)
    assert spec.preprocessing["image_size"] == 84


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pooling", "size"),
    [
        ("vit_base_patch16_siglip_224", "pooler", 336),
        ("vit_base_patch16_clip_224.laion2b", "pooler", 64),
        ("vit_pe_core_tiny_patch16_384", "pooler", 128),
        ("vit_base_patch16_dinov3", "cls+mean", 128),
        ("swin_tiny_patch4_window7_224", "mean", 448),
        ("convnext_base.clip_laion2b", "mean", 96),
    ],
)
def test_positions_are_interpolated_as_in_timm(name, pooling, size, tmp_path, monkeypatch):
    """Compare with a model that timm makes for this size, whose weights it converts as it loads them."""
    save_timm(name, tmp_path, monkeypatch)
    source = {"file": str(tmp_path / "model.safetensors"), "custom_load": False}
    fixed = {} if name.startswith("convnext") else {"img_size": size}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **fixed).eval()
    encoder = ImageEncoderConfig(f"timm:{name}", pooling=pooling, image_size=size).load()
    pixels = random_pixels(1, size, size)
    with torch.inference_mode():
        tokens = model.forward_features(normalised(pixels, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]))
        if pooling == "pooler":
            expected = model.forward_head(tokens)
        elif tokens.ndim == 4:
            expected = tokens.mean((2, 3) if name.startswith("convnext") else (1, 2))
        else:
            expected = torch.cat([tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(1)], dim=1)
    torch.testing.assert_close(encoder.encode(pixels), expected, rtol=1e-5, atol=1e-5)
    assert encoder.identity.spec.preprocessing["image_size"] == size


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("clip", 48), ("siglip", 192)])
def test_positions_are_interpolated_as_in_open_clip(kind, size, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    from tiny_open_clip import CLIP, SIGLIP, SIGLIP_PREPROCESSING, save_open_clip

    save_open_clip(tmp_path / "model", *((CLIP, {}) if kind == "clip" else (SIGLIP, SIGLIP_PREPROCESSING)))
    name = f"open_clip:{tmp_path / 'model'}"
    forced = open_clip.create_model(
        f"local-dir:{tmp_path / 'model'}", force_image_size=size, require_pretrained=True
    ).eval()
    encoder = ImageEncoderConfig(name, image_size=size).load()
    pixels = random_pixels(2, size, size)
    with torch.inference_mode():
        expected = forced.encode_image(normalised(pixels, encoder._normalisation.mean, encoder._normalisation.std))
    torch.testing.assert_close(encoder.encode(pixels), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=f"Image size {size + 4} is invalid"):
        ImageEncoderConfig(name, image_size=size + 4).load()


@pytest.fixture
def vit(tmp_path):
    save_randomised(MODELS["vit"](), tmp_path)
    save_image_processor(tmp_path)
    return f"hf:{tmp_path}"


def test_a_size_of_no_whole_patches_is_refused_with_the_nearest(vit):
    for size, nearest in ((60, "Use 56 or 70"), (13, r"Use 14\.")):
        config = ImageEncoderConfig(vit, "mean", image_size=size)
        for refuse in (config.download, config.load):
            with pytest.raises(UserError, match=rf"Image size {size} is invalid: .* a multiple of 14\. {nearest}"):
                refuse()
    ImageEncoderConfig(vit, "mean", image_size=84).download()


def test_a_network_for_one_size_is_refused(tmp_path):
    save_randomised(transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**TINY)), tmp_path)
    save_image_processor(tmp_path)
    with pytest.raises(UserError, match="does not take images of 84 × 84"):
        ImageEncoderConfig(f"hf:{tmp_path}", "mean", image_size=84).load()
    with pytest.raises(UserError, match="does not take images of 84 × 56"):
        ImageEncoderConfig(f"hf:{tmp_path}", "mean").load().encode_dense(random_pixels(1, 84, 56))


@pytest.mark.slow
def test_recorded_size_is_restored_and_belongs_to_the_identity(vit):
    own, large = (ImageEncoderConfig(vit, "mean", image_size=size).load().identity for size in (None, 84))
    assert "image_size" not in own.spec.preprocessing
    assert own.spec.fingerprint != large.spec.fingerprint
    recorded = Identity.from_json(json.loads(json.dumps(large.to_json())))
    assert ImageEncoderConfig.recorded(recorded).image_size == 84
    assert load_recorded(recorded).identity == large
    # Giving the encoder's own size does not change its identity.
    assert ImageEncoderConfig(vit, "mean", image_size=56).load().identity.spec == own.spec
    for size, spec, same in (
        (None, own, True),
        (56, own, True),
        (84, own, False),
        (84, large, True),
        (None, large, False),
    ):
        config = ImageEncoderConfig(vit, "mean", image_size=size)
        assert config.matches(replace(spec.spec, id=vit)) is same


def test_preprocessing_keeps_its_proportions():
    steps = ImagePreprocessing(crop=224, resize=256)
    assert steps.at(None) is steps
    assert (steps.at(448).crop, steps.at(448).resize) == (448, 512)
    assert replace(steps, resize=None).at(518) == replace(steps, crop=518, resize=None)
