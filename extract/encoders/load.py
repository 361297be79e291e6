"""Load a frozen encoder by its name, or again as a store or a run recorded it."""

from dataclasses import replace

from sail_align.extract.encoders.base import Identity, TextEncoder, VisionEncoder, require_same
from sail_align.extract.encoders.catalogue import find_text, find_vision
from sail_align.extract.encoders.checkpoint import fetch
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.encoders.timm_vision import packaged_efficientnet
from sail_align.extract.encoders.transformers_text import FrozenTextEncoder
from sail_align.extract.encoders.vision import FrozenVisionEncoder


def load_image_encoder(
    name: str,
    *,
    pooling: str | None = None,
    device: str = "cpu",
    precision: str = "float32",
    trust_remote_code: bool = False,
) -> VisionEncoder:
    """Load an image encoder."""
    entry = find_vision(name)
    runtime = Runtime.of(device, precision)
    checkpoint = fetch(entry.origin)
    backbone = packaged_efficientnet(checkpoint.path, entry.model)
    return FrozenVisionEncoder(name, checkpoint, backbone, entry.preprocessing, pooling or entry.pooling, runtime)


def load_text_encoder(
    name: str,
    *,
    pooling: str | None = None,
    device: str = "cpu",
    precision: str = "float32",
    trust_remote_code: bool = False,
) -> TextEncoder:
    """Load a text encoder."""
    entry = find_text(name)
    runtime = Runtime.of(device, precision)
    checkpoint = fetch(entry.origin)
    return FrozenTextEncoder(name, checkpoint, replace(entry, pooling=pooling or entry.pooling), runtime)


def load_recorded(identity: Identity, device: str = "cpu") -> VisionEncoder | TextEncoder:
    """Load the encoder that a store or a run recorded."""
    spec = identity.spec
    load = load_image_encoder if spec.modality == "image" else load_text_encoder
    encoder = load(spec.id, pooling=spec.pooling, device=device, precision=spec.precision)
    require_same(encoder.identity, identity, "the record")
    return encoder
