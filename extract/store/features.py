"""One array of a store: features and statuses in shards, each written whole, once, and committed by a marker."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from sail_align.extract.data import FAILURES, Status
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.errors import UserError, command
from sail_align.extract.store.hierarchy import read_document, write_document
from sail_align.extract.store.mapped import damaged
from sail_align.extract.store.markers import CONTENT, LazyMarkers, Marker, Markers
from sail_align.extract.store.sharded import DIMENSIONS, ShardedArray
from sail_align.extract.system.files import file_digest, write_atomically
from sail_align.extract.system.leases import Lease, LeaseLostError

NAMES = ("features", "status")
"""The two zarr arrays of a `FeatureArray`."""


class FeatureArray:
    """The features of one encoder for the images or one caption of a store: (rows, dim) float16, and a status per row.

    What is read is compared with its marker: statuses by the SHA-256 of their file before a shard's first use, features
    by the CRC-32C of each chunk on its first use.

    Args:
        store: The store's folder.
        path: The array's path in the store.
        identity: The encoder that made the features.
        index: Digest of the store's index, to which shards are bound.
        format_1: Whether the store has format 1. Its features have no checksums, and it is not written to.

    Attributes:
        check: Whether features are compared with their checksums.
    """

    def __init__(self, store: Path, path: str, identity: Identity, index: str = "", *, format_1: bool = False):
        self.path = path
        self.identity = identity
        self.check = True
        self._store = store
        self._arrays = {name: ShardedArray(store / path / name, partial(self._has_file, name)) for name in NAMES}
        self._features, self._status = self._arrays.values()
        self.rows, self.dim = self._features.zarr.shape
        self.shard_rows, self.chunk_rows = self._features.shard_rows, self._features.chunk_rows
        self.shards = range(-(-self.rows // self.shard_rows))
        bound = {
            "index": index,
            "fingerprint": identity.spec.fingerprint,
            "dtype": self._features.zarr.dtype.name,
            "shape": [self.rows, self.dim],
            "chunks": [self.shard_rows, self.chunk_rows],
        }
        self._commits = Markers(store, path, bound, NAMES, format_1=format_1)
        self._format_1 = format_1
        self._compared: set[int] = set()
        """Shards whose statuses are known to be those that were committed."""
        self._checked: set[int] = set()
        """Chunks whose features are known to be those that were committed."""

    @property
    def node(self) -> str:
        """Name of the encoder's node in the store."""
        return self.path.split("/")[1]

    @property
    def parts(self) -> tuple["FeatureArray"]:
        """The array itself: the only part of its features."""
        return (self,)

    def require_layout(self, rows: int, shard_rows: int, chunk_rows: int) -> None:
        """Raise `UserError` unless both arrays have the store's sizes, the encoder's dimension, and our types."""
        dim = self.identity.spec.dim
        expected: dict[str, tuple[Any, ...]] = {
            "features": ((rows, dim), (shard_rows, dim), (chunk_rows, dim), "float16", "nan"),
            "status": ((rows,), (shard_rows,), (chunk_rows,), "uint8", str(int(Status.PENDING))),
        }
        for name, array in self._arrays.items():
            shards = array.zarr.shards or array.zarr.chunks
            found = (array.zarr.shape, shards, array.zarr.chunks, array.zarr.dtype.name, str(array.zarr.fill_value))
            parts = ("shape", "shards", "chunks", "dtype", "fill value")
            for part, got, right in zip(parts, found, expected[name], strict=True):
                if got != right:
                    raise UserError(
                        f"{array.folder / 'zarr.json'} is damaged: got {part} {got}, expected {right}. Restore it or "
                        "make the store again."
                    )

    @staticmethod
    def create(folder: Path, rows: int, dim: int, shard_rows: int, chunk_rows: int) -> None:
        """Create the empty arrays of features and statuses, in this order."""
        ShardedArray.create(folder / "features", (rows, dim), shard_rows, chunk_rows, "float16", float("nan"))
        ShardedArray.create(folder / "status", (rows,), shard_rows, chunk_rows, "uint8", Status.PENDING)

    def name_dimensions(self) -> set[str]:
        """Give both arrays of a store of format 1 names of their dimensions; return the arrays' paths in the store."""
        for array in self._arrays.values():
            document = read_document(array.folder)
            write_document(array.folder, {**document, "dimension_names": list(DIMENSIONS[: len(document["shape"])])})
        return {f"{self.path}/{name}" for name in NAMES}

    @cached_property
    def markers(self) -> LazyMarkers:
        """Valid markers by shard, as they were on first use and as this object has written since."""
        return LazyMarkers(self.shards, self._read_marker, self._commits.readers)

    def _read_marker(self, shard: int) -> Marker | None:
        start, stop = self.span(shard)
        return self._commits.read(shard, (start, stop), -(-(stop - start) // self.chunk_rows))

    @property
    def content(self) -> list[Any]:
        """The part that a store's digest covers: the path, and the fields of each marker that both formats have."""
        markers = [[shard, {name: marker[name] for name in CONTENT}] for shard, marker in sorted(self.markers.items())]
        return [self.path, markers]

    @property
    def unwritten(self) -> list[int]:
        """Shards that have no marker, not even a damaged one."""
        return [shard for shard in self.shards if shard not in self.markers and not self._commits.file(shard).exists()]

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return len(self.markers) == len(self.shards)

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows by status label. Rows of uncommitted shards count as pending."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            start, stop = self.span(shard)
            pending = {Status.PENDING.label: stop - start}
            counts.update(self.markers.get(shard, {"counts": pending})["counts"])
        return counts

    @property
    def failed_counts(self) -> dict[str, int]:
        """Number of failed rows by status label."""
        failures = {status.label for status in FAILURES}
        return {label: count for label, count in sorted(self.counts.items()) if label in failures}

    def has_failures(self, shard: int) -> bool:
        """Return whether a shard is committed and has failed rows."""
        counts = self.markers[shard]["counts"] if shard in self.markers else {}
        return any(status.label in counts for status in FAILURES)

    def describe(self) -> str:
        """Return a line about the array: committed shards, dimension, and number of rows by status."""
        counts = ", ".join(f"{count:,} {label}" for label, count in sorted(self.counts.items()))
        return f"{self.path}: {len(self.markers)}/{len(self.shards)} shards, dim {self.dim}: {counts}"

    def to_dict(self) -> dict[str, Any]:
        """Return the facts that `describe` shows, ready for JSON."""
        shards = {"committed_shards": len(self.markers), "shards": len(self.shards)}
        spec = self.identity.spec
        about = {"path": self.path, "encoder": spec.id, "fingerprint": spec.fingerprint, "dim": self.dim}
        return {**about, **shards, "complete": self.complete, "rows_by_status": dict(sorted(self.counts.items()))}

    def span(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard and the row after its last."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def read(self, start: int = 0, stop: int | None = None) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Return features (n, dim) and status (n,) of rows start … stop − 1; NaN and pending if not committed.

        As in a slice, rows beyond the last one are left out. Whole chunks are read, so that they can be checked.

        Raises:
            UserError: A file is damaged.
        """
        stop = self.rows if stop is None else min(stop, self.rows)
        start = min(start, stop)
        size = self.chunk_rows
        first, last = start - start % size, min(-(-stop // size) * size, self.rows)
        features = self._features.read(first, last, self.markers)
        for at in range(first, last, size):
            self._check(at // size, features[at - first : at - first + size])
        return features[start - first : stop - first], self.read_status(start, stop)

    def read_status(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Return the status (n,) of rows start … stop − 1, without reading their features.

        Raises:
            UserError: A status file does not have the digest in its marker, which is compared before the first reading.
        """
        stop = self.rows if stop is None else min(stop, self.rows)
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            if shard in self.markers and shard not in self._compared:
                if self.changed(shard, ("status",)) or (self._format_1 and not self._has_counts(shard)):
                    raise self._damaged("status", shard)
                self._compared.add(shard)
        return self._status.read(start, stop, self.markers)

    def _check(self, chunk: int, features: NDArray[np.float16]) -> None:
        """Compare the features of a chunk with their checksum, unless that was done."""
        if not self.check or chunk in self._checked:
            return
        shard, inner = divmod(chunk, self.shard_rows // self.chunk_rows)
        sums = self.markers.get(shard, {}).get("crc32c")
        if sums and checksum(features) != sums[inner]:
            raise self._damaged("features", shard)
        self._checked.add(chunk)

    def check_again(self) -> None:
        """Compare all chunks with their checksums again on their next use."""
        self._checked.clear()

    def _damaged(self, name: str, shard: int) -> UserError:
        file = self._arrays[name].shard_file(shard)
        if self._read_marker(shard) != self.markers[shard]:
            return UserError(f"{file} is being written again by another process. Rerun this command when it has ended.")
        return damaged(file, "its content is not what was committed")

    @property
    def mapped(self) -> bool:
        """Whether features are read by mapping their files: uncompressed shards of a local store."""
        return self._features.mapped is not None

    def chunk(self, number: int) -> NDArray[np.float16]:
        """Return the features (n, dim) of a chunk, NaN if not committed: read-only, and a view if `mapped`.

        Raises:
            UserError: The shard's file is damaged.
        """
        features = self._unchecked_chunk(number)
        self._check(number, features)
        return features

    def _unchecked_chunk(self, number: int) -> NDArray[np.float16]:
        start, stop = number * self.chunk_rows, min((number + 1) * self.chunk_rows, self.rows)
        if start // self.shard_rows not in self.markers:
            return np.broadcast_to(np.float16(np.nan), (stop - start, self.dim))
        chunks = self._features.mapped
        return self._features.decode(start, stop) if chunks is None else chunks[number]

    def prefetch(self, chunks: list[int]) -> None:
        """Make the system read these chunks, in rising order, in the background. Does nothing unless `mapped`."""
        if self._features.mapped:
            per_shard = self.shard_rows // self.chunk_rows
            self._features.mapped.prefetch([chunk for chunk in chunks if chunk // per_shard in self.markers])

    def refresh(self, shard: int) -> bool:
        """Look for a marker that another process may have written since. Returns whether the shard is committed."""
        return self.markers.look_again(shard)

    def write(
        self, shard: int, features: NDArray[np.float16], status: NDArray[np.uint8], lease: Lease | None = None
    ) -> int:
        """Write one whole shard, then its marker.

        Args:
            shard: Number of the shard.
            features: Features of its rows, (n, dim).
            status: Status of its rows, (n,).
            lease: Confirmed before each file and the marker appear, and at the end. Needed if other processes may write
                the shard.

        Returns:
            The number of bytes of the two files.

        Raises:
            ValueError: The arrays do not have the shard's size, or a status is unknown.
            LeaseLostError: Another process writes the shard now.
            UserError: The store has format 1.
        """
        if self._format_1:
            raise format_1(self._store)
        start, stop = self.span(shard)
        if features.shape != (stop - start, self.dim) or status.shape != (stop - start,):
            raise ValueError(f"shard {shard} has shape {(stop - start, self.dim)}, not {features.shape}")
        if status.max() not in set(Status):
            raise ValueError(f"shard {shard} has the unknown status {status.max()}")
        values: dict[str, NDArray[Any]] = {"features": features, "status": status}
        contents = {name: array.shard_content(start, values[name]) for name, array in self._arrays.items()}
        digests = {
            name: None if content is None else hashlib.sha256(content).hexdigest() for name, content in contents.items()
        }
        confirm = lease.confirm if lease else lambda: None
        confirm()
        self.discard(shard)
        try:
            for name, array in self._arrays.items():
                write_atomically(array.shard_file(shard), contents[name], below=self._store, confirm=confirm)
            confirm()
            self._commit(shard, features, status, digests)
            confirm()
        except LeaseLostError:
            self._discard_mixed(shard)
            raise
        return sum(len(content) for content in contents.values() if content)

    def _discard_mixed(self, shard: int) -> None:
        """Remove a shard's marker if its files are others, as a process may write that slept while it lost its lease.

        A GPU may encode the same rows to other bits, so the files of two processes do not mix.
        """
        self.markers.pop(shard, None)
        if self.refresh(shard) and self.changed(shard):
            self.discard(shard)

    def _commit(
        self, shard: int, features: NDArray[np.float16], status: NDArray[np.uint8], digests: dict[str, str | None]
    ) -> None:
        starts = range(0, len(features), self.chunk_rows)
        sums = [checksum(features[at : at + self.chunk_rows]) for at in starts]
        content = {"counts": _count(status), "sha256": digests, "crc32c": sums}
        self.markers[shard] = self._commits.write(shard, self.span(shard), content)

    def upgrade(self, shard: int) -> None:
        """Give a committed shard of format 1 a marker of the present format. Raises `UserError` if it is damaged."""
        if "digest" in self.markers[shard]:
            return
        if changed := self.changed(shard):
            raise self._damaged(changed, shard)
        start, stop = self.span(shard)
        self._commit(shard, *self.read(start, stop), self.markers[shard]["sha256"])

    def discard(self, shard: int) -> None:
        """Remove a shard's marker, so that the next extraction writes the shard again."""
        self._commits.discard(shard)
        self.markers.pop(shard, None)
        self._compared.discard(shard)
        per_shard = self.shard_rows // self.chunk_rows
        self._checked.difference_update(range(shard * per_shard, (shard + 1) * per_shard))
        for array in self._arrays.values():
            if array.mapped:
                array.mapped.forget(shard)

    def changed(self, shard: int, names: Sequence[str] = NAMES) -> str | None:
        """Return which of a committed shard's files, of these names, is not what its marker says, or None."""
        marker = self.markers[shard]
        for name in names:
            if file_digest(self._arrays[name].shard_file(shard)) != marker["sha256"][name]:
                return name
        return None

    def contradicted(self, shard: int) -> str | None:
        """Return which of a committed shard's files, with the digest in its marker, contradicts the rest of it."""
        marker = self.markers[shard]
        first = self.span(shard)[0] // self.chunk_rows
        sums = enumerate(marker.get("crc32c", ()), first)
        if any(checksum(self._unchecked_chunk(chunk)) != each for chunk, each in sums):
            return "features"
        return None if self._has_counts(shard) else "status"

    def _has_counts(self, shard: int) -> bool:
        found = _count(self._status.read(*self.span(shard), self.markers))
        return bool(found == self.markers[shard]["counts"])

    def _has_file(self, name: str, shard: int) -> bool:
        return self.markers[shard]["sha256"][name] is not None


def checksum(features: NDArray[np.float16]) -> int:
    """Return the CRC-32C of features (n, dim). Rows that are all NaN count as fill values, as which they are stored."""
    if np.isnan(features.flat[0]) and np.isnan(features).all():
        features = np.full_like(features, np.nan)
    return int(google_crc32c.value(np.ascontiguousarray(features, "<f2").view(np.uint8)))


def _count(status: NDArray[np.uint8]) -> dict[str, int]:
    """Return the number of rows by status label; rows with an unknown status are in none."""
    counts = np.bincount(status, minlength=len(Status)).tolist()
    return {status.label: counts[status] for status in Status if counts[status]}


def format_1(store: Path) -> UserError:
    """Return the error of an attempt to add to a store of format 1."""
    return UserError(
        f"{store} was made by an earlier version and has format 1, which is only read. Convert it with "
        f"`{command('sail-extract', 'upgrade', store)}` and rerun this command."
    )
