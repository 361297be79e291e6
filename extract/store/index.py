"""The index of a store on disk: parquet files of 65,536 rows, one row a sample, in row groups of 8,192.

Columns: key, image (a location that the source can open), label (−1: none), mask, url (where the image came from), and
`caption.<name>`, null where the sample has no such caption.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sail_align.extract.data import Part, Sample
from sail_align.extract.system.files import broken, canonical_json, is_remote, write_atomically

FILE_ROWS = 65_536
GROUP_ROWS = 8_192
"""Rows that are read and written at a time, so that long captions never fill the memory."""

FIELDS = pa.schema(
    [("key", pa.string()), ("image", pa.string()), ("label", pa.int32()), ("mask", pa.string()), ("url", pa.string())]
)


def caption_column(name: str) -> str:
    """Return the column that holds a caption."""
    return f"caption.{name}"


def index_file(folder: Path, number: int) -> Path:
    """Return the path of one file of the index."""
    return folder / f"part-{number:05d}.parquet"


def samples_table(samples: Sequence[Sample], captions: Sequence[str]) -> pa.Table:
    """Return samples as rows of an index."""
    columns = [pa.array([getattr(s, name) for s in samples], FIELDS.field(name).type) for name in FIELDS.names]
    columns += [pa.array([sample.captions.get(name) for sample in samples], pa.string()) for name in captions]
    return pa.table(columns, names=[*FIELDS.names, *map(caption_column, captions)])


def write_index_file(path: Path, tables: Iterable[pa.Table]) -> str:
    """Write one file, each table a row group, whole or not at all; return its SHA-256."""
    content, writer = BytesIO(), None
    for table in tables:
        writer = writer or pq.ParquetWriter(content, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is None:
        raise ValueError(f"no rows for {path}")
    writer.close()
    write_atomically(path, content.getbuffer())
    return hashlib.sha256(content.getbuffer()).hexdigest()


def read_index(folder: Path, start: int, stop: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Return rows start … stop − 1 (at least one), reading only the row groups that hold them.

    Raises:
        UserError: A file is not there, or cannot be read.
    """
    tables = []
    for number in range(start // FILE_ROWS, -(-stop // FILE_ROWS)):
        first, last = max(start - number * FILE_ROWS, 0), min(stop - number * FILE_ROWS, FILE_ROWS)
        groups = range(first // GROUP_ROWS, -(-last // GROUP_ROWS))
        path = index_file(folder, number)
        try:
            with pq.ParquetFile(path.open("rb") if is_remote(path) else path) as file:
                table = file.read_row_groups(list(groups), columns=columns)
        except (OSError, pa.ArrowException) as problem:
            raise broken(path, problem) from problem
        tables.append(table.slice(first - groups.start * GROUP_ROWS, last - first))
    return pa.concat_tables(tables)


def text_hashes(texts: Sequence[str]) -> NDArray[np.int64]:
    """Return a 64-bit hash of each text; the same text has the same hash in this process only."""
    return np.fromiter(map(hash, texts), np.int64, len(texts))


Stamp = tuple[str, int, int]
"""A file's name, size in bytes, and time of last change in nanoseconds; −1 for a file that is not there.

A part without files is known by its own name."""

RECORD = "sources.json"


@dataclass
class IndexRecord:
    """`rows` and `stamps` go by the source's parts, `digests` by the index files that are written.

    `made_of` is a digest of what the index is to hold. `tables` are the stamps of the caption tables that were joined.
    """

    made_of: str
    stamps: list[list[Stamp]]
    rows: list[int]
    digests: list[str]
    tables: list[Stamp]
    complete: bool = False

    @classmethod
    def begin(cls, made_of: Any, parts: Sequence[Part]) -> "IndexRecord":
        """Return the record of an index of which nothing is written."""
        digest = hashlib.sha256(canonical_json(made_of)).hexdigest()
        return cls(digest, [stamps(part.files) or [(part.name, -1, -1)] for part in parts], [0] * len(parts), [], [])

    @classmethod
    def read(cls, folder: Path) -> "IndexRecord | None":
        """Read the record of an index, None if there is none that can be read."""
        try:
            content = json.loads((folder / RECORD).read_bytes())
            content["stamps"] = [_stamps(files) for files in content["stamps"]]
            content["tables"] = _stamps(content["tables"])
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Write the record; call it after the index file that it tells of."""
        write_atomically(folder / RECORD, canonical_json(asdict(self)))

    def same_source(self, other: "IndexRecord") -> bool:
        """Whether both are of one index, out of files with the same stamps."""
        return self.made_of == other.made_of and self.stamps == other.stamps


def stamps(files: Iterable[Path]) -> list[Stamp]:
    """Return the files' stamps. Folders do not count, so that the data may be moved as a whole."""
    found = []
    for file in files:
        try:
            status = file.stat()
            found.append((file.name, status.st_size, status.st_mtime_ns))
        except FileNotFoundError:
            found.append((file.name, -1, -1))
    return found


def _stamps(content: list[list[Any]]) -> list[Stamp]:
    return [(name, size, changed) for name, size, changed in content]
