"""Load a frozen encoder by its name, or again as a store or a run recorded it."""

import re
from dataclasses import replace
from typing import Any

from sail_align.extract.encoders.base import Identity, TextEncoder, VisionEncoder, require_same
from sail_align.extract.encoders.catalogue import (
    Folder,
    Hub,
    OpenClipText,
    OpenClipVision,
    Package,
    PackagedEfficientNet,
    TextEntry,
    TimmVision,
    TransformersVision,
    VisionEntry,
    find_text,
    find_vision,
)
from sail_align.extract.encoders.open_clip_models import OpenClipTextEncoder, OpenClipVisionEncoder, load_open_clip
from sail_align.extract.encoders.pooling import require_known_image_pooling, require_text_pooling
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.encoders.timm_models import (
    packaged_efficientnet,
    timm_backbone,
    timm_origin,
    timm_preprocessing,
)
from sail_align.extract.encoders.transformers_load import load_pretrained
from sail_align.extract.encoders.transformers_text import FrozenTextEncoder, TextSettings
from sail_align.extract.encoders.transformers_vision import TransformersBackbone, published_preprocessing
from sail_align.extract.encoders.vision import Backbone, FrozenVisionEncoder
from sail_align.extract.encoders.weights import Checkpoint, fetch
from sail_align.extract.errors import UserError


def load_image_encoder(
    name: str,
    *,
    pooling: str | None = None,
    device: str = "cpu",
    precision: str = "float32",
    trust_remote_code: bool = False,
    compiled: bool = False,
    fast_jpeg: bool = False,
) -> VisionEncoder:
    """Load an image encoder.

    Args:
        name: One of `catalogue.VISION`, `hf:<repository or folder>[@<revision>]`, `timm:<model>` or
            `open_clip:<model>@<weights>`.
        pooling: `cls`, `mean` or `cls+mean`. Default: the catalogue's; a network without class token has only `mean`.
        device: Where it runs; `auto` takes a GPU if there is one.
        precision: `float32`, `bfloat16` or `float16`, of weights and activations.
        trust_remote_code: Let an `hf:` repository at a full commit hash run its own code, if transformers lacks it.
        compiled: Let torch.compile translate the network; what it computes differs by rounding.
        fast_jpeg: Decode large JPEGs at reduced scale. It is a part of the encoder's preprocessing, and of its spec.

    Raises:
        UserError: One of these values is wrong, or the weights cannot be had.
    """
    require_known_image_pooling(pooling, name)
    runtime = Runtime.of(device, precision, compiled=compiled)
    return _image_encoder(name, find_vision(name), pooling, runtime, trust_remote_code, fast_jpeg)


def load_text_encoder(
    name: str,
    *,
    pooling: str | None = None,
    device: str = "cpu",
    precision: str = "float32",
    trust_remote_code: bool = False,
    compiled: bool = False,
) -> TextEncoder:
    """Load a text encoder: one of `catalogue.TEXT` or `hf:<repository or folder>[@<revision>]`.

    `pooling` is `cls`, `mean` or `last`, by default the catalogue's. The rest, and what is raised, is that of
    `load_image_encoder`.
    """
    runtime = Runtime.of(device, precision, compiled=compiled)
    return _text_encoder(name, find_text(name), pooling, runtime, trust_remote_code)


def load_recorded(
    identity: Identity, device: str = "cpu", *, trust_remote_code: bool = False
) -> VisionEncoder | TextEncoder:
    """Load the encoder that a store or a run recorded: the same revision, pooling and precision.

    Raises:
        EncoderChangedError: What is found under its name is another encoder, or gives another golden vector.
        UserError: It cannot be had.
    """
    spec = identity.spec
    kind = "open_clip" if spec.source["loader"] == "open_clip" else "hf"
    name = f"{kind}:{identity.location}" if identity.location else spec.id
    runtime = Runtime.of(device, spec.precision)
    same: dict[str, Any] = {}
    if spec.source["loader"] == "hub":
        same["origin"] = Hub(spec.source["repository"], spec.source["revision"])
    encoder: VisionEncoder | TextEncoder
    if spec.modality == "image":
        entry, fast_jpeg = replace(find_vision(name), **same), "jpeg_least" in spec.preprocessing
        encoder = _image_encoder(name, entry, spec.pooling, runtime, trust_remote_code, fast_jpeg)
    else:
        encoder = _text_encoder(name, replace(find_text(name), **same), spec.pooling, runtime, trust_remote_code)
    require_same(encoder.identity, identity, where="the record")
    return encoder


def require_files(*entries: VisionEntry | TextEntry) -> None:
    """Find the encoders' files, downloading those that are not here; OpenCLIP's are found as they are loaded.

    Raises:
        UserError: They cannot be had.
    """
    for entry in entries:
        match entry:
            case OpenClipVision() | OpenClipText():
                pass
            case TimmVision():
                fetch(entry.origin or timm_origin(entry.model))
            case _:
                fetch(entry.origin)


def _image_encoder(
    name: str, entry: VisionEntry, pooling: str | None, runtime: Runtime, trust_remote_code: bool, fast_jpeg: bool
) -> FrozenVisionEncoder:
    backbone: Backbone
    match entry:
        case OpenClipVision():
            _require_own_pooling(name, pooling, entry.pooling)
            model, _, checkpoint = load_open_clip(entry.origin)
            return OpenClipVisionEncoder(
                _open_clip_id(name, checkpoint), checkpoint, model, runtime, fast_jpeg=fast_jpeg
            )
        case TransformersVision():
            checkpoint = fetch(entry.origin, with_code=trust_remote_code)
            how = entry.preprocessing or published_preprocessing(checkpoint.read_json("preprocessor_config.json"))
            model = load_pretrained(checkpoint, allow_code=_allow_code(entry.origin, trust_remote_code))
            backbone = TransformersBackbone(model, how.crop)
        case TimmVision():
            how = timm_preprocessing(entry.model)
            checkpoint = fetch(entry.origin or timm_origin(entry.model))
            backbone = timm_backbone(checkpoint, entry.model)
        case PackagedEfficientNet():
            how = entry.preprocessing
            checkpoint = fetch(entry.origin)
            backbone = packaged_efficientnet(checkpoint.path, entry.model)
    pooling = pooling or entry.pooling
    return FrozenVisionEncoder(_id(name, checkpoint), checkpoint, backbone, how, pooling, runtime, fast_jpeg=fast_jpeg)


def _text_encoder(
    name: str, entry: TextEntry, pooling: str | None, runtime: Runtime, trust_remote_code: bool
) -> FrozenTextEncoder | OpenClipTextEncoder:
    if isinstance(entry, OpenClipText):
        _require_own_pooling(name, pooling, entry.pooling)
        towers, tokenizer, checkpoint = load_open_clip(entry.origin)
        return OpenClipTextEncoder(_open_clip_id(name, checkpoint), checkpoint, towers, tokenizer, runtime)
    settings = TextSettings(require_text_pooling(pooling or entry.pooling, name), entry.prefix, entry.token_limit)
    checkpoint = fetch(entry.origin, with_code=trust_remote_code)
    model = load_pretrained(checkpoint, allow_code=_allow_code(entry.origin, trust_remote_code))
    return FrozenTextEncoder(_id(name, checkpoint), checkpoint, model, settings, runtime)


def _allow_code(origin: Package | Hub | Folder, trusted: bool) -> bool:
    """Remote code is run only where the user trusts it, and only at a commit: a branch can change under that trust."""
    return trusted and isinstance(origin, Hub) and re.fullmatch(r"[0-9a-f]{40}", origin.revision or "") is not None


def _require_own_pooling(name: str, pooling: str | None, own: str) -> None:
    if pooling not in (None, own):
        raise UserError(f"{name} pools as it was trained to, which is called {own!r} here, not {pooling!r}.")


def _open_clip_id(name: str, checkpoint: Checkpoint) -> str:
    return f"open_clip:folder-{checkpoint.digest[:8]}" if checkpoint.location else name


def _id(name: str, checkpoint: Checkpoint) -> str:
    """Return the name without its revision; of a local folder, whose name says nothing, the kind and the weights."""
    if checkpoint.location:
        return f"folder:{checkpoint.config.get('model_type', 'model')}-{checkpoint.digest[:8]}"
    return name.partition("@")[0]
