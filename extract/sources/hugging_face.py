"""Source kind `hugging-face`: a data set of the library `datasets`, saved to disk or by its name on the hub."""

import importlib
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.data import Part, Sample, Source, Status, UnreadableImageError
from sail_align.extract.errors import UserError
from sail_align.extract.schema import HuggingFaceSource as Description
from sail_align.extract.sources.file_set import FileSet
from sail_align.extract.sources.images import read_image

PART_ROWS = 1 << 20
READ_ROWS = 8_192
"""Rows that are Python objects at a time, without their images."""


class HuggingFaceSource(Source):
    """See `descriptions.HuggingFaceSource`. A sample's key and location are its row number.

    The tables stay on disk, mapped into memory; images are read one by one.

    Raises:
        UserError: The library is not installed, there is no such data set or split, or a column is missing or holds
            something else than is asked of it.
    """

    def __init__(self, description: Description, data_root: Path):
        self._about = description
        self._rows = _load(description, data_root / description.root)
        self._schema: pa.Schema = self._rows.features.arrow_schema
        columns = [description.captions] if isinstance(description.captions, str) else description.captions.values()
        self._captions = list(columns)
        self._others = [name for name in (description.url, description.label) if name]
        for column in (description.image, *self._captions, *self._others):
            if column not in self._schema.names:
                raise UserError(f"The data set has no column {column!r}; it has {', '.join(self._schema.names)}.")
        self._require_texts()
        self._images = self._bytes_of_images()
        self._classes = self._names_of_classes()

    @property
    def captions(self) -> tuple[str, ...]:
        """The names in the manifest, or c0 … for as many captions as any image has."""
        if isinstance(self._about.captions, dict):
            return tuple(self._about.captions)
        return tuple(f"c{i}" for i in range(self._most_captions))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that the label's column knows, or the manifest's."""
        return self._classes

    def parts(self) -> Sequence[Part]:
        """One part a million rows, each made from all files of the data set: which rows lie where is not told."""
        files = tuple(Path(file["filename"]) for file in self._rows.cache_files)
        starts = range(0, len(self._rows), PART_ROWS)
        return [Part(f"rows from {start}", partial(self._read, start), files) for start in starts]

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Decode the image of a row, from its bytes or from the file that the row names."""
        stored = self._images[int(location)][self._about.image] or {"bytes": None, "path": None}
        name = f"row {location}"
        if stored["bytes"] is not None:
            return read_image(stored["bytes"], name, least=least)
        if stored["path"] is None:
            raise UnreadableImageError(Status.MISSING, f"{name} has no image")
        if path := FileSet(Path()).local(stored["path"]):
            return read_image(path, least=least)
        with FileSet(Path()).open(stored["path"]) as file:
            return read_image(file.read(), name, least=least)

    def mask(self, location: str) -> NDArray[np.uint8]:
        """Raise `UserError`: these rows have no masks."""
        raise UserError(f"A hugging-face source has no masks ({location!r} asked for); use the kind 'table'.")

    def _read(self, start: int) -> Iterator[Sample]:
        captions, url, label = self._about.captions, self._about.url, self._about.label
        for number, row in enumerate(self._batches(start, [*self._captions, *self._others]), start):
            if isinstance(captions, str):
                value = row[captions]
                texts = [text for text in map(_text, value if isinstance(value, list) else [value]) if text]
                named = {f"c{i}": text for i, text in enumerate(texts)}
            else:
                named = {name: text for name, column in captions.items() if (text := _text(row[column]))}
            yield Sample(
                key=str(number),
                image=str(number),
                captions=named,
                label=self._label(number, row[label]) if label else -1,
                url=_text(row[url]) if url else "",
            )

    def _batches(self, start: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Yield the rows of a part, with some columns of each."""
        stop = min(start + PART_ROWS, len(self._rows))
        if not columns:
            yield from ({} for _ in range(start, stop))
            return
        rows = self._rows.select(range(start, stop)).select_columns(list(dict.fromkeys(columns))).with_format("arrow")
        for table in rows.iter(READ_ROWS):
            yield from table.to_pylist()

    def _label(self, row: int, value: int | None) -> int:
        if value is None or value == -1:
            return -1
        if not 0 <= value < len(self._classes):
            raise UserError(f"The label of row {row} is {value}; the {len(self._classes)} classes count from 0.")
        return value

    def _require_texts(self) -> None:
        for column in self._captions:
            kind = self._schema.field(column).type
            lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            if lists and not isinstance(self._about.captions, str):
                raise UserError(f"Column {column!r} holds lists; write `captions: {column}` for such a column.")
            if not _is_text(kind.value_type if lists else kind):
                raise UserError(f"Column {column!r} holds {kind}; captions are text or lists of it.")

    def _bytes_of_images(self) -> Any:
        datasets = _library()
        column = self._about.image
        if not isinstance(feature := self._rows.features[column], datasets.Image):
            raise UserError(f"Column {column!r} holds {feature}; cast it to an Image before the data set is saved.")
        return self._rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def _names_of_classes(self) -> tuple[str, ...]:
        if not self._about.label:
            return ()
        feature = self._rows.features[self._about.label]
        names = self._about.classes or getattr(feature, "names", None)
        if not names or not pa.types.is_integer(self._schema.field(self._about.label).type):
            raise UserError(
                f"Column {self._about.label!r} holds {feature}; labels are numbers, named by the data set (ClassLabel) "
                "or by source.classes."
            )
        return tuple(names)

    @cached_property
    def _most_captions(self) -> int:
        column = self._captions[0]
        kind = self._schema.field(column).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return 1
        tables = self._rows.select_columns([column]).with_format("arrow").iter(READ_ROWS)
        return max((_most_texts(table[column].combine_chunks()) for table in tables), default=0)


def _load(about: Description, folder: Path) -> Any:
    datasets = _library()
    try:
        if about.name:
            return datasets.load_dataset(about.name, about.config, split=about.split, revision=about.revision)
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as problem:
        said = " ".join(str(problem).split())
        raise UserError(f"Data set {about.name or folder} cannot be opened: {said.rstrip('.')}.") from problem
    if isinstance(found, datasets.DatasetDict):
        if about.split not in found:
            raise UserError(f"{folder} has no split {about.split!r}; it has {', '.join(found)}.")
        return found[about.split]
    if found.split is not None and str(found.split) != about.split:
        raise UserError(f"{folder} is the split '{found.split}'; the manifest asks for {about.split!r}.")
    return found


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as problem:
        raise UserError("This source needs the package datasets: pip install 'sail-align[datasets]'.") from problem


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _most_texts(lists: pa.ListArray) -> int:
    """Return the most texts that one of some lists holds, not counting empty ones."""
    says = pc.not_equal(pc.utf8_trim_whitespace(pc.list_flatten(lists)), "")
    return int(np.bincount(pc.list_parent_indices(lists).filter(says)).max(initial=0))


def _text(value: str | None) -> str:
    return (value or "").strip()
