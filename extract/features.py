"""One array of a store: features and statuses in shards, each written once, whole, and committed by a marker."""

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from sail_align.extract.encoders.base import Identity
from sail_align.extract.files import canonical_json, file_digest, write_atomically
from sail_align.extract.status import Status


class FeatureArray:
    """The features of one encoder for the images or one caption of a store: (rows, dim) float16, and a status a row."""

    def __init__(self, store: Path, path: str, identity: Identity):
        self.path = path
        self.identity = identity
        self._folder = store / path
        self._commits = store / "commits" / path
        self._features = zarr.open_array(self._folder / "features", mode="r+")
        self._status = zarr.open_array(self._folder / "status", mode="r+")
        self.rows, self.dim = self._features.shape
        self.shard_rows, _ = self._features.shards or self._features.chunks
        self.chunk_rows, _ = self._features.chunks
        self.shards = range(-(-self.rows // self.shard_rows))

    @staticmethod
    def create(folder: Path, rows: int, dim: int, shard_rows: int, chunk_rows: int) -> None:
        """Lay out an empty array: raw, uncompressed, little-endian, so that a local reader can map it."""
        kinds: list[tuple[str, tuple[int, ...], str, float]] = [
            ("features", (dim,), "float16", float("nan")),
            ("status", (), "uint8", Status.PENDING),
        ]
        for name, width, dtype, fill_value in kinds:
            zarr.create_array(
                folder / name,
                shape=(rows, *width),
                shards=(shard_rows, *width),
                chunks=(chunk_rows, *width),
                dtype=dtype,
                fill_value=fill_value,
                compressors=None,
                filters=None,
                overwrite=True,
            )

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether `create` has been there, to its end."""
        return (folder / "status" / "zarr.json").exists()

    @cached_property
    def markers(self) -> dict[int, dict[str, Any]]:
        """The valid markers by shard, as they were when first asked for and as written since by this object."""
        found = {}
        for shard in self.shards:
            try:
                marker = json.loads(self._marker_path(shard).read_bytes())
            except (FileNotFoundError, ValueError):
                continue
            if self._is_valid(shard, marker):
                found[shard] = marker
        return found

    def _is_valid(self, shard: int, marker: Any) -> bool:
        start, stop = self.span(shard)
        return (
            isinstance(marker, dict)
            and marker.keys() == {"fingerprint", "rows", "counts", "sha256"}
            and marker["fingerprint"] == self.identity.spec.fingerprint
            and marker["rows"] == [start, stop]
            and sum(marker["counts"].values()) == stop - start
        )

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

    def span(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard and the row behind its last."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def read(self, start: int = 0, stop: int | None = None) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Return features (n, dim) and status (n,) of rows start … stop − 1; NaN and pending where not committed."""
        stop = self.rows if stop is None else stop
        features = np.asarray(self._features[start:stop])
        for rows in self._uncommitted(start, stop):
            features[rows] = np.nan
        return features, self.read_status(start, stop)

    def read_status(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Return the status (n,) of rows start … stop − 1, without reading their features."""
        stop = self.rows if stop is None else stop
        status = np.asarray(self._status[start:stop])
        for rows in self._uncommitted(start, stop):
            status[rows] = Status.PENDING
        return status

    def _uncommitted(self, start: int, stop: int) -> Iterator[slice]:
        """Yield the stretches of rows start … stop − 1, counted from start, whose shards have no valid marker."""
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            if shard not in self.markers:
                first, last = self.span(shard)
                yield slice(max(first - start, 0), last - start)

    def write(self, shard: int, features: NDArray[np.float16], status: NDArray[np.uint8]) -> None:
        """Write one shard whole, then its marker. Raises `ValueError` unless the arrays are the shard's size."""
        start, stop = self.span(shard)
        if features.shape != (stop - start, self.dim) or status.shape != (stop - start,):
            raise ValueError(f"shard {shard} has shape {(stop - start, self.dim)}, not {features.shape}")
        self.discard(shard)
        values, counts = np.unique(status, return_counts=True)
        for file in self._shard_files(shard).values():
            # What a killed writer left behind goes first: zarr would merge with a shard file that is there, and its
            # temporary files have random names.
            for leftover in (file, *file.parent.glob(f"{file.name}.*.partial")):
                leftover.unlink(missing_ok=True)
        self._features[start:stop] = features
        self._status[start:stop] = status
        for file in self._shard_files(shard).values():
            if file.exists():  # zarr leaves a shard of nothing but fill values out
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        marker = {
            "fingerprint": self.identity.spec.fingerprint,
            "rows": [start, stop],
            "counts": {Status(value).label: int(count) for value, count in zip(values, counts, strict=True)},
            "sha256": self._hashes(shard),
        }
        write_atomically(self._marker_path(shard), canonical_json(marker))
        self.markers[shard] = marker

    def discard(self, shard: int) -> None:
        """Take a shard's marker away, so that the next extraction writes the shard again."""
        self._marker_path(shard).unlink(missing_ok=True)
        self.markers.pop(shard, None)

    def changed(self, shard: int) -> str | None:
        """Recompute a committed shard's hashes; return what differs from its marker: features or status."""
        expected = self.markers[shard]["sha256"]
        return next((name for name, digest in self._hashes(shard).items() if digest != expected[name]), None)

    def _hashes(self, shard: int) -> dict[str, str | None]:
        return {name: file_digest(file) for name, file in self._shard_files(shard).items()}

    def _shard_files(self, shard: int) -> dict[str, Path]:
        return {"features": self._folder / f"features/c/{shard}/0", "status": self._folder / f"status/c/{shard}"}

    def _marker_path(self, shard: int) -> Path:
        return self._commits / f"{shard:05d}.json"
