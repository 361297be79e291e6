"""Repositories of sentence-transformers, against the library, in each architecture of the catalogue's text encoders."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
    WeightedLayerPooling,
)
from tiny_models import save_randomised, save_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    JinaEmbeddingsV3Config,
    JinaEmbeddingsV3Model,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.load import TextEncoderConfig, load_recorded
from sail_align.extract.errors import UserError

WIDTH = 32
TINY = {
    "vocab_size": 32,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLM = {**TINY, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 3}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**TINY)),
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(**TINY)),
    "jina": lambda: JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**TINY)),
    "t5": lambda: T5EncoderModel(
        T5Config(vocab_size=32, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0)
    ),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**{k: v for k, v in LLM.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**LLM)),
    "mistral": lambda: MistralModel(MistralConfig(**LLM, sliding_window=None)),
    "mistral-sliding": lambda: MistralModel(MistralConfig(**LLM, sliding_window=4)),
    "gemma3": lambda: Gemma3TextModel(Gemma3TextConfig(**LLM, sliding_window=4, use_bidirectional_attention=True)),
}
TEXTS = [
    "the dog",
    "the red cat sleeps on the green bench and a dog runs on the grass with the cat",
    "",
    "A CAT",
    "cat",
]
TEXTS += ["the red dog runs " * 30]  # is truncated


def save_repository(folder, model="bert", *after, pooling="mean", side="right", limit=20, **options):
    """Write a repository with the library, and return the library's model."""
    save_randomised(MODELS[model](), folder / "network")
    save_tokenizer(folder / "network", padding_side=side)
    transformer = Transformer(str(folder / "network"), max_seq_length=limit)
    include_prompt = options.pop("include_prompt", True)
    modules = [transformer, Pooling(WIDTH, pooling, include_prompt=include_prompt), *after]
    library = SentenceTransformer(modules=modules, device="cpu", **options)
    library.save_pretrained(str(folder / "repository"), create_model_card=False)
    return SentenceTransformer(str(folder / "repository"), device="cpu", local_files_only=True)


def assert_same(folder, library, texts=TEXTS, **options):
    encoder = TextEncoderConfig(f"hf:{folder / 'repository'}", **options).load()
    prompt = {"prompt": options["prompt"]} if "prompt" in options else {}
    expected = library.encode_document(texts, batch_size=4, **prompt)
    np.testing.assert_allclose(encoder.encode(texts).numpy(), expected, rtol=1e-5, atol=1e-5)
    return encoder


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model", MODELS)
def test_each_architecture(tmp_path, model, side):
    if model in ("bert", "t5") and side == "left":
        pytest.skip("the library's positions depend on the padding")
    pooling = "lasttoken" if model in ("qwen2", "qwen3", "mistral") else "mean"
    library = save_repository(tmp_path, model, Normalize(), pooling=pooling, side=side)
    encoder = assert_same(tmp_path, library)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(encoder.encode(TEXTS), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "pooling", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ("max", "cls", "lasttoken")]
)
@pytest.mark.parametrize("include_prompt", [True, False])
def test_each_pooling(tmp_path, pooling, side, include_prompt):
    prompts = {"prompts": {"document": "query : a"}}
    library = save_repository(tmp_path, "qwen3", pooling=pooling, side=side, include_prompt=include_prompt, **prompts)
    encoder = assert_same(tmp_path, library)
    assert encoder.identity.spec.preprocessing.get("pools_prefix", True) == include_prompt


def dense(inputs, outputs, activation, **options):
    torch.manual_seed(inputs)
    return Dense(inputs, outputs, activation_function=activation, **options)


def test_modules_after_the_pooling(tmp_path):
    modules = [
        dense(WIDTH, 24, torch.nn.Tanh()),
        LayerNorm(24),
        Dropout(0.5),
        dense(24, 24, torch.nn.GELU(), use_residual=True),
        dense(24, 16, torch.nn.Identity(), bias=False, use_residual=True),
        Normalize(),
    ]
    encoder = assert_same(tmp_path, save_repository(tmp_path, "bert", *modules))
    spec = encoder.identity.spec
    names = ["Dense(Tanh)", "LayerNorm", "Dropout", "Dense(GELU, residual)", "Dense(Identity, residual)", "Normalize"]
    assert spec.preprocessing["modules"] == ["Transformer", "Pooling", *names]
    assert spec.dim == 16
    assert load_recorded(Identity.from_json(encoder.identity.to_json())).identity == encoder.identity
    half = TextEncoderConfig(f"hf:{tmp_path / 'repository'}", precision="bfloat16").load().encode(TEXTS)
    assert torch.cosine_similarity(half, encoder.encode(TEXTS)).min() > 0.99


def test_weights_of_modules_are_a_part_of_the_digest(tmp_path):
    found = set()
    for seed in (24, 25):
        folder = tmp_path / str(seed)
        save_repository(folder, "bert", dense(WIDTH, seed, torch.nn.Tanh()))
        (folder / "repository" / "2_Dense" / "model.safetensors").exists()
        found.add(TextEncoderConfig(f"hf:{folder / 'repository'}").load().identity.spec.weights)
    plain = TextEncoderConfig(f"hf:{tmp_path / '24' / 'repository'}", pooling="mean").load().identity.spec
    assert len(found | {plain.weights}) == 3
    assert plain.preprocessing == {"prefix": "", "token_limit": 20}


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({}, None, ""),
        ({"query": "query : ", "document": ""}, None, ""),
        ({"query": "query : ", "document": "a : "}, "query", "a : "),
        ({"query": "query : ", "passage": "the : "}, None, "the : "),
    ],
)
def test_prompt_for_documents(tmp_path, prompts, default, expected):
    save_repository(tmp_path, prompts=prompts, default_prompt_name=default)
    if "document" not in prompts:  # the library adds the names
        change(tmp_path, "config_sentence_transformers.json", prompts=prompts)
    library = SentenceTransformer(str(tmp_path / "repository"), device="cpu")
    encoder = TextEncoderConfig(f"hf:{tmp_path / 'repository'}").load()
    np.testing.assert_allclose(encoder.encode(TEXTS), library.encode(TEXTS, prompt=expected), rtol=1e-5, atol=1e-5)
    assert encoder.identity.spec.preprocessing["prefix"] == expected


def test_prompt_of_the_user(tmp_path):
    library = save_repository(tmp_path, prompts={"document": "a : "})
    encoder = assert_same(tmp_path, library, prompt="query : ")
    recorded = TextEncoderConfig.recorded(encoder.identity)
    assert (recorded.pooling, recorded.prompt) == (None, "query : ")
    assert recorded.matches(encoder.identity.spec) is False  # the id of a folder is not its path
    assert load_recorded(encoder.identity).identity == encoder.identity


def test_default_prompt_without_one_for_documents(tmp_path):
    save_repository(tmp_path)
    change(tmp_path, "config_sentence_transformers.json", prompts={"sts": "query : "}, default_prompt_name="sts")
    library = SentenceTransformer(str(tmp_path / "repository"), device="cpu")
    encoder = TextEncoderConfig(f"hf:{tmp_path / 'repository'}").load()
    np.testing.assert_allclose(encoder.encode(TEXTS), library.encode(TEXTS), rtol=1e-5, atol=1e-5)


def test_lower_case_and_limit(tmp_path):
    save_repository(tmp_path)
    change(tmp_path, "sentence_bert_config.json", max_seq_length=5, do_lower_case=True)
    encoder = assert_same(tmp_path, SentenceTransformer(str(tmp_path / "repository"), device="cpu"))
    assert encoder.identity.spec.preprocessing["lowercase"] is True
    assert encoder.identity.spec.preprocessing["token_limit"] == 5
    assert torch.equal(encoder.encode(["A CAT"]), encoder.encode(["a cat"]))


def test_configs_of_earlier_versions(tmp_path):
    library = save_repository(tmp_path, "bert", pooling=("cls", "max"))
    modules = json.loads((tmp_path / "repository" / "modules.json").read_text())
    for module, name in zip(modules, ("Transformer", "Pooling"), strict=True):
        module["type"] = f"sentence_transformers.models.{name}"
    (tmp_path / "repository" / "modules.json").write_text(json.dumps(modules))
    pooling = {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    pooling |= {"pooling_mode_max_tokens": True, "pooling_mode_mean_sqrt_len_tokens": False}
    (tmp_path / "repository" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "repository" / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": false}')
    assert assert_same(tmp_path, library).identity.spec.pooling == "cls+max"


def change(folder, file, **settings):
    path = folder / "repository" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "modality_config is"),
        ("sentence_bert_config.json", {"module_output_name": "other"}, "module_output_name is 'other'"),
        ("sentence_bert_config.json", {"query_expansion": {"length": 4}}, "query_expansion is"),
        ("sentence_bert_config.json", {"config_kwargs": {"is_decoder": True}}, "config_kwargs is"),
        ("1_Pooling/config.json", {"pooling_mode": "first"}, "its pooling is 'first', expected one of cls, mean"),
        ("2_Dense/config.json", {"activation_function": "os.system"}, "has the activation os.system"),
        ("2_Dense/config.json", {"activation_function": "torch.load"}, "has the activation torch.load"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
        ("2_Dense/config.json", {"out_features": 7}, "do not match its config"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "its model_type is 'SparseEncoder'"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "default_prompt_name is 'x'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path, file, settings, message):
    save_repository(tmp_path, "bert", dense(WIDTH, 8, torch.nn.Tanh()))
    change(tmp_path, "config_sentence_transformers.json", prompts={})
    change(tmp_path, file, **settings)
    with pytest.raises(UserError, match=message):
        TextEncoderConfig(f"hf:{tmp_path / 'repository'}").load()
    TextEncoderConfig(f"hf:{tmp_path / 'repository'}", pooling="mean").load()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([("custom_st.Transformer", "")], "module custom_st.Transformer is code of its own"),
        ([("sentence_transformers.models.StaticEmbedding", "")], "lists StaticEmbedding, expected Transformer"),
        ([("sentence_transformers.models.Transformer", "0_Transformer")], "Transformer in its root"),
        ([("sentence_transformers.models.Transformer", ""), ("sentence_transformers.models.Pooling", "../x")], "path"),
    ],
)
def test_other_modules_are_refused(tmp_path, modules, message):
    save_repository(tmp_path)
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)]
    (tmp_path / "repository" / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=message):
        TextEncoderConfig(f"hf:{tmp_path / 'repository'}").load()


def test_module_without_counterpart_is_refused(tmp_path):
    save_repository(tmp_path, "bert", dense(WIDTH, 8, torch.nn.Tanh()))
    modules = json.loads((tmp_path / "repository" / "modules.json").read_text())
    modules[2]["type"] = f"sentence_transformers.models.{WeightedLayerPooling.__name__}"
    (tmp_path / "repository" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="WeightedLayerPooling comes after Pooling, expected one of Dense"):
        TextEncoderConfig(f"hf:{tmp_path / 'repository'}").load()
    (tmp_path / "repository" / "modules.json").write_text("{}")
    with pytest.raises(UserError, match="Transformer in its root"):
        TextEncoderConfig(f"hf:{tmp_path / 'repository'}").load()


def test_pickled_weights_are_not_loaded(tmp_path):
    save_repository(tmp_path, "bert", dense(WIDTH, 8, torch.nn.Tanh()))
    (tmp_path / "repository" / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled weights are not loaded"):
        TextEncoderConfig(f"hf:{tmp_path / 'repository'}").load()
