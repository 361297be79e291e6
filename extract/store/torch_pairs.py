"""Rows of a store as a map-style data set of torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sail_align.extract.data import Status
from sail_align.extract.errors import UserError
from sail_align.extract.store.joined import StoredFeatures


class TorchPairs(Dataset[tuple[Tensor, Any]]):
    """Features of images and their captions, for a `DataLoader`.

    A pickled data set holds paths and numbers. The process that loads it opens the store itself.

    Attributes:
        rows: Numbers (N,) int64 of the store's rows that are items.
        captions: Names of the captions.
    """

    def __init__(self, path: Path, image: StoredFeatures, texts: Mapping[str, StoredFeatures], *, one: bool):
        self.captions = tuple(texts)
        self._path, self._image, self._texts, self._one = path, image, dict(texts), one
        ok = np.logical_and.reduce([array.read_status() == Status.OK for array in (image, *texts.values())])
        self.rows = np.flatnonzero(ok)
        if not len(self.rows):
            names = " and ".join(("an image", *(f"caption {name!r}" for name in texts)))
            raise UserError(f"{path} has no row with features of {names}. See `sail-extract status`.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[Tensor, Any]:
        """Return `(image_D, text_D)` or `(image_D, {name: text_D})`, float32. Raises `UserError` if damaged."""
        row = int(self.rows[place])
        texts = {name: _vector(array, row) for name, array in self._texts.items()}
        return _vector(self._image, row), texts[self.captions[0]] if self._one else texts

    def __reduce__(self) -> tuple[Any, ...]:
        encoders = {name: array.node for name, array in self._texts.items()}
        return _open, (self._path, self._image.node, encoders, self._one)

    def __repr__(self) -> str:
        arrays = ", ".join(f"{array.path} ({array.dim:,})" for array in (self._image, *self._texts.values()))
        return f"TorchPairs({len(self):,} rows of {self._path}: {arrays})"


def _open(path: Path, image: str, encoders: Mapping[str, str], one: bool) -> TorchPairs:
    from sail_align.extract.store.store import Store

    store = Store.open(path)
    texts = {name: store.text(name, encoder) for name, encoder in encoders.items()}
    return TorchPairs(path, store.image(image), texts, one=one)


def _vector(array: StoredFeatures, row: int) -> Tensor:
    chunk, place = divmod(row, array.chunk_rows)
    return torch.from_numpy(array.chunk(chunk)[place].astype(np.float32))
