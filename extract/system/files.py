"""Files that are written whole or not at all, their digests, and readable errors."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from sail_align.extract.errors import UserError

NOT_A_STORE = "{path} is not a feature store. Make one with `sail-extract run`."
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_JSON_KINDS = {type(None): "null", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
ATTEMPTS = 100
"""How often a file is written again because another writer of the same file removed the temporary one."""
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def as_path(location: str | Path) -> Path:
    """Return the path of a store: a local one, or a path-like object for a URL such as `s3://bucket/x.zarr`.

    Raises:
        UserError: The location is a URL, and universal_pathlib or the file system for it is not installed.
    """
    if not isinstance(location, str):
        return location
    if "://" not in location:
        return Path(location)
    try:
        from upath import UPath

        remote: Any = UPath(location, use_listings_cache=False)  # other processes write there too
        remote.fs  # noqa: B018 (imports the file system)
    except (ImportError, ValueError) as problem:
        raise UserError(
            f"{location} cannot be used ({problem}). Install 'sail-align[remote]' and the fsspec package for this URL."
        ) from problem
    return cast(Path, remote)


def is_remote(path: Path) -> bool:
    """Return whether a path was made from a URL."""
    return not isinstance(path, Path)


def remove_tree(folder: Path) -> None:
    """Remove a folder with its content, if it exists."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        cast(Any, folder).rmdir(recursive=True)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading in binary. Anything else, such as a FIFO or /dev/zero, could be read forever.

    A link is followed.

    Raises:
        OSError: The file cannot be opened or is not a regular file.
    """
    if is_remote(path):
        return cast(BinaryIO, path.open("rb"))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO would block
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path) -> bytes:
    """Return the content of a file. Raises `OSError` as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def require_regular(path: Path) -> Path:
    """Return the path of a file that another library opens. Raises `OSError` as `open_regular` does."""
    if not is_remote(path):
        _require_regular(path, path.stat().st_mode)
    return path


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def canonical_json(value: Any) -> bytes:
    """Return JSON whose bytes are the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_without(record: Mapping[str, Any], *names: str) -> str:
    """Return the SHA-256 of a JSON object without these fields."""
    content = {name: value for name, value in record.items() if name not in names}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def json_lines(file: Iterable[str], **options: Any) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line that is not blank; `options` are those of `json.loads`.

    Raises:
        ValueError: A line is not JSON. The message names it.
    """
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                value = json.loads(line, **options)
            except (ValueError, RecursionError) as problem:
                raise ValueError(f"line {number}: {problem}") from problem
            yield number, value


def read_json(path: Path, remedy: str = "restore the file") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: A UTF-8 file.
        remedy: What the user can do about an invalid file, as the end of the message.

    Raises:
        UserError: The file cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(read_regular(path))
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}); {remedy}.") from problem
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path} is not valid JSON ({problem}); {remedy}.") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path} is invalid: got {_JSON_KINDS[type(content)]}, expected a JSON object; {remedy}.")
    return content


def write_atomically(
    path: Path,
    content: bytes | memoryview | None,
    *,
    below: Path | None = None,
    confirm: Callable[[], object] = lambda: None,
) -> None:
    """Write a whole file under a temporary name and rename it, so that no reader ever sees part of it.

    Temporary files of killed writers of the same file are removed. If that hits a live writer, it tries again. Object
    storage writes whole objects anyway.

    Args:
        path: The file.
        content: Its content, or None to remove the file.
        below: Create missing folders only below this one.
        confirm: Called before the file appears under its name. Its errors leave everything as it is.

    Raises:
        FileNotFoundError: The folder `below` does not exist.
    """
    if content is None or is_remote(path):
        confirm()
    if content is None:
        path.unlink(missing_ok=True)
        _remove_leftovers(path)
        return
    if is_remote(path):
        path.write_bytes(bytes(content))
        return
    if below is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        for folder in reversed([each for each in path.parents if each != below and each.is_relative_to(below)]):
            folder.mkdir(exist_ok=True)
    _remove_leftovers(path)  # only once: two slow writers could delete each other's files forever
    for attempt in range(ATTEMPTS):
        try:
            with _replacing(path, confirm) as file:
                file.write(content)
        except FileNotFoundError:  # another writer removed it
            if attempt == ATTEMPTS - 1 or not path.parent.exists():
                raise
        else:
            return


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Yield a local file to write, which appears under its name, whole, when the block ends without an error.

    For files that may not fit into memory. Only one process may write the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    with _replacing(path) as file:
        yield file


@contextmanager
def _replacing(path: Path, confirm: Callable[[], object] = lambda: None) -> Iterator[BinaryIO]:
    """Yield a file of a temporary name, and rename it at the end of the block.

    Raises:
        FileNotFoundError: Another process removed it, or its folder does not exist.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        confirm()
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    # Sync the folder too: after a power cut, a marker must not be there without the files written before it.
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as problem:
        if problem.errno in {errno.EIO, *_FULL}:  # other errors: the file system cannot sync folders
            raise


def remove_own(folder: Path, names: Iterable[str]) -> None:
    """Remove files of these names from a folder, with their temporary files, and then the folder if it is empty.

    Other files in the folder stay. If the folder is a link, only the link is removed.
    """
    with suppress(OSError):
        if folder.is_symlink():
            folder.unlink()
            return
    for name in names:
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            _remove_leftovers(folder / name)
    with suppress(OSError):
        folder.rmdir()


def _remove_leftovers(path: Path) -> None:
    if not is_remote(path):
        ours = re.compile(re.escape(path.name).join((r"\.", r"\.[0-9a-f]+\.tmp")))
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if ours.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)


def file_digest(path: Path) -> str | None:
    """Return the SHA-256 of a file, None if it does not exist. Raises `UserError` if it cannot be read."""
    with report_read_errors(path):
        try:
            with open_regular(path) as file:
                return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
        except FileNotFoundError:
            return None


def require_store(path: Path) -> None:
    """Raise `UserError` if a local path is not a store, before torch and zarr are imported to open it."""
    try:
        if not is_remote(path):
            (path / "zarr.json").lstat()
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise UserError(NOT_A_STORE.format(path=path)) from problem
    except OSError:  # `Store.open` reports it
        return


@contextmanager
def report_read_errors(path: Path) -> Iterator[None]:
    """Turn the errors that reading a file of a store may raise into a `UserError`.

    Its text depends on whether the system refuses to read the file or the content is not what was written.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as problem:
        # An OSError without errno is pyarrow's and means damage; its subclasses without one come from object storage.
        refused = isinstance(problem, OSError) and (problem.errno or type(problem) is not OSError)
        if refused and not isinstance(problem, FileNotFoundError):
            reason = os.strerror(problem.errno) if isinstance(problem, OSError) and problem.errno else problem
            raise UserError(f"{path} cannot be read ({reason}). Fix this and try again.") from problem
        raise UserError(
            f"{path} is missing or damaged. Restore it or rerun the extraction, after `sail-extract verify --discard` "
            "if it is a file of features."
        ) from problem


@contextmanager
def report_write_errors(path: Path, *, during_run: bool = False, has_out: bool = True) -> Iterator[None]:
    """Turn an `OSError` of writing a file or folder into a `UserError`.

    Args:
        path: The file or folder that is written.
        during_run: The block also reads other files. Only errors that are certainly about writing `path` are turned
            into a `UserError`: a full or read-only disk, missing permission under `path`, or a `path` that has
            disappeared.
        has_out: Whether the command has an option --out, which the message then names.
    """
    try:
        yield
    except OSError as problem:
        if problem.errno in _FULL:
            raise UserError(
                f"No space is left for {path} ({problem.strerror}). Free some and rerun the same command; committed "
                "work is kept."
            ) from problem
        if problem.errno == errno.EIO:
            raise UserError(
                f"{problem.filename or path} cannot be read or written ({problem.strerror}). Check the disk and rerun "
                "the same command; committed work is kept."
            ) from problem
        if during_run and isinstance(problem, FileNotFoundError) and not path.exists():
            raise UserError(f"{path} has disappeared. Restore it and rerun the same command.") from problem
        denied = problem.errno in _FORBIDDEN and Path(str(problem.filename)).is_relative_to(path)
        if during_run and not denied and problem.errno != errno.EROFS:  # nothing but a write fails with that
            raise
        what, remedy = (problem.filename, "Change its permissions") if denied else (path, "Correct this")
        if has_out:
            remedy = f"{remedy} or pass another --out" if denied else "Pass another --out"
        reason = problem.strerror or problem
        raise UserError(f"{what} cannot be written ({reason}). {remedy}.") from problem
