"""The rows of a store's index: keys, captions, labels and locations, read as needed and kept within bounds."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sail_align.extract.store.index import CAPTION, GROUP_ROWS
from sail_align.extract.store.store import Store

MOST_BYTES = 192 << 20
"""Bytes of rows that are kept in memory."""


@dataclass(frozen=True)
class RowFacts:
    """One row of the index.

    Attributes:
        row: Number of the row in its store.
        key: Its key.
        image: Location of the picture; "" if there is none.
        label: Index of its class; −1 for none.
        captions: Texts by the name of the caption.
    """

    row: int
    key: str
    image: str
    label: int
    captions: dict[str, str]


class RowReader:
    """Reads rows of a store, `GROUP_ROWS` at a time. The latest ones are kept. It may be used by several threads."""

    def __init__(self, store: Store, most_bytes: int = MOST_BYTES):
        self.store = store
        self._most_bytes = most_bytes
        self._columns = ["key", "image", "label", *(CAPTION + name for name in store.captions)]
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def facts(self, row: int) -> RowFacts:
        """Return one row."""
        table = self._group(row // GROUP_ROWS)
        fields: dict[str, Any] = {name: table[name][row % GROUP_ROWS].as_py() for name in self._columns}
        texts = {name: fields[CAPTION + name] for name in self.store.captions}
        captions = {name: text for name, text in texts.items() if text is not None}
        return RowFacts(row, fields["key"], fields["image"], fields["label"], captions)

    def find(self, key: str) -> int | None:
        """Return the number of the row with a key, None if there is none."""
        for start, table in self._groups():
            place = pc.index(table["key"], pa.scalar(key, pa.string())).as_py()
            if place >= 0:
                return int(start + place)
        return None

    def with_text(self, text: str) -> NDArray[np.bool_]:
        """Return the rows (N,) with a text in a caption, case-insensitively."""
        return self._mask(
            lambda table: [
                pc.match_substring(table[CAPTION + name], text, ignore_case=True).fill_null(False).to_numpy()
                for name in self.store.captions
            ]
        )

    def with_label(self, label: int) -> NDArray[np.bool_]:
        """Return the rows (N,) of a label."""
        return self._mask(lambda table: [pc.equal(table["label"], label).to_numpy()])

    def _mask(self, matches: Any) -> NDArray[np.bool_]:
        found = np.zeros(self.store.rows, np.bool_)
        for start, table in self._groups():
            for part in matches(table):
                found[start : start + len(table)] |= part
        return found

    def _groups(self) -> Iterator[tuple[int, pa.Table]]:
        for start in range(0, self.store.rows, GROUP_ROWS):
            yield start, self._group(start // GROUP_ROWS)

    def _group(self, number: int) -> pa.Table:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        start = number * GROUP_ROWS
        table = self.store.index(self._columns, start, min(start + GROUP_ROWS, self.store.rows)).combine_chunks()
        with self._lock:
            self._kept[number] = table
            while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > self._most_bytes:
                self._kept.popitem(last=False)
        return table
