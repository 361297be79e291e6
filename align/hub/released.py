"""Read the heads published by the paper's authors into a run, which is evaluated like any other.

Their file is a `torch.save` of `{"epoch", "name", "state_dict", …}`. Their `f1`, `f2` and `g` are our `gate`, `value`
and `out`, and their logit scale is τ. The file does not name the encoders of its features, so the user has to.
"""

import hashlib
import io
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sail_align.align.model.alignment import AlignmentModel, Architecture
from sail_align.align.model.heads import GLUHead
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.errors import UserError

CLAMP = 1_000
"""The authors' code clamps both branches of the gated unit to this absolute value; ours does not."""

LONGEST_NAME = 200
"""Characters of a file's own name that are kept."""

_SIDES = {"vision": "image", "text": "text"}
_LAYERS = {
    "layer_norm": "norm",
    "mapping_network.f1": "gate",
    "mapping_network.f2": "value",
    "mapping_network.g": "out",
}
OUR_NAMES = {
    "logit_scale": "log_scale",
    "logit_bias": "bias",
    **{
        f"{side}_{layer}.{kind}": f"{_SIDES[side]}_head.{_LAYERS[layer]}.{kind}"
        for side in _SIDES
        for layer in _LAYERS
        for kind in ("weight", "bias")
    },
}
"""Our name of each tensor in their file."""


@dataclass(frozen=True)
class Released:
    """A published file as a model in evaluation mode. `imported` describes the file, in the settings of the run."""

    path: Path
    imported: dict[str, Any]
    architecture: Architecture
    model: AlignmentModel

    @classmethod
    def read(cls, path: Path) -> "Released":
        """Read a file published by the paper's authors. The number of hidden units is taken from its weights.

        Only tensors, numbers and strings are unpickled.

        Raises:
            UserError: The file cannot be read or has another content. The message names the first tensor that differs.
        """
        try:
            content = path.read_bytes()
        except OSError as problem:
            raise UserError(f"{path} cannot be read: {problem.strerror}.") from problem
        try:
            _check_zip(content)
            saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as problem:  # torch raises many kinds of errors for a damaged file
            raise UserError(
                f"{path} is not a complete file of torch.save with tensors only. Download it again."
            ) from problem
        tensors = saved.get("state_dict") if isinstance(saved, dict) else None
        if not isinstance(tensors, dict):
            raise UserError(f"{path} has no 'state_dict'. Pass a file of heads published by the paper's authors.")
        architecture = _architecture(path, tensors)
        model = architecture.build()
        places, weights = model.state_dict(), {}
        for theirs, ours in OUR_NAMES.items():
            found, expected = tuple(tensors[theirs].shape), tuple(places[ours].shape) or (1,)
            if found != expected:
                raise UserError(
                    f"{theirs} in {path} has shape {found}; expected {expected}, given its other tensors. It is a file "
                    f"of another model."
                )
            weights[ours] = tensors[theirs].float().reshape(places[ours].shape)
        model.load_state_dict(weights)
        sha256, epoch = hashlib.sha256(content).hexdigest(), saved.get("epoch")
        epoch = epoch if type(epoch) is int and abs(epoch) < 1 << 63 else None
        name = saved.get("name")
        name = name.encode(errors="replace").decode()[:LONGEST_NAME] if isinstance(name, str) else ""
        imported = {"file": path.name, "sha256": sha256, "name": name, "epoch": epoch}
        return cls(path, imported, architecture, model.eval())

    @property
    def needs_clamp(self) -> bool:
        """Whether the authors' clamp could have an effect for some features."""
        heads = (self.model.image_head, self.model.text_head)
        return max(head.value_bound() for head in heads if isinstance(head, GLUHead)) > CLAMP

    def record(self, image: Identity, text: Identity) -> dict[str, Any]:
        """Return the content of a checkpoint besides its weights; its settings name their source, and no training.

        Raises:
            UserError: An encoder's features have other dimensions than the heads take.
        """
        for side, identity in (("image", image), ("text", text)):
            takes, spec = getattr(self.architecture, f"{side}_dim"), identity.spec
            if spec.dim != takes:
                raise UserError(
                    f"The {side} head in {self.path} takes {takes} dimensions, but encoder {spec.id!r} with pooling "
                    f"{spec.pooling!r} has {spec.dim}. Pass the encoders that it was trained on with --encoders."
                )
        settings = {
            "imported": self.imported,
            "head": self.architecture.head,
            "dim": self.architecture.dim,
            "steps": 0,
            "image_encoder": image.spec.fingerprint,
            "text_encoder": text.spec.fingerprint,
        }
        return {
            "architecture": asdict(self.architecture),
            "image": image.to_json(),
            "text": text.to_json(),
            "settings": settings,
        }


def _check_zip(content: bytes) -> None:
    """Check what torch does not: checksums, and that nothing is compressed, which could take any amount of memory.

    Raises:
        ValueError, BadZipFile: The file is damaged or was not written by torch.
    """
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return  # of an older form
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        if compressed := [each.filename for each in file.infolist() if each.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"{compressed[0]} is compressed")
        if part := file.testzip():
            raise ValueError(f"{part} does not match its checksum")


def _architecture(path: Path, tensors: dict[str, Any]) -> Architecture:
    """Return the architecture of a file's tensors, after checking that none is missing, unknown or invalid."""
    for name in OUR_NAMES:
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name!r}. Pass a file of heads published by the paper's authors.")
    for name, tensor in tensors.items():
        if name not in OUR_NAMES:
            raise UserError(f"{path} has an unknown tensor {str(name)[:100]!r}. It is a file of another model.")
        # A few bytes can stand for a tensor of any size if its strides are 0.
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_contiguous()
        if not (dense and tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.isfinite().all()):
            raise UserError(f"{name} in {path} is not a dense tensor of finite numbers. Download the file again.")
    hidden, image_dim = _matrix(path, tensors, "vision_mapping_network.f1.weight")
    _, text_dim = _matrix(path, tensors, "text_mapping_network.f1.weight")
    dim, _ = _matrix(path, tensors, "vision_mapping_network.g.weight")
    if hidden % image_dim:
        raise UserError(f"{path} has {hidden} hidden units for {image_dim} inputs; expected a multiple of the inputs.")
    return Architecture("glu", image_dim, text_dim, dim, expansion=hidden // image_dim)


def _matrix(path: Path, tensors: dict[str, Tensor], name: str) -> tuple[int, int]:
    shape = tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{name} in {path} has shape {tuple(shape)}; expected a matrix.")
    return shape[0], shape[1]
