"""Source kind `hugging-face`: a data set of the library `datasets`, on disk or by its name on the hub."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from pydantic import Field, ValidationInfo, field_validator

from sail_align.extract.data import Part, Sample, Source, Status, UnreadableImageError
from sail_align.extract.errors import UserError, listing
from sail_align.extract.sources.config import NonEmpty, PathsConfig, SourceConfig
from sail_align.extract.sources.file_set import RANGE, FileSet, is_inside
from sail_align.extract.sources.hugging_face_load import data_folder, import_datasets, open_rows
from sail_align.extract.sources.hugging_face_rows import Stretch
from sail_align.extract.sources.images import read_image
from sail_align.extract.sources.labels import ClassList, Labels, read_class_list

PROBED_PATHS = 100
"""Number of rows in which a column of texts must have the path of an image."""

DataFiles = NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class HuggingFaceConfig(PathsConfig, SourceConfig):
    """A data set of the library `datasets`: a folder or file `root` that it can read, or `name` on the hub.

    The folder was written by `save_to_disk`, downloaded from the hub, or is another one that `load_dataset` accepts.
    `data_files` names some of its files (names or patterns), or those of each split.

    With `streaming`, parquet files are read where they are. Otherwise the library first copies all rows to its cache.

    `image`, `captions`, `label`, `url`, `group` and `key` name columns. Without `key`, a sample's key is its row
    number. `captions` maps a caption's name to a column of text, or of lists of text: `alt` then gives `alt0`, `alt1`,
    …. A single column of either gives `c0`, `c1`, …. `classes` is required if `label` contains numbers without names.
    """

    omitted: ClassVar[frozenset[str]] = frozenset({"data_files", "streaming", "key", "group"})

    kind: Literal["hugging-face"]
    name: NonEmpty | None = None
    config: str | None = None
    revision: str | None = None
    split: NonEmpty = "train"
    data_files: DataFiles | Annotated[dict[str, DataFiles], Field(min_length=1)] | None = None
    streaming: bool = False
    key: NonEmpty | None = None
    image: NonEmpty = "image"
    captions: NonEmpty | dict[str, NonEmpty] = Field(default={})
    label: NonEmpty | None = None
    classes: dict[int | str, str] | ClassList | None = None
    group: NonEmpty | None = None
    url: NonEmpty | None = None

    @field_validator("name")
    @classmethod
    def _require_hub_name(cls, name: str | None) -> str | None:
        if name is not None and not _HUB_NAME.fullmatch(name):
            raise ValueError(
                "It is not the name of a data set on the hub. For a folder, write `root` instead of `name`"
            )
        return name

    @field_validator("data_files")
    @classmethod
    def _require_split(cls, files: Any, info: ValidationInfo) -> Any:
        split = info.data.get("split")
        if isinstance(files, dict) and split not in files:
            raise ValueError(f"It has no files of the split {split!r}")
        return files

    @property
    def files_of_split(self) -> list[str]:
        """The names and patterns of the split's data files. Empty if the data set itself decides."""
        files = self.data_files[self.split] if isinstance(self.data_files, dict) else self.data_files or []
        return [files] if isinstance(files, str) else files

    @property
    def needs(self) -> list[str]:
        """The folder and the data files, or nothing for a name on the hub."""
        files = [*self.files_of_split, *([self.classes] if isinstance(self.classes, str) else [])]
        return [] if self.name else [".", *(RANGE.sub("*", file) for file in files if ":" not in file)]

    @property
    def urls(self) -> list[str]:
        """The name on the hub, and the URLs of data files."""
        return [f"hf://datasets/{self.name}"] if self.name else [url for url in self.files_of_split if "://" in url]

    def open(self, data_root: Path) -> "HuggingFaceSource":
        """Open the source."""
        return HuggingFaceSource(self, data_root)


class HuggingFaceSource(Source):
    """Rows of a data set. The location of a sample is its row; see `hugging_face_rows`. Images are read one at a time.

    Raises:
        UserError: The library is not installed, the data set or split does not exist, or a column is missing or has an
            unsuitable type.
    """

    def __init__(self, config: HuggingFaceConfig, data_root: Path):
        self._config = config
        datasets = import_datasets()
        caches = [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]  # of the library's downloads and copies
        self._root = data_folder(config, data_root)
        self._folders = [*([] if config.name else [self._root]), *caches]
        self._rows = open_rows(config, data_root)
        self._schema = self._rows.schema
        self._texts = {"c": config.captions} if isinstance(config.captions, str) else config.captions
        named = (config.url, config.label, config.group, config.key)
        self._columns = list(dict.fromkeys([*self._texts.values(), *filter(None, named)]))
        self.has_groups = config.group is not None
        for column in (config.image, *self._columns):
            if column not in self._schema.names:
                raise UserError(
                    f"The data set has no column {column!r}. Its columns are {listing(self._schema.names)}."
                )
        self._require_types()
        self._require_images()

    @cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]  # reads the rows when first used
        """The names of the classes."""
        return self._labels.classes if self._config.label else ()

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """The names of all captions; those of a column of lists go up to the most texts of any row."""
        names = [name for caption in self._texts for name in self._names(caption)]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"Caption {repeated[0]!r} occurs twice in source.captions. Rename one.")
        return tuple(names)

    def parts(self) -> Sequence[Part]:
        """Return the parts: a data file each if they are streamed, else a million rows each."""
        return [Part(each.name, partial(self._read, each), each.files) for each in self._rows.stretches()]

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Decode the image of a row, from its bytes or from the file that the row names."""
        value = self._rows.value(location, self._config.image)
        content, path = _image_of(value)
        name = f"row {location}"
        if content is not None:
            return read_image(content, name, least=least)
        if not path:
            raise UnreadableImageError(Status.MISSING, f"{name} has no image")
        files = FileSet(self._folders[0])
        if self._config.allow_outside or ("://" not in path and any(is_inside(each, path) for each in self._folders)):
            files.add(path)
        files.require_named(path)
        if local := files.local(path):
            return read_image(local, least=least)
        with files.open(path) as file:
            return read_image(file.read(), name, least=least)

    def _read(self, stretch: Stretch) -> Iterator[Sample]:
        config = self._config
        numbers = self._rows.span(stretch)
        for offset, row in enumerate(self._values(stretch, self._columns)):
            number = numbers[offset]
            captions: dict[str, str] = {}
            for name, column in self._texts.items():
                value = row[column]
                if self._is_numbered(name):
                    texts = [text for text in map(_text, value if isinstance(value, list) else [value]) if text]
                    captions |= {f"{name}{place}": text for place, text in enumerate(texts)}
                elif text := _text(value):
                    captions[name] = text
            if config.key and not _text(row[config.key]):
                raise UserError(f"Column {config.key!r} is empty in row {number}. Every row needs a key.")
            yield Sample(
                key=str(row[config.key]) if config.key else str(number),
                image=self._rows.location(stretch, offset),
                captions=captions,
                label=self._labels.of(row[config.label], f"row {number}") if config.label else -1,
                url=_text(row[config.url]) if config.url else "",
                group=_text(row[config.group]) if config.group else "",
            )

    def _values(self, stretch: Stretch, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield some columns of the rows of a stretch."""
        if not columns:
            yield from ({} for _ in self._rows.span(stretch))
            return
        for table in self._rows.tables(stretch, columns):
            yield from table.to_pylist()

    def _is_numbered(self, caption: str) -> bool:
        return isinstance(self._config.captions, str) or _is_list(self._schema.field(self._texts[caption]).type)

    def _names(self, caption: str) -> list[str]:
        """Return the names of the captions of a column."""
        if not self._is_numbered(caption):
            return [caption]
        column, most = self._texts[caption], 1
        if _is_list(self._schema.field(column).type):
            most = max((self._most_texts(each, column) for each in self._rows.stretches()), default=0)
        return [f"{caption}{number}" for number in range(most)]

    def _most_texts(self, stretch: Stretch, column: str) -> int:
        """Return the most texts of any row."""
        most = 0
        for table in self._rows.tables(stretch, [column]):
            lists = table[column].combine_chunks()
            is_caption = pc.not_equal(pc.utf8_trim_whitespace(pc.list_flatten(lists)), "")
            row_of_caption = pc.list_parent_indices(lists).filter(is_caption)
            most = max(most, int(np.bincount(row_of_caption).max(initial=0)))
        return most

    def _require_types(self) -> None:
        config, types = self._config, pa.types
        for column in self._texts.values():
            kind = self._schema.field(column).type
            if not _is_text(kind.value_type if _is_list(kind) else kind):
                raise UserError(f"Column {column!r} is invalid: got {kind}, expected text or lists of text.")
        for column in filter(None, (config.key, config.group)):
            kind = self._schema.field(column).type
            if not (_is_text(kind) or types.is_integer(kind)):
                raise UserError(f"Column {column!r} is invalid: got {kind}, expected text or whole numbers.")

    def _require_images(self) -> None:
        """Raise `UserError` unless the column has images: as bytes, as paths, or as both, cast to an Image or not."""
        column = self._config.image
        kind = self._schema.field(column).type
        if holds_images(kind):
            return
        if not _is_text(kind):
            raise UserError(
                f"Column {column!r} is invalid: got {kind}, expected an Image, bytes, or paths. Correct source.image."
            )
        rows = (row for each in self._rows.stretches() for row in self._values(each, [column]))
        paths = [row[column] for row in islice(rows, PROBED_PATHS) if row[column]]
        files = FileSet(self._folders[0])
        if paths and not any((path := files.local(name)) and path.is_file() for name in paths):
            raise UserError(
                f"Column {column!r} is invalid: none of its first {len(paths)} texts is the path of a file in "
                f"{self._folders[0]} (the first is {paths[0][:200]!r}). Correct source.image."
            )

    @cached_property
    def _labels(self) -> Labels:
        column, classes = str(self._config.label), self._config.classes
        kind, feature = self._schema.field(column).type, self._rows.features.get(column)
        are_numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not (are_numbers or _is_text(kind)):
            raise UserError(f"Column {column!r} is invalid: got {kind}, expected numbers or names of classes.")
        if isinstance(classes, Mapping):
            return Labels.mapped({str(value): name for value, name in classes.items()})
        if classes:
            return Labels.named(read_class_list(classes, FileSet(self._root)), numbers=are_numbers)
        if names := getattr(feature, "names", None):
            return Labels.named(names, numbers=True)
        values = (row[column] for each in self._rows.stretches() for row in self._values(each, [column]))
        return Labels.found(column, lambda: values)


def holds_images(kind: pa.DataType) -> bool:
    """Return whether values of a type may be images: as bytes, or as structs of `bytes` and `path`."""
    names = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    is_binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return bool(is_binary or (names & {"bytes", "path"} and names <= {"bytes", "path"}))


def _image_of(value: Any) -> tuple[bytes | None, str | None]:
    """Return the bytes and the path of an image, of which one may be missing."""
    if isinstance(value, Mapping):
        return value.get("bytes"), value.get("path")
    return (value, None) if isinstance(value, bytes) else (None, value)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _text(value: str | float | None) -> str:
    """Return a caption or URL, "" for null and NaN."""
    return "" if value is None or value != value else str(value).strip()
