"""Uncompressed shards of local files, mapped into memory: a chunk is a view of the file, and nothing is copied.

A shard of zarr's sharding codec holds its inner chunks one after another, followed by an index: for each chunk its
offset and its length in bytes (two little-endian uint64, both 2⁶⁴ − 1 if the chunk is all fill value and absent), then
the CRC32C of these. Source: the zarr v3 specification of `sharding_indexed`.
"""

import os
import struct
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.metadata import ArrayV3Metadata

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import report_read_errors, require_regular

ABSENT = -1
READ_AHEAD = 1 << 17
"""Bytes per request. The kernel shortens longer requests to the device's read-ahead; 128 kB is its usual minimum."""


class _Shard(NamedTuple):
    path: Path
    content: NDArray[np.uint8]
    offsets: list[int]


class MappedChunks:
    """The inner chunks of one array. A shard is mapped when one of its chunks is first used.

    No file stays open: a store of many millions of rows has more shards than a process may open files.

    Args:
        array: An array that `supports` accepts.
        file_of: Function that returns a shard's file, None if the shard holds fill values only.
    """

    def __init__(self, array: "zarr.Array[Any]", file_of: Callable[[int], Path | None]):
        self._shape = (array.chunks[0], *array.shape[1:])
        self._rows = array.shape[0]
        self._dtype = array.dtype
        self._fill: NDArray[Any] = np.full(1, array.fill_value, array.dtype)
        self._per_shard = (array.shards or array.chunks)[0] // array.chunks[0]
        self._bytes = int(np.prod(self._shape)) * array.dtype.itemsize
        self._file_of = file_of
        self._shards: dict[int, _Shard | None] = {}

    @staticmethod
    def supports(array: "zarr.Array[Any]") -> bool:
        """Return whether an array's chunks are stored as they are in memory, each with whole rows."""
        metadata = array.metadata
        if not isinstance(metadata, ArrayV3Metadata) or len(metadata.codecs) != 1:
            return False
        (codec,) = metadata.codecs
        return (
            isinstance(codec, ShardingCodec)
            and getattr(codec.index_location, "value", codec.index_location) == "end"  # an enum before zarr 3.4
            and codec.index_codecs == (BytesCodec(endian="little"), Crc32cCodec())
            and codec.codecs in ((BytesCodec(endian="little"),), (BytesCodec(endian=None),))
            and array.dtype == array.dtype.newbyteorder("<")
            and codec.chunk_shape[1:] == array.shape[1:]
        )

    def __getitem__(self, number: int) -> NDArray[Any]:
        """Return the rows of a chunk (n, …), read-only. Raises `UserError` if its shard is damaged."""
        shard, inner = divmod(number, self._per_shard)
        mapped = self._shard(shard)
        rows = min(self._shape[0], self._rows - number * self._shape[0])
        if mapped is None or mapped.offsets[inner] == ABSENT:
            return np.broadcast_to(self._fill.reshape((1,) * len(self._shape)), (rows, *self._shape[1:]))
        start = mapped.offsets[inner]
        return mapped.content[start : start + self._bytes].view(self._dtype).reshape(self._shape)[:rows]

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of rows start … stop − 1 (n, …), at least one. Raises `UserError` if a shard is damaged."""
        size = self._shape[0]
        first = start // size
        chunks = [self[number] for number in range(first, -(-stop // size))]
        chunks[0] = chunks[0][start - first * size :]
        return np.concatenate(chunks)[: stop - start]

    def prefetch(self, numbers: list[int]) -> None:
        """Make the system read these chunks, in rising order, from the disk without waiting for it."""
        if sys.platform != "linux":  # no posix_fadvise, no RWF_NOWAIT
            return
        for shard, inside in groupby(numbers, lambda number: number // self._per_shard):
            if mapped := self._shard(shard):
                with mapped.path.open("rb", buffering=0) as file:
                    for start in (mapped.offsets[number % self._per_shard] for number in inside):
                        if start != ABSENT and not _is_cached(file.fileno(), start):
                            stop = start + self._bytes
                            for at in range(start, stop, READ_AHEAD):
                                length = min(READ_AHEAD, stop - at)
                                os.posix_fadvise(file.fileno(), at, length, os.POSIX_FADV_WILLNEED)

    def forget(self, shard: int) -> None:
        """Map a shard again on its next use: its file has been replaced."""
        self._shards.pop(shard, None)

    def _shard(self, shard: int) -> _Shard | None:
        if shard not in self._shards:
            path = self._file_of(shard)
            self._shards[shard] = None if path is None else self._map(path)
        return self._shards[shard]

    def _map(self, path: Path) -> _Shard:
        """Map a shard's file and check its index."""
        with report_read_errors(path), pa.memory_map(str(require_regular(path))) as file:
            content = np.frombuffer(file.read_buffer(), np.uint8)  # stays valid when the file is closed
        size = 16 * self._per_shard
        if len(content) < size + 4:
            raise damaged(path, f"it has {len(content):,} bytes, fewer than its index of {size + 4:,} bytes")
        index = content[-size - 4 : -4].tobytes()
        if google_crc32c.value(index) != int.from_bytes(content[-4:].tobytes(), "little"):
            raise damaged(path, "the index at its end does not match its checksum")
        offsets = []
        for start, length in struct.iter_unpack("<QQ", index):
            if start == length == 2**64 - 1:
                offsets.append(ABSENT)
            elif length == self._bytes and start + length <= len(content) - size - 4:
                offsets.append(start)
            else:
                raise damaged(
                    path, f"its index lists {length:,} bytes at {start:,}, expected a chunk of {self._bytes:,} bytes"
                )
        return _Shard(path, content, offsets)


def _is_cached(file: int, at: int) -> bool:
    """Return whether a chunk's first byte is in the page cache. The rest was read with it and rarely leaves earlier."""
    try:
        return os.preadv(file, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except OSError:  # reading would block, or the file system does not support the flag
        return False


def damaged(path: Path, what: str) -> UserError:
    """Return the error that a file of features or statuses is damaged."""
    return UserError(
        f"{path} is damaged: {what}. Discard its commit with `sail-extract verify --discard` and rerun the extraction."
    )
