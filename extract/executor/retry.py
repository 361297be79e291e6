"""Images that could not be encoded, tried again: they may have been downloaded, or repaired, since.

Captions are not tried again: they are in the index, which does not change.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sail_align.extract.data import Source, Status
from sail_align.extract.encoders.base import VisionEncoder
from sail_align.extract.errors import UserError
from sail_align.extract.executor.encode import Advance, Rows, encode_images
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.tally import cores
from sail_align.extract.executor.worker import Share
from sail_align.extract.sources import open_source
from sail_align.extract.store.failed import failed_counts
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import report_write_errors
from sail_align.extract.system.leases import LeaseLostError
from sail_align.extract.system.progress import note, progress
from sail_align.extract.system.signals import StoppedError, raise_on_signals

EncodeRows = Callable[[NDArray[np.int64]], Rows]
"""Encodes rows of an array, given by their numbers, rising."""


@dataclass
class Retried:
    """How many failed rows were tried, how many of them are encoded now, and the shards that were written again.

    `left` counts the shards that another process held or took.
    """

    tried: int = 0
    encoded: int = 0
    shards: int = 0
    left: int = 0

    def __str__(self) -> str:
        left = f"; {self.left} shards are in use by another process, so run it again" if self.left else ""
        if not self.tried:
            return f"no failed image to try again{left}"
        return (
            f"{self.tried:,} failed images tried again, {self.encoded:,} of them encoded now, {self.shards} shards "
            f"written{left}"
        )


def retry_shard(array: FeatureArray, shard: int, encode: EncodeRows) -> tuple[Rows | None, int]:
    """Encode the failed rows of a committed shard again; return the whole shard's rows, and how many were tried.

    Where every row fails as before, there is nothing to write: None in place of the rows.

    Raises:
        UserError: The shard would be written, and is not as it was committed: what is damaged must not be kept.
    """
    start, stop = array.span(shard)
    status = array.read_status(start, stop)
    failed = np.flatnonzero(np.isin(status, [each for each in Status if each.failed]))
    new_features, new_status = encode(start + failed)
    if (new_status == status[failed]).all():
        return None, len(failed)
    if changed := array.changed(shard):
        raise UserError(
            f"{array.path} shard {shard}: {changed} are not as committed; use `sail-extract verify --discard`."
        )
    features, _ = array.read(start, stop)
    features[failed], status[failed] = new_features, new_status
    return (features, status), len(failed)


def retry_images(
    store: Store, source: Source, encoder: VisionEncoder, share: Share | None = None, *, quiet: bool = False
) -> Retried:
    """Encode the failed images of a store again, and write each shard, whole, in which something came of it.

    A shard that another process holds is left to it.

    Raises:
        UserError: The store's features are another encoder's, a shard is damaged, or the disk is full.
    """
    array = store.add_image(encoder.identity)
    retried = Retried()
    with (
        progress(
            sum(failed_counts(array).values()), f"{store.dataset} failed images", unit="image", quiet=quiet
        ) as bar,
        ThreadPoolExecutor(max_workers=cores()) as decoders,
        report_write_errors(store.path, during_run=True),
    ):

        def encode(rows: NDArray[np.int64]) -> Rows:
            return _encode(store, source, encoder, decoders, rows, bar.update)

        try:
            for shard in (share or Share()).shards(array):
                if _has_failures(array, shard):
                    _retry_leased(store, array, shard, encode, retried)
        finally:
            store.leases.release_all()
    store.tidy()
    return retried


def retry_failed(job: Job, share: Share, device: str, *, quiet: bool = False) -> Retried:
    """Try a job's failed images again, in this process; nothing is opened where none has failed.

    Raises:
        UserError: As `retry_images`, or source or encoder cannot be had.
        StoppedError: A signal asked for it.
    """
    store = job.open_store(quiet=quiet)
    choice = job.image
    if choice is None or not any(
        failed_counts(array) for array in store.images().values() if choice.may_be(array.identity.spec)
    ):
        return Retried()
    try:
        with raise_on_signals():
            source = open_source(job.manifest, job.data_root)
            return retry_images(store, source, choice.load(device), share, quiet=quiet)
    except StoppedError as stopped:
        note(f"Stopped by {stopped.name}; run the same command again to go on.")
        raise


def _retry_leased(store: Store, array: FeatureArray, shard: int, encode: EncodeRows, retried: Retried) -> None:
    """Retry a shard under a lease of its own; the one that writers of missing shards take is held for the writing.

    (That one is not enough for the time before: while a shard is committed, whoever tidies the store removes it.)
    """
    name = f"{array.path}/{shard:05d}"
    lease = store.leases.take(f"retry/{name}")
    if lease is None:
        retried.left += 1
        return
    try:
        array.markers.pop(shard, None)  # another process may have written it since the marker was read
        if not array.refresh(shard) or not _has_failures(array, shard):
            return
        before = array.markers[shard]["counts"].get(Status.OK.label, 0)
        rows, tried = retry_shard(array, shard, encode)
        retried.tried += tried
        if rows is None:
            return
        writing = store.leases.take(name)
        try:
            if writing is None:
                raise LeaseLostError(name)
            array.write(shard, *rows, writing)
        except LeaseLostError:
            retried.left += 1
            return
        finally:
            if writing is not None:
                store.leases.release(writing)
        retried.shards += 1
        retried.encoded += array.markers[shard]["counts"].get(Status.OK.label, 0) - before
    finally:
        store.leases.release(lease)


def _has_failures(array: FeatureArray, shard: int) -> bool:
    counts = array.markers[shard]["counts"] if shard in array.markers else {}
    return any(status.failed and status.label in counts for status in Status)


def _encode(
    store: Store,
    source: Source,
    encoder: VisionEncoder,
    decoders: ThreadPoolExecutor,
    rows: NDArray[np.int64],
    advance: Advance,
) -> Rows:
    start = int(rows[0])
    samples = store.samples(start, int(rows[-1]) + 1, captions=[])
    return encode_images([samples[row - start] for row in rows.tolist()], source, encoder, decoders, advance)
