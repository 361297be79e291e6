"""The two towers of an OpenCLIP model as encoders whose features lie in one space: they need no heads.

A feature is what `encode_image` or `encode_text` of the model gives, before it is made of unit length.
"""

import difflib
import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from sail_align.extract.encoders.base import SENTENCE, EncoderSpec, Identity, golden_vector, versions
from sail_align.extract.encoders.catalogue import Folder, ImagePreprocessing, Normalisation, OpenClip
from sail_align.extract.encoders.preprocessing import to_pixels
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.encoders.vision import Backbone, FrozenVisionEncoder
from sail_align.extract.encoders.weights import Checkpoint
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import file_digest

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


CONFIG = "open_clip_config.json"


def load_open_clip(origin: OpenClip | Folder) -> tuple[Any, Any, Checkpoint]:
    """Return a model in float32 on the CPU, its tokenizer, and what of its origin belongs in a spec.

    Raises:
        UserError: open_clip is not installed or has no such model or weights, or they cannot be had or do not fit.
    """
    try:
        open_clip: Any = importlib.import_module("open_clip")
    except ImportError as problem:
        raise UserError(
            "OpenCLIP's models need open_clip, which is not installed: pip install 'sail-align[eval]'."
        ) from problem
    if isinstance(origin, Folder):
        checkpoint, name, pretrained = _in_folder(origin.path), f"local-dir:{origin.path}", None
    else:
        checkpoint, name, pretrained = _published(open_clip, origin), origin.model, origin.weights
    try:
        with _silent():
            model = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError) as problem:
        raise UserError(f"open_clip cannot load {name}: {' '.join(str(problem).split())[:300]}") from problem
    return model.eval(), tokenizer, checkpoint


def _published(open_clip: Any, origin: OpenClip) -> Checkpoint:
    known = open_clip.list_models()
    if origin.model not in known:
        near = " or ".join(difflib.get_close_matches(origin.model, known, n=3)) or "one of open_clip.list_models()"
        raise UserError(f"open_clip has no model {origin.model!r}; did you mean {near}?")
    tags = open_clip.list_pretrained_tags_by_model(origin.model)
    if origin.weights not in tags:
        there = ", ".join(tags) or "none"
        raise UserError(f"open_clip has no weights {origin.weights!r} of {origin.model}; there are: {there}.")
    published = open_clip.get_pretrained_cfg(origin.model, origin.weights)
    # Weights trained with the one activation give worse numbers with the other, and no error.
    if bool(published.get("quick_gelu")) != bool(open_clip.get_model_config(origin.model).get("quick_gelu")):
        other = origin.model.removesuffix("-quickgelu")
        other = f"{other}-quickgelu" if published.get("quick_gelu") else other
        raise UserError(
            f"The weights {origin.weights!r} were trained with another activation than {origin.model} has; write "
            f"open_clip:{other}@{origin.weights}."
        )
    try:
        with _silent():
            file = Path(open_clip.download_pretrained(published))
    except (RuntimeError, ValueError, OSError) as problem:
        raise UserError(
            f"The weights {origin.weights!r} of {origin.model} cannot be had and are not in the local cache; check the "
            "connection."
        ) from problem
    source = {"loader": "open_clip", "model": origin.model, "weights": origin.weights}
    return Checkpoint(file, source, str(file_digest(file)))


def _in_folder(folder: Path) -> Checkpoint:
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / CONFIG).is_file() or len(files) != 1:
        raise UserError(f"{folder} is no folder of an OpenCLIP model: it needs {CONFIG} and one file of safetensors.")
    try:
        config = json.dumps(json.loads((folder / CONFIG).read_bytes()), sort_keys=True)
    except ValueError as problem:
        raise UserError(f"{folder / CONFIG} is not valid JSON: {problem}.") from problem
    source = {"loader": "open_clip", "config": hashlib.sha256(config.encode()).hexdigest()}
    return Checkpoint(folder, source, str(file_digest(files[0])), str(folder.resolve()))


@contextmanager
def _silent() -> Iterator[None]:
    """Keep open_clip's log, which it writes to the root logger, out of ours."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
