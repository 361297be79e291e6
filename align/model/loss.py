"""The contrastive losses: sigmoid (eq. 1 and 2 of the paper) and InfoNCE, for one or several captions an image.

Row i of the images belongs with row i of every caption set; all other rows of the batch are negatives. Value and
gradients are computed together, in closed form and block by block: see `PairBlocks` for memory and precision.

Shapes: M images are a batch, |B| = M; N texts of each of C caption sets are the same batch, or a part of it; E
dimensions. A block has R images and K texts.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sail_align.align.model.fused import Compiled
from sail_align.align.model.pair_blocks import PairBlocks

Divisor = Literal["pairs", "batch"]
LogSumExp = Callable[[Tensor], Tensor]


class LossValue(NamedTuple):
    """A loss, and what its logits and gradients tell about the training's health: 0-dimensional float32 tensors.

    `total` alone carries gradients. The logits are means over the positive and over the negative pairs. A mass is the
    sum of |∂loss/∂logit| over the positive or the negative pairs: what pulls together against what pushes apart.

    Of a part of a batch all five are shares: over the parts they add up to the batch's.
    """

    total: Tensor
    positive_logit: Tensor
    negative_logit: Tensor
    positive_mass: Tensor
    negative_mass: Tensor


class Loss(Protocol):
    """A contrastive loss: see `sigmoid_loss` for the arguments."""

    def __call__(
        self,
        image_ME: Tensor,
        text_CNE: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        /,
        *,
        weights: Sequence[float] | None = None,
        first: int = 0,
    ) -> LossValue:
        """Return the loss of a batch, or a part's share of it."""


def sigmoid_loss(
    image_ME: Tensor,
    text_CNE: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    /,
    divisor: Divisor = "pairs",
    weights: Sequence[float] | None = None,
    first: int = 0,
) -> LossValue:
    """`−1/|B|² · Σ_c w_c Σ_ij log σ(z_ij (t x_i·y_j^c + b))`, with z_ij = +1 for i = j and −1 else, and t = exp(τ).

    One caption set is the paper's eq. 1; several are summed, eq. 2 (the authors' program averages them). The paper
    prints `−t x·y + b` in the exponent; that b would push every positive by +10 at its start of −10. Their program, and
    SigLIP's, have b inside the logit as here.

    Args:
        image_ME: (M, E), L2-normalised: the whole batch.
        text_CNE: (C, N, E), L2-normalised: C captions of each image of the batch, or of a part of it.
        log_scale: τ, scalar.
        bias: b, scalar.
        divisor: "pairs" divides by |B|², the paper's; "batch" by |B|, SigLIP's.
        weights: w, one for each caption set; by default all 1.
        first: Which image belongs with the first text; the others follow in order.

    Raises:
        ValueError: A text has no image, or a caption set no weight.
    """
    blocks = PairBlocks(image_ME, text_CNE, log_scale, bias, first=first, weights=weights)
    repel = _repel.quick if blocks.many else _repel
    with blocks.without_graph():
        t, b = blocks.scale, bias.to(blocks.exact)
        logit_CN = t * blocks.positives() + b
        pull_CN = logit_CN.neg().sigmoid()
        loss, pull = blocks.weighted(-F.logsigmoid(logit_CN)), blocks.weighted(pull_CN)
        push = torch.zeros_like(pull)
        for block in blocks:
            loss_R, push_R = repel(block.pairs, t, b)
            loss += block.weight * loss_R.double().sum()
            push += block.weight * push_R.double().sum()
            blocks.push(block)
        blocks.pull(pull_CN)
        scale = 1 / (blocks.batch**2 if divisor == "pairs" else blocks.batch)
        return _value(blocks, logit_CN, b, scale, loss, pull, push)


def infonce_loss(
    image_ME: Tensor,
    text_CNE: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    /,
    weights: Sequence[float] | None = None,
    first: int = 0,
    across: LogSumExp | None = None,
) -> LossValue:
    """CLIP's loss: the mean of the cross-entropies image → text and text → image, summed over the caption sets.

    Each caption set makes a softmax of its own, so that captions of one image are not each other's negatives. A bias
    would cancel in the softmax: b is not used, and its gradient is 0. The similarities are computed twice, first for
    the normalisers and then for the gradients. Arguments as in `sigmoid_loss`, and:

    Args:
        across: For a part of a batch, as an image is normalised over all texts: a function that returns the log-sum-exp
            over the parts of each element of a tensor (2, C, M).
    """
    own = slice(first, first + text_CNE.shape[1])
    blocks = PairBlocks(image_ME, text_CNE, log_scale, bias, first=first, weights=weights)
    log_sum_exps = _log_sum_exps.quick if blocks.many else _log_sum_exps
    softmax = _softmax.quick if blocks.many else _softmax
    with blocks.without_graph():
        t = blocks.scale
        logit_CN = t * blocks.positives()
        # Log-sum-exps of the negatives of each image and of each text.
        image_CM = logit_CN.new_full((len(logit_CN), blocks.batch), -torch.inf)
        text_CN = torch.full_like(logit_CN, -torch.inf)
        for block in blocks:
            of_block = log_sum_exps(block.pairs, t)
            for so_far, more in zip(block.of(image_CM, text_CN), of_block, strict=True):
                torch.logaddexp(so_far, more, out=so_far)
        positive_CM = torch.full_like(image_CM, -torch.inf)
        positive_CM[:, own] = logit_CN
        if across:
            image_CM, positive_CM = across(torch.stack((image_CM, positive_CM)))
        # In these terms −log p = softplus and 1 − p = σ, which stay exact where p is nearly 1.
        rival_2CN = torch.stack((image_CM[:, own], text_CN)) - logit_CN
        loss, pull_CN = blocks.weighted(F.softplus(rival_2CN).mean(0)), rival_2CN.sigmoid().mean(0)
        if blocks.learning:
            image_CM, text_CN = image_CM.logaddexp(positive_CM), text_CN.logaddexp(logit_CN)
            for block in blocks:
                softmax(block.pairs, t, *block.of(image_CM, text_CN))
                blocks.push(block)
        blocks.pull(pull_CN)
        # Probabilities add up to 1: the negatives push as strongly as the positives pull.
        mass = blocks.weighted(pull_CN)
        return _value(blocks, logit_CN, torch.zeros_like(t), 1 / blocks.batch, loss, mass, mass)


def _value(
    blocks: PairBlocks, logit_CN: Tensor, b: Tensor, scale: float, loss: Tensor, pull: Tensor, push: Tensor
) -> LossValue:
    """Return a loss from the sums over its pairs, which are still to be scaled, with its gradients."""
    positives, pairs = logit_CN.double().sum(), len(logit_CN) * blocks.batch
    negatives = blocks.scale * blocks.sum() + b * (logit_CN.numel() * blocks.batch) - positives
    positive_logit, negative_logit = positives / pairs, negatives / (pairs * (blocks.batch - 1))
    total, *health = (
        value.to(blocks.exact) for value in (scale * loss, positive_logit, negative_logit, scale * pull, scale * push)
    )
    return LossValue(blocks.differentiable(total, scale, push - pull), *health)


def compile_failure() -> str | None:
    """Return why the functions below are not compiled, if that was tried in this process and failed."""
    return _repel.failure or _log_sum_exps.failure or _softmax.failure


@Compiled
def _repel(pairs_RK: Tensor, t: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Turn similarities of negatives into σ(logit); return the sums over texts of −log σ(−logit) and of σ(logit)."""
    logit_RK = t * pairs_RK.to(t.dtype) + b
    decay_RK = logit_RK.abs().neg().exp()
    sum_RK = 1 + decay_RK
    inverse_RK = 1 / sum_RK
    push_RK = torch.where(logit_RK > 0, inverse_RK, decay_RK * inverse_RK)
    # log1p(decay) from the logarithm of the rounded sum and what the rounding lost: as exact as torch's own log1p,
    # which is not vectorised on a CPU and would take as long as a product.
    log1p_RK = sum_RK.log() + (decay_RK - (sum_RK - 1)) * inverse_RK
    pairs_RK.copy_(push_RK)
    return (logit_RK.relu() + log1p_RK).sum(1), push_RK.sum(1)


@Compiled
def _log_sum_exps(pairs_RK: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exps of the logits of each image (R,) and of each text (K,)."""
    logit_RK = t * pairs_RK.to(t.dtype)
    return logit_RK.logsumexp(1), logit_RK.logsumexp(0)


@Compiled
def _softmax(pairs_RK: Tensor, t: Tensor, image_R: Tensor, text_K: Tensor) -> None:
    """Turn similarities into the mean of the probabilities of a text for an image and of an image for a text."""
    logit_RK = t * pairs_RK.to(t.dtype)
    pairs_RK.copy_(((logit_RK - image_R[:, None]).exp() + (logit_RK - text_K).exp()) / 2)
