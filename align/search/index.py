"""The search index: what a run embeds of stores, searched exactly."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sail_align.align.runs.checkpoint import Run
from sail_align.align.search.encoders import QueryEncoders
from sail_align.align.search.matrix import Matrix
from sail_align.align.search.pictures import Pictures
from sail_align.align.search.query import SPACES, Space, Term, require_terms
from sail_align.align.search.results import Found, Hit, Where
from sail_align.align.search.rows import RowReader
from sail_align.align.search.splits import SPLITS, split_rows
from sail_align.align.search.vectors import StoreVectors, vectors_folder
from sail_align.extract.encoders.runtime import Runtime, tf32_products
from sail_align.extract.errors import UserError, did_you_mean, listing
from sail_align.extract.store.store import Store
from sail_align.extract.system.progress import progress

MOST_RESULTS = 1_000
SAME = 0.95
"""Cosine from which two pictures count as near-duplicates, in the space that is searched.

Of 2,000 photos, no two different ones had more: 0.949 with heads that were trained on them, 0.878 with frozen features.
"""
MOST_COMPARED = 16_384
"""Once so many of the best rows are compared with each other, near-duplicates may leave results unfilled."""
KEPT_FILTERS = 32
KEPT_KEYS = 4_096

Allowed = NDArray[np.bool_] | None
"""Places that may be results; None for all."""
Best = tuple[int, float, int]
"""Place of a result, its score, and the number of its near-duplicates."""


@dataclass(frozen=True, eq=False)
class Shelf:
    """One store of an index: its vectors, its rows and its pictures; `start` is the place of its first vector."""

    store: Store
    vectors: StoreVectors
    reader: RowReader
    pictures: Pictures
    start: int


@dataclass
class SearchIndex:
    """The images of stores, embedded by a run, to be searched by texts, pictures, rows, and sums of these.

    The search is exact: the query is compared with every image. Embeddings are computed once and kept as float16 in the
    folder of the run. It may be used by several threads.

    Attributes:
        run: The run.
        shelves: The stores.
        encoders: The encoders of the run, for new texts and pictures.
    """

    run: Run
    shelves: list[Shelf]
    encoders: QueryEncoders
    _matrices: dict[Space, Matrix] = field(default_factory=dict, repr=False)
    _building: Any = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self._mask = lru_cache(KEPT_FILTERS)(self._find_mask)
        self._place = lru_cache(KEPT_KEYS)(self._find_place)

    @classmethod
    def open(
        cls,
        run: Run,
        stores: Sequence[Store],
        *,
        device: str = "cpu",
        manifests: Sequence[str] = (),
        data_root: str | None = None,
        folder: Path | None = None,
        allow_remote_code: Sequence[str] = (),
    ) -> Self:
        """Open stores for a run. Nothing is embedded yet: `build` does that, or the first search.

        Args:
            run: The run; its heads are moved to the device.
            stores: Stores with features of its image encoder.
            device: Device of encoders and heads.
            manifests: Manifests of the stores, to find their pictures. Default: found as `Pictures` documents.
            data_root: Folder of the manifests' files.
            folder: Folder for the embeddings. Default: in the folder of the run.
            allow_remote_code: Repositories that may run their own code, each as `owner/name@commit`.

        Raises:
            UserError: There are no stores, one is given twice, or one has no features of this encoder.
        """
        if not stores:
            raise UserError("No store is given. Name at least one.")
        digests = [store.digest for store in stores]
        for place, digest in enumerate(digests):
            if digest in digests[:place]:
                raise UserError(f"{stores[place].path} has the content of another store. Give each store once.")
        device = str(Runtime.of(device, "float32").device)
        run.model.to(device).requires_grad_(False)
        shelves, start = [], 0
        for store in stores:
            vectors = StoreVectors(run, store, folder or vectors_folder(run))
            pictures = Pictures(store, manifests, data_root)
            shelves.append(Shelf(store, vectors, RowReader(store), pictures, start))
            start += len(vectors.rows)
        return cls(run, shelves, QueryEncoders(run, device, allow_remote_code))

    def __len__(self) -> int:
        return sum(len(shelf.vectors.rows) for shelf in self.shelves)

    @property
    def spaces(self) -> tuple[Space, ...]:
        """The spaces that can be searched."""
        return SPACES if self.run.model.correction is not None else SPACES[1:]

    def build(
        self, space: Space = "aligned", *, advance: Callable[[int], object] | None = None, quiet: bool = True
    ) -> None:
        """Embed the images of all stores, unless that is done.

        Args:
            space: The space to search.
            advance: Called with numbers of images that were embedded.
            quiet: Show no progress bar.
        """
        if space in self._matrices:
            return
        with self._building:
            if space in self._matrices:
                return
            with progress(len(self), "embed images", unit="image", quiet=quiet, delay=1) as bar:
                loaded = [shelf.vectors.load(space, advance or bar.update) for shelf in self.shelves]
                terms = [terms_M for _, terms_M in loaded if terms_M is not None]
                is_unit = space != "corrected" or self.shelves[0].vectors.is_unit
                parts = [vectors_ME for vectors_ME, _ in loaded]
                self._matrices[space] = Matrix(parts, torch.cat(terms) if terms else None, unit=is_unit)

    def warm_up(self) -> None:
        """Load the text encoder, if it is here, and the first rows, so that the first search takes no longer."""
        with suppress(UserError):
            self.encoders.encode_texts(["a"])
        for shelf in self.shelves:
            shelf.reader.facts(0)

    def search(
        self,
        terms: Sequence[Term],
        count: int = 10,
        *,
        space: str | None = None,
        where: Where | None = None,
        collapse: bool = True,
        quiet: bool = True,
    ) -> Found:
        """Return the rows that are most similar to a query.

        Args:
            terms: The query. Each term counts as a vector of unit length.
            count: Number of results, at most `MOST_RESULTS`.
            space: What to compare. Default: `corrected` for texts if the run has a correction, else `aligned`.
            where: Which rows may be results.
            collapse: Leave out near-duplicates of better results.
            quiet: Show no progress bar if the images are still to be embedded.

        Raises:
            UserError: The query is empty, a value is invalid, no row has a key, or an encoder cannot be loaded.
        """
        require_terms(terms)
        if not 1 <= count <= MOST_RESULTS:
            raise UserError(f"The number of results is invalid: got {count}, expected 1 to {MOST_RESULTS:,}.")
        chosen = self._choose_space(terms, space)
        allowed_M = self._mask(where) if where and where != Where() else None
        self.build(chosen, quiet=quiet)
        named = [self.find(term.value) for term in terms if term.kind == "key"]
        query_E, constant = self.vector(terms, chosen)
        if named:  # a row is not similar to itself
            allowed_M = np.ones(len(self), np.bool_) if allowed_M is None else allowed_M.copy()
            allowed_M[named] = False
        rows = len(self) if allowed_M is None else int(allowed_M.sum())
        find = self._collapse if collapse else self._best
        best = find(self._matrices[chosen], query_E, allowed_M, count)
        hits = [self._hit(place, score + constant, copies) for place, score, copies in best]
        return Found(hits, chosen, rows)

    def vector(self, terms: Sequence[Term], space: Space) -> tuple[Tensor, float]:
        """Return the vector (E,) that a query is in a space, and a term that is added to all its scores.

        Raises:
            UserError: No row has a key, the terms cancel each other out, or an encoder cannot be loaded.
        """
        if space == "frozen":
            total_E = sum(term.sign * self._frozen(term) for term in terms)
            return _unit(total_E), 0.0
        model = self.run.model
        with torch.inference_mode(), tf32_products():
            raws = [self._raw(term) for term in terms]
            total_E = _unit(sum(term.sign * F.normalize(raw, dim=-1) for term, raw in zip(terms, raws, strict=True)))
            if space == "aligned":
                return total_E.cpu(), 0.0
            length = torch.stack([raw.norm() for raw in raws]).mean()
            vector_E, constant = model.require_correction()(length * total_E, "text")
            return vector_E.float().cpu(), float(constant)

    def probabilities(self, term: Term, labels: Sequence[str]) -> list[float]:
        """Return the probability of each label for a picture or a row: the softmax of t · cosine over the labels."""
        self.build()
        image_E, _ = self.vector([term], "aligned")
        labels_CE = torch.stack([self.vector([Term(label, "text")], "aligned")[0] for label in labels])
        found: list[float] = (self.run.model.log_scale.exp().cpu() * labels_CE @ image_E).softmax(dim=0).tolist()
        return found

    def find(self, key: Any) -> int:
        """Return the place of a row by its key.

        Raises:
            UserError: No row has the key, rows of several stores have it, or the row has no image features.
        """
        return self._place(str(key))

    def _find_place(self, key: str) -> int:
        found = [(each, row) for each in self.shelves if (row := each.reader.find(key)) is not None]
        if not found:
            raise UserError(f"There is no row with the key {key[:200]!r}. Results show the keys.")
        if len(found) > 1:
            stores = listing(str(shelf.store.path) for shelf, _ in found)
            raise UserError(f"Several stores have a row with the key {key!r}: {stores}. Search one of them.")
        ((shelf, row),) = found
        place = int(np.searchsorted(shelf.vectors.rows, row))
        if place < len(shelf.vectors.rows) and shelf.vectors.rows[place] == row:
            return shelf.start + place
        raise UserError(f"Row {key!r} of {shelf.store.path} has no image features. Name another one.")

    def locate(self, place: int) -> tuple[Shelf, int]:
        """Return the store of a place and the row in it."""
        shelf = next(each for each in reversed(self.shelves) if place >= each.start)
        return shelf, int(shelf.vectors.rows[place - shelf.start])

    def _choose_space(self, terms: Sequence[Term], space: str | None) -> Space:
        of_texts = all(term.kind == "text" for term in terms)
        if space is None:
            return "corrected" if of_texts and "corrected" in self.spaces else "aligned"
        if space not in SPACES:
            raise UserError(f"The space is invalid: got {space!r}, expected {', '.join(SPACES)}.")
        if space == "corrected":
            self.run.model.require_correction()
            if not of_texts:
                raise UserError("Corrected similarities are of texts with images. Use the space aligned or frozen.")
        if space == "frozen" and any(term.kind == "text" for term in terms):
            raise UserError("The frozen image encoder knows no texts. Use the space aligned, or a picture alone.")
        return space

    def _raw(self, term: Term) -> Tensor:
        """Return the output (E,) of the head for a term; of a row, its embedding."""
        model = self.run.model
        if term.kind == "key":
            return self._row("aligned", term).to(model.log_scale.device)
        if term.kind == "text":
            head, features_D = model.text_head, self.encoders.encode_texts([str(term.value)])[0]
        else:
            head, features_D = model.image_head, self.encoders.encode_image(cast(Image.Image, term.value))[0]
        raw_E: Tensor = head(features_D[None].to(model.log_scale.device).float())[0].float()
        return raw_E

    def _frozen(self, term: Term) -> Tensor:
        if term.kind == "key":
            return self._row("frozen", term)
        return F.normalize(self.encoders.encode_image(cast(Image.Image, term.value))[0].float(), dim=-1)

    def _row(self, space: Space, term: Term) -> Tensor:
        self.build(space)
        return F.normalize(self._matrices[space].rows(np.array([self.find(term.value)])), dim=-1)[0]

    @staticmethod
    def _best(matrix: Matrix, query_E: Tensor, allowed_M: Allowed, count: int) -> list[Best]:
        places, scores = matrix.search(query_E, count, allowed_M)
        return [(place, score, 0) for place, score in zip(places.tolist(), scores.tolist(), strict=True)]

    @staticmethod
    def _collapse(matrix: Matrix, query_E: Tensor, allowed_M: Allowed, count: int) -> list[Best]:
        """Return the best places without near-duplicates of better ones."""
        looked_at = 2 * count + 16
        while True:
            places, scores = matrix.search(query_E, looked_at, allowed_M)
            vectors_NE = F.normalize(matrix.rows(places), dim=-1)
            kept, copies = _leave_out_copies(vectors_NE, count)
            if len(kept) == count or len(places) < looked_at or looked_at >= MOST_COMPARED:
                return list(zip(places[kept].tolist(), scores[kept].tolist(), copies, strict=True))
            looked_at *= 4

    def _find_mask(self, where: Where) -> NDArray[np.bool_]:
        """Return the places (M,) that a filter allows."""
        datasets = [shelf.store.dataset for shelf in self.shelves]
        if where.dataset is not None and where.dataset not in datasets:
            raise UserError(f"There is no data set {where.dataset!r} here. The stores have {listing(datasets)}.")
        splits: Any = [None] * len(self.shelves)
        if where.split is not None:
            split = next((each for each in SPLITS if each == where.split), None)
            if split is None:
                raise UserError(f"The split is invalid: got {where.split!r}, expected {' or '.join(SPLITS)}.")
            splits = split_rows(self.run, [shelf.store for shelf in self.shelves], split)
        parts = []
        labels = self._find_label(where.label) if where.label is not None else []
        for number, (shelf, rows) in enumerate(zip(self.shelves, splits, strict=True)):
            allowed = np.full(shelf.store.rows, where.dataset in (None, shelf.store.dataset))
            if where.split is not None:
                allowed &= rows
            if where.caption:
                allowed &= shelf.reader.with_text(where.caption)
            if where.label is not None:
                allowed &= shelf.reader.with_label(labels[number]) if labels[number] >= 0 else False
            parts.append(allowed[shelf.vectors.rows])
        return np.concatenate(parts)

    def _find_label(self, label: str) -> list[int]:
        """Return the number of a label in each store, −1 where there is none."""
        classes = [shelf.pictures.classes for shelf in self.shelves]
        numbers = [names.index(label) if label in names else _number(label, names) for names in classes]
        if max(numbers) < 0:
            known = list(dict.fromkeys(name for names in classes for name in names))
            has = f"The labels are {listing(known)}." if known else "The stores have no names of labels."
            raise UserError(f"There is no label {label!r}.{did_you_mean(label, known)} {has}")
        return numbers

    def _hit(self, place: int, score: float, copies: int) -> Hit:
        shelf, row = self.locate(place)
        facts = shelf.reader.facts(row)
        label = ""
        if facts.label >= 0:
            classes = shelf.pictures.classes
            label = classes[facts.label] if facts.label < len(classes) else str(facts.label)
        path = shelf.pictures.path(facts.image)
        return Hit(score, self.shelves.index(shelf), facts, label, path, copies)


def _number(label: str, names: Sequence[str]) -> int:
    """Return a label that is given as a number; −1 if the text is not a number, or no class has it."""
    number = int(label) if label.isdecimal() and len(label) < 10 else -1  # labels are int32
    return number if number < (len(names) or 1 << 31) else -1


def _leave_out_copies(vectors_NE: Tensor, count: int) -> tuple[list[int], list[int]]:
    """Return the first `count` unit vectors without near-duplicates of earlier ones, and how many each one has."""
    kept: list[int] = []
    copies: list[int] = []
    kept_KE = torch.empty(count, vectors_NE.shape[1])
    for number, vector_E in enumerate(vectors_NE):
        cosines = kept_KE[: len(kept)] @ vector_E
        if kept and cosines.max() >= SAME:
            copies[int(cosines.argmax())] += 1
        elif len(kept) < count:
            kept_KE[len(kept)] = vector_E
            kept.append(number)
            copies.append(0)
    return kept, copies


def _unit(total_E: Any) -> Tensor:
    """Return the sum of terms as a vector of unit length. Raises `UserError` if they cancel each other out."""
    length = float(total_E.norm())
    if length < 1e-3:
        raise UserError("The terms of the query cancel each other out. Change one of them.")
    unit_E: Tensor = total_E / length
    return unit_E
