"""Checks of encoders on a device, against the same encoders in float64 on the CPU."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from sail_align.align.analysis.selftest.lab import (
    Check,
    Difference,
    Lab,
    SkippedError,
    largest_difference,
    relative_norm,
)
from sail_align.extract.encoders.catalogue import TEXT, VISION, Hub
from sail_align.extract.encoders.load import ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.errors import UserError

Config = ImageEncoderConfig | TextEncoderConfig

PACKAGED = ("efficientnet-lite0", "minilm-l6")
PAPER = ("dinov2-large", "gte-large")
IMAGES = 4
TEXTS = ["a dog", "the red cat sleeps on the green bench and a dog runs on the grass", "two people", "a"]
WORDS = ["[PAD]", "[UNK]", *dict.fromkeys(" ".join(TEXTS).split())]
TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def checks() -> Iterator[Check]:
    """Yield the checks."""
    exact: tuple[str, float, Difference] = ("float32", 1e-4, largest_difference)
    rounded: tuple[str, float, Difference] = ("bfloat16", 0.1, relative_norm)
    kinds: list[tuple[str, float, Callable[[Lab], Config]]] = [
        ("small DINOv2", 1, tiny_image),
        ("small GTE", 1, tiny_text),
        *((name, 5.0, partial(known, name)) for name in PACKAGED),
        *((name, 60.0, partial(known, name)) for name in PAPER),
    ]
    for name, seconds, config in kinds:
        for precision, bound, difference in (exact, rounded):
            measure = partial(_difference, config, precision, difference)
            yield Check(f"{name} in {precision}, features", bound, seconds, measure)


def known(name: str, lab: Lab) -> Config:
    """Return an encoder of the catalogue, if its weights are here.

    Raises:
        SkippedError: They are not.
    """
    entry: Any = (VISION | TEXT)[name]
    if isinstance(entry.origin, Hub):
        from huggingface_hub import errors, snapshot_download

        try:
            snapshot_download(entry.origin.repository, local_files_only=True, allow_patterns=["*.safetensors"])
        except errors.LocalEntryNotFoundError as problem:
            raise SkippedError("not downloaded") from problem
    return (ImageEncoderConfig if name in VISION else TextEncoderConfig)(name)


def tiny_image(lab: Lab) -> ImageEncoderConfig:
    """Return a small DINOv2 with random weights."""
    folder = lab.folder / "tiny-image"
    if not folder.exists():
        config = transformers.Dinov2Config(**TINY, image_size=70, patch_size=14)
        _save(transformers.Dinov2Model(config), folder)
        processor = {
            "do_center_crop": True,
            "crop_size": {"height": 70, "width": 70},
            "size": {"shortest_edge": 70},
            "resample": 3,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return ImageEncoderConfig(f"hf:{folder}", pooling="cls+mean")


def tiny_text(lab: Lab) -> TextEncoderConfig:
    """Return a small GTE with random weights."""
    folder = lab.folder / "tiny-text"
    if not folder.exists():
        config = transformers.GteConfig(**TINY, vocab_size=len(WORDS), max_position_embeddings=512)
        _save(transformers.GteModel(config), folder)
        tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        fast: Any = transformers.PreTrainedTokenizerFast
        fast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512).save_pretrained(
            folder
        )
    return TextEncoderConfig(f"hf:{folder}", pooling="cls")


def _save(model: Any, folder: Path) -> None:
    """Save a model with weights larger than initial ones, which are so near 0 that they hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 1 if name.endswith("norm.weight") or "lambda" in name else noise)
    model.save_pretrained(folder)


def inputs_of(encoder: Any, images: int = IMAGES) -> Any:
    """Return random pixels for an image encoder, texts for a text encoder."""
    if isinstance(encoder, VisionEncoder):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (images, *encoder.pixel_shape), dtype=torch.uint8, generator=generator)
    return TEXTS


def _difference(make: Callable[[Lab], Config], precision: str, difference: Difference, lab: Lab) -> float:
    config = make(lab)
    try:
        exact = config.load("cpu").double()
        encoder = replace(config, precision=precision).load(str(lab.device))
    except UserError as problem:
        raise SkippedError(str(problem)) from problem
    inputs = inputs_of(encoder)
    return difference([encoder.encode(inputs)], [exact.encode(inputs)])
