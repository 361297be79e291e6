"""Reader of CSV and TSV with strict rules for quotation marks.

A field in quotation marks may contain delimiters, line breaks, and quotation marks that are doubled. In CSV, a field
that is not closed, or that continues after its closing mark, is an error. In TSV, such a field is literal text. If the
quotation marks of a CSV are escaped by backslashes throughout, they are read too.

Each block of whole rows is checked in one vectorised pass over its quotation marks. If each of them opens or closes a
field or is doubled, pyarrow parses the block. Any other block is parsed field by field.
"""

import codecs
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from sail_align.extract.errors import UserError, listing
from sail_align.extract.system.files import open_regular

BLOCK = 2 << 20
"""Bytes that are parsed at a time. This is also the longest possible row."""
DELIMITERS = (",", "\t", ";", "|")
"""Delimiters that are tried if none is given."""

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_log = logging.getLogger(__name__)

_ESCAPED = re.compile(rb'\\(["\\])')
_REMEDY = 'Write a quotation mark inside a field twice ("") and enclose the field in quotation marks, or use JSONL.'


def read_delimited(
    path: Path, columns: Sequence[str], delimiters: Sequence[str], encoding: str | None
) -> Iterator[pa.Table]:
    """Yield the columns of a table as bytes in UTF-8, some thousand rows at a time.

    Args:
        path: The file. A byte order mark states its encoding.
        columns: Names in the first row.
        delimiters: The delimiter is the first of these that yields all columns.
        encoding: The encoding of a file without byte order mark, by default UTF-8.

    Raises:
        UserError: A quotation mark is out of place.
        ValueError: The file is empty, a column is missing, or a row has more or fewer fields than the first.
    """
    blocks = _read_blocks(path, columns, delimiters, encoding)
    with ThreadPoolExecutor(1) as pool:  # parse the next block while the caller uses this one
        coming = pool.submit(next, blocks, None)
        while (rows := coming.result()) is not None:
            coming = pool.submit(next, blocks, None)
            yield rows


def read_header(path: Path, delimiters: Sequence[str] = DELIMITERS, encoding: str | None = None) -> list[str]:
    """Return the names in the first row of a table, split by the delimiter that yields most of them.

    Args:
        path: The file.
        delimiters: The delimiters to try.
        encoding: The encoding of a file without byte order mark, by default UTF-8.

    Raises:
        UserError: A quotation mark is out of place.
        ValueError: The file is empty.
    """
    chunks = _utf8_chunks(path, encoding)
    data, final = next(chunks)
    names: list[list[str]] = []
    for delimiter in delimiters:
        try:
            names.append(_Table(path, (), [delimiter], encoding, data, final)._names)
        except UserError:
            if delimiter == delimiters[-1] and not names:
                raise
    return max(names, key=len)


def _read_blocks(
    path: Path, columns: Sequence[str], delimiters: Sequence[str], encoding: str | None
) -> Iterator[pa.Table]:
    chunks = _utf8_chunks(path, encoding)
    data, final = next(chunks)
    while not final and len(data) < BLOCK:
        more, final = next(chunks)
        data += more
    table = _Table(path, columns, delimiters, encoding, data, final)
    data = data[table.header_bytes :]
    while True:
        if data:
            rows, used = table.parse(data, final)
            yield rows
            data = data[used:]
        if final:
            table.finish()
            return
        more, final = next(chunks)
        data += more


def _utf8_chunks(path: Path, encoding: str | None) -> Iterator[tuple[bytes, bool]]:
    """Yield the text of a file in UTF-8, without a byte order mark, and whether this is the end.

    The last chunk ends with a line break.
    """
    with open_regular(path) as file:
        marked = _marked_encoding(file.read(4))
        name = codecs.lookup(marked or encoding or "utf-8").name
        file.seek(len(codecs.BOM_UTF8) if marked == "utf-8-sig" else 0)
        decoder = codecs.getincrementaldecoder(name)("replace")
        last, final = b"", False
        while not final:
            chunk = file.read(BLOCK)
            final = not chunk
            if name not in {"utf-8", "utf-8-sig"}:
                chunk = decoder.decode(chunk, final).encode(errors="replace")
            last = chunk[-1:] or last
            yield (chunk + b"\n" if final and last not in {b"", b"\n"} else chunk), final


def _marked_encoding(content: bytes) -> str | None:
    return next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)


def decode(content: bytes) -> str:
    """Return a text in UTF-8, or in the encoding that a byte order mark states. Invalid bytes become U+FFFD."""
    return content.decode(_marked_encoding(content) or "utf-8", "replace")


def require_columns(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise `UserError` unless a table has each column once."""
    for name in columns:
        if (times := names.count(name)) != 1:
            found = "more than one" if times else "no"
            raise UserError(f"{path} has {found} column {name!r}. Its columns are {listing(names)}.")


class _Table:
    """State of the reader of one file.

    Attributes:
        header_bytes: Length of the first row.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        delimiters: Sequence[str],
        encoding: str | None,
        data: bytes,
        final: bool,
    ):
        if not data.strip():
            raise ValueError("the file is empty")
        if b"\0" in data[:BLOCK].split(b"\n", 1)[0]:
            raise ValueError("its first line contains null characters; set `encoding:`, for example utf-16-le")
        self._path, self._encoding = path, encoding
        self._line_break = b"\r" if b"\r" in data and b"\n" not in data[:-1] else b"\n"
        self._start = 0  # position in the file, as UTF-8, of the data that are parsed next
        self._escaped = False  # whether backslashes escape quotation marks
        self._backslashes = False  # whether data were read in which they do not
        self._literal: int | None = None  # position of the first quotation mark in an unquoted field
        self._joined: int | None = None  # position of the first row of several lines, each of which could be a row
        for self._delimiter in [*delimiters, delimiters[0]]:
            header = self._rows(data, final, width=0)
            self._names = [text.decode("utf-8", "replace") for text in next(iter(header.rows), [])]
            if set(columns) <= set(self._names):
                break
        if header.problem:
            raise UserError(header.problem)
        require_columns(path, columns, self._names)
        self.header_bytes = header.used
        self._columns = {name: self._names.index(name) for name in columns}
        self._found = np.empty(0, bool)  # reused, because new memory costs more than the comparison
        self._border = np.zeros(256, bool)
        self._border[[ord(self._delimiter), *b'"\r\n']] = True
        self._start += header.used

    def parse(self, data: bytes, final: bool) -> tuple[pa.Table, int]:
        """Parse whole rows from the start of the data. Return them and their number of bytes."""
        characters = np.frombuffer(data, np.uint8)
        quotes = self._positions(characters, b'"')
        used = len(data) if final else self._end_of_rows(data, quotes)
        rows = None
        quotes = quotes[: np.searchsorted(quotes, used)]
        unclear = _has_escapes(data, used) and (self._escaped or data.find(b'\\"', 0, used) >= 0)
        if used and not unclear and self._are_regular(characters, quotes):
            rows = self._parse_quickly(data, used)
        if rows is None:
            rows, used = self._parse_exactly(data, final)
        elif len(quotes) and self._joined is None:
            joined = self._find_joined(characters[:used], quotes)
            self._joined = None if joined is None else self._start + joined
        self._require_one_use_of_quotes()
        self._backslashes |= not self._escaped and _has_escapes(data, used)
        self._start += used
        return rows, used

    def _end_of_rows(self, data: bytes, quotes: NDArray[np.intp]) -> int:
        """Return the end of the last line with an even number of quotation marks before it."""
        end = data.rfind(self._line_break) + 1
        while (before := int(np.searchsorted(quotes, end))) % 2:
            end = data.rfind(self._line_break, 0, int(quotes[before - 1])) + 1
        return end

    def _are_regular(self, characters: NDArray[np.uint8], quotes: NDArray[np.intp]) -> bool:
        """Return whether each quotation mark opens or closes a field, or is doubled.

        They then alternate between opening and closing, and two that are doubled close and open again.
        """
        if len(quotes) % 2:
            return False
        opening, closing = quotes[::2], quotes[1::2]
        opening = opening[1:] if len(opening) and opening[0] == 0 else opening
        return bool(self._border[characters[opening - 1]].all() and self._border[characters[closing + 1]].all())

    def _positions(self, characters: NDArray[np.uint8], character: str | bytes) -> NDArray[np.intp]:
        if len(self._found) < len(characters):
            self._found = np.empty(len(characters), bool)
        return np.flatnonzero(np.equal(characters, ord(character), out=self._found[: len(characters)]))

    def _find_joined(self, characters: NDArray[np.uint8], quotes: NDArray[np.intp]) -> int | None:
        """Return the start of the first row of several lines, each of which could be a row, in regular rows."""
        ends = self._positions(characters, self._line_break)
        last_lines = np.flatnonzero(np.searchsorted(quotes, ends) % 2 == 0)
        if len(last_lines) == len(ends) or len(self._names) == 1:
            return None
        delimiters = self._positions(characters, self._delimiter)
        could_be_row = np.diff(np.searchsorted(delimiters, ends), prepend=0) == len(self._names) - 1
        first_lines = np.concatenate([[0], last_lines[:-1] + 1])
        joined = np.logical_and.reduceat(could_be_row, first_lines) & (last_lines > first_lines)
        if not joined.any():
            return None
        line = int(first_lines[joined.argmax()])
        return int(ends[line - 1]) + 1 if line else 0

    def _parse_quickly(self, data: bytes, used: int) -> pa.Table | None:
        """Parse rows with pyarrow. Return None if it rejects them."""
        numbers = [str(number) for number in range(len(self._names))]
        included = [str(number) for number in self._columns.values()]
        try:
            rows = pyarrow.csv.read_csv(
                pa.BufferReader(pa.py_buffer(data).slice(0, used)),
                pyarrow.csv.ReadOptions(column_names=numbers, block_size=used + 1, use_threads=False),
                pyarrow.csv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
                # Read bytes, because pyarrow rejects a whole file for one byte that is not UTF-8.
                pyarrow.csv.ConvertOptions(
                    include_columns=included, column_types=dict.fromkeys(included, pa.binary()), check_utf8=False
                ),
            )
        except pa.ArrowInvalid:
            return None
        return rows.rename_columns(list(self._columns))

    def _parse_exactly(self, data: bytes, final: bool) -> tuple[pa.Table, int]:
        """Parse rows field by field.

        Raises:
            UserError: A quotation mark is out of place.
        """
        found = self._rows(data, final, len(self._names))
        if self._delimiter != "\t" and not self._escaped and b'\\"' in data:
            self._escaped = True
            escaped = self._rows(data, final, len(self._names))
            # Programs that double quotation marks leave none in an unquoted field.
            better = found.problem or found.literal is not None or len(escaped.rows) > len(found.rows)
            self._escaped = bool(better and not escaped.problem and not self._backslashes)
            if self._escaped:
                found = escaped
            elif better and not escaped.problem and not found.problem:
                line = self._line(self._start)
                found.problem = (
                    f"{self._path} is invalid: backslashes escape quotation marks only from line {line} on. {_REMEDY}"
                )
        self._literal = found.literal if self._literal is None else self._literal
        self._joined = found.joined if self._joined is None else self._joined
        if found.problem:
            raise UserError(found.problem)
        columns = list(zip(*found.rows, strict=True)) or [()] * len(self._names)
        table = {name: pa.array(columns[number], pa.binary()) for name, number in self._columns.items()}
        return pa.table(table), found.used

    def _require_one_use_of_quotes(self) -> None:
        if self._literal is None or self._joined is None:
            return
        joined, literal = self._line(self._joined), self._line(self._literal)
        raise UserError(
            f"{self._path} is invalid: the quotation marks in line {joined} enclose several lines, each of which could "
            f"be a row, and those in line {literal} are text. {_REMEDY}"
        )

    def finish(self) -> None:
        """Warn of rows that may have been joined by stray quotation marks."""
        if self._joined is not None:
            _log.warning(
                "%s: the row in line %d has several lines in quotation marks, each of which could be a row. Check it.",
                self._path,
                self._line(self._joined),
            )

    def _rows(self, data: bytes, final: bool, width: int) -> "_Rows":
        """Read rows of `width` fields, or the first row if `width` is 0."""
        found = _Rows()
        match_field, may_continue, _ = (each.match for each in _patterns(self._delimiter, self._escaped))
        delimiter = self._delimiter.encode()
        row: list[bytes] = []
        several_lines = False
        at = 0
        while at < len(data):
            match = match_field(data, at)
            is_literal = match and match[1] is None and b'"' in match[2] and not self._escaped
            if not match or (is_literal and match[2].startswith(b'"')):
                if not final and len(data) - found.used <= BLOCK and may_continue(data, at):
                    return found
                if not match:
                    found.problem = self._describe(data, at)
                    return found
            quoted, text, end = match.groups()
            if is_literal:
                found.literal = self._start + at if found.literal is None else found.literal
            row.append(self._unescape(quoted, text))
            several_lines |= quoted is not None and (b"\n" in quoted or b"\r" in quoted)
            at = match.end()
            if end == delimiter:
                continue
            if row == [b""] and quoted is None:  # a blank line
                pass
            elif width and len(row) != width:
                line = self._line(self._start + found.used)
                found.problem = (
                    f"Table {self._path} cannot be read: line {line}: expected {width} columns, got {len(row)}. "
                    "Correct the line, or set `delimiter:`."
                )
                return found
            else:
                found.rows.append(row)
                if several_lines and found.joined is None and self._could_be_rows(data[found.used : at], width):
                    found.joined = self._start + found.used
            row, several_lines, found.used = [], False, at
            if found.rows and not width:
                return found
        return found

    def _unescape(self, quoted: bytes | None, text: bytes) -> bytes:
        if self._escaped:
            return _ESCAPED.sub(rb"\1", text if quoted is None else quoted)
        return text if quoted is None else quoted.replace(b'""', b'"')

    def _could_be_rows(self, row: bytes, width: int) -> bool:
        """Return whether a row has several lines, and each has as many fields as a row."""
        delimiter = self._delimiter.encode()
        return width > 1 and all(line.count(delimiter) == width - 1 for line in row.splitlines())

    def _line(self, position: int) -> int:
        """Return the line of a position in the file. Lines are not counted until a message needs one."""
        line, left = 1, position
        for chunk, _ in _utf8_chunks(self._path, self._encoding):
            line += chunk.count(self._line_break, 0, left)
            if (left := left - len(chunk)) <= 0:
                break
        return line

    def _describe(self, data: bytes, at: int) -> str:
        """Describe the field at a position, which cannot be read."""
        line = self._line(self._start + at)
        shown = data[at : at + 40].split(self._line_break)[0].decode("utf-8", "replace")
        if closed := _patterns(self._delimiter, self._escaped).quoted.match(data, at):
            last = self._line(self._start + closed.end())
            where = f"in line {line}" if line == last else f"from line {line} to {last}"
            got = f"text after the closing quotation mark of the field {shown!r} {where}"
        elif data[at] == ord('"'):
            got = f"the quotation mark of the field {shown!r} in line {line}, which is not closed"
        else:
            got = f"the field {shown!r} in line {line}, in which not all quotation marks are escaped"
        return f"{self._path} is invalid: got {got}. {_REMEDY}"


@dataclass
class _Rows:
    """Rows that were read field by field.

    Attributes:
        rows: The fields of each row.
        used: Number of bytes of these rows.
        literal: Position in the file of the first unquoted field with a quotation mark.
        joined: Position of the first row of several lines, each of which could be a row.
        problem: Why the row after these cannot be read.
    """

    rows: list[list[bytes]] = field(default_factory=list)
    used: int = 0
    literal: int | None = None
    joined: int | None = None
    problem: str = ""


def _has_escapes(data: bytes, stop: int) -> bool:
    """Return whether data contain a quotation mark or a backslash after a backslash."""
    return data.find(b"\\", 0, stop) >= 0 and (data.find(b'\\"', 0, stop) >= 0 or data.find(b"\\\\", 0, stop) >= 0)


class _Patterns(NamedTuple):
    """Patterns of a field.

    Attributes:
        field: A field with its end, in three groups: quoted content, unquoted content, and the delimiter or line break.
        unfinished: A field that may have its end in the data that follow.
        quoted: A quoted field without its end.
    """

    field: re.Pattern[bytes]
    unfinished: re.Pattern[bytes]
    quoted: re.Pattern[bytes]


@cache
def _patterns(delimiter: str, escaped: bool) -> _Patterns:
    end = re.escape(delimiter).encode()
    quoted = rb'(?:[^"\\]++|\\.)*+' if escaped else rb'(?:[^"]++|"")*+'
    if delimiter == "\t":
        unquoted = rb"[^\t\r\n]*+"
    elif escaped:
        unquoted = rb'(?:[^"\\\r\n' + end + rb']++|\\["\\]?)*+'
    else:
        unquoted = rb'(?!")[^\r\n' + end + rb"]*+"
    sources = (
        rb'(?:"(' + quoted + rb')"|(' + unquoted + rb"))(" + end + rb"|\r?\n|\r(?=[^\n]))",
        rb'(?:"' + quoted + rb'(?:"\r?|\\)?|' + unquoted + rb"\r?)\Z",
        rb'"' + quoted + rb'"',
    )
    return _Patterns(*(re.compile(source, re.DOTALL) for source in sources))
