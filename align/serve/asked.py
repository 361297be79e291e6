"""What a URL of the page asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self
from urllib.parse import urlencode

from sail_align.align.search.query import Term, name_key, parse_query
from sail_align.align.search.results import Where
from sail_align.align.serve.pictures import Uploads
from sail_align.extract.errors import UserError

COUNTS = (24, 60, 120)
MOST_PICTURES, MOST_LABELS, MOST_CHARACTERS = 8, 64, 2_000


@dataclass(frozen=True)
class Asked:
    """A search, as its URL states it.

    Attributes:
        q: The query as text.
        picture: Names of pictures that were given.
        space: The space, "" for the default.
        label: See `Where`; so for `caption`, `split` and `dataset`.
        count: Number of results.
        duplicates: "1" keeps near-duplicates.
        labels: Labels for the picture of the query, separated by commas.
    """

    q: str = ""
    picture: tuple[str, ...] = ()
    space: str = ""
    label: str = ""
    caption: str = ""
    split: str = ""
    dataset: str = ""
    count: int = COUNTS[0]
    duplicates: str = ""
    labels: str = ""

    @classmethod
    def parse(cls, given: Mapping[str, Sequence[str]]) -> Self:
        """Read the parameters of a URL, without opening pictures.

        Raises:
            UserError: A value is invalid.
        """
        texts = {name: given[name][-1].strip() for name in cls._texts() if given.get(name)}
        for name, text in texts.items():
            if len(text) > MOST_CHARACTERS:
                raise UserError(f"{name} has {len(text):,} characters, expected at most {MOST_CHARACTERS:,}.")
        count = (given.get("count") or [str(COUNTS[0])])[-1]
        if not count.isascii() or not count.isdecimal() or len(count) > 6:
            raise UserError(f"count is invalid: got {count[:50]!r}, expected a whole number from 1 on.")
        pictures = tuple(dict.fromkeys(given.get("picture", ())))
        if len(pictures) > MOST_PICTURES:
            raise UserError(f"The query has {len(pictures)} pictures, expected at most {MOST_PICTURES}. Remove some.")
        asked = cls(**texts, picture=pictures, count=int(count))
        if len(asked.label_names) > MOST_LABELS:
            raise UserError(f"There are {len(asked.label_names)} labels, expected at most {MOST_LABELS}. Remove some.")
        return asked

    @staticmethod
    def _texts() -> tuple[str, ...]:
        return ("q", "space", "label", "caption", "split", "dataset", "duplicates", "labels")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is searched."""
        return not self.q and not self.picture

    @property
    def is_one_picture(self) -> bool:
        """Whether the query is one picture or one row, which labels can be compared with."""
        if self.picture:
            return len(self.picture) == 1 and not self.q
        try:
            return [(term.kind, term.sign) for term in parse_query(self.q)] == [("key", 1)]
        except UserError:
            return False

    @property
    def label_names(self) -> list[str]:
        """The labels for the picture of the query."""
        return list(dict.fromkeys(name.strip() for name in self.labels.split(",") if name.strip()))

    @property
    def has_filters(self) -> bool:
        """Whether filters, or other choices than the defaults, are set."""
        return replace(self, q="", picture=(), labels="") != type(self)()

    @property
    def where(self) -> Where:
        """The filters."""
        return Where(self.label or None, self.caption or None, self.split or None, self.dataset or None)

    def terms(self, uploads: Uploads) -> list[Term]:
        """Return the terms of the query. Raises `UserError` if it is invalid, or a picture is no longer here."""
        return [*parse_query(self.q), *(Term(uploads.open(name), "image") for name in self.picture)]

    def url(self, **changes: Any) -> str:
        """Return the URL of this search with other values; values like the defaults are left out."""
        changed, default = replace(self, **changes), type(self)()
        values = [("picture", name) for name in changed.picture]
        for name in (*self._texts(), "count"):
            if (value := getattr(changed, name)) != getattr(default, name):
                values.append((name, value))
        return f"/?{urlencode(values)}" if values else "/"

    def similar(self, key: str) -> str:
        """Return the URL of a search for pictures like that of a row."""
        space = self.space if self.space == "frozen" else ""
        return self.url(q=name_key(key), picture=(), labels="", space=space)

    def with_row(self, key: str, sign: str) -> str:
        """Return the URL of this search with a row added (`+`) or subtracted (`-`)."""
        return self.url(
            q=f"{self.q} {sign} {name_key(key)}".strip(),
            labels="",
            space="" if self.space == "corrected" else self.space,
        )
