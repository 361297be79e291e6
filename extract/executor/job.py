"""A job: what a process anywhere needs to open source, store and encoders, and nothing that cannot be sent to it."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sail_align.extract.data import Source
from sail_align.extract.encoders.base import EncoderSpec, TextEncoder, VisionEncoder
from sail_align.extract.encoders.catalogue import TextEntry, VisionEntry, find_text, find_vision
from sail_align.extract.encoders.load import load_image_encoder, load_text_encoder
from sail_align.extract.executor.encode import Advance, Rows, encode_images, encode_texts
from sail_align.extract.executor.worker import Share, Task
from sail_align.extract.manifest import Manifest
from sail_align.extract.sources import open_source
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.open_or_create import open_made_from, open_or_create
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import report_write_errors

Encoder = TypeVar("Encoder", covariant=True)


class Choice(Protocol[Encoder]):
    """What loads an encoder; small, and can be pickled."""

    def load(self, device: str) -> Encoder:
        """Load the encoder. Raises `UserError` if it cannot be had."""

    def may_be(self, spec: EncoderSpec) -> bool:
        """Whether `load` would give the encoder of this spec, as far as can be told without loading it."""


@dataclass(frozen=True)
class NamedEncoder:
    """An encoder by its name in the catalogue, or `hf:…`, or `timm:…`, with the options of `encoders.load`."""

    name: str
    pooling: str | None = None
    precision: str = "float32"
    trust_remote_code: bool = False
    compiled: bool = False

    def _options(self, device: str) -> dict[str, Any]:
        return {
            "pooling": self.pooling,
            "precision": self.precision,
            "trust_remote_code": self.trust_remote_code,
            "compiled": self.compiled,
            "device": device,
        }

    def _fits(self, spec: EncoderSpec, entry: VisionEntry | TextEntry) -> bool:
        revision = getattr(entry.origin, "revision", None)
        return (
            spec.id in (self.name, self.name.partition("@")[0])
            and spec.precision == self.precision
            and (self.pooling or entry.pooling) in (None, spec.pooling)
            and revision in (None, spec.source.get("revision"))
        )


@dataclass(frozen=True)
class NamedImageEncoder(NamedEncoder):
    """An image encoder."""

    fast_jpeg: bool = False

    def load(self, device: str) -> VisionEncoder:
        """Load it. Raises `UserError` if it cannot be had."""
        return load_image_encoder(self.name, **self._options(device), fast_jpeg=self.fast_jpeg)

    def may_be(self, spec: EncoderSpec) -> bool:
        """Whether name, pooling, precision, a pinned revision and the decoding are those of the spec."""
        return self._fits(spec, find_vision(self.name)) and self.fast_jpeg == ("jpeg_least" in spec.preprocessing)


class NamedTextEncoder(NamedEncoder):
    """A text encoder."""

    def load(self, device: str) -> TextEncoder:
        """Load it. Raises `UserError` if it cannot be had."""
        return load_text_encoder(self.name, **self._options(device))

    def may_be(self, spec: EncoderSpec) -> bool:
        """Whether name, pooling, precision and a pinned revision are those of the spec."""
        return self._fits(spec, find_text(self.name))


@dataclass(frozen=True)
class Job:
    """What to encode, by which encoders, into which store; `image` or `text` None leaves that modality out."""

    manifest: Manifest
    data_root: Path
    store: Path
    image: Choice[VisionEncoder] | None
    text: Choice[TextEncoder] | None
    captions: tuple[str, ...]

    @property
    def arrays(self) -> int:
        """The number of arrays that the job fills."""
        return (self.image is not None) + (len(self.captions) if self.text is not None else 0)

    def open_store(self, *, quiet: bool = False) -> Store:
        """Open the store, or make it if it is not there.

        A job without images on a store that is there has no need of the source, which is not opened.

        Raises:
            UserError: Source or store cannot be opened, or do not go with each other, or the disk is full.
        """
        if self.image is None and (self.store / "zarr.json").exists():
            return open_made_from(self.store, self.manifest)
        with report_write_errors(self.store, during_run=True):
            return open_or_create(self.store, self.manifest, open_source(self.manifest, self.data_root), quiet=quiet)

    def tasks(self, store: Store, share: Share, device: str, decoders: ThreadPoolExecutor) -> list[Task]:
        """Return what is to be done for a share of the store, with those encoders loaded that have something left.

        Neither source nor image encoder is opened where the images are done already, and the text encoder likewise.

        Raises:
            UserError: Source or encoder cannot be had, or the store holds features of another encoder under its name.
        """
        tasks = []
        if self.image is not None:
            done = _done([store.images()], self.image, share)
            if not done:
                source, encoder = open_source(self.manifest, self.data_root), self.image.load(device)
                tasks.append(image_task(store, source, encoder, decoders))
            tasks += done
        if self.text is not None:
            done = _done([store.texts(name) for name in self.captions], self.text, share)
            if not done:
                reader = self.text.load(device)
                tasks += [text_task(store, name, reader) for name in self.captions]
            tasks += done
        return tasks


def only_text_encoder(store: Store) -> tuple[str, str, str] | None:
    """Return name, pooling and precision of a store's text encoder, None unless it has exactly one."""
    found = {array.identity.spec.id: array.identity for name in store.captions for array in store.texts(name).values()}
    if len(found) != 1:
        return None
    ((name, identity),) = found.items()
    if identity.location:
        name = f"hf:{identity.location}"
    elif name.startswith("hf:"):
        name = f"{name}@{identity.spec.source['revision']}"
    return name, identity.spec.pooling, identity.spec.precision


def image_task(store: Store, source: Source, encoder: VisionEncoder, decoders: ThreadPoolExecutor) -> Task:
    """Return the encoding of a store's images, with the array made if it is not there.

    Raises:
        UserError: The store holds features of another encoder under the same name.
    """

    def encode(start: int, stop: int, advance: Advance) -> Rows:
        return encode_images(store.samples(start, stop, captions=[]), source, encoder, decoders, advance)

    return Task(store.add_image(encoder.identity), encode)


def text_task(store: Store, caption: str, encoder: TextEncoder) -> Task:
    """Return the encoding of one of a store's captions; the rest as `image_task`."""
    column = f"caption.{caption}"

    def encode(start: int, stop: int, advance: Advance) -> Rows:
        return encode_texts(store.index([column], start, stop)[column].to_pylist(), encoder, advance)

    return Task(store.add_text(encoder.identity, caption), encode)


def _done(
    there: Sequence[Mapping[str, FeatureArray]], choice: Choice[VisionEncoder] | Choice[TextEncoder], share: Share
) -> list[Task]:
    """Return tasks with nothing left to encode if each of the arrays is done already, else none."""
    arrays = [array for group in there for array in group.values() if choice.may_be(array.identity.spec)]
    if len(arrays) < len(there) or not all(shard in array.markers for array in arrays for shard in share.shards(array)):
        return []
    return [Task(array, None) for array in arrays]
