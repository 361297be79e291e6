"""Encoders whose blocks are spread over several devices."""

import pytest
import torch
import transformers
from fake_cuda import fake_cuda
from tiny_models import save_randomised, save_timm, save_tokenizer

from sail_align.extract.encoders import spread as module
from sail_align.extract.encoders import text, vision
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.errors import UserError

WIDTH = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
CARDS = [torch.device("cuda:0"), torch.device("cuda:1")]


@pytest.fixture
def qwen(tmp_path):
    torch.manual_seed(0)
    words = {"vocab_size": 32, "max_position_embeddings": 128, "num_key_value_heads": 2, "head_dim": 8}
    save_randomised(transformers.Qwen3Model(transformers.Qwen3Config(**WIDTH, **words)), tmp_path)
    save_tokenizer(tmp_path)
    return f"hf:{tmp_path}"


def devices_of_blocks(blocks):
    return [{each.device for each in block.parameters()} for block in blocks]


@pytest.mark.slow
def test_text_encoder_runs_over_two_gpus(qwen, monkeypatch):
    monkeypatch.setattr(text, "GPU_TOKENS", 2)
    config = TextEncoderConfig(qwen, pooling="last", precision="bfloat16", layers=(-1, -3))
    with fake_cuda():
        encoder = config.load("cuda:0,cuda:1")
        encoder.__dict__.update(token_budget=128, batch_size=4)
        assert devices_of_blocks(encoder.network.layers) == [{CARDS[0]}] * 2 + [{CARDS[1]}] * 2
        assert encoder.device == encoder.network.embed_tokens.weight.device == encoder.network.norm.weight.device
        assert encoder.device == CARDS[0]
        assert encoder.encode(["the dog", "the red cat sleeps", ""]).shape == (3, 64)


@pytest.mark.slow
def test_image_encoder_of_timm_runs_over_two_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "GPU_BATCH", 2)
    save_timm("aimv2_large_patch14_224", tmp_path, monkeypatch)
    config = ImageEncoderConfig("timm:aimv2_large_patch14_224", pooling="mean")
    with fake_cuda():
        encoder = config.load("cuda:0,cuda:1")
        size = encoder.size
        assert {each.device for each in encoder.parameters()} == set(CARDS)
        assert encoder.encode(torch.zeros(2, size, size, 3, dtype=torch.uint8)).device.type == "cpu"


def test_features_do_not_change(qwen):
    encoder = TextEncoderConfig(qwen, pooling="last").load()
    before = encoder.encode(["the dog", "the red cat sleeps"])
    module.spread(encoder.network, [torch.device("cpu"), torch.device("cpu")])
    assert torch.equal(encoder.encode(["the dog", "the red cat sleeps"]), before)


def test_too_few_blocks_are_refused():
    with pytest.raises(UserError, match="1 blocks cannot be spread over 2 devices"):
        module.spread(torch.nn.Sequential(torch.nn.Linear(2, 2)), CARDS)


@pytest.mark.parametrize(
    ("devices", "options"), [("cpu:0,cpu:0", {}), ("cpu,cpu:1", {}), ("cpu:0,cpu:1", {"compiled": True})]
)
def test_several_devices_are_different_ones_with_numbers(devices, options):
    with pytest.raises(UserError, match=f"got {devices}, expected different GPUs"):
        Runtime.of(devices, "float32", several=True, **options)
    with pytest.raises(UserError, match=f"got {devices}, expected one device"):
        Runtime.of(devices, "float32")
