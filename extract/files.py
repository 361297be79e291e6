"""Files that are whole or not there, and their digests."""

import errno
import glob
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sail_align.extract.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def canonical_json(value: Any) -> bytes:
    """Return JSON that is the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a whole file under a temporary name and rename it, so that no reader ever sees a part of it.

    What a killed writer of the same file left behind is removed; one that is alive then tries again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = False
    while not written:
        remove_leftovers(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                temporary.replace(path)
                written = True
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writers of this file that were killed."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def file_digest(path: Path) -> str | None:
    """Return the SHA-256 of a file, None if there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


@contextmanager
def full_disk_is_said(path: Path) -> Iterator[None]:
    """Turn the error of a full disk, a used-up quota or a file over the size limit into a `UserError`."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in _FULL:
            raise
        raise UserError(
            f"No room is left for {path} ({problem.strerror}); free some and run the same command again: what is "
            "committed stays."
        ) from problem
