"""The executor on this machine: one worker process per device, or this process alone if there is a single device."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import cast

import torch

from sail_align.extract.encoders.runtime import share_memory
from sail_align.extract.errors import UserError, WorkersFailedError
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.tally import Event, Tally, cores
from sail_align.extract.executor.worker import Share
from sail_align.extract.system.progress import note
from sail_align.extract.system.signals import report_stop

STOP_SECONDS = 20.0
"""Time for workers to end after SIGTERM, in which they finish the shard being written; then they are killed."""


class LocalExecutor:
    """Runs one worker per device. A single worker runs in this process, several in processes of their own."""

    def __init__(self, devices: Sequence[str]):
        self.devices = devices
        self._workers: dict[Connection, tuple[int, SpawnProcess]] = {}
        self._failed = self._finished = 0
        self._stopping = False

    @classmethod
    def choose(cls, workers: str, device: str) -> "LocalExecutor":
        """Return an executor with the given number of workers; `auto` is one per GPU, or one on the CPU.

        Raises:
            UserError: `workers` is neither `auto` nor a positive number.
        """
        if workers != "auto" and not (workers.isdecimal() and int(workers)):
            raise UserError(f"--workers {workers!r} is invalid: expected auto or a positive number.")
        gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
        count = max(gpus, 1) if workers == "auto" else int(workers)
        if count == 1 or not gpus:
            return cls([device] * count)
        return cls([f"cuda:{number % gpus}" for number in range(count)])

    def execute(self, job: Job, share: Share, tally: Tally) -> None:
        """Encode a share of a job whose store exists. Return when it is committed.

        Raises:
            UserError: From a worker. The others are stopped.
            WorkersFailedError: Shards are left because workers failed.
        """
        tally.workers = len(self.devices)
        used = {"cuda" if each == "auto" and torch.cuda.is_available() else each for each in self.devices}
        if gpus := len(used - {"auto", "cpu"}):
            tally.hardware = (gpus, "GPU")
        if len(self.devices) == 1:
            job.worker(share, self.devices[0], cores(), tally.receive).run()
            return
        try:
            self._start(job, share)
            while self._workers:
                self._receive(tally, timeout=None)
        finally:
            self._stop(tally)
        if self._failed and not self._finished:  # a worker finishes only when no shard is left
            raise WorkersFailedError(
                f"All {self._failed} workers failed; see above. Rerun the same command to continue."
            )

    def _start(self, job: Job, share: Share) -> None:
        threads, sharing = max(cores() // len(self.devices), 1), Counter(self.devices)
        context = multiprocessing.get_context("spawn")
        for number, device in enumerate(self.devices, start=1):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_work_in_process, args=(job, share, device, sharing[device], threads, theirs)
            )
            self._workers[ours] = number, process  # before the start: a signal during it must find the process
            process.start()
            theirs.close()

    def _receive(self, tally: Tally, timeout: float | None) -> None:
        """Wait for messages and pass events to the tally. A closed pipe means that its worker has ended."""
        for pipe in cast(list[Connection], connection.wait(list(self._workers), timeout)):
            try:
                message: Event | UserError = pipe.recv()
            except (EOFError, OSError):
                self._end(pipe, tally)
                continue
            if isinstance(message, Event):
                tally.receive(message, self._workers[pipe][0])
            elif not self._stopping:
                raise message

    def _end(self, pipe: Connection, tally: Tally) -> None:
        number, process = self._workers.pop(pipe)
        pipe.close()
        process.join()
        if process.exitcode == 0:
            self._finished += 1
        elif not self._stopping and process.exitcode is not None:
            self._failed += 1
            tally.workers -= 1
            code = process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            others = f"{len(self._workers)} other worker{'s' * (len(self._workers) != 1)}"
            note(f"Worker {number} {how}. Its shards are left to {others}.")

    def _stop(self, tally: Tally) -> None:
        self._stopping = True
        self._workers = {pipe: worker for pipe, worker in self._workers.items() if worker[1].pid}  # those that started
        for _, process in self._workers.values():
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while self._workers and (left := deadline - time.monotonic()) > 0:
            self._receive(tally, left)
        for _, process in self._workers.values():
            process.kill()
            process.join()


def _work_in_process(job: Job, share: Share, device: str, sharing: int, threads: int, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which terminates its workers
    lock = threading.Lock()

    def send(message: Event | UserError) -> None:
        with lock, suppress(BrokenPipeError):  # `_follow_parent` stops this process if the parent has ended
            pipe.send(message)

    with report_stop(signals=[signal.SIGTERM]):
        threading.Thread(target=_follow_parent, daemon=True).start()
        torch.set_num_threads(threads)
        share_memory(device, sharing)
        try:
            job.worker(share, device, threads, send).run()
        except UserError as error:
            send(UserError(str(error)))
        except WorkersFailedError:  # the worker has printed the reason
            sys.exit(1)


def _follow_parent() -> None:
    """Stop this process when its parent ends, for whatever reason."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
