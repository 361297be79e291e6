"""Captions of the demo, parsed by an independent grammar, agree with the geometry of their scenes."""

import re
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from sail_align.extract.sources.demo.captions import plural, with_article
from sail_align.extract.sources.demo.objects import load_objects
from sail_align.extract.sources.demo.scenes import COLOURS, Group, Picture, Scene
from sail_align.extract.sources.demo.source import DemoSource

THINGS = {form: thing for thing in load_objects()["seen"] for name in thing.names for form in (name, plural(name))}
NAME = "|".join(sorted(map(re.escape, THINGS), key=len, reverse=True))
COUNTS = {"a": 1, "an": 1, "the": 1, "two": 2, "a couple of": 2, "three": 3, "four": 4}
PHRASE = re.compile(rf"\b({'|'.join(sorted(COUNTS, key=len, reverse=True))}) (?:(big|large|small|little) )?({NAME})\b")
APART = {
    r"\bleft of": lambda ours, theirs: ours.x < theirs.x,
    r"\bright of": lambda ours, theirs: ours.x > theirs.x,
    r"\b(above|higher up than)": lambda ours, theirs: ours.y < theirs.y,
    r"\b(below|under|beneath)": lambda ours, theirs: ours.y > theirs.y,
}


class Mention(NamedTuple):
    group: Group
    size: str
    before: str
    """The words since the previous mention."""


def read(caption: str, scene: Scene) -> list[Mention]:
    """Return what a caption mentions; fail if the scene does not contain it in that number."""
    found = list(PHRASE.finditer(caption))
    mentions = []
    for before, match in zip([None, *found], found, strict=False):
        groups = [group for group in scene.groups if group.thing == THINGS[match[3]]]
        assert len(groups) == 1, caption
        assert len(groups[0].pictures) == COUNTS[match[1]], caption
        mentions.append(Mention(groups[0], match[2] or "", caption[before.end() if before else 0 : match.start()]))
    return mentions


def check_relation(subject: Group, words: str, other: Group, caption: str) -> None:
    for phrase, holds in APART.items():
        if re.search(phrase, words):
            assert all(holds(ours, theirs) for ours in subject.pictures for theirs in other.pictures), caption


@pytest.fixture(scope="module", params=["train", "retrieval"])
def source(request: pytest.FixtureRequest) -> DemoSource:
    return DemoSource(request.param)


@pytest.fixture(scope="module")
def pairs() -> DemoSource:
    return DemoSource("pairs")


@pytest.mark.slow
def test_raw_captions_count_correctly(source: DemoSource):
    for sample in source.samples():
        scene = source.scene(sample.image)
        assert len(read(sample.captions["raw"], scene)) == min(2, len(scene.groups))


@pytest.mark.slow
def test_long_captions_name_everything_and_its_layout(source: DemoSource):
    for sample in source.samples():
        caption, scene = sample.captions["long"], source.scene(sample.image)
        subject, *others = read(caption, scene)
        assert {mention.group for mention in (subject, *others)} == set(scene.groups), caption
        for other in others:
            check_relation(subject.group, other.before, other.group, caption)


def test_sizes_in_long_captions_are_the_extremes_of_the_scene(source: DemoSource):
    found = 0
    for sample in source.samples():
        scene = source.scene(sample.image)
        sizes = [picture.size for group in scene.groups for picture in group.pictures]
        for mention in read(sample.captions["long"], scene):
            if mention.size:
                found += 1
                assert max(sizes) >= 1.5 * min(sizes)
                extreme = max(sizes) if mention.size in ("big", "large") else min(sizes)
                assert mention.group.pictures[0].size == extreme
    assert found > 50


def test_position_of_a_single_object_is_that_of_its_centre(source: DemoSource):
    single = [sample for sample in source.samples() if only_picture(source.scene(sample.image))]
    assert len(single) > 10
    for sample in single:
        (words,) = re.findall(r" (?:in|at|on) the ([a-z ]+?)(?: on a |$)", sample.captions["long"])
        picture = only_picture(source.scene(sample.image))
        x, y = picture.x - 0.5, picture.y - 0.5
        true = {"top": y < 0, "bottom": y > 0, "left": x < 0, "right": x > 0, "middle": max(abs(x), abs(y)) <= 0.1}
        assert all(true[word] for word in words.split()), sample.captions["long"]


def only_picture(scene: Scene) -> Picture | None:
    pictures = [picture for group in scene.groups for picture in group.pictures]
    return pictures[0] if len(pictures) == 1 else None


@pytest.mark.slow
def test_background_has_the_colour_of_the_caption():
    source = DemoSource("train")
    samples = [sample for sample in source.samples() if "background" in sample.captions["long"]][:12]
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), float)
    for sample in samples:
        pattern, colour = re.search(r"on a (\w+) (\w+) background", sample.captions["long"]).groups()
        assert source.scene(sample.image).pattern == pattern
        border = np.asarray(source.image(sample.image), float)[:3].reshape(-1, 3).mean(0)
        direction = palette / np.linalg.norm(palette, axis=1, keepdims=True)
        closest = np.argsort(-direction @ border)[:3]
        assert colour in {names[index] for index in closest}, (sample.captions["long"], border)


def test_raw_caption_of_retrieval_fits_only_one_scene():
    source = DemoSource("retrieval")
    scenes = [source.scene(sample.image) for sample in source.samples()]
    shown = [{group.thing for group in scene.groups} for scene in scenes]
    for row, sample in enumerate(source.samples()):
        named = {mention.group.thing for mention in read(sample.captions["raw"], scenes[row])}
        assert [other for other, things in enumerate(shown) if named <= things] == [row]


def test_captions_of_a_pair_have_the_same_words(pairs: DemoSource):
    for first, second in list(pairwise(pairs.samples()))[::2]:
        captions = first.captions["raw"], second.captions["raw"]
        assert captions[0] != captions[1]
        assert Counter(captions[0].split()) == Counter(captions[1].split())


def test_caption_of_a_pair_is_true_only_of_its_own_scene(pairs: DemoSource):
    samples = list(pairs.samples())
    for row, sample in enumerate(samples):
        own, other = pairs.scene(sample.image), pairs.scene(samples[row ^ 1].image)
        check_pair(sample.captions["raw"], own)
        with pytest.raises(AssertionError):
            check_pair(sample.captions["raw"], other)


def check_pair(caption: str, scene: Scene) -> None:
    first, second = read(caption, scene)
    check_relation(first.group, second.before, second.group, caption)
    if first.size:
        assert first.size in ("big", "large"), caption
        assert first.group.pictures[0].size >= 1.5 * second.group.pictures[0].size, caption


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("dog", "dogs"),
        ("fox", "foxes"),
        ("baby", "babies"),
        ("pair of glasses", "pairs of glasses"),
        ("loaf of bread", "loaves of bread"),
        ("nest with eggs", "nests with eggs"),
        ("computer mouse", "computer mice"),
        ("old woman", "old women"),
        ("pufferfish", "pufferfish"),
        ("toothbrush", "toothbrushes"),
    ],
)
def test_plural(one: str, many: str):
    assert plural(one) == many


@pytest.mark.parametrize("phrase", ["a dog", "an apple", "a unicorn", "an hourglass", "an old man", "a T-shirt"])
def test_with_article_follows_the_sound(phrase: str):
    assert with_article(phrase.partition(" ")[2]) == phrase
