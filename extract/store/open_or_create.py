"""Open or make the store of a manifest: has the source the same samples still? Only changed parts are read for it."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import NoReturn

from sail_align.extract.data import Part, Sample, Source
from sail_align.extract.errors import StoreExistsError, UserError
from sail_align.extract.manifest import Manifest
from sail_align.extract.store.index import GROUP_ROWS, IndexRecord, Stamp, stamps
from sail_align.extract.store.recaptions import RecaptionReport
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import file_digest
from sail_align.extract.system.progress import progress


def open_or_create(path: Path, manifest: Manifest, source: Source, *, quiet: bool = False) -> Store:
    """Open the store of a manifest's samples, or make it.

    Raises:
        UserError: The path holds the store of another manifest or of other samples, or something else.
    """
    if not (path / "zarr.json").exists():
        with suppress(StoreExistsError):  # another process was quicker
            return Store.create(
                path,
                dataset=manifest.name,
                manifest=manifest.rows,
                parts=source.parts(),
                captions=source.captions,
                recaptions=source.recaptions,
                quiet=quiet,
            )
    store = open_made_from(path, manifest)
    require_samples(store, source, quiet=quiet)
    return store


def open_made_from(path: Path, manifest: Manifest) -> Store:
    """Open the store of a manifest's samples; whether the source still has these is not asked.

    Raises:
        UserError: The path holds the store of another manifest, or something else.
    """
    store, made_from = Store.open(path), manifest.rows
    if (recorded := store.attributes["manifest"]) != made_from:
        field = next(name for name in (*made_from, *recorded) if made_from.get(name) != recorded.get(name))
        raise UserError(
            f"{path} was made from a manifest whose {field} is {recorded.get(field)!r}, now it is "
            f"{made_from.get(field)!r}; name another --out."
        )
    return store


def require_samples(store: Store, source: Source, *, quiet: bool) -> None:
    """Compare the samples of each part whose files have other stamps than when they were read, and keep the new stamps.

    A part without files, such as the demo's, is trusted: the manifest says all about it. A store without a record of
    its source is compared whole.

    Raises:
        UserError: A sample differs; the sentence names the changed file and the first such row.
    """
    folder, parts = store.path / "index", source.parts()
    now = IndexRecord.begin(store.attributes["manifest"], parts)
    before = IndexRecord.read(folder)
    now.tables = _require_tables(store, source, before)
    if before and (before.stamps, before.tables) == (now.stamps, now.tables):
        return
    known = list(zip(before.rows, before.stamps, strict=True)) if before else []
    start = 0
    with progress(store.rows, "comparing samples", quiet=quiet, delay=1) as bar:
        for number, (part, stamped) in enumerate(zip(parts, now.stamps, strict=True)):
            rows, old = known[number] if number < len(known) else (None, [])
            if rows is None or old != stamped:
                changed = [file for file, stamp in zip(part.files, stamped, strict=False) if stamp not in old]
                rows = _compare(store, source, part, start, rows, changed or list(part.files))
            bar.update(rows)
            now.rows[number] = rows
            start += rows
    if start < store.rows:
        _refuse(store, start, store.samples(start, start + 1)[0], None, [])
    now.digests, now.complete = store.attributes["index_sha256"], True
    if before:
        now.made_of = before.made_of
    now.write(folder)


def _require_tables(store: Store, source: Source, before: IndexRecord | None) -> list[Stamp]:
    """Return the stamps of the caption tables that were joined, which must be those that are there now."""
    if source.recaptions is None:
        return []
    files = source.recaptions.files
    now = stamps(files)
    if before is None or before.tables != now:
        report = RecaptionReport.read(store.path / "index")
        for file, joined in zip_longest(files, report.tables if report else []):
            if file is None or joined is None or joined != [file.name, file_digest(file)]:
                raise UserError(
                    f"{store.path} holds captions of another {file.name if file else joined[0]} than there is now; "
                    "name another --out."
                )
    return now


def _compare(store: Store, source: Source, part: Part, start: int, expected: int | None, changed: list[Path]) -> int:
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


def _stored(store: Store, source: Source, start: int) -> Iterator[Sample]:
    captions = [name for name in store.captions if name in source.captions]
    for first in range(start, store.rows, GROUP_ROWS):
        yield from store.samples(first, min(first + GROUP_ROWS, store.rows), captions)


def _refuse(store: Store, row: int, old: Sample | None, new: Sample | None, changed: list[Path]) -> NoReturn:
    there, here = ("no sample" if sample is None else f"sample {sample.key!r}" for sample in (old, new))
    where = " or ".join(map(str, changed)) or "the data set"
    raise UserError(
        f"{store.path} has {there} in row {row} where {where} has {here} now, or another caption of it; "
        "name another --out."
    )
