"""The feature store, format version 2. This package alone knows its layout on disk.

    cc12m.zarr/
      zarr.json                          attributes.sail: format, data set, manifest, rows, sizes, digests
      index/part-00000.parquet …         one row per sample: key, image, label, mask, url, group, captions by name
      index/sources.json                 the sources of the index: rows per part, stamps of their files
      index/recaptions.json              only if captions were joined: from which tables, to how many images
      image/<encoder>/{features,status}  (N, D) float16, (N,) uint8; the group holds the encoder's identity
      text/<encoder>/<caption>/{features,status}
                                         every group and array has a zarr.json, of which the root has a copy
      commits/<array path>/<shard>.json  written last: readers ignore a shard without a valid marker
      leases/…                           who is writing what; removed when nobody is

Row i of every array is sample i of the index. A shard is written whole, once, by one writer.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from sail_align.extract.data import CaptionTables, Part, Sample
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.errors import StoreExistsError, UserError
from sail_align.extract.store.build_index import build_index
from sail_align.extract.store.features import FeatureArray, format_1
from sail_align.extract.store.hierarchy import (
    STORE_FORMAT,
    Document,
    array_paths,
    digest_of,
    group,
    groups_above,
    read_document,
    read_root,
    write_document,
    write_root,
)
from sail_align.extract.store.index import FILE_ROWS, Index
from sail_align.extract.store.joined import JoinedArray, StoredFeatures
from sail_align.extract.store.recaptions import RecaptionReport
from sail_align.extract.store.view import StoreView
from sail_align.extract.system.difference import describe_difference
from sail_align.extract.system.files import (
    NOT_A_STORE,
    as_path,
    canonical_json,
    is_remote,
    remove_tree,
    report_read_errors,
    report_write_errors,
)
from sail_align.extract.system.leases import Lease, LeaseLostError, Leases
from sail_align.extract.system.progress import note
from sail_align.extract.system.validation import shortened

INDEX_FORMAT = 1
SHARD_ROWS = 65_536
CHUNK_ROWS = 1_024
MAX_SHARD_ROWS = 1 << 24
LEASES, INDEX, RETRY = "leases", "index", "retry"
IMPORTED = "imported"
"""Kind of the source of a store that was made of features computed elsewhere."""
UNFINISHED = re.compile(r"index|leases|\.zarr\.json\..*\.tmp")
CAPTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Store(StoreView):
    """A store on disk. Create one with `create`, open one with `open`. `StoreView` reads it as a sequence of rows.

    Attributes:
        path: The store's folder or URL.
        attributes: The attributes of its root, as in zarr.json.
        format: Version of its format. Format 1 is only read.
        rows: Number of samples.
        shard_rows: Rows per shard.
        chunk_rows: Rows per inner chunk of a shard.
        dataset: Name of the data set.
        captions: Names of the captions.
        leases: Leases on what this process writes.
        index_files: The files of the index.
    """

    def __init__(self, path: Path, attributes: dict[str, Any]):
        self.path = path
        self.attributes = attributes
        self.format: int = attributes["format"]
        self.rows: int = attributes["rows"]
        self.shard_rows: int = attributes["shard_rows"]
        self.chunk_rows: int = attributes["chunk_rows"]
        self.dataset: str = attributes["dataset"]
        self.captions: tuple[str, ...] = tuple(attributes["captions"])
        self.leases = Leases(path / LEASES)
        self.index_files = Index(path / INDEX, attributes["index_sha256"])

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
        groups: bool = False,
        shard_rows: int | None = None,
        chunk_rows: int | None = None,
        quiet: bool = False,
    ) -> "Store":
        """Write the index of a new store and, last, the attributes that make the folder a store.

        An unfinished index of the same manifest and files is resumed.

        Args:
            path: Folder or URL of the store.
            dataset: Name of the data set.
            manifest: Description of the samples, recorded in the store.
            parts: The samples, in order.
            captions: Names of the samples' own captions.
            recaptions: Tables of further captions.
            groups: Whether the index keeps the groups of the samples.
            shard_rows: Rows per shard. Defaults to 65,536, and to fewer for small data sets, so that some work is
                committed every minute there too.
            chunk_rows: Rows per chunk; a divisor of `shard_rows`. Defaults to 1,024 or `shard_rows` if that is less.
            quiet: Show no progress bars.

        Raises:
            StoreExistsError: The store exists, or another process has just created it.
            UserError: The folder holds something else, there are no samples, a key occurs twice, or a caption's name
                cannot be the name of a folder.
        """
        path = as_path(path)
        existed = path.exists()
        _require_free(path)
        names = [*captions, *(recaptions.captions if recaptions else ())]
        for name in names:
            if not CAPTION_NAME.fullmatch(name):
                raise UserError(f"Caption name {name!r} is invalid: expected letters, digits, '_' and '-'. Rename it.")
        with report_write_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        waiting = partial(note, f"{path}: waiting for another run that is building the index.")
        try:
            with Leases(path / LEASES).hold(INDEX, waiting):
                if (path / "zarr.json").exists():
                    raise StoreExistsError(f"{path} has just been created by another run. Open it.")
                (path / INDEX).mkdir(exist_ok=True)
                samples_of = {name: value for name, value in manifest.items() if name != "recaptions"}
                made_of = [INDEX_FORMAT, samples_of, list(captions)]
                index = build_index(path / INDEX, made_of, parts, captions, recaptions, groups=groups, quiet=quiet)
                rows = sum(index.rows)
                if rows == 0:
                    remove_tree(path / INDEX)
                    raise UserError(f"Data set {dataset!r} has no samples. Check the manifest's files and split.")
                shard_rows = shard_rows or _shard_rows(rows)
                chunk_rows = chunk_rows or min(CHUNK_ROWS, shard_rows)
                if shard_rows % chunk_rows:
                    raise UserError(f"shard_rows is {shard_rows}, which is not a multiple of chunk_rows, {chunk_rows}.")
                attributes = {
                    "format": STORE_FORMAT,
                    "dataset": dataset,
                    "manifest": manifest,
                    "rows": rows,
                    "shard_rows": shard_rows,
                    "chunk_rows": chunk_rows,
                    "captions": names,
                    "index_sha256": index.digests,
                    "recaptions_sha256": RecaptionReport.digest(path / INDEX),
                }
                return cls(path, write_root(path, attributes, {}))
        except Exception:
            if not existed and not is_remote(path):
                with suppress(OSError):  # not empty
                    path.rmdir()
            raise

    @classmethod
    def open(cls, path: str | Path, *, manifest: dict[str, Any] | None = None) -> "Store":
        """Open an existing store.

        Args:
            path: Folder or URL of the store.
            manifest: Description of the samples that the store must have been created with, if given.

        Raises:
            UserError: The path is not a store, has a newer format, cannot be read, or was made from another manifest.
        """
        path = as_path(path)
        attributes = read_root(path)
        try:
            _require_valid(path, attributes)
            store = cls(path, attributes)
        except (KeyError, TypeError) as problem:
            raise UserError(NOT_A_STORE.format(path=path)) from problem
        if manifest is not None and (difference := describe_difference(attributes["manifest"], manifest)):
            raise UserError(f"{path} was made from another manifest: {difference}. Pass another --out.")
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path, so that another process opens the store itself."""
        return Store.open, (self.path,)

    @property
    def is_imported(self) -> bool:
        """Whether `sail-extract import` made the store, of features that were computed elsewhere."""
        source = self.attributes["manifest"].get("source")
        return isinstance(source, dict) and source.get("kind") == IMPORTED

    def index(self, columns: list[str] | None = None, start: int = 0, stop: int | None = None) -> pa.Table:
        """Return rows start … stop − 1 of the index: key, image, label (−1: none), mask, url, and `caption.<name>`.

        A store whose manifest names groups also has the column group.
        """
        return self.index_files.read(start, self.rows if stop is None else stop, columns)

    def samples(self, start: int, stop: int, captions: Sequence[str] | None = None) -> list[Sample]:
        """Return rows start … stop − 1 of the index as samples, with the given captions (default: all)."""
        return list(self.index_files.samples(start, stop, self.captions if captions is None else captions))

    def images(self) -> dict[str, FeatureArray]:
        """Return the image arrays by encoder node name."""
        return self._arrays("image", "")

    def texts(self, caption: str) -> dict[str, FeatureArray]:
        """Return the arrays of one caption by encoder node name."""
        return self._arrays("text", caption)

    def arrays(self) -> list[FeatureArray]:
        """Return all arrays, images first."""
        return [*self.images().values(), *chain.from_iterable(self.texts(name).values() for name in self.captions)]

    def image(self, encoder: str | None = None) -> StoredFeatures:
        """Return the image array of an encoder, or the only one. `a+b` joins the features of two encoders.

        Raises:
            UserError: The store has no such array.
        """
        return self._pick(self.images(), "image features", encoder)

    def text(self, caption: str, encoder: str | None = None) -> StoredFeatures:
        """Return a caption's array of an encoder, or the only one. `a+b` joins the features of two encoders.

        Raises:
            UserError: The store has no such array.
        """
        return self._pick(self.texts(caption), f"text features of caption {caption!r}", encoder)

    def of(self, identity: Identity, caption: str = "") -> StoredFeatures | None:
        """Return the images' or a caption's features of an encoder, or of joined ones; None if some are missing."""
        arrays = self.texts(caption) if caption else self.images()
        names = [
            next((name for name, array in arrays.items() if array.identity.spec == each.spec), None)
            for each in identity.singles
        ]
        found = [arrays[name] for name in names if name is not None]
        return None if len(found) < len(names) else found[0] if len(found) == 1 else JoinedArray(found)

    def text_identity(self) -> Identity | None:
        """Return the identity of the text encoder, joined for several layers, or None unless there is exactly one."""
        arrays = chain.from_iterable(self.texts(name).values() for name in self.captions)
        found = {array.identity.spec.id: array.identity for array in arrays}
        layers = sorted(found.values(), key=lambda each: -each.spec.layer)
        is_one = len({each.spec.network_id for each in layers}) == 1
        return Identity.joined(layers) if is_one else None

    def array_paths(self) -> list[str]:
        """Return the paths of all arrays whose creation has finished, such as text/<encoder>/<caption>."""
        if self.format == STORE_FORMAT:
            return array_paths(self.attributes["metadata_sha256"])
        files = [*self.path.glob("image/*/status/zarr.json"), *self.path.glob("text/*/*/status/zarr.json")]
        skipped = len(self.path.as_posix()) + 1
        return array_paths(file.parent.as_posix()[skipped:] for file in files)

    def array(self, path: str) -> FeatureArray:
        """Return the array at a path. Raises `UserError` if one of its zarr.json is damaged."""
        modality, encoder, *_ = path.split("/")
        identity = self._identity(f"{modality}/{encoder}")
        if self.format == STORE_FORMAT:
            own = [path] if modality == "text" else []  # of an image array, `_identity` has read it
            for node in (*own, f"{path}/features", f"{path}/status"):
                self._document(node)
        index = hashlib.sha256(canonical_json(self.attributes["index_sha256"])).hexdigest()
        array = FeatureArray(self.path, path, identity, index, format_1=self.format != STORE_FORMAT)
        array.require_layout(self.rows, self.shard_rows, self.chunk_rows)
        return array

    def add(self, identity: Identity, caption: str = "") -> FeatureArray:
        """Return the array of an image encoder, or of a text encoder for a caption, creating it if needed.

        Raises:
            UserError: The store holds features of another encoder under the same name.
        """
        modality, encoder = identity.spec.modality, re.sub(r"[^\w.@+-]+", "-", identity.spec.id)  # hf:a/b@c → hf-a-b@c
        path = "/".join(filter(None, (modality, encoder, caption)))
        while path not in self.array_paths():
            if self.format != STORE_FORMAT:
                raise format_1(self.path)
            with suppress(LeaseLostError), self.leases.hold(INDEX, waiting=lambda: None) as lease:
                self.attributes = read_root(self.path)  # another process may have added it
                if path not in self.array_paths():
                    self._create_array(path, identity, lease)
        array = self.array(path)
        identity.check_matches(array.identity, where=str(self.path))
        if self.format != STORE_FORMAT and not array.complete:
            raise format_1(self.path)
        return array

    def record(self, new: Sequence[str], lease: Lease) -> None:
        """Record the zarr.json of new groups and arrays in the root, and its format.

        Args:
            new: Paths of the groups and arrays.
            lease: The lease `INDEX`, under which the attributes were read.

        Raises:
            LeaseLostError: Another process changes the root.
        """
        is_current = self.format == STORE_FORMAT
        documents = read_document(self.path)["consolidated_metadata"]["metadata"] if is_current else {}
        documents |= {node: read_document(self.path / node) for node in new if node not in documents}
        lease.confirm()
        self.attributes = write_root(self.path, {**self.attributes, "format": STORE_FORMAT}, documents)
        self.format = STORE_FORMAT

    def record_again(self, arrays: Iterable[FeatureArray]) -> None:
        """Record arrays that are missing in the root, because two processes wrote it at the same moment."""
        if self.format == STORE_FORMAT:
            self.attributes = read_root(self.path)
            for array in arrays:
                self.add(array.identity, *array.path.split("/")[2:])

    def restore(self) -> None:
        """Write each lost or damaged zarr.json of a group or array again, from its copy in the root."""
        if self.format != STORE_FORMAT:
            return
        copies = read_document(self.path)["consolidated_metadata"]["metadata"]
        for node in self.damaged_metadata():
            write_document(self.path / node, copies[node])

    def damaged_metadata(self) -> dict[str, str]:
        """Return what is wrong with each group or array whose zarr.json is lost or damaged."""
        damage = {}
        for node in self.attributes.get("metadata_sha256", ()):
            try:
                self._document(node)
            except UserError as problem:
                damage[node] = str(problem)
        return damage

    def recaptions(self) -> RecaptionReport | None:
        """Return how captions were joined from other tables, None if none were. Raises `UserError` if damaged."""
        if self.format == STORE_FORMAT and self.attributes["recaptions_sha256"] is None:
            return None
        return RecaptionReport.read(self.path / INDEX, self.attributes.get("recaptions_sha256"))

    def to_dict(self) -> dict[str, Any]:
        """Return what the store holds, ready for JSON."""
        report = self.recaptions()
        return {
            "store": str(self.path),
            "data_set": self.dataset,
            "rows": self.rows,
            "captions": list(self.captions),
            "format": self.format,
            "digest": self.digest,
            "arrays": [array.to_dict() for array in self.arrays()],
            "recaptions": asdict(report) if report else None,
        }

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of the index and of all shards, which a checkpoint records; equal in all formats."""
        return self.digest_of(self.arrays())

    def digest_of(self, arrays: Sequence[StoredFeatures]) -> str:
        """Return the SHA-256 over the digests of the index and the markers of some arrays."""
        digest = hashlib.sha256(canonical_json(self.attributes["index_sha256"]))
        for array in chain.from_iterable(each.parts for each in arrays):
            digest.update(canonical_json(array.content))
        return digest.hexdigest()

    def committed_paths(self) -> set[str]:
        """Return the paths of all arrays that have a marker, even if the array itself is missing."""
        commits = self.path / "commits"
        skipped = len(commits.as_posix()) + 1
        return {marker.parent.as_posix()[skipped:] for marker in commits.rglob("*.json")}

    def require_index(self) -> None:
        """Raise `UserError` if an index file does not have the digest recorded in the store."""
        for number in range(len(self.index_files.digests)):
            self.index_files.require_unchanged(number)

    def damaged_index_files(self) -> list[Path]:
        """Return the index files that do not have the digest recorded in the store."""
        index = self.index_files
        return [index.file(number) for number in range(len(index.digests)) if index.changed(number)]

    def _arrays(self, modality: str, caption: str) -> dict[str, FeatureArray]:
        parts = [path.split("/") for path in self.array_paths()]
        chosen = [each for each in parts if each[0] == modality and each[2:] == [caption] * (modality == "text")]
        return {each[1]: self.array("/".join(each)) for each in chosen}

    def _document(self, node: str) -> Document:
        """Return the zarr.json of a group or array. Raises `UserError` if it is not the one of which the root knows."""
        document = read_document(self.path / node)
        recorded = self.attributes.get("metadata_sha256", {}).get(node)
        if self.format == STORE_FORMAT and digest_of(document) != recorded:
            raise UserError(
                f"{self.path / node / 'zarr.json'} is damaged: its content is not what was written. Rerun "
                "`sail-extract run`, which restores it."
            )
        return document

    def _identity(self, node: str) -> Identity:
        path = self.path / node / "zarr.json"
        with report_read_errors(path):
            attributes = self._document(node)["attributes"]
            identity = Identity.from_json(attributes)
            recorded = attributes["fingerprint"]
        if identity.spec.fingerprint != recorded:
            raise UserError(f"{path} is damaged: its fingerprint is {recorded}. Restore it or make the store again.")
        return identity

    def _pick(self, arrays: dict[str, FeatureArray], what: str, encoder: str | None) -> StoredFeatures:
        if encoder is not None and encoder in arrays:
            return arrays[encoder]
        names = encoder.split("+") if encoder else []
        if len(names) > 1 and all(name in arrays for name in names):
            if len(set(names)) < len(names):
                raise UserError(f"{encoder!r} is invalid: it names an encoder twice. Name each once.")
            return JoinedArray([arrays[name] for name in names])
        if encoder is None and len(arrays) == 1:
            return next(iter(arrays.values()))
        if not arrays:
            raise UserError(f"{self.path} has no {what}. Make them with `sail-extract run`.")
        missing = next((name for name in names if name not in arrays), encoder) if len(names) > 1 else encoder
        found = f"no {what} of encoder {missing!r}" if encoder else f"{what} of several encoders"
        option = f"--{what.split()[0]}-encoder"
        joining = ", or join some with +" if len(arrays) > 1 else ""
        raise UserError(f"{self.path} has {found}. Choose one with {option}: {', '.join(arrays)}{joining}.")

    def _create_array(self, path: str, identity: Identity, lease: Lease) -> None:
        """Create an array, and record it in the root last. It can be resumed after any step."""
        node = groups_above(path)[1]
        if node in self.attributes["metadata_sha256"]:
            identity.check_matches(self._identity(node), where=str(self.path))
        for name in groups_above(path):
            if name not in self.attributes["metadata_sha256"]:
                write_document(self.path / name, group(identity.to_json() if name == node else {}))
        FeatureArray.create(self.path / path, self.rows, identity.spec.dim, self.shard_rows, self.chunk_rows)
        self.record([*groups_above(path), f"{path}/features", f"{path}/status"], lease)

    def tidy(self) -> None:
        """Remove leases that killed processes left on finished work. Those on unfinished work are taken over later."""
        arrays = {array.path: array for array in self.arrays()}
        for name in self.leases.names():
            path, _, what = name.rpartition("/")
            # Leases of other machines stay: two writers of the root, or two retries, could undo each other's work.
            if name == INDEX or name.startswith(f"{RETRY}/"):
                self.leases.remove_dead(name)
            elif not what.isdecimal() or (path in arrays and arrays[path].refresh(int(what))):
                self.leases.remove(name)
        self.leases.tidy()


def _require_free(path: Path) -> None:
    """Raise `UserError` unless a path does not exist, or holds no more than an unfinished index."""
    occupied = path.exists() and not (path.is_dir() and all(UNFINISHED.fullmatch(file.name) for file in path.iterdir()))
    if (path / "zarr.json").exists():  # checked last: another process may be creating the store
        raise StoreExistsError(f"{path} is already a store. Pass another path or remove it.")
    if occupied:
        raise UserError(f"{path} exists and is not a feature store. Pass another --out.")


def _require_valid(path: Path, attributes: dict[str, Any]) -> None:
    """Raise `UserError` unless the sizes of a store are possible and agree with each other and with its index."""
    file = path / "zarr.json"
    files = len(attributes["index_sha256"])
    ranges = {"chunk_rows": MAX_SHARD_ROWS, "shard_rows": MAX_SHARD_ROWS, "rows": files * FILE_ROWS}
    for name, most in ranges.items():
        if type(value := attributes[name]) is not int or not 0 < value <= most:
            raise UserError(f"{file} is damaged: got {name} {value!r}, expected 1 to {most:,}. Restore it.")
    if attributes["shard_rows"] % attributes["chunk_rows"]:
        raise UserError(f"{file} is damaged: its shard_rows are not a multiple of its chunk_rows. Restore it.")
    captions = attributes["captions"]
    kinds: dict[str, type] = {"dataset": str, "manifest": dict, "captions": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(attributes[name], kind)]
    if wrong or len(set(captions)) < len(captions):
        name = (*wrong, "captions")[0]
        raise UserError(f"{file} is damaged: got {name} {shortened(attributes[name])}. Restore it.")
    if wrong := [name for name in captions if not CAPTION_NAME.fullmatch(name)]:
        raise UserError(f"{file} is damaged: got the caption name {wrong[0]!r}. Restore it.")


def _shard_rows(rows: int) -> int:
    """Return the power of two that splits a data set into at least eight shards, from 256 to 65,536 rows."""
    return max(256, min(SHARD_ROWS, 1 << max(rows // 8, 1).bit_length() - 1))
