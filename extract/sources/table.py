"""Source kind `table`: tables that name images in a folder and contain their captions."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator, model_validator

from sail_align.extract.data import IGNORED, Part, Sample
from sail_align.extract.errors import UserError, listing
from sail_align.extract.sources.config import NonEmpty, PathsConfig, SourceConfig
from sail_align.extract.sources.file_set import Fence, FileSet
from sail_align.extract.sources.images import FolderSource
from sail_align.extract.sources.labels import ClassList, Labels, read_class_list
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
    lists (JSONL, parquet) counts as several rows. `url` is the column with the address of an image, and `group` that
    with the name of its group. `masks` is a folder of PNGs with the images' names, and `classes` names their pixel
    values; other values belong to no class.

    `label` is a column with the class of each image. Its texts are the names of the classes, unless `classes` has them:
    by their values in the column, or as a list of the names, a file with one name per line, or a published list.
    """

    omitted: ClassVar[frozenset[str]] = TextFormat.omitted | {"label", "group"}

    kind: Literal["table"]
    files: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    images: str = "."
    image: str = "image"
    url: NonEmpty | None = None
    captions: NonEmpty | dict[str, NonEmpty] = Field(default={})
    split: Split | None = None
    masks: str | None = None
    label: NonEmpty | None = None
    classes: dict[int | str, str] | ClassList = Field(default={})
    group: NonEmpty | None = None

    @model_validator(mode="after")
    def _require_captions_or_label(self) -> Self:
        if "captions" not in self.model_fields_set and not self.label:
            raise ValueError("'captions' is missing. Name their columns, or write `captions: {}` for images only")
        return self

    @field_validator("label")
    @classmethod
    def _label_without_masks(cls, label: str | None, info: ValidationInfo) -> str | None:
        if label and info.data.get("masks"):
            raise ValueError("Remove it or 'masks': 'classes' has the names of one of them")
        return label

    @field_validator("classes")
    @classmethod
    def _classes_of_masks(cls, classes: Any, info: ValidationInfo) -> Any:
        if info.data.get("label"):
            return classes
        if not isinstance(classes, dict):
            raise ValueError("Without 'label', it maps the values of masks to names")
        if wrong := [str(value) for value in classes if not str(value).isdecimal() or int(value) > 254]:
            raise ValueError(f"Got the mask values {listing(wrong, 5)}, expected 0 to 254")
        return classes

    @property
    def needs(self) -> list[str]:
        """The tables, the folders of images and masks, and the table of the split."""
        others = [name for name in (self.masks, self.split.file if self.split else None) if name]
        others += [self.classes] if isinstance(self.classes, str) and ":" not in self.classes else []
        return [*([self.files] if isinstance(self.files, str) else self.files), self.images, *others]

    def open(self, data_root: Path) -> "TableSource":
        """Open the source."""
        return TableSource(self, data_root)


class _Facts(NamedTuple):
    """What a row states about its image, besides captions."""

    url: str
    label: str
    group: str


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
        self.has_groups = config.group is not None
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

    @cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]  # reads the tables when first used
        """The names of the classes."""
        return self._labels.classes

    @cached_property
    def _labels(self) -> Labels:
        column, classes = self._config.label, self._config.classes
        if isinstance(classes, Mapping) and (classes or not column):
            return Labels.mapped({str(value): name for value, name in classes.items()})
        if classes and not isinstance(classes, Mapping):
            return Labels.named(read_class_list(classes, FileSet(self._root)))
        return Labels.found(
            str(column), lambda: (facts.label for file in self._files for _, facts, *_ in self._rows(file, []))
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
            index_of_value[int(value)] = index
        indices: NDArray[np.uint8] = index_of_value[
            self.read_mask(self.fence.path(self._root / self._config.masks, location))
        ]
        return indices

    def _read_grouped(self) -> Iterator[Sample]:
        for image, (facts, texts) in self._grouped.items():
            yield self._sample(image, facts, self.numbered(texts))

    def _read(self, file: Path, names: dict[str, str]) -> Iterator[Sample]:
        for image, facts, *texts in self._rows(file, list(names.values())):
            if any(isinstance(text, list) for text in texts):
                raise UserError(f"A caption of {image!r} is a list. Write `captions: <column>` for such a column.")
            captions = {name: text for name, text in zip(names, texts, strict=True) if text and text.strip()}
            yield self._sample(image, facts, captions)

    def _sample(self, image: str, facts: _Facts, captions: dict[str, str]) -> Sample:
        mask = (
            str(Path(image).with_suffix(".png")) if self._config.masks and Path(image).name else ""
        )  # `.` has no name
        label = self._labels.of(facts.label, f"image {image!r}") if self._config.label else -1
        return Sample(image, image, captions, label, mask, facts.url, facts.group)

    @cached_property
    def _grouped(self) -> dict[str, tuple[_Facts, list[str]]]:
        """The facts and all captions of each image, if each row of the tables has one caption or a list of them."""
        grouped: dict[str, tuple[_Facts, list[str]]] = {}
        for file in self._files:
            for image, facts, texts in self._rows(file, [str(self._config.captions)]):
                first, of_image = grouped.setdefault(image, (facts, []))
                for what in ("label", "group"):
                    if (one := getattr(first, what)) != (other := getattr(facts, what)):
                        raise UserError(
                            f"Image {image!r} of {file} has two {what}s, {one!r} and {other!r}. Correct it."
                        )
                of_image += [text for text in (texts if isinstance(texts, list) else [texts]) if text and text.strip()]
        return grouped

    def _rows(self, file: Path, columns: list[str]) -> Iterator[tuple[Any, ...]]:
        """Yield image, facts and `columns` of each row that the split keeps. One batch is in memory at a time."""
        config, split = self._config, self._config.split
        facts = (config.url, config.label, config.group)
        own_split = split if split and split.file is None else None
        before = 0
        plain = [config.image, *filter(None, facts), *([own_split.column] if own_split else [])]
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
            stated = ([""] * len(batch) if name is None else pc.coalesce(batch[name], "").to_pylist() for name in facts)
            texts = (batch[name].to_pylist() for name in columns)
            for image, url, label, group, *others in zip(images, *stated, *texts, strict=True):
                if self._kept is None or image in self._kept:
                    yield image, _Facts(url, label.strip(), group.strip()), *others

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
