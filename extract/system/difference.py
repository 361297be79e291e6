"""The first difference of two records, in words."""

from collections.abc import Iterator
from itertools import takewhile, zip_longest
from typing import Any

from sail_align.extract.system.validation import shortened

_ABSENT = object()
_LONGEST_SHOWN = 80
"""Longest part of a text that a message on a difference shows."""


def describe_difference(recorded: Any, now: Any) -> str:
    """Return the first difference of two JSON-able values: the path of the field, its recorded and its present value.

    For example `source.files was 'a.csv' and is now 'b.csv'`. Long values are shortened. Returns "" if there is none.
    """
    found = list(_differences(recorded, now, ""))
    if not found:
        return ""
    field, before, after = found[0]
    more = f" ({len(found) - 1} more differ)" if len(found) > 1 else ""
    return f"{field or 'it'} was {before} and is now {after}{more}"


def _differences(before: Any, after: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield the path, the recorded and the present value of each field that differs; "absent" if there is none."""
    if isinstance(before, dict) and isinstance(after, dict):
        both = {
            f"{path}.{name}" if path else str(name): (before.get(name, _ABSENT), after.get(name, _ABSENT))
            for name in {**before, **after}
        }
    elif isinstance(before, list) and isinstance(after, list):
        both = {f"{path}[{place}]": pair for place, pair in enumerate(zip_longest(before, after, fillvalue=_ABSENT))}
    else:
        if type(before) is not type(after) or before != after:
            yield path, *_shown(before, after)
        return
    for name, (old, new) in both.items():
        yield from _differences(old, new, name)


def _shown(before: Any, after: Any) -> tuple[str, str]:
    """Return two values for a message. Of long texts, the part around the first difference."""
    if isinstance(before, str) and isinstance(after, str) and max(len(before), len(after)) > _LONGEST_SHOWN:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
        start = max(shared - _LONGEST_SHOWN // 4, 0)
        parts = (text[start : start + _LONGEST_SHOWN] for text in (before, after))
        before, after = (f"…{part}" if start else part for part in parts)
    old, new = ("absent" if value is _ABSENT else shortened(value) for value in (before, after))
    return old, new
