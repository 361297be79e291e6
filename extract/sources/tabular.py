"""Rows of CSV, TSV, JSONL and parquet files, a few thousand at a time: no table is ever whole in memory."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from sail_align.extract.data import CaptionTables
from sail_align.extract.errors import UserError
from sail_align.extract.schema import Recaptions

BATCH_ROWS = 8_192
CSV_BLOCK = 2 << 20
"""Bytes of a CSV that are parsed at a time; a row may be as long."""


def find_tables(root: Path, patterns: str | Sequence[str]) -> list[Path]:
    """Return the files under `root` that the patterns match, each once; a path may also be absolute.

    Raises:
        UserError: There is no such file.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    files = list(dict.fromkeys(path for pattern in patterns for path in _matches(root, pattern)))
    if not files:
        raise UserError(f"No table {', '.join(patterns)} in {root.resolve()}; correct 'files' or set --data-root.")
    return files


def caption_tables(description: Recaptions, data_root: Path) -> CaptionTables:
    """Return the tables that a manifest's `recaptions` describe.

    Raises:
        UserError: None is there, or the first is not of the described form: an index must not be built before that is
            known.
    """
    files = tuple(find_tables(data_root / description.root, description.files))
    if description.url is not None:
        tables = CaptionTables(files, "url", description.url, description.captions)
    else:
        tables = CaptionTables(files, "key", str(description.key), description.captions)
    next(read_captions(files[0], tables), None)
    return tables


def read_captions(file: Path, tables: CaptionTables) -> Iterator[pa.Table]:
    """Yield the rows of a caption table as `read_batches`. Raises `UserError` also where a column holds lists."""
    columns = [tables.column, *tables.captions.values()]
    for batch in read_batches(file, columns):
        for name in columns:
            if not pa.types.is_string(batch[name].type):
                raise UserError(f"Column {name!r} of {file} holds lists; recaptions have one text a row and column.")
        yield batch


def read_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield a table's rows in order, at most `BATCH_ROWS` at a time, with these columns as text (or lists of texts).

    Bytes that are no UTF-8 become U+FFFD, so that one bad caption does not end a run over millions.

    Raises:
        UserError: The ending is unknown, the file is missing or malformed, it lacks one of the columns, or a column
            holds something else than text, numbers or lists of them.
    """
    columns = list(dict.fromkeys(columns))
    try:
        match path.suffix.lower():
            case ".csv":
                batches = _csv(path, columns, ",")
            case ".tsv":
                batches = _csv(path, columns, "\t")
            case ".jsonl":
                batches = _jsonl(path, columns)
            case ".parquet":
                batches = _parquet(path, columns)
            case other:
                raise UserError(f"{path} ends in {other!r}; tables end in .csv, .tsv, .jsonl or .parquet.")
        for batch in batches:
            for start in range(0, len(batch), BATCH_ROWS):
                rows = batch.slice(start, BATCH_ROWS)
                yield pa.table({name: _as_text(rows[name], name, path) for name in columns})
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise UserError(f"Table {path} cannot be read: {' '.join(str(problem).split())}.") from problem


def _csv(path: Path, columns: list[str], delimiter: str) -> Iterator[pa.Table]:
    read = pyarrow.csv.ReadOptions(block_size=CSV_BLOCK)
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pyarrow.csv.open_csv(path, read, parse) as header:
        _require_columns(path, columns, header.schema.names)
    # Read as bytes, because pyarrow gives up a file for one byte that is not UTF-8.
    convert = pyarrow.csv.ConvertOptions(
        include_columns=columns, column_types=dict.fromkeys(columns, pa.binary()), check_utf8=False
    )
    with pyarrow.csv.open_csv(path, read, parse, convert) as reader:
        yield from map(pa.Table.from_batches, ([batch] for batch in reader))


def _parquet(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        _require_columns(path, columns, file.schema_arrow.names)
        batches = file.iter_batches(BATCH_ROWS, columns=columns)
        yield from map(pa.Table.from_batches, ([batch] for batch in batches))


def _jsonl(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """Read the wanted keys of each line; numbers stay as they are written, and other keys may hold anything."""
    keys: dict[str, None] = {}
    for row in _lines(path):
        keys |= dict.fromkeys(row)
        if keys.keys() >= set(columns):
            break
    _require_columns(path, columns, list(keys))
    rows = _lines(path)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield pa.table({name: [_well_formed(row.get(name)) for row in batch] for name in columns})


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line, parse_int=str, parse_float=str)
                except ValueError as problem:
                    raise ValueError(f"line {number}: {problem}") from problem
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object")
                yield row


def _well_formed(value: Any) -> Any:
    """Replace half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    if isinstance(value, list):
        return [_well_formed(each) for each in value]
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _require_columns(path: Path, columns: list[str], there: list[str]) -> None:
    for name in columns:
        if (times := there.count(name)) != 1:
            found = "more than one" if times else "no"
            raise UserError(f"{path} has {found} column {name!r}; its columns are {', '.join(there)}.")


def _as_text(column: pa.ChunkedArray, name: str, path: Path) -> pa.ChunkedArray:
    """Return a column of texts or of lists of texts."""
    kind = column.type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    is_text = _is_text(kind.value_type if listed else kind)
    text, raw = (pa.list_(pa.string()), pa.list_(pa.binary())) if listed else (pa.string(), pa.binary())
    try:
        column = column.cast(raw if is_text else text)
    except pa.ArrowException as problem:
        raise UserError(f"Column {name!r} of {path} holds {kind}; text is expected.") from problem
    try:
        return column.cast(text)
    except pa.ArrowInvalid:  # not UTF-8, whatever the file says
        return pa.chunked_array([pa.array(map(_decoded, column.to_pylist()), text)])


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    forms = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(is_form(kind) for is_form in forms)


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    return None if value is None else value.decode("utf-8", errors="replace")


def _matches(root: Path, pattern: str) -> list[Path]:
    if (file := root / pattern).is_file():  # also an absolute path, and a name that holds a bracket
        return [file]
    if Path(pattern).is_absolute():
        return []
    return sorted(path for path in root.glob(pattern) if path.is_file())
