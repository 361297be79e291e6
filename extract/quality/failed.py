"""The rows of a store that could not be encoded, and why."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sail_align.extract.data import FAILURES, Status
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import open_atomically, report_write_errors

SHOWN = 20
"""Rows shown of each array."""
SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "url", "image", "array", "status")])


def failed_rows(store: Store, array: FeatureArray) -> Iterator[pa.Table]:
    """Yield the failed rows of an array as tables of `SCHEMA`, one per shard. Shards without any are not read."""
    for shard in filter(array.has_failures, array.shards):
        start, stop = array.span(shard)
        status = array.read_status(start, stop)
        rows = np.flatnonzero(np.isin(status, FAILURES))
        table = store.index(["key", "url", "image"], start, stop).take(rows)
        columns = [*table.columns, [array.path] * len(rows), [Status(value).label for value in status[rows]]]
        yield pa.table(columns, schema=SCHEMA)


def list_failed(store: Store) -> list[dict[str, Any]]:
    """Return the number of rows of each array, those failed by status, and the `first` ones, ready for JSON."""
    found = []
    for array in store.arrays():
        rows = (row for table in failed_rows(store, array) for row in table.to_pylist())
        first = [{name: row[name] for name in ("key", "url", "status")} for row in islice(rows, SHOWN)]
        found.append({"path": array.path, "rows": array.rows, "failed": array.failed_counts, "first": first})
    return found


def describe_failed(failed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield lines of text about the result of `list_failed`."""
    for array in failed:
        counts = array["failed"]
        total = sum(counts.values())
        reasons = f": {', '.join(f'{count:,} {label}' for label, count in counts.items())}" if counts else ""
        yield f"{array['path']}: {total:,} of {array['rows']:,} rows failed{reasons}"
        yield from (f"  {row['status']}  {row['key']}" for row in array["first"])
        if total > SHOWN:
            yield f"  … and {total - SHOWN:,} more; --out failed.parquet writes all of them"


def write_failed(store: Store, path: Path) -> int:
    """Write the failed rows of all arrays to a parquet file, atomically. Returns their number.

    Raises:
        UserError: The file cannot be written.
    """
    rows = 0
    with (
        report_write_errors(path),
        open_atomically(path) as file,
        pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer,
    ):
        for array in store.arrays():
            for table in failed_rows(store, array):
                writer.write_table(table)
                rows += len(table)
    return rows
