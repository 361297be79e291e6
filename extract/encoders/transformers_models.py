"""Models of transformers: loading every tensor from the checkpoint, and the backbone of image encoders."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from logging import getLogger
from math import isqrt
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GteConfig, PreTrainedConfig
from transformers.utils import logging

from sail_align.extract.encoders.layers import TransformersLayers, require_depth
from sail_align.extract.encoders.preprocessing import ImagePreprocessing, check_image_size
from sail_align.extract.encoders.towers import image_tower, pool_each, pooled_output, pools_patches
from sail_align.extract.encoders.vision import Backbone
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError

NV_EMBED = "nvembed"
"""`model_type` of NV-Embed-v2."""
_log = getLogger(__name__)

# GTE was first published with code of its own (`model_type` "new"), whose config has other fields than transformers'
# GteConfig. The config is translated field by field, so that no remote code runs; transformers renames the tensors.
# A field that is not listed below has no known translation and is rejected.

# Fields with the same name and meaning in both configs.
_SHARED = frozenset(
    {
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "hidden_act",
        "hidden_dropout_prob",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "layer_norm_eps",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "pad_token_id",
        "type_vocab_size",
        "vocab_size",
    }
)
# Fields that select another architecture, with the only value that GteConfig's model implements.
_FIXED = {
    "layer_norm_type": "layer_norm",
    "position_embedding_type": "rope",
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
}
# Fields that describe how the original code runs or how it was saved, but not what it computes.
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "model_type",
        "pack_qkv",
        "torch_dtype",
        "transformers_version",
        "unpad_inputs",
        "use_memory_efficient_attention",
    }
)
# Defaults of the original config that differ from those of GteConfig.
_DEFAULTS = {"vocab_size": 30528, "max_position_embeddings": 2048, "pad_token_id": 0}


def translate_gte_config(config: dict[str, Any]) -> GteConfig:
    """Translate the `config.json` of a GTE model in its original form.

    Raises:
        UserError: A field is unknown, or asks for something that the native model does not implement.
    """
    unknown = sorted(config.keys() - _SHARED - _FIXED.keys() - _WITHOUT_EFFECT - {"rope_theta", "rope_scaling"})
    if unknown:
        field = unknown[0]
        raise UserError(
            f"The GTE config is invalid: its field {field!r} with value {config[field]!r} has no translation. Use a "
            "checkpoint in the native form (model_type 'gte')."
        )
    for field, value in _FIXED.items():
        if config.get(field, value) != value:
            raise UserError(f"The GTE config is invalid: {field} is {config[field]!r}; only {value!r} can be loaded.")
    settings = {**_DEFAULTS, **{field: config[field] for field in _SHARED & config.keys()}}
    theta, scaling = float(config.get("rope_theta", 10_000.0)), config.get("rope_scaling")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        if scaling.keys() != {"type", "factor"} or scaling["type"] != "ntk":
            raise UserError(
                f"The GTE config is invalid: rope_scaling is {scaling!r}; only type 'ntk' with a factor can be loaded."
            )
        # The original's fixed NTK scaling by f has the rotary frequencies (θ·f)^(−2i/d) · f^(−2/d) for head size d.
        # These are the frequencies of base θ·f, all divided by f^(2/d), which is "linear" scaling in transformers.
        factor = float(scaling["factor"])
        head_dim = settings.get("hidden_size", 768) // settings.get("num_attention_heads", 12)
        rope = {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / head_dim)}
    return GteConfig(**settings, rope_parameters=rope)


# Encoders of models that also have a decoder, which no feature here uses.
_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}


def load_pretrained(
    files: EncoderFiles,
    *,
    allow_code: bool,
    of_images: bool = False,
    dtype: str = "float32",
    bidirectional: bool = False,
) -> nn.Module:
    """Load the base model of a checkpoint.

    Args:
        files: A folder in the form of `save_pretrained`.
        allow_code: Run the repository's own code if transformers does not have the architecture.
        of_images: Load the image tower alone, if there are two towers.
        dtype: Precision of the tensors, so that large models never take the memory of float32. A model with buffers
            that this rounds is loaded in float32, for `Runtime.freeze` to keep them exact.
        bidirectional: Let tokens attend to later ones in a model that transformers runs causally.

    Raises:
        UserError: The architecture is unknown, or tensors are missing or of another shape. transformers would
            initialise those at random.
    """
    config, is_remote = _read_config(files, allow_code)
    if bidirectional:
        config.is_causal = False
    elif not is_remote and type(config).model_type == files.config.get("model_type"):
        _warn_of_code(files)
    if getattr(config, "use_cache", False):  # of keys and values, for the next token
        config.use_cache = False
    if of_images and not is_remote:
        loader, config, options = image_tower(config)
    else:
        loader, options = getattr(transformers, _ENCODERS.get(config.model_type, "AutoModel")), {}
        if files.config.get("model_type") == NV_EMBED and not is_remote:
            from sail_align.extract.encoders.nv_embed import NVEmbedModel

            loader = NVEmbedModel
    with no_progress_bar():
        model, loading = loader.from_pretrained(
            files.path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=is_remote,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, with all missing ones
            **options,
        )
    # The pooler is a layer after the token states that no pooling here uses.
    lost = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    lost += sorted(str(key) for key, *_ in loading["mismatched_keys"])
    if lost:
        raise UserError(
            f"The weights in {files.path} do not match its config: {len(lost)} tensors are missing or of another "
            f"shape, the first is {lost[0]}. Use the config that belongs to the weights."
        )
    network: nn.Module = model
    if not getattr(config, "is_causal", True):
        # transformers omits the mask of texts without padding, and attention is then what its own flag says.
        for module in network.modules():
            if hasattr(module, "is_causal"):
                setattr(module, "is_causal", False)  # noqa: B010 (mypy takes attributes for tensors)
    if any(buffer.dtype in (torch.bfloat16, torch.float16) for buffer in network.buffers()):
        return load_pretrained(files, allow_code=allow_code, of_images=of_images, bidirectional=bidirectional)
    return network


def _warn_of_code(files: EncoderFiles) -> None:
    """Warn if a repository has code for an architecture that transformers has: the two may compute other features."""
    if code := files.config.get("auto_map", {}).get("AutoModel"):
        _log.warning(
            "%s has code of its own (%s), which is not run. transformers' %s is used instead, which may give other "
            "features.",
            files.path,
            code,
            files.config["model_type"],
        )


def _read_config(files: EncoderFiles, allow_code: bool) -> tuple[PreTrainedConfig, bool]:
    """Return a checkpoint's config, and whether it is of an architecture in the repository's own code."""
    kind, code = files.config.get("model_type"), files.config.get("auto_map", {})
    if kind == "new":  # GTE in its original form
        return translate_gte_config(files.config), False
    if kind == NV_EMBED:
        from sail_align.extract.encoders.nv_embed import translate_nv_config  # imports a model, which takes seconds

        return translate_nv_config(files.config), False
    with suppress(ValueError):  # transformers does not have the architecture
        return AutoConfig.from_pretrained(files.path, local_files_only=True, trust_remote_code=False), False
    if not code:
        raise UserError(f"{files.path} has model_type {kind!r}, which the installed transformers lacks. Update it.")
    if not allow_code:
        raise UserError(
            f"{files.path} has model_type {kind!r}, which transformers {transformers.__version__} lacks: "
            f"{code.get('AutoModel', 'its model')} needs its own code to run. If you trust it, pass "
            "--allow-remote-code <owner>/<name>@<40-digit commit>."
        )
    elsewhere = [reference for reference in code.values() if "--" in str(reference)]
    if elsewhere:
        raise UserError(
            f"The code {elsewhere[0]!r} is in another repository, which no revision pins. Copy it into this one."
        )
    return AutoConfig.from_pretrained(files.path, local_files_only=True, trust_remote_code=True), True


def patch_size(config: dict[str, Any]) -> int | None:
    """Return the side of the patches that the config of a transformers model names. None if it names none."""
    found = config.get("vision_config", config).get("patch_size")
    patch: int | None = found[0] if isinstance(found, list | tuple) else found
    return patch


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar for the tensors of a file, and its list of those that are not used."""
    settings: Any = logging  # has no type hints
    was_enabled, verbosity = settings.is_progress_bar_enabled(), settings.get_verbosity()
    settings.disable_progress_bar()
    settings.set_verbosity_error()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if was_enabled:
            settings.enable_progress_bar()


class TransformersBackbone(Backbone):
    """A transformers vision model up to its last tokens or feature map.

    The last h · w tokens are the patches. If there are more, the first one is the class token; any others are registers
    between the two and are ignored.

    Attributes:
        tokens: Number of tokens of an image, with all special ones.
        interpolates: Whether the model takes images of other sizes than its own only on request.
    """

    library = "transformers"

    def __init__(self, model: Any, preprocessing: ImagePreprocessing, image_size: int | None = None):
        super().__init__(preprocessing, image_size)
        if getattr(model, "main_input_name", None) != "pixel_values":
            raise UserError(f"{type(model).__name__} takes more than pixels. Use an encoder of images alone.")
        self.model: Any = model
        size = self.preprocessing.crop
        accepted = inspect.signature(model.forward).parameters
        # ViT and related models reject other sizes than their own without this option; DINOv2 and DINOv3 accept them.
        self.interpolates = "interpolate_pos_encoding" in accepted
        self._options = {"interpolate_pos_encoding": True} if self.interpolates else {}
        patch = patch_size(model.config.to_dict())
        if patch is not None:
            check_image_size(self.image_size, patch)
        with torch.inference_mode():
            features = self._run(torch.zeros(1, 3, size, size)).last_hidden_state
        if features.ndim == 4:
            self.stride, self.has_cls = size // features.shape[-1], False
            self.tokens = features.shape[2] * features.shape[3]
        else:
            self.tokens = features.shape[1]
            grid = size // patch if patch else self.tokens
            if patch is None or grid**2 > self.tokens:  # the network merges patches, or pools them in stages
                grid = isqrt(self.tokens)
                patch = size // grid
            self.stride = patch
            self.has_cls = self.tokens > grid**2
        self._pooled = pooled_output(model)
        self.has_pooler, self.pools_patches = self._pooled is not None, pools_patches(model)

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the class token or the pooled image, if there is one, and the map of patches."""
        output = self._run(pixels_BCHW)
        pooled_BE = output[self._pooled] if self.pools else None
        return self._split(output.last_hidden_state, pixels_BCHW, pooled_BE)

    def prepare_layers(self, layers: Sequence[int], name: str) -> None:
        """Find the final norm, and check that there are so many layers."""
        size = self.preprocessing.crop
        self._layers = TransformersLayers(self.model, name, pixel_values=torch.zeros(1, 3, size, size), **self._options)
        require_depth(layers, self._layers.depth, name)

    def forward_layers(self, pixels_BCHW: Tensor, layers: Sequence[int]) -> list[tuple[Tensor | None, Tensor]]:
        """Return class token and map of patches of each layer."""
        states = self._layers.states(layers, pixel_values=pixels_BCHW, **self._options)
        return [self._split(state, pixels_BCHW) for state in states]

    def _split(
        self, features: Tensor, pixels_BCHW: Tensor, pooled_BE: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        if features.ndim == 4:
            return pooled_BE, features.permute(0, 2, 3, 1)
        height, width = (side // self.stride for side in pixels_BCHW.shape[-2:])
        patches_BhwD = features[:, -height * width :].reshape(features.shape[0], height, width, -1)
        if self.has_cls and not self.pools:
            return features[:, 0], patches_BhwD
        return pooled_BE, patches_BhwD

    def pool_each(self, patches_BhwD: Tensor) -> Tensor:
        """Apply the network's head to each patch alone, (B, h, w, E)."""
        return pool_each(self.model, patches_BhwD.flatten(0, 2)).reshape(*patches_BhwD.shape[:3], -1)

    def _run(self, pixels_BCHW: Tensor) -> Any:
        return self.model(pixels_BCHW, **self._options)
