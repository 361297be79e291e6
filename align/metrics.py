"""Metrics that need nothing but embeddings: numpy in, numbers out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Embeddings = NDArray[np.floating]
Ranks = NDArray[np.int64]
Places = NDArray[np.int64]

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


def nearest(features_ND: Embeddings, k: int) -> Places:
    """Return the places of each row's `k` nearest other rows by cosine, (N, k), nearest in any order; k < N."""
    unit_ND = unit_rows(features_ND)
    places_Nk = np.empty((len(unit_ND), k), dtype=np.int64)
    for start in range(0, len(unit_ND), BLOCK):
        cosine_BN = unit_ND[start : start + BLOCK] @ unit_ND.T
        own_B = np.arange(len(cosine_BN))
        cosine_BN[own_B, start + own_B] = -np.inf
        places_Nk[start : start + BLOCK] = np.argpartition(-cosine_BN, k - 1, axis=1)[:, :k]
    return places_Nk


def mutual_knn(x_ND: Embeddings, y_ND: Embeddings, k: int = 10) -> NDArray[np.float64]:
    """Return the share of each row's `k` nearest rows that are the same in both spaces, (N,).

    Their mean is the alignment of Huh et al. (2024, "The Platonic Representation Hypothesis"), there too by cosine and
    with k = 10. Unrelated spaces share k / (N − 1).

    Raises:
        ValueError: There are not more than k rows.
    """
    if len(x_ND) <= k:
        raise ValueError(f"{len(x_ND)} rows have no {k} nearest others")
    shared_Nkk = nearest(x_ND, k)[:, :, None] == nearest(y_ND, k)[:, None, :]
    return np.asarray(shared_Nkk.sum(axis=(1, 2)) / k)


def debiased_cka(x_ND: Embeddings, y_ND: Embeddings) -> float:
    """Return the linear CKA of two views of the same rows: 1 for the same up to rotation and scale, 0 for unrelated.

    Kornblith et al. (2019), with the unbiased estimator of HSIC of Song et al. (2012), so that 0 is expected of
    unrelated views whatever the dimensions; the biased one gives high values where there are few rows. For linear
    kernels it needs the covariances alone: O(N D²) time, O(D²) memory. NaN if the rows of a view do not differ.

    Raises:
        ValueError: There are fewer than four rows.
    """
    if len(x_ND) < 4:
        raise ValueError(f"{len(x_ND)} rows are too few for the unbiased estimator; it takes 4")
    x, y = (view - view.mean(axis=0) for view in (x_ND.astype(np.float64), y_ND.astype(np.float64)))
    norm = _hsic(x, x) * _hsic(y, y)
    return float(_hsic(x, y) / np.sqrt(norm)) if norm > 0 else float("nan")


def _hsic(x_ND: NDArray[np.float64], y_ND: NDArray[np.float64]) -> float:
    """Return N (N − 3) times HSIC₁ (Song et al., eq. 5) of centred rows with linear kernels, diagonals left out."""
    rows = len(x_ND)
    x_N, y_N = (x_ND**2).sum(axis=1), (y_ND**2).sum(axis=1)  # the diagonals of the kernels
    trace = ((x_ND.T @ y_ND) ** 2).sum() - x_N @ y_N
    # Centred rows: a row of the kernel sums up to 0, without its diagonal to minus that.
    return float(trace + x_N.sum() * y_N.sum() / ((rows - 1) * (rows - 2)) - 2 * (x_N @ y_N) / (rows - 2))


def mean_interval(
    values_N: NDArray[np.floating] | NDArray[np.bool_], *, resamples: int = 1_000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean over independent items."""
    generator = np.random.default_rng(seed)
    rows = len(values_N)
    means = [float(np.mean(values_N[generator.integers(rows, size=rows)])) for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def unit_rows(features_ND: Embeddings) -> NDArray[np.float32]:
    """Return rows of length 1, float32; a row of zeros stays one."""
    rows_ND = features_ND.astype(np.float32)
    length_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    np.divide(rows_ND, length_N1, out=rows_ND, where=length_N1 > 0)
    return rows_ND


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
