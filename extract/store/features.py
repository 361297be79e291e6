"""One array of a store: features and statuses in shards, each written whole, once, and committed by a marker."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import FsspecStore, MemoryStore

from sail_align.extract.data import FAILURES, Status
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.errors import UserError
from sail_align.extract.store.mapped import MappedChunks, damaged
from sail_align.extract.system.files import canonical_json, file_digest, is_remote, report_read_errors, write_atomically
from sail_align.extract.system.leases import Lease

NAMES = ("features", "status")
"""The two zarr arrays of a `FeatureArray`."""


class ShardedArray:
    """A zarr array in shards. Uncompressed local shards are read by mapping them, others through zarr.

    Args:
        folder: The array's folder.
        has_file: Function that tells whether a committed shard has a file. One of fill values only has none.

    Raises:
        UserError: The array's zarr.json is missing or cannot be read.
    """

    def __init__(self, folder: Path, has_file: Callable[[int], bool]):
        self.folder = folder
        self._has_file = has_file
        with report_read_errors(folder / "zarr.json"):
            self.zarr = self._open()
        self.width = self.zarr.shape[1:]
        self.shard_rows = (self.zarr.shards or self.zarr.chunks)[0]
        self.chunk_rows = self.zarr.chunks[0]
        can_map = not is_remote(folder) and MappedChunks.supports(self.zarr)
        self.mapped = MappedChunks(self.zarr, self._written_file) if can_map else None

    def _open(self) -> "zarr.Array[Any]":
        if is_remote(self.folder):
            options = dict(getattr(self.folder, "storage_options", {}))
            store = FsspecStore.from_url(str(self.folder), storage_options=options, read_only=True)
            return zarr.open_array(store, mode="r")
        pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"} if find_spec("zarrs") else {}  # decodes faster
        with zarr.config.set(pipeline):
            return zarr.open_array(self.folder, mode="r")

    @staticmethod
    def create(
        folder: Path, shape: tuple[int, ...], shard_rows: int, chunk_rows: int, dtype: str, fill_value: float
    ) -> None:
        """Write the zarr.json of an empty array: uncompressed and little-endian, so that shards can be mapped."""
        memory: dict[str, Buffer] = {}
        zarr.create_array(
            MemoryStore(memory),
            shape=shape,
            shards=(shard_rows, *shape[1:]),
            chunks=(chunk_rows, *shape[1:]),
            dtype=dtype,
            fill_value=fill_value,
            compressors=None,
            filters=None,
        )
        write_atomically(folder / "zarr.json", memory["zarr.json"].to_bytes())

    def shard_file(self, shard: int) -> Path:
        """Return where a shard's file is, or would be."""
        return self.folder / "c" / "/".join([str(shard), *("0" for _ in self.width)])

    def shard_content(self, start: int, values: NDArray[Any]) -> memoryview | None:
        """Return the bytes of the shard from row `start`, None if it has fill values only and so no file.

        Writing through zarr itself would merge with an existing file, and leave temporary files when killed.
        """
        memory: dict[str, Buffer] = self.zarr.metadata.to_buffer_dict(default_buffer_prototype())
        zarr.open_array(MemoryStore(memory), mode="r+")[start : start + len(values)] = values
        shards = [buffer for name, buffer in memory.items() if name != "zarr.json"]
        return shards[0].as_numpy_array().data if shards else None

    def read(self, start: int, stop: int, committed: Container[int]) -> NDArray[Any]:
        """Return rows start … stop − 1, the fill value in shards that are not committed."""
        rows = np.full((stop - start, *self.width), self.zarr.fill_value, self.zarr.dtype)
        read = self.mapped.rows if self.mapped else self.decode
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            first, last = max(start, shard * self.shard_rows), min(stop, (shard + 1) * self.shard_rows)
            if shard in committed and first < last:
                rows[first - start : last - start] = read(first, last)
        return rows

    def decode(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows start … stop − 1 of one committed shard. Raises `UserError` if its file is damaged."""
        file = self._written_file(start // self.shard_rows)
        if file is None:
            return np.full((stop - start, *self.width), self.zarr.fill_value, self.zarr.dtype)
        with report_read_errors(file):
            rows = np.asarray(self.zarr[start:stop])
            is_fill = np.array_equal(rows.flat[:1], [self.zarr.fill_value], equal_nan=True)
            if is_fill and file.stat().st_size == 0:  # zarr reads an empty or missing file as fill values
                raise EOFError
        return rows

    def _written_file(self, shard: int) -> Path | None:
        return self.shard_file(shard) if self._has_file(shard) else None


class FeatureArray:
    """The features of one encoder for the images or one caption of a store: (rows, dim) float16, and a status per row.

    Args:
        store: The store's folder.
        path: The array's path in the store.
        identity: The encoder that made the features.
    """

    def __init__(self, store: Path, path: str, identity: Identity):
        self.path = path
        self.identity = identity
        self._store = store
        self._commits = store / "commits" / path
        self._arrays = {name: ShardedArray(store / path / name, partial(self._has_file, name)) for name in NAMES}
        self._features, self._status = self._arrays.values()
        self.rows, self.dim = self._features.zarr.shape
        self.shard_rows, self.chunk_rows = self._features.shard_rows, self._features.chunk_rows
        self.shards = range(-(-self.rows // self.shard_rows))
        self._compared: set[int] = set()
        """Shards whose statuses are known to be those that were committed."""

    def require_layout(self, rows: int, shard_rows: int) -> None:
        """Raise `UserError` unless both arrays have the store's sizes, the encoder's dimension, and our types."""
        dim = self.identity.spec.dim
        expected: dict[str, tuple[Any, ...]] = {
            "features": ((rows, dim), (shard_rows, dim), "float16", "nan"),
            "status": ((rows,), (shard_rows,), "uint8", str(int(Status.PENDING))),
        }
        for name, array in self._arrays.items():
            shards = array.zarr.shards or array.zarr.chunks
            found = (array.zarr.shape, shards, array.zarr.dtype.name, str(array.zarr.fill_value))
            for part, got, right in zip(("shape", "shards", "dtype", "fill value"), found, expected[name], strict=True):
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

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether `create` has finished in a folder."""
        return (folder / "status" / "zarr.json").exists()

    @cached_property
    def markers(self) -> dict[int, dict[str, Any]]:
        """Valid markers by shard, as they were on first use and as this object has written since."""
        return {shard: marker for shard in self.shards if (marker := self._read_marker(shard))}

    def _read_marker(self, shard: int) -> dict[str, Any] | None:
        """Return a shard's marker, None if it is missing or not valid. Raises `UserError` if it cannot be read."""
        path = self._marker_path(shard)
        start, stop = self.span(shard)
        with report_read_errors(path):
            try:
                marker: Any = json.loads(path.read_bytes())
                valid = (
                    marker.keys() == {"fingerprint", "rows", "counts", "sha256"}
                    and marker["fingerprint"] == self.identity.spec.fingerprint
                    and marker["rows"] == [start, stop]
                    and sum(marker["counts"].values()) == stop - start
                    and marker["sha256"].keys() == set(NAMES)
                )
            except (FileNotFoundError, ValueError, TypeError, AttributeError):  # the last three: unexpected content
                return None
        return marker if valid else None

    @property
    def unwritten(self) -> list[int]:
        """Shards that have no marker, not even a damaged one."""
        return [shard for shard in self.shards if shard not in self.markers and not self._marker_path(shard).exists()]

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

    def span(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard and the row after its last."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def read(self, start: int = 0, stop: int | None = None) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Return features (n, dim) and status (n,) of rows start … stop − 1; NaN and pending if not committed.

        As in a slice, rows beyond the last one are left out.
        """
        stop = self.rows if stop is None else min(stop, self.rows)
        return self._features.read(start, stop, self.markers), self.read_status(start, stop)

    def read_status(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Return the status (n,) of rows start … stop − 1, without reading their features.

        Raises:
            UserError: A status file does not have the digest in its marker, which is compared before the first reading.
        """
        stop = self.rows if stop is None else min(stop, self.rows)
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            if shard in self.markers and shard not in self._compared:
                self._compare_status(shard)
                self._compared.add(shard)
        return self._status.read(start, stop, self.markers)

    def _compare_status(self, shard: int) -> None:
        if self.changed(shard, ("status",)):
            file = self._status.shard_file(shard)
            if self._read_marker(shard) != self.markers[shard]:
                raise UserError(
                    f"{file} is being written again by another process. Rerun this command when it has ended."
                )
            raise damaged(file, "its content is not what was committed")

    @property
    def mapped(self) -> bool:
        """Whether features are read by mapping their files: uncompressed shards of a local store."""
        return self._features.mapped is not None

    def chunk(self, number: int) -> NDArray[np.float16]:
        """Return the features (n, dim) of a chunk, NaN if not committed: read-only, and a view if `mapped`.

        Raises:
            UserError: The shard's file is damaged.
        """
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
        if shard not in self.markers and (marker := self._read_marker(shard)):
            self.markers[shard] = marker
        return shard in self.markers

    def write(
        self, shard: int, features: NDArray[np.float16], status: NDArray[np.uint8], lease: Lease | None = None
    ) -> int:
        """Write one whole shard, then its marker.

        Args:
            shard: Number of the shard.
            features: Features of its rows, (n, dim).
            status: Status of its rows, (n,).
            lease: Confirmed before the first file and before the marker; needed if other processes may write the shard.

        Returns:
            The number of bytes of the two files.

        Raises:
            ValueError: The arrays do not have the shard's size.
            LeaseLostError: Another process writes the shard now.
        """
        start, stop = self.span(shard)
        if features.shape != (stop - start, self.dim) or status.shape != (stop - start,):
            raise ValueError(f"shard {shard} has shape {(stop - start, self.dim)}, not {features.shape}")
        values: dict[str, NDArray[Any]] = {"features": features, "status": status}
        contents = {name: array.shard_content(start, values[name]) for name, array in self._arrays.items()}
        codes, counts = np.unique(status, return_counts=True)
        marker = {
            "fingerprint": self.identity.spec.fingerprint,
            "rows": [start, stop],
            "counts": {Status(code).label: int(count) for code, count in zip(codes, counts, strict=True)},
            "sha256": {
                name: None if content is None else hashlib.sha256(content).hexdigest()
                for name, content in contents.items()
            },
        }
        confirm = lease.confirm if lease else lambda: None
        confirm()
        self.discard(shard)
        for name, array in self._arrays.items():
            write_atomically(array.shard_file(shard), contents[name], below=self._store)
        confirm()
        write_atomically(self._marker_path(shard), canonical_json(marker), below=self._store)
        self.markers[shard] = marker
        return sum(len(content) for content in contents.values() if content)

    def discard(self, shard: int) -> None:
        """Remove a shard's marker, so that the next extraction writes the shard again."""
        self._marker_path(shard).unlink(missing_ok=True)
        self.markers.pop(shard, None)
        self._compared.discard(shard)
        for array in self._arrays.values():
            if array.mapped:
                array.mapped.forget(shard)

    def changed(self, shard: int, names: Sequence[str] = NAMES) -> str | None:
        """Return which of a committed shard's files, of these names, no longer has the digest in its marker."""
        expected = self.markers[shard]["sha256"]
        digests = ((name, file_digest(self._arrays[name].shard_file(shard))) for name in names)
        return next((name for name, digest in digests if digest != expected[name]), None)

    def _has_file(self, name: str, shard: int) -> bool:
        return self.markers[shard]["sha256"][name] is not None

    def _marker_path(self, shard: int) -> Path:
        return self._commits / f"{shard:05d}.json"
