"""Opening the store of a manifest, or creating it, and checking that its source still has the same samples."""

from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import NoReturn

from sail_align.extract.data import Part, Sample, Source
from sail_align.extract.errors import StoreExistsError, UserError
from sail_align.extract.manifest import Manifest
from sail_align.extract.store.index import IndexRecord, Stamp
from sail_align.extract.store.store import INDEX, Store
from sail_align.extract.system.files import file_digest
from sail_align.extract.system.progress import progress


def open_or_create(path: Path, manifest: Manifest, source: Source, *, quiet: bool = False) -> Store:
    """Open the store of a manifest's samples, or create it.

    Raises:
        UserError: The path holds something else, or the store of another manifest or of other samples.
    """
    if not (path / "zarr.json").exists():
        with suppress(StoreExistsError):  # another process was faster
            return Store.create(
                path,
                dataset=manifest.name,
                manifest=manifest.rows,
                parts=source.parts(),
                captions=source.captions,
                recaptions=source.recaptions,
                groups=source.has_groups,
                quiet=quiet,
            )
    store = Store.open(path, manifest=manifest.rows)
    _SourceCheck(store, source).run(quiet)
    return store


class _SourceCheck:
    """Compares the samples of a store with those that its source has now."""

    def __init__(self, store: Store, source: Source):
        self.store, self.source = store, source
        self.own_captions = [name for name in store.captions if name in source.captions]

    def run(self, quiet: bool) -> None:
        """Compare the samples of each part whose files have changed since they were read, and record the new stamps.

        A part without files, such as the demo's, is trusted: its name identifies its samples. A store without a record
        of its source is compared completely.

        Raises:
            UserError: A sample differs; the message names the changed file and the first such row.
        """
        store, folder, parts = self.store, self.store.path / INDEX, self.source.parts()
        now = IndexRecord.begin(store.attributes["manifest"], parts)
        before = IndexRecord.read(folder)
        now.tables = self._require_tables(before)
        if before and (before.stamps, before.tables) == (now.stamps, now.tables):
            return
        known = list(zip(before.rows, before.stamps, strict=True)) if before else []
        start = 0
        with progress(store.rows, "comparing samples", quiet=quiet, delay=1) as bar:
            for number, (part, stamps) in enumerate(zip(parts, now.stamps, strict=True)):
                rows, old = known[number] if number < len(known) else (None, [])
                if rows is None or old != stamps:
                    seen = set(old)
                    changed = [file for file, stamp in zip(part.files, stamps, strict=False) if stamp not in seen]
                    rows = self.compare(part, start, rows, changed or list(part.files))
                bar.update(rows)
                now.rows[number] = rows
                start += rows
        if start < store.rows:
            self._reject(start, store.samples(start, start + 1)[0], None, [])
        now.digests, now.complete = store.attributes["index_sha256"], True
        if before:
            now.made_of = before.made_of
        now.write(folder)

    def compare(self, part: Part, start: int, expected: int | None, changed: list[Path]) -> int:
        """Compare a part with the rows from `start`. Returns how many samples it has: `expected` if that is known."""
        stored = self.store.index_files.samples(start, self.store.rows, self.own_captions)
        samples, row = part.read(), start
        stop = None if expected is None else start + expected
        while True:
            new = next(samples, None)
            if new is None and stop in (None, row):
                return row - start
            old = next(stored, None)
            if old != new or row == stop:
                self._reject(row, old, new, changed)
            row += 1

    def _require_tables(self, before: IndexRecord | None) -> list[Stamp]:
        """Return the stamps of the caption tables. Raises `UserError` unless they are those that were joined."""
        if self.source.recaptions is None:
            return []
        files = self.source.recaptions.files
        now = IndexRecord.stamps_of(files)
        if before is None or before.tables != now:
            report = self.store.recaptions()
            for file, joined in zip_longest(files, report.tables if report else []):
                if file is None or joined is None or joined != [file.name, file_digest(file)]:
                    name = file.name if file else joined[0]
                    raise UserError(
                        f"{self.store.path} has captions of {name}, which has changed since. Pass another --out."
                    )
        return now

    def _reject(self, row: int, old: Sample | None, new: Sample | None, changed: list[Path]) -> NoReturn:
        stored, current = ("no sample" if sample is None else f"sample {sample.key!r}" for sample in (old, new))
        where = " or ".join(map(str, changed)) or "the data set"
        raise UserError(
            f"{self.store.path} has {stored} in row {row}, but {where} now has {current}, or another caption of it. "
            "Pass another --out."
        )
