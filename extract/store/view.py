"""A store as a sequence of rows, as a table, as a data set of torch, and as text."""

import operator
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sail_align.extract.data import Sample, Status
from sail_align.extract.errors import UserError, import_extra, printable
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.joined import StoredFeatures

if TYPE_CHECKING:
    import pandas

    from sail_align.extract.store.torch_pairs import TorchPairs

READ_ROWS = 8_192
"""Rows that iteration and `to_pandas` read at a time."""


@dataclass(frozen=True, eq=False, repr=False)
class Row(Sample):
    """One row of a store: a sample with its features.

    Attributes:
        number: Number of the row.
        features: Features (D,) float16 by the path of their array: `image/<encoder>` or `text/<encoder>/<caption>`.
            They are NaN unless the status is "ok".
        status: Status by the path of the array: "ok", "pending" (not encoded yet), "missing", "undecodable" …
    """

    number: int = 0
    features: Mapping[str, NDArray[np.float16]] = field(default_factory=dict)
    status: Mapping[str, str] = field(default_factory=dict)

    @property
    def image_features(self) -> NDArray[np.float16]:
        """Features (D,) of the image. Raises `UserError` unless the store has exactly one image encoder."""
        found = [path for path in self.features if path.startswith("image/")]
        if len(found) != 1:
            names = ", ".join(found) or "none"
            raise UserError(f"The store has features of {len(found)} image encoders ({names}). Use row.features[PATH].")
        return self.features[found[0]]

    @property
    def text_features(self) -> dict[str, NDArray[np.float16]]:
        """Features (D,) of each caption. Raises `UserError` if the store has several text encoders."""
        parts = {path: path.split("/") for path in self.features if path.startswith("text/")}
        if len(encoders := {encoder for _, encoder, _ in parts.values()}) > 1:
            names = ", ".join(sorted(encoders))
            raise UserError(f"The store has features of several text encoders ({names}). Use row.features[PATH].")
        return {caption: self.features[path] for path, (_, _, caption) in parts.items()}

    @property
    def ok(self) -> bool:
        """Whether the image and all captions have features."""
        return all(label == Status.OK.label for label in self.status.values())

    def __repr__(self) -> str:
        about = {each.name: getattr(self, each.name) for each in fields(self)}
        about["features"] = {path: f"({len(vector)},) {vector.dtype}" for path, vector in self.features.items()}
        return f"Row({', '.join(f'{name}={value!r}' for name, value in about.items() if value not in ('', {}))})"


class StoreView(os.PathLike[str]):
    """What a store offers to read it from Python. `Store` has the rest."""

    path: Path
    rows: int
    dataset: str
    captions: tuple[str, ...]
    _opened: list[FeatureArray]

    @abstractmethod
    def arrays(self) -> list[FeatureArray]:
        """Return all arrays, images first."""

    @abstractmethod
    def array_paths(self) -> list[str]:
        """Return the paths of all arrays."""

    @abstractmethod
    def image(self, encoder: str | None = None) -> StoredFeatures:
        """Return the image array of an encoder, or the only one."""

    @abstractmethod
    def texts(self, caption: str) -> dict[str, FeatureArray]:
        """Return the arrays of one caption by encoder."""

    @abstractmethod
    def text(self, caption: str, encoder: str | None = None) -> StoredFeatures:
        """Return a caption's array of an encoder, or the only one."""

    @abstractmethod
    def index(self, columns: list[str] | None = None, start: int = 0, stop: int | None = None) -> pa.Table:
        """Return rows of the index."""

    @abstractmethod
    def samples(self, start: int, stop: int, captions: Sequence[str] | None = None) -> list[Sample]:
        """Return rows of the index as samples."""

    def __fspath__(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        return self.rows

    @overload
    def __getitem__(self, place: SupportsIndex) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...

    def __getitem__(self, place: SupportsIndex | slice) -> Row | list[Row]:
        """Return a row, counted from the end if the number is negative, or the rows of a slice.

        Raises:
            IndexError: There is no such row.
            UserError: A file is damaged.
        """
        if isinstance(place, slice):
            numbers = range(self.rows)[place]
            rising = numbers if numbers.step > 0 else numbers[::-1]
            count = max(READ_ROWS // rising.step, 1)
            rows = [row for at in range(0, len(rising), count) for row in self._read(rising[at : at + count])]
            return rows if numbers.step > 0 else rows[::-1]
        number = operator.index(place)
        if not -self.rows <= number < self.rows:
            raise IndexError(f"{self.path} has no row {number}: it has {self.rows:,} rows.")
        number %= self.rows
        return self._read(range(number, number + 1))[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, self.rows, READ_ROWS):
            yield from self._read(range(start, min(start + READ_ROWS, self.rows)))

    def to_pandas(
        self, start: int = 0, stop: int | None = None, *, features: bool | str | Sequence[str] = False
    ) -> "pandas.DataFrame":
        """Return rows start … stop − 1 as a table.

        Its columns are those of the index: key, image, label (−1: none), mask, url, `caption.<name>`; then the status
        of each array under the array's path with `.status` added; and, if asked for, its features (D,) float16 under
        its path: `image/<encoder>` or `text/<encoder>/<caption>`.

        Args:
            start: First row. Negative numbers count from the end.
            stop: Row after the last. Default: all rows.
            features: Arrays whose features to add, by path, or True for all.

        Raises:
            UserError: pandas is not installed, there is no such array, or a file is damaged.
        """
        module = import_extra("pandas", "to_pandas needs pandas. Run pip install pandas.")
        arrays = {array.path: array for array in self._arrays_now()}
        wanted = [features] if isinstance(features, str) else list(arrays if features is True else features or ())
        if unknown := [path for path in wanted if path not in arrays]:
            known = ", ".join(arrays) or "none"
            raise UserError(f"features is invalid: {self.path} has no array {unknown[0]!r}. It has {known}.")
        span = range(self.rows)[start:stop]
        table = self.index(start=span.start, stop=span.stop) if span else self.index(stop=1).slice(0, 0)
        frame: pandas.DataFrame = table.to_pandas()
        labels = [status.label for status in Status]
        for path, array in arrays.items():
            codes = array.read_status(span.start, span.stop) if span else np.empty(0, np.uint8)
            frame[f"{path}.status"] = module.Categorical.from_codes(codes, labels)
        for path in wanted:
            blocks = (arrays[path].read(at, min(at + READ_ROWS, span.stop))[0] for at in span[::READ_ROWS])
            frame[path] = module.Series([row for block in blocks for row in block], dtype=object)
        return frame

    def torch_dataset(
        self,
        captions: str | Sequence[str] | None = None,
        *,
        image_encoder: str | None = None,
        text_encoder: str | None = None,
    ) -> "TorchPairs":
        """Return the rows that have an image and all these captions, as a map-style data set of torch.

        An item is `(image_D, text_D)`, float32, if `captions` is one name, and `(image_D, {name: text_D})` otherwise.
        It can be used with a `DataLoader` and its workers. Each item is read by itself, a vector at a time;
        `sail-align fit` and `sail_align.fit` read whole chunks and shuffle faster than a disk's random reads.

        Args:
            captions: A caption's name, or several. Default: all that have features.
            image_encoder: Image encoder, if the store has several.
            text_encoder: Text encoder, if the store has several.

        Raises:
            UserError: An array does not exist, the choice is ambiguous, or no row has everything.
        """
        from sail_align.extract.store.torch_pairs import TorchPairs

        one = isinstance(captions, str)
        names = [name for name in self.captions if self.texts(name)] if captions is None else captions
        texts = {name: self.text(name, text_encoder) for name in ([captions] if isinstance(captions, str) else names)}
        return TorchPairs(self.path, self.image(image_encoder), texts, one=one)

    def _arrays_now(self) -> list[FeatureArray]:
        """Return all arrays, as they are now: those of an unfinished store are opened again."""
        opened = getattr(self, "_opened", [])
        is_same = sorted(array.path for array in opened) == sorted(self.array_paths())
        if not is_same or not all(array.complete for array in opened):
            self._opened = opened = self.arrays()
        return opened

    def _read(self, numbers: range) -> list[Row]:
        """Return the rows of these numbers, at least one, in rising order. What lies between them is not kept."""
        start, stop, step = numbers[0], numbers[-1] + 1, numbers.step
        read = {array.path: array.read(start, stop) for array in self._arrays_now()}
        if step > 1:
            read = {path: (values[::step].copy(), codes[::step]) for path, (values, codes) in read.items()}
        rows = []
        for place, sample in enumerate(self.samples(start, stop)[::step]):
            features = {path: values[place] for path, (values, _) in read.items()}
            status = {path: Status(codes[place]).label for path, (_, codes) in read.items()}
            rows.append(Row(**vars(sample), number=numbers[place], features=features, status=status))
        return rows

    def contents(self) -> list[tuple[str, str, str, str]]:
        """Return for each array: image or the caption's name, encoder, dimension, and how many rows are done."""
        lines = []
        for array in self._arrays_now():
            modality, encoder, *caption = array.path.split("/")
            counts = {Status.OK.label: 0, **array.counts}
            done = ", ".join(f"{count:,} {label}" for label, count in counts.items())
            lines.append((caption[0] if caption else modality, encoder, f"{array.dim:,}", done))
        return lines

    def _describe(self) -> tuple[str, list[tuple[str, str, str, str]]]:
        """Return a headline, and the lines of `contents`. A damaged store has a message in the headline instead."""
        captions = ", ".join(self.captions) or "none"
        head = f"store {self.path} of {self.dataset}: {self.rows:,} rows, captions: {captions}"
        try:
            return head, self.contents()
        except (UserError, OSError) as problem:
            return f"{head}; {problem}", []

    def __repr__(self) -> str:
        head, lines = self._describe()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        cells = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return printable("\n".join([f"<{head}>", *(f"  {line.rstrip()}" for line in cells)]))

    def _repr_html_(self) -> str:
        head, lines = self._describe()

        def row(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(printable(cell))}</{tag}>" for cell in cells) + "</tr>"

        header = row("th", ("of", "encoder", "dimension", "rows"))
        table = f"<table>\n{header}\n" + "\n".join(row("td", line) for line in lines) + "\n</table>"
        return f"<p>{escape(printable(head))}</p>\n" + (table if lines else "<p>No features yet.</p>")
