"""The index of a store: parquet parts of 65,536 rows, one row a sample.

Columns: key, image (a location that the source can open), label (−1: none), mask, url (where the image came from), and
`caption.<name>`, null where the sample has no such caption.
"""

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sail_align.extract.errors import UserError
from sail_align.extract.files import file_digest
from sail_align.extract.sources.base import Part

PART_ROWS = 65_536


def write_index(folder: Path, parts: Sequence[Part], captions: Sequence[str]) -> tuple[int, list[str | None]]:
    """Write the index in parts; return the number of rows and each part's SHA-256.

    Raises:
        UserError: Two samples have the same key.
    """
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("image", pa.string()),
            ("label", pa.int32()),
            ("mask", pa.string()),
            ("url", pa.string()),
        ]
        + [(f"caption.{name}", pa.string()) for name in captions]
    )
    rows = 0
    digests: list[str | None] = []
    stream = chain.from_iterable(part.read() for part in parts)
    while block := list(islice(stream, PART_ROWS)):
        columns: dict[str, list[Any]] = {name: [getattr(s, name) for s in block] for name in schema.names[:5]}
        columns |= {f"caption.{name}": [sample.captions.get(name) for sample in block] for name in captions}
        file = part_path(folder, len(digests))
        pq.write_table(pa.table(columns, schema=schema), file, compression="zstd", row_group_size=8_192)
        digests.append(file_digest(file))
        rows += len(block)
    _require_unique_keys(folder, len(digests))
    return rows, digests


def read_index(folder: Path, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
    """Return rows start … stop − 1, opening only the parts that hold them."""
    first = start // PART_ROWS
    parts = range(first, -(-stop // PART_ROWS))
    table = pa.concat_tables(pq.read_table(part_path(folder, part), columns=columns) for part in parts)
    return table.slice(start - first * PART_ROWS, stop - start)


def part_path(folder: Path, part: int) -> Path:
    """Return the file of one part."""
    return folder / f"part-{part:05d}.parquet"


def _require_unique_keys(folder: Path, parts: int) -> None:
    keys = pa.chunked_array(
        [
            chunk
            for part in range(parts)
            for chunk in pq.read_table(part_path(folder, part), columns=["key"])["key"].chunks
        ],
        pa.string(),
    )
    if pc.count_distinct(keys).as_py() < len(keys):
        twice = next(item["values"] for item in pc.value_counts(keys).to_pylist() if item["counts"] > 1)
        raise UserError(f"Sample key {twice!r} occurs more than once; every sample needs a key of its own.")
