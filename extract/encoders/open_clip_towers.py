"""The two towers of an OpenCLIP model as encoders whose features lie in one space: they need no heads.

A feature is what `encode_image` or `encode_text` of the model gives, before it is made of unit length.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from sail_align.extract.encoders.base import EncoderSpec, Identity
from sail_align.extract.encoders.catalogue import ImagePreprocessing, Normalisation
from sail_align.extract.encoders.checkpoint import Checkpoint
from sail_align.extract.encoders.golden import SENTENCE, golden_vector, versions
from sail_align.extract.encoders.preprocessing import to_pixels
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.encoders.vision import Backbone, FrozenVisionEncoder
from sail_align.extract.errors import UserError

CPU_TEXTS, GPU_TEXTS = 32, 1_024
"""Texts at once, all padded to the model's context, on a CPU, and at most on a GPU."""


class OpenClipBackbone(Backbone):
    """The image tower; its class token is the picture's embedding, (B, E).

    The patches of a plain vision transformer go through the last norm and the projection as the class token does
    (Zhou, Loy and Dai 2022, section 3.1, without their change of the last attention). Other towers pool in ways that
    give a single patch no embedding; their map is the whole picture's.
    """

    library = "open_clip_torch"
    has_cls = True

    def __init__(self, visual: Any, size: int):
        super().__init__()
        self.visual: Any = visual
        transformers: Any = importlib.import_module("open_clip.transformer")
        self.has_patches = isinstance(visual, transformers.VisionTransformer) and visual.attn_pool is None
        self.stride = visual.patch_size[0] if self.has_patches else size
        if self.has_patches:
            visual.output_tokens = True

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the picture's embedding and its patches'."""
        if not self.has_patches:
            pooled_BE = self.visual(pixels_BCHW)
            return pooled_BE, pooled_BE[:, None, None]
        grid = (pixels_BCHW.shape[-2] // self.stride, pixels_BCHW.shape[-1] // self.stride)
        positions = {"positional_embedding": self._positions(grid)}
        pooled_BE, tokens_BTD = functional_call(self.visual, positions, (pixels_BCHW,))
        if self.visual.final_ln_after_pool:
            tokens_BTD = self.visual.ln_post(tokens_BTD)
        patches_BTE = tokens_BTD if self.visual.proj is None else tokens_BTD @ self.visual.proj
        return pooled_BE, patches_BTE.reshape(len(pooled_BE), *grid, -1)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Return position embeddings for a grid of patches, (1 + h · w, D); the model's own where it is its own."""
        positions_TD: Tensor = self.visual.positional_embedding
        if grid == tuple(self.visual.grid_size):
            return positions_TD
        own_1Dhw = positions_TD[1:].T.reshape(1, -1, *self.visual.grid_size).float()
        resized_1Dhw = F.interpolate(own_1Dhw, size=grid, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([positions_TD[:1], resized_1Dhw.flatten(2)[0].T.to(positions_TD.dtype)])


class OpenClipVisionEncoder(FrozenVisionEncoder):
    """A `VisionEncoder` that resizes as the model's own transform does, to the pixel."""

    def __init__(self, id: str, checkpoint: Checkpoint, model: Any, runtime: Runtime, *, fast_jpeg: bool):
        transforms: Any = importlib.import_module("open_clip.transform")
        config = transforms.PreprocessCfg(**model.visual.preprocess_cfg)
        size = config.size if isinstance(config.size, int) else config.size[0]
        if config.resize_mode == "longest" or config.size not in (size, (size, size), [size, size]):
            raise UserError(f"{id} pads its pictures, or takes no squares, which is not supported.")
        steps = transforms.image_transform_v2(config, is_train=False).transforms
        self._resize: Callable[[Image.Image], Image.Image] = transforms.Compose(steps[:-2])  # all but normalising
        resize = None if config.resize_mode == "squash" else size
        how = ImagePreprocessing(size, resize, config.interpolation, tuple(config.mean), tuple(config.std))
        self._has_patches = (backbone := OpenClipBackbone(model.visual, size)).has_patches
        super().__init__(id, checkpoint, backbone, how, "cls", runtime, fast_jpeg=fast_jpeg)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resize and crop an RGB picture, (size, size, 3) uint8."""
        return to_pixels(self._resize(image))

    def encode_dense(
        self, pixels_BHWC: Tensor, *, normalisation: Normalisation | None = None, last_attention: bool = True
    ) -> Tensor:
        """Return one embedding a patch: see the protocol.

        Raises:
            UserError: The tower gives a single patch no embedding.
        """
        if not self._has_patches:
            raise UserError(
                f"{self.identity.spec.id!r} pools its patches in a way that gives a single one no embedding."
            )
        return super().encode_dense(pixels_BHWC, normalisation=normalisation, last_attention=last_attention)


class OpenClipTextEncoder:
    """A `TextEncoder`: the text tower with the model's own tokenizer, which cuts at the model's context."""

    def __init__(self, id: str, checkpoint: Checkpoint, model: Any, tokenizer: Any, runtime: Runtime):
        model.visual = nn.Identity()
        self._runtime, self.tokenizer = runtime, tokenizer
        self._model: Any = runtime.freeze(model)
        golden = golden_vector(self.encode([SENTENCE]))
        spec = EncoderSpec(
            id=id,
            modality="text",
            source=checkpoint.source,
            weights=checkpoint.digest,
            preprocessing={"prefix": "", "token_limit": self._context},
            pooling="last",
            precision=runtime.precision,
            dim=len(golden),
        )
        used = versions("torch", "open_clip_torch", "transformers")
        self.identity = Identity(spec, golden, used, checkpoint.location)

    @property
    def _context(self) -> int:
        return int(self._model.context_length)

    @cached_property
    def batch_size(self) -> int:
        """How many texts are best encoded at once."""

        def encode(texts: int) -> None:
            self._embed(torch.zeros(texts, self._context, dtype=torch.int64))

        return self._runtime.batch_size(encode, on_cpu=CPU_TEXTS, at_most=GPU_TEXTS)

    def encode(self, texts: Sequence[str], advance: Callable[[int], object] = lambda done: None) -> Tensor:
        """Return the embeddings of texts, (B, E) float32 on the CPU; `advance` is told how many more are done."""
        return self.encode_tokens(self.tokenize(texts), advance)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the model's own tokens, (B, context) int64."""
        tokens_BT: Tensor = self.tokenizer(list(texts), context_length=self._context)
        return tokens_BT.long()

    def encode_tokens(self, tokens_BT: Tensor, advance: Callable[[int], object] = lambda done: None) -> Tensor:
        """Return the embeddings of texts by their tokens, (B, E) float32 on the CPU."""
        parts = []
        for batch_BT in torch.split(tokens_BT, self.batch_size):
            parts.append(self._embed(batch_BT))
            advance(len(batch_BT))
        return torch.cat(parts)

    @torch.no_grad()
    def _embed(self, tokens_BT: Tensor) -> Tensor:
        embeddings_BE: Tensor = self._model.encode_text(tokens_BT.to(self._runtime.device))
        return embeddings_BE.float().cpu()
