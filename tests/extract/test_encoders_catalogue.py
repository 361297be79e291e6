"""Names, and what is said to a user whose name, pooling, precision or device is wrong."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from sail_align.extract.encoders import weights as checkpoints
from sail_align.extract.encoders.catalogue import (
    TEXT,
    VISION,
    Folder,
    Hub,
    TimmVision,
    TransformersText,
    TransformersVision,
    find_text,
    find_vision,
)
from sail_align.extract.encoders.load import load_image_encoder, load_text_encoder
from sail_align.extract.encoders.weights import fetch
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Encoders


def test_the_papers_pair_is_the_default_of_a_manifest():
    default = Encoders()
    image, text = find_vision(default.image), find_text(default.text)
    assert (image.origin, image.pooling) == (Hub("facebook/dinov2-large"), "cls+mean")
    assert (text.origin, text.pooling, text.token_limit) == (Hub("Alibaba-NLP/gte-large-en-v1.5"), "cls", 1024)
    assert text.prefix == ""


@pytest.mark.parametrize("entry", [*VISION.values(), *TEXT.values()])
def test_every_entry_says_its_pooling(entry):
    assert entry.pooling is not None


def test_references_name_anything_else(tmp_path):
    assert find_vision("hf:owner/model") == TransformersVision(Hub("owner/model"))
    assert find_text("hf:owner/model@v2") == TransformersText(Hub("owner/model", "v2"))
    assert find_text(f"hf:{tmp_path}") == TransformersText(Folder(Path(tmp_path)))
    assert find_vision("timm:resnet18.a1_in1k") == TimmVision("resnet18.a1_in1k")


@pytest.mark.parametrize(
    ("find", "name", "sentence"),
    [
        (find_vision, "dinov2-larg", "Unknown image encoder 'dinov2-larg'; did you mean 'dinov2-large'"),
        (find_text, "gte-lage", "Unknown text encoder 'gte-lage'; did you mean 'gte-large'"),
        (find_vision, "gte-large", "Unknown image encoder 'gte-large'"),
        (find_text, "timm:resnet18", "Unknown text encoder"),
        (find_text, "hf:./no/such/folder", "neither a folder that exists nor a repository"),
        (find_vision, "hf:model", "neither a folder that exists nor a repository"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(find, name, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        find(name)
    if "Unknown" in sentence:
        assert all(known in str(refused.value) for known in (VISION if find is find_vision else TEXT))


@pytest.mark.parametrize(
    ("load", "settings", "sentence"),
    [
        (load_image_encoder, {"pooling": "max"}, "has no pooling 'max'; use one of: cls, mean, cls\\+mean"),
        (load_text_encoder, {"pooling": "cls+mean"}, "has no pooling 'cls\\+mean'; use one of: cls, mean, last"),
        (load_image_encoder, {"precision": "float8"}, "Unknown precision 'float8'; use one of: float32"),
        (load_text_encoder, {"device": "gpu"}, "Device 'gpu' is not available here"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_fetched(load, settings, sentence, monkeypatch):
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *args, **kwargs: pytest.fail("downloads"))
    name = "dinov2-large" if load is load_image_encoder else "gte-large"
    with pytest.raises(UserError, match=sentence):
        load(name, **settings)


def test_an_unknown_timm_model_is_answered_with_similar_ones():
    with pytest.raises(UserError, match="timm has no model 'resnet81'; did you mean"):
        load_image_encoder("timm:resnet81")


def test_a_repository_is_recorded_by_its_commit(tmp_path, monkeypatch):
    commit = "c" * 40
    snapshot = tmp_path / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *args, **kwargs: str(snapshot))
    found = fetch(Hub("owner/model"))
    assert found.source == {"loader": "hub", "repository": "owner/model", "revision": commit}
    assert found.location == ""


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (HFValidationError("bad"), "No repository 'owner/model'"),
        (LocalEntryNotFoundError("offline"), "cannot be had and is not in the local cache"),
        (RepositoryNotFoundError("404", response=Mock()), "No repository 'owner/model' at revision 'v9'"),
    ],
)
def test_a_repository_that_cannot_be_had_is_one_sentence(failure, sentence, monkeypatch):
    def refuse(*args, **kwargs):
        raise failure

    monkeypatch.setattr(checkpoints, "snapshot_download", refuse)
    with pytest.raises(UserError, match=sentence):
        fetch(Hub("owner/model", "v9"))


def test_the_digest_of_sharded_weights_depends_on_every_shard_and_their_order(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    first, second = tmp_path / "model-1-of-2.safetensors", tmp_path / "model-2-of-2.safetensors"
    digests = set()
    for contents in ((b"a", b"b"), (b"b", b"a"), (b"a", b"c"), (b"ab", b"")):
        for file, content in zip((first, second), contents, strict=True):
            file.write_bytes(content)
        digests.add(fetch(Folder(tmp_path)).digest)
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "has no config.json"),
        ({"config.json": "[1]"}, "holds list where a JSON object is expected"),
        ({"config.json": "{"}, "is not valid JSON"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "has no .safetensors file, and pickled weights are not"),
    ],
)
def test_a_folder_that_is_no_model_is_one_sentence(files, sentence, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        load_text_encoder(f"hf:{tmp_path}", pooling="cls")
