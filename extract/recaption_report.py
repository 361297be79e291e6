"""What a join of caption tables came to: kept beside the index, and printed."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sail_align.extract.files import canonical_json, write_atomically

REPORT = "recaptions.json"


@dataclass(frozen=True)
class RecaptionReport:
    """Counts of images and of caption rows.

    Every caption row is one of `joined`, `no_image`, `duplicates` (of a row before it) and `empty` (without URL or
    without caption). `captions` counts the images that have each caption; `nameless` images have no URL to join by.
    """

    field: str
    tables: list[list[str]]  # name, SHA-256
    images: int
    nameless: int
    found: int
    captions: dict[str, int]
    rows: int
    joined: int
    no_image: int
    duplicates: int
    empty: int

    @classmethod
    def read(cls, folder: Path) -> "RecaptionReport | None":
        """Read the report of an index, None if no captions were joined."""
        try:
            return cls(**json.loads((folder / REPORT).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Keep the report beside an index."""
        write_atomically(folder / REPORT, canonical_json(asdict(self)))

    def lines(self) -> Iterator[str]:
        """Yield the report for people."""
        captions = sum(self.captions.values())
        nameless = f"; {self.nameless:,} have no {self.field}" if self.nameless else ""
        yield (
            f"recaptions: {self.found:,} of {self.images:,} images ({self.found / self.images:.1%}) found captions by "
            f"{self.field}, {captions / max(self.found, 1):.2f} each{nameless}"
        )
        yield f"  images by caption: {', '.join(f'{name} {count:,}' for name, count in self.captions.items())}"
        yield f"  caption rows: {self.rows:,} read, {self.joined:,} joined, {self.rows - self.joined:,} dropped:"
        yield (
            f"    {self.no_image:,} no such image, {self.duplicates:,} with the {self.field} of a row before, "
            f"{self.empty:,} empty"
        )
