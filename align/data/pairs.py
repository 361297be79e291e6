"""What a run is trained on: the image and text arrays of one or several stores, and which of their rows."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sail_align.align.data.captions import choose_captions
from sail_align.extract.data import Status
from sail_align.extract.encoders.base import require_same
from sail_align.extract.errors import UserError
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.index import FILE_ROWS
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import canonical_json

Rows = NDArray[np.bool_]
"""A mask over the rows of a store."""

Half = NDArray[np.float16]

MIN_HELD_OUT = 100
MAX_HELD_OUT = 5_000


@dataclass(frozen=True)
class Pairs:
    """The arrays of one store that training reads: row i of `image` belongs with row i of each of `texts`.

    `captions` are the names of `texts`; other stores may have other ones.
    """

    store: Store
    captions: tuple[str, ...]
    image: FeatureArray
    texts: tuple[FeatureArray, ...]

    @property
    def arrays(self) -> tuple[FeatureArray, ...]:
        """All arrays, the image's first."""
        return self.image, *self.texts

    def only(self, captions: Sequence[str]) -> "Pairs":
        """Return the same with some of the captions."""
        texts = dict(zip(self.captions, self.texts, strict=True))
        return replace(self, captions=tuple(captions), texts=tuple(texts[name] for name in captions))

    def usable(self) -> Rows:
        """Return the rows whose image and captions are all there: the others are never served."""
        usable = np.ones(self.store.rows, dtype=np.bool_)
        for array in self.arrays:
            usable &= array.read_status() == Status.OK
        return usable

    @property
    def digest(self) -> str:
        """SHA-256 over what training reads of the store: it stays when the store gets other arrays."""
        return self.store.digest_of(self.arrays)

    def chunks(self) -> list[tuple[int, int]]:
        """Return the spans that are read at once: the inner chunks of the arrays."""
        size = self.store.chunk_rows
        return [(start, min(start + size, self.store.rows)) for start in range(0, self.store.rows, size)]


def open_pairs(
    paths: Sequence[Path],
    captions: Sequence[str] | None = None,
    *,
    positives: int | None = None,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
) -> list[Pairs]:
    """Open the arrays of one or several stores for training on all of them together.

    Args:
        paths: At least one store.
        captions: Names of captions. By default those that all stores have features of, or if `positives` is given,
            those that any has.
        positives: How many each image needs, so that a store may lack some of the captions; by default all.
        image_encoder: Which encoder's images, where a store holds several.
        text_encoder: The same for texts.

    Raises:
        UserError: A path is no store, an array is not there or not complete, two stores' encoders differ, or a
            store is given twice.
    """
    stores = [Store.open(path) for path in paths]
    of_each = choose_captions(paths, [stored_captions(store) for store in stores], captions, positives)
    opened: list[Pairs] = []
    first_with: dict[str, Path] = {}
    for path, store, names in zip(paths, stores, of_each, strict=True):
        texts = tuple(store.text(name, text_encoder) for name in names)
        pairs = Pairs(store, tuple(names), store.image(image_encoder), texts)
        _require_complete(pairs)
        if (digest := store.digest) in first_with:
            raise UserError(f"{path} holds the same as {first_with[digest]}; give each store once.")
        first_with[digest] = path
        first = opened[0] if opened else pairs
        require_same(pairs.image.identity, first.image.identity, where=str(first.store.path))
        for array in pairs.texts:
            require_same(array.identity, first.texts[0].identity, where=str(first.store.path))
        opened.append(pairs)
    return opened


def stored_captions(store: Store) -> list[str]:
    """Return the captions that a store has features of."""
    return [name for name in store.captions if store.texts(name)]


def require_half(pairs: Sequence[Pairs], usable: Sequence[Rows]) -> None:
    """Refuse several captions that few rows have together: training would lose most of the images unasked.

    Raises:
        UserError: Fewer than half of the rows that have an image are usable.
    """
    count = sum(int(rows.sum()) for rows in usable)
    with_image = sum(_count_ok(each.image) for each in pairs)
    if all(len(each.captions) == 1 for each in pairs) or 2 * count >= with_image:
        return
    rows_of: Counter[str] = Counter()
    for each in pairs:
        rows_of.update({name: _count_ok(array) for name, array in zip(each.captions, each.texts, strict=True)})
    rarest = min(rows_of, key=lambda name: rows_of[name])
    raise UserError(
        f"Only {count:,} of {with_image:,} rows with an image have all of the captions {', '.join(rows_of)}, and the "
        f"rarest, {rarest}, is in {rows_of[rarest]:,} rows; choose with --captions which to train on."
    )


def split_held_out(pairs: Sequence[Pairs], usable: Sequence[Rows], fraction: float) -> list[Rows]:
    """Return the rows of each store that are kept out of training.

    They are those whose keys hash lowest: the same whatever the seed, the order of the stores or the encoders. Their
    number is `fraction` of the usable rows, but at least 100 (or a fifth, if that is less) and at most 5,000.
    """
    hashes = [_hashes_of(each.store) for each in pairs]
    of_usable = np.sort(np.concatenate([each[rows] for each, rows in zip(hashes, usable, strict=True)]))
    count = held_out_count(len(of_usable), fraction)
    if count == 0:
        return [np.zeros_like(rows) for rows in usable]
    return [rows & (each <= of_usable[count - 1]) for each, rows in zip(hashes, usable, strict=True)]


def key_hashes(keys: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Return a hash of each key, (N,): those of the lowest are held out."""
    digests = b"".join([hashlib.blake2b(key, digest_size=8).digest() for key in keys.cast(pa.binary()).to_pylist()])
    return np.frombuffer(digests, dtype=np.dtype("<u8"))


def held_out_count(usable: int, fraction: float) -> int:
    """Return how many of so many usable rows are held out."""
    count = min(max(round(fraction * usable), min(MIN_HELD_OUT, usable // 5)), MAX_HELD_OUT)
    return count if fraction else 0


def read_rows(pairs: Sequence[Pairs], rows: Sequence[Rows]) -> tuple[Half, Half]:
    """Return the images (n, D_I) and texts (C, n, D_T) of the chosen rows of all stores.

    Raises:
        UserError: A feature is no number.
    """
    first, count = pairs[0], sum(int(chosen.sum()) for chosen in rows)
    image_ND = np.empty((count, first.image.dim), np.float16)
    text_CND = np.empty((len(first.texts), count, first.texts[0].dim), np.float16)
    at = 0
    for each, chosen in zip(pairs, rows, strict=True):
        for number, span in enumerate(each.chunks()):
            places = np.flatnonzero(chosen[slice(*span)])
            if len(places):
                for out_ND, array in zip((image_ND, *text_CND), each.arrays, strict=True):
                    out_ND[at : at + len(places)] = array.chunk(number)[places]
                    if not np.isfinite(out_ND[at : at + len(places)]).all():
                        raise not_finite([each.store])
                at += len(places)
    return image_ND, text_CND


def not_finite(stores: Sequence[Store]) -> UserError:
    """Return what to raise of features that are no numbers in a row whose status is ok."""
    paths = " or ".join(str(store.path) for store in stores)
    return UserError(
        f"{paths} has features that are no numbers, in rows that are ok; check with `sail-extract verify`."
    )


def _hashes_of(store: Store) -> NDArray[np.uint64]:
    """Return the hash of each key of a store, read a file of the index at a time."""
    starts = range(0, store.rows, FILE_ROWS)
    tables = (store.index(["key"], start, min(start + FILE_ROWS, store.rows)) for start in starts)
    return np.concatenate([key_hashes(table["key"]) for table in tables])


def _count_ok(array: FeatureArray) -> int:
    return array.counts.get(Status.OK.label, 0)


def _require_complete(pairs: Pairs) -> None:
    missing = sum(len(array.shards) - len(array.markers) for array in pairs.arrays)
    if missing:
        path, dataset = pairs.store.path, pairs.store.dataset
        raise UserError(
            f"{path} is not complete: {missing} of {sum(len(array.shards) for array in pairs.arrays)} shards are not "
            f"written; finish it with `sail-extract run {dataset} --out {path}` and the options it was begun with."
        )


@dataclass(frozen=True)
class Exclusions:
    """Keys of rows that are never served and never held out, such as near-duplicates of evaluation images."""

    keys: pa.Array

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "Exclusions":
        """Read lists with one key a line; what follows a tab is for people, as in those of `sail-extract overlap`.

        Raises:
            UserError: A file cannot be read as text.
        """
        keys: set[str] = set()
        for path in paths:
            try:
                lines = path.read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as problem:
                reason = problem.strerror if isinstance(problem, OSError) else "it is not UTF-8 text"
                raise UserError(
                    f"{path} cannot be read ({reason}); give --exclude a file with a key in each line."
                ) from problem
            keys.update(key for line in lines if (key := line.split("\t")[0].rstrip("\r")))
        return cls(pa.array(sorted(keys), pa.string()))

    def rows(self, store: Store) -> Rows:
        """Return the rows of a store that are excluded."""
        excluded = np.zeros(store.rows, dtype=np.bool_)
        for start in range(0, store.rows, FILE_ROWS) if len(self.keys) else ():
            stop = min(start + FILE_ROWS, store.rows)
            column = store.index(["key"], start, stop)["key"]
            excluded[start:stop] = pc.is_in(column, value_set=self.keys).to_numpy()
        return excluded

    def record(self) -> dict[str, Any]:
        """Return what settings keep of the list, so that a run goes on only with the same; nothing if it is empty."""
        if not len(self.keys):
            return {}
        digest = hashlib.sha256(canonical_json(self.keys.to_pylist())).hexdigest()
        return {"excluded_keys": len(self.keys), "excluded_sha256": digest}
