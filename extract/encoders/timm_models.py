"""Image encoders of timm."""

import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.imagenet_info import infer_imagenet_subset
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sail_align.extract.encoders.catalogue import Hub, Package, TimmVision
from sail_align.extract.encoders.layers import BlockLayers, require_depth
from sail_align.extract.encoders.preprocessing import ImagePreprocessing, check_image_size
from sail_align.extract.encoders.vision import Backbone
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError


class TimmBackbone(Backbone):
    """A timm model up to its last tokens or feature map."""

    library = "timm"

    def __init__(self, model: Any, preprocessing: ImagePreprocessing, image_size: int | None = None):
        super().__init__(preprocessing, image_size)
        self.stride = model.feature_info[-1]["reduction"]
        self._prefix_tokens = getattr(model, "num_prefix_tokens", None)
        if self._prefix_tokens is not None:
            check_image_size(self.image_size, self.stride)
        self._attention = getattr(model, "attn_pool", None) is not None
        # A head of other classes than ImageNet's is the projection of CLIP's and PE's embeddings.
        self._projects = bool(getattr(model, "num_classes", 0)) and infer_imagenet_subset(model) is None
        self.has_pooler = self._attention or self._projects
        self.pools_patches = self.has_pooler and self._prefix_tokens is not None
        self.has_cls = bool(self._prefix_tokens) and getattr(model, "cls_token", None) is not None
        self._channel_dim = 3 if getattr(model, "output_fmt", "NCHW") == "NHWC" else 1
        # Channels last makes EfficientNet-lite0 half as fast again on a CPU, in batches of 32.
        self._format = torch.contiguous_format if self._prefix_tokens is not None else torch.channels_last
        self.model: Any = model.to(memory_format=self._format)

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the class token or the pooled image, if there is one, and the map of patches."""
        features = self.model.forward_features(pixels_BCHW.to(memory_format=self._format))
        pooled_BE = self.model.forward_head(features, pre_logits=not self._projects) if self.pools else None
        return self._split(features, pixels_BCHW, pooled_BE)

    def prepare_layers(self, layers: Sequence[int], name: str) -> None:
        """Find the blocks and the final norm, and check that there are so many layers."""
        size = self.preprocessing.crop
        self._layers = BlockLayers(self.model, name, torch.zeros(1, 3, size, size))
        require_depth(layers, self._layers.depth, name)

    def forward_layers(self, pixels_BCHW: Tensor, layers: Sequence[int]) -> list[tuple[Tensor | None, Tensor]]:
        """Return class token and map of patches of each layer."""
        states = self._layers.states(layers, pixels_BCHW.to(memory_format=self._format))
        return [self._split(state, pixels_BCHW) for state in states]

    def _split(
        self, features: Tensor, pixels_BCHW: Tensor, pooled_BE: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        if features.ndim == 4:
            return pooled_BE, features.movedim(self._channel_dim, 3)
        height, width = (side // self.stride for side in pixels_BCHW.shape[-2:])
        patches_BhwD = features[:, self._prefix_tokens :].reshape(features.shape[0], height, width, -1)
        return (features[:, 0] if self.has_cls and not self.pools else pooled_BE), patches_BhwD

    def pool_each(self, patches_BhwD: Tensor) -> Tensor:
        """Apply the network's head to each patch alone, (B, h, w, E)."""
        patches_ND = patches_BhwD.flatten(0, 2)
        pooled_ND = self.model.attn_pool(patches_ND[:, None]) if self._attention else patches_ND
        pooled_NE: Tensor = self.model.fc_norm(pooled_ND)
        if self._projects:
            pooled_NE = self.model.head(pooled_NE)
        return pooled_NE.reshape(*patches_BhwD.shape[:3], -1)


def fetch_timm(entry: TimmVision) -> EncoderFiles:
    """Find the files of a timm model, by default in the repository that timm names for it.

    Raises:
        UserError: timm has no such model, or the weights are not available.
    """
    if entry.origin:
        return EncoderFiles.fetch(entry.origin)
    repository = _published(entry.model).hf_hub_id
    if not repository:
        raise UserError(f"timm has no weights for {entry.model!r} on the hub. Choose one of timm.list_pretrained().")
    return EncoderFiles.fetch(Hub(repository))


def timm_sizes(entry: TimmVision) -> tuple[int, int | None]:
    """Return a timm model's own image size, and its patch size if it takes images in patches. Nothing is loaded.

    Raises:
        UserError: timm has no such model, or its input is not square.
    """
    preprocessing = entry.preprocessing or _published_preprocessing(entry.model)
    with torch.device("meta"):
        model: Any = timm.create_model(entry.model)
    has_patches = getattr(model, "num_prefix_tokens", None) is not None
    return preprocessing.crop, model.feature_info[-1]["reduction"] if has_patches else None


def load_timm(entry: TimmVision, image_size: int | None = None) -> tuple[EncoderFiles, TimmBackbone]:
    """Load a timm model with its weights.

    Args:
        entry: The model.
        image_size: Height and width of images; None for the model's own.

    Raises:
        UserError: timm has no such model, its input is not square, or the weights are not available or do not match.
    """
    name = entry.model
    preprocessing = entry.preprocessing or _published_preprocessing(name)
    files = fetch_timm(entry)
    if isinstance(entry.origin, Package):
        return files, TimmBackbone(fold_batch_norms(load_classifier(files.path, name)), preprocessing, image_size)
    weights = files.path / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"The repository of timm's {name!r} has no model.safetensors. Choose another model.")
    with torch.device("meta"):
        parameters = inspect.signature(type(timm.create_model(name))).parameters
    # Vision transformers reject other sizes than their own without this option.
    options: Any = {"dynamic_img_size": True} if "dynamic_img_size" in parameters else {}
    # Older versions of timm would read some models' files as the .npz files of their authors.
    source = {"file": str(weights), "custom_load": False}
    model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **options)
    if image_size is not None and not options and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(image_size, image_size))
    return files, TimmBackbone(model, preprocessing, image_size)


def _published(name: str) -> Any:
    """Return timm's record of a model's weights: their repository and their preprocessing."""
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as problem:
        near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3)
        advice = f"Did you mean {' or '.join(near)}?" if near else "Choose one of timm.list_pretrained()."
        raise UserError(f"timm has no model {name!r}. {advice}") from problem


def _published_preprocessing(name: str) -> ImagePreprocessing:
    published = _published(name)
    _, height, width = published.input_size
    if height != width or published.crop_mode not in {"center", "squash"}:
        raise UserError(
            f"timm's {name!r} takes {published.crop_mode} crops of {height} × {width}. Only squares, cropped from the "
            "centre or squashed, are supported."
        )
    resize = None if published.crop_mode == "squash" else int(height / published.crop_pct)
    return ImagePreprocessing(height, resize, published.interpolation, published.mean, published.std)


def load_classifier(weights: Path, name: str) -> nn.Module:
    """Return timm's model `name` with its ImageNet classifier, from a file with the tensor names of another library.

    The file holds the same tensors in the same order. The last part of each name (`weight`, `running_var` …) and the
    shape must agree.

    Raises:
        UserError: The file does not match; the message names the first difference.
    """
    model = timm.create_model(name, pretrained=False)
    found = torch.load(weights, map_location="cpu", weights_only=True)
    expected = model.state_dict()
    if len(found) != len(expected):
        raise UserError(
            f"{weights} is invalid: got {len(found)} tensors, expected {len(expected)}. Reinstall its package."
        )
    for (theirs, tensor), (ours, place) in zip(found.items(), expected.items(), strict=True):
        if theirs.rpartition(".")[2] != ours.rpartition(".")[2] or tensor.shape != place.shape:
            raise UserError(
                f"{weights} is invalid: got {theirs} of shape {tuple(tensor.shape)}, expected {ours} of shape "
                f"{tuple(place.shape)}. Reinstall its package."
            )
    model.load_state_dict(dict(zip(expected, found.values(), strict=True)))
    return model.eval()


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution before it, in place. The network then is half as fast again.

    This is for EfficientNet, where each batch norm directly follows the convolution that is defined before it.
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
