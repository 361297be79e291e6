"""One zarr array in shards, each with a file of its own."""

import json
from collections.abc import Callable, Container
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import FsspecStore, MemoryStore

from sail_align.extract.store.hierarchy import FILE, write_document
from sail_align.extract.store.mapped import MappedChunks
from sail_align.extract.system.files import is_remote, report_read_errors, require_regular

DIMENSIONS = ("row", "feature")


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
        with report_read_errors(folder / FILE):
            require_regular(folder / FILE)
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
            dimension_names=DIMENSIONS[: len(shape)],
        )
        write_document(folder, json.loads(memory["zarr.json"].to_bytes()))

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
            require_regular(file)
            rows = np.asarray(self.zarr[start:stop])
            is_fill = np.array_equal(rows.flat[:1], [self.zarr.fill_value], equal_nan=True)
            if is_fill and file.stat().st_size == 0:  # zarr reads an empty or missing file as fill values
                raise EOFError
        return rows

    def _written_file(self, shard: int) -> Path | None:
        return self.shard_file(shard) if self._has_file(shard) else None
