"""The worker of a Ray cluster: it holds a job's encoders, and does the shards that it is sent."""

from concurrent.futures import ThreadPoolExecutor

import ray
import torch

from sail_align.extract.costs import bytes_read
from sail_align.extract.files import full_disk_is_said
from sail_align.extract.job import Job
from sail_align.extract.memory import keep_freed_memory
from sail_align.extract.messages import Message, Messenger
from sail_align.extract.store import Store
from sail_align.extract.worker import Loop, Share

Shard = tuple[str, int]
"""An array's path and the number of a shard."""


class ShardActor:
    """Holds a job's encoders, and does one shard after the other."""

    def __init__(self, job: Job, share: Share, device: str, threads: int):
        keep_freed_memory()
        torch.set_num_threads(threads)
        self.job, self.share, self.device = job, share, device
        self.decoders = ThreadPoolExecutor(threads)
        self.writer = ThreadPoolExecutor(1)
        self.store = Store.open(job.store)
        self.messages: list[Message] = []
        self.loop = Loop(self.store, Messenger(self.messages.append), self.writer)

    def prepare(self) -> tuple[list[Shard], list[Message]]:
        """Load the encoders; return the shards that are not committed, and messages about those that are."""
        with full_disk_is_said(self.job.store):
            tasks = self.job.tasks(self.store, self.share, self.device, self.decoders)
        self.tasks = {task.array.path: task for task in tasks}
        left = []
        for path, task in self.tasks.items():
            for shard in self.share.shards(task.array):
                if task.array.refresh(shard):
                    start, stop = task.array.span(shard)
                    self.loop.report.found(path, shard, stop - start)
                else:
                    left.append((path, shard))
        return left, self._told()

    def do(self, shard: Shard) -> tuple[bool, list[Message]]:
        """Do a shard; return whether it is committed (False: another worker has it), and messages."""
        path, number = shard
        before = bytes_read()
        try:
            with full_disk_is_said(self.job.store):
                self.loop.do(self.tasks[path], number)
                self.loop.finish_writing()
        finally:
            self.store.leases.release_all()
        self.loop.report.read(bytes_read() - before)
        return self.loop.is_there(self.tasks[path].array, number), self._told()

    @ray.method(concurrency_group="stop")
    def give_up(self) -> None:
        """Give back the lease of the shard in flight, and take no other; what is still written is not committed."""
        self.store.leases.close()

    def _told(self) -> list[Message]:
        told = self.messages.copy()
        self.messages.clear()
        return told
