"""Image towers of transformers' models, and the heads that pool their tokens as in training.

A head maps all tokens of an image to one embedding: the attention pooling of SigLIP and AIMv2, the norm and projection
of CLIP's class token, and the class tokens that RADIO calls its summary. Applied to one patch alone, it maps the patch
into the same space: attention over a single token returns its projected value (Zhou, Loy and Dai 2022, "Extract Free
Dense Labels from CLIP", section 3.1, do this with the attention pooling of CLIP's ResNets).
"""

from typing import Any

import transformers
from torch import Tensor, nn

from sail_align.extract.errors import UserError

TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "metaclip_2": "MetaClip2VisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "aimv2": "Aimv2VisionModel",
}
"""Class of the image tower of each model of images and texts, by `model_type`."""

_OF_CLIP = ("clip_vision_model", "metaclip_2_vision_model")
_WITH_ATTENTION = ("siglip_vision_model", "aimv2_vision_model")


def image_tower(config: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return the class of the image tower of a checkpoint, its config, and options of `from_pretrained`.

    Models of images alone are those of `AutoModel`.

    Args:
        config: The config of the checkpoint.

    Raises:
        UserError: The tower takes patches of images of any shape, as SigLIP 2 NaFlex does.
    """
    kind = config.model_type
    if kind in ("siglip2", "siglip2_vision_model"):
        raise UserError(
            "SigLIP 2 in its NaFlex form takes patches of images of any shape, which is not supported. Use one of a "
            "fixed size, such as siglip2-base."
        )
    if kind in TOWERS:
        tower = config.vision_config
        if kind in ("clip", "metaclip_2"):  # the tower's own value may be the default of its class
            tower.projection_dim = config.projection_dim
        renamed = {"key_mapping": {"^vision_model.": ""}} if kind == "aimv2" else {}
        return getattr(transformers, TOWERS[kind]), tower, renamed
    named = (config.architectures or [""])[0]
    if kind in _OF_CLIP and named.endswith("VisionModelWithProjection"):
        return getattr(transformers, named), config, {}
    return transformers.AutoModel, config, {}


def pooled_output(model: nn.Module) -> str | None:
    """Return the name of the output of a model's head. None if the model has no head that was trained with it."""
    config: Any = model.config
    if config.model_type in _OF_CLIP:
        return "image_embeds" if hasattr(model, "visual_projection") else "pooler_output"
    if config.model_type in _WITH_ATTENTION:
        return "pooler_output" if hasattr(model, "head") else None
    return "summary" if config.model_type == "radio" else None


def pools_patches(model: nn.Module) -> bool:
    """Return whether a model's head can be applied to one patch. RADIO's summary is of several class tokens."""
    return pooled_output(model) not in (None, "summary")


def pool_each(model: Any, tokens_ND: Tensor) -> Tensor:
    """Return the output of a model's head for each of several patches alone, (N, E)."""
    if model.config.model_type in _WITH_ATTENTION:
        pooled_NE: Tensor = model.head(tokens_ND[:, None])
        return pooled_NE
    pooled: Tensor = getattr(model, "vision_model", model).post_layernorm(tokens_ND)
    if hasattr(model, "visual_projection"):
        pooled = model.visual_projection(pooled)
    return pooled
