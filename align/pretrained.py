"""Load a run, an exported folder or a hub repository as a model that embeds images and strings.

model = sail_align.align.pretrained.load("runs/demo-linear")
model.encode_image(image) @ model.encode_text(["a cat", "a dog"]).T
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from sail_align.align.hub.reference import read
from sail_align.align.pretrained_model import PretrainedModel
from sail_align.align.runs.checkpoint import Choice
from sail_align.extract.encoders.identity import Identity, require_known
from sail_align.extract.encoders.load import load_recorded
from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.encoders.text import TextEncoder
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.errors import UserError
from sail_align.extract.system.python_calls import PathLike

__all__ = ["PretrainedModel", "load", "read"]


def load(
    reference: PathLike,
    *,
    device: str = "auto",
    revision: str | None = None,
    checkpoint: Choice | None = None,
    image_folder: str | Path | None = None,
    text_folder: str | Path | None = None,
    allow_remote_code: str | Sequence[str] = (),
) -> "PretrainedModel":
    """Load heads and their encoders, which must be those recorded in the run.

    Args:
        reference: A run, one of its checkpoints, the result of `fit`, a folder of `sail-align export`, or the hub
            repository of such a folder, `owner/name`.
        device: Device of heads and encoders; `auto` uses a GPU if there is one.
        revision: Revision of the repository. A full commit hash is the safest.
        checkpoint: The weights of a run: "best", the default, for those with the best scores on held-out pairs, or
            "last" for those after the last step.
        image_folder: Folder of the image encoder, if it is a local folder that has moved.
        text_folder: Folder of the text encoder, if it is a local folder that has moved.
        allow_remote_code: Repositories that may run their own code, each as "owner/name@revision" with a full
            commit hash. No other code is run.

    Returns:
        A `torch.nn.Module` with `encode_image`, `encode_text`, `similarity`, `classify`, `segment`, `heads` and more.

    Raises:
        EncoderChangedError: An encoder with the recorded name has other weights or gives other features.
        UserError: The model does not exist, its files are damaged, or an encoder cannot be loaded.
    """
    run = read(reference, revision, checkpoint)
    require_known(run.image, run.text)
    code = (allow_remote_code,) if isinstance(allow_remote_code, str) else tuple(allow_remote_code)
    where = str(Runtime.of(device, "float32").device)
    image = cast(VisionEncoder, _encoder(run.image, image_folder, where, "image_folder", code))
    text = cast(TextEncoder, _encoder(run.text, text_folder, where, "text_folder", code))
    return PretrainedModel(run, image, text)


def _encoder(
    recorded: Identity, folder: str | Path | None, device: str, argument: str, code: Sequence[str]
) -> VisionEncoder | TextEncoder:
    if recorded.parts and folder is not None:
        raise UserError(f"Encoders {recorded.spec.id!r} are joined, and {argument} is for one. Leave it out.")
    if any("config" in part.spec.source and not part.location for part in recorded.parts):
        raise UserError(f"Encoders {recorded.spec.id!r} are joined, and one is a local folder. Load the run itself.")
    of_folder = "config" in recorded.spec.source
    if folder is not None and not of_folder:
        raise UserError(f"Encoder {recorded.spec.id!r} is not a local folder. Leave {argument} out.")
    if folder is not None:
        recorded = replace(recorded, location=str(Path(folder).resolve()))
    elif of_folder and not recorded.location:
        raise UserError(f"Encoder {recorded.spec.id!r} is a local folder. Pass its path with {argument}.")
    return load_recorded(recorded, device, allow_remote_code=code)
