"""Image towers of two-tower models and their pooling heads, against the output of the library that has them."""

import pytest
import torch
import transformers
from tiny_models import normalised, random_pixels, save_image_processor, save_randomised, save_timm

from sail_align.extract.encoders.load import ImageEncoderConfig, load_recorded
from sail_align.extract.encoders.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from sail_align.extract.errors import UserError

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = {**WIDTH, "intermediate_size": 64, "image_size": 56, "patch_size": 14}
WORDS = {**WIDTH, "intermediate_size": 64, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1}


def two_towers(family: str, **changes):
    config = getattr(transformers, f"{family}Config")(vision_config=TINY, text_config=WORDS, **changes)
    return getattr(transformers, f"{family}Model")(config)


def tower(family: str, **changes):
    suffix = {"CLIP": "WithProjection"}.get(family, "")
    config = getattr(transformers, f"{family}VisionConfig")(**TINY, **changes)
    return getattr(transformers, f"{family}VisionModel{suffix}")(config)


RADIO = {"max_img_size": 112, "num_cls_tokens": 3, "num_registers": 5, "summary_idxs": [0, 2]}
MODELS = {
    "clip": lambda: two_towers("CLIP", projection_dim=24),
    "metaclip2": lambda: two_towers("MetaClip2", projection_dim=24),
    "siglip": lambda: two_towers("Siglip"),
    "aimv2": lambda: two_towers("Aimv2"),
    "clip-tower": lambda: tower("CLIP", projection_dim=24),
    "siglip-tower": lambda: tower("Siglip"),
    "aimv2-tower": lambda: tower("Aimv2"),
    "radio": lambda: transformers.RadioModel(transformers.RadioConfig(**{**WIDTH, **TINY, **RADIO})),
}
PREFIX = {"clip": 1, "metaclip2": 1, "clip-tower": 1, "radio": 8}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    model = save_randomised(MODELS[request.param](), tmp_path)
    save_image_processor(tmp_path)
    return request.param, model, tmp_path


def published(kind, model, pixels):
    """Return the library's pooled output and tokens, from the whole model where there are two towers."""
    inputs = normalised(pixels, IMAGENET_MEAN, IMAGENET_STD)
    with torch.inference_mode():
        if kind == "radio":
            output = model(inputs)
            return output.summary, output.features
        vision = getattr(model, "vision_model", model)
        tokens = vision(inputs).last_hidden_state[:, PREFIX.get(kind, 0) :]
        if kind == "aimv2":  # the projection after its pooling is not a part of the tower
            return vision(inputs).pooler_output, tokens
        if hasattr(model, "get_image_features"):
            return model.get_image_features(inputs).pooler_output, tokens
        output = model(inputs)
        return output.image_embeds if kind == "clip-tower" else output.pooler_output, tokens


@pytest.mark.slow
def test_pooled_images_are_those_of_the_library(saved):
    kind, model, folder = saved
    pixels = random_pixels(3, 56, 56, seed=1)
    pooled_BE, patches_BND = published(kind, model, pixels)
    encoder = ImageEncoderConfig(f"hf:{folder}", pooling="pooler").load()
    torch.testing.assert_close(encoder.encode(pixels), pooled_BE, rtol=1e-5, atol=1e-5)
    both = ImageEncoderConfig(f"hf:{folder}", pooling="pooler+mean").load()
    expected = torch.cat([pooled_BE, patches_BND.mean(1)], dim=1)
    torch.testing.assert_close(both.encode(pixels), expected, rtol=1e-5, atol=1e-5)
    dense_BhwD = both.encode_dense(pixels)
    assert dense_BhwD.shape == (3, 4, 4, expected.shape[1])
    torch.testing.assert_close(dense_BhwD[..., -32:].flatten(1, 2), patches_BND, rtol=1e-5, atol=1e-5)
    assert load_recorded(encoder.identity).identity == encoder.identity


def test_dense_features_apply_the_head_to_each_patch(saved):
    kind, model, folder = saved
    encoder, pixels = ImageEncoderConfig(f"hf:{folder}", pooling="pooler").load(), random_pixels(2, 56, 56, seed=2)
    if kind == "radio":
        with pytest.raises(UserError, match="gives a single one no embedding"):
            encoder.encode_dense(pixels)
        return
    _, patches_BND = published(kind, model, pixels)
    vision = getattr(model, "vision_model", model)
    with torch.inference_mode():
        alone = patches_BND.reshape(-1, 1, 32)
        if hasattr(vision, "head"):
            expected_NE = vision.head(alone)
        else:
            expected_NE = model.visual_projection(vision.post_layernorm(alone[:, 0]))
    dense_BhwE = encoder.encode_dense(pixels)
    assert dense_BhwE.shape[:3] == (2, 4, 4)
    torch.testing.assert_close(dense_BhwE.reshape(32, -1), expected_NE, rtol=1e-5, atol=1e-5)
    values = encoder.encode_dense(pixels, last_attention=False)  # skips the attention of the last block, not the head's
    assert values.shape == dense_BhwE.shape
    assert (values - dense_BhwE).abs().mean() > 0.01


def test_network_without_a_head_has_no_pooler(tmp_path):
    save_randomised(transformers.Dinov2Model(transformers.Dinov2Config(**TINY)), tmp_path)
    save_image_processor(tmp_path)
    with pytest.raises(UserError, match=r"no pooling 'pooler'. Choose one of: cls, mean, cls\+mean\."):
        ImageEncoderConfig(f"hf:{tmp_path}", pooling="pooler").load()


def test_naflex_is_refused_with_what_to_use(tmp_path):
    config = transformers.Siglip2VisionConfig(**WIDTH, intermediate_size=64, num_patches=16, patch_size=14)
    save_randomised(transformers.Siglip2VisionModel(config), tmp_path)
    save_image_processor(tmp_path)
    with pytest.raises(UserError, match=r"NaFlex form .* Use one of a fixed size, such as siglip2-base"):
        ImageEncoderConfig(f"hf:{tmp_path}").load()


@pytest.mark.parametrize(
    ("model", "stride", "has_cls"),
    [
        (
            lambda: transformers.DINOv3ConvNextModel(
                transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=64)
            ),
            32,
            True,
        ),
        (
            lambda: transformers.SwinModel(
                transformers.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
            ),
            8,
            False,
        ),
    ],
)
def test_networks_that_pool_in_stages(model, stride, has_cls, tmp_path):
    model = save_randomised(model(), tmp_path)
    save_image_processor(tmp_path, crop_size={"height": 64, "width": 64})
    encoder = ImageEncoderConfig(f"hf:{tmp_path}", pooling="mean").load()
    pixels = random_pixels(2, 64, 64)
    with torch.inference_mode():
        tokens = model(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, int(has_cls) :]
    assert (encoder.stride, encoder.network.has_cls) == (stride, has_cls)
    torch.testing.assert_close(encoder.encode_dense(pixels).flatten(1, 2), tokens, rtol=1e-5, atol=1e-5)


def test_a_network_that_normalises_by_itself_gets_plain_values(tmp_path):
    save_randomised(MODELS["radio"](), tmp_path)
    save_image_processor(tmp_path, do_normalize=False)
    encoder = ImageEncoderConfig(f"hf:{tmp_path}", pooling="mean").load()
    pixels = random_pixels(2, 56, 56)
    assert torch.equal(encoder.normalise(pixels), (pixels / 255).permute(0, 3, 1, 2))
    save_image_processor(tmp_path, rescale_factor=1 / 127.5)
    with pytest.raises(UserError, match=r"only values in \[0, 1\]"):
        ImageEncoderConfig(f"hf:{tmp_path}", pooling="mean").load()


TIMM = {
    "vit_base_patch16_siglip_224": ("pooler", 0),
    "vit_pe_core_tiny_patch16_384": ("pooler", 1),
    "vit_base_patch16_clip_224.laion2b": ("pooler", 1),
    "convnext_base.clip_laion2b": ("pooler", None),
    "vit_pe_spatial_tiny_patch16_512": ("cls+mean", 1),
    "vit_base_patch16_dinov3": ("cls+mean", 5),
    "vit_base_patch16_radio_v3": ("cls+mean", 8),
    "aimv2_large_patch14_224": ("mean", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_models_give_timms_features(name, tmp_path, monkeypatch):
    pooling, prefix = TIMM[name]
    model = save_timm(name, tmp_path, monkeypatch)
    encoder = ImageEncoderConfig(f"timm:{name}", pooling=pooling).load()
    side, config = encoder.size, model.pretrained_cfg
    pixels = random_pixels(2, side, side, seed=3)
    with torch.inference_mode():
        inputs = normalised(pixels, config["mean"], config["std"])
        if pooling == "pooler":
            expected = model(inputs)
        else:
            tokens = model.forward_features(inputs)
            mean = tokens[:, prefix:].mean(1)
            expected = mean if pooling == "mean" else torch.cat([tokens[:, 0], mean], dim=1)
    assert encoder.identity.spec.dim == expected.shape[1]
    torch.testing.assert_close(encoder.encode(pixels), expected, rtol=1e-5, atol=1e-5)
    if prefix is None:
        with pytest.raises(UserError, match="gives a single one no embedding"):
            encoder.encode_dense(pixels)
        return
    wide = random_pixels(1, 2 * encoder.stride, 3 * encoder.stride)
    dense_BhwD = encoder.encode_dense(wide)
    assert dense_BhwD.shape == (1, 2, 3, encoder.identity.spec.dim)
    with torch.inference_mode():
        tokens = encoder.network.model.forward_features(normalised(wide, config["mean"], config["std"]))[:, prefix:]
        if pooling == "pooler":
            model.pool_include_prefix = True
            tokens = torch.stack([model.forward_head(tokens[:, [n]]) for n in range(6)], dim=1)
    torch.testing.assert_close(dense_BhwD[..., -tokens.shape[2] :].flatten(1, 2), tokens, rtol=1e-5, atol=1e-5)
