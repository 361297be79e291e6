"""What an encoder is, and the identity it carries into the store."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sail_align.extract.encoders.catalogue import Normalisation
from sail_align.extract.errors import UserError

GOLDEN_COSINE = 0.999
"""Two builds of one encoder agree better than this, also between CPU and GPU or float32 and bfloat16."""


@dataclass(frozen=True)
class EncoderSpec:
    """All that determines an encoder's output; two encoders with equal specs give the same features.

    `source` says where the model comes from (loader, repository or package, revision), `weights` is the SHA-256 of its
    tensors' file, `preprocessing` what happens before the network (size, crop, mean; prefix, token limit).
    """

    id: str
    modality: Literal["image", "text"]
    source: dict[str, str]
    weights: str
    preprocessing: dict[str, Any]
    pooling: str
    precision: str
    dim: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of the spec. Library versions and golden vectors stay outside it."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """A spec with what is recorded beside it: what a store's encoder node and a run's checkpoint hold.

    `golden` is the encoder's output for a fixed input: it catches a change that no field of the spec shows. `location`
    is where an encoder of a local folder lay, so that it can be found again; "" for all others.
    """

    spec: EncoderSpec
    golden: list[float]
    versions: dict[str, str]
    location: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-able data, with the fingerprint spelt out for readers."""
        return {**asdict(self), "fingerprint": self.spec.fingerprint}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Identity":
        """Read a record written by `to_json`."""
        return cls(EncoderSpec(**record["spec"]), record["golden"], record["versions"], record["location"])


class VisionEncoder(Protocol):
    """A frozen image encoder."""

    @property
    def identity(self) -> Identity: ...  # noqa: D102

    @property
    def size(self) -> int:
        """Height and width of the pixels that `preprocess` gives, whatever the picture."""

    @property
    def batch_size(self) -> int:
        """How many pictures `encode` takes at its best on this device."""

    @property
    def least(self) -> int:
        """How many pixels a JPEG's sides keep when it is decoded at reduced scale; 0: it is decoded whole."""

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resize and crop an RGB picture, (size, size, 3) uint8: bytes are quick to copy to a GPU."""

    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        """Normalise uint8 RGB pixels on the device; return pooled features, (B, D) float32 on the CPU."""

    def encode_dense(
        self, pixels_BHWC: Tensor, *, normalisation: Normalisation | None = None, last_attention: bool = True
    ) -> Tensor:
        """Return one feature a patch of uint8 RGB pixels, (B, h, w, D) float32 on the CPU, in the space of `encode`.

        H and W need not be `size`. Where they are no multiple of `stride`, the network sees the pixels in a frame of
        their mean colour, evenly up to the next multiple (`preprocessing.margins`).

        Args:
            pixels_BHWC: The pixels.
            normalisation: In place of the encoder's own.
            last_attention: False lets patches skip the last attention (see `value_path`).

        Raises:
            UserError: The encoder has no path around the last attention.
        """

    @property
    def stride(self) -> int:
        """Pixels a patch, in each direction."""


class TextEncoder(Protocol):
    """A frozen text encoder."""

    @property
    def identity(self) -> Identity: ...  # noqa: D102

    def encode(self, texts: Sequence[str], advance: Callable[[int], object] = ...) -> Tensor:
        """Return pooled features of one or more texts, (B, D) float32 on the CPU. Texts beyond the token limit are cut.

        However many there are, they are encoded in batches that suit the device; `advance` is told how many more are
        done. What is computed for a text depends on the others by no more than rounding.
        """

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens of texts in a tensor, (B, T) int64, in a form that only `encode_tokens` need understand."""

    def encode_tokens(self, tokens_BT: Tensor) -> Tensor:
        """Return what `encode` does for the texts of these tokens."""


class EncoderChangedError(UserError):
    """An encoder is not the one that a store or a run was made with."""


def require_same(found: Identity, expected: Identity, where: str) -> None:
    """Refuse an encoder that is not the one `where` was made with, naming the first difference.

    Raises:
        EncoderChangedError: A field of the spec differs, or the specs agree and the golden vectors do not.
    """
    ours, theirs = asdict(found.spec), asdict(expected.spec)
    for name, value in theirs.items():
        if ours[name] != value:
            raise EncoderChangedError(
                f"{where} was made with encoder {expected.spec.id!r} whose {name} is {value!r}, but here it is "
                f"{ours[name]!r}; use the same encoder, or another store."
            )
    cosine = torch.cosine_similarity(torch.tensor(found.golden), torch.tensor(expected.golden), dim=0).item()
    if not cosine >= GOLDEN_COSINE:
        raise EncoderChangedError(
            f"Encoder {expected.spec.id!r} answers its fixed test input differently than when {where} was made "
            f"(cosine {cosine:.4f}, at least {GOLDEN_COSINE} expected); compare the library versions {found.versions} "
            f"with {expected.versions}."
        )


SENTENCE = "Two brown dogs chase a red ball across the wet grass, and a child in a yellow coat watches them."


def golden_image() -> Image.Image:
    """Return an RGB picture (240 × 320) of gradients, a checkerboard and a disc, in integers only."""
    y, x = np.mgrid[0:240, 0:320]
    red = x * 255 // 319
    green = y * 255 // 239
    blue = ((x // 16 + y // 16) % 2) * 160 + 40
    disc = (x - 210) ** 2 + (y - 110) ** 2 < 70**2
    pixels_HWC = np.stack([np.where(disc, 230, red), np.where(disc, 60, green), np.where(disc, 30, blue)], axis=-1)
    return Image.fromarray(pixels_HWC.astype(np.uint8))


def golden_vector(features_1D: Tensor) -> list[float]:
    """Return the output for a fixed input as JSON-able numbers of six digits."""
    return [float(f"{value:.6g}") for value in features_1D[0].tolist()]


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages, by name."""
    return {package: metadata.version(package) for package in packages}
