"""Options that several commands of sail-extract share, and the command that follows them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sail_align.extract.errors import command
from sail_align.extract.system.files import as_path

if TYPE_CHECKING:
    from sail_align.extract.store.store import Store

StorePath = Annotated[
    Path, typer.Argument(metavar="STORE", help="A feature store.", show_default=False, parser=as_path)
]


def next_command(store: "Store", *options: object, image: str | None = None, text: str | None = None) -> str:
    """Return the command that follows a finished store: `fit`, or `status` if `fit` would refuse the store.

    Args:
        store: The store.
        options: Further words of `fit`.
        image: Image encoder to choose if the store has several. Default: the first.
        text: Text encoder to choose if the store has several. Default: the first.
    """
    import numpy as np

    from sail_align.extract.data import Status

    images, texts = store.images(), {name: store.texts(name) for name in store.captions}
    texts = {name: arrays for name, arrays in texts.items() if arrays}
    status = command("sail-extract", "status", store.path)
    if not images or not texts or not all(array.complete for array in store.arrays()):
        return status
    nodes = list(dict.fromkeys(node for arrays in texts.values() for node in arrays))
    image, text = image or next(iter(images)), text or nodes[0]
    chosen = [arrays[text] for arrays in texts.values() if text in arrays]
    with_image = images[image].read_status(0, store.rows) == Status.OK
    usable = with_image & np.all([array.read_status(0, store.rows) == Status.OK for array in chosen], axis=0)
    any_caption = with_image & np.any([array.read_status(0, store.rows) == Status.OK for array in chosen], axis=0)
    words = ["--features", store.path, *(["--image-encoder", image] if len(images) > 1 else [])]
    words += ["--text-encoder", text] if len(nodes) > 1 else []
    if len(chosen) > 1 and 2 * usable.sum() < with_image.sum():
        words, usable = [*words, "--positives", 1], any_caption
    return command("sail-align", "fit", *words, *options) if usable.sum() > 1 else status
