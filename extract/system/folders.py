"""Folders that are written whole or not at all."""

import fcntl
import glob
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import report_write_errors


def require_new(folder: Path) -> None:
    """Raise `UserError` unless a folder does not exist or is empty."""
    if folder.name in ("", "..") or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"{folder} exists already. Remove it, or pass another --out.")


@contextmanager
def new_folder(folder: Path, names: str) -> Iterator[Path]:
    """Yield a folder to write, which appears under its name, whole, when the block ends without an error.

    What killed writers of the same folder left is removed. Those that are running hold a lock.

    Args:
        folder: The folder.
        names: Regular expression of the names of the files that are written, in subfolders too. Only these are ever
            removed.

    Raises:
        UserError: The folder is not empty or cannot be written.
    """
    require_new(folder)
    ours = re.compile(rf"{names}|\.(?:{names})\.[0-9a-f]+\.tmp")
    _remove_leftovers(folder, ours)
    written = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.new")
    lock = None
    try:
        with report_write_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            written.mkdir()  # exclusively: it is nobody else's
            lock = lock_folder(written)
            yield written
            written.replace(folder)
    finally:
        _remove_own(written, ours)
        if lock is not None:
            os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """Return an open and locked folder, None if another process has the lock or it cannot be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        pass
    return descriptor


def _remove_leftovers(folder: Path, ours: re.Pattern[str]) -> None:
    leftover = re.compile(re.escape(folder.name).join((r"\.", r"\.[0-9a-f]{32}\.new")))
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.new"):
        if leftover.fullmatch(path.name) and not path.is_symlink() and (lock := lock_folder(path)) is not None:
            _remove_own(path, ours)
            os.close(lock)


def _remove_own(folder: Path, ours: re.Pattern[str]) -> None:
    """Remove files with our names from a folder and its subfolders, and then the folders that are empty.

    Links to folders are not followed.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for name in filter(ours.fullmatch, names):
            with suppress(OSError):
                os.unlink(os.path.join(place, name))
        with suppress(OSError):
            os.rmdir(place)
