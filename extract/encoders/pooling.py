"""From a network's tokens to one feature vector."""

import torch
from torch import Tensor

from sail_align.extract.errors import UserError


def require_known_image_pooling(pooling: str | None, encoder: str) -> None:
    """Refuse a pooling that no image encoder has, before anything is downloaded. None stands for the encoder's own.

    Raises:
        UserError: It is unknown.
    """
    if pooling is not None:
        _require(pooling, ("cls", "mean", "cls+mean"), encoder)


def require_image_pooling(pooling: str | None, has_cls: bool, encoder: str) -> str:
    """Return the pooling of an image encoder; a network without class token has only `mean`, and needs no choice.

    Raises:
        UserError: It is missing where there is a choice, or this network does not have it.
    """
    if has_cls:
        return _require(pooling, ("cls", "mean", "cls+mean"), encoder)
    return _require(pooling or "mean", ("mean",), encoder)


def require_text_pooling(pooling: str | None, encoder: str) -> str:
    """Return the pooling of a text encoder.

    Raises:
        UserError: It is missing or unknown.
    """
    return _require(pooling, ("cls", "mean", "last"), encoder)


def _require(pooling: str | None, allowed: tuple[str, ...], encoder: str) -> str:
    if pooling in allowed:
        return pooling
    problem = "needs a pooling" if pooling is None else f"has no pooling {pooling!r}"
    raise UserError(f"Encoder {encoder!r} {problem}; use one of: {', '.join(allowed)}.")


def pool_image(cls_BD: Tensor | None, patches_BhwD: Tensor, pooling: str) -> Tensor:
    """Pool a class token and a map of patches to (B, D), or (B, 2D) for `cls+mean`.

    The class token is None where the network has none; its pooling is then `mean`.
    """
    mean_BD = patches_BhwD.mean(dim=(1, 2))
    if cls_BD is None or pooling == "mean":
        return mean_BD
    return cls_BD if pooling == "cls" else torch.cat([cls_BD, mean_BD], dim=-1)


def pool_patches(cls_BD: Tensor | None, patches_BhwD: Tensor, pooling: str) -> Tensor:
    """Bring each patch into the space of `pool_image`: (B, h, w, D), or concat(CLS, patch) (B, h, w, 2D)."""
    if cls_BD is None or pooling != "cls+mean":
        return patches_BhwD
    return torch.cat([cls_BD[:, None, None, :].expand_as(patches_BhwD), patches_BhwD], dim=-1)


def pool_tokens(hidden_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    """Pool token states to (B, D); `mask_BT` is 0 where a token is padding, on whichever side.

    `cls` is the first token of the text, `last` its last one, `mean` the mean over all of them.
    """
    rows = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
    if pooling == "mean":
        # At least float32: the sum over a long text leaves float16's range.
        weight_BT1 = mask_BT[:, :, None].to(torch.promote_types(hidden_BTD.dtype, torch.float32))
        return (hidden_BTD * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1)
    if pooling == "cls":
        return hidden_BTD[rows, mask_BT.argmax(dim=1)]
    position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return hidden_BTD[rows, (mask_BT * position_T).argmax(dim=1)]
