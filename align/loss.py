"""The contrastive losses: sigmoid (eq. 1 and 2 of the paper) and InfoNCE, for one or several captions an image.

Row i of the images belongs with row i of every caption set; all other rows of the batch are negatives.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Takes image_BE and text_CBE (both L2-normalised), τ and b; returns a scalar."""

Divisor = Literal["pairs", "batch"]


def sigmoid_loss(
    image_BE: Tensor, text_CBE: Tensor, log_scale: Tensor, bias: Tensor, divisor: Divisor = "pairs"
) -> Tensor:
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
    sign_BB = 2 * torch.eye(batch, device=image_BE.device) - 1
    total = image_BE.new_zeros(())
    for text_BE in text_CBE:
        logits_BB = log_scale.exp() * image_BE @ text_BE.T + bias
        total = total - F.logsigmoid(sign_BB * logits_BB).sum()
    return total / (batch**2 if divisor == "pairs" else batch)


def infonce_loss(image_BE: Tensor, text_CBE: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """CLIP's loss: the mean of the cross-entropies image → text and text → image, summed over the caption sets.

    Each caption set makes a softmax of its own, so that captions of one image are not each other's negatives. A bias
    would cancel in the softmax: b is not used. Shapes as in `sigmoid_loss`.
    """
    own_B = torch.arange(len(image_BE), device=image_BE.device)
    total = image_BE.new_zeros(())
    for text_BE in text_CBE:
        logits_BB = log_scale.exp() * image_BE @ text_BE.T
        total = total + (F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.T, own_B)) / 2
    return total
