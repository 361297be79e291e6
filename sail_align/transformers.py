"""Exports as models of the transformers library.

    import sail_align.transformers
    from transformers import pipeline

    classify = pipeline("zero-shot-image-classification", model="<owner>/<name>")  # or a folder of `sail-align export`

The import registers `SailConfig`, `SailModel`, `SailProcessor`, `SailImageProcessor` and `SailTokenizer` with the auto
classes. An export holds the heads. The encoders are loaded from where their authors published them, and rejected if
they differ from those used in training.
"""

# mypy: disable-error-code="arg-type,assignment,attr-defined,no-untyped-call,override"
# The base classes have few type hints.

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import ModelOutput

from sail_align.align.hub.folder import CARD, MODEL_TYPE, WEIGHTS, as_json
from sail_align.align.image_processor import SailImageProcessor
from sail_align.align.pretrained import PretrainedModel, load
from sail_align.align.runs.folder import CONFIG
from sail_align.align.runs.tensors import save_tensors
from sail_align.align.text_tokenizer import SailTokenizer
from sail_align.extract.encoders.text import NO_TOKEN
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import write_atomically

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_NAMES = ("vision_config", "text_config")
"""Fields of the config.json that transformers would take for configs."""
_ADDED = ("name_or_path", "dtype", "torch_dtype", "num_labels", "attn_implementation", "experts_implementation")
"""Fields that transformers adds to what it read."""
_OF_AUTO_CLASSES = ("config", "trust_remote_code", "adapter_kwargs", "_from_auto", "_from_pipeline")
"""Options that the auto classes and pipelines add."""


class SailConfig(PreTrainedConfig):
    """The config.json of an export: shape of the heads, identities of the encoders, settings and digests.

    A digest covers it, so it is saved as it was read.
    """

    model_type = MODEL_TYPE

    def __init__(self, **record: Any):
        super().__init__(**{name: value for name, value in record.items() if name not in _NAMES})
        self._record = deepcopy({name: value for name, value in record.items() if name not in _ADDED})

    @property
    def projection_dim(self) -> int:
        """Number of dimensions of the embeddings."""
        return int(self._record["architecture"]["dim"])

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the config.json."""
        return deepcopy(self._record)

    to_diff_dict = to_dict


@dataclass
class SailOutput(ModelOutput):
    """Result of a `SailModel`.

    Attributes:
        logits_per_image: t · cosine + b of each image with each text, (I, T). A sigmoid gives the probability of the
            loss that they are a pair, a softmax over texts compares the texts.
        logits_per_text: The same, (T, I).
        text_embeds: Unit-norm embeddings of texts, (T, E).
        image_embeds: Unit-norm embeddings of images, (I, E).
    """

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class SailModel(PreTrainedModel):
    """An exported model with the interface of CLIPModel. It is frozen.

    Attributes:
        sail: The same model with the interface of sail-align.
    """

    config_class = SailConfig
    base_model_prefix = "sail"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")

    def __init__(self, config: SailConfig, model: PretrainedModel | None = None):
        super().__init__(config)
        if model is None:
            raise UserError("A config has no weights. Use SailModel.from_pretrained.")
        self.sail = model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        image_folder: str | Path | None = None,
        text_folder: str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Load an export, with its encoders.

        Args:
            pretrained_model_name_or_path: A folder of `sail-align export`, or a repository of the hub.
            dtype: Precision to cast to. None and `auto` keep the encoders' own.
            device_map: A device for the whole model, such as `cuda`. None is the CPU, `auto` a GPU if there is one.
            image_folder: Folder of the image encoder, if it is a local folder.
            text_folder: Folder of the text encoder, if it is a local folder.
            **options: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, for a repository.

        Raises:
            TypeError: There is another option.
            ValueError: The device map is not of one device, or the precision is unknown.
            UserError: As of `sail_align.load`.
        """
        hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        for name in options:
            if name not in _OF_AUTO_CLASSES and options[name] not in (None, False):
                raise TypeError(f"Option {name}={options[name]!r} has no meaning for SailModel. Leave it out.")
        folder = _fetch(pretrained_model_name_or_path, hub, [CONFIG, WEIGHTS, CARD])
        model = load(folder, device=_device(device_map), image_folder=image_folder, text_folder=text_folder)
        if model.run.image.parts or model.run.text.parts:
            raise UserError(f"{folder} joins encoders, which transformers has no processor for. Use sail_align.load.")
        loaded = cls(SailConfig(**json.loads((folder / CONFIG).read_bytes())), model)
        if dtype is not None and dtype != "auto":
            loaded.to(_dtype(dtype))
        loaded.eval()
        return loaded

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write config and heads. A processor saves itself.

        Args:
            save_directory: Folder to write to.
            **options: Of transformers' models, about shards and formats. The heads are one safetensors file.

        Raises:
            UserError: The heads are not those that were loaded, because they were cast or changed. Or `push_to_hub`.
        """
        if options.get("push_to_hub"):
            raise UserError("push_to_hub=True is not supported. Use the model's push_to_hub, or `hf upload`.")
        record = self.config.to_dict()
        weights = save_tensors(self.sail.alignment.state_dict())
        if hashlib.sha256(weights).hexdigest() != record["weights_sha256"]:
            raise UserError(
                "The heads differ from those of the export, whose digest the config records. Save the model as it was "
                "loaded, in float32."
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WEIGHTS, weights)
        write_atomically(folder / CONFIG, as_json(record))

    @torch.no_grad()
    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Embed images. The `pooler_output` is (I, E) float32, not scaled to unit length, as of CLIPModel."""
        return BaseModelOutputWithPooling(pooler_output=self._embed_images(pixel_values, normalize=False))

    @torch.no_grad()
    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """Embed texts. The `pooler_output` is (T, E) float32, not scaled to unit length, as of CLIPModel."""
        return BaseModelOutputWithPooling(pooler_output=self._embed_texts(input_ids, attention_mask, normalize=False))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SailOutput | tuple[Tensor, ...]:
        """Compare images with texts.

        Args:
            input_ids: Tokens (T, length) from `SailTokenizer`.
            pixel_values: Normalised pixels (I, 3, size, size) from `SailImageProcessor`.
            attention_mask: 1 for tokens, 0 for padding (T, length). None if there is no padding.
            return_dict: False returns a tuple in the order of the attributes of `SailOutput`.
        """
        images_IE = self._embed_images(pixel_values, normalize=True)
        texts_TE = self._embed_texts(input_ids, attention_mask, normalize=True)
        with self.sail.exact():
            logits_IT = self.sail.logit_scale.float() * images_IE @ texts_TE.T + self.sail.logit_bias.float()
        output = SailOutput(logits_IT, logits_IT.T, texts_TE, images_IE)
        return output if return_dict is not False else output.to_tuple()

    def _embed_images(self, pixel_values: Tensor, normalize: bool) -> Tensor:
        self.sail.image_encoder.require_pixels(pixel_values)
        with self.sail.exact():
            return self.sail.heads(image=self.sail.image_encoder(pixel_values), normalize=normalize)

    def _embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None, normalize: bool) -> Tensor:
        tokens_TL = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, NO_TOKEN)
        with self.sail.exact():
            return self.sail.heads(text=self.sail.text_encoder.encode_tokens(tokens_TL), normalize=normalize)


class SailProcessor(ProcessorMixin):
    """The image processor and the tokenizer of an export as one."""

    def __init__(self, image_processor: SailImageProcessor, tokenizer: SailTokenizer):
        super().__init__(image_processor, tokenizer)

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: str | None = None, **of_tokenizer: Any
    ) -> BatchFeature:
        """Return the inputs of `SailModel`.

        Args:
            images: One image or many, of the types that `sail_align.load(…).encode_image` takes.
            text: One text or many.
            return_tensors: `pt` or `np`. None returns lists.
            **of_tokenizer: See `SailTokenizer`; `padding=True` for texts of different lengths.

        Raises:
            ValueError: There are neither images nor texts.
        """
        if images is None and text is None:
            raise ValueError("There is nothing to process. Pass images, text, or both.")
        inputs: dict[str, Any] = {}
        if text is not None:
            inputs |= self.tokenizer(text, return_tensors=return_tensors, **of_tokenizer)
        if images is not None:
            inputs |= self.image_processor(images, return_tensors=return_tensors)
        return BatchFeature(inputs)


def _fetch(name: str | Path, hub: Mapping[str, Any], files: Sequence[str]) -> Path:
    """Return a local folder, or that of a repository after downloading its files."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(str(name), allow_patterns=list(files), **hub))


def _device(device_map: Any) -> str:
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return f"cuda:{device_map}"
    if device_map is not None and not isinstance(device_map, str | torch.device):
        raise ValueError(f"device_map is invalid: got {device_map!r}, expected one device, as the model is not split.")
    return str(device_map or "cpu")


def _dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is invalid: got {name!r}, expected float32, bfloat16 or float16.")
    return dtype


def _register() -> None:
    AutoConfig.register(MODEL_TYPE, SailConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
        auto_class.register(SailConfig, SailModel, exist_ok=True)
    processors: dict[str, type] = dict.fromkeys(("pil", "torchvision"), SailImageProcessor)  # whichever is preferred
    AutoImageProcessor.register(SailConfig, image_processor_classes=processors, exist_ok=True)
    AutoTokenizer.register(SailConfig, tokenizer_class=SailTokenizer, exist_ok=True)
    AutoProcessor.register(SailConfig, SailProcessor, exist_ok=True)
    # The pipeline checks names, which `register` does not add.
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[MODEL_TYPE] = SailModel.__name__


_register()
