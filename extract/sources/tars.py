"""Positions of the members of a tar. Only headers are read, never the data after them.

Python's `tarfile` takes several times as long, and stops silently at a damaged header.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from sail_align.extract.errors import UserError
from sail_align.extract.sources.file_set import FileSet

BLOCK = 512
"""Headers and data start at multiples of this many bytes."""

_FILES = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", (b"x", b"X"), b"g"
_LONGEST_EXTENSION = 1 << 20
_LONGEST_TEXT = 64 << 20
_LARGEST = 1 << 50
_NUMBER = re.compile(rb"[0-9]{1,20}")
_RECORD_LENGTH = re.compile(rb"([0-9]{1,20}) ")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class DamagedTarError(Exception):
    """A tar cannot be read to its end. The message continues a sentence that begins with the tar's name."""


def members(tar: BinaryIO, name: str) -> Iterator[tuple[str, int, int]]:
    """Yield the path of each regular file of a tar, and the offset and size of its data in bytes, in order.

    Supports the v7, ustar, GNU and PAX formats. A last member whose data is truncated is yielded with its full size.

    Args:
        tar: An open tar. The caller may move its position between members.
        name: Name of the tar in messages.

    Raises:
        UserError: The tar is compressed.
        DamagedTarError: The tar does not end with an end mark. Raised after the last member that can be found.
    """
    length = tar.seek(0, 2)
    at = 0
    shared: dict[str, str] = {}  # PAX fields of all following members
    own: dict[str, str] = {}  # PAX or GNU fields of the next member
    while True:
        tar.seek(at)
        header = tar.read(BLOCK)
        if at == 0:
            for magic, form in _COMPRESSED.items():
                if header.startswith(magic):
                    raise UserError(
                        f"{name} is compressed ({form}), so its members cannot be read one by one. Decompress it."
                    )
        if len(header) < BLOCK:
            raise DamagedTarError("is empty" if length == 0 else f"is truncated at byte {length:,}")
        if not any(header):
            return
        kind, size = header[156:157], _parse_size(header, at)
        fields = shared | own
        if kind in _FILES and "size" in fields:
            size = int(fields["size"])
        if size > _LARGEST:
            raise DamagedTarError(f"contains a member of impossible size at byte {at:,}")
        data = at + BLOCK
        at = data if kind in _WITHOUT_DATA else data + -(-size // BLOCK) * BLOCK
        if kind == _LONG_NAME:
            own["path"] = _decode(_read_extension(tar, data, size))
        elif kind in _PAX:
            own |= _parse_records(_read_extension(tar, data, size), data)
        elif kind == _PAX_GLOBAL:
            shared |= _parse_records(_read_extension(tar, data, size), data)
        else:
            if kind in _FILES:
                yield fields.get("path") or _parse_path(header), data, size
            if kind != _LONG_LINK:  # which may stand between a long name and its member
                own = {}
        if at > length:
            raise DamagedTarError(f"is truncated at byte {length:,}, in the middle of a member")


def header_size(header: bytes) -> int | None:
    """Return the size of the data after a header, None if the bytes are not a header.

    Sizes in PAX extensions, of members over 8 GiB, are not supported.
    """
    try:
        return _parse_size(header, 0) if len(header) == BLOCK else None
    except DamagedTarError:
        return None


def _parse_size(header: bytes, at: int) -> int:
    """Return the size in a header, after verifying its checksum."""
    total = sum(header) - sum(header[148:156]) + 8 * 32
    try:
        checksum = _parse_number(header[148:156])
        # Some old writers summed signed bytes.
        if checksum == total or checksum == total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
            return _parse_number(header[124:136])
    except ValueError:
        pass
    raise DamagedTarError("is not a tar" if at == 0 else f"has no valid header at byte {at:,}")


def _parse_number(field: bytes) -> int:
    """Return a number in octal digits, or in GNU's binary form for numbers that do not fit."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _parse_path(header: bytes) -> str:
    prefix = header[345:500] if header[257:263] == b"ustar\0" else b""  # GNU uses these bytes for other data
    name = _decode(header[:100])
    return f"{_decode(prefix)}/{name}" if prefix[:1].strip(b"\0") else name


def _decode(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _read_extension(tar: BinaryIO, data: int, size: int) -> bytes:
    if size > _LONGEST_EXTENSION:
        raise DamagedTarError(f"contains a member name of {size:,} bytes at byte {data:,}")
    tar.seek(data)
    return tar.read(size)


def _parse_records(extension: bytes, data: int) -> dict[str, str]:
    """Return `path` and `size` from a PAX extension: records of the form `<length> <key>=<value>` and a newline."""
    found: dict[str, str] = {}
    at, end = 0, len(extension.rstrip(b"\0"))
    while at < end:
        match = _RECORD_LENGTH.match(extension, at)
        length = int(match[1]) if match else 0
        key, equals, value = extension[match.end() if match else at : at + length - 1].partition(b"=")
        if not 0 < length <= len(extension) - at or not equals or (key == b"size" and not _NUMBER.fullmatch(value)):
            raise DamagedTarError(f"contains an invalid PAX header at byte {data:,}")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "replace")
        at += length
    return found


_KEY_AND_ENDING = re.compile(r"(?:\./)?((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)


@dataclass
class TarSamples:
    """Content of a tar by sample.

    Attributes:
        samples: For each key, the values found, by ending or `json:<field>`: the `<offset>:<size>` of images, the text
            of other members, and the values of fields.
        endings: Number of members by ending, including those that were not requested.
        warnings: Problems of the tar. Each continues a sentence that begins with the tar's name.
    """

    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, files: FileSet, tar: str, images: Collection[str], origins: Collection[str]) -> "TarSamples":
        """Find the images of a tar, and read its texts and fields.

        A member's key is its path up to the first dot of its base name, and its ending is the rest. Keys with two
        members of the same ending are left out, because it is unknown which text belongs to which image. A sample
        without a json gets the fields of its row in the table beside the tar, if there is one.

        Args:
            files: The files that the tar is one of.
            tar: Name of the tar.
            images: Endings of images.
            origins: Other values to read, such as `txt` and `json:url`.
        """
        found = cls()
        repeated: dict[str, str] = {}
        fields = [origin.removeprefix("json:") for origin in origins if origin.startswith("json:")]
        texts = {*origins, *(["json"] if fields else [])}
        with files.open(tar) as stream:
            try:
                for name, offset, size in members(stream, tar):
                    if not (match := _KEY_AND_ENDING.fullmatch(name)):
                        continue
                    key, ending = match[1], match[2].lower()
                    found.endings[ending] += 1
                    sample = found.samples.setdefault(key, {})
                    if ending in sample:
                        repeated[key] = name
                    elif ending in images:
                        sample[ending] = f"{offset}:{size}"
                    elif ending in texts and size > _LONGEST_TEXT:
                        found.warnings.append(f"has a text of {size:,} bytes, left out: {name!r}")
                    elif ending in texts:
                        stream.seek(offset)
                        content = stream.read(size)
                        if len(content) == size:  # else the tar is truncated here, and `members` raises next
                            sample[ending] = content.decode("utf-8", "replace")
            except DamagedTarError as problem:
                found.warnings.append(f"{problem}; later samples are lost" if found.samples else str(problem))
        for key in repeated:
            del found.samples[key]
        if repeated:
            first = next(iter(repeated.values()))
            found.warnings.append(
                f"has two members of the same name for {len(repeated):,} keys, left out (the first: {first!r})"
            )
        if fields:
            found._parse_json(fields, keep_text="json" in origins)
            if any("json" not in sample for sample in found.samples.values()):
                found._read_table(files, cls.table_beside(tar), fields)
        return found

    def _parse_json(self, fields: list[str], keep_text: bool) -> None:
        invalid = 0
        for sample in self.samples.values():
            if "json" not in sample:
                continue
            try:
                row = json.loads(sample["json"])
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                row, invalid = {}, invalid + 1
            sample |= {f"json:{name}": row.get(name) for name in fields}
            if not keep_text:
                sample["json"] = ""
        if invalid:
            self.warnings.append(f"has {invalid:,} .json members that are not JSON objects")

    @staticmethod
    def table_beside(tar: str) -> str:
        """Return the name of the table that img2dataset writes for a tar."""
        return tar.removesuffix(".tar") + ".parquet"

    def _read_table(self, files: FileSet, table: str, fields: list[str]) -> None:
        """Give the samples without a json the fields of their rows in a table with a column `key`.

        A row belongs to the sample with the same key or the same base name. If several rows or samples have this name,
        the fields are left out.
        """
        if not files.exists(table):
            return
        try:
            with files.open(table) as stream:
                parquet = pq.ParquetFile(stream)
                columns = parquet.schema_arrow.names
                known = [column for column in fields if column in columns]
                rows = parquet.read(["key", *known]).to_pylist() if "key" in columns else []
        except (pa.ArrowException, OSError) as problem:
            self.warnings.append(f"has a table {table} that cannot be read: {' '.join(str(problem).split())}")
            return
        by_key = {str(row["key"]): row for row in rows}
        rows_per_name = Counter(str(row["key"]) for row in rows)
        samples_per_name = Counter(key.rpartition("/")[2] for key in self.samples)
        ambiguous = 0
        for key, sample in self.samples.items():
            name = key if key in by_key else key.rpartition("/")[2]
            if "json" in sample or name not in by_key:
                continue
            if rows_per_name[name] > 1 or (name != key and samples_per_name[name] > 1):
                ambiguous += 1
            else:
                sample |= {f"json:{column}": by_key[name][column] for column in known}
        if ambiguous:
            self.warnings.append(
                f"has {ambiguous:,} samples whose row in {table} is ambiguous, left without its fields"
            )
