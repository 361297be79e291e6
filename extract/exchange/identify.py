"""Comparison of imported features with new ones of the named encoder."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sail_align.extract.data import Sample, UnreadableImageError
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.text import TextEncoder
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.errors import UserError

COMPARED = 32
"""Images or texts that are encoded again."""
TRIED = 4 * COMPARED
"""Rows among which these are looked for."""
LEAST_COSINE = 0.99
"""Lowest mean cosine of features that one encoder made twice. Half precision alone costs less than 0.001; other
decoders and resizing filters cost more."""
UNIT, SAME, OTHER = "unit-norm", "as encoded", "scaled"

Vectors = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Agreement:
    """The result of a comparison.

    Attributes:
        rows: Images or texts that were encoded again.
        cosine: Mean cosine of the imported and the new features.
        norms: `unit-norm` if the imported features were normalised, `as encoded`, or `scaled` by another factor.
    """

    rows: int
    cosine: float
    norms: str

    @classmethod
    def of(cls, given_ND: Vectors, encoded_ND: Vectors) -> tuple["Agreement", int]:
        """Compare the directions and lengths of vectors; return the result, and the row that agrees least."""
        given_ND, encoded_ND = given_ND.astype(np.float64), encoded_ND.astype(np.float64)
        given_N, encoded_N = np.linalg.norm(given_ND, axis=1), np.linalg.norm(encoded_ND, axis=1)
        cosine_N = (given_ND * encoded_ND).sum(axis=1) / np.maximum(given_N * encoded_N, np.finfo(np.float64).tiny)
        is_same = np.abs(given_N / np.maximum(encoded_N, 1e-12) - 1).max() < 0.05
        is_unit = np.abs(given_N - 1).max() < 0.01
        norms = SAME if is_same else UNIT if is_unit else OTHER
        return cls(len(cosine_N), round(float(cosine_N.mean()), 4), norms), int(cosine_N.argmin())

    def to_json(self) -> dict[str, Any]:
        """Return the record for a store."""
        return asdict(self)


def compare_images(
    samples: Sequence[Sample], given_ND: Vectors, open_image: Callable[[str], Image.Image], encoder: VisionEncoder
) -> Agreement:
    """Encode images again and compare the features.

    Raises:
        UserError: The features are not those of the encoder, or no image can be opened.
    """
    import torch

    pixels, rows = [], []
    problem: UnreadableImageError | None = None
    for row, sample in enumerate(samples):
        try:
            pixels.append(encoder.preprocess(open_image(sample.image)))
            rows.append(row)
        except UnreadableImageError as unreadable:
            problem = problem or unreadable
        if len(rows) == COMPARED:
            break
    if not rows:
        first = samples[0].image if samples else "none"
        raise UserError(
            f"None of {len(samples)} images can be opened; the first is {first!r} ({problem}). Correct --images or "
            "--image-column, or leave --images out."
        )
    batches = torch.split(torch.stack(pixels), encoder.batch_size)
    encoded_ND = torch.cat([encoder.encode(batch) for batch in batches]).numpy()
    return _require_agreement([samples[row].key for row in rows], given_ND[rows], encoded_ND, encoder.identity)


def compare_texts(keys: Sequence[str], texts: Sequence[str], given_ND: Vectors, encoder: TextEncoder) -> Agreement:
    """Encode texts again and compare the features. Raises `UserError` if they are not those of the encoder."""
    encoded_ND = encoder.encode(list(texts[:COMPARED])).numpy()
    return _require_agreement(keys[:COMPARED], given_ND[:COMPARED], encoded_ND, encoder.identity)


def require_dim(given: int, identity: Identity) -> None:
    """Raise `UserError` unless features have the dimensions of an encoder."""
    if given != identity.spec.dim:
        raise UserError(
            f"The {identity.spec.modality} features are not those of {identity.spec.id}: got {given} dimensions, "
            f"expected {identity.spec.dim}. Pass another --{identity.spec.modality}-encoder or -pooling."
        )


def _require_agreement(keys: Sequence[str], given_ND: Vectors, encoded_ND: Vectors, identity: Identity) -> Agreement:
    found, lowest = Agreement.of(given_ND, encoded_ND)
    if not found.cosine >= LEAST_COSINE:  # also true for NaN
        side = identity.spec.modality
        raise UserError(
            f"The {side} features are not those of {identity.spec.id} ({identity.spec.pooling}): got a mean cosine of "
            f"{found.cosine:.4f} with {found.rows} {side}s encoded again, expected at least {LEAST_COSINE}. The least "
            f"similar is {keys[lowest]!r}. Pass another --{side}-encoder or --{side}-pooling, or leave it out."
        )
    return found
