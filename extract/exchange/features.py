"""Features that were computed elsewhere: files that together are one matrix, and the texts that belong to its rows."""

import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sail_align.extract.errors import UserError, did_you_mean, listing
from sail_align.extract.exchange.vector_files import (
    BATCH_ROWS,
    FORMATS,
    KEY,
    Block,
    Columns,
    VectorFile,
    as_texts,
    is_text,
    open_vectors,
    report_unreadable,
)
from sail_align.extract.sources.delimited import DELIMITERS, read_header
from sail_align.extract.sources.file_set import matches
from sail_align.extract.sources.table_files import read_batches
from sail_align.extract.system.files import open_regular, require_regular
from sail_align.extract.system.progress import progress

Places = NDArray[np.int64]

GAP = 16
"""Rows between two needed ones up to which both are read at once."""
FOLDERS = {"image": "img_emb", "text": "text_emb"}
"""Folders of clip-retrieval's layout by modality. Beside them is METADATA."""
METADATA = "metadata"
TABLES = (".parquet", ".csv", ".tsv", ".jsonl", ".txt", ".npy")
_SIDES = {"image": ("image", "img", "vision"), "text": ("text", "txt", "caption")}


class Texts:
    """Columns of texts that belong to the rows of some features.

    Args:
        where: Their origin, for messages.
        columns: Functions that read a column, by its name.
        sole: Whether the only column is unnamed. It then has the keys, under any name that the other side uses.
    """

    def __init__(self, where: str, columns: Columns, sole: bool = False):
        self.where, self._columns, self._sole = where, columns, sole

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._columns)

    def has(self, name: str) -> bool:
        """Return whether there is such a column, or one without a name."""
        return self._sole or name in self._columns

    def read(self, name: str, rows: int) -> pa.ChunkedArray:
        """Return a column of `rows` texts. Raises `UserError` if it does not exist or has another length."""
        if self._sole:
            name = next(iter(self._columns))
        if name not in self._columns:
            guess = did_you_mean(name, self._columns)
            raise UserError(f"{self.where} has no column {name!r}. Its columns are {listing(self._columns)}.{guess}")
        column = self._columns[name]()
        if len(column) != rows:
            raise UserError(
                f"{self.where} is invalid: got {len(column):,} rows, expected {rows:,} as in the features. Pass the "
                "file that belongs to them."
            )
        return column


class Features:
    """A matrix (rows, dim) that lies in one file or several.

    Args:
        given: The path that the user gave: a file, a folder, or a pattern.
        modality: `image` or `text`.
        caption: Name of the caption; "" for images.
        vector: Name of the vectors in files that may have several. None to find it.
        keys: A table with the keys and other texts of the rows. None if they are in the files, or beside them.

    Attributes:
        files: The files, in order.
        tables: The files of their texts, if these are others.
        texts: The texts that belong to the rows; None if there are none.

    Raises:
        UserError: A file is missing or cannot be read, or the files do not fit each other.
    """

    def __init__(
        self, given: Path, modality: str, caption: str = "", vector: str | None = None, keys: Path | None = None
    ):
        self.given, self.modality, self.caption = given, modality, caption
        option = f"--{modality}-features"
        paths = find_files(given, option, tuple(FORMATS), _folders(modality, caption))
        self._files = [open_vectors(path, partial(_choose, modality, caption, vector)) for path in paths]
        first = self._files[0]
        for each in self._files:
            if (each.dim, each.dtype) != (first.dim, first.dtype):
                raise UserError(
                    f"{each.path} is invalid: got {each.dim} dimensions of {each.dtype}, expected {first.dim} of "
                    f"{first.dtype} as in {first.path}. Pass files of one encoder."
                )
        self.dim, self.dtype = first.dim, first.dtype
        self._starts = np.cumsum([0, *(each.rows for each in self._files)])
        self.rows = int(self._starts[-1])
        self.files = paths
        self.tables = find_files(keys, f"--{modality}-keys", TABLES) if keys else _metadata(paths)
        self.texts = _texts_in(self.tables) if self.tables else _texts_of(self._files)

    @property
    def label(self) -> str:
        """The array's name in messages."""
        return f"{self.modality} features" + (f" {self.caption!r}" if self.caption else "")

    def read(self, start: int, stop: int) -> Block:
        """Return rows start … stop − 1, at least one."""
        blocks = []
        first, last = np.searchsorted(self._starts, [start, stop - 1], "right") - 1
        for number in range(int(first), int(last) + 1):
            file, before = self._files[number], int(self._starts[number])
            with report_unreadable(file.path):
                blocks.append(file.read(max(start - before, 0), min(stop - before, file.rows)))
        return blocks[0] if len(blocks) == 1 else Block(*(np.concatenate(each) for each in zip(*blocks, strict=True)))

    def take(self, rows: Places) -> Block:
        """Return rows in any order, each once. Rows that lie close together are read at once."""
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            return self.read(int(rows[0]), int(rows[-1]) + 1)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        values: NDArray[np.floating] | None = None
        missing = np.zeros(len(rows), bool)
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(ordered) > GAP) + 1):
            for start in range(0, len(run), BATCH_ROWS):
                places = run[start : start + BATCH_ROWS]
                first = int(ordered[places[0]])
                block = self.read(first, int(ordered[places[-1]]) + 1)
                if values is None:
                    values = np.empty((len(rows), self.dim), block.values.dtype)
                inside = ordered[places] - first
                values[order[places]], missing[order[places]] = block.values[inside], block.missing[inside]
        return Block(np.empty((0, self.dim), np.float32) if values is None else values, missing)

    def in_any_order(self, order: Places, folder: Path | None, *, quiet: bool) -> "Callable[[Places], Block]":
        """Return `take`, or, if that would decode files again and again, the same from a copy on the disk.

        Args:
            order: All rows that will be taken, in this order.
            folder: Folder of the copy, which the system removes when the process ends. None takes the system's own.
            quiet: Show no progress bar.
        """
        if not any(each.sequential for each in self._files) or not (np.diff(order) < 0).any():
            return self.take
        values: NDArray[np.floating] | None = None
        missing = np.zeros(self.rows, bool)
        with progress(self.rows, f"copy {self.label}", quiet=quiet, delay=1) as bar:
            for start in range(0, self.rows, BATCH_ROWS):
                block = self.read(start, min(start + BATCH_ROWS, self.rows))
                if values is None:
                    with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps it
                        values = np.memmap(file, block.values.dtype, "w+", shape=(self.rows, self.dim))
                values[start : start + len(block.values)] = block.values
                missing[start : start + len(block.values)] = block.missing
                bar.update(len(block.values))
        copy = values
        if copy is None:
            raise ValueError(f"{self.given} has no rows")
        return lambda rows: Block(np.asarray(copy[rows]), missing[rows])


def find_files(given: Path, option: str, endings: Sequence[str], folders: Sequence[str] = ()) -> list[Path]:
    """Return the files that a path stands for, in the order of the numbers in their names.

    Args:
        given: A file, a pattern such as `parts/*.npy`, or a folder whose files of one kind are meant.
        option: The option that it was given with, for messages.
        endings: Endings of the files.
        folders: Names of subfolders, the first of which is taken instead of the folder.

    Raises:
        UserError: There are none, or files of several kinds.
    """
    folder = next((given / name for name in folders if (given / name).is_dir()), given)
    if folder.is_dir():
        found = [path for path in folder.iterdir() if path.suffix.lower() in endings and not path.name.startswith(".")]
    else:
        found = [path for path in matches(Path(), str(given)) if path.is_file()]
    kinds = sorted({path.suffix.lower() for path in found})
    if not found:
        got = "a folder without such files" if folder.is_dir() else "no such file"
        raise UserError(f"{option} {given} is invalid: got {got}, expected {', '.join(endings)}. Correct the path.")
    if len(kinds) > 1 and folder.is_dir():
        raise UserError(
            f"{option} {given} is invalid: got files of several kinds ({', '.join(kinds)}). Pass a pattern such as "
            f"'{folder}/*{kinds[0]}'."
        )
    if unknown := [kind for kind in kinds if kind not in endings]:
        raise UserError(f"{option} {given} is invalid: got {unknown[0] or 'no ending'}, expected {', '.join(endings)}.")
    return sorted(found, key=_by_number)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Return what orders names as people do: part 2 before part 10."""
    pieces = re.split(r"(\d+)", str(path))
    return [(int(piece), piece) if piece.isdecimal() else (-1, piece) for piece in pieces]


def _folders(modality: str, caption: str) -> list[str]:
    name = FOLDERS[modality]
    return [f"{name}_{caption}", name] if caption else [name]


def _choose(modality: str, caption: str, given: str | None, path: Path, names: Sequence[str]) -> str:
    """Return the name of the vectors to read from a file: the given one, the only one, or the one of this side."""
    option = f"--{modality}-vector"
    if given is not None:
        if given not in names:
            raise UserError(f"{option} {given!r} is invalid: {path} has {listing(names) or 'no vectors'}.")
        return given
    of_side = [name for name in names if any(word in name.lower() for word in _SIDES[modality])]
    of_caption = [name for name in of_side if caption and name.lower().endswith(f"_{caption.lower()}")]
    for some in (names, of_side, of_caption):
        if len(some) == 1:
            return some[0]
    if not names:
        raise UserError(f"{path} is invalid: it has no vectors. A vector is a list of floating-point numbers.")
    raise UserError(f"{path} has several vectors: {listing(names)}. Choose one with {option}.")


def _metadata(files: Sequence[Path]) -> list[Path]:
    """Return clip-retrieval's tables beside the folder of parts, if there is one for each part."""
    folder = files[0].parent.parent / METADATA
    if files[0].suffix == ".parquet" or not files[0].parent.name.startswith(tuple(FOLDERS.values())):
        return []
    tables = sorted(folder.glob("*.parquet"), key=_by_number) if folder.is_dir() else []
    if tables and len(tables) != len(files):
        raise UserError(f"{folder} has {len(tables)} tables, expected {len(files)}, one for each file of features.")
    return tables


def _texts_of(files: Sequence[VectorFile]) -> Texts | None:
    """Return the texts that the files of features contain themselves."""
    names = [name for name in files[0].columns if all(name in each.columns for each in files)]
    where = str(files[0].path if len(files) == 1 else files[0].path.parent)
    columns = {name: partial(_join, [each.columns[name] for each in files]) for name in names}
    return Texts(where, columns, sole=all(each.named for each in files)) if names else None


def _join(parts: Sequence[Callable[[], pa.ChunkedArray]]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for part in parts for chunk in part().chunks], pa.large_string())


def _texts_in(tables: Sequence[Path]) -> Texts:
    """Return the columns of tables that belong to features."""
    sole = tables[0].suffix.lower() in {".txt", ".npy"}
    names = [KEY] if sole else [name for name in _header(tables[0]) if all(name in _header(each) for each in tables)]
    columns = {name: partial(_join, [partial(_read_column, each, name) for each in tables]) for name in names}
    return Texts(str(tables[0] if len(tables) == 1 else tables[0].parent), columns, sole=sole or len(names) == 1)


def _header(table: Path) -> list[str]:
    with report_unreadable(table):
        match table.suffix.lower():
            case ".parquet":
                with pq.ParquetFile(require_regular(table)) as file:
                    return [each.name for each in file.schema_arrow if is_text(each.type)]
            case ".jsonl":
                import json

                with open_regular(table) as lines:
                    first = json.loads(lines.readline())
                if not isinstance(first, dict):
                    raise ValueError("line 1 is not a JSON object")
                return list(first)
            case ending:
                return read_header(table, DELIMITERS if ending == ".csv" else ("\t", *DELIMITERS))


def _read_column(table: Path, name: str) -> pa.ChunkedArray:
    match table.suffix.lower():
        case ".txt":
            with report_unreadable(table), open_regular(table) as file:
                text = file.read().decode("utf-8-sig").removesuffix("\n")
                lines = [line.removesuffix("\r") for line in text.split("\n")]  # not at U+2028
            return pa.chunked_array([pa.array(lines, pa.large_string())])
        case ".npy":
            with report_unreadable(table):
                array = np.load(require_regular(table), allow_pickle=False)
                if array.ndim != 1 or array.dtype.kind not in "USiu":
                    raise ValueError(f"got {array.dtype.name} {array.shape}, expected one text per row")
                return pa.chunked_array([pa.array(array.astype(str), pa.large_string())])
    parts = [as_texts(batch[name]) for batch in read_batches(table, [name], [name])]
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.large_string())
