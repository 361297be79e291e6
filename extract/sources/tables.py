"""Rows of CSV, TSV, JSONL and parquet files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from sail_align.extract.errors import UserError


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """Return some columns of a table, all values as text (a JSON or parquet column of lists as lists of text).

    Raises:
        UserError: The ending is unknown, the file is missing or malformed, or it lacks one of the columns.
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
                table = pyarrow.json.read_json(path)
            case ".parquet":
                table = pyarrow.parquet.read_table(path)
            case other:
                raise UserError(f"{path} ends in {other!r}; tables end in .csv, .tsv, .jsonl or .parquet.")
    except FileNotFoundError as problem:
        raise UserError(f"Table {path} is not there; check 'files' and the data root.") from problem
    except pa.ArrowInvalid as problem:
        raise UserError(f"Table {path} cannot be read: {' '.join(str(problem).split())}.") from problem
    for name in columns:
        if name not in table.column_names:
            raise UserError(f"{path} has no column {name!r}; its columns are {', '.join(table.column_names)}.")
    return pa.Table.from_arrays([_as_text(table[name]) for name in columns], names=columns)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column if pa.types.is_list(column.type) else column.cast(pa.string())
