"""The heads that the paper's authors published, read into a run that is evaluated like one trained here.

Their file is a `torch.save` of `{"epoch", "name", "state_dict", …}`. Their `f1`, `f2` and `g` are our `gate`, `value`
and `out`, and their logit scale is τ. It does not say of which encoders its heads take the features: the user does.
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
"""Where their program cuts both branches of the gated unit, and ours does not."""

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
"""Every tensor of their file, and what it is called here."""


@dataclass(frozen=True)
class Released:
    """A published file as a model in evaluation mode, and what it says of itself. `sha256` is that of the file."""

    path: Path
    sha256: str
    name: str
    epoch: int | None
    architecture: Architecture
    model: AlignmentModel

    def require_encoders(self, image: Identity, text: Identity) -> None:
        """Refuse encoders whose features these heads do not take.

        Raises:
            UserError: A dimension differs.
        """
        for side, identity in (("image", image), ("text", text)):
            takes, spec = getattr(self.architecture, f"{side}_dim"), identity.spec
            if spec.dim != takes:
                raise UserError(
                    f"The {side} head in {self.path} takes {takes} numbers, but encoder {spec.id!r} with pooling "
                    f"{spec.pooling!r} gives {spec.dim}; name the encoders it was trained on with --encoders."
                )

    @property
    def needs_clamp(self) -> bool:
        """Whether features can be thought of for which their clamp would have an effect."""
        heads = (self.model.image_head, self.model.text_head)
        return max(largest_value(head) for head in heads if isinstance(head, GLUHead)) > CLAMP

    def settings(self, image: Identity, text: Identity) -> dict[str, Any]:
        """Return what the run's settings.json holds: where the weights come from, and no training of ours."""
        return {
            "imported": {"file": self.path.name, "sha256": self.sha256, "name": self.name, "epoch": self.epoch},
            "head": self.architecture.head,
            "dim": self.architecture.dim,
            "steps": 0,
            "image_encoder": image.spec.fingerprint,
            "text_encoder": text.spec.fingerprint,
        }

    def checkpoint_record(self, image: Identity, text: Identity) -> dict[str, Any]:
        """Return what a checkpoint says besides its weights."""
        return {
            "architecture": asdict(self.architecture),
            "image": image.to_json(),
            "text": text.to_json(),
            "settings": self.settings(image, text),
        }


def read_released(path: Path) -> Released:
    """Read a file that the paper's authors published; the hidden units are as many as its weights have.

    Nothing but tensors, numbers and texts is unpickled.

    Raises:
        UserError: It cannot be read, or is not of that form; the sentence names the first tensor that differs.
    """
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}).") from problem
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(io.BytesIO(content)) and (part := zipfile.ZipFile(io.BytesIO(content)).testzip()):
            raise ValueError(f"{part} does not match its checksum, which torch does not look at")
    except Exception as problem:  # a damaged file makes torch raise whatever it comes across
        raise UserError(f"{path} is no whole file of tensors that torch.save wrote; download it again.") from problem
    tensors = saved.get("state_dict") if isinstance(saved, dict) else None
    if not isinstance(tensors, dict):
        raise UserError(f"{path} has no 'state_dict'; give a file of heads that the paper's authors published.")
    architecture = _architecture(path, tensors)
    model = architecture.build()
    expected = model.state_dict()
    _require_shapes(path, tensors, expected)
    ours = {OUR_NAMES[name]: tensor.float() for name, tensor in tensors.items()}
    model.load_state_dict({name: tensor.reshape(expected[name].shape) for name, tensor in ours.items()})
    epoch = saved.get("epoch")
    return Released(
        path,
        hashlib.sha256(content).hexdigest(),
        str(saved.get("name", "")),
        epoch if isinstance(epoch, int) else None,
        architecture,
        model.eval(),
    )


@torch.no_grad()
def largest_value(head: GLUHead) -> float:
    """Return a bound on what the branch that is not rectified can reach, whatever the features.

    A vector after LayerNorm is γ ⊙ u + β with |u| ≤ √D, so that unit j of `W x + b` is within
    √D · |W_j ⊙ γ| + |W_j · β + b_j|. Below `CLAMP`, their clamp has no effect.
    """
    gamma_D, beta_D, weight_HD = head.norm.weight, head.norm.bias, head.value.weight
    swing_H = (weight_HD * gamma_D).norm(dim=1) * len(gamma_D) ** 0.5
    return float((swing_H + (weight_HD @ beta_D + head.value.bias).abs()).max())


def _architecture(path: Path, tensors: dict[str, Any]) -> Architecture:
    """Return the shape that a file's tensors have, once it is certain that each is there and no other."""
    for name in OUR_NAMES:
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name!r}; give a file of heads that the paper's authors published.")
    for name, tensor in tensors.items():
        if name not in OUR_NAMES:
            raise UserError(f"{path} holds {name!r}, which their heads do not have; it is a file of another model.")
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_floating_point()
        if not dense or not tensor.isfinite().all():
            raise UserError(f"{name} in {path} is no tensor of finite numbers; download the file again.")
    hidden, image_dim = _matrix(path, tensors, "vision_mapping_network.f1.weight")
    _, text_dim = _matrix(path, tensors, "text_mapping_network.f1.weight")
    dim, _ = _matrix(path, tensors, "vision_mapping_network.g.weight")
    if hidden % image_dim:
        raise UserError(f"{path} has {hidden} hidden units for {image_dim} inputs, which is no whole multiple.")
    return Architecture("glu", image_dim, text_dim, dim, expansion=hidden // image_dim)


def _matrix(path: Path, tensors: dict[str, Tensor], name: str) -> tuple[int, int]:
    shape = tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{name} in {path} has shape {tuple(shape)}, where a matrix is expected.")
    return shape[0], shape[1]


def _require_shapes(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for released, ours in OUR_NAMES.items():
        found, wanted = tuple(tensors[released].shape), tuple(expected[ours].shape) or (1,)
        if found != wanted:
            raise UserError(
                f"{released} in {path} has shape {found}; beside its other tensors {wanted} is expected: it is a file "
                f"of another model."
            )
