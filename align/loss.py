"""The contrastive losses: sigmoid (eq. 1 and 2 of the paper) and InfoNCE, for one or several captions an image.

Row i of the images belongs with row i of every caption set; all other rows of the batch are negatives.
"""

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Divisor = Literal["pairs", "batch"]


class LossValue(NamedTuple):
    """A loss, and what its logits and gradients tell about the training's health: 0-dimensional float32 tensors.

    `total` alone carries gradients. The logits are means over the positive and over the negative pairs. A mass is the
    sum of |∂loss/∂logit| over the positive or the negative pairs: what pulls together against what pushes apart.
    """

    total: Tensor
    positive_logit: Tensor
    negative_logit: Tensor
    positive_mass: Tensor
    negative_mass: Tensor


class Loss(Protocol):
    """A contrastive loss: see `sigmoid_loss` for the arguments."""

    def __call__(self, image_BE: Tensor, text_CBE: Tensor, log_scale: Tensor, bias: Tensor, /) -> LossValue:
        """Return the loss of a batch."""


def sigmoid_loss(
    image_BE: Tensor, text_CBE: Tensor, log_scale: Tensor, bias: Tensor, /, divisor: Divisor = "pairs"
) -> LossValue:
    """`−1/|B|² · Σ_c Σ_ij log σ(z_ij (t x_i·y_j^c + b))`, with z_ij = +1 for i = j and −1 else, and t = exp(τ).

    One caption set is the paper's eq. 1; several are summed, eq. 2 (the authors' program averages them). The paper
    prints `−t x·y + b` in the exponent; that b would push every positive by +10 at its start of −10. Their program, and
    SigLIP's, have b inside the logit as here.

    Args:
        image_BE: (B, E) float32, L2-normalised.
        text_CBE: (C, B, E) float32, L2-normalised: C captions of each image.
        log_scale: τ, scalar.
        bias: b, scalar.
        divisor: "pairs" divides by |B|², the paper's; "batch" by |B|, SigLIP's.
    """
    batch = len(image_BE)
    logits_CBB = log_scale.exp() * image_BE @ text_CBE.mT + bias
    sign_BB = 2 * torch.eye(batch, device=image_BE.device) - 1
    scale = 1 / (batch**2 if divisor == "pairs" else batch)
    total = -F.logsigmoid(sign_BB * logits_CBB).sum(dim=(1, 2)).sum() * scale
    return LossValue(total, *_health(logits_CBB.detach(), (sign_BB * logits_CBB.detach()).neg().sigmoid() * scale))


def infonce_loss(image_BE: Tensor, text_CBE: Tensor, log_scale: Tensor, bias: Tensor, /) -> LossValue:
    """CLIP's loss: the mean of the cross-entropies image → text and text → image, summed over the caption sets.

    Each caption set makes a softmax of its own, so that captions of one image are not each other's negatives. A bias
    would cancel in the softmax: b is not used. Shapes as in `sigmoid_loss`.
    """
    logits_CBB = log_scale.exp() * image_BE @ text_CBE.mT
    to_image_CBB, to_text_CBB = logits_CBB.log_softmax(dim=1), logits_CBB.log_softmax(dim=2)
    log_p_CBB = (to_image_CBB + to_text_CBB) / 2
    total = -log_p_CBB.diagonal(dim1=1, dim2=2).mean(dim=1).sum()
    right_BB = torch.eye(len(image_BE), device=image_BE.device)
    p_CBB = (to_image_CBB.detach().exp() + to_text_CBB.detach().exp()) / 2
    gradient_CBB = (p_CBB - right_BB) / len(image_BE)
    return LossValue(total, *_health(logits_CBB.detach(), gradient_CBB.abs()))


def _health(logits_CBB: Tensor, mass_CBB: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the means of the positive and of the negative logits, and the sums of either's masses."""
    captions, batch, _ = logits_CBB.shape
    logits, masses = (each.diagonal(dim1=1, dim2=2).sum() for each in (logits_CBB, mass_CBB))
    pairs = captions * batch
    negative_logit = (logits_CBB.sum() - logits) / (pairs * (batch - 1))
    return logits / pairs, negative_logit, masses, mass_CBB.sum() - masses
