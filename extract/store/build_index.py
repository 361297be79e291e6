"""Build the index of a store: part after part, file after file, taken up again where it was stopped."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sail_align.extract.data import CaptionTables, Part, Sample
from sail_align.extract.errors import UserError
from sail_align.extract.store.index import (
    FILE_ROWS,
    GROUP_ROWS,
    IndexRecord,
    index_file,
    samples_table,
    stamps,
    text_hashes,
    write_index_file,
)
from sail_align.extract.store.recaptions import join_captions
from sail_align.extract.system.files import remove_tree
from sail_align.extract.system.progress import progress

Advance = Callable[[int], object]
"""Told how many more rows are done."""

CANDIDATES = 65_536
"""Hashes that occur more than once whose keys are compared at a time."""


def write_index(
    folder: Path,
    made_of: Any,
    parts: Sequence[Part],
    captions: Sequence[str],
    recaptions: CaptionTables | None = None,
    *,
    quiet: bool,
) -> IndexRecord:
    """Write the index files of all parts, and go on where a call that was stopped left off.

    Such a call's files are kept if `made_of` (a JSON value: all that decides which samples there are) is the same and
    no file of the source has another stamp. The files then are byte for byte those of a call that was not stopped.
    The captions of `recaptions` are joined when all files are there.

    Raises:
        UserError: Two samples have the same key, or `recaptions` fit none.
    """
    record = IndexRecord.begin(made_of, parts)
    before = IndexRecord.read(folder)
    joined_before = before is not None and before.tables and not recaptions
    if before and before.same_source(record) and not joined_before and _all_there(folder, before):
        record = before
    else:
        remove_tree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        if not record.complete:
            _write_files(folder, record, parts, captions, quiet)
        _require_unique_keys(folder, len(record.digests))
    except UserError:
        if record.complete or not record.digests:  # nothing to go on from: the data are to be mended
            remove_tree(folder)
        raise
    if recaptions and record.digests:
        record.tables = stamps(recaptions.files)
        record.write(folder)  # from here on files may hold joined captions
        files, rows = len(record.digests), sum(record.rows)
        record.digests = join_captions(folder, files, rows, captions, recaptions, quiet=quiet)
        record.write(folder)
    return record


def _write_files(
    folder: Path, record: IndexRecord, parts: Sequence[Part], captions: Sequence[str], quiet: bool
) -> None:
    samples = _samples(parts, record.rows)
    with progress(None, "index", done=sum(record.rows), quiet=quiet, delay=1) as bar:
        while first := next(samples, None):
            of_file = chain([first], islice(samples, FILE_ROWS - 1))
            file = index_file(folder, len(record.digests))
            record.digests.append(write_index_file(file, _tables(of_file, captions, bar.update)))
            record.write(folder)
    record.complete = True
    record.write(folder)


def _samples(parts: Sequence[Part], rows: list[int]) -> Iterator[Sample]:
    """Yield the samples behind the first `rows` of each part, and count them there."""
    begun = max((number for number, count in enumerate(rows) if count), default=0)
    for number, part in list(enumerate(parts))[begun:]:
        for sample in islice(part.read(), rows[number], None):
            rows[number] += 1
            yield sample


def _tables(samples: Iterator[Sample], captions: Sequence[str], advance: Advance) -> Iterator[pa.Table]:
    while group := list(islice(samples, GROUP_ROWS)):
        yield samples_table(group, captions)
        advance(len(group))


def _all_there(folder: Path, record: IndexRecord) -> bool:
    return all(index_file(folder, number).is_file() for number in range(len(record.digests)))


def _require_unique_keys(folder: Path, files: int) -> None:
    """Compare 64-bit hashes of all keys, eight bytes a row, and only where these agree the keys themselves."""
    hashes = np.sort(np.concatenate([text_hashes(keys) for keys in _keys(folder, files)] or [text_hashes([])]))
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    for start in range(0, len(twice), CANDIDATES):
        seen: set[str] = set()
        for keys in _keys(folder, files):
            for row in np.flatnonzero(np.isin(text_hashes(keys), twice[start : start + CANDIDATES])):
                if keys[row] in seen:
                    raise UserError(
                        f"Sample key {keys[row]!r} occurs more than once; every sample needs a key of its own."
                    )
                seen.add(keys[row])


def _keys(folder: Path, files: int) -> Iterator[list[str]]:
    for number in range(files):
        with index_file(folder, number).open("rb") as file:
            yield pq.read_table(file, columns=["key"])["key"].to_pylist()
