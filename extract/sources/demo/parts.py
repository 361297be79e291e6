"""The parts of the demo: rows of a scene and its captions, composed in order from one seed per part."""

from collections.abc import Iterator, Sequence
from random import Random

from sail_align.extract.sources.demo.captions import RELATIONS, SIZES, describe
from sail_align.extract.sources.demo.objects import Object, load_objects
from sail_align.extract.sources.demo.scenes import Group, Scene

Row = tuple[Scene, dict[str, str]]

TRAIN_SCENES = 3000
RETRIEVAL_SCENES = 500
PAIRS = 200
SEGMENTATION_SCENES = 60
IMAGES_PER_CLASS = 2
"""In the parts with one object per image."""


def rows(part: str) -> Iterator[Row]:
    """Compose the rows of a part, one after the other."""
    rng = Random(f"demo {part}")
    objects = load_objects()
    match part:
        case "train":
            for first in _in_turn(objects["seen"], TRAIN_SCENES, rng):
                scene = _compose_around(first, rng)
                yield scene, describe(scene, _select_named(scene, rng), rng)
        case "retrieval":
            yield from _retrieval_rows(rng)
        case "pairs":
            for pair in range(PAIRS):
                yield from _compose_pair(rng, swap_sizes=pair % 4 == 3)
        case "segmentation":
            for _ in range(SEGMENTATION_SCENES):
                count = rng.randint(2, 4)
                yield Scene.compose(rng.sample(objects[part], count), [1] * count, rng), {}
        case "objects" | "unseen":
            for thing in objects[part]:
                for _ in range(IMAGES_PER_CLASS):
                    yield Scene.compose([thing], [1], rng), {}
        case _:
            raise ValueError(f"The demo has no part {part!r}.")


def _retrieval_rows(rng: Random) -> Iterator[Row]:
    """Compose scenes so that the things a raw caption names occur together only in its own scene."""
    previous: list[tuple[set[str], set[str]]] = []
    for first in _in_turn(load_objects()["seen"], RETRIEVAL_SCENES, rng):
        while True:
            scene = _compose_around(first, rng)
            groups = _select_named(scene, rng)
            shown, named = ({group.thing.name for group in some} for some in (scene.groups, groups))
            if not any(named <= other_shown or other_named <= shown for other_shown, other_named in previous):
                break
        previous.append((shown, named))
        yield scene, describe(scene, groups, rng)


def _compose_pair(rng: Random, *, swap_sizes: bool) -> list[Row]:
    """Compose a scene of two pictures, and the same scene with their sizes or places swapped."""
    while True:
        scene = Scene.compose(rng.sample(load_objects()["seen"], 2), [1, 1], rng)
        swapped = scene.swap("size") if swap_sizes else scene.swap("x", "y")
        groups = scene.groups
        relation = groups[0].relation_to(groups[1])
        if not swapped.is_inside():
            continue
        if swap_sizes and scene.clear_sizes():
            groups = tuple(sorted(groups, key=lambda group: -group.size))
            template = f"the {rng.choice(SIZES['big'])} {{}} and the {rng.choice(SIZES['small'])} {{}}"
        elif relation and not swap_sizes:
            template = f"the {{}} {rng.choice(RELATIONS[relation])} the {{}}"
        else:
            continue
        first, second = (group.thing.name for group in groups)
        return [(scene, {"raw": template.format(first, second)}), (swapped, {"raw": template.format(second, first)})]


def _compose_around(first: Object, rng: Random) -> Scene:
    """Compose a scene of one to four pictures of `first` and other seen objects."""
    seen, never_alone = load_objects()["seen"], load_objects()["objects"]
    counts = _draw_counts(rng)
    while len(counts) == 1 and first in never_alone:
        counts = _draw_counts(rng)
    # Half of the scenes have objects of one kind, so that similar objects appear together.
    kin = [thing for thing in seen if thing.kind == first.kind and thing is not first]
    others = kin if rng.random() < 0.5 else [thing for thing in seen if thing is not first]
    return Scene.compose([first, *rng.sample(others, len(counts) - 1)], counts, rng)


def _draw_counts(rng: Random) -> list[int]:
    """Draw the number of pictures in each group of a scene, one to four in total."""
    counts = [1]
    for _ in range(rng.choices([0, 1, 2, 3], weights=[15, 35, 30, 20])[0]):
        if rng.random() < 0.3:
            counts[-1] += 1
        else:
            counts.append(1)
    return counts


def _select_named(scene: Scene, rng: Random) -> Sequence[Group]:
    """Select the groups that a raw caption names: at most two."""
    return rng.sample(scene.groups, min(2, len(scene.groups)))


def _in_turn(things: Sequence[Object], count: int, rng: Random) -> Iterator[Object]:
    """Yield `count` objects in random order, each equally often."""
    deck: list[Object] = []
    for _ in range(count):
        deck = deck or rng.sample(things, len(things))
        yield deck.pop()
