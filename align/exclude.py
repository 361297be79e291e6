"""Rows that are left out of a fit by their keys."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sail_align.align.data import Rows
from sail_align.extract.errors import UserError
from sail_align.extract.files import canonical_json
from sail_align.extract.index import FILE_ROWS
from sail_align.extract.store import Store


@dataclass(frozen=True)
class Exclusions:
    """Keys of rows that are never served and never held out, such as near-duplicates of evaluation images."""

    keys: pa.Array

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "Exclusions":
        """Read lists with one key a line; what follows a tab is for people, as in those of `sail-extract overlap`.

        Raises:
            UserError: A file cannot be read as text.
        """
        keys: set[str] = set()
        for path in paths:
            try:
                lines = path.read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as problem:
                reason = problem.strerror if isinstance(problem, OSError) else "it is not UTF-8 text"
                raise UserError(
                    f"{path} cannot be read ({reason}); give --exclude a file with a key in each line."
                ) from problem
            keys.update(key for line in lines if (key := line.split("\t")[0].rstrip("\r")))
        return cls(pa.array(sorted(keys), pa.string()))

    def rows(self, store: Store) -> Rows:
        """Return the rows of a store that are excluded."""
        excluded = np.zeros(store.rows, dtype=np.bool_)
        for start in range(0, store.rows, FILE_ROWS) if len(self.keys) else ():
            stop = min(start + FILE_ROWS, store.rows)
            column = store.index(["key"], start, stop)["key"]
            excluded[start:stop] = pc.is_in(column, value_set=self.keys).to_numpy()
        return excluded

    def record(self) -> dict[str, Any]:
        """Return what settings keep of the list, so that a run goes on only with the same; nothing if it is empty."""
        if not len(self.keys):
            return {}
        digest = hashlib.sha256(canonical_json(self.keys.to_pylist())).hexdigest()
        return {"excluded_keys": len(self.keys), "excluded_sha256": digest}
