"""Image encoders of timm."""

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sail_align.extract.encoders.catalogue import Hub, ImagePreprocessing
from sail_align.extract.encoders.vision import Backbone
from sail_align.extract.encoders.weights import Checkpoint
from sail_align.extract.errors import UserError


class TimmBackbone(Backbone):
    """A timm model up to its last tokens or feature map."""

    library = "timm"

    def __init__(self, model: Any):
        super().__init__()
        self.stride = model.feature_info[-1]["reduction"]
        self._prefix_tokens = getattr(model, "num_prefix_tokens", None)
        self.has_cls = bool(self._prefix_tokens) and getattr(model, "cls_token", None) is not None
        self._channels = 3 if getattr(model, "output_fmt", "NCHW") == "NHWC" else 1
        # Convolutions are faster with channels last: EfficientNet-lite0 by half on a CPU, in batches of 32.
        self._format = torch.contiguous_format if self._prefix_tokens is not None else torch.channels_last
        self.model: Any = model.to(memory_format=self._format)

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the class token, if there is one, and the map of patches."""
        features = self.model.forward_features(pixels_BCHW.to(memory_format=self._format))
        if features.ndim == 4:
            return None, features.movedim(self._channels, 3)
        height, width = (side // self.stride for side in pixels_BCHW.shape[-2:])
        patches_BhwD = features[:, self._prefix_tokens :].reshape(len(features), height, width, -1)
        return (features[:, 0] if self.has_cls else None), patches_BhwD


def timm_origin(name: str) -> Hub:
    """Return the repository that timm names for a model's weights.

    Raises:
        UserError: timm has no such model, or no weights of it on the hub.
    """
    repository = _published(name).hf_hub_id
    if not repository:
        raise UserError(f"timm has no weights for {name!r} on the hub; choose one of timm.list_pretrained().")
    return Hub(repository)


def timm_preprocessing(name: str) -> ImagePreprocessing:
    """Return the preprocessing with which timm evaluates a model.

    Raises:
        UserError: timm has no such model, or its input is neither a centre crop nor a squashed picture, or no square.
    """
    published = _published(name)
    _, height, width = published.input_size
    if height != width or published.crop_mode not in {"center", "squash"}:
        raise UserError(
            f"timm's {name!r} takes {published.crop_mode} crops of {height} × {width}; only squares, cut from the "
            f"centre or squashed, are supported."
        )
    resize = None if published.crop_mode == "squash" else int(height / published.crop_pct)
    return ImagePreprocessing(height, resize, published.interpolation, published.mean, published.std)


def _published(name: str) -> Any:
    """Return what timm says of a model's weights: where they are, and what they take."""
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as problem:
        near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3)
        guess = f"did you mean {' or '.join(near)}?" if near else "choose one of timm.list_pretrained()."
        raise UserError(f"timm has no model {name!r}; {guess}") from problem


def timm_backbone(checkpoint: Checkpoint, name: str) -> TimmBackbone:
    """Return timm's model `name` with the weights of its repository.

    Raises:
        UserError: The repository holds them in another form.
    """
    weights = checkpoint.path / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"timm's {name!r} has no model.safetensors in its repository; choose another model.")
    with torch.device("meta"):
        parameters = inspect.signature(type(timm.create_model(name))).parameters
    # Vision transformers refuse other sizes than their own unless built for it.
    options: Any = {"dynamic_img_size": True} if "dynamic_img_size" in parameters else {}
    overlay = {"file": str(weights)}
    return TimmBackbone(timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options))


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
