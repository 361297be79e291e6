"""Metrics that need nothing but embeddings: numpy in, numbers out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Embeddings = NDArray[np.floating]
Ranks = NDArray[np.int64]

BLOCK = 1_024
"""Queries scored at a time: the matrix of all scores need not fit in memory."""


def ranks(images_NE: Embeddings, texts_ME: Embeddings, owner_M: NDArray[np.integer]) -> tuple[Ranks, Ranks]:
    """Rank both ways; text j is right for image `owner_M[j]`, an image may own several texts.

    A query's rank is the number of wrong items that score at least as high as its best right one: 0 is the first place,
    a tie counts against the query, and so does a score that is not a number.

    Returns:
        Ranks of each image's best text (N,) and of each text's image (M,). An image that owns no text ranks last, M.
    """
    image_N = np.arange(len(images_NE))
    return _ranks(images_NE, texts_ME, image_N, owner_M), _ranks(texts_ME, images_NE, owner_M, image_N)


def recall_at(rank_Q: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Return recall@k for each k, in percent: the share of queries with a right item among the k best."""
    return {k: 100 * float(np.mean(rank_Q < k)) for k in ks}


def _ranks(
    queries_QE: Embeddings, items_IE: Embeddings, group_Q: NDArray[np.integer], group_I: NDArray[np.integer]
) -> Ranks:
    """Rank items for each query; an item is right if its group is the query's."""
    ranks_Q = np.empty(len(queries_QE), dtype=np.int64)
    for start in range(0, len(queries_QE), BLOCK):
        block = slice(start, start + BLOCK)
        scores_BI = queries_QE[block] @ items_IE.T
        right_BI = group_Q[block, None] == group_I
        best_B = np.max(scores_BI, axis=1, where=right_BI, initial=-np.inf)
        # "Not below" rather than "at least": it also counts a NaN on either side.
        ranks_Q[block] = np.sum(~(scores_BI < best_B[:, None]) & ~right_BI, axis=1)
    return ranks_Q
