"""Join caption tables to the samples of an index by URL or key, in memory that does not grow with the captions.

In memory are 64-bit hashes of the samples' URLs and some bytes more a sample. The tables are streamed once; rows that
may belong to a sample are spilled, to one file for each file of the index, and then attached file by file, where the
texts themselves are compared: two URLs of one hash are never taken for each other. Of several rows with one URL the
first that holds a caption counts; several samples with one URL all get it. Position plays no part.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sail_align.extract.data import CaptionTables
from sail_align.extract.errors import UserError
from sail_align.extract.sources.table_files import read_captions
from sail_align.extract.store.index import FIELDS, FILE_ROWS, Index, caption_column, text_hashes
from sail_align.extract.system.files import canonical_json, file_digest, write_atomically
from sail_align.extract.system.progress import progress

REPORT = "recaptions.json"


@dataclass(frozen=True)
class RecaptionReport:
    """Counts of images and of caption rows.

    Every caption row is one of `joined`, `no_image`, `duplicates` (of a row before it) and `empty` (without URL or
    without caption). `captions` counts the images that have each caption; `nameless` images have no URL to join by.
    """

    field: str
    tables: list[list[str]]  # name, SHA-256
    images: int
    nameless: int
    found: int
    captions: dict[str, int]
    rows: int
    joined: int
    no_image: int
    duplicates: int
    empty: int

    @classmethod
    def read(cls, folder: Path) -> "RecaptionReport | None":
        """Read the report of an index, None if no captions were joined."""
        try:
            return cls(**json.loads((folder / REPORT).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Keep the report beside an index."""
        write_atomically(folder / REPORT, canonical_json(asdict(self)))

    def lines(self) -> Iterator[str]:
        """Yield the report for people."""
        captions = sum(self.captions.values())
        nameless = f"; {self.nameless:,} have no {self.field}" if self.nameless else ""
        yield (
            f"recaptions: {self.found:,} of {self.images:,} images ({self.found / self.images:.1%}) found captions by "
            f"{self.field}, {captions / max(self.found, 1):.2f} each{nameless}"
        )
        yield f"  images by caption: {', '.join(f'{name} {count:,}' for name, count in self.captions.items())}"
        yield f"  caption rows: {self.rows:,} read, {self.joined:,} joined, {self.rows - self.joined:,} dropped:"
        yield (
            f"    {self.no_image:,} no such image, {self.duplicates:,} with the {self.field} of a row before, "
            f"{self.empty:,} empty"
        )


SPILL_BYTES = 32 << 20
"""Captions in memory before they are spilled."""


def join_captions(
    folder: Path, files: int, rows: int, own: Sequence[str], tables: CaptionTables, *, quiet: bool
) -> list[str]:
    """Rewrite each file of an index with the tables' captions added, keep the report; return the files' SHA-256.

    `own` names the captions that the samples have already. A join that was stopped is done again from the start: the
    samples' own columns are the same before and after, and others are not kept.

    Raises:
        UserError: No row of the tables belongs to any sample, or a caption is a list.
    """
    spill = folder / "spill"
    shutil.rmtree(spill, ignore_errors=True)
    spill.mkdir()
    index = Index(folder)
    samples = _Samples.of(index, files, tables.field)
    streamed = _stream(samples, tables, spill, quiet)
    if not any(spill.iterdir()):
        raise UserError(
            f"None of {streamed.rows} caption rows has the {tables.field} of one of {rows} images in column "
            f"{tables.column!r} of {tables.files[0]}; correct 'recaptions' in the manifest."
        )
    attached = _Attached.none(streamed.rows, own, tables)
    digests = []
    with progress(rows, "attaching captions", quiet=quiet, delay=1) as bar:
        for number in range(files):
            start = number * FILE_ROWS
            digests.append(index.write(number, attached.to(index.file(number), start, _spilled(spill, number))))
            bar.update(min(FILE_ROWS, rows - start))
    shutil.rmtree(spill)
    joined = int(attached.joined.sum())
    duplicates = streamed.duplicates + int(attached.matched.sum()) - joined
    RecaptionReport(
        field=tables.field,
        tables=[[file.name, str(file_digest(file))] for file in tables.files],
        images=rows,
        nameless=rows - len(samples.rows),
        found=attached.found,
        captions=attached.captions,
        rows=streamed.rows,
        joined=joined,
        no_image=streamed.rows - streamed.empty - duplicates - joined,
        duplicates=duplicates,
        empty=streamed.empty,
    ).write(folder)
    return digests


@dataclass
class _Samples:
    """The samples that have a URL: its hash, sorted, and the row of each, (N,) int64.

    Samples of one hash are neighbours; at the first of them, `claimed` says whether a caption row has that hash, and
    `claims` holds a second hash of the first such row's URL, so that a later row with the same URL is known.
    """

    hashes: NDArray[np.int64]
    rows: NDArray[np.int64]
    claimed: NDArray[np.bool_]
    claims: NDArray[np.int64]

    @classmethod
    def of(cls, index: Index, files: int, field: str) -> "_Samples":
        hashes, rows = [], []
        for number, names in enumerate(index.columns(field, files)):
            named = np.fromiter(map(bool, names), bool, len(names))
            hashes.append(text_hashes(names)[named])
            rows.append(np.flatnonzero(named) + number * FILE_ROWS)
        together = np.concatenate(hashes)
        del hashes  # a hundred megabytes each, for CC12M
        order = np.argsort(together)
        together = together[order]
        placed = np.concatenate(rows)[order]
        return cls(together, placed, np.zeros(len(order), bool), np.zeros(len(order), np.int64))

    def claim(self, names: list[str]) -> tuple[NDArray[np.intp], NDArray[np.int64], int]:
        """Return which of the names may belong to which samples, as pairs, and the number of names claimed before."""
        hashes = text_hashes(names)
        first, last = np.searchsorted(self.hashes, hashes, "left"), np.searchsorted(self.hashes, hashes, "right")
        found = np.flatnonzero(last > first)
        second = text_hashes([names[i][::-1] for i in found])
        runs = first[found]
        unclaimed = np.flatnonzero(~self.claimed[runs])
        claiming, of_found = np.unique(runs[unclaimed], return_index=True)
        of_found = unclaimed[of_found]
        self.claimed[claiming], self.claims[claiming] = True, second[of_found]
        again = self.claims[runs] == second
        again[of_found] = False
        kept = found[~again]
        counts = last[kept] - first[kept]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(kept, counts), self.rows[np.repeat(first[kept], counts) + within], int(again.sum())


@dataclass
class _Streamed:
    """Counts of caption rows."""

    rows: int = 0
    empty: int = 0
    duplicates: int = 0


def _stream(samples: _Samples, tables: CaptionTables, spill: Path, quiet: bool) -> _Streamed:
    """Read the tables once and spill the rows that may belong to samples, in their order."""
    counts, waiting = _Streamed(), list[pa.Table]()
    with progress(None, "caption rows", quiet=quiet, delay=1) as bar:
        for file in tables.files:
            for batch in read_captions(file, tables):
                table = _caption_rows(batch, tables)
                orders = pa.array(np.arange(counts.rows, counts.rows + len(table)))
                counts.rows += len(table)
                table = table.append_column("order", orders)
                table = table.filter(_useful(table, tables))
                counts.empty += len(batch) - len(table)
                which, rows, duplicates = samples.claim(table["name"].to_pylist())
                counts.duplicates += duplicates
                if len(which):
                    waiting.append(table.take(which).append_column("row", pa.array(rows)))
                if sum(each.nbytes for each in waiting) > SPILL_BYTES:
                    _spill(waiting, spill)
                bar.update(len(batch))
        if waiting:
            _spill(waiting, spill)
    return counts


def _caption_rows(batch: pa.Table, tables: CaptionTables) -> pa.Table:
    """Return the column that joins as `name`, and the captions by their names, null where there is no word."""
    columns = {"name": batch[tables.column]}
    for name, column in tables.captions.items():
        blank = pc.equal(pc.utf8_trim_whitespace(batch[column]), "")
        columns[caption_column(name)] = pc.if_else(blank, None, batch[column])
    return pa.table(columns)


def _useful(table: pa.Table, tables: CaptionTables) -> pa.ChunkedArray:
    """Tell the rows that have a name to join by and a caption to add."""
    captioned = pc.is_valid(pc.coalesce(*(table[caption_column(name)] for name in tables.captions)))
    return pc.and_(captioned, pc.not_equal(pc.coalesce(table["name"], ""), ""))


def _spill(waiting: list[pa.Table], spill: Path) -> None:
    """Append each row to the spill of the index file that its sample is in."""
    table = pa.concat_tables(waiting).combine_chunks()
    waiting.clear()
    files = table["row"].to_numpy() // FILE_ROWS
    order = np.argsort(files, kind="stable")
    table, files = table.take(order), files[order]
    numbers, starts = np.unique(files, return_index=True)
    for number, start, stop in zip(numbers, starts, [*starts[1:], len(table)], strict=True):
        with (
            (spill / str(number)).open("ab") as file,
            pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as stream,
        ):
            stream.write_table(table.slice(start, stop - start))


def _spilled(spill: Path, number: int) -> pa.Table | None:
    """Read one index file's spill: what was appended, stream after stream."""
    path, tables = spill / str(number), []
    if not path.exists():
        return None
    with path.open("rb") as file:
        while file.tell() < path.stat().st_size:
            tables.append(pa.ipc.open_stream(file).read_all())
    return pa.concat_tables(tables)


@dataclass
class _Attached:
    """Adds captions to index files, and counts: caption rows that belong to a sample, (rows,) each, and images.

    `own` are the columns that an index has without them.
    """

    tables: CaptionTables
    own: list[str]
    matched: NDArray[np.bool_]
    joined: NDArray[np.bool_]
    captions: dict[str, int]
    found: int = 0

    @classmethod
    def none(cls, rows: int, captions: Sequence[str], tables: CaptionTables) -> "_Attached":
        own = [*FIELDS.names, *map(caption_column, captions)]
        return cls(tables, own, np.zeros(rows, bool), np.zeros(rows, bool), dict.fromkeys(tables.captions, 0))

    def to(self, file: Path, start: int, spilled: pa.Table | None) -> Iterator[pa.Table]:
        """Yield an index file's row groups, from row `start` of the index on, with the captions that belong to them."""
        with file.open("rb") as opened, pq.ParquetFile(opened) as index:
            source = self._match(index.read([self.tables.field])[self.tables.field], start, spilled)
            done = 0
            for group in range(index.num_row_groups):
                rows = index.read_row_group(group, self.own)
                of_group = source[done : done + len(rows)]
                picked = pa.array(of_group, mask=of_group < 0)
                for name in self.tables.captions:
                    column = caption_column(name)
                    captions = pa.nulls(len(rows), pa.string()) if spilled is None else spilled[column].take(picked)
                    self.captions[name] += len(rows) - captions.null_count
                    rows = rows.append_column(column, captions)
                yield rows
                done += len(rows)

    def _match(self, names: pa.ChunkedArray, start: int, spilled: pa.Table | None) -> NDArray[np.int64]:
        """Return for each sample of an index file, given its URL or key, the spilled row that is its own, else −1."""
        source = np.full(len(names), -1)
        if spilled is not None:
            rows = spilled["row"].to_numpy() - start
            same = pc.equal(names.combine_chunks().take(rows), spilled["name"].combine_chunks())
            exact = np.flatnonzero(same.to_numpy(zero_copy_only=False))
            targets, first = np.unique(rows[exact], return_index=True)
            source[targets] = exact[first]
            orders = spilled["order"].to_numpy()
            self.matched[orders[exact]] = True
            self.joined[orders[exact[first]]] = True
            self.found += len(targets)
        return source
