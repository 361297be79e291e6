"""The executor on a Ray cluster: a shard is one Ray task, which any node can do. Importing it requires Ray.

The driver gives each actor a few shards at a time, and reassigns those of a lost node. An actor encodes a shard only
under a lease, as every worker does. So a driver or a node that is wrongly believed dead does no harm.
"""

import logging
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sail_align.extract.errors import UserError, WorkersFailedError
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.tally import Event, Shard, Tally
from sail_align.extract.executor.worker import Share
from sail_align.extract.store.store import Store
from sail_align.extract.system.leases import POLL
from sail_align.extract.system.progress import note
from sail_align.extract.system.signals import StoppedError, defer_signals

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
except ImportError as problem:
    raise UserError("--engine ray needs Ray. Install it with: pip install 'sail-align[ray]'.") from problem

_untyped: Any = ray  # for the functions that have no type hints

IN_FLIGHT = 2
"""Tasks of an actor at a time: the one that it runs, and the next."""

MAX_TRIES = 3
"""Failures of one shard, or of the start of actors while none is ready, after which the run ends."""

GIVE_UP_SECONDS = 5.0
"""Time for actors to release their leases when a run is stopped."""


class ShardActor:
    """A worker in a Ray actor: it holds a job's encoders and encodes one shard after the other."""

    def __init__(self, job: Job, share: Share, device: str, threads: int):
        torch.set_num_threads(threads)
        self.events: list[Event] = []
        self._load = partial(job.worker, share, device, threads, self.events.append)

    def prepare(self) -> tuple[list[Shard], list[Event]]:
        """Load the encoders. Return the shards that are not committed, and events."""
        self.worker = self._load()
        return self.worker.pending(), self._take_events()

    def run(self, shard: Shard) -> tuple[bool, list[Event]]:
        """Encode a shard. Return whether it is committed (False: another worker holds it), and events."""
        return self.worker.run_one(shard), self._take_events()

    @ray.method(concurrency_group="stop")
    def give_up(self) -> None:
        """Release the lease of the current shard and take no other. A shard that is being written is not committed."""
        self.worker.store.leases.close()

    def _take_events(self) -> list[Event]:
        events = self.events.copy()
        self.events.clear()
        return events


class RayCluster:
    """Runs one actor per GPU of a cluster, or one per node if it has no GPU, or a given number of actors.

    Args:
        address: Address of the cluster. Default: `$RAY_ADDRESS`, or a cluster on this machine alone if that is not set.
        workers: Number of actors, or `auto`.
        device: Device of each actor.
    """

    def __init__(self, address: str | None, workers: str, device: str):
        # Passing no address would join any other cluster that was started on this machine.
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.workers, self.device = workers, device
        self._actors: list[Any] = []
        self._ready: list[Any] = []
        self._running: dict[Any, tuple[Any, Shard | None]] = {}
        """Actor and shard of each Ray task; no shard if the actor is loading its encoders."""
        self._left: deque[Shard] | None = None
        self._later: deque[tuple[float, Shard]] = deque()
        """Shards to try again, and from when on."""
        self._failures: Counter[Shard | None] = Counter()

    def execute(self, job: Job, share: Share, tally: Tally) -> None:
        """Encode a share of a job whose store exists. Return when it is committed.

        Raises:
            UserError: There is no cluster at the address, or a worker raised it.
            WorkersFailedError: A shard, or the start of actors, failed several times.
            StoppedError: SIGTERM or Ctrl-C. It is raised between Ray's calls, which would turn it into another error.
        """
        with defer_signals() as stopped:
            handler = signal.getsignal(signal.SIGTERM)
            try:
                _untyped.init(
                    address=self.address,
                    include_dashboard=False,
                    logging_level=logging.WARNING,
                    ignore_reinit_error=True,
                )
            except (ConnectionError, ValueError) as problem:
                raise UserError(f"--ray-address is invalid: no Ray cluster answers at {self.address!r}.") from problem
            signal.signal(signal.SIGTERM, handler)  # which Ray has replaced
            resources = _untyped.cluster_resources()
            cores = int(resources.get("CPU", 1))
            gpus = 0 if self.device == "cpu" else int(resources.get("GPU", 0))
            nodes = sum(node["Alive"] for node in _untyped.nodes())
            size = int(self.workers) if self.workers != "auto" else gpus or nodes
            tally.hardware = (min(gpus, size), "GPU") if gpus else (cores, "core")
            actor = _untyped.remote(concurrency_groups={"stop": 1})(ShardActor).options(
                num_gpus=int(gpus > 0), num_cpus=int(gpus == 0), scheduling_strategy="SPREAD"
            )
            # Relative paths would depend on the working directory of the actor.
            job = replace(job, store=job.store.absolute(), data_root=job.data_root.absolute())
            self._start = partial(actor.remote, job, share, self.device, max(cores // size, 1))
            try:
                for _ in range(size):
                    self._start_actor()
                self._run(tally, stopped)
            finally:
                self._stop_actors()
        Store.open(job.store).tidy()

    def _run(self, tally: Tally, stopped: Callable[[], StoppedError | None]) -> None:
        while self._left is None or self._left or self._later or any(shard for _, shard in self._running.values()):
            if stop := stopped():
                raise stop
            self._assign()
            if not self._running:  # other runs hold all shards that are left, and Ray cannot wait for nothing
                time.sleep(POLL)
                continue
            finished, _ = ray.wait(list(self._running), timeout=POLL)
            for task in finished:
                self._receive(task, tally)

    def _start_actor(self) -> None:
        """Request an actor. If the cluster has no room for it, it starts when a node joins."""
        actor = self._start()
        self._actors.append(actor)
        self._running[actor.prepare.remote()] = actor, None

    def _stop_actors(self) -> None:
        released = [actor.give_up.remote() for actor in self._ready]
        if released:
            ray.wait(released, num_returns=len(released), timeout=GIVE_UP_SECONDS)
        for actor in self._actors:
            ray.kill(actor)

    def _assign(self) -> None:
        """Give the actors shards that are left."""
        if self._left is None:
            return
        while self._later and self._later[0][0] <= time.monotonic():
            self._left.append(self._later.popleft()[1])
        for actor in self._ready:
            assigned = sum(other is actor for other, _ in self._running.values())
            for _ in range(min(IN_FLIGHT - assigned, len(self._left))):
                shard = self._left.popleft()
                self._running[actor.run.remote(shard)] = actor, shard

    def _receive(self, task: Any, tally: Tally) -> None:
        """Handle the result of a Ray task."""
        actor, shard = self._running.pop(task)
        try:
            result, events = ray.get(task)
        except RayActorError:
            self._lose(actor, shard)
        except RayTaskError as failure:
            error = failure.cause
            if isinstance(error, UserError):
                raise UserError(str(error)) from failure
            what = str(shard) if shard else "The start of a worker"
            named = isinstance(error, WorkersFailedError)  # its message names the shard
            self._fail(shard, str(error) if named else f"{what} failed ({type(error).__name__}: {error}).")
        else:
            for event in events:
                tally.receive(event)
            if shard is None:
                self._ready.append(actor)
                self._failures[None] = 0
                self._left = deque(result) if self._left is None else self._left
            elif not result:  # another run holds it
                self._later.append((time.monotonic() + POLL, shard))

    def _lose(self, actor: Any, shard: Shard | None) -> None:
        """Replace an actor whose process or node has ended, and reassign its shard."""
        if actor in self._actors:
            self._actors.remove(actor)
            if actor in self._ready:
                self._ready.remove(actor)
            note("A Ray worker was lost, alone or with its node. Requesting another; its shards are reassigned.")
            self._start_actor()
        if shard is None:
            self._fail(shard, "The start of a worker failed (its process ended).")
        else:
            self._later.append((time.monotonic(), shard))

    def _fail(self, shard: Shard | None, message: str) -> None:
        """Count the failure of a shard, or of the start of an actor, and retry it. Raise after too many failures."""
        self._failures[shard] += 1
        if self._failures[shard] >= MAX_TRIES and (shard or not self._ready):
            raise WorkersFailedError(f"{message} This was try {MAX_TRIES} of {MAX_TRIES}. Some shards are left.")
        note(f"{message} Retrying.")
        if shard:
            self._later.append((time.monotonic(), shard))
