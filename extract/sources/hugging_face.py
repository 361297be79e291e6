"""Source kind `hugging-face`: a data set of the library `datasets`, saved to disk or by its name on the hub."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from pydantic import Field, field_validator

from sail_align.extract.data import Part, Sample, Source, Status, UnreadableImageError
from sail_align.extract.errors import UserError, import_extra, listing
from sail_align.extract.sources.config import NonEmpty, PathsConfig, SourceConfig
from sail_align.extract.sources.file_set import FileSet, is_inside
from sail_align.extract.sources.images import read_image
from sail_align.extract.system.files import read_regular

PART_ROWS = 1 << 20
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SAVED = ("dataset_dict.json", "state.json")
"""Files of a folder that `save_to_disk` wrote."""
_NOT_INSTALLED = "This source needs the package datasets: pip install 'sail-align[datasets]'."
READ_ROWS = 8_192
"""Number of rows, without their images, that are Python objects at a time."""


class HuggingFaceConfig(PathsConfig, SourceConfig):
    """A data set of the library `datasets`: a folder `root` that it can read, or `name` on the hub.

    The folder was written by `save_to_disk`, downloaded from the hub, or is another one that `load_dataset` accepts.

    `image`, `captions`, `label` and `url` name columns. `captions` maps a caption's name to a column of text. A single
    column of text or lists of text gives `c0`, `c1`, …. `classes` is required if the label's column has no class names.
    """

    kind: Literal["hugging-face"]
    name: NonEmpty | None = None
    config: str | None = None
    revision: str | None = None
    split: NonEmpty = "train"
    image: NonEmpty = "image"
    captions: NonEmpty | dict[str, NonEmpty] = Field(default={})
    label: NonEmpty | None = None
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    url: NonEmpty | None = None

    @field_validator("name")
    @classmethod
    def _require_hub_name(cls, name: str | None) -> str | None:
        if name is not None and not _HUB_NAME.fullmatch(name):
            raise ValueError(
                "It is not the name of a data set on the hub. For a folder, write `root` instead of `name`"
            )
        return name

    @property
    def needs(self) -> list[str]:
        """The folder, or nothing for a name on the hub."""
        return [] if self.name else ["."]

    @property
    def urls(self) -> list[str]:
        """The name on the hub."""
        return [f"hf://datasets/{self.name}"] if self.name else []

    def open(self, data_root: Path) -> "HuggingFaceSource":
        """Open the source."""
        return HuggingFaceSource(self, data_root)


class HuggingFaceSource(Source):
    """Rows of a data set. The key and location of a sample are its row number.

    The tables stay on disk, mapped into memory. Images are read one at a time.

    Raises:
        UserError: The library is not installed, the data set or split does not exist, or a column is missing or has an
            unsuitable type.
    """

    def __init__(self, config: HuggingFaceConfig, data_root: Path):
        self._config = config
        datasets = import_extra("datasets", _NOT_INSTALLED)
        caches = [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]  # of the library's downloads and copies
        self._folders = [*([] if config.name else [data_root / config.root]), *caches]
        self._rows = _load(datasets, config, data_root / config.root)
        self._schema: pa.Schema = self._rows.features.arrow_schema
        self.caption_origins = captions = config.captions
        self._captions = [captions] if isinstance(captions, str) else list(captions.values())
        self._columns = [*self._captions, *(name for name in (config.url, config.label) if name)]
        for column in (config.image, *self._columns):
            if column not in self._schema.names:
                raise UserError(
                    f"The data set has no column {column!r}. Its columns are {listing(self._schema.names)}."
                )
        self._require_texts()
        if not isinstance(feature := self._rows.features[config.image], datasets.Image):
            raise UserError(
                f"Column {config.image!r} is invalid: got {feature}. Cast it to an Image and save the data set."
            )
        self._images = self._rows.select_columns([config.image]).cast_column(config.image, datasets.Image(decode=False))
        self.classes = self._class_names()

    @cached_property
    def _most_captions(self) -> int:
        column = self._captions[0]
        if not _is_list(self._schema.field(column).type):
            return 1
        most = 0
        for table in self._rows.select_columns([column]).with_format("arrow").iter(READ_ROWS):
            lists = table[column].combine_chunks()
            is_caption = pc.not_equal(pc.utf8_trim_whitespace(pc.list_flatten(lists)), "")
            row_of_caption = pc.list_parent_indices(lists).filter(is_caption)
            most = max(most, int(np.bincount(row_of_caption).max(initial=0)))
        return most

    def parts(self) -> Sequence[Part]:
        """Return one part per million rows.

        Each part depends on all files of the data set, because the library does not tell which rows are in which file.
        """
        files = tuple(Path(file["filename"]) for file in self._rows.cache_files)
        starts = range(0, len(self._rows), PART_ROWS)
        return [Part(f"rows from {start}", partial(self._read, start), files) for start in starts]

    def image(self, location: str, least: int = 0) -> Image.Image:
        """Decode the image of a row, from its bytes or from the file that the row names."""
        stored = self._images[int(location)][self._config.image] or {"bytes": None, "path": None}
        name = f"row {location}"
        if stored["bytes"] is not None:
            return read_image(stored["bytes"], name, least=least)
        if stored["path"] is None:
            raise UnreadableImageError(Status.MISSING, f"{name} has no image")
        path, files = stored["path"], FileSet(self._folders[0])
        if self._config.allow_outside or ("://" not in path and any(is_inside(each, path) for each in self._folders)):
            files.add(path)
        files.require_named(path)
        if local := files.local(path):
            return read_image(local, least=least)
        with files.open(path) as file:
            return read_image(file.read(), name, least=least)

    def _read(self, start: int) -> Iterator[Sample]:
        captions, url, label = self._config.captions, self._config.url, self._config.label
        for number, row in enumerate(self._batches(start), start):
            if isinstance(captions, str):
                value = row[captions]
                texts = [text for text in map(_text, value if isinstance(value, list) else [value]) if text]
                named = self.numbered(texts)
            else:
                named = {name: text for name, column in captions.items() if (text := _text(row[column]))}
            yield Sample(
                key=str(number),
                image=str(number),
                captions=named,
                label=self._label(number, row[label]) if label else -1,
                url=_text(row[url]) if url else "",
            )

    def _batches(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of a part, without their images."""
        stop = min(start + PART_ROWS, len(self._rows))
        if not self._columns:
            yield from ({} for _ in range(start, stop))
            return
        columns = list(dict.fromkeys(self._columns))
        rows = self._rows.select(range(start, stop)).select_columns(columns).with_format("arrow")
        for table in rows.iter(READ_ROWS):
            yield from table.to_pylist()

    def _label(self, row: int, value: int | None) -> int:
        if value is None or value == -1:
            return -1
        if not 0 <= value < len(self.classes):
            raise UserError(f"Label of row {row} is invalid: got {value}, expected 0 to {len(self.classes) - 1}.")
        return value

    def _require_texts(self) -> None:
        for column in self._captions:
            kind = self._schema.field(column).type
            if _is_list(kind) and not isinstance(self._config.captions, str):
                raise UserError(f"Column {column!r} contains lists. Write `captions: {column}` for such a column.")
            value_kind = kind.value_type if _is_list(kind) else kind
            if not (pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind)):
                raise UserError(f"Column {column!r} is invalid: got {kind}, expected text or lists of text.")

    def _class_names(self) -> tuple[str, ...]:
        column = self._config.label
        if not column:
            return ()
        feature = self._rows.features[column]
        names = self._config.classes or getattr(feature, "names", None)
        if not names or not pa.types.is_integer(self._schema.field(column).type):
            raise UserError(
                f"Column {column!r} is invalid: got {feature}, expected numbers with class names. Use a ClassLabel or "
                "set source.classes."
            )
        return tuple(names)


def open_rows(config: HuggingFaceConfig, data_root: Path) -> Any:
    """Return a split as a data set of the library, with all its columns.

    Raises:
        UserError: The library is not installed, or the data set or split does not exist.
    """
    return _load(import_extra("datasets", _NOT_INSTALLED), config, data_root / config.root)


def split_names(folder: Path) -> list[str]:
    """Return the names of the splits of a folder that the library can read.

    Raises:
        UserError: The library is not installed, or cannot read the folder.
    """
    datasets = import_extra("datasets", _NOT_INSTALLED)
    _require_inside(folder)
    try:
        if any((folder / name).is_file() for name in _SAVED):
            found = datasets.load_from_disk(str(folder))
            return list(found) if isinstance(found, datasets.DatasetDict) else [str(found.split or "train")]
        return [str(name) for name in datasets.get_dataset_split_names(str(folder))]
    except Exception as problem:  # the library raises errors of any kind
        reason = " ".join(str(problem).split()).rstrip(".")
        raise UserError(f"Data set {folder} cannot be opened: {reason}.") from problem


def _load(datasets: Any, config: HuggingFaceConfig, folder: Path) -> Any:
    formats = getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ())
    if config.name and (config.name in formats or Path(config.name).exists()):
        # `load_dataset` would read the current folder instead of the hub.
        raise UserError(
            f"Name {config.name!r} is that of a format or of a file here, not of a data set on the hub. For a folder, "
            "write `root` instead of `name`."
        )
    if not (config.name or config.allow_outside):
        _require_inside(folder)
    where, was_saved = config.name or str(folder), any((folder / name).is_file() for name in _SAVED)
    # Without a network, `load_dataset` takes a copy of a local folder for the data set of that name on the hub.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / ("" if config.name else "folders")
    try:
        if config.name or not was_saved:
            options = {"split": config.split, "revision": config.revision, "cache_dir": str(cache)}
            return datasets.load_dataset(where, config.config, **options)
        found = datasets.load_from_disk(where)
    except Exception as problem:  # the library raises errors of any kind
        reason = " ".join(str(problem).split()).rstrip(".")
        raise UserError(f"Data set {where} cannot be opened: {reason}.") from problem
    if isinstance(found, datasets.DatasetDict):
        if config.split not in found:
            raise UserError(f"{folder} has no split {config.split!r}. Its splits are {', '.join(found)}.")
        return found[config.split]
    if found.split is not None and str(found.split) != config.split:
        raise UserError(f"{folder} is the split '{found.split}', but the manifest names {config.split!r}.")
    return found


def _require_inside(folder: Path) -> None:
    """Raise `UserError` if the card of a folder, its README.md, names files outside the folder or at URLs."""
    card = folder / "README.md"
    if not card.is_file():
        return
    _, *front = re.split(r"^---\s*$", read_regular(card).decode(errors="replace"), maxsplit=2, flags=re.MULTILINE)
    try:
        about = yaml.safe_load(front[0]) if front else None
    except (yaml.YAMLError, RecursionError) as problem:
        raise UserError(f"{card} is invalid: its metadata are not YAML. Correct or remove it.") from problem
    waiting = [about.get("configs")] if isinstance(about, dict) else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and ("://" in value or not is_inside(folder, str(folder / value))):
            raise UserError(
                f"{card} names {value[:200]!r}, outside its folder. Correct it, or write `allow_outside: true` "
                "in the manifest's source if you trust it."
            )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _text(value: str | float | None) -> str:
    """Return a caption or URL, "" for null and NaN."""
    return "" if value is None or value != value else str(value).strip()
