"""Files that are whole or not there, and their digests."""

import errno
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from sail_align.extract.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def as_path(location: str | Path) -> Path:
    """Return a place to keep a store: a local path, or for a URL such as `s3://bucket/x.zarr` what acts like one.

    Raises:
        UserError: It is a URL and universal_pathlib, or the file system behind it, is not installed.
    """
    if "://" not in str(location) or not isinstance(location, str):
        return Path(location) if isinstance(location, str) else location
    try:
        from upath import UPath

        remote: Any = UPath(location, use_listings_cache=False)  # others write there too
        remote.fs  # noqa: B018 (loads what the protocol needs)
    except (ImportError, ValueError) as problem:
        raise UserError(
            f"{location} cannot be used ({problem}); install 'sail-align[remote]' and what fsspec needs for it."
        ) from problem
    return cast(Path, remote)


def is_remote(path: Path) -> bool:
    """Whether a path came from a URL."""
    return not isinstance(path, Path)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it, if it is there."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        cast(Any, folder).rmdir(recursive=True)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder, if it is not there; one that was made and in which a failure leaves nothing is removed again.

    Raises:
        UserError: It cannot be made.
    """
    there = folder.exists()
    with report_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except Exception:
        if not there and not is_remote(folder):  # object storage knows no empty folders
            with suppress(OSError):  # not empty
                folder.rmdir()
        raise


def canonical_json(value: Any) -> bytes:
    """Return JSON that is the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def write_atomically(path: Path, content: bytes | memoryview, *, below: Path | None = None) -> None:
    """Write a whole file under a temporary name and rename it, so that no reader ever sees a part of it.

    What a killed writer of the same file left behind is removed; one that is alive then tries again. On object storage
    a file is put whole or not at all.

    Raises:
        FileNotFoundError: The folder `below`, under which alone folders may be made, is gone.
    """
    if is_remote(path):
        path.write_bytes(bytes(content))
        return
    if below is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        for folder in reversed([each for each in path.parents if each != below and each.is_relative_to(below)]):
            folder.mkdir(exist_ok=True)
    remove_leftovers(path)  # once, or two slow writers would take each other's files away without end
    written = False
    while not written:
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
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk before anything written later: after a power cut, no marker alone."""
    with suppress(OSError):  # not every system knows this
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writers of this file that were killed."""
    if is_remote(path):
        return
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def file_digest(path: Path) -> str | None:
    """Return the SHA-256 of a file, None if there is no such file. Raises `UserError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise broken(path, problem) from problem


def require_store(path: Path) -> None:
    """Refuse what is plainly no store, before the seconds that reading one takes to load.

    Raises:
        UserError: There is no zarr.json.
    """
    try:
        if not is_remote(path):
            (path / "zarr.json").lstat()
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise no_store(path) from problem
    except OSError:  # opening it says more
        return


def no_store(path: Path) -> UserError:
    """Return what to raise of a path that is no store."""
    return UserError(f"{path} is not a feature store; make one with `sail-extract run`.")


def broken(path: Path, problem: Exception) -> UserError:
    """Return what to raise of a store's file that cannot be read: the system refuses, or it is not what was written."""
    if (
        isinstance(problem, OSError)
        and not isinstance(problem, FileNotFoundError)
        and (problem.errno or type(problem) is not OSError)  # pyarrow's is neither, and says damage
    ):
        reason = os.strerror(problem.errno) if problem.errno else problem  # object storage gives no number
        return UserError(f"{path} cannot be read ({reason}); mend that and try again.")
    return UserError(
        f"{path} is missing or damaged; restore it, or run the extraction again, after `sail-extract verify --discard` "
        "if it is a file of features."
    )


@contextmanager
def report_write_errors(path: Path, *, during_run: bool = False) -> Iterator[None]:
    """Turn an `OSError` of writing a file or folder into a `UserError`.

    Args:
        path: The file or folder that is written.
        during_run: The block also reads other files. Only errors that are certainly about writing `path` are turned
            into a `UserError`: a full disk, missing permission under `path`, or a `path` that has disappeared.
    """
    try:
        yield
    except OSError as problem:
        if problem.errno in _FULL:
            raise UserError(
                f"No space is left for {path} ({problem.strerror}). Free some and rerun the same command; committed "
                "work is kept."
            ) from problem
        if during_run and isinstance(problem, FileNotFoundError) and not path.exists():
            raise UserError(f"{path} has disappeared. Restore it and rerun the same command.") from problem
        denied = problem.errno in _FORBIDDEN and Path(str(problem.filename)).is_relative_to(path)
        if during_run and not denied:
            raise
        what, remedy = (problem.filename, "Change its permissions or pass") if denied else (path, "Pass")
        raise UserError(
            f"{what} cannot be written ({problem.strerror or problem}). {remedy} another --out."
        ) from problem
