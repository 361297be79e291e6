"""The trained part of the model: two heads, a temperature and a bias."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Required

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, with_config
from torch import Tensor, nn
from typing_extensions import TypedDict

from sail_align.align.model.correction import (
    MOST_BANK_ROWS,
    Correction,
    CorrectionKind,
    Side,
    extended,
    make_correction,
)
from sail_align.align.model.heads import HEADS, Head, HeadKind, WideHead
from sail_align.extract.encoders.identity import MOST_DIM
from sail_align.extract.errors import UserError
from sail_align.extract.system.validation import validated

MAX_LOG_SCALE = math.log(100)


class AlignmentModel(nn.Module):
    """Map frozen image and text features into a shared space: `x = L2(head_I(image))`, `y = L2(head_T(text))`.

    The loss scales similarities by t = exp(τ) and adds the bias b. τ is `log_scale`, kept in [0, ln 100]. Both are
    learned, but only the loss uses them: embeddings and their ranking do not depend on them.

    Attributes:
        correction: Correction of the cosine for retrieval. None if the model has none.
    """

    def __init__(
        self,
        image_head: Head,
        text_head: Head,
        *,
        scale: float = 20.0,
        bias: float = -10.0,
        correction: Correction | None = None,
    ):
        super().__init__()
        self.image_head = image_head
        self.text_head = text_head
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        self.correction = correction

    def encode_image(self, features_BD: Tensor) -> Tensor:
        """Return unit-norm float32 embeddings (…, E) of image features (…, D) of any float type."""
        return F.normalize(self.image_head(features_BD.float()), dim=-1)

    def encode_patches(self, patches_BD: Tensor) -> Tensor:
        """Return unit-norm float32 embeddings (…, E) of features of an image's patches (…, D) of any float type."""
        return F.normalize(self.image_head.of_patches(patches_BD.float()), dim=-1)

    def encode_text(self, features_BD: Tensor) -> Tensor:
        """Return unit-norm float32 embeddings (…, E) of text features (…, D) of any float type."""
        return F.normalize(self.text_head(features_BD.float()), dim=-1)

    def corrected_image(self, features_BD: Tensor) -> Tensor:
        """Return float32 vectors (…, E + 2) of image features (…, D).

        Their dot products with those of `corrected_text` are the corrected similarities.

        Raises:
            UserError: The model has no correction.
        """
        return self.require_correction().extend(self.image_head(features_BD.float()), "image")

    def corrected_text(self, features_BD: Tensor) -> Tensor:
        """Return float32 vectors (…, E + 2) of text features (…, D); see `corrected_image`."""
        return self.require_correction().extend(self.text_head(features_BD.float()), "text")

    def require_correction(self) -> Correction:
        """Return the correction. Raises `UserError` if there is none."""
        if self.correction is None:
            raise UserError("This model has no hub correction. Train it again with --bank 4096, or use its cosines.")
        return self.correction

    def forward(self, image_BD: Tensor, text_CBD: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the loss compares: vectors of images (B, E) and of their texts (C, B, E).

        These are the embeddings, or with item biases [x, u, 1] (B, E + 2) and [y, 1, v] (C, B, E + 2).
        """
        return self._compared(image_BD, "image"), self._compared(text_CBD, "text")

    def _compared(self, features_BD: Tensor, side: Side) -> Tensor:
        head = self.image_head if side == "image" else self.text_head
        out_BE = head.with_item_bias(features_BD.float())
        if head.item_bias is None:
            return F.normalize(out_BE, dim=-1)
        return extended(F.normalize(out_BE[..., :-1], dim=-1), out_BE[..., -1], side)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Clamp τ to [0, ln 100] after an optimiser step."""
        self.log_scale.clamp_(0, MAX_LOG_SCALE)


Dim = Annotated[int, Field(ge=1, le=MOST_DIM)]
Power = Annotated[float, Field(gt=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


@with_config(ConfigDict(extra="forbid"))  # an unknown field would change the model
class _Form(TypedDict, total=False):
    head: Required[HeadKind]
    image_dim: Required[Dim]
    text_dim: Required[Dim]
    dim: Required[Dim]
    expansion: Annotated[int, Field(ge=1, le=1_024)]
    image_dropout: Dropout
    text_dropout: Dropout
    linear_path: bool
    image_power: Power
    patch_power: Power | None
    correction: CorrectionKind
    bank_rows: Annotated[int, Field(ge=0, le=MOST_BANK_ROWS)]
    item_bias: bool
    text_hidden: Annotated[int, Field(ge=0, le=MOST_DIM)]


@dataclass(frozen=True)
class Architecture:
    """The settings that determine the shape of a model; a checkpoint records them to rebuild it."""

    head: HeadKind
    image_dim: int
    text_dim: int
    dim: int
    expansion: int = 4
    image_dropout: float = 0.0
    text_dropout: float = 0.0
    linear_path: bool = False
    image_power: float = 1.0
    patch_power: float | None = None
    correction: CorrectionKind = "none"
    bank_rows: int = 0
    item_bias: bool = False
    text_hidden: int = 0

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Architecture":
        """Read a record of a checkpoint or an export.

        Raises:
            ValueError: A field is missing, unknown or invalid, or does not fit the head. The message names it.
        """
        architecture = cls(**validated(_Form, record))
        if architecture.text_hidden and architecture.head != "linear":
            raise ValueError(f"text_hidden is only for a linear head, got {architecture.head}")
        return architecture

    def build(self, *, scale: float = 20.0, bias: float = -10.0) -> AlignmentModel:
        """Return a new model with random weights, drawn from torch's global random state."""
        sides = ((self.image_dim, self.image_dropout), (self.text_dim, self.text_dropout))
        hidden = {} if self.head == "linear" else {"expansion": self.expansion}
        heads: list[Head] = [HEADS[self.head](input_dim, self.dim, dropout, **hidden) for input_dim, dropout in sides]
        if self.text_hidden:
            heads[1] = WideHead(self.text_dim, self.dim, self.text_dropout, self.text_hidden)
        heads[0].power, heads[0].patch_power = self.image_power, self.patch_power
        if self.linear_path:
            for head in heads:
                head.add_linear_path()
        if self.item_bias:
            for head in heads:
                head.add_item_bias()
        correction = make_correction(self.correction, self.bank_rows, self.dim)
        return AlignmentModel(*heads, scale=scale, bias=bias, correction=correction)
