"""Which process does which shard, and what it cost: here, in this process; elsewhere, in a crew of workers."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from sail_align.extract.costs import Summary, Tally, cores
from sail_align.extract.encoders.base import TextEncoder, VisionEncoder
from sail_align.extract.job import Job, image_task, text_task
from sail_align.extract.memory import keep_freed_memory
from sail_align.extract.sources.base import Source
from sail_align.extract.stop import StoppedError
from sail_align.extract.store import Store
from sail_align.extract.worker import Share, work


def extract(
    store: Store,
    source: Source,
    *,
    image: VisionEncoder | None,
    text: TextEncoder | None,
    captions: Sequence[str],
    quiet: bool = False,
) -> Summary:
    """Fill a store in this process: the images by `image`, each of `captions` by `text`; None leaves them out.

    Only shards without a valid marker are done, so a call that was stopped is taken up by calling again.

    Raises:
        UserError: The store holds features of another encoder under the same name, or the disk is full.
    """
    keep_freed_memory()
    arrays = (image is not None) + (len(captions) if text is not None else 0)
    with (
        Tally(arrays * store.rows, store.dataset, quiet=quiet) as tally,
        ThreadPoolExecutor(max_workers=cores()) as decoders,
    ):
        tasks = [] if image is None else [image_task(store, source, image, decoders)]
        tasks += [] if text is None else [text_task(store, name, text) for name in captions]
        work(store, tasks, tally)
        return tally.summary(cores(), "core")


class Crew(Protocol):
    """The workers of a run."""

    @property
    def size(self) -> int:
        """The number of workers."""

    @property
    def hardware(self) -> tuple[int, str]:
        """What the run costs an hour of: how many, and of what: GPU or core."""

    def work(self, job: Job, share: Share, tally: Tally) -> None:
        """Do a share of a job, whose store is there. What it raises is said at `run`."""


def run(job: Job, store: Store, crew: Crew, share: Share, *, quiet: bool = False) -> Summary:
    """Do a job's share of its store, and log what it cost.

    Raises:
        UserError: An encoder cannot be had, the store holds another's features under its name, or the disk is full.
        WorkersFailedError: Shards are left because workers failed.
        StoppedError: A signal asked for it; what is left has been said.
    """
    end = "failed"
    with Tally(job.arrays * share.rows(store), store.dataset, quiet=quiet, workers=crew.size) as tally:
        try:
            crew.work(job, share, tally)
            end = "done"
        except StoppedError as stopped:
            end = stopped.name
            raise
        finally:
            summary = tally.summary(*crew.hardware)
            if end != "failed" or summary.encoded:
                summary.append_to_log(store.path, end)
    return summary
