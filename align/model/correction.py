"""Corrected similarities: a dot product of embeddings plus one term per image and one per text.

A cosine ranks some images high for every text, and some texts high for every image ("hubs"). The optimum of the
sigmoid loss, log p(x, y) / p(x) p(y), has terms of x alone and of y alone that unit vectors cannot express. A
correction adds them: s(x, y) = v_x · v_y + a_x + b_y, which is still one dot product, of [v_x, a_x, 1] and
[v_y, 1, b_y].
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sail_align.extract.encoders.runtime import tf32_products

Side = Literal["image", "text"]

SMALLEST_CORRELATION = 1e-6
"""Canonical correlations below this are rounding errors, and count as this."""

MOST_BANK_ROWS = 65_536
CELLS = 1 << 24
"""Similarities to a bank that are computed at a time, so that memory is bounded for banks of any size."""


class Correction(nn.Module, ABC):
    """Maps the outputs of the heads to vectors and terms.

    Attributes:
        default_beta: Sharpness of a bank on top, if there are no pairs to choose it on.
    """

    default_beta = 15.0

    @abstractmethod
    def forward(self, raw_BE: Tensor, side: Side) -> tuple[Tensor, Tensor]:
        """Return the vectors (…, E) and terms (…,) of outputs (…, E') of one head, which are not normalised."""

    def extend(self, raw_BE: Tensor, side: Side) -> Tensor:
        """Return float32 vectors (…, E + 2) whose dot products are the corrected similarities."""
        vector_BE, term_B = self(raw_BE.float(), side)
        return extended(vector_BE, term_B, side)


def extended(vector_BE: Tensor, term_B: Tensor, side: Side) -> Tensor:
    """Return [v, a, 1] (…, E + 2) of image vectors (…, E) and their terms (…,), or [v, 1, b] of texts."""
    term_B1, one_B1 = term_B[..., None], torch.ones_like(term_B)[..., None]
    return torch.cat([vector_BE, *((term_B1, one_B1) if side == "image" else (one_B1, term_B1))], dim=-1)


class Cosine(Correction):
    """The cosine as it is: unit-norm vectors, and terms of zero."""

    def forward(self, raw_BE: Tensor, side: Side) -> tuple[Tensor, Tensor]:  # noqa: D102
        return F.normalize(raw_BE, dim=-1), raw_BE.new_zeros(raw_BE.shape[:-1])


class Bank(Correction):
    """Subtracts how similar an item is to the other modality in general, measured on a bank of training items.

    s'(x, y) = s(x, y) − h(x) − h(y), where h(x) = 1/β log (1/M Σ_m exp(β s(x, b_m))) over the M texts b_m of the bank
    for an image x, and over its images for a text. This is query-bank normalisation (Bogolin et al., CVPR 2022), made
    symmetric and with training items in place of test queries. As it is a mean, h hardly depends on M.

    Args:
        rows: Number of images and of texts M.
        dim: Dimension E of the vectors.
        base: Gives the similarity s. The bank is applied on top.

    Attributes:
        beta: Sharpness β. For β → 0, h is the mean of the similarities, for β → ∞ their maximum.
    """

    beta: Tensor
    image_terms: Tensor

    def __init__(self, rows: int, dim: int, base: Correction | None = None):
        super().__init__()
        self.base = base or Cosine()
        for side in ("image", "text"):
            self.register_buffer(f"{side}_vectors", torch.zeros(rows, dim, dtype=torch.float16))
            self.register_buffer(f"{side}_terms", torch.zeros(rows))
        self.register_buffer("beta", torch.tensor(self.base.default_beta))

    def fill(self, image_ME: Tensor, text_ME: Tensor, beta: float | None = None) -> None:
        """Set the items of the bank, as outputs of the heads, and β. None is the default of the base."""
        sides: tuple[tuple[Side, Tensor], ...] = (("image", image_ME), ("text", text_ME))
        for side, raw_ME in sides:
            vector_ME, term_M = self.base(raw_ME.float(), side)
            getattr(self, f"{side}_vectors").copy_(vector_ME)
            getattr(self, f"{side}_terms").copy_(term_M)
        self.beta.fill_(self.base.default_beta if beta is None else beta)

    def forward(self, raw_BE: Tensor, side: Side) -> tuple[Tensor, Tensor]:  # noqa: D102
        vector_BE, term_B = self.base(raw_BE, side)
        # A term of the base is in s(x, y) and in h(x), so it cancels. Those of the bank's items count.
        parts = vector_BE.reshape(-1, vector_BE.shape[-1]).split(CELLS // len(self.image_terms))
        hubness_B = torch.cat([log_mean_exp(self.compare(part_BE, side), self.beta.item()) for part_BE in parts])
        return vector_BE, -hubness_B.reshape(term_B.shape)

    @tf32_products()
    def compare(self, vector_BE: Tensor, side: Side) -> Tensor:
        """Return the similarities (B, M) of vectors (B, E) to the bank's items of the other side."""
        other = "text" if side == "image" else "image"
        bank_ME, term_M = getattr(self, f"{other}_vectors"), getattr(self, f"{other}_terms")
        return torch.addmm(term_M.to(vector_BE.dtype), vector_BE, bank_ME.to(vector_BE.dtype).T)


def log_mean_exp(values_BM: Tensor, beta: float) -> Tensor:
    """Return 1/β log of the mean of exp(β v) over each row, (B,)."""
    return ((beta * values_BM).logsumexp(dim=1) - math.log(values_BM.shape[1])) / beta


class Gaussian(Correction):
    """The log-likelihood ratio log p(x, y) / p(x) p(y) of features that are jointly Gaussian, in nats.

    The canonical variates u_k of an image and w_k of a text have unit variance, and only u_k and w_k are correlated,
    with ρ_k. Under probabilistic CCA (Bach and Jordan, 2005) a matching pair (u_k, w_k) has the covariance
    [[1, ρ_k], [ρ_k, 1]] and the determinant 1 − ρ_k². A pair that does not match has the identity. So

        log N(u, w; 0, [[1, ρ], [ρ, 1]]) − log N(u; 0, 1) − log N(w; 0, 1)
            = −½ log(1 − ρ²) − (u² − 2ρ u w + w²) / 2(1 − ρ²) + (u² + w²) / 2
            = −½ log(1 − ρ²) + ρ/(1 − ρ²) u w − ρ²/2(1 − ρ²) (u² + w²),

    which is summed over k. The first term is constant, and left out. With o = u √(ρ/(1 − ρ²)), and the same for w, the
    others are o_u · o_w − ½ Σ_k ρ_k o_u² − ½ Σ_k ρ_k o_w²: a vector and a term for each item.

    The heads give ρ_k u_k and ρ_k w_k, whose cosine is that of the CCA.

    Args:
        dim: Number of canonical variates E.

    Attributes:
        correlations: Canonical correlations ρ (E,), in (0, 1).
    """

    correlations: Tensor
    default_beta = 0.25

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("correlations", torch.full((dim,), 0.5))

    def fill(self, correlations_E: Tensor) -> None:
        """Set the canonical correlations (E,)."""
        self.correlations.copy_(correlations_E.clamp(SMALLEST_CORRELATION, 1 - SMALLEST_CORRELATION))

    def forward(self, raw_BE: Tensor, side: Side) -> tuple[Tensor, Tensor]:  # noqa: D102
        rho_E = self.correlations.to(raw_BE.dtype)
        vector_BE = raw_BE * (rho_E * (1 - rho_E.square())).rsqrt()
        return vector_BE, -(vector_BE.square() @ rho_E) / 2


CorrectionKind = Literal["none", "gaussian"]
"""Corrections that a model is trained with or computed with, on which a bank can be put."""

CORRECTIONS: dict[str, type[Gaussian]] = {"gaussian": Gaussian}
"""Corrections by their kind; `none` has no entry."""


def make_correction(kind: CorrectionKind, bank_rows: int, dim: int) -> Correction | None:
    """Return the correction of a kind, with a bank of some rows on top unless that is 0; None if there is neither."""
    base = None if kind == "none" else CORRECTIONS[kind](dim)
    return Bank(bank_rows, dim, base) if bank_rows else base
