"""Text encoders: pooling, padding, prefix and truncation, on small models with random weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_randomised, save_tokenizer
from transformers import BertConfig, BertModel, GteConfig, GteModel, ModernBertConfig, ModernBertModel

from sail_align.extract.encoders import load
from sail_align.extract.encoders import weights as checkpoints
from sail_align.extract.encoders.base import Identity
from sail_align.extract.encoders.catalogue import Folder, TransformersText
from sail_align.extract.encoders.load import load_recorded, load_text_encoder
from sail_align.extract.encoders.runtime import can_compile
from sail_align.extract.encoders.transformers_text import NO_TOKEN
from sail_align.extract.errors import UserError

TINY = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**TINY)),
    "gte": lambda: GteModel(GteConfig(**TINY, rope_parameters=ROPE)),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(**TINY, bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3)
    ),
}
SHORT, LONG = "the dog", "the red cat sleeps on the green bench and a dog runs on the grass with the cat"


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    return save_randomised(MODELS[request.param](), tmp_path), save_tokenizer(tmp_path), tmp_path


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_features_are_those_of_the_model_itself(saved, pooling):
    model, tokenizer, folder = saved
    features = load_text_encoder(f"hf:{folder}", pooling=pooling).encode([SHORT, LONG])
    for text, feature in zip([SHORT, LONG], features, strict=True):
        with torch.inference_mode():
            hidden_TD = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = {"cls": hidden_TD[0], "mean": hidden_TD.mean(0), "last": hidden_TD[-1]}[pooling]
        torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_features_do_not_depend_on_the_batch(tmp_path, side, pooling):
    save_randomised(MODELS["gte"](), tmp_path)  # rotary positions: padding on the left shifts all alike
    save_tokenizer(tmp_path, padding_side=side)
    encoder = load_text_encoder(f"hf:{tmp_path}", pooling=pooling)
    together = encoder.encode([SHORT, LONG, "a"])
    alone = torch.cat([encoder.encode([text]) for text in (SHORT, LONG, "a")])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_prefix_goes_before_each_text_and_into_the_identity(saved, monkeypatch):
    _, _, folder = saved
    plain = load_text_encoder(f"hf:{folder}", pooling="mean")
    monkeypatch.setattr(load, "find_text", lambda name: TransformersText(Folder(folder), "mean", prefix="query: "))
    prefixed = load_text_encoder("e5-small")
    assert torch.equal(prefixed.encode([SHORT]), plain.encode(["query: " + SHORT]))
    assert prefixed.identity.spec.preprocessing["prefix"] == "query: "
    assert prefixed.identity.spec.fingerprint != plain.identity.spec.fingerprint


def test_a_text_beyond_the_limit_is_cut(saved, monkeypatch):
    _, _, folder = saved
    monkeypatch.setattr(load, "find_text", lambda name: TransformersText(Folder(folder), "mean", token_limit=6))
    encoder = load_text_encoder("short")
    assert torch.equal(encoder.encode([LONG]), encoder.encode(["the red cat sleeps"]))
    assert encoder.identity.spec.preprocessing["token_limit"] == 6


def test_the_tokenizers_own_limit_holds_too(saved):
    encoder = load_text_encoder(f"hf:{saved[2]}", pooling="mean")
    assert encoder.identity.spec.preprocessing["token_limit"] == 64
    assert encoder.encode([LONG * 10]).isfinite().all()


def test_a_recorded_encoder_is_loaded_again(saved):
    identity = load_text_encoder(f"hf:{saved[2]}", pooling="last").identity
    assert load_recorded(Identity.from_json(json.loads(json.dumps(identity.to_json())))).identity == identity


def test_changed_weights_are_refused(saved, tmp_path):
    model, _, folder = saved
    identity = load_text_encoder(f"hf:{folder}", pooling="cls").identity
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="made with encoder"):
        load_recorded(identity)


def test_a_hub_model_asks_for_a_pooling(saved):
    with pytest.raises(UserError, match="needs a pooling; use one of: cls, mean, last"):
        load_text_encoder(f"hf:{saved[2]}")


def test_code_in_a_local_folder_has_no_pinned_commit_and_is_not_run(tmp_path):
    save_tokenizer(tmp_path)
    code = {"AutoConfig": "foreign.ForeignConfig", "AutoModel": "foreign.ForeignModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": code}))
    (tmp_path / "foreign.py").write_text("raise RuntimeError('the code was run')")
    save_file({"words.weight": torch.zeros(32, 8)}, tmp_path / "model.safetensors")
    for trust in (False, True):
        with pytest.raises(UserError, match=r"needs its own code to run.*pin the commit"):
            load_text_encoder(f"hf:{tmp_path}", pooling="cls", trust_remote_code=trust)


CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class ForeignConfig(PreTrainedConfig):
    model_type = "foreign"


class ForeignModel(PreTrainedModel):
    config_class = ForeignConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Embedding(32, 8)
        self.post_init()

    def forward(self, input_ids, **_):
        return BaseModelOutput(last_hidden_state=self.words(input_ids))
"""


def test_code_that_is_trusted_at_a_pinned_commit_is_run(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    folder = tmp_path / commit
    tokenizer = save_tokenizer(folder)
    code = {"AutoConfig": "foreign.ForeignConfig", "AutoModel": "foreign.ForeignModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": code}))
    (folder / "foreign.py").write_text(CODE)
    words = torch.randn(32, 8)
    save_file({"words.weight": words}, folder / "model.safetensors")
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *args, **kwargs: str(folder))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    encoder = load_text_encoder(f"hf:owner/foreign@{commit}", pooling="mean", trust_remote_code=True)
    torch.testing.assert_close(encoder.encode([SHORT])[0], words[tokenizer(SHORT)["input_ids"]].mean(0))
    assert load_recorded(encoder.identity, trust_remote_code=True).identity == encoder.identity
    for revision, trust in (("@" + commit, False), ("@main", True), ("", True)):
        with pytest.raises(UserError, match="needs its own code to run"):
            load_text_encoder("hf:owner/foreign" + revision, pooling="mean", trust_remote_code=trust)

    code["AutoModel"] = "other/repository--foreign.ForeignModel"
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": code}))
    with pytest.raises(UserError, match="lies in another repository"):
        load_text_encoder(f"hf:owner/foreign@{commit}", pooling="mean", trust_remote_code=True)


@pytest.mark.slow
def test_a_compiled_encoder_is_the_same_encoder(tmp_path):
    if not can_compile("cpu"):
        pytest.skip("needs a C++ compiler")
    save_randomised(MODELS["bert"](), tmp_path)
    save_tokenizer(tmp_path)
    plain, compiled = (load_text_encoder(f"hf:{tmp_path}", pooling="mean", compiled=how) for how in (False, True))
    assert compiled.identity.spec == plain.identity.spec
    texts = [SHORT, LONG, "a"]
    torch.testing.assert_close(compiled.encode(texts), plain.encode(texts), rtol=1e-4, atol=1e-5)


def test_without_a_compiler_compiling_is_known_not_to_work(monkeypatch):
    def refuse(function):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    assert not can_compile("cpu")


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_tokens_in_a_tensor_give_what_their_texts_give(saved, pooling):
    """Also where the padding token is a word of the text: what stands behind a text's end is no token."""
    _, _, folder = saved
    encoder = load_text_encoder(f"hf:{folder}", pooling=pooling)
    texts = [LONG, SHORT, "the [PAD] dog [PAD]", "a"]
    tokens_BT = encoder.tokenize(texts)
    assert (tokens_BT.dtype, tokens_BT.shape) == (torch.int64, (4, 64))
    assert tokens_BT[2, :7].tolist() == [2, 7, 0, 8, 0, 3, NO_TOKEN]
    torch.testing.assert_close(encoder.encode_tokens(tokens_BT), encoder.encode(texts), rtol=1e-5, atol=1e-5)
