"""Joining of features by key or by position: for each row of a store, the row of each side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sail_align.extract.errors import UserError, listing
from sail_align.extract.exchange.features import Features, Places

KEY_COLUMNS = ("key", "id", "image_path")
"""Columns by which features are joined, the first that all sides have."""


@dataclass(frozen=True)
class Joined:
    """The rows of a store.

    Attributes:
        column: Column of the keys; "" if the join is by position.
        keys: Key of each row.
        places: Row of each side for each row of the store, −1 if the side does not have it. Images are the first side.
        differing: Rows joined by position although their keys differ.
    """

    column: str
    keys: pa.ChunkedArray
    places: tuple[Places, ...]
    differing: int = 0

    def lines(self, sides: Sequence[Features]) -> list[str]:
        """Return lines about how many rows were joined, and which are missing on which side."""
        how = f"by {self.column!r}" if self.column else "by position"
        found = [places >= 0 for places in self.places]
        both = int(np.logical_and.reduce(found).sum())
        lines = [
            f"{both:,} of {len(self.keys):,} rows have {' and '.join(side.label for side in sides)}, joined {how}."
        ]
        for side, has in zip(sides, found, strict=True):
            if missing := int((~has).sum()):
                first = self.keys[int(np.flatnonzero(~has)[0])].as_py()
                lines.append(f"{missing:,} rows have no {side.label}; the first is {first!r}.")
        if self.differing:
            lines.append(
                f"warning: the keys of {self.differing:,} rows differ. Leave --by-position out to join by key."
            )
        return lines

    def to_dict(self, sides: Sequence[Features]) -> dict[str, Any]:
        """Return the numbers of `lines` as JSON-able data."""
        missing = {side.label: int((places < 0).sum()) for side, places in zip(sides, self.places, strict=True)}
        return {"by": self.column or "position", "missing": missing, "differing_keys": self.differing}


def join(sides: Sequence[Features], key_column: str | None = None, *, by_position: bool = False) -> Joined:
    """Join features by key, or by position if asked to.

    The rows of the store are those of the first side, followed by those of the others whose keys it does not have.

    Args:
        sides: The features. Images come first.
        key_column: Column of the keys. By default the first of `KEY_COLUMNS` that all sides have.
        by_position: Row i of each side belongs to row i of the others.

    Raises:
        UserError: A side has no keys, a key occurs twice, no key is on two sides, or the lengths differ.
    """
    column = _key_column(sides, key_column)
    if column is None and (key_column or not (by_position or len(sides) == 1)):
        raise _without_keys(sides, key_column)
    if column is None or by_position:
        return _by_position(sides, column)
    keys = [_unique_keys(side, column) for side in sides]
    rows = keys[0]
    for other in keys[1:]:
        new = other.filter(pc.invert(pc.is_in(other, value_set=_flat(rows))))
        rows = pa.chunked_array([*rows.chunks, *new.chunks], pa.large_string())
    places = tuple(
        pc.fill_null(pc.index_in(rows, value_set=_flat(each)), -1).to_numpy().astype(np.int64) for each in keys
    )
    for side, theirs, where in zip(sides[1:], keys[1:], places[1:], strict=True):
        if not ((places[0] >= 0) & (where >= 0)).any():
            raise UserError(
                f"No key of the {side.label} is one of the images': got {theirs[0].as_py()!r} and "
                f"{keys[0][0].as_py()!r} for the first in column {column!r}. Choose another with --key-column."
            )
    return Joined(column, rows, places)


def _key_column(sides: Sequence[Features], given: str | None) -> str | None:
    candidates = [given] if given else KEY_COLUMNS
    return next((name for name in candidates if all(side.texts and side.texts.has(name) for side in sides)), None)


def _without_keys(sides: Sequence[Features], given: str | None) -> UserError:
    found = [
        f"the {side.label} have {f'the columns {listing(side.texts.names)}' if side.texts else 'no keys'}"
        for side in sides
    ]
    expected = f"column {given!r}" if given else f"a column {', '.join(KEY_COLUMNS[:-1])} or {KEY_COLUMNS[-1]}"
    return UserError(
        f"Features cannot be joined: {', '.join(found)}, expected {expected} on each side. Choose another column with "
        "--key-column, pass tables with --image-keys and --text-keys, or pass --by-position if row i of each belongs "
        "together."
    )


def _by_position(sides: Sequence[Features], column: str | None) -> Joined:
    first = sides[0]
    for side in sides[1:]:
        if side.rows != first.rows:
            raise UserError(
                f"Features cannot be joined by position: got {first.rows:,} {first.label} and {side.rows:,} "
                f"{side.label}, expected equal numbers. Join them by key: pass --image-keys and --text-keys."
            )
    name = column or next((each for each in KEY_COLUMNS if first.texts and first.texts.has(each)), None)
    if name:
        keys = _unique_keys(first, name)
    else:
        numbers = (f"{row:09d}" for row in range(first.rows))
        keys = pa.chunked_array([pa.array(numbers, pa.large_string())])
    others = [side.texts.read(name, side.rows) for side in sides[1:] if name and side.texts and side.texts.has(name)]
    differing = max((pc.sum(pc.not_equal(keys, each)).as_py() or 0 for each in others), default=0)
    return Joined("", keys, (np.arange(first.rows),) * len(sides), differing)


def _unique_keys(side: Features, column: str) -> pa.ChunkedArray:
    if side.texts is None:
        raise ValueError(f"{side.label} have no texts")
    keys = side.texts.read(column, side.rows)
    empty = pc.fill_null(pc.equal(keys, ""), True)
    if pc.any(empty).as_py():
        row = int(np.flatnonzero(empty.to_numpy())[0])
        raise UserError(f"Keys of the {side.label} are invalid: row {row + 1} of {side.texts.where} has none. Add it.")
    if len(keys.unique()) < len(keys):
        counts = keys.value_counts()
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise UserError(
            f"Keys of the {side.label} are invalid: {repeated!r} occurs more than once in {side.texts.where}. Make the "
            "keys unique, or choose another column with --key-column."
        )
    return keys


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
