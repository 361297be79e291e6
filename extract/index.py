"""The index of a store on disk: parquet files of 65,536 rows, one row a sample, in row groups of 8,192.

Columns: key, image (a location that the source can open), label (−1: none), mask, url (where the image came from), and
`caption.<name>`, null where the sample has no such caption.
"""

import hashlib
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sail_align.extract.files import broken, is_remote, write_atomically
from sail_align.extract.sources.base import Sample

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
