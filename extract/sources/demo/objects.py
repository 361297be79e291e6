"""The objects of the embedded demo, listed in `objects.yaml`: their names, and the OpenMoji drawings that show them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Object:
    """One class of objects.

    Attributes:
        kind: Group of similar objects.
        names: The label, then synonyms.
        drawings: Names of emoji, which are variants of one object, such as a dog and a dog's face.
        unseen: Whether training scenes and captions leave it out.
    """

    kind: str
    names: tuple[str, ...]
    drawings: tuple[str, ...]
    unseen: bool = False

    @property
    def name(self) -> str:
        """The label."""
        return self.names[0]


@cache
def load_objects() -> dict[str, tuple[Object, ...]]:
    """Return the objects of training scenes, `seen`, and the classes of those parts that have any, in a fixed order.

    `objects` are every second of the seen ones; training shows them only together with others, never alone. `unseen`
    are in no training scene or caption. `segmentation` are the seen fruit and land vehicles.
    """
    kinds = yaml.safe_load(Path(__file__).with_name("objects.yaml").read_text(encoding="utf-8"))
    objects = []
    for kind, entries in kinds.items():
        for entry in entries:
            names = tuple(entry["names"])
            drawings = tuple(entry.get("drawings", [names[0].replace(" ", "_")]))
            objects.append(Object(kind, names, drawings, entry.get("unseen", False)))
    seen = tuple(thing for thing in objects if not thing.unseen)
    return {
        "seen": seen,
        "objects": seen[::2],
        "unseen": tuple(thing for thing in objects if thing.unseen),
        "segmentation": tuple(thing for thing in seen if thing.kind in ("fruit", "land vehicle")),
    }
