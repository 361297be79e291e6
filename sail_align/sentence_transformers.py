"""A run as a module of sentence-transformers, for folders of `sail-align export --to sentence-transformers`.

model = sail_align.sentence_transformers.load("exports/demo-linear-sentence-transformers")
model.encode([image, "a cat", "a dog"])
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule

from sail_align.align.hub.folder import PREPROCESSOR, TOKENIZER, WEIGHTS
from sail_align.align.hub.sentence_transformers import ENCODER_FOLDERS
from sail_align.align.inputs import load_pixels
from sail_align.align.pretrained import PretrainedModel
from sail_align.align.pretrained import load as load_model
from sail_align.align.runs.folder import CONFIG


def load(folder: str | Path, *, device: str | None = None) -> SentenceTransformer:
    """Load a folder with a `SailModule`. It equals `SentenceTransformer(folder, trust_remote_code=True)`.

    Args:
        folder: A folder of `sail-align export --to sentence-transformers`.
        device: Device of the model. None is a GPU if there is one.

    Raises:
        UserError: The folder is not an export or is damaged, or an encoder cannot be loaded.
    """
    return SentenceTransformer(modules=[SailModule.load(str(folder))], device=device, similarity_fn_name="cosine")


class SailModule(InputModule):
    """Encoders and heads of a run. Each batch may mix texts and images.

    Args:
        model: The loaded run.
        folder: The folder that it was loaded from, which `save` copies.
    """

    def __init__(self, model: PretrainedModel, folder: Path):
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.folder = model, folder
        tokenizer: Any = getattr(model.text_encoder, "tokenizer", None)  # OpenCLIP's has none of this kind
        self.tokenizer = tokenizer

    @property
    def modalities(self) -> list[Any]:
        """What can be embedded. A batch that mixes texts and images is a `message` to sentence-transformers."""
        return ["text", "image", "message"]

    @property
    def max_seq_length(self) -> int:
        """Maximum number of tokens of a text."""
        limit: int = self.model.run.text.spec.preprocessing["token_limit"]
        return limit

    def get_embedding_dimension(self) -> int:
        """Return the number of dimensions of the embeddings."""
        return self.model.dim

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Return the pixels of the images, the tokens of the texts, and which input is an image.

        Args:
            inputs: Texts, and images as PIL images or paths, in any order.
            prompt: Put before each text.
            **kwargs: Not used: options of other modules.

        Raises:
            ValueError: An input is neither a text nor an image, such as a chat message.
        """
        images: list[Any] = []
        texts: list[str] = []
        is_image = []
        for each in inputs:
            modality = infer_modality(each, supported_modalities=["text", "image"])
            if modality not in ("text", "image"):
                raise ValueError(f"An input is invalid: got {str(each)[:100]!r}, expected a text or an image.")
            item = each[modality] if isinstance(each, dict) else each
            is_image.append(modality == "image")
            (images if is_image[-1] else texts).append(item)
        features: dict[str, Any] = {"is_image": torch.tensor(is_image)}
        if images:
            encoder = self.model.image_encoder
            features["pixels"] = torch.stack([load_pixels(image, i, encoder) for i, image in enumerate(images)])
        if texts:
            features["tokens"] = self.model.tokenizer([(prompt or "") + text for text in texts])
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add `sentence_embedding`, unit-norm (B, E)."""
        is_image_B = features["is_image"]
        embeddings_BE = torch.zeros(len(is_image_B), self.model.dim, device=self.model.device)
        if "pixels" in features:
            embeddings_BE[is_image_B] = self.model.encode_image(features["pixels"])
        if "tokens" in features:
            embeddings_BE[~is_image_B] = self.model.encode_text(features["tokens"])
        features["sentence_embedding"] = embeddings_BE
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Copy the files of the folder that the module was loaded from."""
        for name in (WEIGHTS, CONFIG, PREPROCESSOR, TOKENIZER):
            shutil.copyfile(self.folder / name, Path(output_path) / name)
        for name in ENCODER_FOLDERS.values():
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, Path(output_path) / name, dirs_exist_ok=True)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a folder or a repository of the hub. See `sentence_transformers` for the options."""
        downloaded = cls.load_dir_path(model_name_or_path, subfolder, token, cache_folder, revision, local_files_only)
        folder = Path(downloaded or model_name_or_path)
        image, text = (path if (path := folder / name).is_dir() else None for name in ENCODER_FOLDERS.values())
        return cls(load_model(folder, device="cpu", image_folder=image, text_folder=text), folder)
