"""The entry points of an extraction: `run_job` runs a job on an executor, `extract` encodes in this process.

The other modules of this folder:

- `job`: the picklable description of an extraction, from which any process opens source, store and encoders.
- `local` and `ray_cluster`: the executors. They start workers on this machine or on a Ray cluster.
- `worker`: the loop of one worker over its shards.
- `encode`: the rows of a shard, read, decoded and encoded.
- `tally`: the workers' events, counted for the progress bar, the summary and the log.
- `retry`: failed images of a store, encoded again.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from sail_align.extract.data import Source
from sail_align.extract.encoders.text import TextEncoder
from sail_align.extract.encoders.vision import VisionEncoder
from sail_align.extract.executor.encode import ArrayTask
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.tally import Summary, Tally, cores
from sail_align.extract.executor.worker import Share, Worker
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import report_write_errors
from sail_align.extract.system.signals import RERUN, StoppedError, report_stop

if TYPE_CHECKING:
    from sail_align.extract.executor.local import LocalExecutor
    from sail_align.extract.executor.ray_cluster import RayCluster


def run_job(
    job: Job,
    executor: "LocalExecutor | RayCluster",
    share: Share,
    on_open: Callable[[Store], object] = lambda store: None,
    *,
    quiet: bool = False,
) -> Summary:
    """Encode a share of a job with an executor and log its cost. SIGTERM and Ctrl-C end the run within seconds.

    Shards that are committed already are skipped. If a run is stopped, the next one continues where it was.

    Args:
        job: The extraction.
        executor: Runs the workers.
        share: Part of the shards to encode.
        on_open: Called with the store before anything is encoded.
        quiet: Show no progress bars.

    Raises:
        UserError: Source, store or an encoder is missing, or does not fit the others, or the disk is full.
        WorkersFailedError: Shards are left because workers failed.
        StoppedError: SIGTERM or Ctrl-C.
    """
    with report_stop(lambda: RERUN):
        store = job.open_store(quiet=quiet)
        on_open(store)
        with closing(Tally(job.arrays * share.rows(store), store.dataset, arrays=job.arrays, quiet=quiet)) as tally:
            end = "failed"
            try:
                executor.execute(job, share, tally)
                end = "done"
            except StoppedError as stopped:
                end = stopped.name
                stopped.left = f": {tally.summary().rest}"
                raise
            finally:
                summary = tally.summary()
                if summary.encoded:
                    summary.append_to_log(store.path, end)
            return summary


def extract(
    store: Store,
    source: Source,
    *,
    image: VisionEncoder | None,
    text: TextEncoder | None,
    captions: Sequence[str],
    quiet: bool = False,
) -> Summary:
    """Fill a store in this process, with encoders that are loaded: images with `image`, each of `captions` with `text`.

    Shards that are committed already are skipped, and so are the arrays of an encoder that is None.

    Raises:
        UserError: The store holds features of another encoder under the same name, or the disk is full.
    """
    with report_write_errors(store.path, during_run=True):
        tasks = []
        if image is not None:
            tasks.append(ArrayTask.for_images(store, source, image, cores()))
        if text is not None:
            tasks += [ArrayTask.for_caption(store, name, text) for name in captions]
        return fill(store, tasks, quiet=quiet)


def fill(store: Store, tasks: Sequence[ArrayTask], *, quiet: bool = False) -> Summary:
    """Fill arrays of a store in this process, except for the shards that are committed already.

    Raises:
        WorkersFailedError: Some shards failed.
        UserError: The disk is full, or a task failed for a reason that concerns all shards.
    """
    arrays = sum(len(task.arrays) for task in tasks)
    with closing(Tally(arrays * store.rows, store.dataset, arrays=arrays, quiet=quiet)) as tally:
        Worker(store, tasks, tally.receive, Share()).run()
        return tally.summary()
