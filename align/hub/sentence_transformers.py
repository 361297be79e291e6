"""Write a run as a folder for sentence-transformers.

If each part has a counterpart in sentence-transformers, the folder consists of its modules and needs no other package:

    Router {image: Transformer, Pooling, (Dense,) LayerNorm, Dense …; text: Transformer, Pooling, LayerNorm, Dense …}
    Normalize

Otherwise it is an exported folder with the module `sail_align.sentence_transformers.SailModule`, which computes what
`sail_align.load` computes.
"""

import copy
import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sail_align.align.hub.folder import CARD, hub_files
from sail_align.align.hub.image_processing import processor_config
from sail_align.align.model.heads import Head, LinearHead, MLPHead
from sail_align.align.runs.checkpoint import Run
from sail_align.extract.encoders.identity import GOLDEN_TEXTS, require_known
from sail_align.extract.encoders.load import load_recorded
from sail_align.extract.encoders.text import TextEncoder, TransformersTextEncoder
from sail_align.extract.encoders.transformers_models import TransformersBackbone, no_progress_bar
from sail_align.extract.encoders.vision import VisionEncoder, golden_image
from sail_align.extract.errors import UserError, import_extra
from sail_align.extract.system.files import write_atomically
from sail_align.extract.system.folders import new_folder, require_new

TOLERANCE = 2e-3
"""Maximum difference of the coordinates of native embeddings. Ours round features to float16, as stores do."""
MODULE = "sail_align.sentence_transformers.SailModule"
ENCODER_FOLDERS = {"image": "image_encoder", "text": "text_encoder"}
"""Copies of encoders that were local folders."""
_FILES = r"[\w.-]+\.(json|safetensors|txt|model|md|jinja)"
"""Names of the files that sentence-transformers and transformers write."""
_ENCODER_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
_POOLINGS = {"last": "lasttoken"}


class NotNativeError(Exception):
    """A part of the model has no counterpart in sentence-transformers. The message names it."""


@dataclass(frozen=True)
class Written:
    """The kind of folder that was written.

    Attributes:
        not_native: Why the folder needs sail-align. Empty if all its modules are those of sentence-transformers.
        difference: Maximum difference of native embeddings from ours.
    """

    not_native: str = ""
    difference: float = 0.0


def write_sentence_transformers(run: Run, folder: Path, card: Callable[[str], str]) -> Written:
    """Write a run to a new folder that `SentenceTransformer` loads, completely or not at all.

    Args:
        run: The run.
        folder: The new folder.
        card: Returns the README.md, given what the folder contains and how it is loaded.

    Raises:
        UserError: sentence-transformers is missing, an encoder cannot be loaded, or the folder is not empty.
    """
    import_extra(
        "sentence_transformers",
        "--to sentence-transformers needs sentence-transformers. Install it with: pip install "
        "'sail-align[sentence-transformers]'.",
    )
    require_known(run.image, run.text)
    for side in (run.image, run.text):
        if side.parts:
            raise UserError(f"--to sentence-transformers needs single encoders, got {side.spec.id!r}. Leave it out.")
    require_new(folder)
    image = cast(VisionEncoder, load_recorded(run.image))
    text = cast(TextEncoder, load_recorded(run.text))
    try:
        if not (run.image.is_output and run.text.is_output):
            raise NotNativeError("a head takes an inner layer of its encoder")
        routes = {"image": _image_encoder(image), "text": _text_encoder(text)}
        heads = {"image": _head(run.model.image_head), "text": _head(run.model.text_head)}
    except NotNativeError as reason:
        with new_folder(folder, _FILES) as new:
            _write_module(run, new, card(_USAGE_OF_MODULE))
        return Written(not_native=str(reason))
    with new_folder(folder, _FILES) as new, no_progress_bar():
        _write_native(routes, heads, text.identity.spec.preprocessing["prefix"], new)
        write_atomically(new / CARD, card(_USAGE_OF_NATIVE).encode())
        difference = _difference(run, image, text, new)
        if not difference < TOLERANCE:
            raise UserError(
                f"sentence-transformers' embeddings differ from ours by {difference:.2g}; expected at most "
                f"{TOLERANCE:g}. Try another version of it."
            )
    return Written(difference=difference)


_USAGE_OF_NATIVE = """This folder contains both encoders and the heads as modules of
sentence-transformers; the licences of the encoders apply to their weights.

```python
from sentence_transformers import SentenceTransformer  # pip install 'sentence-transformers>=6'

model = SentenceTransformer("<this folder>")
images = model.encode([image, another_image])
print(model.similarity(images, model.encode(["a cat", "a dog"])))
```

Images are PIL images, paths or URLs. Rotate a photo with `PIL.ImageOps.exif_transpose` first. A list that mixes images
and texts needs `batch_size=1`."""

_USAGE_OF_MODULE = f"""This folder contains the heads. The encoders are loaded from where their authors
published them, and rejected if they differ from those used in training.

```python
from sentence_transformers import SentenceTransformer  # pip install 'sail-align[sentence-transformers]'

model = SentenceTransformer("<this folder>", trust_remote_code=True)
embeddings = model.encode([image, "a cat", "a dog"])
print(model.similarity(embeddings, embeddings))
```

The folder contains no code. sentence-transformers asks for `trust_remote_code` because its module
`{MODULE}` is part of the package sail-align, not of its own. Without that option:

```python
import sail_align.sentence_transformers

model = sail_align.sentence_transformers.load("<this folder>")
```"""


def _modules() -> Any:
    return importlib.import_module("sentence_transformers.sentence_transformer.modules")


@dataclass(frozen=True)
class _Encoder:
    """A network of transformers with what it needs to run in sentence-transformers.

    Attributes:
        network: The network.
        save_processor: Writes its tokenizer or image processor to a folder.
        pooling: Arguments of `Pooling`, without the dimension.
        correction: Linear map of the pooled features (out, in), None for none.
    """

    network: Any
    save_processor: Callable[[Path], object]
    pooling: tuple[str, ...]
    correction: Tensor | None = None


def _text_encoder(encoder: TextEncoder) -> _Encoder:
    if not isinstance(encoder, TransformersTextEncoder):
        raise NotNativeError("the text encoder is not one of transformers")
    _check_network("text", encoder.network, encoder.identity.spec.precision)
    spec = encoder.identity.spec
    if "modules" in spec.preprocessing or "pools_prefix" in spec.preprocessing:
        raise NotNativeError("the text encoder has modules of its own after its pooling")
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.model_max_length = spec.preprocessing["token_limit"]
    return _Encoder(encoder.network, tokenizer.save_pretrained, (_POOLINGS.get(spec.pooling, spec.pooling),))


def _image_encoder(encoder: VisionEncoder) -> _Encoder:
    backbone, spec = encoder.network, encoder.identity.spec
    if not isinstance(backbone, TransformersBackbone):
        raise NotNativeError("the image encoder is not one of transformers")
    _check_network("image", backbone.model, spec.precision)
    if backbone.pools:
        raise NotNativeError("the image encoder pools with a head of its own")
    own_size = getattr(backbone.model.config, "image_size", encoder.size)
    if backbone.interpolates and own_size not in (encoder.size, (encoder.size,) * 2, [encoder.size] * 2):
        raise NotNativeError("the image encoder interpolates its positions")
    pooling, correction = _patch_mean(encoder)

    def save_processor(folder: Path) -> None:
        write_atomically(folder / "preprocessor_config.json", json.dumps(processor_config(spec.preprocessing)).encode())

    return _Encoder(backbone.model, save_processor, pooling, correction)


def _patch_mean(encoder: VisionEncoder) -> tuple[tuple[str, ...], Tensor | None]:
    """Return the pooling of an image encoder, and the map to its features.

    Pooling takes the mean m of all tokens, which includes the class token c. That of the P patches alone, ours, is
    linear in both: ((P + 1) m − c) / P.

    Raises:
        NotNativeError: The mean is over patches alone, but there are registers besides them and the class token.
    """
    backbone: Any = encoder.network
    pooling, dim = encoder.identity.spec.pooling, encoder.identity.spec.dim
    if pooling == "cls" or not backbone.has_cls:
        return (pooling,), None
    patches = (encoder.size // encoder.stride) ** 2
    if backbone.tokens != patches + 1:
        raise NotNativeError("the image encoder has registers, which are not part of its mean")
    width = dim if pooling == "mean" else dim // 2
    eye, zero = torch.eye(width), torch.zeros(width, width)
    mean = torch.cat([-eye / patches, eye * (patches + 1) / patches], dim=1)
    return ("cls", "mean"), mean if pooling == "mean" else torch.cat([torch.cat([eye, zero], dim=1), mean])


def _check_network(side: str, network: nn.Module, precision: str) -> None:
    if not type(network).__module__.startswith("transformers.models."):
        raise NotNativeError(f"the {side} encoder runs code of its own")
    if precision != "float32":
        raise NotNativeError(f"the {side} encoder runs in {precision}")


def _head(head: Head) -> list[Any]:
    """Return a head as modules of sentence-transformers.

    Raises:
        NotNativeError: It is a GLU, or has a power or a linear path beside hidden units.
    """
    if head.power != 1:
        raise NotNativeError("the image head takes powers of its input")
    modules, norm = _modules(), head.norm
    layer_norm = modules.LayerNorm(norm.normalized_shape[0])
    layer_norm.norm.load_state_dict(norm.state_dict())
    if isinstance(head, LinearHead):
        weight, bias = head.out.weight.detach(), head.out.bias.detach()
        if (path := head.linear_path) is not None:
            weight, bias = weight + path.weight.detach(), bias + path.bias.detach()
        return [layer_norm, _dense(weight, bias)]
    if isinstance(head, MLPHead) and head.linear_path is None:
        hidden, out = head.hidden, head.out
        return [layer_norm, _dense(hidden.weight, hidden.bias, nn.ReLU6()), _dense(out.weight, out.bias)]
    raise NotNativeError("the heads are GLUs" if not isinstance(head, MLPHead) else "the heads have a linear path")


def _dense(weight: Tensor, bias: Tensor | None = None, activation: nn.Module | None = None) -> Any:
    out_features, in_features = weight.shape
    return _modules().Dense(
        in_features,
        out_features,
        bias=bias is not None,
        activation_function=activation or nn.Identity(),
        init_weight=weight.detach().clone(),
        init_bias=None if bias is None else bias.detach().clone(),
    )


def _write_native(routes: dict[str, _Encoder], heads: dict[str, list[Any]], prefix: str, folder: Path) -> None:
    library: Any = importlib.import_module("sentence_transformers")
    modules, parts = _modules(), {}
    for side, encoder in routes.items():
        saved = folder / f".{side}"  # a Transformer is made from a folder only
        encoder.network.save_pretrained(saved)
        encoder.save_processor(saved)
        transformer = modules.Transformer(str(saved))
        pooling = modules.Pooling(transformer.get_embedding_dimension(), encoder.pooling)
        correction = [] if encoder.correction is None else [_dense(encoder.correction)]
        parts[side] = [transformer, pooling, *correction, *heads[side]]
    mappings = {(None, side): side for side in parts}
    router = modules.Router(parts, default_route="text", route_mappings=mappings)
    prompts = {"prompts": {"query": prefix, "document": prefix}, "default_prompt_name": "query"} if prefix else {}
    model = library.SentenceTransformer(
        modules=[router, modules.Normalize()], device="cpu", similarity_fn_name="cosine", **prompts
    )
    model.save_pretrained(str(folder), create_model_card=False)
    for side in routes:
        shutil.rmtree(folder / f".{side}")


def _difference(run: Run, image: VisionEncoder, text: TextEncoder, folder: Path) -> float:
    """Return the largest difference of the folder's embeddings of a few inputs from ours."""
    library: Any = importlib.import_module("sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    images = [golden_image(), golden_image().rotate(90, expand=True)]
    texts = ["a dog", *GOLDEN_TEXTS]
    with torch.no_grad():
        pixels_BHWC = torch.stack([image.preprocess(each) for each in images])
        images_NE = run.model.encode_image(image.encode(pixels_BHWC).half())
        texts_NE = run.model.encode_text(text.encode(texts).half())
    pairs = ((images_NE, model.encode(images)), (texts_NE, model.encode(texts)))
    return max(float(np.abs(ours.numpy() - theirs).max()) for ours, theirs in pairs)


def _write_module(run: Run, folder: Path, card: str) -> None:
    """Write an exported folder that sentence-transformers also loads, with the encoders that are local folders."""
    for name, content in hub_files(run, card).items():
        write_atomically(folder / name, content)
    for side, identity in (("image", run.image), ("text", run.text)):
        if identity.location:
            copied = folder / ENCODER_FOLDERS[side]
            copied.mkdir()
            for pattern in _ENCODER_FILES:
                for path in Path(identity.location).glob(pattern):
                    shutil.copyfile(path, copied / path.name)
    write_module_list(folder)


def write_module_list(folder: Path) -> None:
    """Write what makes an exported folder one of sentence-transformers: modules.json and its config."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": MODULE}]
    config = {
        "model_type": "SentenceTransformer",
        "requirements": {"sail-align": f">={metadata.version('sail-align')}"},
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_atomically(folder / "modules.json", json.dumps(modules, indent=1).encode())
    write_atomically(folder / "config_sentence_transformers.json", json.dumps(config, indent=1).encode())
