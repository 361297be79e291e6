"""Source kind `mask-folder`: images and semantic masks of the same names, as ADE20K, VOC and COCO-Stuff come."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.data import IGNORED, Part, Sample, Source
from sail_align.extract.errors import UserError
from sail_align.extract.schema import MaskFolderSource as Description
from sail_align.extract.sources.class_names import label_names
from sail_align.extract.sources.images import read_image_in, read_mask

NO_CLASS = -1
LOOKED_AT = 16
"""Masks that are read when the source is opened. One may by chance hold only values that both numberings have."""


class MaskFolderSource(Source):
    """Images with masks, in the order of the list of names, or sorted. Keys and locations are file names.

    Some masks are read at once: those of another numbering are refused before anything is encoded.

    Raises:
        UserError: A folder or the list is missing, a listed image or mask is not there, no mask can hold a class's
            label, or a mask that was read is not of the described form.
    """

    def __init__(self, description: Description, data_root: Path):
        root = data_root / description.root
        self._images, self._masks = root / description.images, root / description.masks
        self._list = root / description.names if description.names else None
        for path in (self._images, self._masks, self._list):
            if path and not path.exists():
                raise UserError(f"{path} is not there; correct the manifest's source or set --data-root.")
        labels = description.classes
        self._classes = label_names(labels) if isinstance(labels, str) else labels
        self._index = np.full(256, NO_CLASS, dtype=np.int16)
        self._index[description.ignored] = IGNORED
        for index, label in enumerate(self._classes):
            value = label - description.label_offset
            if not 0 <= value <= 255 or value in description.ignored:
                raise UserError(
                    f"Class {self._classes[label]!r} has label {label}, so that masks hold {value}, which is ignored "
                    "or no value from 0 to 255; correct 'classes', 'label_offset' or 'ignored'."
                )
            self._index[value] = index
        self._offset = description.label_offset
        for place in sorted(set(np.linspace(0, len(self._samples) - 1, LOOKED_AT).astype(int).tolist())):
            self.mask(self._samples[place].mask)

    @property
    def captions(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels, in the manifest's or the table's order."""
        return tuple(self._classes.values())

    def parts(self) -> Sequence[Part]:
        """One part: the list of names, or the folder of masks."""
        return [Part("masks", self._read, (self._list or self._masks,))]

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Open an image by its name under the folder of images."""
        return read_image_in(self._images, location, least=least)

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Open a mask as class indices.

        Raises:
            UserError: It holds a value that is neither a class nor ignored.
        """
        values = read_mask(self._masks / location)
        found = self._index[values]
        if (found == NO_CLASS).any():
            value = int(values[found == NO_CLASS][0])
            raise UserError(
                f"Mask {self._masks / location} holds {value}, which is neither a class nor ignored; these masks are "
                "numbered in another way than the manifest's 'classes', 'label_offset' and 'ignored' say"
                f"{self._another_numbering(values)}."
            )
        return found.astype(np.uint8)

    def _another_numbering(self, values: NDArray[np.uint8]) -> str:
        """Say whether a mask that was refused is one of labels as they stand, or of labels less one."""
        for offset, unlabelled in ((0, 0), (1, 255)):
            known = {*(label - offset for label in self._classes), unlabelled}
            if offset != self._offset and {*np.unique(values).tolist()} <= known:
                return f" (label_offset: {offset} with ignored: [{unlabelled}] would fit this one)"
        return ""

    @cached_property
    def _samples(self) -> list[Sample]:
        images = {path.stem: path.name for path in self._images.iterdir() if not path.name.startswith(".")}
        masks = {path.stem for path in self._masks.glob("*.png")}
        names = _lines(self._list) if self._list else sorted(masks)
        for name in names:
            if name not in images or name not in masks:
                folder = self._masks if name in images else self._images
                raise UserError(f"{folder} has no picture {name!r}; the data set is not complete.")
        if not names:
            raise UserError(f"No mask in {self._masks}; expected PNGs with the names of the images.")
        return [Sample(key=images[name], image=images[name], mask=f"{name}.png") for name in names]

    def _read(self) -> Iterator[Sample]:
        return iter(self._samples)


def _lines(path: Path) -> list[str]:
    return [name for line in path.read_text(encoding="utf-8-sig").splitlines() if (name := line.strip())]
