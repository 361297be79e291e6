"""The processes that train one model together; the only module that uses torch.distributed.

`torchrun` starts the processes and tells each its rank. Every process holds the whole model and a part of each batch.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.errors import UserError, WorkersFailedError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""Time that a process waits for the others, which may read a large store. A process that died is noticed at once."""


@dataclass(frozen=True)
class World:
    """The `size` processes of a run; this one has number `rank`. Only rank 0, the leader, writes and prints.

    All processes must call the methods in the same order. Each method raises `WorkersFailedError` if another process
    has died or cannot be reached.
    """

    rank: int = 0
    size: int = 1
    sharing: int = 1
    """Processes that share this one's memory: on a CPU those of the machine, on a GPU this one alone."""

    @property
    def leads(self) -> bool:
        """Whether this process is the leader."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """Call `work` in the leader alone; return its result in all processes.

        Raises:
            UserError: In all processes, if the work raises it.
        """
        made: list[T] = []
        self.every(lambda: made.append(work()) if self.leads else None)
        if self.size == 1:
            return made[0]
        shared: list[Any] = made or [None]
        self.every(lambda: _call(dist.broadcast_object_list, shared))  # what is unpickled may open a store
        return cast(T, shared[0])

    def every(self, work: Callable[[], T]) -> T:
        """Call `work` in each process; return its own result.

        Raises:
            UserError: In all processes, that of the first process in which the work raises it.
        """
        results: list[T] = []
        mistake = None
        try:
            results.append(work())
        except UserError as problem:
            mistake = str(problem)
        for message in self.collect(mistake):
            if message is not None:
                raise UserError(message)
        return results[0]

    def collect(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        _call(dist.all_gather_object, values, value)
        return values

    def spans(self, rows: int) -> list[slice]:
        """Return the place of each process's rows in the whole batch, given the number of rows of this one."""
        ends = [0, *accumulate(self.collect(rows))]
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def gather(self, part_NE: Tensor, spans: list[slice]) -> Tensor:
        """Return the rows (M, E) of all processes' parts (N, E).

        Each process broadcasts its rows to their place in all others, without padding or copies.
        """
        if self.size == 1:
            return part_NE
        all_ME = part_NE.new_empty(spans[-1].stop, part_NE.shape[1])
        all_ME[spans[self.rank]] = part_NE
        for rank, rows in enumerate(spans):
            _call(dist.broadcast, all_ME[rows], src=rank)
        return all_ME

    def scatter_sum(self, all_ME: Tensor, spans: list[slice]) -> Tensor:
        """Return this process's rows (N, E) of the sum over processes of `all_ME` (M, E), which is overwritten."""
        if self.size > 1:
            for rank, rows in enumerate(spans):
                _call(dist.reduce, all_ME[rows], dst=rank)
        return all_ME[spans[self.rank]]

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size > 1:
            for tensor in tensors:
                _call(dist.all_reduce, tensor)

    def broadcast(self, *tensors: Tensor) -> None:
        """Replace each tensor by that of the leader."""
        if self.size > 1:
            for tensor in tensors:
                _call(dist.broadcast, tensor, src=0)

    def log_sum_exp(self, values: Tensor) -> Tensor:
        """Return the elementwise log-sum-exp over all processes."""
        if self.size == 1:
            return values
        highest = values.clone()
        _call(dist.all_reduce, highest, dist.ReduceOp.MAX)
        highest = highest.clamp(min=torch.finfo(values.dtype).min)  # −∞ in every process stays −∞
        sums = (values - highest).exp()
        self.sum(sums)
        return highest + sums.log()


ALONE = World()


@contextmanager
def joined(device: str) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun started; yield them and the device of this process.

    A process that torchrun did not start is alone. On GPUs each process gets its own: `auto` and `cuda` become
    `cuda:N`. All processes raise a user's mistake, but only the leader's message is shown.

    Raises:
        UserError: The device is not available, or there are fewer GPUs than processes on this machine.
        WorkersFailedError: The other processes cannot be reached.
    """
    if "WORLD_SIZE" not in os.environ:
        yield ALONE, Runtime.of(device, "float32").device
        return
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if on_gpu := device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node is invalid: got {os.environ.get('LOCAL_WORLD_SIZE')} processes, but this machine "
                f"has {torch.cuda.device_count()} GPUs. Give torchrun a smaller number."
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    # Objects go through gloo, so that they do not pass through GPU memory.
    _call(dist.init_process_group, "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    sharing = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = World(dist.get_rank(), dist.get_world_size(), sharing)
    try:
        yield world, world.every(lambda: Runtime.of(device, "float32").device)
    except UserError as mistake:
        raise mistake if world.leads else SystemExit(2) from mistake
    finally:
        dist.destroy_process_group()


def _call(operation: Callable[..., object], *args: Any, **options: Any) -> None:
    """Call an operation of torch.distributed; turn its error after the loss of a process into one clear message."""
    try:
        operation(*args, **options)
    except RuntimeError as problem:
        raise WorkersFailedError(
            f"Process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')} lost its connection to "
            f"another ({str(problem).splitlines()[0]:.100}). Rerun the same command, with any number of processes, to "
            "resume from the last checkpoint or, if there is none, to start again."
        ) from problem
