"""Features of intermediate layers, against the library's own states, and the store that holds several of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from released_file import save_encoders
from small_world import SHADES, draw, write_captioned
from tiny_models import save_image_processor, save_randomised
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTModel

from sail_align.extract.encoders.identity import EncoderSpec, Identity
from sail_align.extract.encoders.layers import parse_layers
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig, load_recorded
from sail_align.extract.encoders.preprocessing import ImagePreprocessing
from sail_align.extract.encoders.timm_models import TimmBackbone, load_classifier
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.errors import UserError
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.local import LocalExecutor
from sail_align.extract.executor.run import run_job
from sail_align.extract.executor.worker import Share
from sail_align.extract.manifest import find_manifest
from sail_align.extract.quality.doctor import diagnose
from sail_align.extract.quality.verify import verify_store
from sail_align.extract.store.store import Store

TEXTS = ["a red cat", "the dog sleeps on the green bench and a cat runs", "a"]
HALF = ImagePreprocessing(64, 64, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    save_encoders(folder)
    tiny = {"num_hidden_layers": 3, "num_attention_heads": 2}
    network = ViTModel(ViTConfig(hidden_size=16, intermediate_size=24, image_size=56, patch_size=14, **tiny))
    save_randomised(network, folder / "vit")
    save_image_processor(folder / "vit")
    return folder


@pytest.fixture(scope="module")
def pixels():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["image", "vit"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_image_layers_are_the_librarys_states_after_its_final_norm(folder, pixels, name, pooling):
    config = {"name": f"hf:{folder / name}", "pooling": pooling}
    plain, layered = ImageEncoderConfig(**config).load(), ImageEncoderConfig(**config, layers=(-1, -2)).load()
    network = AutoModel.from_pretrained(folder / name).eval()
    with torch.no_grad():
        states = network(plain.normalise(pixels), output_hidden_states=True).hidden_states
        norm = network.layernorm
        expected = [norm(states[-1]), norm(states[-2])]
    pooled = {"cls": [x[:, 0] for x in expected], "mean": [x[:, 1:].mean(1) for x in expected]}
    pooled["cls+mean"] = [torch.cat(both, 1) for both in zip(pooled["cls"], pooled["mean"], strict=True)]
    torch.testing.assert_close(layered.encode(pixels), torch.cat(pooled[pooling], 1), atol=1e-5, rtol=1e-5)
    output, inner = layered.encode(pixels).chunk(2, dim=1)
    assert torch.equal(output, plain.encode(pixels))
    assert [each.spec.layer for each in layered.identity.parts] == [-1, -2]
    assert layered.identity.parts[0] == plain.identity
    assert layered.identity.parts[1].spec.id == f"{plain.identity.spec.id}@-2"
    dense = layered.encode_dense(pixels)
    assert torch.equal(dense.chunk(2, dim=3)[0], plain.encode_dense(pixels))
    alone = load_recorded(layered.identity.parts[1])
    torch.testing.assert_close(alone.encode(pixels), inner)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_text_layers_are_the_librarys_hidden_states(folder, pooling):
    config = {"name": f"hf:{folder / 'text'}", "pooling": pooling}
    plain, layered = TextEncoderConfig(**config).load(), TextEncoderConfig(**config, layers=(-2, -1)).load()
    tokens = AutoTokenizer.from_pretrained(folder / "text")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder / "text").eval()(**tokens, output_hidden_states=True).hidden_states
    mask_BT = tokens["attention_mask"].double().numpy()
    last = mask_BT.sum(1).astype(int) - 1
    expected = []
    for state_BTD in (states[-2].double().numpy(), states[-1].double().numpy()):
        mean_BD = (state_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdims=True)
        expected.append({"mean": mean_BD, "cls": state_BTD[:, 0], "last": state_BTD[range(3), last]}[pooling])
    np.testing.assert_allclose(layered.encode(TEXTS).numpy(), np.concatenate(expected, 1), atol=1e-5)
    assert torch.equal(layered.encode(TEXTS).chunk(2, dim=1)[1], plain.encode(TEXTS))
    assert layered.identity.parts[1] == plain.identity
    assert torch.equal(layered.encode_tokens(layered.tokenize(TEXTS)), layered.encode(TEXTS))


@pytest.mark.parametrize(
    ("model", "options", "norm"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}, {"norm": True, "return_prefix_tokens": True}),
        ("convnext_atto", {"depths": (1, 1, 2, 1)}, {}),
    ],
)
def test_timm_layers_are_its_intermediates(model, options, norm):
    torch.manual_seed(0)
    network = timm.create_model(model, pretrained=False, **options).eval()
    backbone = TimmBackbone(network, HALF)
    backbone.prepare_layers((-1, -2, -3), model)
    pixels_BCHW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = backbone.forward_layers(pixels_BCHW, (-1, -2, -3))
        _, expected = network.forward_intermediates(pixels_BCHW, **norm)
        for (cls_BD, patches_BhwD), state in zip(found, expected[::-1], strict=False):
            map_BCHW = state[0] if cls_BD is not None else state
            torch.testing.assert_close(patches_BhwD, map_BCHW.permute(0, 2, 3, 1))
            assert cls_BD is None or torch.allclose(cls_BD, state[1][:, 0])
        torch.testing.assert_close(found[0][1], backbone(pixels_BCHW)[1])


@pytest.mark.slow
def test_packaged_encoder_stores_its_stages():
    """Batch norms are folded, so that the unfolded network of timm is another implementation."""
    encoder = ImageEncoderConfig("efficientnet-lite0", layers=(-1, -2, -4)).load()
    pixels = torch.stack([encoder.preprocess(draw(7, SHADES["cat"]))])
    network = load_classifier(Path(encoder_file()), "tf_efficientnet_lite0")
    with torch.no_grad():
        normalised = encoder.normalise(pixels)
        _, stages = network.forward_intermediates(normalised, extra_blocks=True)
        expected = [network.forward_features(normalised), stages[-1], stages[-3]]
    pooled = torch.cat([state.mean(dim=(2, 3)) for state in expected], dim=1)
    torch.testing.assert_close(encoder.encode(pixels), pooled, atol=1e-3, rtol=1e-3)
    assert [each.spec.dim for each in encoder.identity.parts] == [1280, 320, 112]
    with pytest.raises(UserError, match="dense"):
        encoder.require_patches()
    stage = load_recorded(encoder.identity.parts[2])
    assert stage.stride == 16
    assert stage.encode_dense(pixels).shape == (1, 14, 14, 112)


def encoder_file() -> str:
    from sail_align.extract.encoders.catalogue import VISION
    from sail_align.extract.encoders.timm_models import fetch_timm

    return str(fetch_timm(VISION["efficientnet-lite0"]).path)


def test_spec_of_the_output_is_that_of_earlier_versions():
    spec = EncoderSpec("a", "image", {"loader": "test"}, "0", {}, "mean", "float32", 4)
    assert "layer" not in spec.to_json()
    assert EncoderSpec.from_json(spec.to_json()) == spec
    inner = EncoderSpec("a@-2", "image", {"loader": "test"}, "0", {}, "mean", "float32", 4, layer=-2)
    assert EncoderSpec.from_json(json.loads(json.dumps(inner.to_json()))) == inner
    assert (inner.network_id, spec.network_id) == ("a", "a")
    assert inner.fingerprint != spec.fingerprint


@pytest.mark.parametrize("text", ["", "-1,", "-1,-1", "1", "0", "a", "-1,-2000", "-1.5"])
def test_invalid_layers_are_refused(text):
    with pytest.raises(UserError, match="--layers is invalid"):
        parse_layers(text)


def test_layers_that_a_network_lacks_are_refused(folder):
    with pytest.raises(UserError, match=r"no layer -4: it has 3 layers. Choose from −1 to −3"):
        ImageEncoderConfig(f"hf:{folder / 'vit'}", "mean", layers=(-1, -4)).load()
    with pytest.raises(UserError, match=r"no layer -5: it has 2 layers"):
        TextEncoderConfig(f"hf:{folder / 'text'}", "mean", layers=(-5,)).load()
    resnet = TimmBackbone(timm.create_model("resnet10t", pretrained=False), HALF)
    with pytest.raises(UserError, match="has no intermediate layers"):
        resnet.prepare_layers((-2,), "timm:resnet10t")


@pytest.fixture
def job(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    manifest, root = find_manifest(str(write_captioned(tmp_path / "photos", rows=24)))

    def run(name, layers, text_layers=(-1,)):
        image = ImageEncoderConfig(f"hf:{folder / 'vit'}", "mean", layers=layers)
        text = TextEncoderConfig(f"hf:{folder / 'text'}", "mean", layers=text_layers)
        job = Job(manifest, root, tmp_path / f"{name}.zarr", image, text, ("c0",))
        return job, run_job(job, LocalExecutor(["cpu"]), Share(), quiet=True)

    return run


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_store_gains_layers_in_one_pass_and_keeps_its_arrays(job, monkeypatch):
    plain, _ = job("plain", (-1,))
    before = files(plain.store)
    encoded = []
    encode = VisionEncoder.encode
    monkeypatch.setattr(VisionEncoder, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    layered, summary = job("plain", (-1, -2, -3), (-1, -2))
    assert sum(encoded) == 24
    assert summary.encoded == 3 * 24
    assert len(Store.open(layered.store).arrays()) == 3 + 2
    after = files(layered.store)
    assert {name for name in before if after.get(name) != before[name]} == {"zarr.json"}
    at_once, _ = job("at-once", (-1, -2, -3), (-1, -2))
    features = {name: content for name, content in files(at_once.store).items() if "/c/" in name or "commits" in name}
    assert features == {name: after[name] for name in features}
    assert not any(damaged for _, damaged in verify_store(layered.store))


@pytest.mark.slow
def test_text_identity_is_that_of_all_layers_of_one_network(job):
    layered, _ = job("photos", (-1,), (-2, -1))
    identity = Store.open(layered.store).text_identity()
    assert TextEncoderConfig.recorded(identity).layers == (-1, -2)
    pairs = diagnose(Store.open(layered.store)).reasons
    assert len(pairs) == 1


@pytest.mark.slow
def test_lost_shard_of_one_layer_is_written_again(job):
    layered, _ = job("photos", (-1, -2))
    before = files(layered.store)
    array = next(each for name, each in Store.open(layered.store).images().items() if name.endswith("@-2"))
    array.discard(0)
    _, summary = job("photos", (-1, -2))
    assert summary.encoded == 24
    assert files(layered.store) == before
    _, summary = job("photos", (-1, -2))
    assert summary.encoded == 0


def test_joined_layers_of_one_network_load_it_once(folder, pixels, monkeypatch):
    config = ImageEncoderConfig(f"hf:{folder / 'vit'}", "mean", layers=(-3, -1))
    encoder = config.load()
    loads = []
    load = ImageEncoderConfig.load
    monkeypatch.setattr(ImageEncoderConfig, "load", lambda self, *a, **k: loads.append(1) or load(self, *a, **k))
    again = load_recorded(Identity.from_json(json.loads(json.dumps(encoder.identity.to_json()))))
    assert len(loads) == 1
    assert torch.equal(again.encode(pixels), encoder.encode(pixels))
    assert again.encode_dense(pixels).shape == (3, 4, 4, 32)
