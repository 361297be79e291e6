"""The processes that train one model together; the only module that uses torch.distributed.

`torchrun` starts the processes and tells each its rank. Every process holds the whole model and a part of each batch.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sail_align.extract.encoders.runtime import Runtime
from sail_align.extract.errors import UserError, WorkersFailedError, printable

T = TypeVar("T")
_untyped: Any = dist  # stores have no type hints

TIMEOUT = timedelta(minutes=30)
"""Time that a process waits for the others, which may read a large store. A process that died is noticed at once."""

WATCH_TIMEOUT = timedelta(days=20)
"""Longest run with several processes: gloo counts milliseconds in 32 bits."""

END_TIME = timedelta(seconds=3)
"""Time in which all processes raise an error, if it is one of all."""

GRACE_SECONDS = 5.0
"""Time for a process to notice the loss of another before it is ended, as NCCL may wait for that one forever."""


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
    local: int = 1
    """Processes on this machine."""

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

    def move(self, part_ND: Tensor, have: list[slice], want: list[slice], out_ND: Tensor) -> None:
        """Pass rows on between processes.

        Args:
            part_ND: The rows `have[rank]` of a batch that is spread over the processes.
            have: Rows of the batch that each process has.
            want: Rows of the batch that each process shall have.
            out_ND: Memory for the rows `want[rank]`.
        """

        def both(giver: int, taker: int) -> slice:
            start, stop = max(have[giver].start, want[taker].start), min(have[giver].stop, want[taker].stop)
            return slice(start, max(start, stop))

        def rows_of(tensor_ND: Tensor, first: int, rows: slice) -> Tensor:
            return tensor_ND[rows.start - first : rows.stop - first]

        transfers = []
        for other in range(self.size):
            give = rows_of(part_ND, have[self.rank].start, both(self.rank, other))
            take = rows_of(out_ND, want[self.rank].start, both(other, self.rank))
            if other == self.rank:
                take.copy_(give)
                continue
            if len(give):
                transfers.append(dist.P2POp(dist.isend, give, other))
            if len(take):
                transfers.append(dist.P2POp(dist.irecv, take, other))

        def transfer() -> None:
            for work in dist.batch_isend_irecv(transfers) if transfers else ():
                work.wait()

        _call(transfer)

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
    `cuda:N`. An error that all processes raise is shown by the leader alone. A process that fails alone prints its
    error and ends at once, because cleaning up NCCL may wait forever for the others. These notice that it is gone.

    Raises:
        UserError: The device is not available, or processes would share a GPU.
        WorkersFailedError: The other processes cannot be reached.
    """
    if "WORLD_SIZE" not in os.environ:
        yield ALONE, Runtime.of(device, "float32").device
        return
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"Device {device!r} is not available on this machine. Use auto or cpu.")
    store, rank, size = next(iter(_untyped.rendezvous("env://", timeout=TIMEOUT)))
    # Objects go through gloo, so that they do not pass through GPU memory.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    _call(dist.init_process_group, backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = World(rank, size, 1 if on_gpu else local, local)
    store, watch = _untyped.PrefixStore("end", store), _Watch(world)
    try:
        where = world.every(lambda: _own_device(device))
        if on_gpu:
            _require_own_cards(world, where)
        yield world, where
        watch.end()
    except BaseException as error:
        if not _all_raise(error, store, world):
            _end(error, world)
        watch.end()
        dist.destroy_process_group()
        if isinstance(error, UserError) and not world.leads:
            raise SystemExit(2) from error
        raise
    dist.destroy_process_group()


def _own_device(device: str) -> torch.device:
    """Return the device of this process. A launcher may show each process all cards of its machine, or its own alone.

    Raises:
        UserError: The device is not available, or all processes of the machine would use this one card.
    """
    if device.startswith("cuda"):
        local, processes = (int(os.environ.get(name, default)) for name, default in _LOCAL)
        cards = torch.cuda.device_count()
        if device != "cuda" and processes > 1:
            raise UserError(
                f"--device is invalid: got {device}, which {processes} processes of this machine would share. Pass "
                "--device cuda to give each its own GPU."
            )
        if cards > 1 and local >= cards:
            raise UserError(
                f"--nproc-per-node is invalid: got {processes} processes, but this machine has {cards} GPUs. Give "
                "torchrun a smaller number."
            )
        device = device if device != "cuda" else f"cuda:{local if cards > 1 else 0}"
        torch.cuda.set_device(device)
    return Runtime.of(device, "float32").device


_LOCAL = (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
"""Variables of torchrun: number of this process on its machine, and how many there are. Defaults: it is alone."""


def _require_own_cards(world: World, device: torch.device) -> None:
    """Raise `UserError` in all processes if two share a GPU, which NCCL cannot do."""
    cards = world.collect(str(torch.cuda.get_device_properties(device).uuid))
    for rank, card in enumerate(cards):
        if (first := cards.index(card)) < rank:
            raise UserError(
                f"Processes {first} and {rank} share a GPU. Start at most as many processes per machine as it has GPUs."
            )


class _Watch:
    """A thread that ends this process if the next one has died while this one waits for it inside a GPU operation.

    gloo raises an error at once when a peer dies, but NCCL waits. So each process holds a gloo connection to the next,
    and waits in a thread for a message that comes when all end together. Losing one process thus ends all.
    """

    def __init__(self, world: World):
        self._world = world
        self._next, self._last = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        self._thread: threading.Thread | None = None
        if world.size > 1:
            self._group = _call(dist.new_group, backend="gloo", timeout=WATCH_TIMEOUT)
            self._thread = threading.Thread(target=self._wait, name="watch", daemon=True)
            self._thread.start()

    def _wait(self) -> None:
        try:
            _call(dist.recv, torch.zeros(1), src=self._next, group=self._group)
        except WorkersFailedError as lost:
            time.sleep(GRACE_SECONDS)  # outside GPU operations the main thread notices the loss itself, and ends
            _end(lost, self._world)

    def end(self) -> None:
        """End the threads of all processes. Each must call this."""
        if self._thread:
            _call(dist.send, torch.zeros(1), dst=self._last, group=self._group)
            self._thread.join()


def _all_raise(error: BaseException, store: Any, world: World) -> bool:
    """Return whether all processes raise this error, within a few seconds."""
    if isinstance(error, WorkersFailedError):  # not the one that died
        return False
    names = [str(rank) for rank in range(world.size)]
    try:
        store.set(str(world.rank), f"{type(error).__name__}: {error}")
        store.wait(names, END_TIME)
        raised = {store.get(name) for name in names}
        store.add("read", 1)
        while world.leads and store.add("read", 0) < world.size:  # its process may hold the store
            time.sleep(0.01)
    except RuntimeError:
        return False
    return len(raised) == 1


def _end(error: BaseException, world: World) -> NoReturn:
    """Print an error, unless that was done, and end this process at once."""
    code: object = 1
    if isinstance(error, SystemExit):
        code = error.code
    elif isinstance(error, UserError | WorkersFailedError):
        named = "" if world.leads or isinstance(error, WorkersFailedError) else f"Process {world.rank}: "
        print(printable(f"error: {named}{error}"), file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _call(operation: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call an operation of torch.distributed; turn its error after the loss of a process into one clear message."""
    try:
        return operation(*args, **options)
    except RuntimeError as problem:
        raise WorkersFailedError(
            f"Process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')} lost its connection to "
            f"another ({str(problem).splitlines()[0]:.100}). Rerun the same command, with any number of processes, to "
            "resume from the last checkpoint or, if there is none, to start again."
        ) from problem
