"""Filters and results of a search."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sail_align.align.search.query import Space
from sail_align.align.search.rows import RowFacts


@dataclass(frozen=True)
class Where:
    """A filter of rows. None allows all.

    Attributes:
        label: Name of a class, or its number.
        caption: Text that one of the captions contains, case-insensitively.
        split: Rows that the run was trained on, or held out.
        dataset: Name of the data set of a store.
    """

    label: str | None = None
    caption: str | None = None
    split: str | None = None
    dataset: str | None = None


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        score: Cosine, or corrected similarity.
        store: Number of the store.
        facts: The row.
        label: Name of its class; "" if there is none.
        path: File of the picture; None if it is in an archive, or not found.
        copies: Number of near-duplicates among the best rows, which are left out.
    """

    score: float
    store: int
    facts: RowFacts
    label: str
    path: Path | None
    copies: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the result, ready for JSON."""
        facts = self.facts
        return {
            "score": round(self.score, 6),
            "key": facts.key,
            "row": facts.row,
            "store": self.store,
            "image": facts.image,
            "path": self.path and str(self.path),
            "label": self.label or None,
            "captions": facts.captions,
            "near_duplicates": self.copies,
        }


@dataclass(frozen=True)
class Found:
    """The results of a query, best first.

    Attributes:
        hits: The results.
        space: The space that was searched.
        rows: Number of rows that were compared.
    """

    hits: list[Hit]
    space: Space
    rows: int
