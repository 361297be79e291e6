"""One array of a store: features and statuses in shards, each written once, whole, and committed by a marker."""

import hashlib
import json
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sail_align.extract.data import Status
from sail_align.extract.encoders.base import Identity
from sail_align.extract.errors import UserError
from sail_align.extract.store.mapped import MappedChunks, can_map
from sail_align.extract.system.files import (
    broken,
    canonical_json,
    file_digest,
    is_remote,
    remove_leftovers,
    write_atomically,
)
from sail_align.extract.system.leases import Lease

if TYPE_CHECKING:
    import zarr
from importlib.util import find_spec

import zarr
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import FsspecStore, MemoryStore


def array_metadata(
    shape: tuple[int, ...], shards: tuple[int, ...], chunks: tuple[int, ...], dtype: str, fill_value: float
) -> bytes:
    """Return the zarr.json of an empty array: raw, uncompressed, little-endian, so that a local reader can map it."""
    memory: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(memory),
        shape=shape,
        shards=shards,
        chunks=chunks,
        dtype=dtype,
        fill_value=fill_value,
        compressors=None,
        filters=None,
    )
    return memory["zarr.json"].to_bytes()


def open_array(folder: Path) -> "zarr.Array[Any]":
    """Open an array for reading: a local one is decoded by zarrs, which is quicker, where that is installed.

    Raises:
        UserError: Its zarr.json is not there, or cannot be read.
    """
    try:
        if is_remote(folder):
            options = dict(getattr(folder, "storage_options", {}))
            return zarr.open_array(FsspecStore.from_url(str(folder), storage_options=options, read_only=True), mode="r")
        pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"} if find_spec("zarrs") else {}
        with zarr.config.set(pipeline):
            return zarr.open_array(folder, mode="r")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise broken(folder / "zarr.json", problem) from problem


def shard_bytes(array: "zarr.Array[Any]", rows: slice, values: NDArray[Any]) -> memoryview | None:
    """Return the file of one shard as zarr would write it; None where it would leave out one of fill values only.

    zarr's own writing would merge with a file that is there, and leave temporary files of random names when killed.
    """
    memory: dict[str, Buffer] = array.metadata.to_buffer_dict(default_buffer_prototype())
    zarr.open_array(MemoryStore(memory), mode="r+")[rows] = values
    shards = [buffer for name, buffer in memory.items() if name != "zarr.json"]
    return shards[0].as_numpy_array().data if shards else None


class FeatureArray:
    """The features of one encoder for the images or one caption of a store: (rows, dim) float16, and a status a row."""

    def __init__(self, store: Path, path: str, identity: Identity):
        self.path = path
        self.identity = identity
        self._store = store
        self._folder = store / path
        self._commits = store / "commits" / path
        self._features = open_array(self._folder / "features")
        self._status = open_array(self._folder / "status")
        self.rows, self.dim = self._features.shape
        self.shard_rows, _ = self._features.shards or self._features.chunks
        self.chunk_rows, _ = self._features.chunks
        self.shards = range(-(-self.rows // self.shard_rows))
        self._mapped: dict[str, MappedChunks] = {}
        for name, array in (("features", self._features), ("status", self._status)):
            if not is_remote(store) and can_map(array):
                self._mapped[name] = MappedChunks(array, partial(self._written_file, name))

    @staticmethod
    def create(folder: Path, rows: int, dim: int, shard_rows: int, chunk_rows: int) -> None:
        """Lay out empty arrays, of features and of statuses."""
        kinds: list[tuple[str, tuple[int, ...], str, float]] = [
            ("features", (dim,), "float16", float("nan")),
            ("status", (), "uint8", Status.PENDING),
        ]
        for name, width, dtype, fill_value in kinds:
            content = array_metadata((rows, *width), (shard_rows, *width), (chunk_rows, *width), dtype, fill_value)
            write_atomically(folder / name / "zarr.json", content)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether `create` has been there, to its end."""
        return (folder / "status" / "zarr.json").exists()

    @cached_property
    def markers(self) -> dict[int, dict[str, Any]]:
        """The valid markers by shard, as they were when first asked for and as written since by this object."""
        found = {}
        for shard in self.shards:
            if marker := self._read_marker(shard):
                found[shard] = marker
        return found

    def _read_marker(self, shard: int) -> dict[str, Any] | None:
        """Return a shard's marker, None if there is none or it is not valid. Raises `UserError` if unreadable."""
        path = self._marker_path(shard)
        start, stop = self.span(shard)
        try:
            marker: Any = json.loads(path.read_bytes())
            valid = (
                marker.keys() == {"fingerprint", "rows", "counts", "sha256"}
                and marker["fingerprint"] == self.identity.spec.fingerprint
                and marker["rows"] == [start, stop]
                and sum(marker["counts"].values()) == stop - start
                and marker["sha256"].keys() == {"features", "status"}
            )
        except (FileNotFoundError, ValueError, TypeError, AttributeError):  # the latter three: of another form
            return None
        except OSError as problem:
            raise broken(path, problem) from problem
        return marker if valid else None

    @property
    def unwritten(self) -> list[int]:
        """The shards that have no marker, not even a damaged one."""
        return [shard for shard in self.shards if shard not in self.markers and not self._marker_path(shard).exists()]

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return len(self.markers) == len(self.shards)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status label, rows of uncommitted shards as pending."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            start, stop = self.span(shard)
            pending = {Status.PENDING.label: stop - start}
            for label, count in self.markers.get(shard, {"counts": pending})["counts"].items():
                counts[label] = counts.get(label, 0) + count
        return counts

    @property
    def failed(self) -> int:
        """How many rows were tried and could not be encoded."""
        return sum(
            count for label, count in self.counts.items() if label not in (Status.OK.label, Status.PENDING.label)
        )

    def span(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard and the row behind its last."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def read(self, start: int = 0, stop: int | None = None) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Return features (n, dim) and status (n,) of rows start … stop − 1; NaN and pending where not committed."""
        stop = self.rows if stop is None else stop
        return self._read("features", self._features, start, stop), self.read_status(start, stop)

    def read_status(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Return the status (n,) of rows start … stop − 1, without reading their features."""
        return self._read("status", self._status, start, self.rows if stop is None else stop)

    def _read(self, name: str, array: "zarr.Array[Any]", start: int, stop: int) -> NDArray[Any]:
        """Return rows start … stop − 1 of an array, the fill value where not committed."""
        rows = np.full((stop - start, *array.shape[1:]), array.fill_value, array.dtype)
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            first, last = max(start, shard * self.shard_rows), min(stop, (shard + 1) * self.shard_rows)
            if shard in self.markers and first < last:
                read = self._mapped[name].rows if name in self._mapped else partial(self._decoded, name, array)
                rows[first - start : last - start] = read(first, last)
        return rows

    @property
    def mapped(self) -> bool:
        """Whether features are read by mapping their files: raw shards of a local store."""
        return "features" in self._mapped

    def chunk(self, number: int) -> NDArray[np.float16]:
        """Return the features (n, dim) of chunk `number`, NaN where not committed: read-only, and a view if `mapped`.

        Raises:
            UserError: The shard's file is damaged.
        """
        start, stop = number * self.chunk_rows, min((number + 1) * self.chunk_rows, self.rows)
        if start // self.shard_rows not in self.markers:
            return np.broadcast_to(np.float16(np.nan), (stop - start, self.dim))
        if self.mapped:
            return self._mapped["features"][number]
        return self._decoded("features", self._features, start, stop)

    def _decoded(self, name: str, array: "zarr.Array[Any]", start: int, stop: int) -> NDArray[Any]:
        """Return rows start … stop − 1 of one committed shard, decoded. Raises `UserError` if its file is damaged."""
        file = self._written_file(name, start // self.shard_rows)
        if file is None:
            return np.full((stop - start, *array.shape[1:]), array.fill_value, array.dtype)
        try:
            rows = np.asarray(array[start:stop])
            is_fill = np.array_equal(rows.flat[:1], [array.fill_value], equal_nan=True)
            if is_fill and file.stat().st_size == 0:  # zarr reads fill values of it, as of one that is not there
                raise EOFError
        except (OSError, EOFError, ValueError, RuntimeError) as problem:  # the latter two: of decoders
            raise broken(file, problem) from problem
        return rows

    def expect(self, chunks: list[int]) -> None:
        """Have the system read these chunks, in rising order, while something else is done; nothing if not `mapped`."""
        if self.mapped:
            per_shard = self.shard_rows // self.chunk_rows
            self._mapped["features"].expect([chunk for chunk in chunks if chunk // per_shard in self.markers])

    def refresh(self, shard: int) -> bool:
        """Look again for a shard's marker, which another process may have written; return whether it is there."""
        if shard not in self.markers and (marker := self._read_marker(shard)):
            self.markers[shard] = marker
        return shard in self.markers

    def write(
        self, shard: int, features: NDArray[np.float16], status: NDArray[np.uint8], lease: Lease | None = None
    ) -> int:
        """Write one shard whole, then its marker; return the number of bytes.

        Where several processes may write the shard, `lease` is confirmed before the first file and before the marker.

        Raises:
            ValueError: The arrays are not the shard's size.
            LeaseLostError: Another process writes the shard now.
        """
        start, stop = self.span(shard)
        if features.shape != (stop - start, self.dim) or status.shape != (stop - start,):
            raise ValueError(f"shard {shard} has shape {(stop - start, self.dim)}, not {features.shape}")
        contents = {
            "features": shard_bytes(self._features, slice(start, stop), features),
            "status": shard_bytes(self._status, slice(start, stop), status),
        }
        values, counts = np.unique(status, return_counts=True)
        marker = {
            "fingerprint": self.identity.spec.fingerprint,
            "rows": [start, stop],
            "counts": {Status(value).label: int(count) for value, count in zip(values, counts, strict=True)},
            "sha256": {name: _digest(content) for name, content in contents.items()},
        }
        confirm = lease.confirm if lease else lambda: None
        confirm()
        self.discard(shard)
        for name, file in self._shard_files(shard).items():
            _replace(file, contents[name], self._store)
        confirm()
        write_atomically(self._marker_path(shard), canonical_json(marker), below=self._store)
        self.markers[shard] = marker
        return sum(len(content) for content in contents.values() if content)

    def discard(self, shard: int) -> None:
        """Take a shard's marker away, so that the next extraction writes the shard again."""
        self._marker_path(shard).unlink(missing_ok=True)
        self.markers.pop(shard, None)
        for chunks in self._mapped.values():
            chunks.forget(shard)

    def changed(self, shard: int) -> str | None:
        """Recompute a committed shard's hashes; return what differs from its marker: features or status."""
        expected = self.markers[shard]["sha256"]
        return next((name for name, digest in self._hashes(shard).items() if digest != expected[name]), None)

    def _hashes(self, shard: int) -> dict[str, str | None]:
        return {name: file_digest(file) for name, file in self._shard_files(shard).items()}

    def _shard_files(self, shard: int) -> dict[str, Path]:
        return {name: self._shard_file(name, shard) for name in ("features", "status")}

    def _shard_file(self, name: str, shard: int) -> Path:
        return self._folder / name / (f"c/{shard}/0" if name == "features" else f"c/{shard}")

    def _written_file(self, name: str, shard: int) -> Path | None:
        """Return where a committed shard is, None if it has fill values only."""
        return self._shard_file(name, shard) if self.markers[shard]["sha256"][name] else None

    def _marker_path(self, shard: int) -> Path:
        return self._commits / f"{shard:05d}.json"


def read_identity(node: Path) -> Identity:
    """Return the encoder of an array's node. Raises `UserError` if the node is damaged."""
    path = node / "zarr.json"
    try:
        attributes = json.loads(path.read_bytes())["attributes"]
        identity = Identity.from_json(attributes)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise broken(path, problem) from problem
    if identity.spec.fingerprint != attributes["fingerprint"]:
        raise UserError(
            f"{path} is damaged: its fingerprint is another encoder's; restore it, or make the store again."
        )
    return identity


def _digest(content: memoryview | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _replace(file: Path, content: memoryview | None, store: Path) -> None:
    if content is None:
        file.unlink(missing_ok=True)
        remove_leftovers(file)
    else:
        write_atomically(file, content, below=store)
