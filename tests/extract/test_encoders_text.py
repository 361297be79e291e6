"""Text encoders: pooling, padding, prefix and truncation, on small models with random weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_randomised, save_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    GteConfig,
    GteModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
)

from sail_align.extract.encoders import weights as checkpoints
from sail_align.extract.encoders.catalogue import TEXT, TransformersText
from sail_align.extract.encoders.identity import GOLDEN_LONG_COSINE, GOLDEN_TEXTS, Identity
from sail_align.extract.encoders.load import TextEncoderConfig, load_recorded
from sail_align.extract.encoders.text import NO_TOKEN
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
COMMIT = "0123456789" * 4
SHORT, LONG = "the dog", "the red cat sleeps on the green bench and a dog runs on the grass with the cat"


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    return save_randomised(MODELS[request.param](), tmp_path), save_tokenizer(tmp_path), tmp_path


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_features_agree_with_the_model(saved, pooling):
    model, tokenizer, folder = saved
    features = TextEncoderConfig(f"hf:{folder}", pooling=pooling).load().encode([SHORT, LONG])
    for text, feature in zip([SHORT, LONG], features, strict=True):
        with torch.inference_mode():
            hidden_TD = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = {"cls": hidden_TD[0], "mean": hidden_TD.mean(0), "last": hidden_TD[-1]}[pooling]
        torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_features_do_not_depend_on_the_batch(tmp_path, side, pooling):
    save_randomised(MODELS["gte"](), tmp_path)  # rotary positions: padding on the left shifts all of them equally
    save_tokenizer(tmp_path, padding_side=side)
    encoder = TextEncoderConfig(f"hf:{tmp_path}", pooling=pooling).load()
    together = encoder.encode([SHORT, LONG, "a"])
    alone = torch.cat([encoder.encode([text]) for text in (SHORT, LONG, "a")])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_prefix_is_put_before_each_text_and_recorded(saved, monkeypatch):
    _, _, folder = saved
    plain = TextEncoderConfig(f"hf:{folder}", pooling="mean").load()
    monkeypatch.setitem(TEXT, "e5-small", TransformersText(folder, "mean", prefix="query: "))
    prefixed = TextEncoderConfig("e5-small").load()
    assert torch.equal(prefixed.encode([SHORT]), plain.encode(["query: " + SHORT]))
    assert prefixed.identity.spec.preprocessing["prefix"] == "query: "
    assert prefixed.identity.spec.fingerprint != plain.identity.spec.fingerprint


def test_long_texts_are_truncated(saved, monkeypatch):
    _, _, folder = saved
    monkeypatch.setitem(TEXT, "short", TransformersText(folder, "mean", token_limit=6))
    encoder = TextEncoderConfig("short").load()
    assert torch.equal(encoder.encode([LONG]), encoder.encode(["the red cat sleeps"]))
    assert encoder.identity.spec.preprocessing["token_limit"] == 6


def test_token_limit_of_the_tokenizer_is_kept(saved):
    encoder = TextEncoderConfig(f"hf:{saved[2]}", pooling="mean").load()
    assert encoder.identity.spec.preprocessing["token_limit"] == 64
    assert encoder.encode([LONG * 10]).isfinite().all()


def test_recorded_encoder_is_loaded(saved):
    identity = TextEncoderConfig(f"hf:{saved[2]}", pooling="last").load().identity
    assert load_recorded(Identity.from_json(json.loads(json.dumps(identity.to_json())))).identity == identity


def test_changed_weights_are_rejected(saved, tmp_path):
    model, _, folder = saved
    identity = TextEncoderConfig(f"hf:{folder}", pooling="cls").load().identity
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="has changed"):
        load_recorded(identity)


def test_reference_needs_a_pooling(saved):
    with pytest.raises(UserError, match=r"needs a pooling. Choose one of: cls, mean, last"):
        TextEncoderConfig(f"hf:{saved[2]}").load()


def test_code_in_a_local_folder_is_not_run(tmp_path):
    save_tokenizer(tmp_path)
    code = {"AutoConfig": "foreign.ForeignConfig", "AutoModel": "foreign.ForeignModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": code}))
    (tmp_path / "foreign.py").write_text("raise RuntimeError('the code was run')")
    save_file({"words.weight": torch.zeros(32, 8)}, tmp_path / "model.safetensors")
    for allowed in ((), ("owner/foreign@" + COMMIT,)):
        with pytest.raises(UserError, match=r"foreign.ForeignModel needs its own code to run"):
            TextEncoderConfig(f"hf:{tmp_path}", pooling="cls", allow_remote_code=allowed).load()


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


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """The folder of a repository `owner/foreign` with code of its own, and its vectors of words."""
    folder = tmp_path / COMMIT
    save_tokenizer(folder)
    code = {"AutoConfig": "foreign.ForeignConfig", "AutoModel": "foreign.ForeignModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": code}))
    (folder / "foreign.py").write_text(CODE)
    words = torch.randn(32, 8)
    save_file({"words.weight": words}, folder / "model.safetensors")
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *args, **kwargs: str(folder))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder, words


ALLOWED = ("owner/foreign@" + COMMIT,)


def test_allowed_code_at_a_pinned_commit_is_run(foreign):
    folder, words = foreign
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for name in ("hf:owner/foreign", "hf:owner/foreign@" + COMMIT):
        encoder = TextEncoderConfig(name, "mean", allow_remote_code=ALLOWED).load()
        torch.testing.assert_close(encoder.encode([SHORT])[0], words[tokenizer(SHORT)["input_ids"]].mean(0))
        assert load_recorded(encoder.identity, allow_remote_code=ALLOWED).identity == encoder.identity
    with pytest.raises(UserError, match=r"foreign.ForeignModel needs its own code to run.*--allow-remote-code"):
        load_recorded(encoder.identity)


@pytest.mark.parametrize(
    ("revision", "allowed", "message"),
    [
        ("@" + COMMIT, (), "needs its own code to run"),
        ("", ("other/foreign@" + COMMIT,), "needs its own code to run"),
        ("", ("owner/foreign@main",), r"--allow-remote-code 'owner/foreign@main' is invalid.*40 digits"),
        ("", ("owner/foreign",), "is invalid: expected <owner>/<name>@<revision>"),
        ("@main", ALLOWED, "is not for encoder 'hf:owner/foreign@main' at revision 'main'"),
    ],
)
def test_code_is_not_run_otherwise(foreign, revision, allowed, message):
    (foreign[0] / "foreign.py").write_text("raise RuntimeError('the code was run')")
    with pytest.raises(UserError, match=message):
        TextEncoderConfig("hf:owner/foreign" + revision, "mean", allow_remote_code=allowed).load()


def test_code_of_another_repository_is_not_run(foreign):
    code = {"AutoConfig": "foreign.ForeignConfig", "AutoModel": "other/repository--foreign.ForeignModel"}
    (foreign[0] / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": code}))
    with pytest.raises(UserError, match="is in another repository"):
        TextEncoderConfig("hf:owner/foreign", "mean", allow_remote_code=ALLOWED).load()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_compiling_keeps_identity_and_features(tmp_path):
    save_randomised(MODELS["bert"](), tmp_path)
    save_tokenizer(tmp_path)
    plain, compiled = (
        TextEncoderConfig(f"hf:{tmp_path}", pooling="mean", compiled=how).load() for how in (False, True)
    )
    assert compiled.identity.spec == plain.identity.spec
    texts = [SHORT, LONG, "a"]
    torch.testing.assert_close(compiled.encode(texts), plain.encode(texts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize(("kind", "heads", "sharpness"), [("gte", 1, 2), ("modernbert", 2, 1)])
def test_half_precision_agrees_with_float32_on_a_long_text(tmp_path, monkeypatch, kind, heads, sharpness, precision):
    """Rounded rotary frequencies turn the last of 512 tokens too far: to cosines of 0.97 and 0.991."""
    for name, value in (("max_position_embeddings", 512), ("hidden_size", 128), ("num_attention_heads", heads)):
        monkeypatch.setitem(TINY, name, value)
    model = MODELS[kind]()
    save_randomised(model, tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:  # GTE's attention otherwise hardly depends on positions
                parameter *= sharpness
    model.save_pretrained(tmp_path)
    tokenizer = save_tokenizer(tmp_path, limit=512)
    text = " ".join(f"{SHORT} {word}" for word in (LONG.split() * 10)[:170])
    assert len(tokenizer(text)["input_ids"]) == 512
    full, half = (
        TextEncoderConfig(f"hf:{tmp_path}", pooling="cls", precision=each).load() for each in ("float32", precision)
    )
    assert torch.cosine_similarity(full.encode([text]), half.encode([text])).item() > 0.999
    recorded = [torch.tensor(each.identity.golden_long) for each in (full, half)]
    assert torch.cosine_similarity(*recorded, dim=0) > GOLDEN_LONG_COSINE
    torch.testing.assert_close(recorded[0], full.encode([GOLDEN_TEXTS[1]])[0], rtol=1e-4, atol=1e-5)


def test_encoder_that_differs_on_long_texts_only_is_rejected(saved):
    _, _, folder = saved
    now = TextEncoderConfig(f"hf:{folder}", pooling="cls").load().identity
    turned = replace(now, golden_long=now.golden_long[::-1])
    with pytest.raises(
        UserError, match=r"features of a fixed long text have a cosine of .*, expected at least 0\.99\."
    ):
        now.check_matches(turned, where="a store")
    earlier = {name: value for name, value in now.to_json().items() if name != "golden_long"}
    now.check_matches(Identity.from_json(earlier), where="a store of an earlier version")


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_encode_tokens_agrees_with_encode(saved, pooling):
    """This holds even if a text contains the padding token: tensors are filled with `NO_TOKEN` instead."""
    _, _, folder = saved
    encoder = TextEncoderConfig(f"hf:{folder}", pooling=pooling).load()
    texts = [LONG, SHORT, "the [PAD] dog [PAD]", "a"]
    tokens_BT = encoder.tokenize(texts)
    assert (tokens_BT.dtype, tokens_BT.shape) == (torch.int64, (4, 64))
    assert tokens_BT[2, :7].tolist() == [2, 7, 0, 8, 0, 3, NO_TOKEN]
    torch.testing.assert_close(encoder.encode_tokens(tokens_BT), encoder.encode(texts), rtol=1e-5, atol=1e-5)
