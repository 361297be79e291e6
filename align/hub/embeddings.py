"""Embeddings of a store by the heads of a run, written for other programs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sail_align.align.runs.checkpoint import Run
from sail_align.extract.errors import UserError
from sail_align.extract.exchange.writing import Written, open_arrays, write_vectors
from sail_align.extract.store.store import Store

HEAD_BATCH = 4_096
"""Rows that pass through a head at a time."""
Half = NDArray[np.float16]


def write_embeddings(
    run: Run,
    store: Store,
    form: str,
    folder: Path,
    *,
    captions: Sequence[str] | None = None,
    corrected: bool = False,
    device: str = "cpu",
    quiet: bool = False,
) -> Written:
    """Write the unit-norm embeddings of a store's rows as float32: the numbers of `sail-eval`.

    Args:
        run: The run, whose heads are moved to the device.
        store: A store with features of the run's encoders.
        form: One of the formats of `sail_align.extract.exchange.writing`.
        folder: A folder that does not exist or is empty.
        captions: Names of captions. None takes all that have features.
        corrected: Write vectors with two more dimensions, whose dot products are similarities corrected for hubs.
        device: Device of the heads.
        quiet: Show no progress bar.

    Raises:
        UserError: The store has no features of these encoders, the folder cannot be written, or an embedding is NaN, or
            `corrected` is set and the run has no correction.
    """
    model = run.model.to(device)
    encoders = {"image": model.encode_image, "text": model.encode_text}
    if corrected:
        model.require_correction()
        encoders = {"image": model.corrected_image, "text": model.corrected_text}
    images = store.of(run.image)
    texts = next((found for name in store.captions if (found := store.of(run.text, name))), None)
    # Without features of these encoders, the only others are opened, so that they are compared.
    arrays = open_arrays(store, captions, images.node if images else None, texts.node if texts else None)
    for name, array in arrays.items():
        array.identity.check_matches(run.text if name else run.image, where=str(run.path))

    def convert(modality: str, features_ND: Half) -> NDArray[np.float32]:
        embeddings_NE = embed(encoders[modality], features_ND, device)
        if not np.isfinite(embeddings_NE).all():
            raise UserError(f"The heads of {run.path} return NaN or infinity. Its training has diverged.")
        return embeddings_NE

    about = {"run": run.path.name, "run_digest": run.digest}
    return write_vectors(store, arrays, form, folder, convert, about, quiet=quiet)


def embed(encode: Callable[[Tensor], Tensor], features_ND: Half, device: str | torch.device) -> NDArray[np.float32]:
    """Return the embeddings (N, E) of features by one head, `HEAD_BATCH` rows at a time."""
    with torch.inference_mode():
        batches = torch.split(torch.from_numpy(features_ND), HEAD_BATCH)
        parts = [encode(batch.to(device, torch.float32)).float().cpu() for batch in batches]
    embeddings_NE: NDArray[np.float32] = torch.cat(parts).numpy()
    return embeddings_NE
