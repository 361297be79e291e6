"""Export a run whole as ONNX graphs, each an encoder with its head, for programs without PyTorch.

FOLDER/image.onnx                 `pixels` (B, S, S, 3) uint8 RGB → `embeddings` (B, E) float32, unit-norm
FOLDER/text.onnx                  `input_ids`, `attention_mask` (B, T) int64 → `embeddings` (B, E) float32, unit-norm
FOLDER/tokenizer.json             tokenizer, with truncation and padding
FOLDER/preprocessor_config.json   resizing and cropping
FOLDER/README.md                  how they are used, with a program
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sail_align.align.hub.image_processing import processor_config
from sail_align.align.hub.onnx_graph import (
    FILES,
    Inputs,
    check_difference,
    export_graph,
    largest_difference,
    metadata_of,
    require_onnx,
    save_graph,
)
from sail_align.align.model.alignment import AlignmentModel
from sail_align.align.runs.checkpoint import load_run
from sail_align.extract.encoders.identity import GOLDEN_TEXTS, EncoderSpec, require_known
from sail_align.extract.encoders.load import load_recorded
from sail_align.extract.encoders.pooling import pool_image
from sail_align.extract.encoders.text import TransformersTextEncoder, token_states
from sail_align.extract.encoders.vision import Backbone, VisionEncoder, golden_image
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import write_atomically
from sail_align.extract.system.folders import new_folder, require_new

TOLERANCE = 2e-4
"""Maximum difference between the coordinates of unit vectors. Rounding to float16 amplifies that to float32."""


def write_whole(path: Path, folder: Path) -> float:
    """Write encoders with heads as graphs to a new folder; return their maximum difference from PyTorch.

    Encoders in half precision are exported in float32, with the weights they have.

    Raises:
        UserError: A library is missing, `path` is not a run, an encoder cannot be loaded or exported, the folder is not
            empty, or ONNX Runtime gives other embeddings.
    """
    require_onnx()
    require_new(folder)
    run = load_run(path)
    require_known(run.image, run.text)
    for side in (run.image, run.text):
        if not side.is_output:
            raise UserError(f"--whole needs the output of one encoder, got {side.spec.id!r}. Leave --whole out.")
    text = cast(TransformersTextEncoder, load_recorded(run.text)).float()
    if not hasattr(getattr(text, "tokenizer", None), "backend_tokenizer"):  # that of OpenCLIP, or in plain Python
        raise UserError(
            f"--whole is not available for text encoder {run.text.spec.id!r}, whose tokenizer cannot be written as "
            "tokenizer.json. Export the heads alone, without --whole."
        )
    image = cast(VisionEncoder, load_recorded(run.image)).float()
    with new_folder(folder, FILES) as new:
        about = {
            **metadata_of(run, run.image),
            "input": "uint8 RGB, resized and cropped as in preprocessor_config.json",
        }
        difference = _write_image(new / "image.onnx", image, run.model, about)
        about = {**metadata_of(run, run.text), "prefix": run.text.spec.preprocessing["prefix"]}
        difference = max(difference, _write_text(new / "text.onnx", text, run.model, about))
        check_difference(difference, TOLERANCE)
        _write_tokenizer(new / "tokenizer.json", text)
        config = processor_config(run.image.spec.preprocessing, normalised=False)
        write_atomically(new / "preprocessor_config.json", json.dumps(config, indent=1).encode())
        write_atomically(new / "README.md", _readme(run.image.spec, run.text.spec).encode())
    return difference


class _Image(nn.Module):
    """An image encoder with normalisation of pixels, pooling and head."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: VisionEncoder, model: AlignmentModel):
        super().__init__()
        self.network, self.model, self.pooling = encoder.network, model, encoder.identity.spec.pooling
        preprocessing = cast(Backbone, encoder.network).preprocessing
        self.register_buffer("mean", torch.tensor(preprocessing.mean))
        self.register_buffer("std", torch.tensor(preprocessing.std))

    def forward(self, pixels: Tensor) -> Tensor:
        pixels_BHWC = (pixels.float() / 255 - self.mean) / self.std
        cls_BD, patches_BhwD = self.network(pixels_BHWC.permute(0, 3, 1, 2))
        return self.model.encode_image(pool_image(cls_BD, patches_BhwD, self.pooling).half())


class _Text(nn.Module):
    """A text encoder with pooling and head."""

    def __init__(self, encoder: TransformersTextEncoder, model: AlignmentModel):
        super().__init__()
        self.encoder, self.model = encoder, model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_BTD = token_states(self.encoder.network(input_ids=input_ids, attention_mask=attention_mask))
        mask_BT = attention_mask.to(torch.int32)  # ONNX Runtime has no argmax of int64
        return self.model.encode_text(self.encoder.pool(hidden_BTD, mask_BT).half())


@torch.no_grad()
def _write_image(path: Path, encoder: VisionEncoder, model: AlignmentModel, about: dict[str, str]) -> float:
    golden_1HWC = encoder.preprocess(golden_image())[None]
    noise_BHWC = torch.randint(
        0, 256, (3, *golden_1HWC.shape[1:]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    dynamic = {"pixels": {0: torch.export.Dim("batch")}}
    save_graph(export_graph(_Image(encoder, model), {"pixels": noise_BHWC[:2]}, dynamic, about), path)
    batches = [
        ({"pixels": each}, model.encode_image(encoder.encode(each).half())) for each in (golden_1HWC, noise_BHWC)
    ]
    return largest_difference(path, batches)


@torch.no_grad()
def _write_text(path: Path, encoder: TransformersTextEncoder, model: AlignmentModel, about: dict[str, str]) -> float:
    prefix, limit = encoder.identity.spec.preprocessing["prefix"], encoder.identity.spec.preprocessing["token_limit"]

    def tokens(texts: list[str]) -> Inputs:
        found = encoder.tokenizer(
            [prefix + text for text in texts], truncation=True, max_length=limit, padding=True, return_tensors="pt"
        )
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    example = tokens(["a dog", "a red ball and a dog"])
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=limit)}
    save_graph(export_graph(_Text(encoder, model), example, dict.fromkeys(example, axes), about), path)
    groups = (["a dog"], ["a dog", *GOLDEN_TEXTS])
    batches = [(tokens(texts), model.encode_text(encoder.encode(texts).half())) for texts in groups]
    return largest_difference(path, batches)


def _write_tokenizer(path: Path, encoder: TransformersTextEncoder) -> None:
    tokenizer = encoder.tokenizer
    backend: Any = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(encoder.identity.spec.preprocessing["token_limit"])
    backend.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=str(tokenizer.pad_token)
    )
    write_atomically(path, backend.to_str(pretty=True).encode())


def _readme(image: EncoderSpec, text: EncoderSpec) -> str:
    side, resize = image.preprocessing["crop"], image.preprocessing["resize"]
    method, prefix = image.preprocessing["interpolation"].upper(), text.preprocessing["prefix"]
    if resize:
        size = f"({resize} * side // min(image.size) for side in image.size)"
        crop = f".crop(((width - {side}) // 2, (height - {side}) // 2, (width + {side}) // 2, (height + {side}) // 2))"
    else:
        size, crop = f"{side}, {side}", ""
    texts = f"[{prefix!r} + text for text in texts]" if prefix else "texts"
    begin = f" Each text begins with {prefix!r}." if prefix else ""
    limit = text.preprocessing["token_limit"]
    return f"""# Images and texts in one space, in ONNX

`image.onnx` maps `pixels` (batch, {side}, {side}, 3), uint8 RGB, to `embeddings`. It contains the normalisation of
pixels. With `preprocessor_config.json`, image processors of transformers only resize and crop. Their axes are (batch,
3, height, width).

`text.onnx` maps `input_ids` and `attention_mask` (batch, tokens), int64, to `embeddings`. `tokenizer.json` truncates to
{limit} tokens and pads.{begin}

Embeddings are float32 and unit-norm. Encoders: `{image.id}` for images, `{text.id}` for texts. Their licences apply.

```python
import numpy
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
image_graph, text_graph = onnxruntime.InferenceSession("image.onnx"), onnxruntime.InferenceSession("text.onnx")


def embed_image(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    width, height = {size}
    image = image.resize((width, height), Image.Resampling.{method}){crop}
    return image_graph.run(None, {{"pixels": numpy.asarray(image)[None]}})[0]


def embed_texts(texts):
    encoded = tokenizer.encode_batch({texts})
    ids, mask = [each.ids for each in encoded], [each.attention_mask for each in encoded]
    return text_graph.run(None, {{"input_ids": numpy.array(ids), "attention_mask": numpy.array(mask)}})[0]


print(embed_image("photo.jpg") @ embed_texts(["a cat", "a dog"]).T)
```
"""
