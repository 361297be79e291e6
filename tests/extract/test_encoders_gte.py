"""GTE in its original form, against a forward pass in float64 NumPy."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny_models import save_tokenizer
from transformers import GteModel

from sail_align.extract.encoders.load import TextEncoderConfig
from sail_align.extract.encoders.transformers_models import translate_gte_config
from sail_align.extract.errors import UserError

WIDTH, HEADS, LAYERS, HIDDEN = 32, 4, 2, 48
HEAD = WIDTH // HEADS
CONFIG = {
    "architectures": ["NewModel"],
    "attention_probs_dropout_prob": 0.0,
    "auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"},
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": HIDDEN,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "max_position_embeddings": 512,
    "model_type": "new",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pack_qkv": True,
    "pad_token_id": 0,
    "position_embedding_type": "rope",
    "rope_scaling": {"factor": 2.0, "type": "ntk"},
    "rope_theta": 5000,
    "torch_dtype": "float32",
    "transformers_version": "4.39.1",
    "type_vocab_size": 0,
    "unpad_inputs": False,
    "use_memory_efficient_attention": False,
    "vocab_size": 32,
}
TEXT = "the red cat sleeps on the green bench and a dog runs on the grass"


def original_tensors(token_types: int) -> dict[str, np.ndarray]:
    """Return random weights with the original's names and fused projections."""
    rng = np.random.default_rng(0)
    shapes = {"embeddings.word_embeddings.weight": (32, WIDTH), "embeddings.LayerNorm": (WIDTH,)}
    if token_types:
        shapes["embeddings.token_type_embeddings.weight"] = (token_types, WIDTH)
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        shapes[layer + "attention.qkv_proj.weight"] = (3 * WIDTH, WIDTH)
        shapes[layer + "attention.qkv_proj.bias"] = (3 * WIDTH,)
        shapes[layer + "attention.o_proj.weight"] = (WIDTH, WIDTH)
        shapes[layer + "attention.o_proj.bias"] = (WIDTH,)
        shapes[layer + "mlp.up_gate_proj.weight"] = (2 * HIDDEN, WIDTH)
        shapes[layer + "mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        shapes[layer + "mlp.down_proj.bias"] = (WIDTH,)
        shapes[layer + "attn_ln"] = shapes[layer + "mlp_ln"] = (WIDTH,)
    tensors = {}
    for name, shape in shapes.items():
        draw = (rng.standard_normal(shape) * 0.5).astype(np.float32)
        if name.endswith(("LayerNorm", "_ln")):
            tensors[name + ".weight"] = 1 + draw
            tensors[name + ".bias"] = (rng.standard_normal(shape) * 0.5).astype(np.float32)
        else:
            tensors[name] = draw
    return tensors


def forward(tensors: dict[str, np.ndarray], ids: list[int], theta: float, factor: float | None) -> np.ndarray:
    """Return the original's token states, (T, D) float64, computed from its published description."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * w[name + ".weight"] + w[name + ".bias"]

    def rotate(x_TD):
        out = np.empty_like(x_TD)
        for position in range(len(x_TD)):
            for i in range(HEAD // 2):
                frequency = theta ** (-2 * i / HEAD)
                if factor is not None:
                    frequency = (theta * factor) ** (-2 * i / HEAD) * factor ** (-2 / HEAD)
                cos, sin = math.cos(position * frequency), math.sin(position * frequency)
                first, second = x_TD[position, i], x_TD[position, i + HEAD // 2]
                out[position, i] = first * cos - second * sin
                out[position, i + HEAD // 2] = second * cos + first * sin
        return out

    x = w["embeddings.word_embeddings.weight"][ids]
    if "embeddings.token_type_embeddings.weight" in w:
        x = x + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        fused = x @ w[layer + "attention.qkv_proj.weight"].T + w[layer + "attention.qkv_proj.bias"]
        query, key, value = fused[:, :WIDTH], fused[:, WIDTH : 2 * WIDTH], fused[:, 2 * WIDTH :]
        mixed = np.empty_like(x)
        for h in range(HEADS):
            part = slice(h * HEAD, (h + 1) * HEAD)
            scores = rotate(query[:, part]) @ rotate(key[:, part]).T / math.sqrt(HEAD)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, part] = weights / weights.sum(-1, keepdims=True) @ value[:, part]
        attended = mixed @ w[layer + "attention.o_proj.weight"].T + w[layer + "attention.o_proj.bias"]
        x = norm(x + attended, layer + "attn_ln")
        up_gate = x @ w[layer + "mlp.up_gate_proj.weight"].T
        up, gate = up_gate[:, :HIDDEN], up_gate[:, HIDDEN:]
        gelu = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
        down = (up * gelu) @ w[layer + "mlp.down_proj.weight"].T + w[layer + "mlp.down_proj.bias"]
        x = norm(x + down, layer + "mlp_ln")
    return x


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["new.", ""])
@pytest.mark.parametrize("token_types", [0, 2])
@pytest.mark.parametrize("factor", [2.0, None])
def test_original_checkpoint_gives_the_originals_features(tmp_path, prefix, token_types, factor):
    tensors = original_tensors(token_types)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = {**CONFIG, "type_vocab_size": token_types, "rope_scaling": {"type": "ntk", "factor": factor}}
    if factor is None:
        del config["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = save_tokenizer(tmp_path)
    ids = tokenizer(TEXT)["input_ids"]
    expected_TD = forward(tensors, ids, theta=5000, factor=factor)

    first = TextEncoderConfig(f"hf:{tmp_path}", pooling="cls").load().encode([TEXT, "a"])[0]
    mean = TextEncoderConfig(f"hf:{tmp_path}", pooling="mean").load().encode([TEXT, "a"])[0]
    np.testing.assert_allclose(first, expected_TD[0], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(mean, expected_TD.mean(0), rtol=1e-4, atol=2e-5)


def test_reference_depends_on_the_rotary_scaling():
    tensors, ids = original_tensors(0), list(range(2, 20))
    assert np.abs(forward(tensors, ids, 5000, 2.0) - forward(tensors, ids, 5000, None)).max() > 0.01


def test_rotary_frequencies_of_the_published_large_model():
    published = {**CONFIG, "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 1}
    published |= {"rope_theta": 160000, "rope_scaling": {"type": "ntk", "factor": 2.0}, "max_position_embeddings": 8192}
    found = GteModel(translate_gte_config(published)).rotary_emb.inv_freq
    expected = [(160000 * 2.0) ** (-2 * i / 64) * 2.0 ** (-2 / 64) for i in range(32)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 128}, "field 'sliding_window' with value 128"),
        ({"logn_attention_scale": True}, "logn_attention_scale is True; only False"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'; only 'rope'"),
        ({"layer_norm_type": "rms_norm"}, "layer_norm_type is 'rms_norm'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling .*'dynamic'"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.5}}, "rope_scaling .*'mixed_b'"),
    ],
)
def test_config_without_translation_is_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        translate_gte_config({**CONFIG, **changes})


def test_missing_fields_take_the_originals_defaults():
    config = translate_gte_config({"model_type": "new"})
    assert (config.vocab_size, config.max_position_embeddings, config.type_vocab_size) == (30528, 2048, 1)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (768, 12, 3072)
