"""Where the members of a tar lie. Only headers are read, never the data behind them.

Python's `tarfile` takes several times as long, and ends without a word where a header is damaged.
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
_LONG_NAME, _PAX, _PAX_GLOBAL = b"L", (b"x", b"X"), b"g"
_LONGEST_EXTENSION = 1 << 20
_LARGEST = 1 << 50
_NUMBER = re.compile(rb"[0-9]{1,20}")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its path there, and where its bytes start and how many they are."""

    name: str
    offset: int
    size: int


class DamagedTarError(Exception):
    """A tar cannot be followed to its end; the message says from where on, and goes on from the tar's name."""


def members(tar: BinaryIO, name: str) -> Iterator[Member]:
    """Yield the regular files of a tar, in order; `name` is what messages call it. The stream may be moved meanwhile.

    Understands the v7, ustar, GNU and PAX forms. A last member whose data is cut short is yielded with its full size.

    Raises:
        UserError: The tar is compressed.
        DamagedTarError: After the last member that can be found, if there is no mark that this is the end.
    """
    length = tar.seek(0, 2)
    at = 0
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    while True:
        tar.seek(at)
        header = tar.read(BLOCK)
        if at == 0 and (form := next((form for magic, form in _COMPRESSED.items() if header.startswith(magic)), "")):
            raise UserError(f"{name} is compressed ({form}), so that no member can be read by itself; decompress it.")
        if len(header) < BLOCK:
            raise DamagedTarError("is empty" if length == 0 else f"is cut at byte {length:,}")
        if not any(header):
            return
        kind, size = header[156:157], _size(header, at)
        fields = shared | own
        if kind in _FILES and "size" in fields:
            size = int(fields["size"])
        if size > _LARGEST:
            raise DamagedTarError(f"holds a member of impossible size, at byte {at:,}")
        data, at = at + BLOCK, at + BLOCK
        if kind not in _WITHOUT_DATA:
            at += -(-size // BLOCK) * BLOCK
        if kind == _LONG_NAME:
            own["path"] = _text(_extension(tar, data, size))
        elif kind in _PAX:
            own |= _records(_extension(tar, data, size), data)
        elif kind == _PAX_GLOBAL:
            shared |= _records(_extension(tar, data, size), data)
        else:
            if kind in _FILES:
                yield Member(fields.get("path") or _path(header), data, size)
            if kind != b"K":  # the long target of a link, which stands between a long name and what bears it
                own = {}
        if at > length:
            raise DamagedTarError(f"is cut at byte {length:,}, in the middle of a member")


def header_size(header: bytes) -> int | None:
    """Return how many bytes of data a header announces, None if it is no header. Members over 8 GiB are not meant."""
    try:
        return _size(header, 0) if len(header) == BLOCK else None
    except DamagedTarError:
        return None


def _size(header: bytes, at: int) -> int:
    """Return the size in a header, once its checksum shows that it is one."""
    total = sum(header) - sum(header[148:156]) + 8 * 32
    try:
        checksum = _number(header[148:156])
        # Some old writers summed signed bytes.
        if checksum == total or checksum == total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
            return _number(header[124:136])
    except ValueError:
        pass
    raise DamagedTarError("is no tar" if at == 0 else f"holds no header where one must be, at byte {at:,}")


def _number(field: bytes) -> int:
    """Return a number in octal digits, or in GNU's binary form for what these cannot hold."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _path(header: bytes) -> str:
    prefix = header[345:500] if header[257:263] == b"ustar\0" else b""  # GNU keeps other things there
    name = _text(header[:100])
    return f"{_text(prefix)}/{name}" if prefix[:1].strip(b"\0") else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _extension(tar: BinaryIO, data: int, size: int) -> bytes:
    if size > _LONGEST_EXTENSION:
        raise DamagedTarError(f"holds a member's name of {size:,} bytes, at byte {data:,}")
    tar.seek(data)
    return tar.read(size)


def _records(extension: bytes, data: int) -> dict[str, str]:
    """Return the `path` and `size` of a PAX extension: records of the form `<length> <key>=<value>` and a newline."""
    found: dict[str, str] = {}
    rest = extension
    while rest.strip(b"\0"):
        digits = rest.split(b" ", 1)[0]
        length = int(digits) if _NUMBER.fullmatch(digits) else 0
        key, equals, value = rest[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or length > len(rest) or (key == b"size" and not _NUMBER.fullmatch(value)):
            raise DamagedTarError(f"holds a PAX header that cannot be read, at byte {data:,}")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "replace")
        rest = rest[length:]
    return found


_KEY_AND_ENDING = re.compile(r"(?:\./)?((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)


@dataclass
class TarSamples:
    """What a tar holds of each sample.

    `samples` maps a key to what was found, by ending or `json:<field>`: of an image its `<offset>:<size>`, of other
    members the text, of a field its value. `endings` counts all members, also those not asked for. `notes` say what is
    wrong with the tar; they go on from its name.
    """

    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def read_tar(files: FileSet, tar: str, images: Collection[str], origins: Collection[str]) -> TarSamples:
    """Read where a tar's images are, and its texts and fields (`txt`, `json:url`); other members are skipped.

    A member's key is its path up to the first dot of its base name, its ending what follows. A key that has two members
    of one ending is left out: which text belongs to which image cannot be known. A sample without a json has the fields
    of its row in the table beside the tar, if there is one.
    """
    found = TarSamples()
    twice: dict[str, str] = {}
    unreadable = 0
    fields = [origin.removeprefix("json:") for origin in origins if origin.startswith("json:")]
    endings = {*origins, *(["json"] if fields else [])}
    with files.open(tar) as stream:
        try:
            for member in members(stream, tar):
                if not (match := _KEY_AND_ENDING.fullmatch(member.name)):
                    continue
                key, ending = match[1], match[2].lower()
                found.endings[ending] += 1
                sample = found.samples.setdefault(key, {})
                if ending in sample:
                    twice[key] = member.name
                elif ending in images:
                    sample[ending] = f"{member.offset}:{member.size}"
                elif ending in endings:
                    stream.seek(member.offset)
                    data = stream.read(member.size)
                    if len(data) < member.size:  # the tar is cut here, which `members` will say
                        continue
                    text = data.decode("utf-8", "replace")
                    sample[ending] = text if ending in origins else ""
                    if ending == "json" and fields:
                        row = _parse(text)
                        unreadable += row is None
                        sample |= {f"json:{name}": (row or {}).get(name) for name in fields}
        except DamagedTarError as problem:
            found.notes.append(f"{problem}; the samples behind that are lost" if found.samples else str(problem))
    for key in twice:
        del found.samples[key]
    if twice:
        first = next(iter(twice.values()))
        found.notes.append(f"holds two members of one name for {len(twice):,} keys, left out (the first: {first!r})")
    if unreadable:
        found.notes.append(f"holds {unreadable:,} members .json that are no mapping in JSON")
    if fields and any("json" not in sample for sample in found.samples.values()):
        _add_table(found, files, table_beside(tar), fields)
    return found


def table_beside(tar: str) -> str:
    """Return the name of the table that img2dataset writes for a tar."""
    return tar.removesuffix(".tar") + ".parquet"


def _parse(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _add_table(found: TarSamples, files: FileSet, table: str, fields: list[str]) -> None:
    """Give the samples without a json the fields of their rows in a table with a column `key`.

    A row is of the sample with that key, or with that base name. Where several rows or samples have one, none is taken.
    """
    if not files.exists(table):
        return
    try:
        with files.open(table) as stream:
            rows_of_tar = pq.ParquetFile(stream)
            columns = rows_of_tar.schema_arrow.names
            there = [column for column in fields if column in columns]
            rows = rows_of_tar.read(["key", *there]).to_pylist() if "key" in columns else []
    except (pa.ArrowException, OSError) as problem:
        found.notes.append(f"has a table {table} beside it that cannot be read: {' '.join(str(problem).split())}")
        return
    by_key = {str(row["key"]): row for row in rows}
    rows_of = Counter(str(row["key"]) for row in rows)
    samples_of = Counter(map(_base_name, found.samples))
    unclear = 0
    for key, sample in found.samples.items():
        name = key if key in by_key else _base_name(key)
        if "json" in sample or name not in by_key:
            continue
        if rows_of[name] > 1 or (name != key and samples_of[name] > 1):
            unclear += 1
        else:
            sample |= {f"json:{column}": by_key[name][column] for column in there}
    if unclear:
        found.notes.append(f"has {unclear:,} samples whose row in {table} is not clear, left without its fields")


def _base_name(key: str) -> str:
    return key.rpartition("/")[2]
