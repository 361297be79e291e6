"""Language models as text encoders: end of text, attention in both directions, NV-Embed, half precision."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import save_randomised, save_tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GteConfig,
    GteModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from sail_align.extract.encoders.catalogue import TEXT, describe
from sail_align.extract.encoders.load import TextEncoderConfig, load_recorded, load_tokenizer
from sail_align.extract.encoders.nv_embed import NVEmbedModel, translate_nv_config
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.encoders.tokenizer import load_tokenizer_files
from sail_align.extract.encoders.transformers_models import load_pretrained
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError

TINY = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
MODELS = {
    "qwen3-embedding-0.6b": lambda: Qwen3Model(Qwen3Config(**TINY, head_dim=8)),
    "gte-qwen2-1.5b": lambda: Qwen2Model(Qwen2Config(**TINY)),
    "e5-mistral-7b": lambda: MistralModel(MistralConfig(**TINY, sliding_window=None)),
}
TEXTS = ["the dog", "the red cat sleeps on the green bench and a dog runs on the grass", "", "cat " * 90]


def save(folder, model, processor, side="right"):
    """Write a model with a tokenizer that ends no text, and return both."""
    model = save_randomised(model, folder)
    tokenizer = save_tokenizer(folder, padding_side=side)
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.save_pretrained(folder)
    return model, tokenizer


BOS = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
ENDED = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("processor", [ByteLevel(), BOS, ENDED], ids=["bytes", "start", "end"])
@pytest.mark.parametrize("name", MODELS)
def test_feature_is_the_state_of_the_end_token(tmp_path, monkeypatch, name, processor, side):
    model, _ = save(tmp_path, MODELS[name](), processor, side)
    tokenizer = AutoTokenizer.from_pretrained(
        tmp_path
    )  # of the model's own class, which splits qwen2's texts in letters
    monkeypatch.setitem(TEXT, name, replace(TEXT[name], origin=tmp_path, end="[SEP]", token_limit=12))
    encoder = TextEncoderConfig(name).load()
    found = encoder.encode(TEXTS)
    for text, feature in zip(TEXTS, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        ids = [*(ids[:-1] if ids and ids[-1] == 3 else ids)[:11], 3]
        # The explicit mask overrides the attention pattern of the model.
        allowed = torch.ones(len(ids), len(ids), dtype=torch.bool)
        allowed = allowed if TEXT[name].bidirectional else allowed.tril()
        with torch.no_grad():
            states = model(torch.tensor([ids]), attention_mask=allowed[None, None]).last_hidden_state
        torch.testing.assert_close(feature, states[0, -1], rtol=1e-5, atol=1e-5)
    preprocessing = encoder.identity.spec.preprocessing
    assert (preprocessing["prefix"], preprocessing["end"]) == ("", "[SEP]")
    assert preprocessing.get("bidirectional", False) == TEXT[name].bidirectional
    loaded = load_tokenizer(encoder.identity.spec, str(tmp_path))
    assert loaded("the dog")["input_ids"][-1] == 3


def test_instruction_is_recorded_and_restored(tmp_path, monkeypatch):
    save(tmp_path, MODELS["qwen3-embedding-0.6b"](), ENDED)
    monkeypatch.setitem(TEXT, "llm", replace(TEXT["qwen3-embedding-0.6b"], origin=tmp_path, end="[SEP]"))
    plain, prompted = TextEncoderConfig("llm").load(), TextEncoderConfig("llm", prompt="query : ").load()
    assert torch.equal(prompted.encode(["a dog"]), plain.encode(["query : a dog"]))
    assert plain.identity.spec.fingerprint != prompted.identity.spec.fingerprint
    assert load_recorded(prompted.identity).identity == prompted.identity
    assert TextEncoderConfig.recorded(prompted.identity).prompt == "query : "
    for encoder in (plain, prompted):
        spec = replace(encoder.identity.spec, id="llm")
        assert TextEncoderConfig("llm").matches(spec) is (encoder is plain)
        assert TextEncoderConfig("llm", prompt="query : ").matches(spec) is (encoder is prompted)


def test_end_token_that_the_config_asks_for(tmp_path):
    """transformers 5 ignores `add_eos_token` if tokenizer.json does not add the token."""
    save(tmp_path, MODELS["e5-mistral-7b"](), BOS)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_eos_token": True, "eos_token": "[SEP]"}))
    modules = [{"type": f"sentence_transformers.models.{name}", "path": ""} for name in ("Transformer", "Pooling")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    encoder = TextEncoderConfig(f"hf:{tmp_path}").load()
    assert encoder.identity.spec.preprocessing["end"] == "[SEP]"
    assert encoder.tokenizer("the dog")["input_ids"] == [2, 7, 8, 3]
    assert load_recorded(encoder.identity).identity == encoder.identity


def test_unknown_end_token_is_refused(tmp_path):
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"it has no token '</s>', which must end each text"):
        load_tokenizer_files(tmp_path, end="</s>")


def test_tokenizer_without_padding_token(tmp_path):
    _, tokenizer = save(tmp_path, MODELS["qwen3-embedding-0.6b"](), ENDED)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoderConfig(f"hf:{tmp_path}", pooling="last").load()
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(encoder.encode(TEXTS), alone, rtol=1e-5, atol=1e-5)


def test_text_without_tokens_has_no_feature(tmp_path):
    save(tmp_path, MODELS["qwen3-embedding-0.6b"](), ByteLevel())
    for pooling in ("last", "mean", "cls"):
        features = TextEncoderConfig(f"hf:{tmp_path}", pooling=pooling).load().encode(["a dog", "", "the red cat"])
        assert features.isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", [*MODELS, "bert", "gte"])
def test_tensors_are_loaded_in_half_precision(tmp_path, name, precision):
    """The result is that of loading in float32 and casting, with the buffers in float32."""
    tiny = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    others = {
        "bert": lambda: BertModel(BertConfig(**tiny)),
        "gte": lambda: GteModel(GteConfig(**tiny, rope_parameters=rope)),
    }
    save_randomised({**MODELS, **others}[name](), tmp_path)
    files, runtime = EncoderFiles.fetch(tmp_path), Runtime.of("cpu", precision)
    half = load_pretrained(files, allow_code=False, dtype=precision)
    assert {each.dtype for each in half.parameters()} == {runtime.dtype}
    found, cast = runtime.freeze(half), runtime.freeze(load_pretrained(files, allow_code=False))
    for (key, value), (_, expected) in zip(
        [*found.named_parameters(), *found.named_buffers()],
        [*cast.named_parameters(), *cast.named_buffers()],
        strict=True,
    ):
        assert value.dtype == expected.dtype, key
        assert torch.equal(value, expected), key
    assert all(each.dtype == torch.float32 for key, each in found.named_buffers() if "inv_freq" in key)
    assert not getattr(half.config, "use_cache", False)


LATENT = {"num_latents_value": 5, "num_cross_heads": 2, "latent_dim": 32, "hidden_dim": 32, "cross_dim_head": 8}


def save_nv_embed(folder):
    """Write a model in the published form, and return its tensors and its Mistral."""
    text = {**TINY, "model_type": "bidir_mistral", "sliding_window": 4, "rope_theta": 1_000.0}
    config = {
        "model_type": "nvembed",
        "text_config": text,
        "latent_attention_config": {**LATENT, "output_normalize": True},
    }
    model = save_randomised(NVEmbedModel(translate_nv_config(config)), folder)
    code = {"AutoConfig": "configuration_nvembed.NVEmbedConfig", "AutoModel": "modeling_nvembed.NVEmbedModel"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    return {name: each.double().numpy() for name, each in model.state_dict().items()}, model.embedding_model


def latent_attention(w, x):
    """Return what the latent attention makes of token states, (T, D) float64, computed from its published code."""
    w = {name.removeprefix("latent_attention_model."): each for name, each in w.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    first, second = "cross_attend_blocks.0.", "cross_attend_blocks.1."
    query = norm(x, first + "norm") @ w[first + "fn.to_q.weight"].T
    keys, values = np.split(norm(w["latents"], first + "norm_context") @ w[first + "fn.to_kv.weight"].T, 2, axis=1)
    mixed = []
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        scores = np.exp(query[:, part] @ keys[:, part].T / math.sqrt(8))
        mixed.append(scores / scores.sum(-1, keepdims=True) @ values[:, part])
    x = np.concatenate(mixed, axis=1) @ w[first + "fn.to_out.weight"].T + x
    inner = norm(x, second + "norm") @ w[second + "fn.net.0.weight"].T + w[second + "fn.net.0.bias"]
    values, gates = np.split(inner, 2, axis=1)
    gelu = gates * 0.5 * (1 + np.vectorize(math.erf)(gates / math.sqrt(2)))
    return (values * gelu) @ w[second + "fn.net.2.weight"].T + w[second + "fn.net.2.bias"] + x


def test_nv_embed_runs_without_its_code(tmp_path, monkeypatch):
    tensors, mistral = save_nv_embed(tmp_path)
    assert mistral.rotary_emb.inv_freq[1] == pytest.approx(1_000.0 ** (-2 / 8))
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = BOS
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setitem(TEXT, "nv-embed-v2", replace(TEXT["nv-embed-v2"], origin=tmp_path, end="[SEP]"))
    encoder = TextEncoderConfig("nv-embed-v2").load()
    mistral.config.is_causal = True  # the explicit mask decides
    found = encoder.encode(TEXTS[:3])
    for text, feature in zip(TEXTS[:3], found, strict=True):
        ids = [*tokenizer(text)["input_ids"], 3]
        allowed = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool)
        with torch.no_grad():
            states_TD = mistral(torch.tensor([ids]), attention_mask=allowed).last_hidden_state[0].double().numpy()
        expected = latent_attention(tensors, states_TD).mean(0)
        np.testing.assert_allclose(feature, expected, rtol=1e-4, atol=1e-4)
    assert load_recorded(encoder.identity).identity == encoder.identity


def test_nv_embed_with_other_weights_is_refused(tmp_path):
    save_nv_embed(tmp_path)
    save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["latent_attention_config"]["num_latents_value"] = 6
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="1 tensors are missing or of another shape"):
        TextEncoderConfig(f"hf:{tmp_path}", pooling="mean").load()


@pytest.mark.slow
def test_facts_agree_with_the_published_architectures():
    def qwen(config, model, width, depth, inner, heads, groups, words):
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": inner, "vocab_size": words}
        return model, config(**sizes, num_attention_heads=heads, num_key_value_heads=groups)

    published = {
        "qwen3-embedding-0.6b": qwen(Qwen3Config, Qwen3Model, 1_024, 28, 3_072, 16, 8, 151_669),
        "qwen3-embedding-4b": qwen(Qwen3Config, Qwen3Model, 2_560, 36, 9_728, 32, 8, 151_665),
        "qwen3-embedding-8b": qwen(Qwen3Config, Qwen3Model, 4_096, 36, 12_288, 32, 8, 151_665),
        "gte-qwen2-1.5b": qwen(Qwen2Config, Qwen2Model, 1_536, 28, 8_960, 12, 2, 151_646),
        "gte-qwen2-7b": qwen(Qwen2Config, Qwen2Model, 3_584, 28, 18_944, 28, 4, 151_646),
        "e5-mistral-7b": (MistralModel, MistralConfig()),
        "nv-embed-v2": (NVEmbedModel, MistralConfig()),
    }
    for name, (model, config) in published.items():
        with torch.device("meta"):
            parameters = sum(each.numel() for each in model(config).parameters())
        facts = describe(TEXT[name])
        assert facts["parameters"] == pytest.approx(parameters, abs=5e4), name
        assert facts["dim"] == config.hidden_size, name


def test_code_that_is_not_run_is_named(tmp_path, monkeypatch, caplog):
    save(tmp_path, MODELS["gte-qwen2-1.5b"](), ENDED)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}))
    TextEncoderConfig(f"hf:{tmp_path}", pooling="last").load()
    assert "has code of its own (modeling_qwen.Qwen2Model), which is not run" in caplog.text
    caplog.clear()
    monkeypatch.setitem(TEXT, "gte", replace(TEXT["gte-qwen2-1.5b"], origin=tmp_path, end="[SEP]"))
    TextEncoderConfig("gte").load()
    assert not caplog.text
