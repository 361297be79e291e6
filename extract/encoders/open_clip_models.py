"""The two towers of an OpenCLIP model as encoders. Their features share one space, so they need no heads.

Features are the output of the model's `encode_image` or `encode_text`, before normalisation to unit length.
"""

import difflib
import importlib
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

from sail_align.extract.encoders.catalogue import OpenClipTower
from sail_align.extract.encoders.identity import GOLDEN_TEXTS
from sail_align.extract.encoders.preprocessing import ImagePreprocessing, check_image_size
from sail_align.extract.encoders.runtime import Runtime, in_own_precision
from sail_align.extract.encoders.text import TextEncoder
from sail_align.extract.encoders.vision import Backbone
from sail_align.extract.encoders.weights import EncoderFiles
from sail_align.extract.errors import UserError, import_extra
from sail_align.extract.system.files import file_digest

_NOT_INSTALLED = (
    "Package open_clip, which OpenCLIP's models need, is not installed. Run: pip install 'sail-align[eval]'."
)
CPU_TEXTS, GPU_TEXTS = 32, 1_024
"""Texts per batch, all padded to the model's context: on a CPU, and at most on a GPU."""


class OpenClipBackbone(Backbone):
    """The image tower. Its class token is the embedding of the image, (B, E).

    In a plain vision transformer, patches pass through the last norm and the projection as the class token does (Zhou,
    Loy and Dai 2022, section 3.1, without their change of the last attention). Other towers pool in ways that give a
    single patch no embedding; their map is that of the whole image.
    """

    library = "open_clip_torch"
    has_cls = True

    def __init__(self, visual: Any, image_size: int | None = None):
        transforms: Any = importlib.import_module("open_clip.transform")
        config = transforms.PreprocessCfg(**visual.preprocess_cfg)
        size = config.size if isinstance(config.size, int) else config.size[0]
        if config.resize_mode == "longest" or config.size not in (size, (size, size), [size, size]):
            raise UserError(
                f"The OpenCLIP model is not supported: it takes images of {config.size} with resize mode "
                f"{config.resize_mode!r}, expected squares without padding. Use another model."
            )
        super().__init__(
            ImagePreprocessing(
                crop=size,
                resize=None if config.resize_mode == "squash" else size,
                interpolation=config.interpolation,
                mean=tuple(config.mean),
                std=tuple(config.std),
            ),
            image_size,
        )
        self.resize = open_clip_resize(self.preprocessing)
        self.visual: Any = visual
        transformer: Any = importlib.import_module("open_clip.transformer")
        self._is_plain = isinstance(visual, transformer.VisionTransformer)
        self.has_patches = self._is_plain and visual.attn_pool is None
        trunk: Any = getattr(visual, "trunk", None)  # a model of timm
        if self._is_plain:
            check_image_size(self.image_size, visual.patch_size[0])
        elif hasattr(trunk, "num_prefix_tokens"):
            check_image_size(self.image_size, trunk.feature_info[-1]["reduction"])
        if self.image_size and hasattr(visual, "set_input_size"):
            visual.set_input_size(self.image_size)
        self.stride = visual.patch_size[0] if self.has_patches else self.preprocessing.crop
        if self.has_patches:
            visual.output_tokens = True

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the embeddings of the image and of its patches."""
        if not self._is_plain:
            pooled_BE = self.visual(pixels_BCHW)
            return pooled_BE, pooled_BE[:, None, None]
        height, width = (side // self.visual.patch_size[0] for side in pixels_BCHW.shape[-2:])
        positions = {"positional_embedding": self._positions((height, width))}
        output = functional_call(self.visual, positions, (pixels_BCHW,))
        if not self.has_patches:
            return output, output[:, None, None]
        pooled_BE, tokens_BTD = output
        if self.visual.final_ln_after_pool:
            tokens_BTD = self.visual.ln_post(tokens_BTD)
        patches_BTE = tokens_BTD if self.visual.proj is None else tokens_BTD @ self.visual.proj
        return pooled_BE, patches_BTE.reshape(pooled_BE.shape[0], height, width, -1)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Return position embeddings for a grid of patches, (1 + h · w, D), interpolated if it is not the model's."""
        positions_TD: Tensor = self.visual.positional_embedding
        if grid == tuple(self.visual.grid_size):
            return positions_TD
        own_1Dhw = positions_TD[1:].T.reshape(1, -1, *self.visual.grid_size).float()
        resized_1Dhw = F.interpolate(own_1Dhw, size=grid, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([positions_TD[:1], resized_1Dhw.flatten(2)[0].T.to(positions_TD.dtype)])


def open_clip_resize(preprocessing: ImagePreprocessing) -> Callable[[Image.Image], Image.Image]:
    """Return open_clip's own function that resizes and crops an image.

    Raises:
        UserError: open_clip is not installed.
    """
    transforms: Any = import_extra("open_clip.transform", _NOT_INSTALLED)
    config = transforms.PreprocessCfg(
        size=preprocessing.crop,
        resize_mode="squash" if preprocessing.resize is None else "shortest",
        interpolation=preprocessing.interpolation,
    )
    steps = transforms.image_transform_v2(config, is_train=False).transforms
    resize: Callable[[Image.Image], Image.Image] = transforms.Compose(steps[:-2])  # without ToTensor, Normalize
    return resize


class OpenClipTextEncoder(TextEncoder):
    """A `TextEncoder`: the text tower with the model's own tokenizer, which truncates to the model's context."""

    def __init__(self, id: str, files: EncoderFiles, model: Any, tokenizer: Any, runtime: Runtime):
        model.visual = nn.Identity()
        super().__init__(model, runtime)
        self._tokenizer = tokenizer
        self._context = int(model.context_length)
        self.identity = files.identify(
            torch.cat([self._encode_batch(self.tokenize([text])) for text in GOLDEN_TEXTS]),
            ["torch", "open_clip_torch", "transformers"],
            id=id,
            modality="text",
            preprocessing={"prefix": "", "token_limit": self._context},
            pooling="last",
            precision=runtime.precision,
        )

    @cached_property
    def batch_size(self) -> int:
        """Number of texts per batch on this device."""

        def encode(texts: int) -> None:
            self._encode_batch(torch.zeros(texts, self._context, dtype=torch.int64))

        return self._runtime.batch_size(encode, on_cpu=CPU_TEXTS, at_most=GPU_TEXTS)

    def encode(self, texts: Sequence[str], advance: Callable[[int], object] = lambda done: None) -> Tensor:
        """Return the embeddings of texts, (B, E) float32 on the CPU."""
        return self.encode_tokens(self.tokenize(texts), advance)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the model's own tokens, (B, context) int64."""
        tokens_BT: Tensor = self._tokenizer(list(texts), context_length=self._context)
        return tokens_BT.long()

    def encode_tokens(self, tokens_BT: Tensor, advance: Callable[[int], object] = lambda done: None) -> Tensor:
        """Return the embeddings of tokenized texts, (B, E) float32 on the CPU."""
        embeddings = []
        for batch_BT in torch.split(tokens_BT, self.batch_size):
            embeddings.append(self._encode_batch(batch_BT))
            advance(len(batch_BT))
        return torch.cat(embeddings)

    @in_own_precision
    def _encode_batch(self, tokens_BT: Tensor) -> Tensor:
        tower: Any = self.network
        embeddings_BE: Tensor = tower.encode_text(tokens_BT.to(self.device))
        return embeddings_BE.float().cpu()


def load_open_clip(tower: OpenClipTower) -> tuple[Any, Any, EncoderFiles]:
    """Return a model in float32 on the CPU, its tokenizer, and its files.

    Raises:
        UserError: open_clip is not installed, lacks the model or its weights, or cannot download or load them.
    """
    open_clip = import_extra("open_clip", _NOT_INSTALLED)
    origin = tower.origin
    if isinstance(origin, Path):
        if len(list(origin.glob("*.safetensors"))) != 1:
            raise UserError(f"{origin} is not the folder of an OpenCLIP model: expected one safetensors file.")
        files = EncoderFiles.in_folder(origin, "open_clip", "open_clip_config.json")
        tag = None
    else:
        files, tag = _download(open_clip, origin, tower.weights), tower.weights
    name = _name(tower)
    try:
        with _no_logging():
            model = open_clip.create_model(name, pretrained=tag, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError) as problem:
        raise UserError(f"open_clip cannot load {name}: {' '.join(str(problem).split())[:300]}") from problem
    return model.eval(), tokenizer, files


def load_open_clip_tokenizer(tower: OpenClipTower) -> Any:
    """Return a model's function from texts to tokens. Raises `UserError` if open_clip is not installed."""
    open_clip = import_extra("open_clip", _NOT_INSTALLED)
    with _no_logging():
        return open_clip.get_tokenizer(_name(tower))


def _name(tower: OpenClipTower) -> str:
    return f"local-dir:{tower.origin}" if isinstance(tower.origin, Path) else tower.origin


def _download(open_clip: Any, model: str, weights: str) -> EncoderFiles:
    models = open_clip.list_models()
    if model not in models:
        near = " or ".join(difflib.get_close_matches(model, models, n=3)) or "one of open_clip.list_models()"
        raise UserError(f"open_clip has no model {model!r}. Did you mean {near}?")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights not in tags:
        raise UserError(f"open_clip has no weights {weights!r} for {model}. Choose one of: {', '.join(tags)}.")
    published = open_clip.get_pretrained_cfg(model, weights)
    # Running weights with an activation other than that of their training degrades the features without any error.
    if bool(published.get("quick_gelu")) != bool(open_clip.get_model_config(model).get("quick_gelu")):
        other = model.removesuffix("-quickgelu")
        other = f"{other}-quickgelu" if published.get("quick_gelu") else other
        raise UserError(
            f"The weights {weights!r} were trained with another activation than {model} has. Use "
            f"open_clip:{other}@{weights}."
        )
    try:
        with _no_logging():
            path = Path(open_clip.download_pretrained(published))
    except (RuntimeError, ValueError, OSError) as problem:
        raise UserError(
            f"The weights {weights!r} of {model} cannot be downloaded and are not in the local cache. "
            "Check the connection."
        ) from problem
    source = {"loader": "open_clip", "model": model, "weights": weights}
    return EncoderFiles(path, source, str(file_digest(path)))


@contextmanager
def _no_logging() -> Iterator[None]:
    """Suppress open_clip's messages, which it writes to the root logger."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
