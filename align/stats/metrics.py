"""Metrics of embeddings: numpy in, numbers out."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Embeddings = NDArray[np.floating]
Ranks = NDArray[np.int64]

TILE = 4_096
"""Images and texts scored at a time, so that the matrix of all scores need not fit in memory."""
QUERY_ROWS = 1_024
"""Rows whose nearest neighbours are computed at a time."""
TIE = 1e-6
"""Scores closer than this are equal. Float32 dot products of unit vectors have errors of about 1e-7 that depend on the
position in the matrix, so identical images need not have identical scores. A difference within 1e-7 of `TIE` can fall
on either side, which changes about one rank in 10,000 by one."""


def ranks(
    images_NE: Embeddings, texts_ME: Embeddings, owner_M: NDArray[np.integer], device: "str | torch.device" = "cpu"
) -> tuple[Ranks, Ranks]:
    """Rank images by texts and texts by images. Text j belongs to image `owner_M[j]`; an image may own several texts.

    The rank of a query is the number of wrong items that score at least as high as its best right item, so 0 is the
    first place. Ties (`TIE`) and NaN count against the query. Each score is computed once for both directions, in tiles
    of bounded size. Embeddings are float32 or float64.

    Returns:
        The ranks of each image's best text (N,) and of each text's image (M,). The rank of an image without texts is M.
    """
    import torch

    order_M = np.argsort(owner_M, kind="stable")  # right pairs are then along the diagonal, in few tiles
    sorted_M = owner_M[order_M]
    right_M = _right_scores(images_NE, texts_ME, owner_M)[order_M]
    best_N = np.full(len(images_NE), -np.inf)
    with np.errstate(invalid="ignore"):  # NaN propagates
        np.maximum.at(best_N, sorted_M, right_M)
    image_ranks_N, text_ranks_M = np.zeros(len(images_NE), dtype=np.int64), np.zeros(len(sorted_M), dtype=np.int64)
    buffer_2IT = torch.empty(2, TILE, TILE, device=device, dtype=torch.from_numpy(images_NE[:0]).dtype)
    for i in range(0, len(images_NE), TILE):
        images = slice(i, i + TILE)
        images_IE = torch.from_numpy(images_NE[images]).to(device)
        least_I1 = torch.from_numpy(best_N[images] - TIE).to(images_IE)[:, None]
        for t in range(0, len(sorted_M), TILE):
            texts = slice(t, t + TILE)
            texts_TE = torch.from_numpy(texts_ME[order_M[texts]]).to(device)
            least_T = torch.from_numpy(right_M[texts] - TIE).to(images_IE)
            # Allocating memory for each tile takes longer than filling it. Floats are summed faster than bools.
            scores_IT, below_IT = buffer_2IT[:, : len(images_IE), : len(texts_TE)]
            torch.mm(images_IE, texts_TE.T, out=scores_IT)
            first, last = np.searchsorted(sorted_M[texts], [i, i + TILE])
            scores_IT[sorted_M[texts][first:last] - i, np.arange(first, last)] = -torch.inf
            image_ranks_N[images] += (
                len(texts_TE) - torch.lt(scores_IT, least_I1, out=below_IT).sum(1).long().cpu().numpy()
            )
            text_ranks_M[texts] += (
                len(images_IE) - torch.lt(scores_IT, least_T, out=below_IT).sum(0).long().cpu().numpy()
            )
    own_N = np.bincount(sorted_M, minlength=len(images_NE))
    image_ranks_N[np.isnan(best_N)] -= own_N[np.isnan(best_N)]  # nothing is below NaN, not even a right item
    text_ranks_M[np.isnan(right_M)] -= 1
    unsorted_M = np.empty_like(text_ranks_M)
    unsorted_M[order_M] = text_ranks_M
    return image_ranks_N, unsorted_M


def caption_ranks(
    images_NE: Embeddings, texts_CNE: NDArray[np.floating], device: "str | torch.device" = "cpu"
) -> tuple[Ranks, Ranks]:
    """Rank images (N, E) by texts (C, N, E) and texts by images as `ranks`; each image owns C texts."""
    captions, rows, _ = texts_CNE.shape
    return ranks(images_NE, texts_CNE.reshape(captions * rows, -1), np.tile(np.arange(rows), captions), device)


def recalls(image_ranks: Ranks, text_ranks: Ranks) -> dict[str, float]:
    """Return `t2i_r1` … `i2t_r10` (R@1/5/10 both ways) and `r1` (the mean of both R@1), in percent."""
    found = {
        f"{way}_r{k}": 100 * float(np.mean(ranks_Q < k))
        for way, ranks_Q in (("t2i", text_ranks), ("i2t", image_ranks))
        for k in (1, 5, 10)
    }
    return found | {"r1": (found["t2i_r1"] + found["i2t_r1"]) / 2}


def mean_reciprocal_rank(image_ranks: Ranks, text_ranks: Ranks) -> float:
    """Return the mean reciprocal rank in percent, the mean of both ways."""
    return sum(100 * float(np.mean(1 / (1 + ranks_Q))) for ranks_Q in (text_ranks, image_ranks)) / 2


def mutual_knn(x_ND: Embeddings, y_ND: Embeddings, k: int = 10) -> NDArray[np.float64]:
    """Return the fraction (N,) of each row's `k` nearest rows that are the same in both spaces.

    The mean is the alignment of Huh et al. (2024, "The Platonic Representation Hypothesis"), who also use the cosine
    and k = 10. Unrelated spaces share k / (N − 1) of the neighbours.

    Raises:
        ValueError: There are at most k rows.
    """
    if len(x_ND) <= k:
        raise ValueError(f"{len(x_ND)} rows are too few for {k} nearest neighbours.")

    def nearest(features_ND: Embeddings) -> NDArray[np.int64]:
        """Return the positions (N, k) of the nearest other rows of each row by cosine, in any order."""
        unit_ND = unit_rows(features_ND)
        positions_Nk = np.empty((len(unit_ND), k), dtype=np.int64)
        for start in range(0, len(unit_ND), QUERY_ROWS):
            cosine_BN = unit_ND[start : start + QUERY_ROWS] @ unit_ND.T
            itself_B = np.arange(len(cosine_BN))
            cosine_BN[itself_B, start + itself_B] = -np.inf
            positions_Nk[start : start + QUERY_ROWS] = np.argpartition(-cosine_BN, k - 1, axis=1)[:, :k]
        return positions_Nk

    both_N2k = np.sort(np.concatenate([nearest(x_ND), nearest(y_ND)], axis=1), axis=1)
    return np.asarray((both_N2k[:, 1:] == both_N2k[:, :-1]).sum(axis=1) / k)  # a neighbour in both spaces occurs twice


def cka_by_row(x_ND: Embeddings, y_ND: Embeddings) -> NDArray[np.float64]:
    """Return each row's contribution (N,) to the debiased linear CKA of two views of the rows; their mean is the CKA.

    CKA is 1 for views that are equal up to rotation and scale, and 0 for unrelated views and for a view with equal
    rows. See Kornblith et al. (2019), here with the unbiased estimator of HSIC of Song et al. (2012). Its expectation
    is 0 for unrelated views of any dimension, while the biased estimator is high for few rows. Linear kernels need only
    the covariances, which takes O(N D²) time.

    The contributions are jackknife values: with θ₋ᵢ the CKA without row i, θ + (N − 1) (mean of θ₋ − θ₋ᵢ). To first
    order, the bootstrap of their mean is the bootstrap of the CKA. Drawing rows repeatedly would not give it, since a
    row is too similar to itself.

    Raises:
        ValueError: There are fewer than five rows.
    """
    if len(x_ND) < 5:
        raise ValueError(f"{len(x_ND)} rows are too few for the unbiased estimator. It needs at least 5.")
    x, y = (view.astype(np.float64) - view.mean(axis=0, dtype=np.float64) for view in (x_ND, y_ND))
    norm = np.maximum(_hsic(x, x) * _hsic(y, y), 0)
    cka, *without = np.divide(_hsic(x, y), np.sqrt(norm), out=np.zeros_like(norm), where=norm > 0).tolist()
    return np.asarray(cka + (len(x) - 1) * (np.mean(without) - np.array(without)))


def _hsic(x_ND: NDArray[np.float64], y_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return HSIC₁ (Song et al., eq. 5) of centred rows with linear kernels, then HSIC₁ without each row, (1 + N,).

    The values lack a factor that depends only on the number of rows. K and L are the kernels without their diagonals.
    Since the views are centred, each row of K sums to minus its diagonal element.
    """
    rows = len(x_ND)
    k_sum_N, l_sum_N = -(x_ND**2).sum(axis=1), -(y_ND**2).sum(axis=1)
    kl_N = ((x_ND @ (x_ND.T @ y_ND)) * y_ND).sum(axis=1) - k_sum_N * l_sum_N  # sums of Kᵢⱼ Lᵢⱼ over j
    k_l_N = x_ND @ (x_ND.T @ l_sum_N) + k_sum_N * l_sum_N  # K times L's row sums
    l_k_N = y_ND @ (y_ND.T @ k_sum_N) + k_sum_N * l_sum_N

    trace, k_sum, l_sum, product = kl_N.sum(), k_sum_N.sum(), l_sum_N.sum(), k_sum_N @ l_sum_N
    whole = trace + k_sum * l_sum / ((rows - 1) * (rows - 2)) - 2 * product / (rows - 2)
    sums_without_N = (k_sum - 2 * k_sum_N) * (l_sum - 2 * l_sum_N)
    product_without_N = product - k_sum_N * l_sum_N - k_l_N - l_k_N + kl_N
    without_N = trace - 2 * kl_N + sums_without_N / ((rows - 2) * (rows - 3)) - 2 * product_without_N / (rows - 3)
    return np.append(whole, without_N)


def unit_rows(features_ND: Embeddings) -> NDArray[np.float32]:
    """Return the rows as unit-norm float32. Rows of zeros stay zero."""
    rows_ND = features_ND.astype(np.float32)
    length_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    np.divide(rows_ND, length_N1, out=rows_ND, where=length_N1 > 0)
    return rows_ND


def effective_rank(embeddings_NE: Embeddings) -> float:
    """Return the number of directions in use: exp of the entropy of the singular values, normalised to sum to 1.

    It is 1 if all rows are multiples of one row, the rank if all singular values are equal, and 0 if all rows are zero
    or any value is NaN or inf. See Roy and Vetterli, *The effective rank* (EUSIPCO 2007). The mean is not subtracted,
    so that nearly equal rows have a rank near 1. The singular values come from the eigenvalues of the smaller Gram
    matrix in float64, which misses those below about 1e-8 of the largest.
    """
    wide_NE = embeddings_NE.astype(np.float64)
    gram = wide_NE.T @ wide_NE if len(wide_NE) >= wide_NE.shape[1] else wide_NE @ wide_NE.T
    if not np.isfinite(gram).all() or not gram.any():
        return 0.0
    singular = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0))
    shares = singular[singular > 0] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _right_scores(images_NE: Embeddings, texts_ME: Embeddings, owner_M: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the score (M,) of each text with its own image."""
    right_M = np.empty(len(texts_ME))
    for start in range(0, len(texts_ME), TILE):
        texts = slice(start, start + TILE)
        right_M[texts] = np.einsum("te,te->t", images_NE[owner_M[texts]], texts_ME[texts], dtype=np.float64)
    return right_M
