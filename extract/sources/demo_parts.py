"""What each part of the demo consists of: rows of a scene and its captions, composed in order from one seed."""

from collections.abc import Iterator, Sequence
from random import Random

from sail_align.extract.sources.demo_captions import (
    RELATIONS,
    SIZES,
    clear_sizes,
    headline,
    long_caption,
    raw_caption,
    relation,
)
from sail_align.extract.sources.demo_objects import Object, scene_only_objects, seen_objects, unseen_objects
from sail_align.extract.sources.demo_scenes import (
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
    if part == "train":
        return _train_rows(rng)
    if part == "retrieval":
        return _retrieval_rows(rng)
    if part == "pairs":
        return _pair_rows(rng)
    if part == "segmentation":
        return _segmentation_rows(class_objects(part), rng)
    return _lone_object_rows(class_objects(part), rng)


def _train_rows(rng: Random) -> Iterator[Row]:
    for first in _in_turn(seen_objects(), TRAIN_SCENES, rng):
        scene = _scene_with(first, rng)
        yield scene, _captions(scene, headline(scene, rng), rng)


def _retrieval_rows(rng: Random) -> Iterator[Row]:
    """Compose scenes of which no raw caption names only things that another scene shows too.

    Otherwise a right answer would count as wrong.
    """
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
    """Compose two scenes at a time, of the same two pictures in each other's place or size."""
    for pair in range(PAIRS):
        by_size = pair % 4 == 3
        while True:
            scene = compose(rng.sample(seen_objects(), 2), [1, 1], rng)
            swapped = swap_sizes(scene) if by_size else swap_places(scene)
            first, second = scene.groups
            clear = bool(clear_sizes(scene.groups)) if by_size else relation(first, second) is not None
            if clear and is_inside(scene) and is_inside(swapped):
                break
        if by_size:
            big, small = rng.choice(SIZES["big"]), rng.choice(SIZES["small"])
            first, second = sorted(scene.groups, key=lambda group: -group.size)
            captions = [f"the {big} {a} and the {small} {b}" for a, b in _both_orders(first, second)]
        else:
            found = relation(first, second)
            phrase = rng.choice(RELATIONS[found]) if found else ""
            captions = [f"the {a} {phrase} the {b}" for a, b in _both_orders(first, second)]
        yield scene, {"raw": captions[0]}
        yield swapped, {"raw": captions[1]}


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


def _both_orders(first: Group, second: Group) -> list[tuple[str, str]]:
    return [(first.thing.name, second.thing.name), (second.thing.name, first.thing.name)]
