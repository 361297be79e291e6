"""Markers: a JSON file per committed shard, written after the shard. A shard without a valid marker does not exist.

A marker binds the content of a shard to its place: the index of its store, its array, number and rows, the encoder,
and the array's type and sizes. It contains nothing that differs between two runs of the same job.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sail_align.extract.system.files import (
    canonical_json,
    digest_without,
    is_remote,
    read_regular,
    report_read_errors,
    write_atomically,
)

Marker = dict[str, Any]
CONTENT = ("fingerprint", "rows", "counts", "sha256")
"""The fields of format 1. A store's digest covers these, so that an upgrade does not change it."""
REMOTE_READERS = 32
"""Markers that are read from object storage at a time, where each takes tens of milliseconds."""
_FORM = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""Errors of reading a marker of another form."""


class Markers:
    """The markers of one array.

    Args:
        store: The store's folder.
        array: The array's path in it.
        bound: The fields that all markers of this array have.
        names: Names of the files of a shard.
        format_1: Whether markers of format 1 are valid, which have `CONTENT` only.
    """

    def __init__(self, store: Path, array: str, bound: Mapping[str, Any], names: tuple[str, ...], *, format_1: bool):
        self._store = store
        self._folder = store / "commits" / array
        self._bound = {"array": array, **bound}
        self._names = set(names)
        self._format_1 = format_1

    def file(self, shard: int) -> Path:
        """Return where a shard's marker is, or would be."""
        return self._folder / f"{shard:05d}.json"

    @property
    def readers(self) -> int:
        """The number of markers to read at a time."""
        return REMOTE_READERS if is_remote(self._store) else 1

    def read(self, shard: int, rows: tuple[int, int], chunks: int) -> Marker | None:
        """Return a shard's marker, None if it is missing or not valid.

        Args:
            shard: Number of the shard.
            rows: First row of the shard, and the row after its last.
            chunks: Number of chunks with rows.

        Raises:
            UserError: The file cannot be read.
        """
        path = self.file(shard)
        with report_read_errors(path):
            try:
                marker: Any = json.loads(read_regular(path))
                place = {**self._bound, "shard": shard, "rows": list(rows)}
                if "digest" in marker:
                    valid = marker["digest"] == digest_without(marker, "digest") and len(marker["crc32c"]) == chunks
                else:
                    valid = self._format_1 and marker.keys() == set(CONTENT)
                    place = {name: place[name] for name in ("fingerprint", "rows")}
                valid = valid and all(marker[name] == value for name, value in place.items())
                valid = valid and sum(marker["counts"].values()) == rows[1] - rows[0]
                valid = valid and marker["sha256"].keys() == self._names
            except (FileNotFoundError, *_FORM):
                return None
        return marker if valid else None

    def write(self, shard: int, rows: tuple[int, int], content: Mapping[str, Any]) -> Marker:
        """Commit a shard whose files are written.

        Args:
            shard: Number of the shard.
            rows: First row of the shard, and the row after its last.
            content: Number of rows by status label (`counts`), SHA-256 of each file, None for one that does not exist
                (`sha256`), and the CRC-32C of each chunk's features (`crc32c`).
        """
        marker = {**self._bound, "shard": shard, "rows": list(rows), **content}
        marker["digest"] = digest_without(marker, "digest")
        write_atomically(self.file(shard), canonical_json(marker), below=self._store)
        return marker

    def discard(self, shard: int) -> None:
        """Remove a shard's marker."""
        self.file(shard).unlink(missing_ok=True)


class LazyMarkers(MutableMapping[int, Marker]):
    """The valid markers of an array by shard. Each is read once, when it is first asked for.

    So the time to open a shard does not depend on the number of shards. Iteration and `len` read all others.

    Args:
        shards: Numbers of the array's shards.
        read: Function that reads a shard's marker.
        readers: Number of markers to read at a time.
    """

    def __init__(self, shards: range, read: Callable[[int], Marker | None], readers: int):
        self._shards = shards
        self._read = read
        self._readers = readers
        self._known: dict[int, Marker | None] = {}

    def __getitem__(self, shard: int) -> Marker:
        if shard not in self._known:
            if shard not in self._shards:
                raise KeyError(shard)
            self._known[shard] = self._read(shard)
        if (marker := self._known[shard]) is None:
            raise KeyError(shard)
        return marker

    def __setitem__(self, shard: int, marker: Marker) -> None:
        self._known[shard] = marker

    def __delitem__(self, shard: int) -> None:
        if self._known.get(shard) is None:
            raise KeyError(shard)
        self._known[shard] = None

    def __iter__(self) -> Iterator[int]:
        self.read_ahead(self._shards)
        return iter([shard for shard in self._shards if self._known[shard] is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def look_again(self, shard: int) -> bool:
        """Read a shard's marker again if there was none. Returns whether there is one."""
        if self._known.get(shard) is None:
            self._known[shard] = self._read(shard)
        return self._known[shard] is not None

    def read_ahead(self, shards: Iterable[int]) -> None:
        """Read the markers of these shards that were not asked for yet, several at a time from object storage."""
        unread = [shard for shard in shards if shard not in self._known]
        if self._readers == 1 or len(unread) < 2:
            self._known.update((shard, self._read(shard)) for shard in unread)
            return
        with ThreadPoolExecutor(self._readers, "markers") as pool:
            self._known.update(zip(unread, pool.map(self._read, unread), strict=True))
