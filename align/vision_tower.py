"""The image side of a model as a vision tower, the part of models like LLaVA that turns an image into tokens."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sail_align.align.image_processor import SailImageProcessor
from sail_align.align.model.heads import Head
from sail_align.extract.encoders.runtime import tf32_products
from sail_align.extract.encoders.vision import VisionEncoder


class VisionTower(nn.Module):
    """A frozen image encoder and head that map pixels to one token per patch.

    Attributes:
        image_processor: Turns images into the pixel values that the tower takes.
        hidden_size: Number of dimensions E of a token.
        num_patches: Number of tokens N of an image.
    """

    def __init__(self, encoder: VisionEncoder, head: Head, *, normalize: bool = True):
        super().__init__()
        encoder.require_patches()
        self.encoder, self.head = encoder, head
        self.image_processor = SailImageProcessor.of(encoder.identity)
        self.hidden_size = head.out.out_features
        self.num_patches = (-(-encoder.size // encoder.stride)) ** 2
        self._normalize = normalize
        self.eval()

    @property
    def device(self) -> torch.device:
        """Device of encoder and head."""
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the encoder, and of the tokens."""
        return self.encoder.dtype

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    @tf32_products()
    def forward(self, pixel_values: Tensor | list[Tensor]) -> Any:
        """Return the tokens of images.

        Args:
            pixel_values: Normalised pixels (B, 3, size, size) of any float type from `image_processor`, or a list of
                (3, size, size), as LLaVA passes images of different sizes.

        Returns:
            Tokens (B, N, E) in `dtype`, row by row, or for a list a list of (1, N, E).

        Raises:
            ValueError: The pixels have another shape.
        """
        if isinstance(pixel_values, list):
            return [self(pixels_CHW[None]) for pixels_CHW in pixel_values]
        self.encoder.require_pixels(pixel_values)
        with torch.autocast(self.device.type, enabled=False):
            patches_BhwD = self.encoder.forward_dense(pixel_values.to(self.device).float())
            tokens_BNE = self.head.of_patches(patches_BhwD.flatten(1, 2)).float()
        return (F.normalize(tokens_BNE, dim=-1) if self._normalize else tokens_BNE).to(self.dtype)
