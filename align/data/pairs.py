"""The training data of a run: image and text arrays of one or several stores, and the rows used of each."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sail_align.align.data.captions import choose_captions
from sail_align.extract.data import Status
from sail_align.extract.errors import UserError, command
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.index import FILE_ROWS
from sail_align.extract.store.joined import StoredFeatures
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import canonical_json
from sail_align.extract.system.progress import progress

Rows = NDArray[np.bool_]
"""A mask over the rows of a store."""

Half = NDArray[np.float16]

Verify = Literal["first-epoch", "always", "off"]
"""When features are compared with their checksums: on their first use, on the first use in each epoch, or never."""

MIN_HELD_OUT = 100
MAX_HELD_OUT = 5_000
READ_AHEAD = 64
"""Chunks that are read from the disk in advance when the features of all rows are compared."""
_ODD = np.array([0x9E3779B97F4A7C15 * (2 * n + 1) % 2**64 for n in range(8)], np.uint64)


@dataclass(frozen=True)
class Pairs:
    """The arrays of one store that training reads; row i of `image` and row i of each of `texts` are a pair.

    `captions` are the names of `texts`. They may differ between stores. `verify` says when features are checked.
    """

    store: Store
    captions: tuple[str, ...]
    image: StoredFeatures
    texts: tuple[StoredFeatures, ...]
    verify: Verify = "first-epoch"

    def __post_init__(self) -> None:
        for array in self.parts:
            array.check = self.verify != "off"

    @property
    def arrays(self) -> tuple[StoredFeatures, ...]:
        """All features, those of the images first."""
        return self.image, *self.texts

    @property
    def parts(self) -> tuple[FeatureArray, ...]:
        """The arrays on disk: several where encoders are joined."""
        return tuple(chain.from_iterable(array.parts for array in self.arrays))

    @classmethod
    def open(
        cls,
        path: Path,
        captions: Sequence[str],
        image_encoder: str | None = None,
        text_encoder: str | None = None,
        verify: Verify = "first-epoch",
    ) -> "Pairs":
        """Open the arrays of a store; an encoder may be None if the store has only one. `a+b` joins two encoders."""
        store = Store.open(path)
        texts = tuple(store.text(name, text_encoder) for name in captions)
        return cls(store, tuple(captions), store.image(image_encoder), texts, verify)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the store's path and the arrays' encoders, so that another process opens them itself."""
        return Pairs.open, (self.store.path, self.captions, self.image.node, self.texts[0].node, self.verify)

    def only(self, captions: Sequence[str]) -> "Pairs":
        """Return the pairs with only some of the captions."""
        texts = dict(zip(self.captions, self.texts, strict=True))
        return replace(self, captions=tuple(captions), texts=tuple(texts[name] for name in captions))

    def require_complete(self) -> None:
        """Raise `UserError` if shards are missing."""
        shards = sum(len(array.shards) for array in self.parts)
        if missing := shards - sum(len(array.markers) for array in self.parts):
            how = f"sail-extract {'import' if self.store.is_imported else 'run'}"
            raise UserError(
                f"{self.store.path} is incomplete: {missing} of {shards} shards are missing. Rerun the `{how}` that "
                "made it."
            )

    @property
    def unchecked(self) -> str:
        """A note that the features have no checksums, "" if they have."""
        if self.store.format > 1:
            return ""
        upgrade = command("sail-extract", "upgrade", self.store.path)
        return f"{self.store.path} has store format 1: its features cannot be checked. Run `{upgrade}`."

    def usable(self, positives: int | None = None) -> Rows:
        """Return the rows whose image and at least `positives` captions have features; by default all captions.

        Other rows are never served.
        """
        usable: Rows = self.present().sum(axis=0, dtype=np.uint16) >= (positives or len(self.texts))
        usable &= self.image.read_status() == Status.OK
        return usable

    def present(self) -> Rows:
        """Return which captions have features, (captions, rows)."""
        return np.stack([array.read_status() == Status.OK for array in self.texts])

    @property
    def digest(self) -> str:
        """SHA-256 of what training reads from the store; it does not change when other arrays are added."""
        return self.store.digest_of(self.arrays)

    def chunks(self) -> list[slice]:
        """Return the spans of the inner chunks, each of which is read at once."""
        size = self.store.chunk_rows
        return [slice(start, start + size) for start in range(0, self.store.rows, size)]


def count_rows(rows: Sequence[Rows]) -> int:
    """Return the number of rows over all stores."""
    return sum(int(chosen.sum()) for chosen in rows)


def open_pairs(
    paths: Sequence[Path],
    captions: Sequence[str] = (),
    *,
    positives: int | None = None,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
    verify: Verify = "first-epoch",
) -> list[Pairs]:
    """Open the arrays of one or several stores, to train on all of them together.

    Args:
        paths: At least one store.
        captions: Caption names. If empty, the captions that all stores have features of, or, if `positives` is given,
            the captions that any store has.
        positives: Number of captions that each image needs; a store may then lack some of them. The default is all.
        image_encoder: Image encoder to use if a store has more than one; `a+b` joins the features of two.
        text_encoder: Text encoder to use, likewise.
        verify: When features are compared with their checksums.

    Raises:
        UserError: A path is not a store, an array is missing or incomplete, the stores' encoders differ, or a store is
            given twice.
    """
    stores = [Store.open(path) for path in paths]
    for store in stores:
        if not store.captions:
            how = (
                "Import them again with --text-features"
                if store.is_imported
                else "Put a text file beside each image (dog.txt for dog.jpg) or name a table of captions under "
                "'recaptions' in the manifest, and run `sail-extract run`"
            )
            raise UserError(
                f"{store.path} has image features only, and training needs captions. {how} with another --out."
            )
    chosen = choose_captions(paths, [stored_captions(store) for store in stores], captions, positives)
    opened: list[Pairs] = []
    first_with: dict[str, Path] = {}
    for path, store, names in zip(paths, stores, chosen, strict=True):
        pairs = Pairs.open(path, names, image_encoder, text_encoder, verify)
        pairs.require_complete()
        if (digest := store.digest) in first_with:
            raise UserError(f"{path} holds the same data as {first_with[digest]}. Give each store once.")
        first_with[digest] = path
        first = opened[0] if opened else pairs
        pairs.image.identity.check_matches(first.image.identity, where=str(first.store.path))
        for array in pairs.texts:
            array.identity.check_matches(first.texts[0].identity, where=str(first.store.path))
        opened.append(pairs)
    return opened


def stored_captions(store: Store) -> list[str]:
    """Return the captions that have features in a store."""
    return [name for name in store.captions if store.texts(name)]


def require_half(pairs: Sequence[Pairs], usable: Sequence[Rows]) -> None:
    """Reject several captions that few rows have in common, which would silently drop most of the images.

    Raises:
        UserError: Fewer than half of the rows with an image are usable.
    """
    count = count_rows(usable)
    with_image = sum(each.image.counts.get(Status.OK.label, 0) for each in pairs)
    if all(len(each.captions) == 1 for each in pairs) or 2 * count >= with_image:
        return
    caption_rows: Counter[str] = Counter()
    for each in pairs:
        for name, array in zip(each.captions, each.texts, strict=True):
            caption_rows[name] += array.counts.get(Status.OK.label, 0)
    rarest = min(caption_rows, key=lambda name: caption_rows[name])
    raise UserError(
        f"Only {count:,} of {with_image:,} rows with an image have all captions ({', '.join(caption_rows)}). The "
        f"rarest is {rarest}, in {caption_rows[rarest]:,} rows. Choose captions to train on with "
        "--captions, or pass --positives 1 to sample from those that a row has."
    )


def split_held_out(pairs: Sequence[Pairs], usable: Sequence[Rows], fraction: float) -> list[Rows]:
    """Return the held-out rows of each store.

    The rows whose keys have the lowest hashes are held out. They depend neither on the seed nor on the encoders nor on
    the order of the stores. Their number is `fraction` of the usable rows, but at least 100 (or a fifth of the usable
    rows, if that is less) and at most 5,000.
    """
    hashes = [np.concatenate([key_hashes(keys) for _, keys in _read_keys(each.store)]) for each in pairs]
    usable_hashes = np.sort(np.concatenate([each[rows] for each, rows in zip(hashes, usable, strict=True)]))
    count = held_out_count(len(usable_hashes), fraction)
    if count == 0:
        return [np.zeros_like(rows) for rows in usable]
    return [rows & (each <= usable_hashes[count - 1]) for each, rows in zip(hashes, usable, strict=True)]


def held_out_pictures(
    pairs: Sequence[Pairs],
    rows: Sequence[Rows],
    held_out: Sequence[Rows],
    *,
    quiet: bool = True,
    known: dict[str, list[Rows]] | None = None,
) -> list[Rows]:
    """Return those of the rows whose picture is also in a held-out row: their image features are equal.

    This reads the image features of all rows, as an epoch does. Rows are compared by a hash of their first features,
    and in full if those are equal.

    Args:
        pairs: The stores.
        rows: The rows to look for of each store.
        held_out: The held-out rows of each store.
        quiet: Show no progress bar.
        known: Earlier results, to which this one is added, for plans that share images and rows.
    """
    if known is None:
        return _find_pictures(pairs, rows, held_out, quiet)
    key = hashlib.sha256()
    for each, *masks in zip(pairs, rows, held_out, strict=True):
        key.update(each.store.digest_of([each.image]).encode() + np.packbits(masks).tobytes())
    if (name := key.hexdigest()) not in known:
        known[name] = _find_pictures(pairs, rows, held_out, quiet)
    return known[name]


def _find_pictures(pairs: Sequence[Pairs], rows: Sequence[Rows], held_out: Sequence[Rows], quiet: bool) -> list[Rows]:
    held: set[bytes] = set()
    for each, chosen in zip(pairs, held_out, strict=True):
        for number, span in enumerate(each.chunks()):
            if chosen[span].any():
                held.update(map(bytes, each.image.chunk(number)[chosen[span]]))
    found = [np.zeros_like(chosen) for chosen in rows]
    if not held:
        return found
    held_ND = np.frombuffer(b"".join(held), np.float16).reshape(len(held), -1)
    hashes = np.unique(_head_hashes(held_ND))
    with progress(sum(map(len, rows)), "compare pictures", quiet=quiet, delay=1) as bar:
        for each, chosen, same in zip(pairs, rows, found, strict=True):
            spans = each.chunks()
            for number, span in enumerate(spans):
                if number % READ_AHEAD == 0:
                    each.image.prefetch(list(range(number, min(number + READ_AHEAD, len(spans)))))
                chunk_ND = each.image.chunk(number)
                for place in np.flatnonzero(chosen[span] & np.isin(_head_hashes(chunk_ND), hashes)):
                    same[span.start + place] = bytes(chunk_ND[place]) in held
                bar.update(len(chunk_ND))
    return found


def _head_hashes(features_ND: Half) -> NDArray[np.uint64]:
    """Return a hash (N,) of the first 32 features of each row."""
    head = np.zeros((len(features_ND), 32), np.float16)
    head[:, : features_ND.shape[1]] = features_ND[:, :32]
    hashes: NDArray[np.uint64] = head.view(np.uint64) @ _ODD
    return hashes


def key_hashes(keys: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Return the hashes (N,) of keys; the rows with the lowest are held out."""
    digests = b"".join([hashlib.blake2b(key, digest_size=8).digest() for key in keys.cast(pa.binary()).to_pylist()])
    return np.frombuffer(digests, dtype=np.dtype("<u8"))


def held_out_count(usable: int, fraction: float) -> int:
    """Return the number of rows to hold out: see `split_held_out`."""
    count = min(max(round(fraction * usable), min(MIN_HELD_OUT, usable // 5)), MAX_HELD_OUT)
    return count if fraction else 0


def fill_missing(text_CND: Half, present_CN: Rows) -> None:
    """Replace missing captions by the first caption that the row has, in place."""
    if not present_CN.all():
        spare_ND = text_CND[present_CN.argmax(axis=0), np.arange(text_CND.shape[1])]
        np.copyto(text_CND, spare_ND, where=~present_CN[..., None])


def read_rows(pairs: Sequence[Pairs], rows: Sequence[Rows]) -> tuple[Half, Half]:
    """Return the images (n, D_I) and texts (C, n, D_T) of the chosen rows of all stores.

    A row that has only some of the captions gets its first one in place of the others.

    Raises:
        UserError: A feature is NaN or inf.
    """
    first, count = pairs[0], count_rows(rows)
    image_ND = np.empty((count, first.image.dim), np.float16)
    text_CND = np.empty((len(first.texts), count, first.texts[0].dim), np.float16)
    at = 0
    for each, chosen in zip(pairs, rows, strict=True):
        present_CN = each.present()
        for number, span in enumerate(each.chunks()):
            places = np.flatnonzero(chosen[span])
            if len(places):
                part = slice(at, at + len(places))
                for out_ND, array in zip((image_ND, *text_CND), each.arrays, strict=True):
                    out_ND[part] = array.chunk(number)[places]
                fill_missing(text_CND[:, part], present_CN[:, span][:, places])
                if not (np.isfinite(image_ND[part]).all() and np.isfinite(text_CND[:, part]).all()):
                    raise not_finite([each.store])
                at = part.stop
    return image_ND, text_CND


def not_finite(stores: Sequence[Store]) -> UserError:
    """Return the error to raise for NaN or inf in a row whose status is ok."""
    paths = " or ".join(str(store.path) for store in stores)
    return UserError(f"{paths} contains NaN or inf in rows marked ok. Check it with `sail-extract verify`.")


def _read_keys(store: Store) -> Iterator[tuple[slice, pa.ChunkedArray]]:
    """Yield a span of rows and their keys for each file of a store's index."""
    for start in range(0, store.rows, FILE_ROWS):
        stop = min(start + FILE_ROWS, store.rows)
        yield slice(start, stop), store.index(["key"], start, stop)["key"]


@dataclass(frozen=True)
class Exclusions:
    """Keys of rows to leave out of training and of the held-out rows, such as near-duplicates of evaluation images."""

    keys: pa.Array

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "Exclusions":
        """Read files with one key per line. Text after a tab is ignored, as in the lists of `sail-extract overlap`.

        Raises:
            UserError: A file cannot be read or is not UTF-8.
        """
        keys: set[str] = set()
        for path in paths:
            try:
                lines = path.read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as problem:
                reason = problem.strerror if isinstance(problem, OSError) else "not UTF-8"
                raise UserError(
                    f"{path} cannot be read: {reason}. --exclude needs a text file with one key per line."
                ) from problem
            keys.update(key for line in lines if (key := line.split("\t")[0].rstrip("\r")))
        return cls(pa.array(sorted(keys), pa.string()))

    def rows(self, store: Store) -> Rows:
        """Return the excluded rows of a store."""
        excluded = np.zeros(store.rows, dtype=np.bool_)
        for span, keys in _read_keys(store) if len(self.keys) else ():
            excluded[span] = pc.is_in(keys, value_set=self.keys).to_numpy()
        return excluded

    def describe(self, excluded: Sequence[Rows]) -> str:
        """Return a note on the number of excluded rows."""
        keys = f"{len(self.keys):,} keys"
        if count := count_rows(excluded):
            return f"Rows excluded by {keys}: {count:,}."
        return f"Nothing is excluded: none of {keys} is in the stores."

    def record(self) -> dict[str, Any]:
        """Return the settings that identify the keys, or none if empty. A run resumes only with the same keys."""
        if not len(self.keys):
            return {}
        digest = hashlib.sha256(canonical_json(self.keys.to_pylist())).hexdigest()
        return {"excluded_keys": len(self.keys), "excluded_sha256": digest}
