"""From the tokens of a network to one feature vector."""

import torch
from torch import Tensor

from sail_align.extract.errors import UserError

IMAGE_POOLINGS = ("cls", "mean", "cls+mean", "pooler", "pooler+mean")
"""`pooler` is the network's own head, which pools all tokens (see `vision.Backbone.pools`)."""
TEXT_POOLINGS = ("cls", "mean", "last", "max", "mean_sqrt_len_tokens", "weightedmean")
"""Those of sentence-transformers, under its names but for `last`, which is its `lasttoken`."""


def check_pooling(pooling: str | None, allowed: tuple[str, ...], encoder: str) -> str:
    """Return the pooling if it is one of `allowed`.

    Raises:
        UserError: It is missing or not allowed.
    """
    if pooling in allowed:
        return pooling
    problem = "needs a pooling" if pooling is None else f"has no pooling {pooling!r}"
    raise UserError(f"Encoder {encoder!r} {problem}. Choose one of: {', '.join(allowed)}.")


def pool_image(cls_BD: Tensor | None, patches_BhwD: Tensor, pooling: str) -> Tensor:
    """Pool a class token and a map of patches to (B, D), or to (B, 2D) for `cls+mean`.

    With a `pooler`, its output takes the place of the class token. It is None if the network has neither, and the
    pooling is then `mean`.
    """
    if cls_BD is not None and pooling in ("cls", "pooler"):
        return cls_BD
    mean_BD = patches_BhwD.mean(dim=(1, 2))
    return mean_BD if cls_BD is None or pooling == "mean" else torch.cat([cls_BD, mean_BD], dim=-1)


def pool_patches(cls_BD: Tensor | None, patches_BhwD: Tensor, pooling: str) -> Tensor:
    """Map each patch into the space of `pool_image`: (B, h, w, D), or concat(CLS, patch) with 2D for `cls+mean`."""
    if cls_BD is None or "+" not in pooling:
        return patches_BhwD
    spread_BhwD = cls_BD[:, None, None, :].expand(*patches_BhwD.shape[:3], -1)
    return torch.cat([spread_BhwD, patches_BhwD], dim=-1)


def pool_tokens(hidden_BTD: Tensor, mask_BT: Tensor, pooling: str, left_out: int = 0) -> Tensor:
    """Pool token states to (B, D), or to (B, kD) for k poolings that are joined by `+`.

    Args:
        hidden_BTD: The token states.
        mask_BT: 1 for tokens of the text, 0 for padding on either side.
        pooling: `cls` is the first token of the text, `last` its last one, `mean` the mean of all, `max` the maximum
            of each dimension, `mean_sqrt_len_tokens` the sum divided by the root of their number, `weightedmean` the
            mean weighted by position, 1 for the first token.
        left_out: Number of tokens at the beginning of each text that are not pooled.
    """
    if "+" in pooling:
        return torch.cat([pool_tokens(hidden_BTD, mask_BT, each, left_out) for each in pooling.split("+")], dim=-1)
    number_BT = mask_BT.cumsum(dim=1) if left_out or pooling == "weightedmean" else mask_BT
    if left_out:
        mask_BT = mask_BT * (number_BT > left_out).to(mask_BT.dtype)
    rows = torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device)
    if "mean" in pooling:
        # At least float32: the sum over a long text exceeds the range of float16.
        weight_BT1 = mask_BT[:, :, None].to(torch.promote_types(hidden_BTD.dtype, torch.float32))
        if pooling == "weightedmean":
            weight_BT1 = weight_BT1 * number_BT[:, :, None]
        number_B1 = weight_BT1.sum(dim=1)
        sum_BD = (hidden_BTD * weight_BT1).sum(dim=1)
        return sum_BD / (number_B1.sqrt() if pooling == "mean_sqrt_len_tokens" else number_B1)
    if pooling == "max":
        return hidden_BTD.masked_fill(mask_BT[:, :, None] == 0, float("-inf")).amax(dim=1)
    if pooling == "cls":
        return hidden_BTD[rows, mask_BT.argmax(dim=1)]
    position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return hidden_BTD[rows, (mask_BT * position_T).argmax(dim=1)]
