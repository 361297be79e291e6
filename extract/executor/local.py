"""A crew of workers on this machine: one process a device, or this process alone."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from sail_align.extract.errors import UserError, WorkersFailedError
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.tally import Message, Messenger, Tally, cores, deliver
from sail_align.extract.executor.worker import Report, Share, work
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import report_write_errors
from sail_align.extract.system.memory import keep_freed_memory
from sail_align.extract.system.progress import note
from sail_align.extract.system.signals import raise_on_signals

STOP_SECONDS = 20.0
"""How long a worker may take to end when it is told to; it finishes writing the shard before."""

MISTAKE = "mistake"


def do_share(job: Job, share: Share, device: str, threads: int, report: Report) -> None:
    """Load what a job needs and do a share of it, in this process.

    Raises:
        UserError: As `Job.tasks`, or the disk is full.
    """
    keep_freed_memory()
    store = Store.open(job.store)
    decoders = ThreadPoolExecutor(max_workers=threads)
    try:
        with report_write_errors(job.store, during_run=True):
            work(store, job.tasks(store, share, device, decoders), report, share)
    finally:
        decoders.shutdown(cancel_futures=True)


def choose_devices(workers: str, device: str) -> list[str]:
    """Return the device of each worker: for `auto` one a GPU if there are any, else one.

    Raises:
        UserError: `workers` is neither `auto` nor a number from 1 up.
    """
    if workers != "auto" and not (workers.isdecimal() and int(workers)):
        raise UserError(f"--workers {workers!r} is neither auto nor a number from 1 up.")
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    count = max(gpus, 1) if workers == "auto" else int(workers)
    if count == 1 or not gpus:
        return [device] * count
    return [f"cuda:{number % gpus}" for number in range(count)]


@dataclass(frozen=True)
class LocalCrew:
    """One worker a device; a single one works in this process."""

    devices: Sequence[str]

    @property
    def size(self) -> int:
        """The number of workers."""
        return len(self.devices)

    @property
    def hardware(self) -> tuple[int, str]:
        """The GPUs that are used, or the cores that there are."""
        used = {"cuda" if each == "auto" and torch.cuda.is_available() else each for each in self.devices}
        gpus = len(used - {"auto", "cpu"})
        return (gpus, "GPU") if gpus else (cores(), "core")

    def work(self, job: Job, share: Share, tally: Tally) -> None:
        """Do a share of a job.

        Raises:
            UserError: From a worker; the others are stopped.
            WorkersFailedError: Shards are left because workers failed.
        """
        if self.size == 1:
            do_share(job, share, self.devices[0], cores(), tally)
        else:
            _Processes(job, share, self.devices, tally).run()


class _Processes:
    """Worker processes, each at the other end of a pipe."""

    def __init__(self, job: Job, share: Share, devices: Sequence[str], tally: Tally):
        self.job, self.share, self.devices = job, share, devices
        self.tally = tally
        self.failed = self.finished = 0
        self.stopping = False
        self.workers: dict[Connection, tuple[int, SpawnProcess]] = {}

    def run(self) -> None:
        try:
            self._start()
            while self.workers:
                self._receive(timeout=None)
        finally:
            self._stop()
        if self.failed and not self.finished:  # a worker ends well only when nothing is left
            raise WorkersFailedError(
                f"All {self.failed} workers failed, as said above, and shards are left; run the same command again."
            )

    def _start(self) -> None:
        threads = max(cores() // len(self.devices), 1)
        context = multiprocessing.get_context("spawn")
        for number, device in enumerate(self.devices, start=1):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work_in_process, args=(self.job, self.share, device, threads, theirs))
            self.workers[ours] = number, process  # before it starts: a signal meanwhile must find it, to stop it
            process.start()
            theirs.close()

    def _receive(self, timeout: float | None) -> None:
        """Wait for the workers' messages and pass them on to the tally; a pipe that ends is a worker that has."""
        for pipe in connection.wait(list(self.workers), timeout):
            if not isinstance(pipe, Connection):
                continue
            try:
                message: Message = pipe.recv()
            except (EOFError, OSError):
                self._ended(pipe)
                continue
            if message[0] != MISTAKE:
                deliver(message, self.tally, self.workers[pipe][0])
            elif not self.stopping:
                raise UserError(*message[1])

    def _ended(self, pipe: Connection) -> None:
        number, process = self.workers.pop(pipe)
        pipe.close()
        process.join()
        if process.exitcode == 0:
            self.finished += 1
        elif not self.stopping and process.exitcode is not None:
            self.failed += 1
            self.tally.gone()
            code = process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            note(f"Worker {number} {how}; the others ({len(self.workers)}) go on with its shards.")

    def _stop(self) -> None:
        self.stopping = True
        self.workers = {pipe: worker for pipe, worker in self.workers.items() if worker[1].pid}  # those that started
        for _, process in self.workers.values():
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while self.workers and (left := deadline - time.monotonic()) > 0:
            self._receive(left)
        for _, process in self.workers.values():
            process.kill()
            process.join()


class _Pipe:
    """The end of a pipe to the parent. That the parent is gone is noticed by `_follow_parent`."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        with self._lock, suppress(BrokenPipeError):
            self._pipe.send(message)


def _work_in_process(job: Job, share: Share, device: str, threads: int, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which passes it on
    parent = _Pipe(pipe)
    with raise_on_signals([signal.SIGTERM]):
        threading.Thread(target=_follow_parent, daemon=True).start()
        torch.set_num_threads(threads)
        try:
            do_share(job, share, device, threads, Messenger(parent.send))
        except UserError as mistake:
            parent.send((MISTAKE, (str(mistake),)))
        except WorkersFailedError:  # said already
            sys.exit(1)


def _follow_parent() -> None:
    """End with the parent, however it ended: nobody would be told of this worker's end otherwise."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
