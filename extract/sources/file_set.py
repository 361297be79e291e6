"""Files by name: under a folder, at absolute paths, or at URLs (s3://, gs://, https://, hf:// …)."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import open_regular

READ_AHEAD = 8 << 20
"""Bytes per request when a file at a URL is read from start to end."""

MOST_NAMES = 1_000_000
"""Limit on the names that ranges stand for."""

_GLOB = frozenset("*?[")
RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")


@dataclass(frozen=True)
class Fence:
    """The limit of paths that data name: tables, annotations, the rows of a data set, the index of a store.

    A path may not lead out of the data root, nor out of the folder that the manifest names for these files. This is
    decided by its text, in which `..` is resolved. A link in one of these folders may lead anywhere, because only the
    user can have made it.

    Attributes:
        root: The data root.
        is_open: Whether the manifest allows all paths.
    """

    root: Path
    is_open: bool = False

    def path(self, folder: Path, location: str) -> Path:
        """Return the path of a file under a folder that the manifest names.

        Raises:
            UserError: The path leads outside.
        """
        if self.is_open or not (location.startswith("/") or ".." in location):
            return folder / location
        path = os.path.abspath(folder / location)
        inside = is_inside(folder, path) or is_inside(self.root, path)
        # After a link, the system takes `..` for the folder above the link's target: another file than the text says.
        if not inside or (".." in location and os.path.realpath(folder / location) != os.path.realpath(path)):
            raise UserError(
                f"Path {location[:200]!r} is outside the data root {self.root}. Correct the data, or write "
                "`allow_outside: true` in the manifest's source if you trust them."
            )
        return folder / location


class FileSet:
    """Files that a manifest names. A file's name is its path under the folder, its absolute path, or its URL.

    This is the only place where a source opens URLs. Files under the folder can be opened, and others only if the
    manifest names them: a location from the index of a store or from a row of a data set is never a reason to fetch.
    """

    def __init__(self, root: Path):
        self.root = root
        self._named: set[str] = set()

    def find(self, patterns: str | Sequence[str]) -> list[str]:
        """Return the names that the patterns match, in the order of the patterns and sorted within each.

        A pattern is a name, a glob (`*`, `?`, `[…]`), or contains ranges: `{00000..00331}`. The URLs of a range are not
        requested here, because there may be thousands.

        Raises:
            UserError: A pattern matches no file, a range is invalid, or no installed package supports this kind of
                URL.
        """
        given = [patterns] if isinstance(patterns, str) else patterns
        names = [name for expanded in list(_expand(given)) for name in self._matches(expanded)]
        self._named.update(names)
        return list(dict.fromkeys(names))

    def add(self, name: str) -> str:
        """Return the name of a file that the manifest names, which can be opened from now on."""
        self._named.add(name)
        return name

    def local(self, name: str) -> Path | None:
        """Return the path of a file, None for a URL."""
        return None if "://" in name else self.root / name

    def exists(self, name: str) -> bool:
        """Return whether a file exists. For a URL this is a request."""
        self.require_named(name)
        if path := self.local(name):
            return path.is_file()
        filesystem, remote_path = _resolve_url(name)
        return bool(filesystem.isfile(remote_path))

    def open(self, name: str, *, ahead: bool = True) -> BinaryIO:
        """Open a file for reading.

        Args:
            name: Name of the file.
            ahead: Whether a file at a URL is read from start to end. Much of the data that is skipped is then
                transferred too. Otherwise each reading is a request.

        Raises:
            UserError: The file does not exist, or is outside the folder and the manifest does not name it.
        """
        self.require_named(name)
        try:
            if path := self.local(name):
                return open_regular(path)
            filesystem, remote_path = _resolve_url(name)
            # The default cache of some protocols transfers a tar twice while its headers are read.
            cache_type = "readahead" if ahead else "none"
            file = filesystem.open(remote_path, "rb", block_size=READ_AHEAD, cache_type=cache_type)
            return cast(BinaryIO, file)
        except FileNotFoundError as problem:
            raise UserError(f"{self.local(name) or name} is missing. Correct source.files.") from problem

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`, fewer if the file ends before.

        Raises:
            UserError: As `open`.
        """
        self.require_named(name)
        try:
            if path := self.local(name):
                with open_regular(path) as file:
                    stop = min(stop, file.seek(0, 2))  # a damaged header may declare any size, which `read` allocates
                    file.seek(start)
                    return file.read(max(stop - start, 0))
            filesystem, remote_path = _resolve_url(name)
            return bytes(filesystem.cat_file(remote_path, start=start, end=stop))
        except FileNotFoundError as problem:
            raise UserError(f"{self.local(name) or name} is missing. Restore it and rerun the command.") from problem

    def require_named(self, name: str) -> None:
        """Raise `UserError` unless a file or the tar that it belongs to is under the folder or in the manifest."""
        stem = name.removesuffix(".parquet")
        if not {name, stem, f"{stem}.tar"} & self._named and ("://" in name or not is_inside(self.root, name)):
            raise UserError(f"{name[:200]} cannot be opened: the manifest does not name it. Correct source.files.")

    def _matches(self, pattern: str) -> list[str]:
        if "://" in pattern:
            filesystem, remote_path = _resolve_url(pattern)
            if "*" not in pattern and "[" not in pattern:  # a `?` in a URL begins its query
                return [pattern]
            names = sorted(filesystem.unstrip_protocol(found) for found in filesystem.glob(remote_path))
        elif any(path.is_file() for path in matches(self.root, pattern, globs=False)):  # also a name with a bracket
            return [pattern]
        else:
            found = sorted(path for path in matches(self.root, pattern) if path.is_file())
            is_absolute = Path(pattern).is_absolute()
            names = [str(path) if is_absolute else path.relative_to(self.root).as_posix() for path in found]
            require_utf8(self.root, names)
        if not names:
            raise UserError(
                f"No file matches {self.root.resolve() / pattern}. Correct source.files or set --data-root."
            )
        return names


def matches(root: Path, pattern: str, *, globs: bool = True) -> Iterator[Path]:
    """Yield the files and folders that a pattern matches: under a folder, or anywhere if it is an absolute path.

    Args:
        root: The folder.
        pattern: A name, or a glob (`*`, `?`, `[…]`, `**` for any folders).
        globs: Whether it may be a glob. A name that exists is not a glob, even with a bracket.

    Raises:
        UserError: The pattern is not valid.
    """
    try:
        if os.path.lexists(root / pattern):
            yield root / pattern
        elif globs and not _GLOB.isdisjoint(pattern):
            anchor = Path(pattern).anchor  # pathlib has no absolute globs
            yield from (Path(anchor) if anchor else root).glob(pattern.removeprefix(anchor))
    except (ValueError, NotImplementedError, OSError) as problem:
        raise UserError(f"Pattern {pattern[:200]!r} is invalid: {problem}. Correct source.files.") from problem


def is_inside(folder: Path, location: str) -> bool:
    """Return whether a path, taken from a folder, lies in it by its text."""
    path, base = os.path.abspath(folder / location), os.path.abspath(folder)
    return path == base or path.startswith(os.path.join(base, ""))


def require_utf8(folder: Path, names: Iterable[str]) -> None:
    """Require that names of files in a folder are UTF-8, as the index of a store and JSON are.

    Raises:
        UserError: A name is not UTF-8.
    """
    for name in names:
        if not name.isascii():
            try:
                name.encode()
            except UnicodeEncodeError as problem:
                shown = os.fsencode(folder / name).decode("utf-8", "backslashreplace")
                raise UserError(f"File name {shown} is invalid: it is not UTF-8. Rename the file.") from problem


def _expand(patterns: Sequence[str]) -> Iterator[str]:
    """Yield each pattern once for each number of its ranges, padded with zeros to the width of the first number.

    Raises:
        UserError: A range ends before it begins, or the ranges stand for more than `MOST_NAMES` names.
    """
    total = 0
    for pattern in patterns:
        fixed, ranges = RANGE.split(pattern)[::3], RANGE.findall(pattern)
        counts = [int(last[:20]) - int(first[:20]) + 1 for first, last in ranges]
        total += prod(counts)
        if min(counts, default=1) < 1:
            raise UserError(f"Range in {pattern[:200]!r} is invalid: it ends before it begins. Correct source.files.")
        if total > MOST_NAMES or any(len(last) > 20 for _, last in ranges):
            raise UserError(
                f"Range in {pattern[:200]!r} is invalid: got more than {MOST_NAMES:,} names. Correct source.files."
            )
        numbers = (
            [f"{number:0{len(first)}}" for number in range(int(first), int(first) + count)]
            for (first, _), count in zip(ranges, counts, strict=True)
        )
        for chosen in product(*numbers):
            yield "".join(chain.from_iterable(zip(fixed, (*chosen, ""), strict=True)))


def _resolve_url(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        UserError: No installed package supports this kind of URL.
    """
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(url)
    except (ImportError, ValueError) as problem:
        raise UserError(f"{url} cannot be opened: {' '.join(str(problem).split())}.") from problem
    return filesystem, path
