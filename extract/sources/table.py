"""Source kind `table`: tables that name images in a folder and hold their captions."""

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.errors import UserError
from sail_align.extract.sources.base import IGNORED, Part, Sample, Source
from sail_align.extract.sources.descriptions import TableSource as Description
from sail_align.extract.sources.images import read_image, read_mask
from sail_align.extract.sources.tables import read_table

PROBED = 100
"""Samples whose images are looked for before anything is encoded."""
READ_ROWS = 8_192
"""Rows of a table that are Python objects at a time."""


class TableSource(Source):
    """See `manifest.TableSource` for the forms of table. A sample's key is its image's path as the table has it.

    Raises:
        UserError: Tables or images are not where the manifest says, a column is missing, or the form does not fit.
    """

    def __init__(self, description: Description, data_root: Path):
        self._about = description
        self._root = data_root / description.root
        self._images = self._root / description.images
        self._masks = self._root / description.masks if description.masks else None
        patterns = [description.files] if isinstance(description.files, str) else description.files
        self._files = list(dict.fromkeys(path for pattern in patterns for path in self._matches(pattern)))
        if not self._files:
            wanted = ", ".join(patterns)
            raise UserError(f"No table {wanted} in {self._root.resolve()}; correct source.files or set --data-root.")
        self._require_images()

    @property
    def captions(self) -> tuple[str, ...]:
        """The names in the manifest, or c0 … for as many captions as any image has."""
        if isinstance(self._about.captions, dict):
            return tuple(self._about.captions)
        return tuple(f"c{i}" for i in range(max(map(len, self._grouped.values()), default=0)))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of mask values, in the manifest's order."""
        return tuple(self._about.classes.values())

    def parts(self) -> Sequence[Part]:
        """One part a table; all tables together where an image's captions may be in any of their rows."""
        split = self._about.split
        also = (self._root / split.file,) if split and split.file else ()
        captions = self._about.captions
        if isinstance(captions, str):
            return [Part("all tables", self._grouped_samples, (*self._files, *also))]
        return [Part(str(file), partial(self._named_samples, file, captions), (file, *also)) for file in self._files]

    def image(self, location: str) -> Image.Image:
        """Open an image by its path under the image folder."""
        return read_image(self._images / location)

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Open a mask; pixel values that the manifest gives no class become `IGNORED`."""
        if self._masks is None:
            raise UserError("This manifest names no folder of masks; add 'masks' and 'classes' to its source.")
        table = np.full(256, IGNORED, dtype=np.uint8)
        for index, value in enumerate(self._about.classes):
            table[value] = index
        masked: NDArray[np.uint8] = table[read_mask(self._masks / location)]
        return masked

    def _grouped_samples(self) -> Iterator[Sample]:
        for image, texts in self._grouped.items():
            yield self._sample(image, {f"c{i}": text for i, text in enumerate(texts)})

    def _named_samples(self, file: Path, names: dict[str, str]) -> Iterator[Sample]:
        for image, *texts in self._rows(file, list(names.values())):
            if any(isinstance(text, list) for text in texts):
                raise UserError(f"A caption of {image!r} is a list; write `captions: <column>` for such a column.")
            yield self._sample(image, {name: text for name, text in zip(names, texts, strict=True) if text})

    def _matches(self, pattern: str) -> list[Path]:
        if (file := self._root / pattern).is_file():  # also an absolute path, and a name that holds a bracket
            return [file]
        if Path(pattern).is_absolute():
            return []
        return sorted(path for path in self._root.glob(pattern) if path.is_file())

    def _sample(self, image: str, captions: dict[str, str]) -> Sample:
        mask = str(Path(image).with_suffix(".png")) if self._masks else ""
        return Sample(key=image, image=image, captions=captions, mask=mask)

    @cached_property
    def _grouped(self) -> dict[str, list[str]]:
        """All captions of each image, where each row of the tables holds one (or a list of them)."""
        if not isinstance(self._about.captions, str):
            raise TypeError("captions are named columns: there is one row an image")
        grouped: dict[str, list[str]] = {}
        for file in self._files:
            for image, texts in self._rows(file, [self._about.captions]):
                of_image = grouped.setdefault(image, [])
                of_image += [text for text in (texts if isinstance(texts, list) else [texts]) if text]
        return grouped

    def _rows(self, file: Path, columns: list[str]) -> Iterator[list[Any]]:
        """Yield image and columns of every row of a table that the split keeps."""
        split, image = self._about.split, self._about.image
        own_split = [split.column] if split and split.file is None else []
        table = read_table(file, list(dict.fromkeys([image, *columns, *own_split])))
        if table[image].null_count or pc.any(pc.equal(table[image], "")).as_py():
            raise UserError(f"Column {image!r} of {file} is empty in some rows; each row needs an image.")
        if split:
            table = table.filter(
                pc.is_in(table[image], self._kept) if split.file else pc.equal(table[split.column], split.keep)
            )
        for batch in table.to_batches(max_chunksize=READ_ROWS):
            wanted = [batch.column(name).to_pylist() for name in (image, *columns)]
            yield from map(list, zip(*wanted, strict=True))

    @cached_property
    def _kept(self) -> pa.ChunkedArray:
        """The images that a split's own file keeps."""
        split = self._about.split
        if split is None or split.file is None:
            raise TypeError("this source has no split of its own file")
        table = read_table(self._root / split.file, [self._about.image, split.column])
        return table.filter(pc.equal(table[split.column], split.keep))[self._about.image]

    def _require_images(self) -> None:
        if not self._images.is_dir():
            raise UserError(f"Image folder {self._images} is not there; set --data-root or the manifest's 'images'.")
        probed = list(islice(self.samples(), PROBED))
        if probed and not any((self._images / sample.image).is_file() for sample in probed):
            raise UserError(
                f"None of the first {len(probed)} images is under {self._images} "
                f"(the first is {probed[0].image!r}); check 'images', 'image' and --data-root."
            )
