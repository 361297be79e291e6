"""The processes that train one model together: all that knows torch.distributed. One process is a world of one.

`torchrun` starts the processes and tells each its rank. Every process has its part of each batch and the whole model.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sail_align.extract.errors import UserError, WorkersFailedError

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""A process waits so long for the others, which may read a large store. That one has ended is commonly seen at once."""


@dataclass(frozen=True)
class World:
    """The `size` processes of a run, and which of them this is. Rank 0 leads: it alone writes and speaks.

    Every method but `leads` must be called by all processes, in the same order.

    Raises:
        WorkersFailedError: By each method, if another process has ended or cannot be reached.
    """

    rank: int = 0
    size: int = 1
    sharing: int = 1
    """Processes that share this one's memory: on a CPU those of the machine, on a GPU this one alone."""

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def describe(self) -> str:
        """Say how many processes there are, if there are several."""
        return f"; {self.size} processes" if self.size > 1 else ""

    def agree(self, work: Callable[[], T]) -> T:
        """Do in every process what may be a user's mistake; return this one's result if none made one.

        Raises:
            UserError: In all processes, the mistake of the first that made one.
        """
        results: list[T] = []
        mistake = None
        try:
            results.append(work())
        except UserError as problem:
            mistake = str(problem)
        if sentence := next((each for each in self.collect(mistake) if each is not None), None):
            raise UserError(sentence)
        return results[0]

    def decide(self, work: Callable[[], T]) -> T:
        """Do something in rank 0 alone; return its result, as JSON keeps it, in all processes.

        Raises:
            UserError: In all processes, if the work does.
        """
        answers: list[T] = []
        self.agree(lambda: answers.append(work()) if self.leads else None)
        return self.collect(answers)[0][0]

    def collect(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, as JSON keeps them."""
        if self.size == 1:
            return [value]
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        content = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
        lengths = torch.zeros(self.size, dtype=torch.int64, device=device)
        lengths[self.rank] = len(content)
        self.sum(lengths)
        contents = torch.zeros(self.size, int(lengths.max()), dtype=torch.uint8, device=device)
        contents[self.rank, : len(content)] = content
        self.sum(contents)
        said = zip(contents.tolist(), lengths.tolist(), strict=True)
        return [json.loads(bytes(content[:length])) for content, length in said]

    def same(self, value: object) -> bool:
        """Return whether all processes have the same value."""
        first, *others = self.collect(value)
        return all(each == first for each in others)

    def spans(self, rows: int) -> list[slice]:
        """Return where each process's rows lie in the batch, given how many this one has."""
        ends = [0, *accumulate(self.collect(rows))]
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def gather(self, part_NE: Tensor, spans: list[slice]) -> Tensor:
        """Return the rows (M, E) of all processes' parts (N, E).

        Every process sends its rows to where they belong at all others: nothing is padded, copied or sent twice.
        """
        if self.size == 1:
            return part_NE
        all_ME = part_NE.new_empty(spans[-1].stop, part_NE.shape[1])
        all_ME[spans[self.rank]] = part_NE
        with _reaching_all():
            for rank, rows in enumerate(spans):
                dist.broadcast(all_ME[rows], src=rank)
        return all_ME

    def scatter_sum(self, all_ME: Tensor, spans: list[slice]) -> Tensor:
        """Return this process's rows (N, E) of the sum of all processes' tensors (M, E), overwritten."""
        if self.size > 1:
            with _reaching_all():
                for rank, rows in enumerate(spans):
                    dist.reduce(all_ME[rows], dst=rank)
        return all_ME[spans[self.rank]]

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size > 1:
            with _reaching_all():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def spread(self, *tensors: Tensor) -> None:
        """Replace each tensor by that of rank 0."""
        if self.size > 1:
            with _reaching_all():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def log_sum_exp(self, values: Tensor) -> Tensor:
        """Return the log-sum-exp over all processes of each element of a tensor."""
        if self.size == 1:
            return values
        highest = values.clone()
        with _reaching_all():
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        highest = highest.clamp(min=torch.finfo(values.dtype).min)  # −∞ everywhere stays −∞
        sums = (values - highest).exp()
        self.sum(sums)
        return highest + sums.log()


ALONE = World()


@contextmanager
def joined(device: str) -> Iterator[tuple[World, str]]:
    """Join the processes that torchrun started; yield their world, and the device of this one.

    Started without torchrun, a process is alone. On GPUs each process has its own: `auto` and `cuda` become `cuda:N`.
    Of a user's mistake, which all have in common, rank 0 alone speaks.

    Raises:
        UserError: There are fewer GPUs than processes on this machine.
        WorkersFailedError: The other processes cannot be reached.
    """
    if "WORLD_SIZE" not in os.environ:
        yield ALONE, device
        return
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if on_gpu := device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"This machine has {torch.cuda.device_count()} GPUs for {os.environ.get('LOCAL_WORLD_SIZE')} "
                "processes; give torchrun a smaller --nproc-per-node."
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    with _reaching_all():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    sharing = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = World(dist.get_rank(), dist.get_world_size(), sharing)
    try:
        yield world, device
    except UserError as mistake:
        raise mistake if world.leads else SystemExit(2) from mistake
    finally:
        dist.destroy_process_group()


@contextmanager
def _reaching_all() -> Iterator[None]:
    """Turn what torch.distributed says when a process is gone into a sentence."""
    try:
        yield
    except RuntimeError as problem:
        raise WorkersFailedError(
            f"Process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')} lost touch with another "
            f"({str(problem).splitlines()[0]:.100}); the same command goes on from the last checkpoint, or from the "
            "start where there is none, with any number of processes."
        ) from problem
