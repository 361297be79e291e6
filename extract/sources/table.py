"""Source kind `table`: tables that name images in a folder and hold their captions."""

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.data import IGNORED, Part, Sample, Source
from sail_align.extract.errors import UserError
from sail_align.extract.schema import TableSource as Description
from sail_align.extract.sources.images import read_image_in, read_mask
from sail_align.extract.sources.tabular import find_tables, read_batches

PROBED = 100
"""Samples whose images are looked for before anything is encoded."""


class TableSource(Source):
    """See `descriptions.TableSource` for the forms of table. A sample's key is its image's path as the table has it.

    Tables with a column a caption are streamed. Where an image's captions may be in any row, all of them are in memory,
    and so are the images that a split's own file keeps.

    Raises:
        UserError: Tables or images are not where the manifest says, a column is missing, or the form does not fit.
    """

    def __init__(self, description: Description, data_root: Path):
        self._about = description
        self._root = data_root / description.root
        self._images = self._root / description.images
        self._masks = self._root / description.masks if description.masks else None
        self._files = find_tables(self._root, description.files)
        self._require_images()

    @property
    def captions(self) -> tuple[str, ...]:
        """The names in the manifest, or c0 … for as many captions as any image has."""
        if isinstance(self._about.captions, dict):
            return tuple(self._about.captions)
        return tuple(f"c{i}" for i in range(max((len(texts) for _, texts in self._grouped.values()), default=0)))

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

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Open an image by its path under the image folder."""
        return read_image_in(self._images, location, least=least)

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
        for image, (url, texts) in self._grouped.items():
            yield self._sample(image, url, {f"c{i}": text for i, text in enumerate(texts)})

    def _named_samples(self, file: Path, names: dict[str, str]) -> Iterator[Sample]:
        for image, url, *texts in self._rows(file, list(names.values())):
            if any(isinstance(text, list) for text in texts):
                raise UserError(f"A caption of {image!r} is a list; write `captions: <column>` for such a column.")
            yield self._sample(image, url, {name: text for name, text in zip(names, texts, strict=True) if _says(text)})

    def _sample(self, image: str, url: str, captions: dict[str, str]) -> Sample:
        mask = str(Path(image).with_suffix(".png")) if self._masks else ""
        return Sample(key=image, image=image, captions=captions, mask=mask, url=url)

    @cached_property
    def _grouped(self) -> dict[str, tuple[str, list[str]]]:
        """The URL and all captions of each image, where each row of the tables holds one (or a list of them)."""
        if not isinstance(self._about.captions, str):
            raise TypeError("captions are named columns: there is one row an image")
        grouped: dict[str, tuple[str, list[str]]] = {}
        for file in self._files:
            for image, url, texts in self._rows(file, [self._about.captions]):
                _, of_image = grouped.setdefault(image, (url, []))
                of_image += [text for text in (texts if isinstance(texts, list) else [texts]) if _says(text)]
        return grouped

    def _rows(self, file: Path, columns: list[str]) -> Iterator[list[Any]]:
        """Yield image, URL and columns of every row of a table that the split keeps, a batch in memory at a time."""
        split, image = self._about.split, self._about.image
        url = [self._about.url] if self._about.url else []
        own_split = split if split and split.file is None else None
        before = 0
        for batch in read_batches(file, [image, *url, *columns, *([own_split.column] if own_split else [])]):
            if (empty := pc.index(pc.equal(pc.coalesce(batch[image], ""), ""), True).as_py()) >= 0:
                raise UserError(
                    f"Column {image!r} of {file} is empty in row {before + empty + 1}; each row needs an image."
                )
            before += len(batch)
            if own_split:
                batch = batch.filter(pc.equal(batch[own_split.column], own_split.keep))
            urls = pc.coalesce(batch[url[0]], "").to_pylist() if url else [""] * len(batch)
            rows = zip(batch[image].to_pylist(), urls, *(batch[name].to_pylist() for name in columns), strict=True)
            yield from (list(row) for row in rows if self._kept is None or row[0] in self._kept)

    @cached_property
    def _kept(self) -> set[str] | None:
        """The images that a split's own file keeps; None where there is no such file."""
        split = self._about.split
        if split is None or split.file is None:
            return None
        kept: set[str] = set()
        for batch in read_batches(self._root / split.file, [self._about.image, split.column]):
            kept.update(batch.filter(pc.equal(batch[split.column], split.keep))[self._about.image].to_pylist())
        return kept

    def _require_images(self) -> None:
        if not self._images.is_dir():
            raise UserError(f"Image folder {self._images} is not there; set --data-root or the manifest's 'images'.")
        probed = list(islice(self.samples(), PROBED))
        if probed and not any((self._images / sample.image).is_file() for sample in probed):
            raise UserError(
                f"None of the first {len(probed)} images is under {self._images} "
                f"(the first is {probed[0].image!r}); check 'images', 'image' and --data-root."
            )


def _says(text: str | None) -> bool:
    """Whether a caption holds more than blanks."""
    return bool(text and text.strip())
