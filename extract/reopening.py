"""Are a store's samples still those of its source? Only parts whose files changed are read again for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sail_align.extract.errors import UserError
from sail_align.extract.index import GROUP_ROWS
from sail_align.extract.index_record import IndexRecord
from sail_align.extract.progress import progress
from sail_align.extract.sources.base import Part, Sample, Source

if TYPE_CHECKING:
    from sail_align.extract.store import Store


def require_samples(store: "Store", source: Source, *, quiet: bool) -> None:
    """Compare the samples of each part whose files have other stamps than when they were read, and keep the new stamps.

    A part without files, such as the demo's, is trusted: the manifest says all about it. A store without a record of
    its source is compared whole.

    Raises:
        UserError: A sample differs; the sentence names the changed file and the first such row.
    """
    folder, parts = store.path / "index", source.parts()
    now = IndexRecord.begin(store.attributes["manifest"], parts)
    before = IndexRecord.read(folder)
    if before and before.stamps == now.stamps:
        return
    start = 0
    with progress(store.rows, "comparing samples", quiet=quiet, delay=1) as bar:
        for number, part in enumerate(parts):
            expected = before.rows[number] if before and number < len(before.rows) else None
            if before is None or expected is None or before.stamps[number] != now.stamps[number]:
                old = before.stamps[number] if before and expected is not None else []
                changed = [file for file, stamp in zip(part.files, now.stamps[number], strict=True) if stamp not in old]
                expected = _compare(store, source, part, start, expected, changed or list(part.files))
            bar.update(expected)
            now.rows[number] = expected
            start += expected
    if start < store.rows:
        _refuse(store, start, store.samples(start, start + 1)[0], None, [])
    now.digests, now.complete = store.attributes["index_sha256"], True
    if before:
        now.made_of, now.tables = before.made_of, before.tables
    now.write(folder)


def _compare(store: "Store", source: Source, part: Part, start: int, expected: int | None, changed: list[Path]) -> int:
    """Return how many samples a part has; it must have the `expected` number if that is known."""
    stored, samples, row = _stored(store, source, start), part.read(), start
    stop = None if expected is None else start + expected
    while True:
        new = next(samples, None)
        if new is None and stop in (None, row):
            return row - start
        old = next(stored, None)
        if old != new or row == stop:
            _refuse(store, row, old, new, changed)
        row += 1


def _stored(store: "Store", source: Source, start: int) -> Iterator[Sample]:
    captions = [name for name in store.captions if name in source.captions]
    for first in range(start, store.rows, GROUP_ROWS):
        yield from store.samples(first, min(first + GROUP_ROWS, store.rows), captions)


def _refuse(store: "Store", row: int, old: Sample | None, new: Sample | None, changed: list[Path]) -> NoReturn:
    there, here = ("no sample" if sample is None else f"sample {sample.key!r}" for sample in (old, new))
    where = " or ".join(map(str, changed)) or "the data set"
    raise UserError(
        f"{store.path} has {there} in row {row} where {where} has {here} now, or another caption of it; "
        "name another --out."
    )
