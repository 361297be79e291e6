"""The embedded demo as a source: scenes composed from OpenMoji drawings when asked for, nothing on disk."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.data import IGNORED, Part, Sample, Source
from sail_align.extract.sources.demo.drawing import paint, paint_mask, require_drawings
from sail_align.extract.sources.demo.parts import IMAGES_A_CLASS, Row, class_objects, rows
from sail_align.extract.sources.demo.scenes import Scene

SIDE = 256
"""Pixels a side, of every image."""

_CAPTIONS = {"train": ("raw", "long"), "retrieval": ("raw", "long"), "pairs": ("raw",)}


class DemoSource(Source):
    """One part of the demo: the same scenes, captions and pixels in every process and in any order.

    - `train`: scenes of seen objects. Caption `raw` is short, names at most two things and no layout; `long` names
      everything, with counts and layout.
    - `retrieval`: other scenes of the same objects, each of whose captions fits one scene only.
    - `objects`: one object a picture, of the classes that training shows beside others only.
    - `unseen`: one object a picture, of classes that no training scene or caption holds.
    - `pairs`: rows 2k and 2k + 1 show two objects with swapped roles, and their captions swap the same words.
    - `segmentation`: scenes with exact masks; the background is `IGNORED`.
    """

    def __init__(self, part: str):
        require_drawings()
        self.part = part

    @property
    def captions(self) -> tuple[str, ...]:
        """The names of the part's captions; none for a part that is about classes."""
        return _CAPTIONS.get(self.part, ())

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of what labels or mask values stand for; none for a part that is about captions."""
        return tuple(thing.name for thing in class_objects(self.part))

    def parts(self) -> Sequence[Part]:
        """All in one; keys and locations are `<part>/<row>`."""
        return [Part(self.part, self._samples)]

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Paint a scene as RGB, (SIDE, SIDE)."""
        return paint(self.scene(location), SIDE)

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Return the class index at each pixel of a scene, (SIDE, SIDE), the topmost drawing's."""
        scene = self.scene(location)
        classes = class_objects(self.part)
        class_of_group = np.full(256, IGNORED, np.uint8)
        class_of_group[: len(scene.groups)] = [classes.index(group.thing) for group in scene.groups]
        return class_of_group[paint_mask(scene, SIDE)]

    def scene(self, location: str) -> Scene:
        """Return what a location's picture shows, as geometry."""
        return self._rows[int(location.removeprefix(f"{self.part}/"))][0]

    def _samples(self) -> Iterator[Sample]:
        for row, (_, captions) in enumerate(self._rows):
            key = f"{self.part}/{row}"
            label = row // IMAGES_A_CLASS if self.part in ("objects", "unseen") else -1
            yield Sample(key, key, captions, label, key if self.part == "segmentation" else "")

    @cached_property
    def _rows(self) -> list[Row]:
        return list(rows(self.part))
