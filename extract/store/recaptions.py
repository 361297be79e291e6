"""Join caption tables to the samples of an index by URL or key, in memory that does not grow with the captions.

The URLs or keys of the samples are held in memory as 64-bit hashes. The tables are streamed once. Rows whose hash
matches a sample are spilled to one file per index file. Each index file is then rewritten with its captions. There the
texts themselves are compared, so two URLs with the same hash are never confused.

If several rows have the same URL, the first one with a caption counts. If several samples have the same URL, all of
them get the captions. Position plays no role.
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
from typing_extensions import TypedDict

from sail_align.extract.data import CaptionTables
from sail_align.extract.errors import UserError
from sail_align.extract.sources.table_files import read_captions
from sail_align.extract.store.index import CAPTION, FIELDS, FILE_ROWS, GROUP, Index, text_hashes
from sail_align.extract.system.files import canonical_json, file_digest, read_regular, write_atomically
from sail_align.extract.system.progress import progress
from sail_align.extract.system.validation import validated

REPORT = "recaptions.json"
SPILL_BYTES = 32 << 20
"""Bytes of captions that are collected in memory before they are spilled."""


class _ReportForm(TypedDict, total=False):
    field: str
    images: int
    captions: dict[str, int]
    tables: list[list[str]]
    nameless: int
    found: int
    rows: int
    joined: int
    no_image: int
    duplicates: int
    empty: int


@dataclass
class RecaptionReport:
    """Counts of images and caption rows.

    In the end, every caption row is exactly one of `joined`, `no_image`, `duplicates` and `empty`.

    Attributes:
        field: Field of the samples that was joined by, `url` or `key`.
        images: Number of samples.
        captions: Number of samples that have each caption, by its name.
        tables: Name and SHA-256 of each table.
        nameless: Number of samples without a URL to join by.
        found: Number of samples that got captions.
        rows: Number of caption rows.
        joined: Number of caption rows whose captions were used.
        no_image: Number of caption rows without a sample.
        duplicates: Number of caption rows with the URL of an earlier row.
        empty: Number of caption rows without a URL or without a caption.
    """

    field: str
    images: int
    captions: dict[str, int]
    tables: list[list[str]]
    nameless: int = 0
    found: int = 0
    rows: int = 0
    joined: int = 0
    no_image: int = 0
    duplicates: int = 0
    empty: int = 0

    @staticmethod
    def digest(folder: Path) -> str | None:
        """Return the SHA-256 of the report of an index, None if no captions were joined."""
        return file_digest(folder / REPORT)

    @classmethod
    def read(cls, folder: Path, digest: str | None = None) -> "RecaptionReport | None":
        """Read the report of an index, None if no captions were joined.

        Raises:
            UserError: The report does not have this digest.
        """
        if digest and cls.digest(folder) != digest:
            raise UserError(f"{folder / REPORT} is missing or has changed since the store was made. Restore it.")
        try:
            return cls(**validated(_ReportForm, json.loads(read_regular(folder / REPORT))))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def write(self, folder: Path) -> None:
        """Save the report beside an index."""
        write_atomically(folder / REPORT, canonical_json(asdict(self)))

    def lines(self) -> Iterator[str]:
        """Yield the report as text."""
        per_image = sum(self.captions.values()) / max(self.found, 1)
        nameless = f"; {self.nameless:,} have no {self.field}" if self.nameless else ""
        yield (
            f"recaptions: {self.found:,} of {self.images:,} images ({self.found / self.images:.1%}) matched by "
            f"{self.field}, {per_image:.2f} captions each{nameless}"
        )
        yield f"  images by caption: {', '.join(f'{name} {count:,}' for name, count in self.captions.items())}"
        yield f"  caption rows: {self.rows:,} read, {self.joined:,} joined, {self.rows - self.joined:,} dropped:"
        yield (
            f"    {self.no_image:,} without image, {self.duplicates:,} with the {self.field} of an earlier row, "
            f"{self.empty:,} empty"
        )


def join_captions(
    folder: Path, files: int, rows: int, own: Sequence[str], tables: CaptionTables, *, quiet: bool
) -> list[str]:
    """Rewrite each file of an index with the tables' captions added, and save the report.

    A join that was stopped is repeated from the start. The samples' own columns are the same before and after, and
    columns from the stopped join are dropped.

    Args:
        folder: Folder of the index.
        files: Number of index files.
        rows: Number of samples.
        own: Names of the captions that the samples already have.
        tables: The tables to join.
        quiet: Hide the progress bars.

    Returns:
        The SHA-256 of each index file.

    Raises:
        UserError: No row of the tables belongs to any sample, or a caption is a list.
    """
    index = Index(folder)
    join = _Join(index, files, rows, own, tables)
    join.read_tables(quiet)
    report = join.report
    if not any(join.spill.iterdir()):
        raise UserError(
            f"None of {report.rows} caption rows has the {tables.field} of one of {rows} images in column "
            f"{tables.column!r} of {tables.files[0]}. Correct 'recaptions' in the manifest."
        )
    digests = []
    with progress(rows, "attaching captions", quiet=quiet, delay=1) as bar:
        for number in range(files):
            digests.append(index.write(number, join.attach(number)))
            bar.update(min(FILE_ROWS, rows - number * FILE_ROWS))
    shutil.rmtree(join.spill)
    report.tables = [[file.name, str(file_digest(file))] for file in tables.files]
    report.joined = int(join.joined.sum())
    report.duplicates += int(join.matched.sum()) - report.joined
    report.no_image = report.rows - report.empty - report.duplicates - report.joined
    report.write(folder)
    return digests


class _Join:
    """One join of tables to an index. Below, the "name" of a sample or caption row is the URL or key to join by.

    Attributes:
        report: Counts of what was read and joined until now.
        spill: Folder of the spill files, one per index file.
        sample_hashes: Hash of each sample that has a name, sorted, (N,) int64.
        sample_rows: Row of each of these samples in the index, (N,) int64.
        matched: Whether a caption row has the name of a sample, (rows,).
        joined: Whether the captions of a caption row are used, (rows,).
    """

    def __init__(self, index: Index, files: int, rows: int, own: Sequence[str], tables: CaptionTables):
        self._index, self._tables = index, tables
        self._own_columns = [*FIELDS.names, GROUP.name, *(CAPTION + name for name in own)]  # those that there are
        self.spill = index.folder / "spill"
        shutil.rmtree(self.spill, ignore_errors=True)
        self.spill.mkdir()
        hashes, named = [], []
        for number, names in enumerate(index.columns(tables.field, files)):
            has_name = np.fromiter(map(bool, names), bool, len(names))
            hashes.append(text_hashes(names)[has_name])
            named.append(np.flatnonzero(has_name) + number * FILE_ROWS)
        self.sample_hashes = np.concatenate(hashes)
        del hashes  # 100 MB for CC12M
        order = np.argsort(self.sample_hashes)
        self.sample_hashes = self.sample_hashes[order]
        self.sample_rows = np.concatenate(named)[order]
        # Samples with the same hash are neighbours. The entry of the first of them says whether a caption row with this
        # hash was read, and keeps a second hash of that row's name, which identifies later rows with the same name.
        self._claimed = np.zeros(len(order), bool)
        self._claims = np.zeros(len(order), np.int64)
        self.matched = self.joined = np.zeros(0, bool)
        captions = dict.fromkeys(tables.captions, 0)
        self.report = RecaptionReport(tables.field, rows, captions, [], nameless=rows - len(order))

    def read_tables(self, quiet: bool) -> None:
        """Read the tables once, and spill the rows that may belong to samples, in their order."""
        waiting: list[pa.Table] = []
        with progress(None, "caption rows", quiet=quiet, delay=1) as bar:
            for file in self._tables.files:
                for batch in read_captions(file, self._tables):
                    table = self._useful_rows(batch)
                    which, samples = self._claim(table["name"].to_pylist())
                    if len(which):
                        waiting.append(table.take(which).append_column("sample", pa.array(samples)))
                    if sum(each.nbytes for each in waiting) > SPILL_BYTES:
                        self._write_spill(waiting)
                        waiting = []
                    bar.update(len(batch))
        if waiting:
            self._write_spill(waiting)
        self.matched, self.joined = np.zeros(self.report.rows, bool), np.zeros(self.report.rows, bool)

    def _useful_rows(self, batch: pa.Table) -> pa.Table:
        """Return the rows with a name and at least one caption that is not blank.

        The columns are `name`, the captions by their names in the index, and `order`, the number of the row over all
        tables.
        """
        columns = {"name": batch[self._tables.column]}
        for name, column in self._tables.captions.items():
            has_text = pc.not_equal(pc.utf8_trim_whitespace(batch[column]), "")
            # Not `if_else`, which returns damaged arrays for slices of text in some versions of pyarrow.
            columns[CAPTION + name] = pc.case_when(pc.make_struct(has_text), batch[column])
        columns["order"] = pa.array(np.arange(self.report.rows, self.report.rows + len(batch)))
        table = pa.table(columns)
        captioned = pc.is_valid(pc.coalesce(*(table[CAPTION + name] for name in self._tables.captions)))
        useful = table.filter(pc.and_(captioned, pc.not_equal(pc.coalesce(table["name"], ""), "")))
        self.report.rows += len(batch)
        self.report.empty += len(batch) - len(useful)
        return useful

    def _claim(self, names: list[str]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Return pairs of a name and a sample with the same hash, without names that were claimed before.

        Args:
            names: The names of consecutive caption rows.

        Returns:
            The positions of the names, (P,), and the rows of the samples, (P,).
        """
        hashes = text_hashes(names)
        first, last = (np.searchsorted(self.sample_hashes, hashes, side) for side in ("left", "right"))
        found = np.flatnonzero(last > first)
        reversed_hashes = text_hashes([names[i][::-1] for i in found])
        entries = first[found]
        unclaimed = np.flatnonzero(~self._claimed[entries])
        claimed_now, position = np.unique(entries[unclaimed], return_index=True)
        claiming = unclaimed[position]  # the first name of each new entry
        self._claimed[claimed_now], self._claims[claimed_now] = True, reversed_hashes[claiming]
        is_duplicate = self._claims[entries] == reversed_hashes
        is_duplicate[claiming] = False
        self.report.duplicates += int(is_duplicate.sum())
        kept = found[~is_duplicate]
        counts = last[kept] - first[kept]  # samples per name
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, … for each name
        return np.repeat(kept, counts), self.sample_rows[np.repeat(first[kept], counts) + within]

    def _write_spill(self, tables: list[pa.Table]) -> None:
        """Append each row to the spill file of its sample's index file."""
        table = pa.concat_tables(tables).combine_chunks()
        numbers = table["sample"].to_numpy() // FILE_ROWS
        order = np.argsort(numbers, kind="stable")
        table, numbers = table.take(order), numbers[order]
        present, starts = np.unique(numbers, return_index=True)
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        for number, start, stop in zip(present, starts, [*starts[1:], len(table)], strict=True):
            with (
                (self.spill / str(number)).open("ab") as file,
                pa.ipc.new_stream(file, table.schema, options=options) as stream,
            ):
                stream.write_table(table.slice(start, stop - start))

    def _read_spill(self, number: int) -> pa.Table | None:
        path, tables = self.spill / str(number), []
        if not path.exists():
            return None
        with path.open("rb") as file:
            while file.tell() < path.stat().st_size:  # one stream per call of `_write_spill`
                tables.append(pa.ipc.open_stream(file).read_all())
        return pa.concat_tables(tables)

    def attach(self, number: int) -> Iterator[pa.Table]:
        """Yield the row groups of an index file with their captions."""
        spilled = self._read_spill(number)
        with self._index.file(number).open("rb") as opened, pq.ParquetFile(opened) as index:
            names = index.read([self._tables.field])[self._tables.field]
            caption_rows = self._match(names, number * FILE_ROWS, spilled)
            done = 0
            for group in range(index.num_row_groups):
                rows = index.read_row_group(group, self._own_columns)
                of_group = caption_rows[done : done + len(rows)]
                picked = pa.array(of_group, mask=of_group < 0)
                for name in self._tables.captions:
                    column = CAPTION + name
                    captions = pa.nulls(len(rows), pa.string()) if spilled is None else spilled[column].take(picked)
                    self.report.captions[name] += len(rows) - captions.null_count
                    rows = rows.append_column(column, captions)
                yield rows
                done += len(rows)

    def _match(self, names: pa.ChunkedArray, start: int, spilled: pa.Table | None) -> NDArray[np.int64]:
        """Return the position in the spill of each sample's caption row, −1 for none.

        Args:
            names: The names of the samples of an index file.
            start: The first row of that file.
            spilled: The spill of that file.
        """
        caption_rows = np.full(len(names), -1)
        if spilled is not None:
            samples = spilled["sample"].to_numpy() - start
            same = pc.equal(names.combine_chunks().take(samples), spilled["name"].combine_chunks())
            exact = np.flatnonzero(same.to_numpy(zero_copy_only=False))
            targets, first = np.unique(samples[exact], return_index=True)
            caption_rows[targets] = exact[first]
            orders = spilled["order"].to_numpy()
            self.matched[orders[exact]] = True
            self.joined[orders[exact[first]]] = True
            self.report.found += len(targets)
        return caption_rows
