"""Source kind `table`: tables that name images in a folder and contain their captions."""

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from sail_align.extract.data import IGNORED, Part, Sample
from sail_align.extract.errors import UserError
from sail_align.extract.sources.config import NonEmpty, PathsConfig, SourceConfig
from sail_align.extract.sources.file_set import Fence
from sail_align.extract.sources.images import FolderSource
from sail_align.extract.sources.table_files import TextFormat, find_tables, read_batches

PROBED_IMAGES = 100
"""Number of samples whose images are looked for when the source is opened."""


class Split(TextFormat):
    """Keep the rows whose `column` equals `keep`.

    The column is in the tables themselves, or in another table `file` that is joined by the image. By default, `file`
    has the encoding of the tables.
    """

    column: str
    keep: str
    file: str | None = None


class TableConfig(PathsConfig, TextFormat, SourceConfig):
    """Tables (CSV, TSV, JSONL, parquet) that name images in a folder and contain their captions.

    A table has either one row per image and a column for each caption (`captions: {raw: title, long: description}`), or
    several rows per image with one caption each (`captions: caption`), named `c0`, `c1`, … in file order. A column of
    lists (JSONL, parquet) counts as several rows. `url` is the column with the address of an image. `masks` is a folder
    of PNGs with the images' names, and `classes` names their pixel values; other values belong to no class.
    """

    kind: Literal["table"]
    files: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    images: str = "."
    image: str = "image"
    url: NonEmpty | None = None
    captions: NonEmpty | Annotated[dict[str, NonEmpty], Field(min_length=1)]
    split: Split | None = None
    masks: str | None = None
    classes: dict[Annotated[int, Field(ge=0, le=254)], str] = Field(default={})

    @property
    def needs(self) -> list[str]:
        """The tables, the folders of images and masks, and the table of the split."""
        others = [name for name in (self.masks, self.split.file if self.split else None) if name]
        return [*([self.files] if isinstance(self.files, str) else self.files), self.images, *others]

    def open(self, data_root: Path) -> "TableSource":
        """Open the source."""
        return TableSource(self, data_root)


class TableSource(FolderSource):
    """Samples listed in tables. A sample's key is the path of its image, as the table spells it.

    Tables with one column per caption are streamed. If the captions of an image may be in any row, all captions are
    held in memory. So are the images that a split's own file keeps.

    Raises:
        UserError: Tables or images are missing, a column is missing, or the form does not match the description.
    """

    def __init__(self, config: TableConfig, data_root: Path):
        self._config = config
        self.caption_origins = config.captions
        self.classes = tuple(config.classes.values())
        self._root = data_root / config.root
        self.folder = self._root / config.images
        self.fence = Fence(data_root, config.allow_outside)
        self._files = find_tables(self._root, config.files)
        if not self.folder.is_dir():
            raise UserError(f"Image folder {self.folder} is missing. Set --data-root or the manifest's 'images'.")
        probed = list(islice(self.samples(), PROBED_IMAGES))
        if probed and not any((self.folder / sample.image).is_file() for sample in probed):
            raise UserError(
                f"None of the first {len(probed)} images is in {self.folder} (the first is {probed[0].image!r}). "
                "Check 'images', 'image' and --data-root."
            )

    def parts(self) -> Sequence[Part]:
        """Return one part per table, or a single one if the captions of an image may be in any row of any table."""
        split, captions = self._config.split, self._config.captions
        split_file = (self._root / split.file,) if split and split.file else ()
        if isinstance(captions, str):
            return [Part("all tables", self._read_grouped, (*self._files, *split_file))]
        return [Part(str(file), partial(self._read, file, captions), (file, *split_file)) for file in self._files]

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Open a mask, (H, W). Pixel values without a class become `IGNORED`."""
        if not self._config.masks:
            return super().mask(location)
        index_of_value = np.full(256, IGNORED, dtype=np.uint8)
        for index, value in enumerate(self._config.classes):
            index_of_value[value] = index
        indices: NDArray[np.uint8] = index_of_value[
            self.read_mask(self.fence.path(self._root / self._config.masks, location))
        ]
        return indices

    def _read_grouped(self) -> Iterator[Sample]:
        for image, (url, texts) in self._grouped.items():
            yield self._sample(image, url, self.numbered(texts))

    def _read(self, file: Path, names: dict[str, str]) -> Iterator[Sample]:
        for image, url, *texts in self._rows(file, list(names.values())):
            if any(isinstance(text, list) for text in texts):
                raise UserError(f"A caption of {image!r} is a list. Write `captions: <column>` for such a column.")
            captions = {name: text for name, text in zip(names, texts, strict=True) if text and text.strip()}
            yield self._sample(image, url, captions)

    def _sample(self, image: str, url: str, captions: dict[str, str]) -> Sample:
        mask = (
            str(Path(image).with_suffix(".png")) if self._config.masks and Path(image).name else ""
        )  # `.` has no name
        return Sample(key=image, image=image, captions=captions, mask=mask, url=url)

    @cached_property
    def _grouped(self) -> dict[str, tuple[str, list[str]]]:
        """The URL and all captions of each image, if each row of the tables has one caption or a list of them."""
        grouped: dict[str, tuple[str, list[str]]] = {}
        for file in self._files:
            for image, url, texts in self._rows(file, [str(self._config.captions)]):
                _, of_image = grouped.setdefault(image, (url, []))
                of_image += [text for text in (texts if isinstance(texts, list) else [texts]) if text and text.strip()]
        return grouped

    def _rows(self, file: Path, columns: list[str]) -> Iterator[tuple[Any, ...]]:
        """Yield image, URL and `columns` of each row that the split keeps. One batch is in memory at a time."""
        config, split = self._config, self._config.split
        url = [config.url] if config.url else []
        own_split = split if split and split.file is None else None
        before = 0
        plain = [config.image, *url, *([own_split.column] if own_split else [])]
        for batch in read_batches(file, [*plain, *columns], plain, config.delimiter, config.encoding):
            empty = pc.index(pc.equal(pc.coalesce(batch[config.image], ""), ""), True).as_py()
            if empty >= 0:
                raise UserError(
                    f"Column {config.image!r} of {file} is empty in row {before + empty + 1}. Every row needs an image."
                )
            self._require_inside(file, before, batch[config.image])
            before += len(batch)
            if own_split:
                batch = batch.filter(pc.equal(batch[own_split.column], own_split.keep))
            images = batch[config.image].to_pylist()
            urls = pc.coalesce(batch[config.url], "").to_pylist() if config.url else [""] * len(batch)
            for row in zip(images, urls, *(batch[name].to_pylist() for name in columns), strict=True):
                if self._kept is None or row[0] in self._kept:
                    yield row

    def _require_inside(self, file: Path, before: int, images: pa.ChunkedArray) -> None:
        """Raise `UserError` if the path of an image or of its mask leads out of the data root; name file and row."""
        for row in np.flatnonzero(pc.match_substring_regex(images, r"^/|(^|/)\.\.(/|$)").to_numpy()):
            image = images[int(row)].as_py()
            try:
                self.fence.path(self.folder, image)
                if self._config.masks:
                    self.fence.path(self._root / self._config.masks, image)
            except UserError as problem:
                raise UserError(f"Row {before + int(row) + 1} of {file} is invalid: {problem}") from problem

    @cached_property
    def _kept(self) -> set[str] | None:
        """The images that a split's own file keeps; None if there is no such file."""
        split = self._config.split
        if split is None or split.file is None:
            return None
        kept: set[str] = set()
        columns, encoding = [self._config.image, split.column], split.encoding or self._config.encoding
        for batch in read_batches(self._root / split.file, columns, columns, split.delimiter, encoding):
            kept.update(batch.filter(pc.equal(batch[split.column], split.keep))[self._config.image].to_pylist())
        return kept
