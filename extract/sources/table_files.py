"""Readers of CSV, TSV, JSONL and parquet files, a few thousand rows at a time, and caption tables made of these."""

from collections.abc import Collection, Iterator, Sequence
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from pydantic import Field, field_validator, model_validator

from sail_align.extract.data import CaptionTables
from sail_align.extract.errors import UserError
from sail_align.extract.sources.config import FilesConfig, NonEmpty, Strict
from sail_align.extract.sources.delimited import DELIMITERS, read_delimited, read_header, require_columns
from sail_align.extract.sources.file_set import FileSet
from sail_align.extract.system.files import json_lines, open_regular, require_regular

BATCH_ROWS = 8_192
UNKNOWN_ENDING = "{path} is invalid: got the ending {other!r}, expected .csv, .tsv, .jsonl or .parquet."


class _Number(str):
    """A number as the file spells it. A column of numbers is read as texts, but not mixed with texts."""


_CONSTANTS = {name: _Number(name) for name in ("Infinity", "-Infinity")}
"""Numbers that Python adds to JSON. NaN is null."""
_JSON_TYPES = {str: "text", _Number: "number", list: "list", bool: "boolean", dict: "mapping"}


class TextFormat(Strict):
    """Format of a CSV or TSV, if it cannot be found out from the file.

    `delimiter` is one character. By default it is the first of comma (tab for .tsv), tab, semicolon and vertical bar
    that yields the columns. `encoding` is any that Python supports. A byte order mark has priority, and UTF-8 is the
    default.
    """

    omitted: ClassVar[frozenset[str]] = frozenset({"delimiter", "encoding"})
    delimiter: Annotated[str, Field(pattern=r"^[\t !#-\[\]-~]$")] | None = None
    encoding: NonEmpty | None = None

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, encoding: str | None) -> str | None:
        if encoding is not None:
            try:
                b" ".decode(encoding, "replace")
            except LookupError as problem:
                raise ValueError(f"{problem}. Use one that Python supports, such as latin-1 or utf-16-le") from problem
        return encoding


class Recaptions(FilesConfig, TextFormat):
    """Tables with further captions of a source's images, one row per image. They go with any kind of source.

    A row belongs to the samples whose URL equals its column `url`, or whose key equals its column `key`. The match is
    exact. `captions` maps a caption's name to its column.
    """

    files: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    url: NonEmpty | None = None
    key: NonEmpty | None = None
    captions: Annotated[dict[str, NonEmpty], Field(min_length=1)]

    @property
    def needs(self) -> list[str]:
        """The tables."""
        return [self.files] if isinstance(self.files, str) else self.files

    @model_validator(mode="after")
    def _require_one_join_column(self) -> "Recaptions":
        if (self.url is None) == (self.key is None):
            raise ValueError("name exactly one column to join by, either 'url' or 'key'")
        return self

    def open(self, data_root: Path) -> CaptionTables:
        """Find the tables, and read the start of the first.

        Raises:
            UserError: No table exists, or the first does not match the description. An index must not be built before
                this is known.
        """
        files = find_tables(data_root / self.root, self.files)
        field: Literal["url", "key"] = "key" if self.url is None else "url"
        column = str(self.url or self.key)
        tables = CaptionTables(files, field, column, self.captions, self.delimiter, self.encoding)
        next(read_captions(files[0], tables), None)
        return tables


def find_tables(root: Path, patterns: str | Sequence[str]) -> tuple[Path, ...]:
    """Return the local files under `root` that match the patterns; see `FileSet.find`.

    Raises:
        UserError: A pattern matches no file, or is a URL.
    """
    listed = [patterns] if isinstance(patterns, str) else patterns
    if urls := [pattern for pattern in listed if "://" in pattern]:
        raise UserError(f"Table {urls[0]} is invalid: got a URL, expected a file. Download it and correct 'files'.")
    return tuple(dict.fromkeys(root / name for name in FileSet(root).find(listed)))


def read_captions(file: Path, tables: CaptionTables) -> Iterator[pa.Table]:
    """Yield the join column and the captions of one caption table, as `read_batches` does.

    Raises:
        UserError: As `read_batches`, or a column contains lists.
    """
    columns = [tables.column, *tables.captions.values()]
    yield from read_batches(file, columns, columns, tables.delimiter, tables.encoding)


def read_batches(
    path: Path,
    columns: Sequence[str],
    plain: Collection[str] = (),
    delimiter: str | None = None,
    encoding: str | None = None,
) -> Iterator[pa.Table]:
    """Yield the rows of a table in order, at most `BATCH_ROWS` at a time.

    Bytes that are not UTF-8 become U+FFFD, so that one bad caption does not end a run over millions of rows. NaN
    becomes null. If a column of JSONL has texts and lists of texts, the texts become lists of one.

    Args:
        path: A file that ends in .csv, .tsv, .jsonl or .parquet.
        columns: The columns to read. They contain text, numbers (returned as text), or lists of these.
        plain: Columns of these that must not contain lists.
        delimiter: Delimiter of a CSV or TSV; see `TextFormat`.
        encoding: Encoding of a CSV or TSV; see `TextFormat`.

    Raises:
        UserError: The ending is unknown, the file is missing or malformed, a column is missing, or a column contains
            other values.
    """
    columns = list(dict.fromkeys(columns))
    try:
        match path.suffix.lower():
            case ".csv" | ".tsv" as ending:
                usual = "," if ending == ".csv" else "\t"
                tried = [delimiter] if delimiter else list(dict.fromkeys([usual, *DELIMITERS]))
                batches = read_delimited(path, columns, tried, encoding)
            case ".jsonl":
                batches = _read_jsonl(path, columns)
            case ".parquet":
                batches = _read_parquet(path, columns)
            case other:
                raise UserError(UNKNOWN_ENDING.format(path=path, other=other))
        for batch in batches:
            for start in range(0, len(batch), BATCH_ROWS):
                rows = batch.slice(start, BATCH_ROWS)
                texts = pa.table({name: _as_text(rows[name], name, path) for name in columns})
                for name in plain:
                    if not pa.types.is_string(texts[name].type):
                        raise UserError(f"Column {name!r} of {path} contains lists, expected one text per row.")
                yield texts
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise UserError(f"Table {path} cannot be read: {' '.join(str(problem).split())}.") from problem


def text_columns(path: Path, encoding: str | None = None) -> list[str]:
    """Return the names of the columns of a table that may contain texts or lists of texts.

    Names that are blank or occur twice are left out. In JSONL, the first rows decide.

    Raises:
        UserError: The ending is unknown, or the file is missing or malformed.
    """
    try:
        match path.suffix.lower():
            case ".csv" | ".tsv" as ending:
                names = read_header(path, DELIMITERS if ending == ".csv" else ("\t", *DELIMITERS), encoding)
            case ".jsonl":
                names = []
                rows = [row for _, row in islice(_lines(path), BATCH_ROWS)]
                for name in dict.fromkeys(name for row in rows for name in row):
                    values = [value for row in rows if (value := row.get(name)) is not None]
                    flat = [inner for value in values for inner in (value if isinstance(value, list) else [value])]
                    if flat and all(inner is None or isinstance(inner, str) for inner in flat):
                        names.append(name)
            case ".parquet":
                with pyarrow.parquet.ParquetFile(require_regular(path), pre_buffer=False) as file:
                    names = [field.name for field in file.schema_arrow if _holds_text(field.type, as_bytes=False)]
            case other:
                raise UserError(UNKNOWN_ENDING.format(path=path, other=other))
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise UserError(f"Table {path} cannot be read: {' '.join(str(problem).split())}.") from problem
    return [name for name in names if name.strip() and names.count(name) == 1]


def _read_parquet(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    with pyarrow.parquet.ParquetFile(require_regular(path), pre_buffer=False) as file:
        require_columns(path, columns, file.schema_arrow.names)
        yield from (pa.Table.from_batches([batch]) for batch in file.iter_batches(BATCH_ROWS, columns=columns))


def _read_jsonl(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """Read some keys of each line. Numbers keep their spelling; other keys may have any value."""
    keys: dict[str, None] = {}
    for _, row in _lines(path):
        keys |= dict.fromkeys(row)
        if keys.keys() >= set(columns):
            break
    require_columns(path, columns, list(keys))
    rows = _lines(path)
    checks = {name: _TypeCheck(path, name) for name in columns}
    while batch := list(islice(rows, BATCH_ROWS)):
        yield pa.table({name: checks[name].uniform(batch) for name in columns})


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each line."""
    with TextIOWrapper(open_regular(path), encoding="utf-8-sig", errors="replace") as file:
        for number, row in json_lines(file, parse_int=_Number, parse_float=_Number, parse_constant=_CONSTANTS.get):
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            yield number, row


class _TypeCheck:
    """Check that all values of a JSONL column have one type. Null fits any, and a text fits a column of lists."""

    def __init__(self, path: Path, column: str):
        self._path, self._column = path, column
        self._first: tuple[type, int] | None = None  # type and line of the first value

    def uniform(self, rows: Sequence[tuple[int, dict[str, Any]]]) -> list[Any]:
        """Return the column of consecutive rows, in which all values are texts (or numbers as texts) or all are lists.

        Raises:
            UserError: Two values have different types.
        """
        values = [row.get(self._column) for _, row in rows]
        types = set(map(type, values))
        if self._first is None or list in types or not types <= {type(None), self._first[0]}:
            self._require_one_type(rows)
        if list in types:
            values = [[value] if isinstance(value, str) else value for value in values]
        return [str(value) if isinstance(value, _Number) else replace_surrogates(value) for value in values]

    def _require_one_type(self, rows: Sequence[tuple[int, dict[str, Any]]]) -> None:
        for line, row in rows:
            if (value := row.get(self._column)) is None:
                continue
            self._first = self._first or (type(value), line)
            kind, first = type(value), self._first[0]
            if kind is not first and not {kind, first} <= {str, list}:
                got = f"a {_JSON_TYPES[kind]} in line {line} and a {_JSON_TYPES[first]} in line {self._first[1]}"
            elif isinstance(value, list) and (others := {*map(type, value)} - {str, type(None)}):
                got = f"a list with a {' and a '.join(sorted(_JSON_TYPES[other] for other in others))} in line {line}"
            else:
                continue
            raise UserError(
                f"Column {self._column!r} of {self._path} is invalid: got {got}, expected texts or lists of texts. "
                "Correct these lines."
            )


def replace_surrogates(value: Any) -> Any:
    """Replace halves of surrogate pairs, which JSON can express and UTF-8 cannot."""
    if isinstance(value, list):
        return [replace_surrogates(each) for each in value]
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _as_text(column: pa.ChunkedArray, name: str, path: Path) -> pa.ChunkedArray:
    """Return a column as text or lists of text."""
    column = nan_as_null(column)
    kind, is_text = column.type, _holds_text(column.type)
    listed = _is_list(kind)
    text, raw = (pa.list_(pa.string()), pa.list_(pa.binary())) if listed else (pa.string(), pa.binary())
    try:
        column = column.cast(raw if is_text else text)
    except pa.ArrowException as problem:
        raise UserError(f"Column {name!r} of {path} is invalid: got values of type {kind}, expected text.") from problem
    try:
        return column.cast(text)
    except pa.ArrowInvalid:  # not UTF-8, although a parquet file may declare it as such
        return pa.chunked_array([pa.array(map(_decode, column.to_pylist()), text)])


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _holds_text(kind: pa.DataType, *, as_bytes: bool = True) -> bool:
    """Return whether values of a type are texts or lists of texts, which may be declared as bytes."""
    types, kind = pa.types, kind.value_type if _is_list(kind) else kind
    declared = (types.is_binary, types.is_large_binary) if as_bytes else ()
    return any(is_type(kind) for is_type in (types.is_string, types.is_large_string, types.is_string_view, *declared))


def nan_as_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column in which NaN is null. It is how pandas writes a missing text."""
    kind = column.type
    if pa.types.is_floating(kind):
        return pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
    if _is_list(kind) and pa.types.is_floating(kind.value_type):
        rows = [row and [None if value != value else value for value in row] for row in column.to_pylist()]
        return pa.chunked_array([pa.array(rows, kind)])
    return column


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(each) for each in value]
    return None if value is None else value.decode("utf-8", errors="replace")
