"""Load a frozen encoder by its name, or the one that a store or a run recorded."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar, Self

from sail_align.extract.encoders.catalogue import (
    TEXT,
    VISION,
    Hub,
    OpenClipTower,
    TextEntry,
    TimmVision,
    TransformersText,
    TransformersVision,
    VisionEntry,
    as_reference,
)
from sail_align.extract.encoders.identity import JOINED, EncoderSpec, Identity, require_known
from sail_align.extract.encoders.joined import join
from sail_align.extract.encoders.layers import OUTPUT, refuse_layers
from sail_align.extract.encoders.open_clip_models import (
    OpenClipBackbone,
    OpenClipTextEncoder,
    load_open_clip,
    load_open_clip_tokenizer,
)
from sail_align.extract.encoders.pooling import IMAGE_POOLINGS, TEXT_POOLINGS, check_pooling
from sail_align.extract.encoders.preprocessing import ImagePreprocessing, check_image_size
from sail_align.extract.encoders.repository import Repository, read_repository
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.encoders.text import TextEncoder, TransformersTextEncoder
from sail_align.extract.encoders.tokenizer import load_tokenizer_files
from sail_align.extract.encoders.transformers_models import TransformersBackbone, load_pretrained, patch_size
from sail_align.extract.encoders.vision import Backbone, VisionEncoder, report_refused_size
from sail_align.extract.encoders.weights import TOKENIZER_FILES, EncoderFiles
from sail_align.extract.errors import UserError, did_you_mean


@dataclass(frozen=True)
class EncoderConfig(ABC):
    """Description of an encoder and its options. Small and picklable, so it can be sent to a worker.

    Attributes:
        name: A name in the catalogue, or a reference (see `catalogue`). `owner/name` stands for `hf:owner/name`.
        pooling: `cls`, `mean`, `cls+mean`, `pooler` or `pooler+mean` for images, `cls`, `mean` or `last` for
            texts. None takes the catalogue's pooling, or the mean of an image encoder without class token.
        precision: `float32`, `tf32`, `bfloat16` or `float16`, of weights and activations.
        allow_remote_code: Repositories that may run their own code if transformers lacks their architecture, each as
            `<owner>/<name>@<full commit hash>`. They are loaded at that commit.
        compiled: Compile the network with torch.compile. Features change by rounding.
        layers: Layers whose states are pooled (see `layers`). Several are computed in one pass.

    Raises:
        UserError: The name is unknown, the encoder does not have the pooling, or a repository that may run code is not
            pinned.
    """

    name: str
    pooling: str | None = None
    precision: str = "float32"
    allow_remote_code: tuple[str, ...] = ()
    compiled: bool = False
    layers: tuple[int, ...] = OUTPUT

    _poolings: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", as_reference(self.name))
        entry = self.entry
        self._origin(entry)  # raises if the code of another revision is allowed
        allowed = (entry.pooling,) if isinstance(entry, OpenClipTower) else self._poolings
        pooling = self.pooling or entry.pooling
        # Without a choice, an image encoder needs none if it has no class token, and a text encoder none if it is a
        # repository of sentence-transformers. Both are known only after loading.
        if pooling is not None:
            check_pooling(pooling, allowed, self.name)

    @classmethod
    def recorded(cls, identity: Identity) -> Self:
        """Return the config of an encoder, or of joined layers of one network, that a store or a run recorded."""
        first = identity.singles[0]
        spec, name = first.spec, first.spec.network_id
        if first.location:
            name = f"{'open_clip' if spec.source.get('loader') == 'open_clip' else 'hf'}:{first.location}"
        elif name.startswith("hf:"):
            name = f"{name}@{spec.source.get('revision', '')}"
        return cls(name, spec.pooling, spec.precision, layers=tuple(each.spec.layer for each in identity.singles))

    @property
    @abstractmethod
    def entry(self) -> VisionEntry | TextEntry:
        """The encoder's entry in the catalogue, or what its reference means."""

    @abstractmethod
    def load(self, device: str = "cpu", *, entry: Any = None) -> VisionEncoder | TextEncoder:
        """Load the encoder.

        Args:
            device: Where it runs. `auto` is a GPU if there is one.
            entry: Replaces that of the catalogue.

        Raises:
            UserError: The device or precision is not available, or the weights are not.
        """

    def download(self) -> None:
        """Download the encoder's files if they are not here. Files of OpenCLIP are only downloaded when it loads them.

        Raises:
            UserError: The files are not available.
        """
        entry = self.entry
        if isinstance(entry, TimmVision):
            from sail_align.extract.encoders.timm_models import fetch_timm  # imports timm, which takes seconds

            fetch_timm(entry)
        elif not isinstance(entry, OpenClipTower):
            self._fetch(entry)

    def matches(self, spec: EncoderSpec) -> bool:
        """Return whether `load` would give the encoder of this spec, as far as is known without loading it."""
        entry = self.entry
        revision = getattr(self._origin(entry)[0], "revision", None)
        return (
            spec.network_id in (self.name, self.name.partition("@")[0])
            and spec.layer in self.layers
            and spec.precision == self.precision
            and (self.pooling or entry.pooling) in (None, spec.pooling)
            and revision in (None, spec.source.get("revision"))
        )

    def _unknown(self, modality: str, known: Iterable[str], references: str) -> UserError:
        names = sorted(known)
        return UserError(
            f"Unknown {modality} encoder {self.name!r}.{did_you_mean(self.name, names)} Expected {references}, or one "
            f"of: {', '.join(names)}."
        )

    def _origin(self, entry: VisionEntry | TextEntry) -> tuple[Any, bool]:
        """Return where the weights are, and whether the code of that repository may run at that revision.

        Raises:
            UserError: A repository may run its code at another revision than that of the encoder.
        """
        origin = entry.origin
        for allowed in map(Hub.allowing_code, self.allow_remote_code):
            if isinstance(origin, Hub) and origin.repository == allowed.repository:
                if origin.revision not in (None, allowed.revision):
                    raise UserError(
                        f"--allow-remote-code {allowed.repository}@{allowed.revision} is not for encoder {self.name!r} "
                        f"at revision {origin.revision!r}. Use the same revision."
                    )
                return allowed, True
        return origin, False

    def _fetch(self, entry: TransformersVision | TransformersText) -> tuple[EncoderFiles, bool]:
        """Return the files of an encoder, downloaded if need be, and whether the code among them may run."""
        origin, allow_code = self._origin(entry)
        return EncoderFiles.fetch(origin, with_code=allow_code), allow_code

    def _id(self, files: EncoderFiles) -> str:
        """Return the name without its revision. A local folder is named by its kind and weights instead of its path."""
        is_open_clip = files.source["loader"] == "open_clip"
        if files.location:
            kind = "open_clip:folder" if is_open_clip else f"folder:{files.config.get('model_type', 'model')}"
            return f"{kind}-{files.digest[:8]}"
        return self.name if is_open_clip else self.name.partition("@")[0]


@dataclass(frozen=True)
class ImageEncoderConfig(EncoderConfig):
    """Description of an image encoder and its options.

    Attributes:
        fast_jpeg: Decode large JPEGs at reduced scale. This is a part of the preprocessing, and so of the spec.
        image_size: Height and width of the network's input, a multiple of its patch size. Its position embeddings are
            interpolated as its library does. None is the encoder's own size. Any other is a part of the spec.
    """

    fast_jpeg: bool = False
    image_size: int | None = None

    _poolings: ClassVar[tuple[str, ...]] = IMAGE_POOLINGS

    @classmethod
    def recorded(cls, identity: Identity) -> Self:
        """Return the config of an encoder that a store or a run recorded."""
        steps = identity.singles[0].spec.preprocessing
        return replace(super().recorded(identity), fast_jpeg="jpeg_least" in steps, image_size=steps.get("image_size"))

    @property
    def entry(self) -> VisionEntry:
        """The encoder's entry in the catalogue, or what its reference means."""
        if self.name.startswith("hf:"):
            return TransformersVision(Hub.parse(self.name))
        if self.name.startswith("timm:"):
            return TimmVision(self.name.removeprefix("timm:"))
        if self.name.startswith("open_clip:"):
            return OpenClipTower.parse(self.name, "cls")
        if self.name not in VISION:
            raise self._unknown("image", VISION, "hf:<repository or folder>, timm:<model>, open_clip:<model>@<weights>")
        return VISION[self.name]

    def matches(self, spec: EncoderSpec) -> bool:
        """Return whether `load` would give the encoder of this spec, as far as is known without loading it."""
        steps = spec.preprocessing
        is_same_size = steps.get("crop") == self.image_size if self.image_size else "image_size" not in steps
        return super().matches(spec) and is_same_size and self.fast_jpeg == ("jpeg_least" in steps)

    def download(self) -> None:
        """Download the encoder's files if they are not here, and check the image size against its patches."""
        super().download()
        entry = self.entry
        if self.image_size is None or isinstance(entry, OpenClipTower):
            return
        if isinstance(entry, TimmVision):
            from sail_align.extract.encoders.timm_models import timm_sizes

            own, patch = timm_sizes(entry)
        else:
            files = EncoderFiles.fetch(self._origin(entry)[0])
            own, patch = _preprocessing(entry, files).crop, patch_size(files.config)
        if patch and self.image_size != own:
            check_image_size(self.image_size, patch)

    def load(self, device: str = "cpu", *, entry: VisionEntry | None = None) -> VisionEncoder:
        """Load the encoder."""
        runtime = Runtime.of(device, self.precision, compiled=self.compiled, several=True)
        entry = entry or self.entry
        size = self.image_size
        with report_refused_size(self.name, f"{size} × {size}" if size else None):
            files, backbone = self._load_backbone(entry)
            pooling = self.pooling or entry.pooling
            return VisionEncoder(self._id(files), files, backbone, pooling, runtime, self.fast_jpeg, self.layers)

    def _load_backbone(self, entry: VisionEntry) -> tuple[EncoderFiles, Backbone]:
        size = self.image_size
        match entry:
            case TransformersVision():
                files, allow_code = self._fetch(entry)
                model = load_pretrained(files, allow_code=allow_code, of_images=True)
                return files, TransformersBackbone(model, _preprocessing(entry, files), size)
            case TimmVision():
                from sail_align.extract.encoders.timm_models import load_timm

                return load_timm(entry, size)
            case OpenClipTower():
                towers, _, files = load_open_clip(entry)
                return files, OpenClipBackbone(towers.visual, size)


@dataclass(frozen=True)
class TextEncoderConfig(EncoderConfig):
    """Description of a text encoder and its options.

    Attributes:
        prompt: Text that is put before each text, such as an instruction. None takes the encoder's own for documents.
    """

    prompt: str | None = None

    _poolings: ClassVar[tuple[str, ...]] = TEXT_POOLINGS

    @property
    def entry(self) -> TextEntry:
        """The encoder's entry in the catalogue, or what its reference means."""
        if self.name.startswith("hf:"):
            return TransformersText(Hub.parse(self.name))
        if self.name.startswith("open_clip:"):
            return OpenClipTower.parse(self.name, "last")
        if self.name not in TEXT:
            raise self._unknown("text", TEXT, "hf:<repository or folder>, open_clip:<model>@<weights>")
        return TEXT[self.name]

    @classmethod
    def recorded(cls, identity: Identity) -> Self:
        """Return the config of an encoder that a store or a run recorded."""
        spec = identity.singles[0].spec
        config, preprocessing = super().recorded(identity), spec.preprocessing
        if spec.source.get("loader") == "open_clip":
            return config
        pooling = None if "modules" in preprocessing else config.pooling
        return replace(config, pooling=pooling, prompt=preprocessing.get("prefix"))

    def matches(self, spec: EncoderSpec) -> bool:
        """Return whether `load` would give the encoder of this spec, as far as is known without loading it."""
        entry, prefix = self.entry, spec.preprocessing.get("prefix")
        own = isinstance(entry, TransformersText) and (self.pooling or entry.pooling) is None
        prompt = self.prompt if self.prompt is not None or own else getattr(entry, "prefix", None)
        return super().matches(spec) and own == ("modules" in spec.preprocessing) and prompt in (None, prefix)

    def load(self, device: str = "cpu", *, entry: TextEntry | None = None) -> TextEncoder:
        """Load the encoder. Without a pooling, a repository of sentence-transformers is used as its authors use it."""
        runtime = Runtime.of(device, self.precision, compiled=self.compiled, several=True)
        entry = entry or self.entry
        if isinstance(entry, OpenClipTower):
            if self.prompt:
                raise UserError(f"Encoder {self.name!r} has no prompt: got {self.prompt!r}. Leave it out.")
            refuse_layers(self.layers, self.name)
            towers, tokenizer, files = load_open_clip(entry)
            return OpenClipTextEncoder(self._id(files), files, towers, tokenizer, runtime)
        files, allow_code = self._fetch(entry)
        changed, own = self._read(files, entry)
        bidirectional = changed.bidirectional
        dtype = str(runtime.dtype).removeprefix("torch.")
        model = load_pretrained(files, allow_code=allow_code, dtype=dtype, bidirectional=bidirectional)
        after, modules = (own.after, own.modules) if own else (None, [])
        files = own.files if own else files
        return TransformersTextEncoder(
            self._id(files), files, model, changed, runtime, after, modules, layers=self.layers
        )

    def download(self) -> None:
        """Download the encoder's files if they are not here. Files of OpenCLIP are only downloaded when it loads them.

        Raises:
            UserError: The files are not available, or a pooling is needed.
        """
        entry = self.entry
        if not isinstance(entry, OpenClipTower):
            self._read(self._fetch(entry)[0], entry)

    def _read(self, files: EncoderFiles, entry: TransformersText) -> tuple[TransformersText, Repository | None]:
        """Return the entry with the user's choices, and the repository of sentence-transformers that is used as it is.

        Raises:
            UserError: The repository does something that has no counterpart here, or a pooling is needed.
        """
        pooling = self.pooling or entry.pooling
        own = read_repository(files, entry) if pooling is None else None
        chosen = own.entry if own else replace(entry, pooling=check_pooling(pooling, TEXT_POOLINGS, self.name))
        return (chosen if self.prompt is None else replace(chosen, prefix=self.prompt)), own


def _preprocessing(entry: TransformersVision, files: EncoderFiles) -> ImagePreprocessing:
    if entry.preprocessing:
        return entry.preprocessing
    return ImagePreprocessing.from_processor(files.read_json(files.path, "preprocessor_config.json"))


def load_recorded(
    identity: Identity, device: str = "cpu", *, allow_remote_code: Sequence[str] = ()
) -> VisionEncoder | TextEncoder:
    """Load the encoder that a store or a run recorded, with the same revision, pooling and precision.

    Joined encoders are loaded as one, whose features are concatenated.

    Args:
        identity: What was recorded.
        device: Where it runs.
        allow_remote_code: Repositories that may run their own code, each as `<owner>/<name>@<full commit hash>`.

    Raises:
        EncoderChangedError: The encoder under the recorded name has another spec or golden vector.
        UserError: It is not available.
    """
    require_known(identity)
    parts = [list(layers) for _, layers in groupby(identity.singles, _network)]
    if len(parts) > 1:
        encoders: Any = [
            load_recorded(Identity.joined(layers), device, allow_remote_code=allow_remote_code) for layers in parts
        ]
        return join(encoders)
    spec = identity.singles[0].spec
    _require_source(spec)
    source = spec.source
    recorded = ImageEncoderConfig.recorded if spec.modality == "image" else TextEncoderConfig.recorded
    config: EncoderConfig = replace(recorded(identity), allow_remote_code=tuple(allow_remote_code))
    pinned: Any = {"origin": Hub(source["repository"], source["revision"])} if source["loader"] == "hub" else {}
    entry = replace(config.entry, **pinned)
    if isinstance(entry, TransformersText) and "modules" not in spec.preprocessing:
        facts = spec.preprocessing
        entry = replace(entry, end=facts.get("end", ""), bidirectional=facts.get("bidirectional", False))
    encoder = config.load(device, entry=entry)
    encoder.identity.check_matches(identity, where="the record")
    return encoder


def _network(identity: Identity) -> tuple[EncoderSpec, str]:
    """Return what layers of one network share, so that they are computed in one pass."""
    spec = identity.spec
    return replace(spec, id=spec.network_id, layer=OUTPUT[0], dim=0), identity.location


def _require_source(spec: EncoderSpec) -> None:
    needed = ("loader", *(("repository", "revision") if spec.source.get("loader") == "hub" else ()))
    if absent := [name for name in needed if name not in spec.source]:
        raise UserError(f"Record of encoder {spec.id!r} is invalid: its source has no {absent[0]!r}.")


def load_tokenizer(spec: EncoderSpec, location: str = "") -> Any:
    """Load the tokenizer of a recorded text encoder without the network.

    Args:
        spec: What was recorded.
        location: Path of the encoder if it is a local folder.

    Returns:
        A tokenizer of transformers, or open_clip's function from texts to tokens.

    Raises:
        UserError: It is not available.
    """
    if spec.source.get("loader") == JOINED:
        raise UserError(f"Text encoder {spec.id!r} joins several, each with its own tokenizer. Use sail_align.load.")
    _require_source(spec)
    entry = TextEncoderConfig.recorded(Identity(spec, [], {}, location)).entry
    if isinstance(entry, OpenClipTower):
        return load_open_clip_tokenizer(entry)
    pinned = spec.source["loader"] == "hub"
    origin = Hub(spec.source["repository"], spec.source["revision"]) if pinned else entry.origin
    end, lowercase = spec.preprocessing.get("end", ""), spec.preprocessing.get("lowercase", False)
    return load_tokenizer_files(EncoderFiles.locate(origin, TOKENIZER_FILES), end=end, lowercase=lowercase)
