"""The contrastive losses: sigmoid (eq. 1 and 2 of the paper) and InfoNCE, for one or several captions per image.

Row i of the images and row i of each caption set are a positive pair; all other rows of the batch are negatives. Value
and gradients are computed together, in closed form and block by block. See `PairBlocks` for memory and precision.

Shapes: a batch has M images, |B| = M. Each of C caption sets has N texts, which are the whole batch or a part of it. E
is the embedding dimension. A block has R images and K texts.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sail_align.align.model.fused import Compiled
from sail_align.align.model.pair_blocks import PairBlocks

LogSumExp = Callable[[Tensor], Tensor]


class LossValue(NamedTuple):
    """A loss and statistics of its logits and gradients, as 0-dimensional float32 tensors.

    Only `total` carries gradients. The logits are means over the positive and over the negative pairs. A mass is the
    sum of |∂loss/∂logit| over the positive or the negative pairs: the pull against the push. Collapse shows in these.

    For a part of a batch, all five are shares that add up to the values of the batch.
    """

    total: Tensor
    positive_logit: Tensor
    negative_logit: Tensor
    positive_mass: Tensor
    negative_mass: Tensor


Loss = Callable[..., LossValue]
"""A contrastive loss of a batch, or the share of a part of it: see `sigmoid_loss` for the arguments."""


def sigmoid_loss(
    image_ME: Tensor,
    text_CNE: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    /,
    divisor: Literal["pairs", "batch"] = "pairs",
    weights: Sequence[float] | None = None,
    first: int = 0,
) -> LossValue:
    """Return `−1/|B|² · Σ_c w_c Σ_ij log σ(z_ij (t x_i·y_j^c + b))`, with z_ij = +1 if i = j, else −1, and t = exp(τ).

    One caption set gives the paper's eq. 1. Several are summed as in eq. 2; the authors' code averages them. The paper
    prints `−t x·y + b` in the exponent: with the initial b of −10, that would add +10 to each positive. The authors'
    code and SigLIP have b inside the logit, as here.

    Args:
        image_ME: Unit-norm image embeddings (M, E) of the whole batch.
        text_CNE: Unit-norm text embeddings (C, N, E): C captions of each image of the batch, or of a part of it.
        log_scale: τ, scalar.
        bias: b, scalar.
        divisor: `pairs` divides by |B|², as the paper does; `batch` by |B|, as SigLIP does.
        weights: w, one for each caption set; all 1 by default.
        first: Image that belongs to the first text. The other images follow in order.

    Raises:
        ValueError: A text has no image, or a caption set has no weight.
    """
    blocks = PairBlocks(image_ME, text_CNE, log_scale, bias, first=first, weights=weights)
    repel = _repel.compiled_if(blocks.many)
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
    """Return CLIP's loss: the mean of the image → text and text → image cross-entropies, summed over caption sets.

    Each caption set has its own softmax, so captions of one image are not each other's negatives. A bias cancels in the
    softmax: b is unused and its gradient is 0. The similarities are computed twice, first for the normalisers and then
    for the gradients.

    The arguments are those of `sigmoid_loss`. A part of a batch also needs `across`, because images are normalised over
    all texts: it returns the log-sum-exp over the parts for each element of a tensor (2, C, M).
    """
    own = slice(first, first + text_CNE.shape[1])
    blocks = PairBlocks(image_ME, text_CNE, log_scale, bias, first=first, weights=weights)
    log_sum_exps, softmax = _log_sum_exps.compiled_if(blocks.many), _softmax.compiled_if(blocks.many)
    with blocks.without_graph():
        t = blocks.scale
        logit_CN = t * blocks.positives()
        # Log-sum-exps of the negatives of each image and of each text.
        image_CM = logit_CN.new_full((len(logit_CN), blocks.batch), -torch.inf)
        text_CN = torch.full_like(logit_CN, -torch.inf)
        for block in blocks:
            added = log_sum_exps(block.pairs, t)
            for so_far, more in zip(block.of(image_CM, text_CN), added, strict=True):
                torch.logaddexp(so_far, more, out=so_far)
        positive_CM = torch.full_like(image_CM, -torch.inf)
        positive_CM[:, own] = logit_CN
        if across:
            image_CM, positive_CM = across(torch.stack((image_CM, positive_CM)))
        # In terms of the rivals' log-odds, −log p = softplus and 1 − p = σ stay exact when p is nearly 1.
        rival_2CN = torch.stack((image_CM[:, own], text_CN)) - logit_CN
        loss, pull_CN = blocks.weighted(F.softplus(rival_2CN).mean(0)), rival_2CN.sigmoid().mean(0)
        if blocks.learning:
            image_CM, text_CN = image_CM.logaddexp(positive_CM), text_CN.logaddexp(logit_CN)
            for block in blocks:
                softmax(block.pairs, t, *block.of(image_CM, text_CN))
                blocks.push(block)
        blocks.pull(pull_CN)
        # Probabilities sum to 1, so the negatives push as strongly as the positives pull.
        mass = blocks.weighted(pull_CN)
        return _value(blocks, logit_CN, torch.zeros_like(t), 1 / blocks.batch, loss, mass, mass)


def _value(
    blocks: PairBlocks, logit_CN: Tensor, b: Tensor, scale: float, loss: Tensor, pull: Tensor, push: Tensor
) -> LossValue:
    """Return a loss with its gradients, given unscaled sums over its pairs."""
    positives, pairs = logit_CN.double().sum(), len(logit_CN) * blocks.batch
    negatives = blocks.scale * blocks.sum() + b * (logit_CN.numel() * blocks.batch) - positives
    positive_logit, negative_logit = positives / pairs, negatives / (pairs * (blocks.batch - 1))
    total, *health = (
        value.to(blocks.exact) for value in (scale * loss, positive_logit, negative_logit, scale * pull, scale * push)
    )
    return LossValue(blocks.differentiable(total, scale, push - pull), *health)


@Compiled
def _repel(pairs_RK: Tensor, t: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Turn similarities of negatives into σ(logit) in place; return sums of −log σ(−logit) and σ(logit) over texts."""
    logit_RK = t * pairs_RK.to(t.dtype) + b
    decay_RK = logit_RK.abs().neg().exp()
    sum_RK = 1 + decay_RK
    inverse_RK = 1 / sum_RK
    push_RK = torch.where(logit_RK > 0, inverse_RK, decay_RK * inverse_RK)
    # log1p(decay) is the logarithm of the rounded sum, plus a correction for the rounding. It is as exact as
    # torch.log1p, which is not vectorised on a CPU and would take as long as a matrix product.
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
    """Turn similarities in place into the mean of the image → text and text → image probabilities."""
    logit_RK = t * pairs_RK.to(t.dtype)
    pairs_RK.copy_(((logit_RK - image_R[:, None]).exp() + (logit_RK - text_K).exp()) / 2)
