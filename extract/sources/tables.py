"""Rows of CSV, TSV, JSONL and parquet files."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from sail_align.extract.errors import UserError


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """Return some columns of a table, all values as text (a JSON or parquet column of lists as lists of text).

    Raises:
        UserError: The ending is unknown, the file is missing or malformed, it lacks one of the columns, or a column
            holds something else than text, numbers or lists of them.
    """
    try:
        match path.suffix.lower():
            case ".csv" | ".tsv" as suffix:
                table = pyarrow.csv.read_csv(
                    path,
                    parse_options=pyarrow.csv.ParseOptions(
                        delimiter="," if suffix == ".csv" else "\t", newlines_in_values=True
                    ),
                    convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
                )
            case ".jsonl":
                table = _read_jsonl(path, columns)
            case ".parquet":
                table = pyarrow.parquet.read_table(path)
            case other:
                raise UserError(f"{path} ends in {other!r}; tables end in .csv, .tsv, .jsonl or .parquet.")
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise UserError(f"Table {path} cannot be read: {' '.join(str(problem).split())}.") from problem
    for name in columns:
        if (times := table.column_names.count(name)) != 1:
            found = "more than one" if times else "no"
            raise UserError(f"{path} has {found} column {name!r}; its columns are {', '.join(table.column_names)}.")
    return pa.table({name: _as_text(table[name], name, path) for name in columns})


def _read_jsonl(path: Path, columns: list[str]) -> pa.Table:
    """Read the wanted keys of each line; numbers stay as they are written, and other keys may hold anything."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line, parse_int=str, parse_float=str) for line in lines if line.strip()]
    keys = dict.fromkeys(key for row in rows for key in row)
    return pa.table({key: [row.get(key) for row in rows] if key in columns else [""] * len(rows) for key in keys})


def _as_text(column: pa.ChunkedArray, name: str, path: Path) -> pa.ChunkedArray:
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    try:
        return column.cast(pa.list_(pa.string()) if lists else pa.string())
    except pa.ArrowException as problem:
        raise UserError(f"Column {name!r} of {path} holds {column.type}; text is expected.") from problem
