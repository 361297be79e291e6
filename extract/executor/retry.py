"""Encode failed images of a store again, since they may have been downloaded or repaired meanwhile.

Captions are not retried: they are in the index, which does not change.
"""

from dataclasses import dataclass

import numpy as np

from sail_align.extract.data import FAILURES, Status
from sail_align.extract.errors import UserError
from sail_align.extract.executor.encode import Advance, ArrayTask
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.tally import Shard, cores
from sail_align.extract.executor.worker import Share
from sail_align.extract.store.store import RETRY, Store
from sail_align.extract.system.files import report_write_errors
from sail_align.extract.system.leases import LeaseLostError
from sail_align.extract.system.progress import progress
from sail_align.extract.system.signals import RERUN, report_stop


@dataclass
class RetrySummary:
    """Counts of a retry.

    Attributes:
        tried: Failed images that were tried again.
        encoded: Those that were encoded.
        shards: Shards that were rewritten.
        left: Shards with failed images that another process holds.
    """

    tried: int = 0
    encoded: int = 0
    shards: int = 0
    left: int = 0

    def __str__(self) -> str:
        left = (
            f"; {self.left} shards are in use by another process, rerun the command to retry them" if self.left else ""
        )
        if not self.tried:
            return f"no failed images to retry{left}"
        return f"{self.tried:,} failed images retried, {self.encoded:,} encoded, {self.shards} shards rewritten{left}"


def retry_failed(job: Job, share: Share, device: str, *, quiet: bool = False) -> RetrySummary:
    """Encode a job's failed images again, in this process, and rewrite the shards in which the status of a row changes.

    Source and encoder are opened only if there are failed images. Shards that another process holds are skipped.

    Raises:
        UserError: Source or encoder is missing, a shard is damaged, or the disk is full.
        StoppedError: SIGTERM or Ctrl-C.
    """
    store, summary = job.open_store(quiet=quiet), RetrySummary()
    choice = job.image
    with report_stop(lambda: RERUN), report_write_errors(store.path, during_run=True):
        if choice is not None and any(
            array.failed_counts for array in store.images().values() if choice.matches(array.identity.spec)
        ):
            source, encoder = job.manifest.open_source(job.data_root), choice.load(device)
            task = ArrayTask.for_images(store, source, encoder, cores())
            failed = sum(sum(array.failed_counts.values()) for array in task.arrays)
            with progress(failed, f"{store.dataset} failed images", unit="image", quiet=quiet) as bar:
                try:
                    for place, array in enumerate(task.arrays):
                        for number in filter(array.has_failures, share.shards(array)):
                            _retry_shard(store, task, place, number, bar.update, summary)
                finally:
                    store.leases.release_all()
        _remove_dead_leases(store)
        store.tidy()
    return summary


def _remove_dead_leases(store: Store) -> None:
    """Remove the leases of killed retries, of which `Store.tidy` does not know whether their work is done."""
    for name in store.leases.names():
        if name.startswith(f"{RETRY}/") and (lease := store.leases.take(name)):
            store.leases.release(lease)


def _retry_shard(
    store: Store, task: ArrayTask, place: int, number: int, advance: Advance, summary: RetrySummary
) -> None:
    """Retry a shard of array `place` of a task under a lease `retry/…`, and write it under its own lease as well.

    The shard's own lease does not suffice: `Store.tidy` in another process removes it while the shard is committed.
    """
    array = task.arrays[place]
    shard = Shard(array.path, number)
    try:
        with store.leases.hold(f"{RETRY}/{shard.lease}"):
            array.markers.pop(shard.number, None)  # another process may have rewritten the shard since it was read
            if not array.refresh(shard.number) or not array.has_failures(shard.number):
                return
            start, stop = array.span(shard.number)
            status = array.read_status(start, stop)
            failed = np.flatnonzero(np.isin(status, FAILURES))
            new = task.encode((start + failed).tolist(), advance)[place]
            summary.tried += len(failed)
            if (new.status == status[failed]).all():
                return
            if changed := array.changed(shard.number):  # damage must not be committed again
                raise UserError(
                    f"{shard} is damaged: its {changed} are not those that were committed. "
                    "Use `sail-extract verify --discard`."
                )
            features, _ = array.read(start, stop)
            features[failed], status[failed] = new
            with store.leases.hold(shard.lease) as lease:
                array.write(shard.number, features, status, lease)
            summary.shards += 1
            summary.encoded += int((new.status == Status.OK).sum())
    except LeaseLostError:
        summary.left += 1
