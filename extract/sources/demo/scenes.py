"""Composes the demo's scenes: which objects, how many, where and how large. Geometry only; no pixels, no words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from sail_align.extract.sources.demo.objects import Object

PATTERNS = ("plain", "shaded", "striped", "checked", "dotted", "cloudy", "speckled")
COLOURS = {
    "red": (226, 106, 100),
    "orange": (244, 172, 96),
    "yellow": (245, 226, 124),
    "green": (142, 200, 130),
    "blue": (122, 176, 228),
    "purple": (182, 146, 216),
    "pink": (246, 180, 205),
    "brown": (190, 154, 120),
    "grey": (178, 180, 184),
    "white": (250, 250, 248),
}

_SIZES = {1: (0.34, 0.72), 2: (0.24, 0.48), 3: (0.22, 0.38), 4: (0.2, 0.32)}
"""The range of sizes by how many pictures share the scene."""


@dataclass(frozen=True)
class Picture:
    """One drawing in a scene. `x`, `y` (its centre) and `size` (its longer side) are parts of the scene's side."""

    drawing: str
    x: float
    y: float
    size: float
    angle: float
    flip: bool
    brightness: float
    saturation: float


@dataclass(frozen=True)
class Group:
    """Objects of one name in a scene, drawn alike and equally large: a dog, two apples."""

    thing: Object
    pictures: tuple[Picture, ...]

    @property
    def size(self) -> float:
        """The size of each."""
        return self.pictures[0].size


@dataclass(frozen=True)
class Scene:
    """Groups on a background; a later group is painted over an earlier one. `seed` fixes the background's details."""

    groups: tuple[Group, ...]
    pattern: str
    colour: str
    seed: int


def compose(things: Sequence[Object], counts: Sequence[int], rng: Random) -> Scene:
    """Place `counts[i]` pictures of `things[i]` at random, so that neighbours overlap a little at most."""
    while True:
        sizes = _draw_sizes(counts, rng)
        centres = _place([size for size, count in zip(sizes, counts, strict=True) for _ in range(count)], rng)
        if centres:
            break
    spots = iter(centres)
    groups = tuple(
        Group(thing, tuple(_picture(drawing, next(spots), size, rng) for _ in range(count)))
        for thing, count, size in zip(things, counts, sizes, strict=True)
        for drawing in [rng.choice(thing.drawings)]
    )
    return Scene(groups, rng.choice(PATTERNS), rng.choice(list(COLOURS)), rng.getrandbits(32))


def draw_counts(rng: Random) -> list[int]:
    """Draw how many pictures each group of a scene has; one to four in all."""
    counts = [1]
    for _ in range(rng.choices([0, 1, 2, 3], weights=[15, 35, 30, 20])[0]):
        if rng.random() < 0.3:
            counts[-1] += 1
        else:
            counts.append(1)
    return counts


def draw_things(first: Object, count: int, pool: Sequence[Object], rng: Random) -> list[Object]:
    """Return `first` and others of the pool; in half of all scenes of its own kind, so that look-alikes meet."""
    kin = [thing for thing in pool if thing.kind == first.kind and thing is not first]
    others = kin if rng.random() < 0.5 else [thing for thing in pool if thing is not first]
    return [first, *rng.sample(others, count - 1)]


def swap_places(scene: Scene) -> Scene:
    """Return the same scene with the pictures of its two groups in each other's place, each keeping its size."""
    (first,), (second,) = (group.pictures for group in scene.groups)
    return _with_pictures(scene, replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y))


def swap_sizes(scene: Scene) -> Scene:
    """Return the same scene with the pictures of its two groups in each other's size, each keeping its place."""
    (first,), (second,) = (group.pictures for group in scene.groups)
    return _with_pictures(scene, replace(first, size=second.size), replace(second, size=first.size))


def is_inside(scene: Scene) -> bool:
    """Whether no picture reaches over the scene's border."""
    pictures = [picture for group in scene.groups for picture in group.pictures]
    return all(p.size / 2 <= min(p.x, p.y) and max(p.x, p.y) <= 1 - p.size / 2 for p in pictures)


def _with_pictures(scene: Scene, *pictures: Picture) -> Scene:
    groups = tuple(replace(group, pictures=(new,)) for group, new in zip(scene.groups, pictures, strict=True))
    return replace(scene, groups=groups)


def _draw_sizes(counts: Sequence[int], rng: Random) -> list[float]:
    low, high = _SIZES[sum(counts)]
    return [rng.uniform(low, high) for _ in counts]


def _place(sizes: Sequence[float], rng: Random) -> list[tuple[float, float]]:
    """Return a centre for each size; none where the pictures did not fit."""
    centres: list[tuple[float, float]] = []
    for size in sizes:
        margin = 0.05 + size / 2
        for _ in range(30):
            x, y = rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin)
            if all(
                (x - other_x) ** 2 + (y - other_y) ** 2 > (0.42 * (size + other)) ** 2
                for (other_x, other_y), other in zip(centres, sizes, strict=False)
            ):
                centres.append((x, y))
                break
        else:
            return []
    return centres


def _picture(drawing: str, centre: tuple[float, float], size: float, rng: Random) -> Picture:
    return Picture(
        drawing=drawing,
        x=centre[0],
        y=centre[1],
        size=size,
        angle=rng.gauss(0, 14),
        flip=rng.random() < 0.5,
        brightness=rng.uniform(0.8, 1.15),
        saturation=rng.uniform(0.7, 1.3),
    )
