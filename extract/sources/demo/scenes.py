"""The scenes of the demo as geometry: which objects, how many, where and how large."""

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
CLEAR_DISTANCE = 0.2
"""Smallest distance along one axis at which two groups have a spatial relation, as a fraction of the scene's side."""
CLEAR_RATIO = 1.5
"""Smallest ratio of sizes at which the largest group is called big and the smallest one small."""

_SIZES = {1: (0.34, 0.72), 2: (0.24, 0.48), 3: (0.22, 0.38), 4: (0.2, 0.32)}
"""Range of sizes, by the number of pictures in the scene."""


@dataclass(frozen=True)
class Picture:
    """One drawing in a scene. `x`, `y` (its centre) and `size` (its longer side) are fractions of the scene's side."""

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
    """Objects of one name in a scene, with the same drawing and size, such as two apples."""

    thing: Object
    pictures: tuple[Picture, ...]

    @property
    def size(self) -> float:
        """The size of each picture."""
        return self.pictures[0].size

    def relation_to(self, other: "Group") -> str | None:
        """Return `left`, `right`, `above` or `below` if the groups are wholly and clearly apart along an axis."""
        x, y = self._gap(other, "x"), self._gap(other, "y")
        if max(abs(x), abs(y)) < CLEAR_DISTANCE:
            return None
        if abs(x) > abs(y):
            return "left" if x > 0 else "right"
        return "above" if y > 0 else "below"

    def _gap(self, other: "Group", axis: str) -> float:
        """Return the distance between the groups along an axis, negative if `other` comes first, 0 if they overlap."""
        ours: list[float] = [getattr(picture, axis) for picture in self.pictures]
        theirs: list[float] = [getattr(picture, axis) for picture in other.pictures]
        return max(0.0, min(theirs) - max(ours)) or min(0.0, max(theirs) - min(ours))


@dataclass(frozen=True)
class Scene:
    """Groups on a background; later ones are painted over earlier ones. `seed` fixes the details of the background."""

    groups: tuple[Group, ...]
    pattern: str
    colour: str
    seed: int

    @classmethod
    def compose(cls, things: Sequence[Object], counts: Sequence[int], rng: Random) -> "Scene":
        """Place `counts[i]` pictures of `things[i]` at random, with little overlap."""
        centres: list[tuple[float, float]] = []
        while not centres:
            low, high = _SIZES[sum(counts)]
            sizes = [rng.uniform(low, high) for _ in counts]
            centres = _place([size for size, count in zip(sizes, counts, strict=True) for _ in range(count)], rng)
        remaining = iter(centres)
        groups = []
        for thing, count, size in zip(things, counts, sizes, strict=True):
            drawing = rng.choice(thing.drawings)
            pictures = tuple(_vary(drawing, *next(remaining), size, rng) for _ in range(count))
            groups.append(Group(thing, pictures))
        return cls(tuple(groups), rng.choice(PATTERNS), rng.choice(list(COLOURS)), rng.getrandbits(32))

    def swap(self, *attributes: str) -> "Scene":
        """Return the scene with these attributes of its two pictures swapped, such as `x` and `y`, or `size`."""
        (first,), (second,) = (group.pictures for group in self.groups)
        swapped = (
            replace(picture, **{name: getattr(other, name) for name in attributes})
            for picture, other in ((first, second), (second, first))
        )
        groups = (replace(group, pictures=(new,)) for group, new in zip(self.groups, swapped, strict=True))
        return replace(self, groups=tuple(groups))

    def is_inside(self) -> bool:
        """Return whether no picture extends over the border."""
        pictures = [picture for group in self.groups for picture in group.pictures]
        return all(p.size / 2 <= min(p.x, p.y) and max(p.x, p.y) <= 1 - p.size / 2 for p in pictures)

    def clear_sizes(self) -> dict[Group, str]:
        """Return `small` and `big` for the smallest and the largest group, if their sizes clearly differ."""
        ordered = sorted(self.groups, key=lambda group: group.size)
        if ordered[-1].size < CLEAR_RATIO * ordered[0].size:
            return {}
        return {ordered[0]: "small", ordered[-1]: "big"}


def _place(sizes: Sequence[float], rng: Random) -> list[tuple[float, float]]:
    """Return a centre for each size, or none if the pictures did not fit."""
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


def _vary(drawing: str, x: float, y: float, size: float, rng: Random) -> Picture:
    return Picture(
        drawing,
        x,
        y,
        size,
        angle=rng.gauss(0, 14),
        flip=rng.random() < 0.5,
        brightness=rng.uniform(0.8, 1.15),
        saturation=rng.uniform(0.7, 1.3),
    )
