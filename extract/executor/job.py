"""A picklable description of one extraction, from which any process can open source, store and encoders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sail_align.extract.encoders.load import EncoderConfig, ImageEncoderConfig, TextEncoderConfig
from sail_align.extract.executor.encode import Advance, ArrayTask, EncodedRows
from sail_align.extract.executor.tally import Event
from sail_align.extract.executor.worker import Share, Worker
from sail_align.extract.manifest import Manifest
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.open_or_create import open_or_create
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import report_write_errors


@dataclass(frozen=True)
class Job:
    """One extraction: a data set, its store, and the encoders.

    Attributes:
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
    image: ImageEncoderConfig | None
    text: TextEncoderConfig | None
    captions: tuple[str, ...]

    @property
    def arrays(self) -> int:
        """The number of arrays that the job fills."""
        images = len(self.image.layers) if self.image is not None else 0
        return images + (len(self.captions) * len(self.text.layers) if self.text is not None else 0)

    def open_store(self, *, quiet: bool = False) -> Store:
        """Open the store, or create it, and restore its metadata if need be. Only a job with images opens the source.

        Raises:
            UserError: Source or store cannot be opened, or do not match, or the disk is full.
        """
        with report_write_errors(self.store, during_run=True):
            if self.image is None and (self.store / "zarr.json").exists():
                store = Store.open(self.store, manifest=self.manifest.rows)
            else:
                source = self.manifest.open_source(self.data_root)
                store = open_or_create(self.store, self.manifest, source, quiet=quiet)
            store.restore()
        return store

    def worker(self, share: Share, device: str, threads: int, send: Callable[[Event], object]) -> Worker:
        """Return a worker with a task for each array of the job.

        Only the encoders for which the share has shards left are loaded. The source is opened only if images are left.

        Raises:
            UserError: Source or encoder is missing, the store holds features of another encoder under its name, or the
                disk is full.
        """
        store = Store.open(self.store)
        images: list[ArrayTask] = []
        captions: list[ArrayTask] = []
        with report_write_errors(self.store, during_run=True):
            if self.image is not None:
                images = _completed([store.images()], self.image, share)
                if not images:
                    source = self.manifest.open_source(self.data_root)
                    images = [ArrayTask.for_images(store, source, self.image.load(device), threads)]
            if self.text is not None:
                captions = _completed([store.texts(name) for name in self.captions], self.text, share)
                if not captions:
                    encoder = self.text.load(device)
                    captions = [ArrayTask.for_caption(store, name, encoder) for name in self.captions]
            return Worker(store, images + captions, send, share)


def _completed(found: Sequence[Mapping[str, FeatureArray]], choice: EncoderConfig, share: Share) -> list[ArrayTask]:
    """Return tasks without an encoder if every array exists and the share is committed in each, else none."""

    def encode(rows: Sequence[int], advance: Advance) -> list[EncodedRows]:
        raise RuntimeError("no encoder was loaded, because all shards were committed")

    arrays = [array for group in found for array in group.values() if choice.matches(array.identity.spec)]
    are_there = len(arrays) >= len(found) * len(choice.layers)
    if not are_there or not all(shard in array.markers for array in arrays for shard in share.shards(array)):
        return []
    return [ArrayTask((array,), encode) for array in arrays]
