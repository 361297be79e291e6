"""Transformers models of a few kilobytes with random weights, saved in the form of real ones."""

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "query",
    ":",
    "a",
    "the",
    "dog",
    "cat",
    "runs",
    "sleeps",
    "on",
    "under",
    "red",
    "green",
    "bench",
    "grass",
    "and",
    "with",
]


def save_tokenizer(folder: Path, padding_side: str = "right", limit: int = 64) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=limit,
        padding_side=padding_side,
    )
    wrapped.save_pretrained(folder)
    return wrapped


def save_randomised(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Save a model with random parameters of realistic size. Errors would hide in the usual near-zero values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1 if name.endswith("norm.weight") or "lambda" in name else noise)
    model.save_pretrained(folder)
    return model.eval()


def save_image_processor(folder: Path, **changes: object) -> None:
    config = {
        "do_resize": True,
        "size": {"shortest_edge": 64},
        "do_center_crop": True,
        "crop_size": {"height": 56, "width": 56},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        **changes,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def save_timm(name: str, folder: Path, monkeypatch) -> torch.nn.Module:
    """Save a timm model that is made small for the test, and let any fetched encoder be this one."""
    from sail_align.extract.encoders.weights import EncoderFiles

    small = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    if name.startswith("convnext"):
        small = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    if name.startswith("swin"):
        small = {"embed_dim": 24, "depths": (1, 1, 1, 1)}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **{**small, **options}))
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * (parameter.std() if parameter.numel() > 1 else 1)
    save_file(model.state_dict(), folder / "model.safetensors")
    fetched = EncoderFiles(folder, {"loader": "hub", "repository": "timm/x", "revision": "0" * 40}, "1")
    monkeypatch.setattr(EncoderFiles, "fetch", lambda origin: fetched)
    return model


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return noise as uint8 pixels, (*shape, 3)."""
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalised(pixels_BHWC: torch.Tensor, mean: object, std: object) -> torch.Tensor:
    """Return normalised pixels, (B, 3, H, W) float32, computed in the plainest way."""
    pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2).contiguous() / 255
    return (pixels_BCHW - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
