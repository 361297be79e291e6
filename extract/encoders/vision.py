"""The image encoder: a backbone of any library with its preprocessing, pooling and precision."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sail_align.extract.encoders.layers import OUTPUT, refuse_layers
from sail_align.extract.encoders.maskclip import skip_last_attention
from sail_align.extract.encoders.pooling import IMAGE_POOLINGS, check_pooling, pool_image, pool_patches
from sail_align.extract.encoders.preprocessing import ImagePreprocessing, Normalisation, as_pixels, pad_to_multiple
from sail_align.extract.encoders.runtime import FrozenEncoder, Runtime, in_own_precision, is_device_error
from sail_align.extract.encoders.views import View
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError

FAST_JPEG = 2
"""A JPEG that is decoded at reduced scale keeps at least this many times the pixels that it is resized to."""
CPU_BATCH, GPU_BATCH = 32, 1_024
"""Images per batch on a CPU, where 16 are as fast and 64 are slower; and at most on a GPU."""


class Backbone(nn.Module):
    """A network without its head: the part of an image encoder that differs between libraries.

    Its forward maps (B, 3, H, W) to a class token (B, D), or None if `has_cls` is false, and to a map of patches
    (B, H / stride, W / stride, D). If `pools` is set, the class token is replaced by the output of the network's head.

    Attributes:
        pools: Whether the network's own head pools the tokens, such as the attention pooling of SigLIP.
        image_size: Height and width of images if they are not the network's own, else None.
        preprocessing: What is recorded, and the normalisation.
        resize: Function that returns an image of the size that the network takes. A library may have its own.
    """

    library: str
    """The package that implements it; its version is recorded."""
    stride: int
    """Pixels per patch in each direction."""
    has_cls: bool
    has_patches = True
    """Whether single patches have features of their own."""
    has_pooler = False
    """Whether the network has a head that pools its tokens, other than a classifier."""
    pools_patches = False
    """Whether this head can be applied to one patch alone, by `pool_each`."""

    def __init__(self, preprocessing: ImagePreprocessing, image_size: int | None = None):
        super().__init__()
        self.pools = False
        self.image_size = None if image_size == preprocessing.crop else image_size
        self.preprocessing = preprocessing.at(self.image_size)
        self.resize: Callable[[Image.Image], Image.Image] = self.preprocessing.resize_and_crop

    @property
    def poolings(self) -> tuple[str, ...]:
        """The poolings of its features."""
        return tuple(
            each
            for each in IMAGE_POOLINGS
            if (self.has_cls or "cls" not in each) and (self.has_pooler or "pooler" not in each)
        )

    def prepare_layers(self, layers: Sequence[int], name: str) -> None:
        """Prepare for `forward_layers`. Raises `UserError` if the network lacks a layer; `name` is for the message."""
        refuse_layers(layers, name)

    def forward_layers(self, pixels_BCHW: Tensor, layers: Sequence[int]) -> list[tuple[Tensor | None, Tensor]]:
        """Return class token and map of patches, as forward does, of each layer (see `layers`)."""
        raise NotImplementedError

    def pool_each(self, patches_BhwD: Tensor) -> Tensor:
        """Apply the network's head to each patch alone, (B, h, w, E), if `pools_patches` is true."""
        raise NotImplementedError


class VisionEncoder(FrozenEncoder):
    """A frozen image encoder.

    Its features have the backbone's D dimensions, or 2D for `cls+mean`. With that pooling, the dense feature of a patch
    is concat(CLS, patch), so heads that were trained on images apply to patches. With `pooler+mean`, it is
    concat(pooled image, patch), and with `pooler`, the output of the network's head for the patch alone. Several layers
    have their features concatenated; the identity is then the joined one of an encoder for each layer.

    Attributes:
        stride: Pixels per patch in each direction.
        size: Height and width of preprocessed images.
        min_jpeg_side: Length that both sides keep if a JPEG is decoded at reduced scale; 0 for decoding at full scale.
    """

    def __init__(
        self,
        id: str,
        files: EncoderFiles,
        backbone: Backbone,
        pooling: str | None,
        runtime: Runtime,
        fast_jpeg: bool,
        layers: tuple[int, ...] = OUTPUT,
    ):
        """Freeze a backbone.

        Args:
            id: Name that is recorded.
            files: Where the backbone's weights come from.
            backbone: The network in float32 on the CPU.
            pooling: None for the only one of a network without class token.
            runtime: Where it runs.
            fast_jpeg: Decode large JPEGs at reduced scale.
            layers: Layers to pool, counted from the end.

        Raises:
            UserError: The pooling is missing, or this backbone does not have it, or it lacks a layer.
        """
        pooling = check_pooling(pooling or (None if backbone.has_cls else "mean"), backbone.poolings, id)
        backbone.pools = "pooler" in pooling
        if layers != OUTPUT:
            if backbone.pools:
                raise UserError(f"Pooling {pooling!r} is for the output of {id!r} only. Pass another with --layers.")
            backbone.prepare_layers(layers, id)
        super().__init__(backbone, runtime)
        self._pooling, self._layers = pooling, layers
        preprocessing = backbone.preprocessing
        self._normalisation = Normalisation(preprocessing.mean, preprocessing.std)
        self._resize = backbone.resize
        self.stride = backbone.stride
        self.size = preprocessing.crop
        self.min_jpeg_side = FAST_JPEG * (preprocessing.resize or preprocessing.crop) if fast_jpeg else 0
        states = self._forward(self.normalise(self.preprocess(golden_image())[None]))
        grids = {tuple(patches_BhwD.shape[1:3]) for _, patches_BhwD in states}
        # Stages of a hierarchy each have a grid of their own.
        self._has_patches = backbone.has_patches and (backbone.pools_patches or pooling != "pooler") and len(grids) == 1
        if layers != OUTPUT:
            self.stride = self.size // grids.pop()[0]
        self.identity = files.identify_layers(
            layers,
            [pool_image(*each, pooling).float().cpu() for each in states],
            ["torch", "pillow", backbone.library],
            id=id,
            modality="image",
            preprocessing={
                **asdict(preprocessing),
                "mean": list(preprocessing.mean),  # lists, because JSON has no tuples
                "std": list(preprocessing.std),
                **({"jpeg_least": self.min_jpeg_side} if fast_jpeg else {}),
                **({"image_size": backbone.image_size} if backbone.image_size else {}),
            },
            pooling=self._pooling,
            precision=runtime.precision,
        )

    @cached_property
    def batch_size(self) -> int:
        """Number of images that `encode` takes at its best on this device."""

        def encode(images: int) -> None:
            self.encode(torch.zeros(images, self.size, self.size, 3, dtype=torch.uint8))

        return self._runtime.batch_size(encode, on_cpu=CPU_BATCH, at_most=GPU_BATCH)

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of the pixels of one preprocessed image."""
        return (self.size, self.size, 3)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resize and crop an RGB image: (size, size, 3) uint8, which is faster to copy to a GPU than float32."""
        return as_pixels(self._resize(image))

    @contextmanager
    def through(self, view: View) -> Iterator[None]:
        """Let `preprocess` make this view of a picture within a `with` block."""
        own = self._resize
        self._resize = view.resize(own, cast(Backbone, self.network).preprocessing)
        try:
            yield
        finally:
            self._resize = own

    def normalise(self, pixels_BHWC: Tensor, normalisation: Normalisation | None = None) -> Tensor:
        """Copy uint8 RGB pixels to the device and normalise them: (B, 3, H, W) float32, the input of the network.

        Args:
            pixels_BHWC: Pixels of any size.
            normalisation: Replaces the encoder's own.
        """
        return (normalisation or self._normalisation).apply(self._runtime.upload(pixels_BHWC))

    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        """Return pooled features of uint8 RGB pixels, (B, D) float32 on the CPU."""
        features_BD: Tensor = self(self.normalise(pixels_BHWC))
        return features_BD.cpu()

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return pooled features of normalised pixels (B, 3, H, W), (B, D) float32 on the device."""
        return torch.cat([pool_image(*each, self._pooling).float() for each in self._forward(pixels_BCHW)], dim=-1)

    def encode_dense(
        self, pixels_BHWC: Tensor, *, normalisation: Normalisation | None = None, last_attention: bool = True
    ) -> Tensor:
        """Return one feature per patch in the space of `encode`, (B, h, w, D) float32 on the CPU.

        Args:
            pixels_BHWC: uint8 RGB pixels.
            normalisation: Replaces the encoder's own.
            last_attention: False lets patches skip the last attention (see `maskclip`).

        Raises:
            UserError: The patches have no features of their own, or no last attention that they could skip.
        """
        return self.forward_dense(self.normalise(pixels_BHWC, normalisation), last_attention=last_attention).cpu()

    def forward_dense(self, pixels_BCHW: Tensor, *, last_attention: bool = True) -> Tensor:
        """Return one feature per patch of normalised pixels (B, 3, H, W), (B, h, w, D) float32 on the device.

        Height and width need not be `size`. If they are not multiples of `stride`, the image is padded on all sides
        with its mean colour (see `preprocessing.margins`).

        Raises:
            UserError: The patches have no features of their own, or no last attention that they could skip.
        """
        self.require_patches()
        padded_BCHW = pad_to_multiple(pixels_BCHW, self.stride)
        height, width = padded_BCHW.shape[-2:]
        other = None if height == width == self.size else f"{height} × {width}"
        with report_refused_size(self.identity.spec.id, other), ExitStack() as changed:
            if not last_attention:
                patches = (height // self.stride) * (width // self.stride)
                changed.enter_context(skip_last_attention(self.network, patches))
            states = self._forward(padded_BCHW)
        if self._pooling == "pooler":
            states = [(cls_BD, self._pool_each(patches_BhwD)) for cls_BD, patches_BhwD in states]
        return torch.cat([pool_patches(*each, self._pooling).float() for each in states], dim=-1)

    def require_pixels(self, pixels_BCHW: Tensor) -> None:
        """Raise `ValueError` unless these are normalised pixels (B, 3, size, size)."""
        if pixels_BCHW.ndim != 4 or pixels_BCHW.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"Pixels are invalid: got shape {tuple(pixels_BCHW.shape)}, expected (B, 3, {self.size}, {self.size}). "
                "Use the model's image processor."
            )

    def require_patches(self) -> None:
        """Raise `UserError` if single patches have no features of their own."""
        if not self._has_patches:
            raise UserError(
                f"Encoder {self.identity.spec.id!r} pools its patches in a way that gives a single one no embedding. "
                "Use another encoder for dense features."
            )

    @in_own_precision
    def _forward(self, pixels_BCHW: Tensor) -> list[tuple[Tensor | None, Tensor]]:
        """Return class token and map of patches of each layer."""
        backbone = cast(Backbone, self.network)
        pixels_BCHW = pixels_BCHW.to(self.device, self.dtype)
        if self._layers == OUTPUT:
            return [backbone(pixels_BCHW)]
        return backbone.forward_layers(pixels_BCHW, self._layers)

    @in_own_precision
    def _pool_each(self, patches_BhwD: Tensor) -> Tensor:
        backbone = cast(Backbone, self.network)
        return backbone.pool_each(patches_BhwD)


@contextmanager
def report_refused_size(encoder: str, size: str | None) -> Iterator[None]:
    """Raise `UserError` where a network refuses an image size other than its own, "H × W". None is its own size."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as problem:
        if size is None or is_device_error(problem):
            raise
        reason = " ".join(str(problem).split())[:200]
        raise UserError(
            f"Encoder {encoder!r} does not take images of {size} ({reason}). Use its own size."
        ) from problem


def golden_image() -> Image.Image:
    """Return the input of golden vectors: gradients, a checkerboard and a disc in 240 × 320, in integer arithmetic."""
    y, x = np.mgrid[0:240, 0:320]
    red = x * 255 // 319
    green = y * 255 // 239
    blue = ((x // 16 + y // 16) % 2) * 160 + 40
    disc = (x - 210) ** 2 + (y - 110) ** 2 < 70**2
    pixels_HWC = np.stack([np.where(disc, 230, red), np.where(disc, 60, green), np.where(disc, 30, blue)], axis=-1)
    return Image.fromarray(pixels_HWC.astype(np.uint8))
