"""A picklable description of one extraction, from which any process can open source, store and encoders."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from sail_align.extract.data import Source
from sail_align.extract.encoders.base import EncoderSpec, TextEncoder, VisionEncoder
from sail_align.extract.encoders.catalogue import TextEntry, VisionEntry, find_text, find_vision
from sail_align.extract.encoders.load import load_image_encoder, load_text_encoder
from sail_align.extract.executor.encode import Advance, ArrayTask, EncodedRows
from sail_align.extract.executor.worker import Share
from sail_align.extract.manifest import Manifest
from sail_align.extract.sources import open_source
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.open_or_create import open_existing, open_or_create
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import report_write_errors

Encoder = TypeVar("Encoder", covariant=True)


class EncoderChoice(Protocol[Encoder]):
    """A picklable description of an encoder, which a worker loads."""

    def load(self, device: str) -> Encoder:
        """Load the encoder. Raises `UserError` if it is not available."""

    def matches(self, spec: EncoderSpec) -> bool:
        """Return whether `load` would return the encoder of this spec, as far as is known without loading it."""


@dataclass(frozen=True)
class _NamedEncoder:
    name: str
    pooling: str | None = None
    precision: str = "float32"
    trust_remote_code: bool = False
    compiled: bool = False

    def _matches(self, spec: EncoderSpec, entry: VisionEntry | TextEntry) -> bool:
        revision = getattr(entry.origin, "revision", None)
        return (
            spec.id in (self.name, self.name.partition("@")[0])
            and spec.precision == self.precision
            and (self.pooling or entry.pooling) in (None, spec.pooling)
            and revision in (None, spec.source.get("revision"))
        )


@dataclass(frozen=True)
class NamedImageEncoder(_NamedEncoder):
    """An image encoder by its name and options, which are those of `load_image_encoder`."""

    fast_jpeg: bool = False

    def load(self, device: str) -> VisionEncoder:
        """Load the encoder. Raises `UserError` if it is not available."""
        return load_image_encoder(**asdict(self), device=device)

    def matches(self, spec: EncoderSpec) -> bool:
        """Return whether name, pooling, precision, pinned revision and JPEG decoding are those of the spec."""
        return self._matches(spec, find_vision(self.name)) and self.fast_jpeg == ("jpeg_least" in spec.preprocessing)


@dataclass(frozen=True)
class NamedTextEncoder(_NamedEncoder):
    """A text encoder by its name and options, which are those of `load_text_encoder`."""

    @classmethod
    def recorded(cls, store: Store) -> "NamedTextEncoder | None":
        """Return the text encoder of a store, or None unless it has exactly one."""
        found = {
            array.identity.spec.id: array.identity for name in store.captions for array in store.texts(name).values()
        }
        if len(found) != 1:
            return None
        ((name, identity),) = found.items()
        if identity.location:
            name = f"hf:{identity.location}"
        elif name.startswith("hf:"):
            name = f"{name}@{identity.spec.source['revision']}"
        return cls(name, identity.spec.pooling, identity.spec.precision)

    def load(self, device: str) -> TextEncoder:
        """Load the encoder. Raises `UserError` if it is not available."""
        return load_text_encoder(**asdict(self), device=device)

    def matches(self, spec: EncoderSpec) -> bool:
        """Return whether name, pooling, precision and pinned revision are those of the spec."""
        return self._matches(spec, find_text(self.name))


@dataclass(frozen=True)
class Job:
    """One extraction: a data set, its store, and the encoders.

    Args:
        manifest: Describes the data set.
        data_root: Folder of the manifest's files.
        store: Path of the store.
        image: Image encoder; None leaves images out.
        text: Text encoder; None leaves captions out.
        captions: Names of the captions to encode.
    """

    manifest: Manifest
    data_root: Path
    store: Path
    image: EncoderChoice[VisionEncoder] | None
    text: EncoderChoice[TextEncoder] | None
    captions: tuple[str, ...]

    @property
    def arrays(self) -> int:
        """The number of arrays that the job fills."""
        return (self.image is not None) + (len(self.captions) if self.text is not None else 0)

    def open_source(self) -> Source:
        """Open the data set. Raises `UserError` if that fails."""
        return open_source(self.manifest, self.data_root)

    def open_store(self, *, quiet: bool = False) -> Store:
        """Open the store, or create it. An existing store is opened without its source if the job has no images.

        Raises:
            UserError: Source or store cannot be opened, or do not match, or the disk is full.
        """
        if self.image is None and (self.store / "zarr.json").exists():
            return open_existing(self.store, self.manifest)
        with report_write_errors(self.store, during_run=True):
            return open_or_create(self.store, self.manifest, self.open_source(), quiet=quiet)

    def tasks(self, store: Store, share: Share, device: str, threads: int) -> list[ArrayTask]:
        """Return a task for each array of the job. Load only the encoders for which a share has shards left.

        The source is opened only if images are left.

        Raises:
            UserError: Source or encoder is missing, or the store holds features of another encoder under its name.
        """
        tasks = []
        if self.image is not None:
            tasks += _completed([store.images()], self.image, share) or [
                ArrayTask.for_images(store, self.open_source(), self.image.load(device), threads)
            ]
        if self.text is not None:
            if completed := _completed([store.texts(name) for name in self.captions], self.text, share):
                return tasks + completed
            encoder = self.text.load(device)
            tasks += [ArrayTask.for_captions(store, name, encoder) for name in self.captions]
        return tasks


def _completed(
    found: Sequence[Mapping[str, FeatureArray]],
    choice: EncoderChoice[VisionEncoder] | EncoderChoice[TextEncoder],
    share: Share,
) -> list[ArrayTask]:
    """Return tasks without an encoder if every array exists and the share is committed in each, else none."""

    def encode(rows: Sequence[int], advance: Advance) -> EncodedRows:
        raise RuntimeError("no encoder was loaded, because all shards were committed")

    arrays = [array for group in found for array in group.values() if choice.matches(array.identity.spec)]
    if len(arrays) < len(found) or not all(shard in array.markers for array in arrays for shard in share.shards(array)):
        return []
    return [ArrayTask(array, encode) for array in arrays]
