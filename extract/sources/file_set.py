"""Files under a folder, at absolute paths, or behind URLs (s3://, gs://, https://, hf:// …), all by name."""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from sail_align.extract.errors import UserError

READ_AHEAD = 8 << 20
"""Bytes a request, where a file at a URL is read through."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class FileSet:
    """The files that patterns name. A file's name is its path under the folder, its absolute path, or its URL."""

    def __init__(self, root: Path):
        self.root = root

    def find(self, patterns: str | Sequence[str]) -> list[str]:
        """Return the names that patterns match, in the patterns' order and sorted within each.

        A pattern is a name, a glob (`*`, `?`, `[…]`), or holds ranges: `{00000..00331}`. What a range names at a URL is
        not looked for here: it may be thousands of requests.

        Raises:
            UserError: A pattern matches no file, or no installed package knows this kind of URL.
        """
        given = [patterns] if isinstance(patterns, str) else patterns
        names = chain.from_iterable(map(self._matches, chain.from_iterable(map(_expand, given))))
        return list(dict.fromkeys(names))

    def local(self, name: str) -> Path | None:
        """Return the path of a file; None for a URL."""
        return None if "://" in name else self.root / name

    def exists(self, name: str) -> bool:
        """Say whether a file is there; for a URL this is a request."""
        if path := self.local(name):
            return path.is_file()
        files, there = _remote(name)
        return bool(files.isfile(there))

    def open(self, name: str) -> BinaryIO:
        """Open a file to be read; at a URL, much of what is skipped is transferred as well.

        Raises:
            UserError: It is not there.
        """
        try:
            if path := self.local(name):
                return path.open("rb")
            files, there = _remote(name)
            # Read ahead, or the default of some protocols transfers a tar twice over while its headers are read.
            return cast(BinaryIO, files.open(there, "rb", block_size=READ_AHEAD, cache_type="readahead"))
        except FileNotFoundError as problem:
            raise UserError(f"{self.local(name) or name} is not there; correct source.files.") from problem

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes start … stop − 1 of a file, fewer where it ends before.

        Raises:
            UserError: It is not there.
        """
        try:
            if path := self.local(name):
                with path.open("rb", buffering=0) as file:
                    file.seek(start)
                    return file.read(stop - start)
            files, there = _remote(name)
            return bytes(files.cat_file(there, start=start, end=stop))
        except FileNotFoundError as problem:
            raise UserError(f"{self.local(name) or name} is not there any more; put it back and go on.") from problem

    def _matches(self, pattern: str) -> list[str]:
        if "://" in pattern:
            files, path = _remote(pattern)
            if "*" not in pattern and "[" not in pattern:  # a `?` in a URL begins its query
                return [pattern]
            names = sorted(files.unstrip_protocol(found) for found in files.glob(path))
        elif (self.root / pattern).is_file():  # also a name that holds a bracket
            return [pattern]
        else:
            anchor = Path(pattern).anchor  # "" unless the pattern is an absolute path
            base = Path(anchor) if anchor else self.root
            found = sorted(path for path in base.glob(pattern.removeprefix(anchor)) if path.is_file())
            names = [str(path) if anchor else path.relative_to(base).as_posix() for path in found]
        if not names:
            raise UserError(f"No file {self.root.resolve() / pattern}; correct source.files or set --data-root.")
        return names


def _expand(pattern: str) -> list[str]:
    """Return a pattern once for each number of its ranges, with as many digits as the first number is written in."""
    if not (given := _RANGE.search(pattern)):
        return [pattern]
    first, last = given.groups()
    numbers = range(int(first), int(last) + 1)
    filled = (pattern[: given.start()] + f"{number:0{len(first)}}" + pattern[given.end() :] for number in numbers)
    return [each for with_number in filled for each in _expand(with_number)]


def _remote(url: str) -> tuple[Any, str]:
    """Return the file system behind a URL, and the path there.

    Raises:
        UserError: No installed package knows this kind of URL.
    """
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
    except (ImportError, ValueError) as problem:
        raise UserError(f"{url} cannot be opened: {' '.join(str(problem).split())}.") from problem
    return files, path
