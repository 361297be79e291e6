"""What an index was made from: how many rows each part of the source gave, and the stamps of its files.

The record lies beside the index, outside every digest. While the index is being built it also says how far that has
come; afterwards it tells whether the source's files are still those that were read.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sail_align.extract.files import canonical_json, write_atomically
from sail_align.extract.sources.base import Part

Stamp = tuple[str, int, int]
"""A file's name, size in bytes, and time of last change in nanoseconds; −1 for a file that is not there.

A part without files is known by its own name."""

RECORD = "sources.json"


@dataclass
class IndexRecord:
    """`rows` and `stamps` go by the source's parts, `digests` by the index files that are written.

    `made_of` is a digest of what the index is to hold. `tables` are the stamps of the caption tables that were joined.
    """

    made_of: str
    stamps: list[list[Stamp]]
    rows: list[int]
    digests: list[str]
    tables: list[Stamp]
    complete: bool = False

    @classmethod
    def begin(cls, made_of: Any, parts: Sequence[Part]) -> "IndexRecord":
        """Return the record of an index of which nothing is written."""
        digest = hashlib.sha256(canonical_json(made_of)).hexdigest()
        return cls(digest, [stamps(part.files) or [(part.name, -1, -1)] for part in parts], [0] * len(parts), [], [])

    @classmethod
    def read(cls, folder: Path) -> "IndexRecord | None":
        """Read the record of an index, None if there is none that can be read."""
        try:
            content = json.loads((folder / RECORD).read_bytes())
            content["stamps"] = [_stamps(files) for files in content["stamps"]]
            content["tables"] = _stamps(content["tables"])
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Write the record; call it after the index file that it tells of."""
        write_atomically(folder / RECORD, canonical_json(asdict(self)))

    def same_source(self, other: "IndexRecord") -> bool:
        """Whether both are of one index, out of files with the same stamps."""
        return self.made_of == other.made_of and self.stamps == other.stamps


def stamps(files: Iterable[Path]) -> list[Stamp]:
    """Return the files' stamps. Folders do not count, so that the data may be moved as a whole."""
    found = []
    for file in files:
        try:
            status = file.stat()
            found.append((file.name, status.st_size, status.st_mtime_ns))
        except FileNotFoundError:
            found.append((file.name, -1, -1))
    return found


def _stamps(content: list[list[Any]]) -> list[Stamp]:
    return [(name, size, changed) for name, size, changed in content]
