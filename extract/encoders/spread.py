"""Spreads the blocks of a network over several devices, for networks that are too large for one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sail_align.extract.encoders.layers import block_stacks
from sail_align.extract.errors import UserError


def spread(network: nn.Module, devices: Sequence[torch.device]) -> None:
    """Move a network to devices: its blocks in their order, in shares of about equal bytes, all else to the first.

    Inputs of a block are copied to its device, and the output of the last block to the device of the rest.

    Raises:
        UserError: The network has fewer blocks than there are devices.
    """
    blocks = max((list(stack) for stack in block_stacks(network)), key=_bytes, default=[])
    if len(blocks) < len(devices):
        raise UserError(f"A network with {len(blocks)} blocks cannot be spread over {len(devices)} devices.")
    total = sum(map(_size, network.parameters()))
    before = total - _bytes(blocks)
    for block in blocks:
        middle = before + _bytes([block]) / 2
        before += _bytes([block])
        block.to(devices[int(middle * len(devices) / total)])
        block.register_forward_pre_hook(_follow, with_kwargs=True)
    within = {each for block in blocks for each in block.modules()}
    outside = [each for each in network.modules() if each not in within]
    for module in outside:
        module._apply(lambda tensor: tensor.to(devices[0]), recurse=False)  # type: ignore[no-untyped-call]
    stays = next(weight for module in outside for weight in module.parameters(recurse=False))
    blocks[-1].register_forward_hook(lambda _block, _inputs, output: _copy(output, stays.device))


def _follow(block: nn.Module, inputs: Any, options: Any) -> Any:
    device = next(block.parameters()).device  # as it is now: a program may have moved the network
    moved: tuple[Any, Any] = _copy((inputs, options), device)
    return moved


def _copy(tree: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), tree)


def _bytes(modules: Sequence[nn.Module]) -> int:
    return sum(_size(each) for module in modules for each in module.parameters())


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
