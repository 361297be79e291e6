"""Patches without the last attention: what each patch says itself, as MaskCLIP reads a vision transformer.

Zhou, Loy and Dai 2022, "Extract Free Dense Labels from CLIP", section 3.2: in the last block a patch attends to nothing
but itself, so that what goes on is its own value, projected; the block's other parts and the last norm stay. The class
token and registers attend as always, so that the picture's own feature does not change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_VALUES, _OUT = ("v_proj", "qkv"), ("o_proj", "proj", "out_proj")


class NoValuePathError(Exception):
    """The last attention's values cannot be told from its output, or it does not see all patches at once."""


@contextmanager
def values_of_patches(network: nn.Module, patches: int) -> Iterator[None]:
    """Let the last `patches` tokens skip the attention of the network's last block.

    Raises:
        NoValuePathError: The network has no such path.
    """
    hooks = _hooks(network, patches)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(network: nn.Module, patches: int) -> list[RemovableHandle]:
    """Find the last attention and hook its projections to values and out of its heads, if nothing is between them."""
    for module in reversed(list(network.modules())):
        if isinstance(module, nn.MultiheadAttention):
            return [_hook_torchs_own(module, patches)]
        into, out = (next((getattr(module, n) for n in names if hasattr(module, n)), None) for names in (_VALUES, _OUT))
        if isinstance(into, nn.Linear) and isinstance(out, nn.Linear):
            bare = isinstance(getattr(module, "norm", nn.Identity()), nn.Identity)
            ungated = getattr(module, "gate", None) is None
            if bare and ungated and into.out_features in (out.in_features, 3 * out.in_features):
                return _hook_projections(into, out, patches)
            break
    raise NoValuePathError


def _hook_projections(into_values: nn.Linear, out: nn.Linear, patches: int) -> list[RemovableHandle]:
    values: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        values.append(output[..., -out.in_features :])  # of queries, keys and values in one, the last third

    def replace(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        if inputs[0].ndim != 3 or inputs[0].shape[1] < patches or not values:
            raise NoValuePathError
        mixed_BTD = inputs[0].clone()
        mixed_BTD[:, -patches:] = values.pop()[:, -patches:]
        return (mixed_BTD,)

    return [into_values.register_forward_hook(keep), out.register_forward_pre_hook(replace)]


def _hook_torchs_own(attention: nn.MultiheadAttention, patches: int) -> RemovableHandle:
    """Hook PyTorch's attention, as OpenCLIP's towers have it: its projections are no modules that are called."""

    def replace(_module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        tokens_BTD, bias = inputs[0], attention.in_proj_bias
        to_itself = all(other is tokens_BTD for other in inputs[1:3])
        if not (to_itself and attention.batch_first) or tokens_BTD.ndim != 3 or tokens_BTD.shape[1] < patches:
            raise NoValuePathError
        to_values, shift = attention.in_proj_weight.chunk(3)[2], None if bias is None else bias.chunk(3)[2]
        mixed_BTD = output[0].clone()
        mixed_BTD[:, -patches:] = attention.out_proj(F.linear(tokens_BTD[:, -patches:], to_values, shift))
        return mixed_BTD, output[1]

    return attention.register_forward_hook(replace)
