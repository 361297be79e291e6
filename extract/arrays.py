"""The zarr arrays of a store as files: what describes one, opening it, and the bytes of its shards."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import FsspecStore, MemoryStore

from sail_align.extract.files import broken, is_remote


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
