"""Joined encoders: their features are concatenated from the arrays of one store, when trained and when loaded."""

import itertools
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import identity
from released_file import save_encoders
from small_world import SHADES, draw, save_run, write_captioned
from tiny_models import save_image_processor, save_randomised, save_tokenizer
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from sail_align.align import pretrained
from sail_align.align.data.cache import Cache
from sail_align.align.data.loader import Stream
from sail_align.align.data.pairs import open_pairs, read_rows
from sail_align.align.fit import fit
from sail_align.align.hub.embeddings import write_embeddings
from sail_align.align.hub.folder import read_hub_folder, write_hub_folder
from sail_align.align.hub.model_card import model_card
from sail_align.align.hub.onnx_whole import write_whole
from sail_align.align.hub.sentence_transformers import write_sentence_transformers
from sail_align.align.runs.checkpoint import load_run
from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.evaluator import evaluate_sets
from sail_align.evaluate.models import Encoders
from sail_align.evaluate.trace import State, _training_store
from sail_align.extract.data import Status
from sail_align.extract.encoders.identity import EncoderChangedError, Identity
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig, load_recorded
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store.store import Store

BOTH = {"image_encoder": "fake-image+other-image", "text_encoder": "other-text+fake-text"}


def other(modality, dim, name=None):
    recorded = identity(modality, dim=dim)
    return replace(recorded, spec=replace(recorded.spec, id=name or f"other-{modality}"))


def add_array(path, recorded, caption="", bad=()):
    """Add an array of random features, NaN in the bad rows."""
    store = Store.open(path)
    array = store.add(recorded, caption)
    random = np.random.default_rng(recorded.spec.dim)
    features = random.normal(size=(array.rows, array.dim)).astype(np.float16)
    status = np.zeros(array.rows, np.uint8)
    features[list(bad)], status[list(bad)] = np.nan, Status.MISSING
    for shard in array.shards:
        span = slice(*array.span(shard))
        array.write(shard, features[span], status[span])


@pytest.fixture
def store(make_store):
    """A store with two image encoders, of 12 and 5 features, and two text encoders, of 8 and 3."""
    path = make_store(rows=300, captions={"raw": (), "long": (7,)}, bad=(3,), shard_rows=256)
    add_array(path, other("image", 5), bad=(4, 5))
    for caption in ("raw", "long"):
        add_array(path, other("text", 3), caption)
    return path


def test_joined_features_are_those_of_the_encoders_side_by_side(store):
    opened = Store.open(store)
    parts = [opened.image(name) for name in ("other-image", "fake-image")]
    joined = opened.image("other-image+fake-image")
    features, status = joined.read(10, 130)
    expected = np.concatenate([part.read(10, 130)[0] for part in parts], axis=1)
    np.testing.assert_array_equal(features, expected)
    assert status.tolist() == [0] * 120
    assert (joined.dim, joined.rows, joined.path) == (17, 300, "image/other-image+fake-image")
    assert np.flatnonzero(joined.read_status()).tolist() == [3, 4, 5]
    assert joined.counts == {"ok": 297, "missing": 3}
    np.testing.assert_array_equal(joined.chunk(2), np.concatenate([part.chunk(2) for part in parts], axis=1))


@pytest.mark.slow
def test_stream_serves_the_rows_that_each_encoder_alone_would_serve(store):
    """Joined batches equal a NumPy concatenation of the batches of each encoder, in the same order."""

    def batches(image, text, rows):
        pairs = open_pairs([store], ["raw", "long"], image_encoder=image, text_encoder=text)
        with Stream(pairs, rows, batch_size=40, seed=3, buffer_rows=64) as stream:
            return [(a.images.numpy().copy(), a.texts.numpy().copy()) for a, _ in itertools.islice(stream.batches(), 9)]

    rows = [each.usable() for each in open_pairs([store], ["raw", "long"], **BOTH)]
    assert rows[0].sum() == 300 - 4
    joined = batches(*BOTH.values(), rows)
    first, second = batches("fake-image", "other-text", rows), batches("other-image", "fake-text", rows)
    for (images, texts), (a, c), (b, d) in zip(joined, first, second, strict=True):
        np.testing.assert_array_equal(images, np.concatenate([a, b], axis=1))
        np.testing.assert_array_equal(texts, np.concatenate([c, d], axis=2))


@pytest.mark.parametrize("device", [torch.device("cpu"), None])
def test_joined_features_in_memory_give_the_same_batches(store, device):
    pairs = open_pairs([store], ["raw", "long"], **BOTH)
    with (
        Stream(pairs, [each.usable() for each in pairs], batch_size=40, seed=3, buffer_rows=64) as stream,
        Cache(stream, device) as cache,
    ):
        for (got, _), (expected, _) in itertools.islice(zip(cache.batches(), stream.batches(), strict=True), 9):
            assert torch.equal(got.images, expected.images)
            assert torch.equal(got.texts, expected.texts)


@pytest.mark.slow
def test_pairs_of_joined_encoders_are_read_and_pickled(store):
    (pairs,) = opened = open_pairs([store], ["raw"], **BOTH)
    copy = pickle.loads(pickle.dumps(pairs))  # noqa: S301
    assert copy.digest == pairs.digest
    assert pairs.digest == pairs.store.digest_of(pairs.parts)
    images, texts = read_rows(opened, [pairs.usable()])
    assert (images.shape, texts.shape) == ((297, 17), (1, 297, 11))
    data = pairs.store.torch_dataset("raw", **BOTH)
    image, text = pickle.loads(pickle.dumps(data))[0]  # noqa: S301
    assert torch.equal(image, torch.from_numpy(images[0].astype(np.float32)))
    assert torch.equal(text, torch.from_numpy(texts[0, 0].astype(np.float32)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fake-image+fake-image", "names an encoder twice"),
        ("fake-image+nothing", "no image features of encoder 'nothing'"),
        (None, "several encoders. Choose one with --image-encoder: fake-image, other-image, or join some with +"),
    ],
)
def test_wrong_names_are_refused(store, name, message):
    with pytest.raises(UserError, match=message.replace("+", "[+]")):
        Store.open(store).image(name)


def test_damage_in_either_array_is_found(store):
    file = next((store / "image" / "other-image" / "features" / "c").rglob("0/0"))
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    pairs = open_pairs([store], ["raw"], **BOTH)
    with pytest.raises(UserError, match=r"other-image.* is damaged"):
        read_rows(pairs, [each.usable() for each in pairs])


@pytest.fixture
def run(store, tmp_path):
    result = fit(store, out=tmp_path / "run", head="linear", dim=4, steps=3, batch_size=64, quiet=True, **BOTH)
    return load_run(result.run)


def test_run_records_all_encoders(run, store):
    assert [each.spec.id for each in run.image.parts] == ["fake-image", "other-image"]
    assert [each.spec.id for each in run.text.parts] == ["other-text", "fake-text"]
    assert (run.architecture["image_dim"], run.architecture["text_dim"]) == (17, 11)
    assert len(run.settings["image_encoders"]) == 2
    states = [link.state for link in _links(store, run)]
    assert State.CHANGED not in states
    add_array(store, other("image", 6, "third-image"))
    links = list(_links(store, run))
    assert links[0].state is State.OK
    assert "to which others were added" in links[0].detail


def _links(store, run):
    digests = run.settings["store_digests"][0], run.settings["features_digests"][0]
    return list(_training_store(str(store), *digests, run.settings, {}))


@pytest.mark.slow
def test_single_encoders_record_what_they_did_before(make_store, tmp_path):
    path = make_store("single")
    result = fit(path, out=tmp_path / "single", head="linear", dim=4, steps=2, batch_size=64, quiet=True)
    run = load_run(result.run)
    assert not {"image_encoders", "text_encoders"} & run.settings.keys()
    assert "parts" not in json.loads((result.run / "checkpoints" / "step-00000002" / "model.json").read_text())["image"]


def test_embeddings_of_a_store_come_from_joined_features(run, store, tmp_path):
    write_embeddings(run, Store.open(store), "npy", tmp_path / "embeddings", captions=["raw"])
    written = np.load(next((tmp_path / "embeddings").rglob("img_emb*.npy")))
    features, status = Store.open(store).image(BOTH["image_encoder"]).read()
    with torch.no_grad():
        expected = run.model.encode_image(torch.from_numpy(features[status == 0]).float())
    np.testing.assert_allclose(written, expected.numpy(), atol=1e-6)


def test_export_keeps_the_encoders(run, tmp_path):
    write_hub_folder(run, tmp_path / "export", "card")
    again = read_hub_folder(tmp_path / "export")
    assert again.image == run.image
    assert not (tmp_path / "export" / "preprocessor_config.json").exists()


@pytest.fixture
def joined_run(encoders, tmp_path):
    image, text = (Identity.joined([each.identity for each in side]) for side in encoders)
    return save_run(tmp_path / "runs" / "joined", image, text)


@pytest.mark.slow
def test_exports_that_need_single_encoders_are_refused(joined_run, tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(UserError, match=r"needs single encoders, got .*[+].* Leave it out"):
        write_sentence_transformers(load_run(joined_run), tmp_path / "out", lambda usage: usage)
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match=r"needs the output of one encoder, got .*[+].* Leave --whole out"):
        write_whole(joined_run, tmp_path / "out")
    card = model_card(load_run(joined_run), [], "mit")
    assert card.count("folder:vit-") == 2  # in the introduction and in its row


def test_identity_of_joined_encoders_survives_json_and_refuses_forgeries():
    parts = [identity("image", dim=4), other("image", 5)]
    joined = Identity.joined(parts)
    record = json.loads(json.dumps(joined.to_json()))
    assert Identity.from_json(record) == joined
    assert joined.spec.dim == 9
    assert Identity.joined(parts[:1]) is parts[0]
    joined.check_matches(joined, "here")
    with pytest.raises(EncoderChangedError):
        joined.check_matches(Identity.joined(parts[::-1]), "here")
    with pytest.raises(EncoderChangedError):
        joined.check_matches(parts[0], "here")
    for forged in (
        {**record, "parts": record["parts"][:1]},
        {**record, "parts": record["parts"][::-1]},
        {**record, "parts": [record, record]},
    ):
        with pytest.raises(ValueError, match="parts is invalid"):
            Identity.from_json(forged)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Two tiny image encoders, of different pixels and patches, and two tiny text encoders."""
    folder = tmp_path_factory.mktemp("encoders")
    image, text = save_encoders(folder)
    tiny = {"num_hidden_layers": 1, "num_attention_heads": 2}
    other = ViTModel(ViTConfig(hidden_size=16, intermediate_size=24, image_size=32, patch_size=8, **tiny))
    save_randomised(other, folder / "other-image")
    save_image_processor(folder / "other-image", size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    config = BertConfig(hidden_size=16, intermediate_size=24, vocab_size=32, max_position_embeddings=64, **tiny)
    save_randomised(BertModel(config), folder / "other-text")
    save_tokenizer(folder / "other-text", limit=12)
    images = [ImageEncoderConfig(f"hf:{path}", pooling="cls").load() for path in (image, folder / "other-image")]
    texts = [TextEncoderConfig(f"hf:{path}", pooling="mean").load() for path in (text, folder / "other-text")]
    return images, texts


def test_joined_model_embeds_as_its_encoders_do(encoders, joined_run):
    """Pixels and tokens of `preprocess` and `tokenizer` give what pictures and texts give."""
    images, texts = encoders
    model = pretrained.load(joined_run, device="cpu")
    pictures, sentences = [draw(n, colour) for n, colour in enumerate(SHADES.values())], ["a red cat", "dogs"]
    pixels = [torch.stack([each.preprocess(picture) for picture in pictures]) for each in images]
    features = torch.cat([each.encode(part) for each, part in zip(images, pixels, strict=True)], dim=1)
    expected = torch.nn.functional.normalize(model.alignment.encode_image(features.half().float()))
    torch.testing.assert_close(model.encode_image(pictures), expected.detach())
    from_pixels = model.encode_image(torch.stack([model.preprocess(picture) for picture in pictures]))
    torch.testing.assert_close(from_pixels, expected.detach())
    features = torch.cat([each.encode(sentences) for each in texts], dim=1)
    expected = torch.nn.functional.normalize(model.alignment.encode_text(features.half().float()))
    torch.testing.assert_close(model.encode_text(sentences), expected.detach())
    torch.testing.assert_close(model.encode_text(model.tokenizer(sentences)), expected.detach())
    with pytest.raises(UserError, match="dense"):
        model.segment(pictures[0], ["red", "green"])


def test_joined_encoders_are_loaded_with_their_own_checks(encoders):
    images, _ = encoders
    joined = Identity.joined([each.identity for each in images])
    assert load_recorded(joined).identity == joined
    changed = replace(joined.parts[1], golden=[-value for value in joined.parts[1].golden])
    with pytest.raises(EncoderChangedError, match="cosine"):
        load_recorded(Identity.joined([joined.parts[0], changed]))


@pytest.mark.slow
def test_joined_run_is_scored_as_it_embeds(joined_run, tmp_path):
    """One pass fills an array per encoder; the stores of evaluation sets serve the next call without encoders."""
    run = load_run(joined_run)
    manifest = find_manifest(str(write_captioned(tmp_path / "photos", rows=20)))
    (record,) = evaluate_sets(run, [manifest], features=tmp_path / "features", quiet=True, stop_at_fault=True)
    stores = [Store.open(path) for path in (tmp_path / "features" / "eval").glob("*.zarr")]
    assert sorted(len(store.arrays()) for store in stores) == [2, 2]
    data = EvaluationSet(*manifest, Encoders(run), tmp_path / "features" / "eval", quiet=True)
    data.encoders.__dict__["image"] = data.encoders.__dict__["text"] = None  # nothing is left to encode
    embeddings = data.images()
    expected = pretrained.load(run.path, device="cpu").encode_image([draw(0, SHADES["red"])])
    np.testing.assert_allclose(embeddings[:1], expected.numpy(), atol=1e-5)
    assert record["items"] == 20
