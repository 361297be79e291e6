"""The image encoder: a backbone of whatever kind with its preprocessing, pooling and precision."""

from dataclasses import asdict, replace
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor, nn

from sail_align.extract.encoders import preprocessing
from sail_align.extract.encoders.base import EncoderSpec, Identity, golden_image, golden_vector, versions
from sail_align.extract.encoders.catalogue import ImagePreprocessing, Normalisation
from sail_align.extract.encoders.pooling import pool_image, pool_patches, require_image_pooling
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.encoders.value_path import NoValuePathError, values_of_patches
from sail_align.extract.encoders.weights import Checkpoint
from sail_align.extract.errors import UserError

FAST_JPEG = 2
"""A JPEG decoded at reduced scale keeps this many times the pixels that it is resized to."""
CPU_BATCH, GPU_BATCH = 32, 1_024
"""Pictures at once on a CPU, where half of it is as fast and twice is slower; and at most on a GPU."""


class Backbone(nn.Module):
    """A network without its head.

    Its forward turns (B, 3, H, W) into a class token (B, D), or None where `has_cls` is false, and a map of patches
    (B, H / stride, W / stride, D).
    """

    stride: int
    has_cls: bool
    library: str
    """The package that implements it; its version is recorded."""


class FrozenVisionEncoder:
    """A `VisionEncoder` around any backbone.

    Its features have the backbone's D numbers, or 2D for `cls+mean`. With that pooling a patch is paired with its
    picture's class token, so that what is learnt on pictures applies to patches.
    """

    def __init__(
        self,
        id: str,
        checkpoint: Checkpoint,
        backbone: Backbone,
        how: ImagePreprocessing,
        pooling: str | None,
        runtime: Runtime,
        *,
        fast_jpeg: bool = False,
    ):
        self._pooling = require_image_pooling(pooling, backbone.has_cls, id)
        self._how = how
        self._runtime = runtime
        self._backbone = runtime.freeze(backbone)
        self.stride = backbone.stride
        self.least = FAST_JPEG * (how.resize or how.crop) if fast_jpeg else 0
        golden = golden_vector(self.encode(self.preprocess(golden_image())[None]))
        spec = EncoderSpec(
            id=id,
            modality="image",
            source=checkpoint.source,
            weights=checkpoint.digest,
            preprocessing={
                **asdict(how),
                "mean": list(how.mean),  # lists, as JSON gives them back
                "std": list(how.std),
                **({"jpeg_least": self.least} if fast_jpeg else {}),
            },
            pooling=self._pooling,
            precision=runtime.precision,
            dim=len(golden),
        )
        self.identity = Identity(spec, golden, versions("torch", "pillow", backbone.library), checkpoint.location)

    @property
    def size(self) -> int:
        """Height and width of the pixels that `preprocess` gives."""
        return self._how.crop

    @cached_property
    def batch_size(self) -> int:
        """How many pictures `encode` takes at its best on this device."""

        def encode(pictures: int) -> None:
            self.encode(torch.zeros(pictures, self.size, self.size, 3, dtype=torch.uint8))

        return self._runtime.batch_size(encode, on_cpu=CPU_BATCH, at_most=GPU_BATCH)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resize and crop an RGB picture, (size, size, 3) uint8."""
        return preprocessing.to_pixels(preprocessing.resize_and_crop(image, self._how))

    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        """Return pooled features of uint8 RGB pixels, (B, D) float32 on the CPU."""
        pixels_BCHW = preprocessing.normalize(self._runtime.upload(pixels_BHWC), self._how)
        return pool_image(*self._forward(pixels_BCHW), self._pooling).float().cpu()

    def encode_dense(
        self, pixels_BHWC: Tensor, *, normalisation: Normalisation | None = None, last_attention: bool = True
    ) -> Tensor:
        """Return one feature a patch of uint8 RGB pixels, (B, h, w, D) float32 on the CPU.

        Pixels that are no multiple of `stride` get an even frame of zeros, once they are normalised. See the protocol.
        """
        how = self._how if normalisation is None else replace(self._how, **asdict(normalisation))
        pixels_BCHW = preprocessing.normalize(self._runtime.upload(pixels_BHWC), how)
        framed_BCHW = preprocessing.frame(pixels_BCHW, self.stride)
        if last_attention:
            cls_BD, patches_BhwD = self._forward(framed_BCHW)
        else:
            cls_BD, patches_BhwD = self._forward_to_values(framed_BCHW)
        return pool_patches(cls_BD, patches_BhwD, self._pooling).float().cpu()

    @torch.no_grad()
    def _forward(self, pixels_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        cls_BD, patches_BhwD = self._backbone(pixels_BCHW.to(self._runtime.dtype))
        return cls_BD, patches_BhwD

    def _forward_to_values(self, pixels_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        height, width = (side // self.stride for side in pixels_BCHW.shape[-2:])
        try:
            with values_of_patches(self._backbone, height * width):
                return self._forward(pixels_BCHW)
        except NoValuePathError as problem:
            raise UserError(
                f"Encoder {self.identity.spec.id!r} has no last attention that its patches could skip, as MaskCLIP's "
                "do; evaluate it without that variant."
            ) from problem
