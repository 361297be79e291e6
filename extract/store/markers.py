"""Markers: a JSON file per committed shard, written after the shard. A shard without a valid marker does not exist.

A marker binds the content of a shard to its place: the index of its store, its array, number and rows, the encoder,
and the array's type and sizes. It contains nothing that differs between two runs of the same job.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sail_align.extract.system.files import (
    canonical_json,
    digest_without,
    read_regular,
    report_read_errors,
    write_atomically,
)

Marker = dict[str, Any]
CONTENT = ("fingerprint", "rows", "counts", "sha256")
"""The fields of format 1. A store's digest covers these, so that an upgrade does not change it."""
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
