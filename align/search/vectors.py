"""Embeddings of a store's images by a run, computed once and kept beside the run.

RUN/search/<digest of run and features>/
    aligned.npy      unit-norm embeddings (M, E) float16 of the M rows that have an image, in their order
    terms.npy        terms (M,) float32 of the corrected similarity, if the run has a correction
    corrected.npy    vectors (M, E) float16 of the corrected similarity, if they are not the embeddings
    frozen.npy       unit-norm features (M, D) float16 of the image encoder
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sail_align.align.model.correction import Bank, Cosine
from sail_align.align.runs.checkpoint import Run
from sail_align.align.runs.folder import RunFolder
from sail_align.align.search.query import Space
from sail_align.extract.data import Status
from sail_align.extract.encoders.runtime import tf32_products
from sail_align.extract.errors import UserError
from sail_align.extract.store.joined import StoredFeatures
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import canonical_json, open_atomically, report_write_errors
from sail_align.extract.system.leases import Leases
from sail_align.extract.system.progress import note

FORMAT = 1
READ_ROWS = 4_096
"""Rows that are read from a store and embedded at a time."""

Advance = Callable[[int], object]
Blocks = dict[str, Tensor]
"""Some rows of each file, by its name."""


class StoreVectors:
    """The vectors of one store's images.

    Args:
        run: The run, with its heads on their device.
        store: A store with features of the run's image encoder.
        folder: Folder for the files. None keeps vectors in memory only. Default: in the folder of the run.

    Attributes:
        rows: Numbers (M,) of the rows that have an image.

    Raises:
        UserError: The store has no features of that encoder, or none at all.
    """

    def __init__(self, run: Run, store: Store, folder: Path | None):
        self._run, self.store = run, store
        self._array = features_of(run, store)
        self.rows: NDArray[np.int64] = np.flatnonzero(self._array.read_status() == Status.OK)
        if not len(self.rows):
            raise UserError(f"{store.path} has no images with features. Finish it with `sail-extract run`.")
        key = canonical_json([FORMAT, run.digest, store.digest_of([self._array])])
        self._folder = folder and folder / hashlib.sha256(key).hexdigest()[:16]
        self._tensors: Blocks = {}

    def load(self, space: Space, advance: Advance = lambda done: None) -> tuple[Tensor, Tensor | None]:
        """Return the vectors (M, E) of a space and their terms (M,), from their files or computed now.

        Args:
            space: The space. `corrected` needs a run with a correction.
            advance: Called with the number of rows that were embedded.
        """
        shapes = self._shapes("frozen" if space == "frozen" else "heads")
        if not shapes.keys() <= self._tensors.keys():
            self._tensors |= self._read(shapes) or self._build(space == "frozen", shapes, advance)
        if space != "corrected":
            return self._tensors[space], None
        return self._tensors.get("corrected", self._tensors["aligned"]), self._tensors["terms"]

    @property
    def is_unit(self) -> bool:
        """Whether the vectors of corrected similarities are the embeddings."""
        return "corrected" not in self._shapes("heads")

    def needs_building(self) -> bool:
        """Return whether the embeddings are still to be computed."""
        return "aligned" not in self._tensors and self._read(self._shapes("heads")) is None

    def _shapes(self, which: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return the shape and the type of each file."""
        count, model = len(self.rows), self._run.model
        if which == "frozen":
            return {"frozen": ((count, self._array.dim), "float16")}
        shape = (count, model.image_head.out.out_features)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {"aligned": (shape, "float16")}
        if model.correction is not None:
            shapes["terms"] = ((count,), "float32")
            if not (isinstance(model.correction, Bank) and isinstance(model.correction.base, Cosine)):
                shapes["corrected"] = (shape, "float16")
        return shapes

    def _read(self, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> Blocks | None:
        """Map the files. Return None if one is missing, or is not what it should be."""
        if self._folder is None:
            return None
        found = {}
        for name, (shape, dtype) in shapes.items():
            try:
                array = np.load(self._folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                return None
            if array.shape != shape or array.dtype != dtype:
                return None
            found[name] = torch.from_numpy(array)
        return found

    def _build(self, frozen: bool, shapes: Mapping[str, tuple[tuple[int, ...], str]], advance: Advance) -> Blocks:
        """Compute the vectors. Write them if there is a folder for them."""
        blocks = self._frozen_blocks(advance) if frozen else self._embedded_blocks(advance)
        folder = self._folder if self._folder and _is_writable(self._folder) else None
        if folder is None:
            parts = list(blocks)
            return {name: torch.cat([part[name] for part in parts]) for name in shapes}
        waiting = partial(note, f"{folder}: waiting for another process that embeds the same images.")
        lease = Leases(folder / "leases").hold("frozen" if frozen else "heads", waiting)
        with report_write_errors(folder, has_out=False), lease:
            if found := self._read(shapes):  # another process has just built them
                return found
            with ExitStack() as stack:
                files = {name: stack.enter_context(open_atomically(folder / f"{name}.npy")) for name in shapes}
                for name, (shape, dtype) in shapes.items():
                    files[name].write(_header(shape, dtype))
                for block in blocks:
                    for name, part in block.items():
                        files[name].write(part.contiguous().numpy().tobytes())
        found = self._read(shapes)
        if found is None:
            raise UserError(f"{folder} has changed while it was written. Rerun the same command.")
        return found

    def _features(self, advance: Advance) -> Iterator[Tensor]:
        """Yield the features (n, D) float16 of the rows that have an image."""
        for start in range(0, self._array.rows, READ_ROWS):
            features_ND, status_N = self._array.read(start, start + READ_ROWS)
            yield torch.from_numpy(features_ND[status_N == Status.OK])
            advance(int((status_N == Status.OK).sum()))

    def _frozen_blocks(self, advance: Advance) -> Iterator[Blocks]:
        for features_ND in self._features(advance):
            yield {"frozen": F.normalize(features_ND.float(), dim=-1).half()}

    def _embedded_blocks(self, advance: Advance) -> Iterator[Blocks]:
        model = self._run.model
        device, shapes = model.log_scale.device, self._shapes("heads")
        for features_ND in self._features(advance):
            with torch.inference_mode(), tf32_products():
                raw_NE = model.image_head(features_ND.to(device).float()).float()
                block = {"aligned": F.normalize(raw_NE, dim=-1)}
                if model.correction is not None:
                    block["corrected"], block["terms"] = model.correction(raw_NE, "image")
            stored = {name: block[name].to("cpu", getattr(torch, dtype)) for name, (_, dtype) in shapes.items()}
            if not all(part.isfinite().all() for part in stored.values()):
                raise UserError(f"The heads of {self._run.path} return NaN or infinity. Its training has diverged.")
            yield stored


def features_of(run: Run, store: Store) -> StoredFeatures:
    """Return the features of a run's image encoder in a store.

    Raises:
        UserError: There are none, or only those of another encoder.
    """
    if array := store.of(run.image):
        return array
    arrays = store.images()
    for array in arrays.values() if len(arrays) == 1 else ():
        array.identity.check_matches(run.image, where=str(run.path))
    names = ", ".join(arrays) or "none"
    raise UserError(
        f"{store.path} has no features of image encoder {run.image.spec.id!r}, with which {run.path} was trained. Its "
        f"image encoders: {names}. Encode it with `sail-extract run`."
    )


def vectors_folder(run: Run) -> Path:
    """Return the folder of a run's vectors: in the run itself, or where its scores are."""
    return RunFolder(run.path).scores / "search"


def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    content = BytesIO()
    described: dict[str, Any] = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, described)
    return content.getvalue()


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "leases").mkdir(exist_ok=True)
    except OSError:
        return False
    return True
