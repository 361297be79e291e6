"""Decisions about columns of values: which one holds captions."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sail_align.extract.errors import UserError, listing

Columns = Mapping[str, Sequence[Any]]
"""Some values of each column: texts, lists of texts, or None."""

MOST_VALUES = 200
"""Values of a column that are looked at."""
FEW = 0.1
"""Share of distinct values up to which a column holds categories instead of captions."""
_USUAL_CAPTIONS = re.compile(
    "caption|text|title|descri|sentence|prompt|comment|summary|story|alt|raw|short|long|(^|_)(en|de|fr|es)$"
)
_LETTERS = re.compile(r"[^\W\d_]")
_WITHOUT_SPACES = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]{4}")
"""Some letters of scripts that write no spaces between words."""


class UndecidedError(UserError):
    """The data fit several descriptions, or none, until the user passes an option."""


@dataclass(frozen=True)
class Choices:
    """Options with which users decide what the data leave open.

    Attributes:
        image_column: Column with the images' paths.
        caption_columns: Columns with captions.
        images: Folder of the images.
    """

    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    images: Path | None = None

    def given(self) -> Iterator[str]:
        """Yield the options that were passed, as a command line spells them."""
        for name in ("image_column", "caption_columns", "images"):
            if getattr(self, name):
                yield f"--{name.replace('_', '-')}"

    def require_unused(self, options: Collection[str], what: str) -> None:
        """Raise `UserError` if one of these options was passed, which has no effect on the data."""
        for option in self.given():
            if option in options:
                raise UserError(f"{option} has no effect: {what}. Omit it.")


@dataclass(frozen=True)
class Understood:
    """What a path holds, as the fields of a manifest.

    Attributes:
        what: The kind of data, in words.
        root: Folder that the paths in `source` are relative to.
        source: Fields of the manifest's source, without `root`.
        task: Fields of the manifest's task, for data with classes.
        notes: Further facts for the user.
        hints: Lines of the manifest that are commented out.
    """

    what: str
    root: Path
    source: dict[str, Any]
    task: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


def choose_captions(columns: Columns, choices: Choices, where: object) -> list[str]:
    """Return the columns with captions: the user's choice, else those that look like it.

    These are the columns of texts with words. If several are, the columns of usual names.

    Raises:
        UserError: A chosen column does not exist.
        UndecidedError: Several columns may hold captions.
    """
    for name in choices.caption_columns:
        if name not in columns:
            raise UserError(
                f"--caption-columns is invalid: {where} has no column of texts {name!r}. {all_columns(columns)}"
            )
    if choices.caption_columns:
        return list(choices.caption_columns)
    candidates = [name for name, values in columns.items() if holds_captions(values)]
    if len(candidates) <= 1:
        return candidates
    if usual := [name for name in candidates if _USUAL_CAPTIONS.search(name.lower())]:
        return usual
    raise UndecidedError(
        f"{where} has several columns that may be captions: {listing(candidates)}. Pass --caption-columns with one or "
        f"some of them, such as --caption-columns {candidates[0]}."
    )


def all_columns(columns: Collection[str]) -> str:
    """Return a sentence that lists columns."""
    return f"Its columns of texts are: {listing(columns) or 'none'}."


def holds_captions(values: Sequence[Any]) -> bool:
    """Return whether values are texts of several words, most of them different."""
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    filled = [text.strip() for text in texts if isinstance(text, str) and text.strip()][:MOST_VALUES]
    worded = sum(map(_is_worded, filled))
    varied = len(set(filled)) > FEW * len(filled) or len(filled) < 2 / FEW
    return bool(filled) and 2 * worded >= len(filled) and varied


def _is_worded(text: str) -> bool:
    if "://" in text.split()[0]:
        return False
    words = sum(bool(_LETTERS.search(word)) for word in text.split())
    return words >= 2 or bool(_WITHOUT_SPACES.search(text))


def name_captions(columns: Sequence[str]) -> dict[str, str]:
    """Return columns by the names of their captions: `raw` for a single one, else one like that of the column."""
    names: dict[str, str] = {}
    for column in columns:
        stem = column.removeprefix("json:").removesuffix(".txt").lower()
        name = re.sub("[^a-z0-9_-]+", "-", stem).strip("-_") or "caption"
        while name in names:
            name += "-2"
        names[name] = column
    return {"raw": columns[0]} if len(columns) == 1 else names
