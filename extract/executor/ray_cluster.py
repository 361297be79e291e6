"""A crew of Ray actors: a shard is a task, and any node of the cluster can do it.

The driver hands out shards, a bounded number at a time, and hands out again what a lost node had. A task knows only its
shard and does it under a lease, as every worker does: a driver, or a node, that is only thought dead does no harm.
"""

import logging
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from sail_align.extract.errors import UserError, WorkersFailedError
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.tally import Message, Messenger, Tally, bytes_read, deliver
from sail_align.extract.executor.worker import Loop, Share
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import report_write_errors
from sail_align.extract.system.leases import POLL
from sail_align.extract.system.memory import keep_freed_memory
from sail_align.extract.system.progress import note
from sail_align.extract.system.signals import StoppedError, defer_signals

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
        with report_write_errors(self.job.store, during_run=True):
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
            with report_write_errors(self.job.store, during_run=True):
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


_untyped: Any = ray  # for what its own type hints leave out

IN_FLIGHT = 2
"""Tasks that an actor has at a time: one that it does, and the next."""

TRIES = 3
"""How often a shard may fail, or actors start in vain while none is at work, before the run gives up."""

GIVE_UP_SECONDS = 5.0
"""How long actors may take to give their leases back when a run is stopped."""


@dataclass(frozen=True)
class RayCrew:
    """Actors on a cluster: `auto` is one a GPU, or one a node where there is none.

    `address` is the cluster's; None means `$RAY_ADDRESS`, and where that is not set a cluster on this machine alone.
    """

    address: str | None
    workers: str
    device: str

    @property
    def size(self) -> int:
        """The number of actors; before `work` has connected, 1."""
        if not ray.is_initialized():
            return 1
        if self.workers != "auto":
            return int(self.workers)
        return self._gpus or sum(node["Alive"] for node in _untyped.nodes())

    @property
    def hardware(self) -> tuple[int, str]:
        """The GPUs that are used, or the cores of the cluster."""
        if gpus := min(self._gpus, self.size):
            return gpus, "GPU"
        return int(self._resources.get("CPU", 1)), "core"

    @property
    def _resources(self) -> dict[str, float]:
        return dict(_untyped.cluster_resources()) if ray.is_initialized() else {}

    @property
    def _gpus(self) -> int:
        return 0 if self.device == "cpu" else int(self._resources.get("GPU", 0))

    def work(self, job: Job, share: Share, tally: Tally) -> None:
        """Do a share of a job.

        Raises:
            UserError: There is no cluster at the address, or from a worker.
            WorkersFailedError: A shard failed several times, or actors did.
            StoppedError: SIGTERM or Ctrl-C came. It is not raised inside Ray, whose calls make another error of it.
        """
        # Not None: that would join whatever other cluster began last on this machine.
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        with defer_signals() as stopped:
            ours = signal.getsignal(signal.SIGTERM)
            try:
                _untyped.init(
                    address=address, include_dashboard=False, logging_level=logging.WARNING, ignore_reinit_error=True
                )
            except (ConnectionError, ValueError) as problem:
                raise UserError(f"No Ray cluster answers at {address!r}; correct --ray-address.") from problem
            signal.signal(signal.SIGTERM, ours)  # Ray has put its own
            here = replace(job, store=job.store.absolute(), data_root=job.data_root.absolute())
            _Driver(self, here, share, tally).run(stopped)
        Store.open(job.store).tidy()


class _Driver:
    """Hands shards to actors, and again where an actor was lost."""

    def __init__(self, crew: RayCrew, job: Job, share: Share, tally: Tally):
        self.tally = tally
        self.size = crew.size
        _, unit = crew.hardware
        threads = max(int(_untyped.cluster_resources().get("CPU", 1)) // self.size, 1)
        self.start = partial(
            _untyped.remote(concurrency_groups={"stop": 1})(ShardActor)
            .options(num_gpus=int(unit == "GPU"), num_cpus=int(unit != "GPU"), scheduling_strategy="SPREAD")
            .remote,
            *(job, share, crew.device, threads),
        )
        self.actors: list[Any] = []
        self.ready: list[Any] = []
        self.running: dict[Any, tuple[Any, Shard | None]] = {}
        """Actor and shard by what Ray refers to the task with; no shard where the actor gets ready."""
        self.left: deque[Shard] | None = None
        self.later: deque[tuple[float, Shard]] = deque()
        self.failures: Counter[Shard | None] = Counter()

    def run(self, stopped: Callable[[], StoppedError | None]) -> None:
        for _ in range(self.size):
            self._hire()
        try:
            while self.left is None or self.left or self.later or any(shard for _, shard in self.running.values()):
                if stop := stopped():
                    raise stop
                self._hand_out()
                if not self.running:  # others have all that is left, and Ray does not wait for nothing
                    time.sleep(POLL)
                    continue
                done, _ = ray.wait(list(self.running), timeout=POLL)
                for task in done:
                    self._receive(task)
        finally:
            given_up = [actor.give_up.remote() for actor in self.ready]
            if given_up:
                ray.wait(given_up, num_returns=len(given_up), timeout=GIVE_UP_SECONDS)
            for actor in self.actors:
                ray.kill(actor)

    def _hire(self) -> None:
        """Ask for an actor; where there is no room for it now, it comes with the next node."""
        actor = self.start()
        self.actors.append(actor)
        self.running[actor.prepare.remote()] = actor, None

    def _hand_out(self) -> None:
        while self.left is not None and self.later and self.later[0][0] <= time.monotonic():
            self.left.append(self.later.popleft()[1])
        for actor in self.ready:
            busy = sum(each is actor for each, _ in self.running.values())
            for _ in range(busy, IN_FLIGHT):
                if self.left:
                    shard = self.left.popleft()
                    self.running[actor.do.remote(shard)] = actor, shard

    def _receive(self, task: Any) -> None:
        actor, shard = self.running.pop(task)
        try:
            result, messages = ray.get(task)
        except RayActorError:
            self._lost(actor, shard)
        except RayTaskError as failure:
            if isinstance(failure.cause, UserError):
                raise UserError(str(failure.cause)) from failure
            self._failed(shard, f"{type(failure.cause).__name__}: {failure.cause}")
        else:
            for message in messages:
                deliver(message, self.tally, 0)
            if shard is None:
                self.ready.append(actor)
                self.failures[None] = 0
                self.left = deque(result) if self.left is None else self.left
            elif not result:  # another run has it
                self.later.append((time.monotonic() + POLL, shard))

    def _lost(self, actor: Any, shard: Shard | None) -> None:
        if actor in self.actors:
            self.actors.remove(actor)
            if actor in self.ready:
                self.ready.remove(actor)
            note("A Ray worker was lost, with its node or alone; its shards go to others, and another is asked for.")
            self._hire()
        if shard is None:
            self._failed(shard, "its process ended")
        else:
            self.later.append((time.monotonic(), shard))

    def _failed(self, shard: Shard | None, reason: str) -> None:
        what = "A worker's start" if shard is None else f"{shard[0]} shard {shard[1]}"
        self.failures[shard] += 1
        if self.failures[shard] >= TRIES and (shard or not self.ready):
            raise WorkersFailedError(f"{what} failed {TRIES} times ({reason}); shards are left.")
        note(f"{what} failed ({reason}); it is tried again.")
        if shard is not None:
            self.later.append((time.monotonic(), shard))
