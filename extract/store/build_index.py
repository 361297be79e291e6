"""Building the index of a store, part by part and file by file. A stopped build resumes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sail_align.extract.data import CaptionTables, Part, Sample
from sail_align.extract.errors import UserError
from sail_align.extract.store.index import FILE_ROWS, GROUP_ROWS, Index, IndexRecord, text_hashes
from sail_align.extract.store.recaptions import join_captions
from sail_align.extract.system.files import is_remote, remove_tree
from sail_align.extract.system.progress import progress

RECORDS = 64
"""Index files after which the record is not written for each, but so often that a stop loses 1/64 of them at most.

The record grows with the files, so the time of writing it for each would grow with their square.
"""

HASHES = 1 << 25
"""Hashes of keys that are compared at a time. Two such parts are in memory for a moment: 0.5 GB."""

CANDIDATES = 65_536
"""Repeated hashes whose keys are compared at a time."""


def build_index(
    folder: Path,
    made_of: Any,
    parts: Sequence[Part],
    captions: Sequence[str],
    recaptions: CaptionTables | None = None,
    *,
    groups: bool = False,
    quiet: bool,
) -> IndexRecord:
    """Write the index files of all parts, resuming a call that was stopped.

    Its files are kept if `made_of` is the same and no file of the source has changed. They are then byte for byte those
    of a call that was not stopped.

    Args:
        folder: The folder of the index.
        made_of: JSON value of everything that decides which samples there are.
        parts: The parts of the source.
        captions: Names of the samples' own captions.
        recaptions: Tables of further captions, joined when all files are written.
        groups: Whether the index has the groups of the samples.
        quiet: Show no progress bars.

    Raises:
        UserError: Two samples have the same key, or no sample finds a caption in `recaptions`.
    """
    index, record = Index(folder), IndexRecord.begin(made_of, parts)
    before = IndexRecord.read(folder)
    if (
        before
        and (before.made_of, before.stamps) == (record.made_of, record.stamps)
        and (recaptions or not before.tables)  # files with joined captions are kept only to join again
        and all(index.file(number).is_file() for number in range(len(before.digests)))
    ):
        record = before
    else:
        remove_tree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        if not record.complete:
            _write_files(index, record, parts, captions, groups, quiet)
        _require_unique_keys(index, len(record.digests))
    except UserError:
        if record.complete or not record.digests:  # nothing to resume: the data have to be corrected
            remove_tree(folder)
        raise
    if recaptions and record.digests:
        record.tables = IndexRecord.stamps_of(recaptions.files)
        record.write(folder)  # from here on, files may hold joined captions
        files, rows = len(record.digests), sum(record.rows)
        record.digests = join_captions(folder, files, rows, captions, recaptions, quiet=quiet)
        record.write(folder)
    return record


def _write_files(
    index: Index, record: IndexRecord, parts: Sequence[Part], captions: Sequence[str], groups: bool, quiet: bool
) -> None:
    samples = _read_samples(parts, record.rows)
    with progress(None, "index", done=sum(record.rows), quiet=quiet, delay=1) as bar:

        def row_groups(of_file: Iterator[Sample]) -> Iterator[Any]:
            while group := list(islice(of_file, GROUP_ROWS)):
                yield Index.table(group, captions, groups=groups)
                bar.update(len(group))

        while first := next(samples, None):
            of_file = chain([first], islice(samples, FILE_ROWS - 1))
            record.digests.append(index.write(len(record.digests), row_groups(of_file)))
            if len(record.digests) % max(len(record.digests) // RECORDS, 1) == 0:
                record.write(index.folder)
    record.complete = True
    record.write(index.folder)


def _read_samples(parts: Sequence[Part], rows: list[int]) -> Iterator[Sample]:
    """Yield the samples after the first `rows[n]` of each part n, and count them there."""
    first = max((number for number, count in enumerate(rows) if count), default=0)
    for number in range(first, len(parts)):
        for sample in islice(parts[number].read(), rows[number], None):
            rows[number] += 1
            yield sample


def _require_unique_keys(index: Index, files: int) -> None:
    """Raise `UserError` if two samples have the same key.

    Compares 64-bit hashes, and the keys themselves only if their hashes are equal.
    """
    parts = (np.unique(hashes[1:][hashes[1:] == hashes[:-1]]) for hashes in _sorted_hashes(index, files))
    repeated = np.concatenate(list(parts))
    for start in range(0, len(repeated), CANDIDATES):
        seen: set[str] = set()
        for keys in index.columns("key", files):
            for row in np.flatnonzero(np.isin(text_hashes(keys), repeated[start : start + CANDIDATES])):
                if keys[row] in seen:
                    raise UserError(f"Sample key {keys[row]!r} occurs more than once. Make the keys unique.")
                seen.add(keys[row])


def _sorted_hashes(index: Index, files: int) -> Iterator[NDArray[np.int64]]:
    """Yield the hashes of all keys in parts that fit into memory, each sorted. Equal hashes are in the same part.

    The parts are in files without a name, of eight bytes per row, which disappear with the process.
    """
    parts = -(-files * FILE_ROWS // HASHES) or 1
    folder = None if is_remote(index.folder) else index.folder
    with ExitStack() as stack:
        spills = [stack.enter_context(TemporaryFile(dir=folder)) for _ in range(parts)]
        for keys in index.columns("key", files):
            hashes = text_hashes(keys)
            for number, spill in enumerate(spills):
                spill.write(hashes[hashes % parts == number].tobytes())
        for spill in spills:
            spill.seek(0)
            hashes = np.fromfile(spill, np.int64)
            hashes.sort()
            yield hashes
