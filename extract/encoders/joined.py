"""Several encoders of one modality as one: their features are concatenated."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.preprocessing import Normalisation
from sail_align.extract.encoders.runtime import FrozenEncoder
from sail_align.extract.encoders.text import TextEncoder
from sail_align.extract.encoders.views import View
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.errors import UserError


class _Joined(FrozenEncoder):
    """Encoders that share a device. Each is a module of its own, so `to` and `half` reach all of them."""

    def __init__(self, encoders: Sequence[FrozenEncoder]):
        nn.Module.__init__(self)
        self.encoders = nn.ModuleList(encoders)
        self.identity = Identity.joined([single for each in encoders for single in each.identity.singles])

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        device: torch.device = self._first.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the first network."""
        dtype: torch.dtype = self._first.dtype
        return dtype

    @property
    def _first(self) -> Any:
        return self.encoders[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]


class JoinedVisionEncoder(_Joined, VisionEncoder):
    """Image encoders whose features are concatenated, with preprocessing of their own.

    The pixels of one image are those of all encoders, one after the other: (P, 1, 3), with P the sum of size² over the
    encoders. Patches of different networks lie on different grids, so there are no dense features.
    """

    _has_patches = False

    def __init__(self, encoders: Sequence[VisionEncoder]):
        """Join encoders.

        Raises:
            UserError: They decode JPEGs at different scales.
        """
        super().__init__(encoders)
        if len(sides := {each.min_jpeg_side for each in encoders}) > 1:
            raise UserError(
                f"Encoders {self.identity.spec.id!r} cannot be joined: they decode JPEGs at different scales "
                f"({', '.join(map(str, sorted(sides)))}). Encode without --fast-jpeg."
            )
        self.min_jpeg_side = sides.pop()
        self.size = max(each.size for each in encoders)
        self.stride = max(each.stride for each in encoders)
        self._lengths = [each.size**2 for each in encoders]

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of the pixels of one preprocessed image."""
        return (sum(self._lengths), 1, 3)

    @property
    def batch_size(self) -> int:
        """Number of images that `encode` takes at its best on this device."""
        return min(each.batch_size for each in self._each)

    @property
    def _each(self) -> list[VisionEncoder]:
        return list(self.encoders)  # type: ignore[arg-type]

    @contextmanager
    def through(self, view: View) -> Iterator[None]:
        """Let `preprocess` make this view of a picture within a `with` block."""
        with ExitStack() as stack:
            for each in self._each:
                stack.enter_context(each.through(view))
            yield

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resize and crop an RGB image for each encoder: (P, 1, 3) uint8."""
        return torch.cat([each.preprocess(image).reshape(-1, 1, 3) for each in self._each])

    def normalise(  # type: ignore[override]
        self, pixels_BHWC: Tensor, normalisation: Normalisation | None = None
    ) -> list[Tensor]:
        """Return the normalised pixels (B, 3, size, size) of each encoder."""
        parts = torch.split(pixels_BHWC, self._lengths, dim=1)
        return [
            each.normalise(part.reshape(-1, *each.pixel_shape), normalisation)
            for each, part in zip(self._each, parts, strict=True)
        ]

    def forward(self, pixels: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """Return the concatenated features of the output of `normalise`, (B, D) float32 on the device."""
        return torch.cat([each(part) for each, part in zip(self._each, pixels, strict=True)], dim=1)


class JoinedTextEncoder(_Joined, TextEncoder):
    """Text encoders whose features are concatenated. Tokens are those of all encoders, one after the other."""

    @property
    def _each(self) -> list[TextEncoder]:
        return list(self.encoders)  # type: ignore[arg-type]

    def encode(self, texts: Sequence[str], advance: Callable[[int], object] = lambda done: None) -> Tensor:
        """Return the concatenated features of texts, (B, D) float32 on the CPU."""
        *others, last = self._each
        features = [each.encode(texts) for each in others]
        return torch.cat([*features, last.encode(texts, advance)], dim=1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens of texts, (B, T) int64, with T the sum over the encoders."""
        return torch.cat([each.tokenize(texts) for each in self._each], dim=1)

    def encode_tokens(self, tokens_BT: Tensor, advance: Callable[[int], object] = lambda done: None) -> Tensor:
        """Return the same as `encode` for the texts with these tokens."""
        *others, last = self._each
        lengths = [each.tokenize(["a"]).shape[1] for each in self._each]
        *firsts, rest = torch.split(tokens_BT, lengths, dim=1)
        features = [each.encode_tokens(part) for each, part in zip(others, firsts, strict=True)]
        return torch.cat([*features, last.encode_tokens(rest, advance)], dim=1)


def join(encoders: Sequence[VisionEncoder] | Sequence[TextEncoder]) -> VisionEncoder | TextEncoder:
    """Return encoders of one modality as one whose features are concatenated; a single one as it is."""
    first = encoders[0]
    if len(encoders) == 1:
        return first
    if isinstance(first, VisionEncoder):
        return JoinedVisionEncoder([each for each in encoders if isinstance(each, VisionEncoder)])
    return JoinedTextEncoder([each for each in encoders if isinstance(each, TextEncoder)])
