"""The arrays of several encoders of one store, read as one array whose features are concatenated."""

from collections import Counter
from collections.abc import Container, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sail_align.extract.data import Status
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.store.features import FeatureArray


class JoinedArray:
    """Features of several encoders for the same rows, side by side: (rows, sum of their dims) float16.

    It is read like a `FeatureArray`, and cannot be written. Nothing is copied on disk. A row is ok if it is ok in each
    part; otherwise its status is that of the first part in which it is not.

    Args:
        parts: At least two arrays of one store, of the images or of one caption.

    Attributes:
        parts: The arrays, in the order of their features.
        identity: The joined identity of the encoders.
        path: Path of the parts, with the names of the encoders joined by "+".
    """

    def __init__(self, parts: Sequence[FeatureArray]):
        self.parts = tuple(parts)
        self.identity = Identity.joined([part.identity for part in parts])
        first = parts[0]
        modality, _, *caption = first.path.split("/")
        self.path = "/".join([modality, "+".join(part.node for part in parts), *caption])
        self.rows, self.dim = first.rows, sum(part.dim for part in parts)
        self.shard_rows, self.chunk_rows = first.shard_rows, first.chunk_rows

    @property
    def node(self) -> str:
        """Names of the encoders' nodes in the store, joined by "+"."""
        return self.path.split("/")[1]

    @property
    def complete(self) -> bool:
        """Whether every shard of every part is committed."""
        return all(part.complete for part in self.parts)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of rows by status label."""
        found = Counter(self.read_status().tolist())
        return {status.label: found[status] for status in Status if found[status]}

    def read(self, start: int = 0, stop: int | None = None) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Return features (n, dim) and status (n,) of rows start … stop − 1. See `FeatureArray.read`."""
        features = np.concatenate([part.read(start, stop)[0] for part in self.parts], axis=1)
        return features, self.read_status(start, stop)

    def read_status(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Return the status (n,) of rows start … stop − 1, without reading their features."""
        status: NDArray[Any] = self.parts[-1].read_status(start, stop)
        for part in reversed(self.parts[:-1]):
            before = part.read_status(start, stop)
            status = np.where(before == Status.OK, status, before)
        return status

    def chunk(self, number: int) -> NDArray[np.float16]:
        """Return the features (n, dim) of a chunk, a copy. See `FeatureArray.chunk`."""
        return np.concatenate([part.chunk(number) for part in self.parts], axis=1)

    def prefetch(self, chunks: list[int]) -> None:
        """Make the system read these chunks, in rising order, in the background."""
        for part in self.parts:
            part.prefetch(chunks)


def has_encoders(arrays: Container[str], name: str) -> bool:
    """Return whether arrays by encoder include an encoder, or all of several that are joined by "+"."""
    return name in arrays or all(part in arrays for part in name.split("+"))


StoredFeatures = FeatureArray | JoinedArray
"""An array of features to read."""
