"""A store made of features that were computed elsewhere."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.load import EncoderConfig, ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.errors import UserError, listing
from sail_align.extract.exchange.features import Features, Places
from sail_align.extract.exchange.identify import TRIED, Agreement, compare_images, compare_texts, require_dim
from sail_align.extract.exchange.join import Joined
from sail_align.extract.exchange.record import read_record
from sail_align.extract.exchange.vector_files import BATCH_ROWS, Block
from sail_align.extract.executor.encode import Advance, ArrayTask, EncodedRows
from sail_align.extract.executor.run import fill
from sail_align.extract.sources.file_set import Fence
from sail_align.extract.sources.images import read_image
from sail_align.extract.store.index import IndexRecord
from sail_align.extract.store.store import IMPORTED, INDEX, Store
from sail_align.extract.system.difference import describe_difference
from sail_align.extract.system.files import canonical_json, file_digest, is_remote, report_write_errors
from sail_align.extract.system.progress import progress
from sail_align.extract.system.signals import RERUN, report_stop

IMAGE_COLUMNS = ("image_path", "image", "file_name")
URL = "url"


@dataclass
class Counts:
    """Counts of unusual rows in the conversion to float16.

    Attributes:
        overflown: Rows with a finite value beyond float16's largest, 65,504.
        zero: Rows of zeros only.
    """

    overflown: int = 0
    zero: int = 0

    def to_half(self, block: Block) -> EncodedRows:
        """Return a block as rows of a store, and count."""
        values, missing = block
        if values.dtype == np.float32:  # torch is several times faster and rounds in the same way, but not float64
            half = torch.tensor(values).half().numpy()
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                half = values.astype(np.float16)
        magnitudes = half.view(np.uint16) & 0x7FFF  # arithmetic of float16 is slow
        finite = (magnitudes < 0x7C00).all(axis=1)
        if not finite.all():
            self.overflown += int(np.isfinite(values[~finite]).all(axis=1).sum())
            half[~finite] = np.nan
        self.zero += int((~magnitudes.any(axis=1)).sum())
        status = np.where(missing, Status.MISSING, np.where(finite, Status.OK, Status.NON_FINITE)).astype(np.uint8)
        return EncodedRows(half, status)


@dataclass
class Import:
    """Features of images and of their captions, joined to the rows of a store.

    Attributes:
        name: Name of the data set.
        sides: The features. Images come first.
        joined: Their rows.
        texts: Column of the text of each caption, by the caption's name.
        images: Folder of the images; None if they are not here.
        image_column: Column of their paths.
        image: The encoder that made the image features; None if unknown.
        text: The same of the text features.
        counts: What the conversion met, by the label of a side.
    """

    name: str
    sides: Sequence[Features]
    joined: Joined
    texts: Mapping[str, str] = field(default_factory=dict)
    images: Path | None = None
    image_column: str | None = None
    image: ImageEncoderConfig | None = None
    text: TextEncoderConfig | None = None
    counts: dict[str, Counts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dims = {side.dim: side.label for side in self.sides[1:]}
        if len(dims) > 1:
            found = " and ".join(f"{dim} in {label}" for dim, label in dims.items())
            raise UserError(f"Text features are invalid: got dimensions {found}, expected those of one encoder.")
        for side in self.sides:
            self.counts[side.label] = Counts()
            column = self.texts.get(side.caption)
            if column and (side.texts is None or column not in side.texts.names):
                known = listing(side.texts.names) if side.texts else "no columns"
                raise UserError(f"--captions {column!r} is invalid: the {side.label} have {known}. Choose another.")

    @property
    def default_path(self) -> Path:
        """Default path of the store."""
        return Path("features") / f"{self.name}.zarr"

    @property
    def captions(self) -> list[str]:
        """Names of the captions."""
        return [side.caption for side in self.sides[1:]]

    def _taken(self, number: int, column: str) -> pa.ChunkedArray:
        """Return a column of a side in the rows of the store."""
        side, places = self.sides[number], self.joined.places[number]
        if side.texts is None:
            raise ValueError(f"the {side.label} have no texts")
        texts = side.texts.read(column, side.rows)
        return texts.take(pa.array(places, mask=places < 0))

    def _anywhere(self, *columns: str) -> pa.ChunkedArray | None:
        """Return the first of the columns that a side has, in the rows of the store."""
        for column in columns:
            found = [n for n, side in enumerate(self.sides) if side.texts and column in side.texts.names]
            if found:
                return pc.coalesce(*(self._taken(number, column) for number in found))
        return None

    @cached_property
    def _images(self) -> pa.ChunkedArray:
        """The path of the image of each row; None if nothing tells it."""
        if self.image_column:
            paths = self._anywhere(self.image_column)
            if paths is None:
                raise UserError(f"--image-column {self.image_column!r} is invalid: no table has such a column.")
            return paths
        paths = self._anywhere(*IMAGE_COLUMNS)
        return self.joined.keys if paths is None and self.images else paths

    def samples(self) -> Iterator[Sample]:
        """Yield the samples of the store."""
        captions = {name: self._taken(self.captions.index(name) + 1, column) for name, column in self.texts.items()}
        urls = self._anywhere(URL)
        for start in range(0, len(self.joined.keys), BATCH_ROWS):
            keys, images, links, *texts = (
                column.slice(start, BATCH_ROWS).to_pylist() if column is not None else None
                for column in (self.joined.keys, self._images, urls, *captions.values())
            )
            for row, key in enumerate(keys or ()):
                named = {name: each[row] for name, each in zip(captions, texts, strict=True) if each and each[row]}
                yield Sample(key, (images[row] or "") if images else "", named, url=(links[row] or "") if links else "")

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        return list(dict.fromkeys(path for side in self.sides for path in (*side.files, *side.tables)))

    def run(self, path: Path, device: str, *, quiet: bool) -> Store:
        """Make the store or finish it, and return it.

        Raises:
            UserError: The store exists and was made of other features, or the encoders did not make these.
            StoppedError: SIGTERM or Ctrl-C.
        """
        with report_stop(lambda: RERUN), report_write_errors(path, during_run=True):
            before = Store.open(path) if (path / "zarr.json").exists() else None
            record = self._record(self._digests(before, quiet))
            if before is not None:
                _require_same(before, record, self.sides)
                record = before.attributes["manifest"]
                if self._is_complete(before):
                    return before
                before.restore()
            identities, agreements = self._identities(record, device, compare=before is None)
            if before is None:
                record["source"]["encoders"] |= agreements
                part = Part("features", self.samples, tuple(self.files))
                Store.create(
                    path, dataset=self.name, manifest=record, parts=[part], captions=self.captions, quiet=quiet
                )
            store = before or Store.open(path)
            self._fill(store, identities, quiet)
            return store

    def _fill(self, store: Store, identities: Sequence[Identity], quiet: bool) -> None:
        tasks = []
        for side, places, identity in zip(self.sides, self.joined.places, identities, strict=True):
            array = store.add(identity, side.caption)
            if not array.complete:
                folder = None if is_remote(store.path) else store.path.parent
                take = side.in_any_order(places[places >= 0], folder, quiet=quiet)
                tasks.append(ArrayTask((array,), self._encode(side, places, take)))
        fill(store, tasks, quiet=quiet)

    def _encode(
        self, side: Features, places: Places, take: Callable[[Places], Block]
    ) -> Callable[[Sequence[int], Advance], list[EncodedRows]]:
        def encode(rows: Sequence[int], advance: Advance) -> list[EncodedRows]:
            chosen = places[rows[0] : rows[-1] + 1]
            present = np.flatnonzero(chosen >= 0)
            result = EncodedRows.pending(len(chosen), side.dim)
            result.status[:] = Status.MISSING
            for start in range(0, len(present), BATCH_ROWS):
                some = present[start : start + BATCH_ROWS]
                result.features[some], result.status[some] = self.counts[side.label].to_half(take(chosen[some]))
            advance(len(chosen))
            return [result]

        return encode

    def _is_complete(self, store: Store) -> bool:
        arrays = store.arrays()
        return len(arrays) == len(self.sides) and all(array.complete for array in arrays)

    def _digests(self, before: Store | None, quiet: bool) -> dict[str, str]:
        """Return the SHA-256 of each file; those of a store's record if size and time are still the recorded ones."""
        files = self.files
        record = IndexRecord.read(before.path / INDEX) if before else None
        if before and record and record.stamps == [IndexRecord.stamps_of(files)]:
            known = [files for side in read_record(before)["features"].values() for files in _files(side)]
            here = [paths for side in self.sides for paths in (side.files, side.tables)]
            if list(map(len, known)) == list(map(len, here)):
                return {
                    str(path): digest
                    for paths, digests in zip(here, known, strict=True)
                    for path, (_, digest) in zip(paths, digests, strict=True)
                }
        digests = {}
        with progress(len(files), "digest", unit="file", quiet=quiet, delay=1) as bar:
            for path in files:
                digests[str(path)] = str(file_digest(path))
                bar.update(1)
        return digests

    def _record(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """Return the description of the store: everything that decides its rows and features."""
        features = {
            side.caption or "image": {
                "files": [[path.name, digests[str(path)]] for path in side.files],
                "tables": [[path.name, digests[str(path)]] for path in side.tables],
                "dtype": side.dtype,
                "dim": side.dim,
            }
            for side in self.sides
        }
        encoders: dict[str, Any] = {"image": _described(self.image), "text": _described(self.text)}
        return {
            "name": self.name,
            "source": {
                "kind": IMPORTED,
                "features": features,
                "joined_by": self.joined.column or "position",
                "captions": dict(self.texts),
                "image_column": self.image_column,
                "encoders": encoders,
            },
        }

    def _identities(
        self, record: Mapping[str, Any], device: str, *, compare: bool
    ) -> tuple[list[Identity], dict[str, Any]]:
        """Return the identity of each side's encoder, and how its features agree with the encoder that was named."""
        features = record["source"]["features"]
        sides: dict[Literal["image", "text"], Sequence[Features]] = {"image": self.sides[:1], "text": self.sides[1:]}
        configs: dict[str, EncoderConfig | None] = {"image": self.image, "text": self.text}
        identities: list[Identity] = []
        agreements: dict[str, Any] = {}
        for modality, some in sides.items():
            config = configs[modality]
            if not some:
                continue
            if config is None:
                made_of = [[each.caption, features[each.caption or "image"]["files"]] for each in some]
                digest = hashlib.sha256(canonical_json(made_of)).hexdigest()
                identity = Identity.imported(modality, digest, some[0].dtype, some[0].dim)
            else:
                encoder = config.load(device)
                identity = encoder.identity
                require_dim(some[0].dim, identity)
                if compare:
                    found = [self._compare(number, encoder) for number, side in enumerate(self.sides) if side in some]
                    known = [each for each in found if each is not None]
                    lowest = min(known, key=lambda each: each.cosine, default=None)
                    agreements[modality] = {**_described(config), "compared": lowest.to_json() if lowest else None}
            identities += [identity] * len(some)
        return identities, agreements

    def _compare(self, number: int, encoder: Any) -> Agreement | None:
        """Compare a sample of one side with its encoder; None if there are no images or texts to encode."""
        side, places = self.sides[number], self.joined.places[number]
        texts = self._taken(number, self.texts[side.caption]) if side.caption in self.texts else None
        if texts is None and (side.caption or self.images is None):
            return None
        rows = np.flatnonzero(places >= 0)
        if texts is not None:
            filled = pc.fill_null(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), False)
            rows = rows[filled.to_numpy()[rows]]
        rows = rows[np.unique(np.linspace(0, max(len(rows) - 1, 0), min(TRIED, len(rows))).astype(np.int64))]
        values = side.take(places[rows]).values.astype(np.float64) if len(rows) else np.empty((0, side.dim))
        usable = np.isfinite(values).all(axis=1) & values.any(axis=1)  # zeros stand for failures of other programs
        rows, values = rows[usable], values[usable]
        if not len(rows):
            raise UserError(
                f"The {side.label} cannot be compared: no row with numbers has an image or a text. Correct them."
            )
        keys = self.joined.keys.take(pa.array(rows)).to_pylist()
        if texts is not None:
            return compare_texts(keys, texts.take(pa.array(rows)).to_pylist(), values, encoder)
        folder = self.images or Path()
        paths = self._images.take(pa.array(rows)).to_pylist()
        samples = [Sample(key, path or "") for key, path in zip(keys, paths, strict=True)]
        fence = Fence(folder)
        return compare_images(samples, values, lambda location: read_image(fence.path(folder, location)), encoder)


def agreements(store: Store) -> dict[str, Agreement | None]:
    """Return how imported features agree with the encoders that were named, by modality; None if not compared."""
    return {
        side: Agreement(**compared) if (compared := about.get("compared")) else None
        for side, about in read_record(store)["encoders"].items()
        if about
    }


def _files(side: Any) -> tuple[Any, Any]:
    return side["files"], side["tables"]


def _described(config: EncoderConfig | None) -> dict[str, Any]:
    return {"name": config.name, "pooling": config.pooling} if config else {}


def _require_same(store: Store, record: Mapping[str, Any], sides: Sequence[Features]) -> None:
    """Raise `UserError` unless a store was made from the same features in the same way."""
    if not store.is_imported:
        raise UserError(f"{store.path} exists and was not imported. Pass another --out.")
    source = read_record(store)
    for side in sides:
        name = side.caption or "image"
        if name not in source["features"]:
            continue
        there, here = _files(source["features"][name]), _files(record["source"]["features"][name])
        paths = (side.files, side.tables)
        for path, old, new in chain(*(zip(*each, strict=False) for each in zip(paths, there, here, strict=True))):
            if old != new:
                raise UserError(
                    f"{path} has changed since {store.path} was made: its SHA-256 was {old[1][:12]} ({old[0]}) and is "
                    f"now {new[1][:12]}. Restore it or pass another --out."
                )
    before = copy.deepcopy(store.attributes["manifest"])
    for about in before["source"]["encoders"].values():
        about.pop("compared", None)
    if difference := describe_difference(before, dict(record)):
        raise UserError(f"{store.path} was imported in another way: {difference}. Pass another --out.")
