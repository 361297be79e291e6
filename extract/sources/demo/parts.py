"""What each part of the demo consists of: rows of a scene and its captions, composed in order from one seed."""

from collections.abc import Iterator, Sequence
from random import Random

from sail_align.extract.sources.demo.captions import (
    RELATIONS,
    SIZES,
    clear_sizes,
    headline,
    long_caption,
    raw_caption,
    relation,
)
from sail_align.extract.sources.demo.objects import Object, scene_only_objects, seen_objects, unseen_objects
from sail_align.extract.sources.demo.scenes import (
    Group,
    Scene,
    compose,
    draw_counts,
    draw_things,
    is_inside,
    swap_places,
    swap_sizes,
)

Row = tuple[Scene, dict[str, str]]

TRAIN_SCENES = 3000
RETRIEVAL_SCENES = 500
PAIRS = 200
SEGMENTATION_SCENES = 60
IMAGES_A_CLASS = 2
"""Of the parts with one object a picture."""


def class_objects(part: str) -> tuple[Object, ...]:
    """Return the objects that a part's labels or mask values stand for, in their order; none for other parts."""
    if part == "objects":
        return scene_only_objects()
    if part == "unseen":
        return unseen_objects()
    if part == "segmentation":
        return tuple(thing for thing in seen_objects() if thing.kind in ("fruit", "land vehicle"))
    return ()


def rows(part: str) -> Iterator[Row]:
    """Compose a part, one row after the other."""
    rng = Random(f"demo {part}")
    match part:
        case "train":
            return _train_rows(rng)
        case "retrieval":
            return _retrieval_rows(rng)
        case "pairs":
            return _pair_rows(rng)
        case "segmentation":
            return _segmentation_rows(class_objects(part), rng)
        case "objects" | "unseen":
            return _lone_object_rows(class_objects(part), rng)
    raise ValueError(f"The demo has no part {part!r}.")


def _train_rows(rng: Random) -> Iterator[Row]:
    for first in _in_turn(seen_objects(), TRAIN_SCENES, rng):
        scene = _scene_with(first, rng)
        yield scene, _captions(scene, headline(scene, rng), rng)


def _retrieval_rows(rng: Random) -> Iterator[Row]:
    """Compose scenes such that the things a raw caption names are together in one scene only: its own."""
    kept: list[tuple[frozenset[str], frozenset[str]]] = []
    for first in _in_turn(seen_objects(), RETRIEVAL_SCENES, rng):
        while True:
            scene = _scene_with(first, rng)
            named = headline(scene, rng)
            shown, said = _names(scene.groups), _names(named)
            if not any(said <= other_shown or other_said <= shown for other_shown, other_said in kept):
                break
        kept.append((shown, said))
        yield scene, _captions(scene, named, rng)


def _pair_rows(rng: Random) -> Iterator[Row]:
    """Compose two scenes at a time, of the same two pictures in each other's place or, every fourth time, size."""
    for pair in range(PAIRS):
        yield from _size_pair(rng) if pair % 4 == 3 else _place_pair(rng)


def _place_pair(rng: Random) -> list[Row]:
    while True:
        scene = compose(rng.sample(seen_objects(), 2), [1, 1], rng)
        swapped = swap_places(scene)
        found = relation(*scene.groups)
        if found and is_inside(swapped):
            return _told_apart(scene, swapped, f"the {{}} {rng.choice(RELATIONS[found])} the {{}}", scene.groups)


def _size_pair(rng: Random) -> list[Row]:
    while True:
        scene = compose(rng.sample(seen_objects(), 2), [1, 1], rng)
        swapped = swap_sizes(scene)
        if clear_sizes(scene.groups) and is_inside(swapped):
            larger_first = sorted(scene.groups, key=lambda group: -group.size)
            template = f"the {rng.choice(SIZES['big'])} {{}} and the {rng.choice(SIZES['small'])} {{}}"
            return _told_apart(scene, swapped, template, larger_first)


def _told_apart(scene: Scene, swapped: Scene, template: str, groups: Sequence[Group]) -> list[Row]:
    first, second = (group.thing.name for group in groups)
    return [(scene, {"raw": template.format(first, second)}), (swapped, {"raw": template.format(second, first)})]


def _segmentation_rows(classes: Sequence[Object], rng: Random) -> Iterator[Row]:
    for _ in range(SEGMENTATION_SCENES):
        count = rng.randint(2, 4)
        yield compose(rng.sample(classes, count), [1] * count, rng), {}


def _lone_object_rows(classes: Sequence[Object], rng: Random) -> Iterator[Row]:
    for thing in classes:
        for _ in range(IMAGES_A_CLASS):
            yield compose([thing], [1], rng), {}


def _scene_with(first: Object, rng: Random) -> Scene:
    """Compose a scene of seen objects around one; never of a single kind of thing that is for scenes only."""
    counts = draw_counts(rng)
    while len(counts) == 1 and first in scene_only_objects():
        counts = draw_counts(rng)
    return compose(draw_things(first, len(counts), seen_objects(), rng), counts, rng)


def _captions(scene: Scene, named: Sequence[Group], rng: Random) -> dict[str, str]:
    return {"raw": raw_caption(named, rng), "long": long_caption(scene, rng)}


def _in_turn(things: Sequence[Object], count: int, rng: Random) -> Iterator[Object]:
    """Yield `count` objects, each as often as any other, in random order."""
    deck: list[Object] = []
    for _ in range(count):
        deck = deck or rng.sample(things, len(things))
        yield deck.pop()


def _names(groups: Sequence[Group]) -> frozenset[str]:
    return frozenset(group.thing.name for group in groups)
