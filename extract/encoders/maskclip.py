"""Dense features without the last attention, as MaskCLIP reads a vision transformer.

Zhou, Loy and Dai 2022, "Extract Free Dense Labels from CLIP", section 3.2: in the last block, a patch attends only to
itself, so the attention's output is the projected value of the patch. The rest of the block and the last norm stay. The
class token and registers attend as usual, so the feature of the whole image does not change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sail_align.extract.errors import UserError

_VALUES, _OUT = ("v_proj", "qkv"), ("o_proj", "proj", "out_proj")
_POOLING_HEADS = {"head", "attn_pool"}
"""Names of modules after the last block, which may have an attention of their own."""
_NO_LAST_ATTENTION = (
    "The image encoder has no last attention that its patches could skip, as in MaskCLIP. Evaluate it without this "
    "variant."
)


@contextmanager
def skip_last_attention(network: nn.Module, patches: int) -> Iterator[None]:
    """Let the last `patches` tokens skip the attention of the network's last block, by hooks on its projections.

    Raises:
        UserError: The network's last attention has no separate values, or does not see all patches at once.
    """
    handles = _add_hooks(network, patches)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_hooks(network: nn.Module, patches: int) -> list[RemovableHandle]:
    """Find the last attention and hook its value and output projections, if nothing else acts between them."""
    blocks = [module for name, module in network.named_modules() if not _POOLING_HEADS & set(name.split("."))]
    for module in reversed(blocks):
        if isinstance(module, nn.MultiheadAttention):
            return [_hook_multihead_attention(module, patches)]
        into, out = (next((getattr(module, n) for n in names if hasattr(module, n)), None) for names in (_VALUES, _OUT))
        if isinstance(into, nn.Linear) and isinstance(out, nn.Linear):
            has_norm = not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity)
            has_gate = getattr(module, "gate", None) is not None
            if has_norm or has_gate or into.out_features not in (out.in_features, 3 * out.in_features):
                break
            return _hook_projections(into, out, patches)
    raise UserError(_NO_LAST_ATTENTION)


def _hook_projections(into_values: nn.Linear, out: nn.Linear, patches: int) -> list[RemovableHandle]:
    values: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        values.append(output[..., -out.in_features :])  # the last third if queries, keys and values are fused

    def replace(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        if inputs[0].ndim != 3 or inputs[0].shape[1] < patches or not values:
            raise UserError(_NO_LAST_ATTENTION)
        mixed_BTD = inputs[0].clone()
        mixed_BTD[:, -patches:] = values.pop()[:, -patches:]
        return (mixed_BTD,)

    return [into_values.register_forward_hook(keep), out.register_forward_pre_hook(replace)]


def _hook_multihead_attention(attention: nn.MultiheadAttention, patches: int) -> RemovableHandle:
    """Replace the output of PyTorch's attention, which does not call its projections as modules."""

    def replace(_module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        tokens_BTD, bias = inputs[0], attention.in_proj_bias
        is_self_attention = all(other is tokens_BTD for other in inputs[1:3])
        if not (is_self_attention and attention.batch_first) or tokens_BTD.ndim != 3 or tokens_BTD.shape[1] < patches:
            raise UserError(_NO_LAST_ATTENTION)
        value_weight = attention.in_proj_weight.chunk(3)[2]
        value_bias = None if bias is None else bias.chunk(3)[2]
        mixed_BTD = output[0].clone()
        mixed_BTD[:, -patches:] = attention.out_proj(F.linear(tokens_BTD[:, -patches:], value_weight, value_bias))
        return mixed_BTD, output[1]

    return attention.register_forward_hook(replace)
