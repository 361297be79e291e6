"""Exact search in matrices of float16 vectors.

PyTorch's float16 product reads half of the bytes that a float32 one does, and is the fastest on CPUs, but rounds its
results. So it only chooses candidates: all rows whose rounded score is not lower than the count-th best one by more
than any rounding can explain. Their scores are computed again in float32.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MARGIN = 2.0**-8
"""Largest difference between a rounded and an exact score, in units of the lengths of both vectors.

Rounding the query and the result to float16 gives at most 2⁻¹⁰. The rest is for the order of summation.
"""
NORM_ROWS = 65_536

Places = NDArray[np.int64]


class Matrix:
    """Vectors (M, E) float16, in one or several parts, and a term (M,) of each that is added to its dot products.

    Args:
        parts: The vectors (m, E), such as memory-mapped files.
        terms_M: The terms, float32. None for zeros.
        unit: Whether the vectors have unit length.
    """

    def __init__(self, parts: Sequence[Tensor], terms_M: Tensor | None = None, *, unit: bool = True):
        self._parts, self._terms_M = parts, terms_M
        self._starts = np.cumsum([0, *map(len, parts)])
        self._longest = 1.0 if unit else max(_longest(part) for part in parts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @torch.inference_mode()
    def search(
        self, query_E: Tensor, count: int, allowed_M: NDArray[np.bool_] | None = None
    ) -> tuple[Places, NDArray[np.float32]]:
        """Return the places and the scores of the highest dot products plus terms, highest first.

        Of equal scores, the first places are returned.

        Args:
            query_E: The query, float32.
            count: Number of places. Fewer are returned if there are not so many.
            allowed_M: Places to choose from. None for all.
        """
        query_E = query_E.cpu().float()
        length = float(query_E.norm())
        unit_E = query_E / length if length else query_E  # products with a long query could overflow float16
        rounded_M = length * torch.cat([torch.mv(part, unit_E.half()).float() for part in self._parts])
        if self._terms_M is not None:
            rounded_M += self._terms_M
        if allowed_M is not None:
            rounded_M[~torch.from_numpy(allowed_M)] = -torch.inf
        count = min(count, len(self) if allowed_M is None else int(allowed_M.sum()))
        if count == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        margin = 2 * MARGIN * self._longest * length
        lowest = float(rounded_M.topk(count, sorted=False).values.min()) - margin
        candidates = torch.nonzero(rounded_M >= lowest)[:, 0]
        scores_N = (self.rows(candidates.numpy()) * query_E).sum(dim=1)  # unlike a product, equal for equal rows
        if self._terms_M is not None:
            scores_N += self._terms_M[candidates]
        order = torch.sort(scores_N, descending=True, stable=True).indices[:count]
        return candidates[order].numpy(), scores_N[order].numpy()

    def rows(self, places: Places) -> Tensor:
        """Return some vectors (n, E) float32."""
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        vectors_NE = torch.empty(len(places), self._parts[0].shape[1])
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            inside = torch.from_numpy(places[chosen] - self._starts[number])
            vectors_NE[torch.from_numpy(chosen)] = self._parts[number][inside].float()
        return vectors_NE


def _longest(vectors_ME: Tensor) -> float:
    """Return the length of the longest vector."""
    return max(float(block.float().norm(dim=1).max()) for block in torch.split(vectors_ME, NORM_ROWS))
