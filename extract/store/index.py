"""The index of a store on disk: parquet files of 65,536 rows, one row per sample, in row groups of 8,192.

Columns: key, image (a location that the source can open), label (−1: none), mask, url (where the image came from),
group (only if the manifest names it), and `caption.<name>`, null if the sample has no such caption.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import TypedDict

from sail_align.extract.data import Part, Sample
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import (
    canonical_json,
    file_digest,
    is_remote,
    read_regular,
    report_read_errors,
    write_atomically,
)
from sail_align.extract.system.validation import validated

FILE_ROWS = 65_536
GROUP_ROWS = 8_192
"""Rows that are read and written at a time, so that long captions do not fill the memory."""

FIELDS = pa.schema(
    [("key", pa.string()), ("image", pa.string()), ("label", pa.int32()), ("mask", pa.string()), ("url", pa.string())]
)
GROUP = pa.field("group", pa.string())
"""The column of an index with groups."""
CAPTION = "caption."
"""Start of the names of columns with captions."""
RECORD = "sources.json"

Stamp = tuple[str, int, int]
"""A file's name, its size in bytes, and its modification time in nanoseconds; −1 for a file that does not exist.

A part without files has one stamp with its own name."""


def text_hashes(texts: Sequence[str]) -> NDArray[np.int64]:
    """Return a 64-bit hash of each text. Hashes differ between processes."""
    return np.fromiter(map(hash, texts), np.int64, len(texts))


class Index:
    """The parquet files of an index.

    Args:
        folder: Their folder.
        digests: SHA-256 of each file, which is compared before the first reading. Empty while the index is being built.
    """

    def __init__(self, folder: Path, digests: Sequence[str] = ()):
        self.folder = folder
        self.digests = digests
        self._unread = set(range(len(digests)))

    def file(self, number: int) -> Path:
        """Return the path of one file."""
        return self.folder / f"part-{number:05d}.parquet"

    @staticmethod
    def table(samples: Sequence[Sample], captions: Sequence[str], *, groups: bool = False) -> pa.Table:
        """Return samples as rows of an index, with their groups if there are any.

        Raises:
            UserError: A key, a location or a caption is not valid Unicode.
        """
        fields = [*FIELDS, GROUP] if groups else [*FIELDS]
        try:
            columns = [pa.array([getattr(sample, each.name) for sample in samples], each.type) for each in fields]
            columns += [pa.array([sample.captions.get(name) for sample in samples], pa.string()) for name in captions]
        except UnicodeEncodeError as problem:
            text = problem.object
            raise UserError(f"Text {text[:200]!a} of a sample is invalid: it is not Unicode. Correct it.") from problem
        return pa.table(columns, names=[*(each.name for each in fields), *(CAPTION + name for name in captions)])

    def write(self, number: int, tables: Iterable[pa.Table]) -> str:
        """Write one file, each table a row group, whole or not at all. Returns its SHA-256."""
        content, writer = BytesIO(), None
        for table in tables:
            writer = writer or pq.ParquetWriter(content, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is None:
            raise ValueError(f"no rows for {self.file(number)}")
        writer.close()
        write_atomically(self.file(number), content.getbuffer())
        return hashlib.sha256(content.getbuffer()).hexdigest()

    def read(
        self, start: int, stop: int, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
    ) -> pa.Table:
        """Return rows start … stop − 1 (at least one), reading only the row groups that hold them.

        Args:
            start: The first row.
            stop: The row after the last one.
            columns: The columns to read. Default: all.
            optional: Columns among these that the index need not have.

        Raises:
            UserError: A file is missing, unreadable or changed, or a column does not exist.
        """
        tables = []
        for number in range(start // FILE_ROWS, -(-stop // FILE_ROWS)):
            self.require_unchanged(number)
            first, last = max(start - number * FILE_ROWS, 0), min(stop - number * FILE_ROWS, FILE_ROWS)
            groups = range(first // GROUP_ROWS, -(-last // GROUP_ROWS))
            path = self.file(number)
            with report_read_errors(path), pq.ParquetFile(path.open("rb") if is_remote(path) else path) as file:
                names = file.schema_arrow.names
                if unknown := set(columns or ()) - set(optional) - set(names):
                    raise UserError(f"The index has no column {min(unknown)!r}. Its columns are {', '.join(names)}.")
                table = file.read_row_groups(list(groups), columns=columns)
            tables.append(table.slice(first - groups.start * GROUP_ROWS, last - first))
        return pa.concat_tables(tables)

    def changed(self, number: int) -> bool:
        """Return whether a file does not have the digest recorded in the store."""
        return file_digest(self.file(number)) != self.digests[number]

    def require_unchanged(self, number: int) -> None:
        """Raise `UserError` if a file does not have its digest, which is compared once."""
        if number in self._unread:
            if self.changed(number):
                raise UserError(
                    f"{self.file(number)} is missing or has changed since the store was made. Restore it or make the "
                    "store again."
                )
            self._unread.discard(number)

    def samples(self, start: int, stop: int, captions: Sequence[str]) -> Iterator[Sample]:
        """Yield rows start … stop − 1 as samples with these captions, reading one row group at a time."""
        columns = [*FIELDS.names, GROUP.name, *(CAPTION + name for name in captions)]
        for first in range(start, stop, GROUP_ROWS):
            for row in self.read(first, min(first + GROUP_ROWS, stop), columns, [GROUP.name]).to_pylist():
                texts = {name: row.pop(CAPTION + name) for name in captions}
                yield Sample(captions={name: text for name, text in texts.items() if text is not None}, **row)

    def columns(self, name: str, files: int) -> Iterator[list[Any]]:
        """Yield one column of the first files, a file at a time."""
        for number in range(files):
            with self.file(number).open("rb") as file:
                yield pq.read_table(file, columns=[name])[name].to_pylist()


class _RecordForm(TypedDict):
    made_of: str
    stamps: list[list[Stamp]]
    rows: list[Annotated[int, Field(ge=0)]]
    digests: list[str]
    tables: list[Stamp]
    complete: bool


@dataclass
class IndexRecord:
    """The sources of an index, kept beside it as sources.json.

    Attributes:
        made_of: Digest of everything that decides which samples the index holds.
        stamps: Stamps of the files of each part of the source.
        rows: Number of samples read from each part.
        digests: SHA-256 of each index file that is written.
        tables: Stamps of the caption tables that were joined.
        complete: Whether all samples are in index files.
    """

    made_of: str
    stamps: list[list[Stamp]]
    rows: list[int]
    digests: list[str]
    tables: list[Stamp]
    complete: bool = False

    @classmethod
    def begin(cls, made_of: Any, parts: Sequence[Part]) -> "IndexRecord":
        """Return the record of an index of which nothing is written yet."""
        digest = hashlib.sha256(canonical_json(made_of)).hexdigest()
        stamps = [cls.stamps_of(part.files) or [(part.name, -1, -1)] for part in parts]
        return cls(digest, stamps, [0] * len(parts), [], [])

    @staticmethod
    def stamps_of(files: Iterable[Path]) -> list[Stamp]:
        """Return the stamps of files. They do not contain folders, so the data set may be moved as a whole."""
        stamps = []
        for file in files:
            try:
                status = file.stat()
                stamps.append((file.name, status.st_size, status.st_mtime_ns))
            except FileNotFoundError:
                stamps.append((file.name, -1, -1))
        return stamps

    @classmethod
    def read(cls, folder: Path) -> "IndexRecord | None":
        """Return the record of an index, None if it is missing or damaged."""
        try:
            content = json.loads(read_regular(folder / RECORD))
            content["stamps"] = [list(map(tuple, stamps)) for stamps in content["stamps"]]
            content["tables"] = list(map(tuple, content["tables"]))
            record = cls(**validated(_RecordForm, content))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return record if len(record.rows) == len(record.stamps) else None

    def write(self, folder: Path) -> None:
        """Write the record. Call it after writing the index file that it lists."""
        write_atomically(folder / RECORD, canonical_json(asdict(self)))
