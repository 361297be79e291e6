"""The embedded demo: reproducible, with separate parts."""

import hashlib
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sail_align.extract.data import IGNORED
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest, packaged_manifests
from sail_align.extract.sources.demo.drawing import CLUTTER, paint, paint_mask
from sail_align.extract.sources.demo.objects import Object, load_objects
from sail_align.extract.sources.demo.scenes import Group, Picture, Scene
from sail_align.extract.sources.demo.source import SIDE, DemoSource

PARTS = ("train", "retrieval", "objects", "unseen", "pairs", "segmentation")
ALL_OBJECTS = (*load_objects()["seen"], *load_objects()["unseen"])
FINGERPRINT = """
import hashlib, sys
from sail_align.extract.sources.demo.source import DemoSource
for part in sys.argv[1:]:
    source = DemoSource(part)
    digest = hashlib.sha256(repr([(s.key, s.image, s.captions, s.label, s.mask) for s in source.samples()]).encode())
    for row in (7, 3, 11):
        digest.update(source.image(f"{part}/{row}").tobytes())
    print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def parts() -> dict[str, DemoSource]:
    return {part: DemoSource(part) for part in PARTS}


def scenes(source: DemoSource) -> list[Scene]:
    return [source.scene(sample.image) for sample in source.samples()]


@pytest.mark.slow
def test_demo_is_equal_in_another_process():
    def run(hash_seed: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", FINGERPRINT, "retrieval", "pairs", "segmentation"],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    first = run("1")
    assert len(first.split()) == 3
    assert run("2") == first


@pytest.mark.slow
def test_pixels_do_not_depend_on_the_order_of_requests(parts: dict[str, DemoSource]):
    def digest(image: Image.Image) -> str:
        return hashlib.sha256(image.tobytes()).hexdigest()

    locations = [sample.image for sample in parts["train"].samples()][:12]
    forwards = [digest(parts["train"].image(location)) for location in locations]
    again = DemoSource("train")
    assert [digest(again.image(location)) for location in reversed(locations)] == forwards[::-1]
    assert len(set(forwards)) == len(locations)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_manifest_has_the_number_of_rows(part: str, parts: dict[str, DemoSource]):
    manifests = [Manifest.read(path) for path in packaged_manifests().values()]
    (manifest,) = [each for each in manifests if each.source.kind == "demo" and each.source.part == part]
    keys = [sample.key for sample in parts[part].samples()]
    assert len(set(keys)) == len(keys) == manifest.expected_rows


@pytest.mark.slow
def test_images_are_rgb(parts: dict[str, DemoSource]):
    for part, source in parts.items():
        image = source.image(f"{part}/0")
        assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))


def test_no_scene_is_in_two_parts(parts: dict[str, DemoSource]):
    every = [scene for source in parts.values() for scene in scenes(source)]
    assert len(set(every)) == len(every)


def test_unseen_objects_are_in_no_other_part(parts: dict[str, DemoSource]):
    names = "|".join(re.escape(name) for thing in load_objects()["unseen"] for name in thing.names)
    drawings = {drawing for thing in load_objects()["unseen"] for drawing in thing.drawings}
    for part in set(PARTS) - {"unseen"}:
        for scene in scenes(parts[part]):
            assert drawings.isdisjoint(picture.drawing for group in scene.groups for picture in group.pictures)
        for sample in parts[part].samples():
            for caption in sample.captions.values():
                assert not re.search(rf"\b({names})(s|es)?\b", caption), caption


def test_clutter_shows_no_object():
    assert set(CLUTTER).isdisjoint(drawing for thing in ALL_OBJECTS for drawing in thing.drawings)


def test_no_two_objects_share_a_name_or_a_drawing():
    for attribute in ("names", "drawings"):
        used = Counter(word for thing in ALL_OBJECTS for word in getattr(thing, attribute))
        assert [word for word, count in used.items() if count > 1] == []


def test_training_shows_scene_only_objects_only_with_others(parts: dict[str, DemoSource]):
    alone = {scene.groups[0].thing for scene in scenes(parts["train"]) if len(scene.groups) == 1}
    together = {group.thing for scene in scenes(parts["train"]) for group in scene.groups if len(scene.groups) > 1}
    assert alone.isdisjoint(load_objects()["objects"])
    assert together.issuperset(load_objects()["objects"])


@pytest.mark.parametrize("part", ["objects", "unseen"])
def test_labels_name_the_object_in_the_image(part: str, parts: dict[str, DemoSource]):
    source = parts[part]
    for sample in source.samples():
        (group,) = source.scene(sample.image).groups
        assert len(group.pictures) == 1
        assert source.classes[sample.label] == group.thing.name
    assert Counter(sample.label for sample in source.samples()) == dict.fromkeys(range(len(source.classes)), 2)


def disc(name: str, x: float, y: float, size: float) -> Group:
    thing = Object("sky", (name,), ("full_moon",), unseen=False)
    return Group(thing, (Picture("full_moon", x, y, size, angle=0, flip=False, brightness=1, saturation=1),))


def test_mask_shows_the_topmost_drawing():
    below, above = disc("below", 0.4, 0.5, 0.4), disc("above", 0.6, 0.5, 0.3)
    mask = paint_mask(Scene((below, above), "plain", "white", seed=0), 200)
    rows, columns = np.mgrid[0.5:200, 0.5:200]
    in_below = np.hypot(columns - 80, rows - 100) < 40
    in_above = np.hypot(columns - 120, rows - 100) < 30
    expected = np.where(in_above, 1, np.where(in_below, 0, IGNORED))
    assert (mask == expected).mean() > 0.98
    assert mask[100, 110] == 1
    assert mask[100, 82] == 0
    assert mask[5, 5] == IGNORED


def test_mask_covers_the_pixels_of_the_objects(parts: dict[str, DemoSource]):
    source = parts["segmentation"]
    for sample in list(source.samples())[:10]:
        scene, mask = source.scene(sample.image), source.mask(sample.mask)
        bare = paint(Scene((), scene.pattern, scene.colour, scene.seed), SIDE)
        changed = (np.asarray(source.image(sample.image)) != np.asarray(bare)).any(-1)
        covered = mask != IGNORED
        assert mask.shape == (SIDE, SIDE)
        assert {source.classes[index] for index in np.unique(mask[covered])} <= {g.thing.name for g in scene.groups}
        assert changed[covered].mean() > 0.99
        assert covered[changed].mean() > 0.8  # the rest: half-transparent edges


def test_missing_package_is_reported_with_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"'resvg_py'.*pip install 'sail-align\[demo\]'"):
        DemoSource("train")
