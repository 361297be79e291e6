"""Where the members of a tar lie. Only headers are read, never the data behind them.

Python's `tarfile` takes several times as long, and ends without a word where a header is damaged.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from sail_align.extract.errors import UserError

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
