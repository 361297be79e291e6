"""The feature store, format version 1. This file and features.py are all that knows the layout on disk.

    cc12m.zarr/
      zarr.json                          attributes.sail: format, data set, manifest, rows, sizes, index digests
      index/part-00000.parquet …         one row a sample: key, image, label, mask, url, captions by name
      index/sources.json                 what the index was read from: rows a part, stamps of its files
      index/recaptions.json              where captions were joined: from which tables, to how many images
      image/<encoder>/{features,status}  (N, D) float16, (N,) uint8; the group holds the encoder's identity
      text/<encoder>/<caption>/{features,status}
      commits/<array path>/<shard>.json  written last: a shard without a valid marker does not exist for any reader
      leases/…                           who writes what just now; gone when nobody does

Row i of every array is sample i of the index. A shard is written once, whole, by one writer.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from sail_align.extract.data import CaptionTables, Part, Sample
from sail_align.extract.encoders.base import Identity, require_same
from sail_align.extract.errors import StoreExistsError, UserError
from sail_align.extract.store.build_index import write_index
from sail_align.extract.store.features import FeatureArray, read_identity
from sail_align.extract.store.index import FIELDS, GROUP_ROWS, caption_column, index_file, read_index
from sail_align.extract.system.files import (
    as_path,
    broken,
    canonical_json,
    file_digest,
    made_folder,
    no_store,
    remove_tree,
    write_atomically,
)
from sail_align.extract.system.leases import Leases
from sail_align.extract.system.progress import note

FORMAT = 1
SHARD_ROWS = 65_536
CHUNK_ROWS = 1_024
LEASES, INDEX, ARRAY = "leases", "index", "array"
UNFINISHED = re.compile(r"index|leases|\.zarr\.json\..*\.tmp")
CAPTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Store:
    """A store on disk. Make one with `create`, open one with `open`."""

    def __init__(self, path: Path, attributes: dict[str, Any]):
        self.path = path
        self.attributes = attributes
        self.rows: int = attributes["rows"]
        self.shard_rows: int = attributes["shard_rows"]
        self.chunk_rows: int = attributes["chunk_rows"]
        self.dataset: str = attributes["dataset"]
        self.captions: tuple[str, ...] = tuple(attributes["captions"])
        self.leases = Leases(path / LEASES)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        dataset: str,
        manifest: dict[str, Any],
        parts: Sequence[Part],
        captions: Sequence[str],
        recaptions: CaptionTables | None = None,
        shard_rows: int | None = None,
        chunk_rows: int | None = None,
        quiet: bool = False,
    ) -> "Store":
        """Write the index of a new store and, last, the attributes that make the folder a store.

        An index that was begun and not finished is gone on with, if it was of the same manifest and files.

        Sizes default to shards of 65,536 rows in chunks of 1,024, and to less for small data sets, so that some work is
        committed every minute there too.

        Raises:
            StoreExistsError: The store is there, or another process was at it already; its end was waited for.
            UserError: The folder holds something else, there is no sample, a key occurs twice, or a caption's name
                cannot name a folder.
        """
        path = as_path(path)
        occupied = path.exists() and not (
            path.is_dir() and all(UNFINISHED.fullmatch(file.name) for file in path.iterdir())
        )
        if (path / "zarr.json").exists():  # looked for last: another process may be making the store
            raise StoreExistsError(f"{path} is a store already; name another path or remove it.")
        if occupied:
            raise UserError(f"{path} exists and is not a feature store; name another --out.")
        names = [*captions, *(recaptions.captions if recaptions else ())]
        for name in names:
            if not CAPTION_NAME.fullmatch(name):
                raise UserError(f"Caption name {name!r} may hold only letters, digits, '_' and '-'; rename it.")
        waiting = partial(note, f"{path}: another run is building the index; waiting for it.")
        with made_folder(path), Leases(path / LEASES).hold(INDEX, waiting):
            if (path / "zarr.json").exists():
                raise StoreExistsError(f"{path} has just been made by another run; open it.")
            (path / "index").mkdir(exist_ok=True)
            samples_of = {name: value for name, value in manifest.items() if name != "recaptions"}
            made_of = [FORMAT, samples_of, list(captions)]
            index = write_index(path / "index", made_of, parts, captions, recaptions, quiet=quiet)
            rows = sum(index.rows)
            if rows == 0:
                remove_tree(path / "index")
                raise UserError(f"Data set {dataset!r} has no samples; check the manifest's files and split.")
            shard_rows = shard_rows or _shard_rows(rows)
            chunk_rows = chunk_rows or min(CHUNK_ROWS, shard_rows)
            if shard_rows % chunk_rows:
                raise UserError(f"A shard of {shard_rows} rows is no multiple of its chunks of {chunk_rows} rows.")
            attributes = {
                "format": FORMAT,
                "dataset": dataset,
                "manifest": manifest,
                "rows": rows,
                "shard_rows": shard_rows,
                "chunk_rows": chunk_rows,
                "captions": names,
                "index_sha256": index.digests,
            }
            root = {"zarr_format": 3, "node_type": "group", "attributes": {"sail": attributes}}
            write_atomically(path / "zarr.json", canonical_json(root))
            return cls(path, attributes)

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Open an existing store.

        Raises:
            UserError: The path is not a store, or one of a later format, or it cannot be read.
        """
        path = as_path(path)
        try:
            attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]["sail"]
            if (version := attributes["format"]) != FORMAT:
                raise UserError(f"{path} has store format {version!r}, this version reads {FORMAT}; update sail-align.")
            return cls(path, attributes)
        except (FileNotFoundError, NotADirectoryError, KeyError, TypeError) as problem:
            raise no_store(path) from problem
        except (OSError, ValueError) as problem:  # a disk that is gone, or not ours: the store may well be there
            raise broken(path / "zarr.json", problem) from problem

    def index(self, columns: list[str] | None = None, start: int = 0, stop: int | None = None) -> pa.Table:
        """Return rows start … stop − 1 of the index: key, image, label (−1: none), mask, url, and `caption.<name>`."""
        stop = self.rows if stop is None else stop
        return read_index(self.path / "index", start, stop, columns)

    def samples(self, start: int, stop: int, captions: Sequence[str] | None = None) -> list[Sample]:
        """Return rows start … stop − 1 of the index as samples, with these captions of theirs (default: all)."""
        names = self.captions if captions is None else tuple(captions)
        columns = [*FIELDS.names, *map(caption_column, names)]
        samples: list[Sample] = []
        for first in range(start, stop, GROUP_ROWS):
            samples += [
                Sample(
                    key=row["key"],
                    image=row["image"],
                    captions={name: text for name in names if (text := row[caption_column(name)]) is not None},
                    label=row["label"],
                    mask=row["mask"],
                    url=row["url"],
                )
                for row in self.index(columns, first, min(first + GROUP_ROWS, stop)).to_pylist()
            ]
        return samples

    def images(self) -> dict[str, FeatureArray]:
        """The image arrays by encoder node name."""
        return {
            node.name: self._array(f"image/{node.name}", node)
            for node in self._nodes("image")
            if FeatureArray.exists(node)
        }

    def texts(self, caption: str) -> dict[str, FeatureArray]:
        """The arrays of one caption by encoder node name."""
        return {
            node.name: self._array(f"text/{node.name}/{caption}", node)
            for node in self._nodes("text")
            if FeatureArray.exists(node / caption)
        }

    def arrays(self) -> list[FeatureArray]:
        """All arrays, images first."""
        return [*self.images().values(), *chain.from_iterable(self.texts(name).values() for name in self.captions)]

    def image(self, encoder: str | None = None) -> FeatureArray:
        """Return the image array of an encoder, or the only one. Raises `UserError` if there is no such array."""
        return self._pick(self.images(), "image features", encoder)

    def text(self, caption: str, encoder: str | None = None) -> FeatureArray:
        """Return a caption's array of an encoder, or the only one. Raises `UserError` if there is no such array."""
        return self._pick(self.texts(caption), f"text features of caption {caption!r}", encoder)

    def add_image(self, identity: Identity) -> FeatureArray:
        """Return the image array of this encoder, made if it is not there. Raises `UserError` for another's node."""
        return self._add("image", identity, "")

    def add_text(self, identity: Identity, caption: str) -> FeatureArray:
        """Return a caption's array of this encoder, made if it is not there. Raises `UserError` for another's node."""
        return self._add("text", identity, caption)

    @property
    def digest(self) -> str:
        """SHA-256 over the index's digests and all markers: what a checkpoint records."""
        return self.digest_of(self.arrays())

    def digest_of(self, arrays: Sequence[FeatureArray]) -> str:
        """Return the SHA-256 over the index's digests and the markers of some arrays."""
        digest = hashlib.sha256(canonical_json(self.attributes["index_sha256"]))
        for array in arrays:
            digest.update(canonical_json([array.path, sorted(array.markers.items())]))
        return digest.hexdigest()

    def committed_paths(self) -> set[str]:
        """Return the paths of all arrays that have a marker, whether they are there or not."""
        commits = self.path / "commits"
        skipped = len(commits.as_posix()) + 1
        return {marker.parent.as_posix()[skipped:] for marker in commits.rglob("*.json")}

    def damaged_index_files(self) -> list[str]:
        """Recompute the index files' hashes; return those that are not as they were written."""
        return [
            str(file)
            for part, expected in enumerate(self.attributes["index_sha256"])
            if file_digest(file := index_file(self.path / "index", part)) != expected
        ]

    def _nodes(self, modality: str) -> list[Path]:
        return sorted((meta.parent for meta in (self.path / modality).glob("*/zarr.json")), key=str)

    def _array(self, path: str, node: Path) -> FeatureArray:
        return FeatureArray(self.path, path, read_identity(node))

    def _pick(self, arrays: dict[str, FeatureArray], what: str, encoder: str | None) -> FeatureArray:
        if encoder is not None and encoder in arrays:
            return arrays[encoder]
        if encoder is None and len(arrays) == 1:
            return next(iter(arrays.values()))
        asked = f"of encoder {encoder!r} " if encoder else ""
        there = ", ".join(arrays) or "none"
        raise UserError(
            f"{self.path} has no single array of {what} {asked}(encoders there: {there}); name one of them."
        )

    def _add(self, modality: str, identity: Identity, caption: str) -> FeatureArray:
        node = self.path / modality / node_name(identity.spec.id)
        folder = node / caption if caption else node
        path = "/".join(filter(None, (modality, node.name, caption)))
        if not FeatureArray.exists(folder):
            with self.leases.hold(f"{modality}/{node.name}/{ARRAY}", waiting=lambda: None):
                if not FeatureArray.exists(folder):
                    self._lay_out(node, folder, identity)
        require_same(identity, read_identity(node), where=str(self.path))
        return self._array(path, node)

    def _lay_out(self, node: Path, folder: Path, identity: Identity) -> None:
        """Write what makes a folder an array, in an order that lets it be taken up after any part."""
        if (node / "zarr.json").exists():
            require_same(identity, read_identity(node), where=str(self.path))
        groups: dict[Path, dict[str, Any]] = {folder: {}, node: identity.to_json()}  # an image array is its node
        for group, attributes in groups.items():
            if not (group / "zarr.json").exists():
                content = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
                write_atomically(group / "zarr.json", canonical_json(content))
        FeatureArray.create(folder, self.rows, identity.spec.dim, self.shard_rows, self.chunk_rows)

    def tidy(self) -> None:
        """Remove what killed processes left: leases of what is done. The others' are taken over in time."""
        arrays = {array.path: array for array in self.arrays()}
        for name in self.leases.names():
            path, _, what = name.rpartition("/")
            if what in (INDEX, ARRAY) or (path in arrays and arrays[path].refresh(int(what))):
                self.leases.remove(name)
        self.leases.tidy()


def node_name(encoder_id: str) -> str:
    """Return an encoder's id as the name of its node: `hf:org/model@rev` → `hf-org-model@rev`."""
    return re.sub(r"[^\w.@+-]+", "-", encoder_id)


def _shard_rows(rows: int) -> int:
    """Return the power of two that cuts a data set into at least eight shards, between 256 and 65,536 rows."""
    return max(256, min(SHARD_ROWS, 1 << max(rows // 8, 1).bit_length() - 1))
