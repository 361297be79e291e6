"""Raw shards of local files, read by mapping them into memory: a chunk is a view of the file, and nothing is copied.

A shard of zarr's sharding codec is its inner chunks, one behind the other, and at its end an index: for each chunk its
offset and its length in bytes (two little-endian uint64, both 2⁶⁴ − 1 where the chunk is all fill value and absent),
then their CRC32C. Source: the zarr v3 specification of `sharding_indexed`.
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
from zarr.codecs.bytes import Endian
from zarr.codecs.sharding import ShardingCodecIndexLocation
from zarr.core.metadata import ArrayV3Metadata

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import broken

ABSENT = -1
READ_AHEAD = 1 << 17
"""Bytes a request: the kernel cuts a longer one down to the device's read-ahead, and this is the least common one."""


class _Shard(NamedTuple):
    path: Path
    content: NDArray[np.uint8]
    offsets: list[int]


class MappedChunks:
    """The inner chunks of one array. A shard is mapped when one of its chunks is first asked for.

    No file stays open: a store of many millions of rows has more shards than a process may have files.
    """

    def __init__(self, array: "zarr.Array[Any]", file_of: Callable[[int], Path | None]):
        """Take an array for which `can_map` holds, and where each shard is: None if it has fill values only."""
        self._shape = (array.chunks[0], *array.shape[1:])
        self._rows = array.shape[0]
        self._dtype = array.dtype
        self._fill: NDArray[Any] = np.full(1, array.fill_value, array.dtype)
        self._per_shard = (array.shards or array.chunks)[0] // array.chunks[0]
        self._bytes = int(np.prod(self._shape)) * array.dtype.itemsize
        self._file_of = file_of
        self._shards: dict[int, _Shard | None] = {}

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
        """Return rows start … stop − 1 (n, …), at least one. Raises `UserError` as above."""
        size = self._shape[0]
        first = start // size
        chunks = [self[number] for number in range(first, -(-stop // size))]
        chunks[0] = chunks[0][start - first * size :]
        return np.concatenate(chunks)[: stop - start]

    def expect(self, numbers: list[int]) -> None:
        """Have the system read these chunks from the disk, without waiting for it. They are in rising order."""
        if sys.platform != "linux":  # others read ahead by their own rules
            return
        for shard, inside in groupby(numbers, lambda number: number // self._per_shard):
            if mapped := self._shard(shard):
                with mapped.path.open("rb", buffering=0) as file:
                    for start in (mapped.offsets[number % self._per_shard] for number in inside):
                        if start != ABSENT and not _cached(file.fileno(), start):
                            _read_ahead(file.fileno(), start, start + self._bytes)

    def forget(self, shard: int) -> None:
        """Map a shard anew when it is asked for next: its file is another one now."""
        self._shards.pop(shard, None)

    def _shard(self, shard: int) -> _Shard | None:
        if shard not in self._shards:
            self._shards[shard] = self._map(shard)
        return self._shards[shard]

    def _map(self, shard: int) -> _Shard | None:
        """Map a shard's file and check its index; None if it has fill values only, and so no file."""
        path = self._file_of(shard)
        if path is None:
            return None
        try:
            with pa.memory_map(str(path)) as file:
                content = np.frombuffer(file.read_buffer(), np.uint8)  # lives on when the file is closed
        except OSError as problem:
            raise broken(path, problem) from problem
        size = 16 * self._per_shard
        if len(content) < size + 4:
            raise _damaged(path, f"it has {len(content):,} bytes and its index alone has {size + 4:,}")
        index = content[-size - 4 : -4].tobytes()
        if google_crc32c.value(index) != int.from_bytes(content[-4:].tobytes(), "little"):
            raise _damaged(path, "the index at its end does not match its checksum")
        offsets = []
        for start, length in struct.iter_unpack("<QQ", index):
            if start == length == 2**64 - 1:
                offsets.append(ABSENT)
            elif length == self._bytes and start + length <= len(content) - size - 4:
                offsets.append(start)
            else:
                raise _damaged(path, f"its index names {length:,} bytes at {start:,} for a chunk of {self._bytes:,}")
        return _Shard(path, content, offsets)


def can_map(array: "zarr.Array[Any]") -> bool:
    """Whether an array's chunks lie in its shards as they are in memory, each with whole rows."""
    metadata = array.metadata
    if not isinstance(metadata, ArrayV3Metadata) or len(metadata.codecs) != 1:
        return False
    (codec,) = metadata.codecs
    return (
        isinstance(codec, ShardingCodec)
        and codec.index_location == ShardingCodecIndexLocation.end
        and codec.index_codecs == (BytesCodec(endian=Endian.little), Crc32cCodec())
        and codec.codecs in ((BytesCodec(endian=Endian.little),), (BytesCodec(endian=None),))
        and array.dtype == array.dtype.newbyteorder("<")
        and codec.chunk_shape[1:] == array.shape[1:]
    )


def _cached(file: int, at: int) -> bool:
    """Whether the byte at a place is in memory: what lies behind it was read with it, and rarely left it before it."""
    try:
        return os.preadv(file, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except OSError:  # it would have to be waited for, or the file system cannot tell
        return False


def _read_ahead(file: int, start: int, stop: int) -> None:
    for at in range(start, stop, READ_AHEAD):
        os.posix_fadvise(file, at, min(READ_AHEAD, stop - at), os.POSIX_FADV_WILLNEED)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is damaged: {what}; take back its commit with `sail-extract verify --discard` and run the extraction "
        "again."
    )
