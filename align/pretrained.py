"""Load a run, an exported folder or a hub repository as a model that embeds images and strings.

model = sail_align.align.pretrained.load("runs/demo-glu")
model.encode_image(image) @ model.encode_text(["a cat", "a dog"]).T
"""

from collections.abc import Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn

from sail_align.align.hub.folder import CARD, WEIGHTS, read_hub_folder
from sail_align.align.runs.checkpoint import Run, load_run
from sail_align.align.runs.folder import CONFIG, RunFolder
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.load import load_recorded
from sail_align.extract.encoders.runtime import Runtime, tf32_products
from sail_align.extract.encoders.text import TextEncoder
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.encoders.weights import download
from sail_align.extract.errors import UserError
from sail_align.extract.sources.images import upright_rgb


def load(
    reference: str | Path,
    *,
    device: str = "auto",
    revision: str | None = None,
    image_folder: str | Path | None = None,
    text_folder: str | Path | None = None,
) -> "PretrainedModel":
    """Load heads and their encoders, which must be those recorded in the run.

    Args:
        reference: A run, one of its checkpoints, a folder of `sail-align export`, or the hub repository of such a
            folder, `owner/name`.
        device: Device of heads and encoders; `auto` uses a GPU if there is one.
        revision: Revision of the repository. A full commit hash is the safest.
        image_folder: Folder of the image encoder, if it is a local folder that has moved.
        text_folder: Folder of the text encoder, if it is a local folder that has moved.

    Raises:
        EncoderChangedError: An encoder with the recorded name has other weights or gives other features.
        UserError: The model does not exist, its files are damaged, or an encoder cannot be loaded.
    """
    run = read(reference, revision)
    where = str(Runtime.of(device, "float32").device)
    image = cast(VisionEncoder, _encoder(run.image, image_folder, where, "image_folder"))
    text = cast(TextEncoder, _encoder(run.text, text_folder, where, "text_folder"))
    return PretrainedModel(run, image, text, torch.device(where))


def read(reference: str | Path, revision: str | None = None) -> Run:
    """Read the heads without the encoders. See `load` for the arguments."""
    path = Path(reference)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{path} is a folder and has no revision {revision!r}. Leave the revision out.")
        folder = RunFolder(path)
        return load_run(path) if folder.is_run or folder.is_checkpoint else read_hub_folder(path)
    if str(reference).count("/") != 1 or str(reference).startswith((".", "/", "~")):
        raise UserError(f"{reference} is neither a folder nor a repository. Pass a run, an export, or <owner>/<name>.")
    try:
        return read_hub_folder(download(str(reference), revision, [CONFIG, WEIGHTS, CARD]))
    except UserError as problem:
        raise UserError(f"{reference} is not a local folder. As a repository: {problem}") from problem


class PretrainedModel(nn.Module):
    """Frozen encoders and trained heads as one model, with CLIP's usual interface.

    `preprocess` and `tokenizer` turn images and texts into tensors. `encode_image` and `encode_text` embed these
    tensors, or images and texts directly. Embeddings are (B, E) float32 on `device`, unit-norm and without gradients.
    They equal those of `sail-eval`: features are rounded to float16, as in stores, and autocast around a call has no
    effect, since the precision is part of an encoder's identity.
    """

    def __init__(self, run: Run, image: VisionEncoder, text: TextEncoder, device: torch.device):
        super().__init__()
        self.run = run
        self.device = device
        self.heads = run.model.to(device).requires_grad_(False)
        self._image, self._text = image, text
        self.eval()

    @property
    def logit_scale(self) -> Tensor:
        """Temperature t. σ(t x·y + b) is the probability of the sigmoid loss that x and y are a positive pair."""
        return self.heads.log_scale.exp()

    @property
    def logit_bias(self) -> Tensor:
        """Bias b; see `logit_scale`."""
        return self.heads.bias

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the pixels (size, size, 3) uint8 of one image, to be stacked to a batch for `encode_image`.

        Raises:
            TypeError: The argument is not a PIL image, but, for instance, a path.
            ValueError: The image's values have no defined black and white, such as integers of 32 bits.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"Expected a PIL image, got {image!r}. Open a file with PIL.Image.open.")
        return self._image.preprocess(upright_rgb(image))

    def tokenizer(self, texts: str | Sequence[str]) -> Tensor:
        """Return the tokens (B, T) int64 of texts, for `encode_text` only."""
        return self._text.tokenize([texts] if isinstance(texts, str) else texts)

    def encode_image(self, images: Tensor | Image.Image | Sequence[Image.Image]) -> Tensor:
        """Embed images, or pixels (B, size, size, 3) uint8 from `preprocess`.

        Raises:
            ValueError: There are no images.
            TypeError: The images are neither PIL images nor pixels, but, for instance, paths.
        """
        if isinstance(images, Image.Image | str | Path):
            images = [images]
        pixels = images if isinstance(images, Tensor) else [self.preprocess(image) for image in images]
        _require_some(pixels, "image")
        pixels_BHWC = pixels if isinstance(pixels, Tensor) else torch.stack(pixels)
        with torch.no_grad(), tf32_products(), torch.autocast(self.device.type, enabled=False):
            batches_BHWC = torch.split(pixels_BHWC, self._image.batch_size)
            features_BD = torch.cat([self._image.encode(batch_BHWC) for batch_BHWC in batches_BHWC])
            return self.heads.encode_image(features_BD.half().to(self.device))

    def encode_text(self, texts: Tensor | str | Sequence[str]) -> Tensor:
        """Embed texts, or tokens (B, T) from `tokenizer`.

        Raises:
            ValueError: There are no texts.
        """
        texts = [texts] if isinstance(texts, str) else texts
        _require_some(texts, "text")
        with torch.no_grad(), tf32_products(), torch.autocast(self.device.type, enabled=False):
            tokens_BT = texts if isinstance(texts, Tensor) else self.tokenizer(texts)
            features_BD = self._text.encode_tokens(tokens_BT)
            return self.heads.encode_text(features_BD.half().to(self.device))


def _require_some(inputs: Sized, kind: str) -> None:
    if not len(inputs):
        raise ValueError(f"There is nothing to embed. Pass at least one {kind}.")


def _encoder(recorded: Identity, folder: str | Path | None, device: str, argument: str) -> VisionEncoder | TextEncoder:
    of_folder = "config" in recorded.spec.source
    if folder is not None and not of_folder:
        raise UserError(f"Encoder {recorded.spec.id!r} is not a local folder. Leave {argument} out.")
    if folder is not None:
        recorded = replace(recorded, location=str(Path(folder).resolve()))
    elif of_folder and not recorded.location:
        raise UserError(f"Encoder {recorded.spec.id!r} is a local folder. Pass its path with {argument}.")
    return load_recorded(recorded, device)
