"""One call from a run, an exported folder or a repository on the hub to a model that embeds pictures and strings.

model = sail_align.align.pretrained.load("runs/demo-glu")
model.encode_image(picture) @ model.encode_text(["a cat", "a dog"]).T
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
from sail_align.align.runs.folder import CONFIG, is_run, is_whole
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.load import load_recorded
from sail_align.extract.encoders.runtime import Runtime
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
    """Load heads and the encoders that they belong to, which must be those that the run records.

    Args:
        reference: A run, one of its checkpoints, a folder of `sail-align export`, or such a folder's repository on the
            hub, `owner/name`.
        device: Where heads and encoders compute; `auto` takes a GPU if there is one.
        revision: Of the repository; a full commit hash is the strictest.
        image_folder: Where the image encoder lies, if it is one of a local folder that is elsewhere now.
        text_folder: The same for the text encoder.

    Raises:
        EncoderChangedError: An encoder found under its recorded name is another one, or answers differently.
        UserError: There is no such model, its files are not what was written, or an encoder cannot be had.
    """
    run = read(reference, revision)
    where = str(Runtime.of(device, "float32").device)
    image = cast(VisionEncoder, _encoder(run.image, image_folder, where, "image_folder"))
    text = cast(TextEncoder, _encoder(run.text, text_folder, where, "text_folder"))
    return PretrainedModel(run, image, text, torch.device(where))


def read(reference: str | Path, revision: str | None = None) -> Run:
    """Read the heads alone: see `load`."""
    path = Path(reference)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{path} is a folder, which has no revision {revision!r}; leave it out.")
        return load_run(path) if is_run(path) or is_whole(path) else read_hub_folder(path)
    if str(reference).count("/") != 1 or str(reference).startswith((".", "/", "~")):
        raise UserError(f"{reference} is neither a folder nor a repository; give a run, an export, or <owner>/<name>.")
    try:
        return read_hub_folder(download(str(reference), revision, [CONFIG, WEIGHTS, CARD]))
    except UserError as problem:
        raise UserError(f"{reference} is no folder here, and as a repository: {problem}") from problem


class PretrainedModel(nn.Module):
    """Frozen encoders and trained heads as one model, with the four parts that CLIP's users know.

    `preprocess` and `tokenizer` make tensors of pictures and texts, `encode_image` and `encode_text` make embeddings of
    these tensors, or of the pictures and texts themselves. Embeddings are (B, E) float32 on `device`, of unit length
    and without gradients. They are those of `sail-eval`: features are rounded to float16, as stores hold them, and
    autocast around a call changes nothing, since the precision is a part of what an encoder is.
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
        """Return t; with `logit_bias`, σ(t x·y + b) is how likely the sigmoid loss holds a pair to belong together."""
        return self.heads.log_scale.exp()

    @property
    def logit_bias(self) -> Tensor:
        """Return b."""
        return self.heads.bias

    def preprocess(self, picture: Image.Image) -> Tensor:
        """Return the pixels that the image encoder takes, (size, size, 3) uint8; they are stacked to a batch.

        Raises:
            TypeError: It is no picture, but a file's path for instance.
        """
        if not isinstance(picture, Image.Image):
            raise TypeError(f"A picture is a PIL image, and {picture!r} is none; open a file with PIL.Image.open.")
        return self._image.preprocess(upright_rgb(picture.copy()))

    def tokenizer(self, texts: str | Sequence[str]) -> Tensor:
        """Return the tokens of texts, (B, T) int64, for `encode_text` alone."""
        return self._text.tokenize([texts] if isinstance(texts, str) else texts)

    def encode_image(self, pictures: Tensor | Image.Image | Sequence[Image.Image]) -> Tensor:
        """Embed pictures, or pixels (B, size, size, 3) uint8 as `preprocess` gives them.

        Raises:
            ValueError: There are none.
            TypeError: They are neither, but paths of files for instance.
        """
        if isinstance(pictures, Image.Image | str | Path):
            pictures = [pictures]
        pixels = pictures if isinstance(pictures, Tensor) else [self.preprocess(picture) for picture in pictures]
        _require_some(pixels, "picture")
        pixels_BHWC = pixels if isinstance(pixels, Tensor) else torch.stack(pixels)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            batches_BHWC = torch.split(pixels_BHWC, self._image.batch_size)
            features_BD = torch.cat([self._image.encode(batch_BHWC) for batch_BHWC in batches_BHWC])
            return self.heads.encode_image(features_BD.half().to(self.device))

    def encode_text(self, texts: Tensor | str | Sequence[str]) -> Tensor:
        """Embed texts, or tokens as `tokenizer` gives them. Raises `ValueError` if there are none."""
        texts = [texts] if isinstance(texts, str) else texts
        _require_some(texts, "text")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            tokens_BT = texts if isinstance(texts, Tensor) else self.tokenizer(texts)
            features_BD = self._text.encode_tokens(tokens_BT)
            return self.heads.encode_text(features_BD.half().to(self.device))


def _require_some(given: Sized, what: str) -> None:
    if not len(given):
        raise ValueError(f"There is nothing to embed; give one {what} at least.")


def _encoder(recorded: Identity, folder: str | Path | None, device: str, argument: str) -> VisionEncoder | TextEncoder:
    of_folder = "config" in recorded.spec.source
    if folder is not None and not of_folder:
        raise UserError(f"Encoder {recorded.spec.id!r} is of no local folder; leave {argument} out.")
    if folder is not None:
        recorded = replace(recorded, location=str(Path(folder).resolve()))
    elif of_folder and not recorded.location:
        raise UserError(f"Encoder {recorded.spec.id!r} is of a local folder; say where it lies with {argument}.")
    return load_recorded(recorded, device)
