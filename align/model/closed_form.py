"""Regularised canonical correlation analysis (CCA): the best pair of linear maps, without training.

It serves as a baseline (`--head cca`) and as initial weights of trained heads (`--start closed-form`).
"""

import functools
import operator
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sail_align.align.model.heads import Head, LinearHead
from sail_align.extract.errors import UserError

ROUNDING = 1e-12


class Moments:
    """First and second moments of (image, caption) pairs, accumulated in float64.

    A pair has the inputs of the linear maps to be found: features after LayerNorm (`Head.basis`, `normed`).

    An image forms a pair with each of its captions. Memory is used for the covariance matrices only, for any number of
    pairs.
    """

    def __init__(self, image_dim: int, text_dim: int, device: str | torch.device = "cpu"):
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.rows = 0
        self._image_D = zeros(image_dim)
        self._text_D = zeros(text_dim)
        self._image_DD = zeros(image_dim, image_dim)
        self._text_DD = zeros(text_dim, text_dim)
        self._cross_DD = zeros(image_dim, text_dim)

    def add(self, image_BD: Tensor, text_CBD: Tensor) -> None:
        """Add pairs of image inputs (B, D_I) and text inputs (C, B, D_T) of any float type."""
        image_BD, text_CBD = image_BD.double(), text_CBD.double()
        text_mean_BD = text_CBD.mean(dim=0)
        text_ND = text_CBD.flatten(0, 1)
        self.rows += len(image_BD)
        self._image_D += image_BD.sum(dim=0)
        self._text_D += text_mean_BD.sum(dim=0)
        self._image_DD += image_BD.T @ image_BD
        self._text_DD += text_ND.T @ text_ND / len(text_CBD)
        self._cross_DD += image_BD.T @ text_mean_BD

    @classmethod
    def sum(cls, parts: Sequence["Moments"]) -> "Moments":
        """Return the moments of the pairs of all parts, of which there is at least one."""
        total = cls.__new__(cls)
        for name in vars(parts[0]):
            setattr(total, name, functools.reduce(operator.add, (getattr(part, name) for part in parts)))
        return total

    def cca(self, dim: int, ridge: float = 2.0, *, unit_norm: bool = True) -> tuple["LinearMap", "LinearMap", Tensor]:
        """Return the `dim` leading canonical directions of both sides, each weighted by its canonical correlation.

        `ridge · D/N` times the mean eigenvalue is added to each covariance, for N images and D dimensions. An estimate
        from N rows is off by about that much, so one ridge suits few pairs and fades with many. (Five-fold on 2,000
        photos with 1,280 and 384 dimensions, mean R@1: 29.5, 30.5, 29.9, 29.4 for ridges of 1, 2, 3, 4; the same order
        with 500.)

        Args:
            dim: Number of directions, at most the smaller of the two feature dimensions.
            ridge: Strength of the regularisation, above 0.
            unit_norm: Scale each map so that the mean squared norm of an output is 1. Otherwise output k is its
                canonical correlation times a variate whose variance, with the ridge, is 1.

        Returns:
            The maps of images and texts, and the canonical correlations (E,) in float64, the largest first.

        Raises:
            UserError: The features of a side are the same in all rows, or NaN or inf.
        """
        image_mean, text_mean = self._image_D / self.rows, self._text_D / self.rows
        image_DD = self._image_DD / self.rows - torch.outer(image_mean, image_mean)
        text_DD = self._text_DD / self.rows - torch.outer(text_mean, text_mean)
        cross_DD = self._cross_DD / self.rows - torch.outer(self._image_D, self._text_D) / self.rows**2
        image_L = _whitener(image_DD, ridge / self.rows, "image")
        text_L = _whitener(text_DD, ridge / self.rows, "text")
        # K = L_I⁻¹ C L_T⁻ᵀ: its singular vectors are the canonical directions in whitened space.
        half_K = torch.linalg.solve_triangular(image_L, cross_DD, upper=False)
        whitened_K = torch.linalg.solve_triangular(text_L, half_K.T, upper=False).T
        left_DE, right_DE, correlations_E = _singular_vectors(whitened_K, dim)

        def linear_map(weighted_DE: Tensor, whitener: Tensor, mean_D: Tensor, covariance_DD: Tensor) -> LinearMap:
            weight_DE = torch.linalg.solve_triangular(whitener.T, weighted_DE, upper=True)
            if unit_norm:
                weight_DE = weight_DE / ((covariance_DD @ weight_DE) * weight_DE).sum().sqrt()
            return LinearMap(weight_DE.T, -(mean_D @ weight_DE))

        image_map = linear_map(left_DE, image_L, image_mean, image_DD)
        text_map = linear_map(right_DE, text_L, text_mean, text_DD)
        return image_map, text_map, correlations_E


class LinearMap(NamedTuple):
    """`weight x + bias` on inputs x, which are features after LayerNorm: (E, D) and (E,), float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Apply the map to inputs (…, D) of any float type; return (…, E) float64."""
        return inputs.double() @ self.weight.T + self.bias

    @torch.no_grad()
    def copy_to(self, head: Head) -> None:
        """Make a new head compute this map of its `basis`: directly if it is linear, otherwise with a linear path."""
        layer = head.out if isinstance(head, LinearHead) else (head.linear_path or head.add_linear_path())
        weight_ED, hidden_EH = self.weight.tensor_split([layer.in_features], dim=1)
        layer.weight.copy_(weight_ED)
        layer.bias.copy_(self.bias)
        if hidden_EH.shape[1]:
            head.out.weight.copy_(hidden_EH)


def normed(features: Tensor) -> Tensor:
    """Return features (…, D) of any float type after LayerNorm, in float64."""
    return F.layer_norm(features.double(), features.shape[-1:])


def _singular_vectors(matrix_XY: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular vectors (X, E) and (Y, E) times their singular values, and these values (E,).

    The eigenvectors of the smaller of K Kᵀ and Kᵀ K cost a third of a singular value decomposition. Singular values
    below 1e-7 of the largest are inexact, and of no use to a map.
    """
    if matrix_XY.shape[0] > matrix_XY.shape[1]:
        right_YE, left_XE, values_E = _singular_vectors(matrix_XY.T, dim)
        return left_XE, right_YE, values_E
    values, vectors = torch.linalg.eigh(matrix_XY @ matrix_XY.T)
    values_E, left_XE = values.flip(0)[:dim].clamp(min=0).sqrt(), vectors.flip(1)[:, :dim]
    return left_XE * values_E, matrix_XY.T @ left_XE, values_E


def _whitener(covariance_DD: Tensor, ridge: float, side: str) -> Tensor:
    """Return the Cholesky factor L of the covariance plus `ridge` × trace (D times the mean) on the diagonal."""
    dim, trace = len(covariance_DD), covariance_DD.trace()
    if not trace.isfinite():
        raise UserError(f"The {side} features contain NaN or inf. Check the store with `sail-extract verify`.")
    factor_DD: Tensor
    factor_DD, failed = torch.linalg.cholesky_ex(covariance_DD + torch.diag((ridge * trace).expand(dim)))
    # After LayerNorm the mean square is about 1, so a variance this small is only rounding error.
    if failed or trace < ROUNDING * dim:
        raise UserError(
            f"The {side} features are the same in all rows, so the closed form does not exist. Check the store with "
            f"`sail-extract verify`, or choose other features."
        )
    return factor_DD
