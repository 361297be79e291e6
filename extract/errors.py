"""Errors with a message for the user: what is wrong, the value, and what to do."""

import difflib
import importlib
import re
import shlex
from collections.abc import Iterable
from typing import Any

LONGEST_NAME = 80
"""Characters of a name that a list of names shows."""


class UserError(Exception):
    """A mistake that the user can correct. Commands print its message and exit with code 2."""


class StoreExistsError(UserError):
    """A store cannot be created because it exists."""


class WorkersFailedError(Exception):
    """Work is unfinished because workers failed. Each failure was reported before. Commands exit with code 1."""


def import_extra(name: str, message: str) -> Any:
    """Import a module of an optional package. Raises `UserError` with this message if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        raise UserError(message) from problem


def nearest(value: str, known: Iterable[str]) -> str | None:
    """Return the known value most similar to an unknown one, None if none is similar."""
    return next(iter(difflib.get_close_matches(value, list(known), n=1)), None)


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """Return the end of a message that suggests the known value most similar to an unknown one; "" if none is."""
    near = nearest(value, known)
    return f" Did you mean {near!r}?" if near else ""


def listing(names: Iterable[str], most: int = 20) -> str:
    """Return names for a message: the first ones, without the ends of long ones."""
    names = list(names)
    shown = ", ".join(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def format_bytes(size: float) -> str:
    """Return a size with three digits: 8.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


def printable(text: str) -> str:
    """Return a text for a terminal: escape codes, and marks that reverse the direction of writing, become visible."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: ascii(found[0])[1:-1], text)


def command(*words: object) -> str:
    """Return a command line for a message. A shell splits it into exactly these words."""
    return shlex.join(map(str, words))
