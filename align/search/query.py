"""Queries: texts, pictures and rows that are added and subtracted."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from sail_align.extract.errors import UserError

MOST_TERMS = 16
MOST_CHARACTERS = 2_000
KEY = "key:"
_OPERATOR = re.compile(r"(?:^|\s)([+-])(?=\s|$)")

Space = Literal["corrected", "aligned", "frozen"]
"""A kind of similarity.

corrected: hub-corrected similarities of texts and images; only for queries of texts, and runs with a correction.
aligned: cosines of embeddings.
frozen: cosines of the image encoder's features, before the heads; only for queries without texts.
"""
SPACES: tuple[Space, ...] = ("corrected", "aligned", "frozen")


@dataclass(frozen=True, eq=False)
class Term:
    """One part of a query, which is added (`sign` 1) or subtracted (−1).

    Attributes:
        value: A text, a picture, or the key of a row.
        kind: Which of these it is.
        sign: 1 or −1.
    """

    value: str | Image.Image
    kind: Literal["text", "image", "key"]
    sign: int = 1


def parse_query(text: str) -> list[Term]:
    """Return the terms of a query such as `horse + stripes - key:0041.jpg`.

    Operators have a space on both sides, unlike hyphens in words. A text or a key in double quotes is taken as it is.

    Raises:
        UserError: The query is empty or too long, or an operator has nothing after it.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"The query has {len(text):,} characters, expected at most {MOST_CHARACTERS:,}. Shorten it.")
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise UserError("The query is invalid: it has half of a surrogate pair. Correct it.") from problem
    terms = []
    for sign, part in _split(text):
        is_key = part.startswith(KEY)
        value = part.removeprefix(KEY) if is_key else part
        value = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
        if not value.strip():
            raise UserError(f"The query {text!r} is invalid: a term is empty. Write something like 'horse + stripes'.")
        terms.append(Term(value, "key" if is_key else "text", sign))
    if len(terms) > MOST_TERMS:
        raise UserError(f"The query has {len(terms)} terms, expected at most {MOST_TERMS}. Shorten it.")
    return terms


def name_key(key: str) -> str:
    """Return the term of a query that names a row by its key."""
    return f'{KEY}"{key}"' if _OPERATOR.search(key) or key != key.strip() else f"{KEY}{key}"


def require_terms(terms: Sequence[Term]) -> None:
    """Raise `UserError` if a query has no terms."""
    if not terms:
        raise UserError("The query is empty. Give a text, such as 'two dogs in snow', or a picture.")


def _split(text: str) -> list[tuple[int, str]]:
    """Return the signs and texts of the terms. Operators in double quotes are left alone."""
    if not text.strip():
        return []
    parts: list[tuple[int, str]] = []
    start, sign = 0, 1
    for found in _OPERATOR.finditer(text):
        if text.count('"', 0, found.start()) % 2 == 1 and '"' in text[found.end() :]:
            continue
        if parts or text[: found.start()].strip():
            parts.append((sign, text[start : found.start()].strip()))
        sign, start = (1 if found[1] == "+" else -1), found.end()
    return [*parts, (sign, text[start:].strip())]
