"""Which process does which shard, and what it cost: here, in this process; elsewhere, in a crew of workers."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from sail_align.extract.data import Source
from sail_align.extract.encoders.base import TextEncoder, VisionEncoder
from sail_align.extract.errors import UserError
from sail_align.extract.executor.job import Job, image_task, text_task
from sail_align.extract.executor.tally import Summary, Tally, cores
from sail_align.extract.executor.worker import Share, work
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import report_write_errors
from sail_align.extract.system.memory import keep_freed_memory
from sail_align.extract.system.progress import note
from sail_align.extract.system.signals import StoppedError, raise_on_signals


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
        report_write_errors(store.path, during_run=True),
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


def ray_crew(address: str | None, workers: str, device: str) -> Crew:
    """Return a crew on a Ray cluster. Raises `UserError` if Ray is not installed."""
    try:
        from sail_align.extract.executor.ray_cluster import RayCrew
    except ImportError as problem:
        raise UserError("--engine ray needs Ray; install it with: pip install 'sail-align[ray]'.") from problem
    return RayCrew(address, workers, device)


def run(
    job: Job,
    crew: Crew,
    share: Share,
    opened: Callable[[Store], object] = lambda store: None,
    *,
    quiet: bool = False,
) -> Summary:
    """Do a share of a job by a crew, and log what it cost. SIGTERM and Ctrl-C end it within seconds, with a sentence.

    `opened` is shown the store before anything is encoded.

    Raises:
        UserError: Source, store or an encoder cannot be had, or do not go with each other, or the disk is full.
        WorkersFailedError: Shards are left because workers failed.
        StoppedError: A signal asked for it.
    """
    try:
        with raise_on_signals():
            store = job.open_store(quiet=quiet)
            opened(store)
            with Tally(job.arrays * share.rows(store), store.dataset, quiet=quiet, workers=crew.size) as tally:
                return _do(job, store, crew, share, tally)
    except StoppedError as stopped:
        note(f"Stopped by {stopped.name}{stopped.left}; run the same command again to go on.")
        raise


def _do(job: Job, store: Store, crew: Crew, share: Share, tally: Tally) -> Summary:
    end = "failed"
    try:
        crew.work(job, share, tally)
        end = "done"
    except StoppedError as stopped:
        end = stopped.name
        stopped.left = f": {tally.summary(*crew.hardware).rest}"
        raise
    finally:
        summary = tally.summary(*crew.hardware)
        if summary.encoded:
            summary.append_to_log(store.path, end)
    return summary
