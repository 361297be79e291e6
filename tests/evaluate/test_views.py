"""Averages over views of images, against pictures whose views are known and NumPy's mean of their embeddings."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sail_align.evaluate.evaluator import evaluate_sets
from sail_align.evaluate.tasks.task import find_task
from sail_align.extract.encoders.load import ImageEncoderConfig
from sail_align.extract.encoders.preprocessing import ImagePreprocessing
from sail_align.extract.encoders.views import CROP, MIRRORED, OWN, VIEWS, View
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest

STEPS = ImagePreprocessing(crop=16, resize=None, interpolation="nearest")


@pytest.fixture
def seen(world, monkeypatch):
    """Give the colour encoder `through`, as image encoders have it; return the names of the views it was set to."""
    from sail_align.evaluate.models import load_recorded

    names = []
    others = load_recorded
    encoder = others(world.run.image)
    own = encoder.preprocess

    @contextmanager
    def through(self, view):
        names.append(view.name)
        self.preprocess = lambda image: torch.from_numpy(
            np.array(view.resize(lambda each: each.resize((16, 16)), STEPS)(image))
        )
        yield
        self.preprocess = own

    monkeypatch.setattr(type(encoder), "through", through, raising=False)

    def load(recorded, *_arguments, **_options):
        return encoder if recorded.spec.modality == "image" else others(recorded)

    monkeypatch.setattr("sail_align.evaluate.models.load_recorded", load)
    return names


@pytest.fixture
def halves(world):
    """Return a retrieval set of wide pictures with one colour on the left and another on the right."""
    path = world.squares("wide", [("red", "red"), ("green", "green"), ("blue", "blue")], {"kind": "retrieval"})
    for number, (left, right) in enumerate((("red", "yellow"), ("green", "blue"), ("blue", "pink"))):
        image = Image.new("RGB", (40, 20), left)
        ImageDraw.Draw(image).rectangle((20, 0, 39, 19), fill={"pink": "magenta"}.get(right, right))
        image.save(world.folder / "wide" / "images" / f"{number:03d}.png")
    return path


def test_crops_are_squares_of_the_picture():
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels_HWC)
    steps = ImagePreprocessing(crop=21, resize=None)  # 0.875 of the short side, so nothing is resampled

    def crop(view):
        return np.array(view.resize(lambda image: image, steps)(picture))

    _, *corners = VIEWS["5-crop"]
    tops, lefts = (0, 0, 3, 3), (0, 19, 0, 19)
    for view, top, left in zip(corners, tops, lefts, strict=True):
        assert np.array_equal(crop(view), pixels_HWC[top : top + 21, left : left + 21])
    assert CROP * 24 == 21
    for view, mirrored in zip(VIEWS["10-crop"][2:6], VIEWS["10-crop"][6:], strict=True):
        assert np.array_equal(crop(view)[:, ::-1], crop(mirrored))
    assert np.array_equal(crop(MIRRORED), pixels_HWC[:, ::-1])
    assert np.array_equal(crop(OWN), pixels_HWC)


def test_names_of_views_are_unique_and_the_encoders_own_comes_first():
    views = {view for each in VIEWS.values() for view in each}
    assert len({view.name for view in views}) == len(views)
    assert all(each[0] is OWN for each in VIEWS.values())
    assert {name: len(views) for name, views in VIEWS.items()} == {"flip": 2, "3-crop": 3, "5-crop": 5, "10-crop": 10}


@pytest.mark.slow
def test_an_encoder_returns_to_its_own_view_after_an_error():
    encoder = ImageEncoderConfig("efficientnet-lite0").load()
    picture = Image.effect_mandelbrot((64, 48), (-3, -2.5, 2, 2.5), 20).convert("RGB")
    own = encoder.preprocess(picture)
    with encoder.through(MIRRORED):
        assert torch.equal(encoder.preprocess(picture), own.flip(1))
    with pytest.raises(UserError), encoder.through(MIRRORED):
        raise UserError
    assert torch.equal(encoder.preprocess(picture), own)
    corner = View("corner", (0.0, 0.0), 0.5)
    with encoder.through(corner):
        expected = picture.resize((224, 224), Image.Resampling.BICUBIC, box=(0, 0, 24, 24))
        assert np.array_equal(encoder.preprocess(picture).numpy(), np.array(expected))


@pytest.mark.slow
def test_embeddings_are_the_mean_over_views(world, halves, seen):
    plain = world.open(halves).images()
    data = world.open(halves)
    data.task = data.task.model_copy(update={"views": "3-crop"})
    left, right = (
        np.array(each, dtype=float)
        for each in ([[255, 0, 0], [0, 128, 0], [0, 0, 255]], [[255, 255, 0], [0, 0, 255], [255, 0, 255]])
    )

    def unit(values):
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    whole, first, last = (unit(each / 127.5 - 1) for each in ((left + right) / 2, left, right))
    np.testing.assert_allclose(data.images(), unit((plain + first + last) / 3), atol=2e-3)
    np.testing.assert_allclose(whole, plain, atol=2e-2)
    assert seen == ["first-square", "last-square"]
    assert np.array_equal(world.open(halves).images(), plain)  # its features are not mixed up with those of views
    assert sorted(data.stores) == ["images", "images, first-square", "images, last-square"]
    assert len({store.path for store in data.stores.values()}) == 3
    data.images()
    assert len(seen) == 2  # all are in stores now


@pytest.mark.slow
def test_views_are_a_protocol_of_their_own(world, halves, seen):
    manifest, root = find_manifest(str(halves))
    task = find_task("retrieval")
    sets = [(manifest, root), (task.with_views(manifest, "flip"), root)]
    plain, flipped = evaluate_sets(world.run, sets, features=world.folder / "features", quiet=True)
    assert plain["protocol"] == "retrieval/any-positive@1/wide/captions=all"
    assert flipped["protocol"] == "retrieval/any-positive@1/wide/views=flip/captions=all"
    assert plain["data"]["digest"] == flipped["data"]["digest"]
    assert seen == ["mirrored"]


@pytest.mark.parametrize(
    ("kind", "views", "message"),
    [
        ("retrieval", "flop", "--views is invalid: got 'flop', expected flip or 3-crop or 5-crop or 10-crop"),
        ("segmentation", "flip", "--views has no effect on wide: segmentation uses no views"),
        ("representation", "flip", "--views has no effect on wide: representation uses no views"),
    ],
)
def test_views_without_effect_are_refused(halves, kind, views, message):
    manifest, _ = find_manifest(str(halves))
    with pytest.raises(UserError, match=message):
        find_task(kind).with_views(manifest, views)


def test_views_in_a_manifest(world, halves):
    text = halves.read_text()
    halves.write_text(text.replace("kind: retrieval", "kind: retrieval\n  views: 5-crop"))
    manifest, _ = find_manifest(str(halves))
    find_task("retrieval").check_manifest(manifest)
    assert manifest.task.views == "5-crop"
    assert manifest.scored_as("representation").task.views is None
    halves.write_text(text.replace("kind: retrieval", "kind: retrieval\n  views: 6-crop"))
    with pytest.raises(UserError, match=r"task.views.*Expected flip or 3-crop"):
        find_manifest(str(halves))
