"""Rows of a data set of the library `datasets`: as the library loads them, or streamed from parquet files."""

import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from sail_align.extract.errors import UserError, listing
from sail_align.extract.sources.file_set import READ_AHEAD, FileSet

PART_ROWS = 1 << 20
READ_ROWS = 8_192
"""Number of rows, without their images, that are Python objects at a time."""
BATCH_BYTES = 4 << 20
"""Bytes of images that are read from a parquet file at a time, if these are more than `LEAST_ROWS`."""
LEAST_ROWS, MOST_ROWS = 8, 1_024
"""Limits of the number of images that are read at a time."""
KEPT = 8
"""Batches of images that a cursor keeps, because threads ask for images in almost ascending order."""
CURSORS = 3


@dataclass(frozen=True)
class Stretch:
    """A range of consecutive rows.

    Attributes:
        name: Unique in the data set.
        files: Local files that the rows are read from.
    """

    name: str
    files: tuple[Path, ...]


class Rows(ABC):
    """The rows of one split.

    Attributes:
        features: Features of the columns, as the library has them.
        schema: Types of the columns as they are stored.
    """

    features: Any
    schema: pa.Schema

    @abstractmethod
    def stretches(self) -> Sequence[Stretch]:
        """Return the stretches in order, without reading any row."""

    @abstractmethod
    def span(self, stretch: Stretch) -> range:
        """Return the numbers of the rows of a stretch, counted over the whole split."""

    @abstractmethod
    def tables(self, stretch: Stretch, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield some columns (at least one) of the rows of a stretch, at most `READ_ROWS` rows at a time."""

    @abstractmethod
    def location(self, stretch: Stretch, offset: int) -> str:
        """Return the location of a row, by its distance from the first of its stretch."""

    @abstractmethod
    def value(self, location: str, column: str) -> Any:
        """Return the value of one row as a Python object. Threads may call this at the same time."""


class LoadedRows(Rows):
    """Rows that the library has as Arrow files, which are mapped into memory. A location is the number of the row.

    Each stretch depends on all files, because the library does not tell which rows are in which file.
    """

    def __init__(self, dataset: Any):
        self._dataset = dataset
        self._files = tuple(Path(file["filename"]) for file in dataset.cache_files)
        self.features = dataset.features
        self.schema = dataset.features.arrow_schema
        self._column = cache(lambda name: dataset.select_columns([name]).with_format("arrow"))

    def stretches(self) -> Sequence[Stretch]:
        """Return a stretch per million rows."""
        return [Stretch(f"rows from {start}", self._files) for start in range(0, len(self._dataset), PART_ROWS)]

    def span(self, stretch: Stretch) -> range:
        """Return the numbers of the rows of a stretch."""
        start = int(stretch.name.rpartition(" ")[2])
        return range(start, min(start + PART_ROWS, len(self._dataset)))

    def tables(self, stretch: Stretch, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield some columns of the rows of a stretch."""
        rows = self._dataset.select(self.span(stretch)).select_columns(list(columns))
        yield from rows.with_format("arrow").iter(READ_ROWS)

    def location(self, stretch: Stretch, offset: int) -> str:
        """Return the number of a row."""
        return str(self.span(stretch)[offset])

    def value(self, location: str, column: str) -> Any:
        """Return the value of one row."""
        return self._column(column)[int(location)][column][0].as_py()


class ParquetRows(Rows):
    """Rows that are read where they are: in parquet files on disk or at URLs. Nothing is copied to the disk.

    A stretch is a file, and a location is `<file>:<row in the file>`. The index reads only the columns that it needs.
    An image is read in a batch with its neighbours, which are asked for next. To reach an image, at most those before
    it in its row group are read and dropped.

    Args:
        files: Opens the files.
        names: The files by name: a short name, and that under which `files` knows it.
        features: Features of the columns, if the data set's card has them.
        from_schema: Returns the features that a parquet file's schema states.
    """

    def __init__(self, files: FileSet, names: Mapping[str, str], features: Any, from_schema: Any):
        self._files, self._names = files, {short: files.add(name) for short, name in names.items()}
        self._cursors: list[_Cursor] = []  # the last used one is the last
        self._lock = threading.Lock()
        self._lengths: dict[str, int] = {}
        with self._open(next(iter(self._names))) as file:
            self.schema = file.schema_arrow
        self.features = features or from_schema(self.schema)

    def stretches(self) -> Sequence[Stretch]:
        """Return a stretch per file. The name of a file at a URL is that URL, which has the revision on the hub."""
        local = {name: self._files.local(known) for name, known in self._names.items()}
        return [
            Stretch(self._names[name] if path is None else name, (path,) if path else ())
            for name, path in local.items()
        ]

    def span(self, stretch: Stretch) -> range:
        """Return the numbers of the rows of a file. Reads the ends of the files before it."""
        first = 0
        for name, known in self._names.items():
            if stretch.name in (name, known):
                return range(first, first + self._length(name))
            first += self._length(name)
        raise ValueError(f"there is no file {stretch.name}")

    def tables(self, stretch: Stretch, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield some columns of the rows of a file."""
        with self._open(self._short(stretch)) as file:
            self._require_columns(stretch.name, file.schema_arrow, columns)
            for batch in file.iter_batches(READ_ROWS, columns=list(columns)):
                yield pa.Table.from_batches([batch]).select(list(columns))

    def location(self, stretch: Stretch, offset: int) -> str:
        """Return the file and the number of a row in it."""
        return f"{self._short(stretch)}:{offset}"

    def value(self, location: str, column: str) -> Any:
        """Return the value of one row."""
        name, _, row = location.rpartition(":")
        if name not in self._names:
            raise UserError(
                f"Row {location[:200]!r} is invalid: the data set has no such file. Correct source.data_files."
            )
        is_local = self._files.local(self._names[name]) is not None  # a network may work again for the next shard
        with self._lock, self._report(name) if is_local else nullcontext():
            fitting = [each for each in self._cursors if (each.name, each.column) == (name, column)]
            cursor = next((each for each in fitting if each.is_before(int(row))), None)
            if cursor is None:
                cursor = _Cursor(name, column, pq.ParquetFile(self._opened(name), **_OPTIONS))
                self._require_columns(name, cursor.schema, [column])
            self._cursors = [*(each for each in self._cursors if each is not cursor), cursor]
            while len(self._cursors) > CURSORS:
                self._cursors.pop(0).close()
            return cursor.value(int(row))

    def _short(self, stretch: Stretch) -> str:
        return next(name for name, known in self._names.items() if stretch.name in (name, known))

    def _length(self, name: str) -> int:
        if name not in self._lengths:
            with self._open(name) as file:
                self._lengths[name] = file.metadata.num_rows
        return self._lengths[name]

    @contextmanager
    def _open(self, name: str) -> Iterator[pq.ParquetFile]:
        with self._report(name), self._opened(name) as opened, pq.ParquetFile(opened, **_OPTIONS) as file:
            yield file

    def _opened(self, name: str) -> BinaryIO:
        return self._files.open(self._names[name], ahead=False)

    @contextmanager
    def _report(self, name: str) -> Iterator[None]:
        """Raise `UserError` for a file that is not parquet, or is damaged."""
        try:
            yield
        except (pa.ArrowException, OSError, EOFError) as problem:
            reason = " ".join(str(problem).split()).rstrip(".")
            raise UserError(f"Data file {name} cannot be read: {reason}. Restore it.") from problem

    @staticmethod
    def _require_columns(name: str, schema: pa.Schema, columns: Sequence[str]) -> None:
        for column in columns:
            if column not in schema.names:
                raise UserError(
                    f"Data file {name} has no column {column!r}, which others have. Its columns are "
                    f"{listing(schema.names)}."
                )


_OPTIONS: dict[str, Any] = {"pre_buffer": False, "buffer_size": READ_AHEAD}
"""A row group is read piece by piece: it may hold gigabytes of images."""


class _Cursor:
    """Values of one column of a parquet file, read forward in batches, of which the last are kept."""

    def __init__(self, name: str, column: str, file: pq.ParquetFile):
        self.name, self.column, self.schema = name, column, file.schema_arrow
        self._file = file
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        self._starts = [0, *accumulate(group.num_rows for group in groups)]
        size = sum(group.total_byte_size for group in groups) // max(file.metadata.num_rows, 1)
        self._rows = min(max(BATCH_BYTES // max(size, 1), LEAST_ROWS), MOST_ROWS)
        self._kept: deque[tuple[int, pa.Array]] = deque(maxlen=KEPT)
        self._next = -1  # row after the last one read; −1 before the first
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def is_before(self, row: int) -> bool:
        """Return whether a row is kept, or can be reached without reading more than its row group or one batch."""
        kept = self._kept[0][0] if self._kept else self._next
        start = self._starts[bisect_right(self._starts, row) - 1]
        return 0 <= kept <= row and (row < self._next + self._rows or start <= self._next)

    def value(self, row: int) -> Any:
        """Return the value of a row. Raises `UserError` if the file has fewer rows."""
        if not 0 <= row < self._starts[-1]:
            raise UserError(f"{self.name} has changed since it was indexed: it has no row {row}. Pass another --out.")
        if self._next < 0:
            group = bisect_right(self._starts, row) - 1
            self._next = self._starts[group]
            groups = list(range(group, len(self._starts) - 1))
            self._batches = self._file.iter_batches(self._rows, row_groups=groups, columns=[self.column])
        while self._next <= row:
            values = next(self._batches).column(0)
            self._kept.append((self._next, values))
            self._next += len(values)
        first, values = next(kept for kept in reversed(self._kept) if kept[0] <= row)
        return values[row - first].as_py()

    def close(self) -> None:
        """Close the file."""
        self._batches = iter(())
        self._file.close(force=True)
