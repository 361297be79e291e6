"""Choice of the closed form's ridge by cross-validation, in the same pass over the pairs."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sail_align.align.model.closed_form import LinearMap, Moments
from sail_align.align.model.correction import Gaussian
from sail_align.align.stats.metrics import mean_reciprocal_rank, ranks

FOLDS = 5
SAMPLE_ROWS = 4_096
"""Pairs on which ridges are compared. Their features are kept in memory."""

FEWEST_ROWS = 50
"""With fewer pairs a ridge cannot be chosen."""

RIDGE = 2.0
"""Ridge for few pairs, and the first one that is tried."""

STEPS = 10
"""Ridges from 2⁻¹⁰ to 2¹⁰ times `RIDGE` are reachable."""


class FoldedMoments:
    """Moments of pairs in folds, and a sample of the pairs of each fold to score on.

    Memory is used for the covariance matrices of each fold and for at most `SAMPLE_ROWS` pairs.

    Args:
        image_dim: Dimension of the image inputs.
        text_dim: Dimension of the text inputs.
        rows: Number of pairs that will be added.
        device: Device of the moments.
    """

    def __init__(self, image_dim: int, text_dim: int, rows: int, device: str | torch.device = "cpu"):
        self.folds = [Moments(image_dim, text_dim, device) for _ in range(FOLDS)]
        self._sample: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(FOLDS)]
        self._rows, self._span = 0, -(-rows // SAMPLE_ROWS)

    def add(self, image_BD: Tensor, text_CBD: Tensor) -> None:
        """Add pairs of image inputs (B, D_I) and text inputs (C, B, D_T) of any float type, as `Moments.add`.

        Successive spans of pairs, one of them sampled in each, belong to successive folds.
        """
        number_B = torch.arange(self._rows, self._rows + len(image_BD), device=image_BD.device)
        self._rows += len(image_BD)
        for fold, (moments, sample) in enumerate(zip(self.folds, self._sample, strict=True)):
            inside_B = number_B // self._span % FOLDS == fold
            if inside_B.any():
                moments.add(image_BD[inside_B], text_CBD[:, inside_B])
                sampled_B = inside_B & (number_B % self._span == 0)
                sample.append((image_BD[sampled_B].float(), text_CBD[:, sampled_B].float()))

    def total(self) -> Moments:
        """Return the moments of all pairs."""
        return Moments.sum(self.folds)

    def choose_ridge(self, dim: int, *, likelihood: bool = False) -> float:
        """Return the ridge with the best mean reciprocal rank of the pairs of each fold, from the maps of the others.

        Both directions are scored, among the sampled pairs of the fold.
        Powers of two are compared, from `RIDGE` on in the direction that improves, to the first that does not.

        Args:
            dim: Number of canonical directions.
            likelihood: Rank by log-likelihood ratios instead of cosines.

        Raises:
            UserError: As for `Moments.cca`.
        """
        if self._rows < FEWEST_ROWS:
            return RIDGE

        def score(exponent: int) -> float:
            found = []
            for fold, sample in enumerate(self._sample):
                others = Moments.sum(self.folds[:fold] + self.folds[fold + 1 :])  # one at a time: they are large
                maps = others.cca(dim, RIDGE * 2.0**exponent, unit_norm=not likelihood)
                found.append(_reciprocal_ranks(sample, *maps, likelihood))
            return float(np.mean(found))

        return RIDGE * 2.0 ** climb(score, STEPS)


def climb(score: Callable[[int], float], most: int) -> int:
    """Return a local maximum of a function of integers from −`most` to `most`, going upwards from 0."""
    best, value = 0, score(0)
    for step in (-1, 1):
        while abs(best + step) <= most and (other := score(best + step)) > value:
            best, value = best + step, other
        if best:
            break
    return best


def _reciprocal_ranks(
    sample: list[tuple[Tensor, Tensor]],
    image_map: LinearMap,
    text_map: LinearMap,
    correlations_E: Tensor,
    likelihood: bool,
) -> float:
    """Return the mean reciprocal rank of images by texts and of texts by images in percent, the mean of both."""
    gaussian = Gaussian(len(correlations_E)).to(correlations_E.device)
    gaussian.fill(correlations_E)
    images, texts, owners, start = [], [], [], 0
    for image_BD, text_CBD in sample:
        image_BE, text_ME = image_map(image_BD), text_map(text_CBD.flatten(0, 1))
        images.append(gaussian.extend(image_BE, "image") if likelihood else F.normalize(image_BE, dim=-1))
        texts.append(gaussian.extend(text_ME, "text") if likelihood else F.normalize(text_ME, dim=-1))
        owners.append(np.tile(np.arange(start, start + len(image_BD)), len(text_CBD)))
        start += len(image_BD)
    image_NE, text_XE = (torch.cat(each).double().cpu().numpy() for each in (images, texts))
    return mean_reciprocal_rank(*ranks(image_NE, text_XE, np.concatenate(owners)))
