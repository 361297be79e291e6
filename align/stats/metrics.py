"""Metrics that need nothing but embeddings: numpy in, numbers out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Embeddings = NDArray[np.floating]
Ranks = NDArray[np.int64]
Places = NDArray[np.int64]

TILE = 4_096
"""Images and texts scored at a time: the matrix of all scores need not fit in memory."""
BLOCK = 1_024
"""Rows whose nearest others are looked for at a time."""
TIE = 1e-6
"""Scores closer than this are equal. Dot products of unit vectors in float32 are off by some 1e-7, and by how much
depends on where in the matrix they stand: two images that are the same to the bit need not get the same score. A
difference that is `TIE` to within these 1e-7 falls to either side: by it, one rank in some 10,000 is off by one."""


def ranks(
    images_NE: Embeddings, texts_ME: Embeddings, owner_M: NDArray[np.integer], device: "str | torch.device" = "cpu"
) -> tuple[Ranks, Ranks]:
    """Rank both ways; text j is right for image `owner_M[j]`, an image may own several texts.

    A query's rank is the number of wrong items that score at least as high as its best right one: 0 is the first place,
    a tie (`TIE`) counts against the query, and so does a score that is not a number. Each score is computed once, for
    both ways, in tiles of bounded size. Embeddings are float32 or float64.

    Returns:
        Ranks of each image's best text (N,) and of each text's image (M,). An image that owns no text ranks last, M.
    """
    import torch

    order_M = np.argsort(owner_M, kind="stable")  # right pairs then lie along the diagonal, few tiles have any
    sorted_M = owner_M[order_M]
    right_M = _right_scores(images_NE, texts_ME, owner_M)[order_M]
    best_N = np.full(len(images_NE), -np.inf)
    with np.errstate(invalid="ignore"):  # a NaN stays one
        np.maximum.at(best_N, sorted_M, right_M)
    image_ranks_N, text_ranks_M = np.zeros(len(images_NE), dtype=np.int64), np.zeros(len(sorted_M), dtype=np.int64)
    room_2IT = torch.empty(2, TILE, TILE, device=device, dtype=torch.from_numpy(images_NE[:0]).dtype)
    for i in range(0, len(images_NE), TILE):
        images = slice(i, i + TILE)
        images_IE = torch.from_numpy(images_NE[images]).to(device)
        least_I1 = torch.from_numpy(best_N[images] - TIE).to(images_IE)[:, None]
        for t in range(0, len(sorted_M), TILE):
            texts = slice(t, t + TILE)
            texts_TE = torch.from_numpy(texts_ME[order_M[texts]]).to(device)
            least_T = torch.from_numpy(right_M[texts] - TIE).to(images_IE)
            # Fresh memory for each tile takes longer than filling it, and sums of floats are quicker than of bools.
            scores_IT, below_IT = room_2IT[:, : len(images_IE), : len(texts_TE)]
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
    image_ranks_N[np.isnan(best_N)] -= own_N[np.isnan(best_N)]  # nothing is below a NaN, not even a right item
    text_ranks_M[np.isnan(right_M)] -= 1
    unsorted_M = np.empty_like(text_ranks_M)
    unsorted_M[order_M] = text_ranks_M
    return image_ranks_N, unsorted_M


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
    both_N2k = np.sort(np.concatenate([nearest(x_ND, k), nearest(y_ND, k)], axis=1), axis=1)
    return np.asarray((both_N2k[:, 1:] == both_N2k[:, :-1]).sum(axis=1) / k)  # what is in both stands there twice


def cka_by_row(x_ND: Embeddings, y_ND: Embeddings) -> NDArray[np.float64]:
    """Return each row's part in the debiased linear CKA of two views of the same rows, (N,), whose mean is that CKA.

    It is 1 for the same up to rotation and scale, 0 for unrelated views and for one whose rows do not differ. Kornblith
    et al. (2019), with the unbiased estimator of HSIC of Song et al. (2012), so that 0 is expected of unrelated views
    whatever the dimensions; the biased one gives high values where there are few rows. Linear kernels need the
    covariances alone: O(N D²) time.

    The parts are jackknife values: with θ₋ᵢ the CKA without row i, θ + (N − 1) (mean of θ₋ − θ₋ᵢ). The bootstrap of
    their mean is that of the CKA to first order, which drawing rows twice would not give: a row is too like itself.

    Raises:
        ValueError: There are fewer than five rows.
    """
    if len(x_ND) < 5:
        raise ValueError(f"{len(x_ND)} rows are too few for the unbiased estimator without one of them; it takes 5")
    x, y = (view.astype(np.float64) - view.mean(axis=0, dtype=np.float64) for view in (x_ND, y_ND))
    norm = np.maximum(_hsic(x, x) * _hsic(y, y), 0)
    cka, *without = np.divide(_hsic(x, y), np.sqrt(norm), out=np.zeros_like(norm), where=norm > 0).tolist()
    return np.asarray(cka + (len(x) - 1) * (np.mean(without) - np.array(without)))


def _hsic(x_ND: NDArray[np.float64], y_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return HSIC₁ (Song et al., eq. 5) of centred rows with linear kernels, then that without each row, (1 + N,).

    All up to a factor that depends on the number of rows only. K and L are the kernels less their diagonals; rows of K
    sum up to minus its diagonal, since the views are centred.
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
    """Return rows of length 1, float32; a row of zeros stays one."""
    rows_ND = features_ND.astype(np.float32)
    length_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    np.divide(rows_ND, length_N1, out=rows_ND, where=length_N1 > 0)
    return rows_ND


def recall_at(rank_Q: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Return recall@k for each k, in percent: the share of queries with a right item among the k best."""
    return {k: 100 * float(np.mean(rank_Q < k)) for k in ks}


def effective_rank(embeddings_NE: Embeddings) -> float:
    """Return how many directions embeddings use: exp of the entropy of their singular values, normalised to sum to 1.

    1 where all rows are multiples of one, the rank where all singular values are equal. As in Roy and Vetterli, *The
    effective rank* (EUSIPCO 2007); the mean is not taken off, so that rows which all say nearly the same have a rank
    near 1. From the eigenvalues of the smaller Gram matrix in float64, which see no singular value below some 1e-8 of
    the largest. 0 where all rows are zero, or one holds a value that is no number.
    """
    wide_NE = embeddings_NE.astype(np.float64)
    gram = wide_NE.T @ wide_NE if len(wide_NE) >= wide_NE.shape[1] else wide_NE @ wide_NE.T
    if not np.isfinite(gram).all() or not gram.any():
        return 0.0
    singular = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0))
    shares = singular[singular > 0] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _right_scores(images_NE: Embeddings, texts_ME: Embeddings, owner_M: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return each text's score with its own image, (M,)."""
    right_M = np.empty(len(texts_ME))
    for start in range(0, len(texts_ME), TILE):
        texts = slice(start, start + TILE)
        right_M[texts] = np.einsum("te,te->t", images_NE[owner_M[texts]], texts_ME[texts], dtype=np.float64)
    return right_M
