"""Training on a GPU that computes nothing: devices, transfers, streams and collectives."""

import math
from functools import partial
from itertools import islice

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from fake_streams import FakeEvent, RaceError
from torch._subclasses.fake_tensor import FakeTensor

from sail_align.align.data.loader import PREFETCH, Batch, Stream
from sail_align.align.data.pairs import open_pairs
from sail_align.align.model.alignment import Architecture
from sail_align.align.model.loss import infonce_loss, sigmoid_loss
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.claim import claim_run
from sail_align.align.settings import FitSettings
from sail_align.align.train import distributed
from sail_align.align.train import step as steps
from sail_align.align.train.distributed import World
from sail_align.align.train.plan import make_plan
from sail_align.align.train.step import Stepper, make_optimizer
from sail_align.align.train.trainer import fit
from sail_align.extract.errors import WorkersFailedError

pytestmark = pytest.mark.slow

ROWS, CAPTIONS = 23, 2
NOTHING, EVERYTHING = 0, 1 << 40
LOSSES = {"sigmoid": sigmoid_loss, "weighted": partial(sigmoid_loss, weights=(1.0, 0.5)), "infonce": infonce_loss}


def take_steps(loss="sigmoid", optimizer="lion", precision="float32", world=None, keep_bytes=None, head="glu", **more):
    """Take two steps on the GPU; return the stepper and the last loss."""
    used = LOSSES[loss]
    if loss == "infonce" and world:
        used = partial(used, across=world.log_sum_exp)
    model = Architecture(head, 12, 8, 6, expansion=2, **more).build().to(CUDA)
    made = make_optimizer(model, FitSettings(steps=2, optimizer=optimizer))
    stepper = Stepper(model, used, made, CUDA, loss != "infonce", 12, keep_bytes, precision, world or World())
    batch = Batch(torch.randn(ROWS, 12).half(), torch.randn(CAPTIONS, ROWS, 8).half()).to(CUDA)
    for _ in range(2):
        value = stepper.step(batch, 1e-3)
    return stepper, value


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16", "image_dropout": 0.3, "keep_bytes": NOTHING},
        {"precision": "tf32", "loss": "weighted", "linear_path": True, "image_power": 0.5},
        {"head": "mlp", "loss": "infonce", "optimizer": "adamw", "precision": "bfloat16"},
        {"head": "mlp", "loss": "infonce", "keep_bytes": EVERYTHING, "text_dropout": 0.3},
        {"head": "linear", "optimizer": "adamw", "precision": "tf32"},
        {"head": "linear", "loss": "infonce", "precision": "bfloat16"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_step_stays_on_the_card_and_never_waits_for_it(changes):
    with fake_cuda() as card:
        stepper, value = take_steps(**changes)
        assert card.transfers == []
    kept = [*value, *stepper.model.parameters(), *(each.grad for each in stepper.model.parameters())]
    kept += [each for state in stepper.optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
    assert all(isinstance(each, FakeTensor) or each.ndim == 0 for each in kept)  # a step count stays on the CPU
    assert {each.dtype for each in kept} == {torch.float32}


@pytest.mark.parametrize("name", ["zeros_like", "empty"])
def test_a_tensor_of_a_step_on_the_cpu_is_found(name, monkeypatch):
    class OnCPU:
        def __getattr__(self, attribute):
            found = getattr(torch, attribute)
            return (lambda *args, device=None, **more: found(*args, **more).cpu()) if attribute == name else found

    monkeypatch.setattr(steps, "torch", OnCPU())
    with fake_cuda(), pytest.raises(RuntimeError, match="same device"):
        take_steps()


class Collectives:
    """Two processes with NCCL for tensors and gloo for objects: the operations of torch.distributed that are used."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self):
        self.calls = []

    def _on_card(self, name, tensor):
        self.calls.append(name)
        if not (isinstance(tensor, FakeTensor) and tensor.device.type == "cuda"):
            raise RuntimeError("No backend type associated with device type cpu")
        if not tensor.is_contiguous():
            raise RuntimeError("Tensors must be contiguous")

    def broadcast(self, tensor, src=0, group=None):
        self._on_card("broadcast", tensor)

    def reduce(self, tensor, dst=0, op=None, group=None):
        self._on_card("reduce", tensor)

    def all_reduce(self, tensor, op=None, group=None):
        self._on_card("all_reduce", tensor)

    def all_gather_object(self, values, value, group=None):
        values[:] = [value] * len(values)


@pytest.fixture
def collectives(monkeypatch):
    made = Collectives()
    monkeypatch.setattr(distributed, "dist", made)
    return made


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_tensors_that_processes_exchange_are_on_the_card(collectives, loss):
    with fake_cuda() as card:
        stepper, _ = take_steps(loss=loss, world=World(1, 2), precision="bfloat16")
        stepper.world.broadcast(*(each.data for each in stepper.model.parameters()))
        assert {"broadcast", "reduce", "all_reduce"} == set(collectives.calls)
        assert card.transfers == []
        with pytest.raises(WorkersFailedError, match="device type cpu"):
            stepper.world.sum(torch.zeros(3))


def test_a_whole_fit_runs_on_the_card(make_store, tmp_path):
    options = {"preset": "small", "head": "glu", "batch_size": 50, "steps": 4, "dim": 8, "start": "random"}
    options |= {"expansion": 1, "precision": "bfloat16", "bank": 16}
    plan, _ = make_plan([make_store(rows=260)], options)
    run = claim_run(tmp_path / "run", plan.record()).path
    with fake_cuda():
        fit(plan, run, device=CUDA, quiet=True, save_seconds=0)
    assert Checkpoint.read(run).finished


@pytest.fixture
def stream(make_store):
    """A stream over 300 numbered rows of page-locked memory, on a GPU."""
    pairs = open_pairs([make_store(numbered=True)], ["raw"])
    with fake_cuda() as card, Stream(pairs, [each.usable() for each in pairs], batch_size=40, seed=0, pin=True) as made:
        yield card, made


def test_no_buffer_is_written_while_it_is_copied(stream):
    card, made = stream
    for batch, _ in islice(made.batches_on(CUDA), 4 * PREFETCH):
        assert all(isinstance(part, FakeTensor) for part in batch)
        batch.images + 1
    assert card.transfers == []


def test_a_buffer_that_is_written_too_early_is_found(stream, monkeypatch):
    card, made = stream
    monkeypatch.setattr(FakeEvent, "synchronize", lambda event: None)
    with pytest.raises(RaceError, match="written while a copy from it was in flight"):
        list(islice(made.batches_on(CUDA), 4 * PREFETCH))
    card.streams.in_flight.clear()


def test_a_batch_that_is_used_too_early_or_reused_too_late_is_found(stream, monkeypatch):
    card, made = stream
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    with pytest.raises(RaceError, match="call record_stream"):
        next(made.batches_on(CUDA))[0].images + 1
    with card.streams.within(torch.cuda.Stream()):
        early = card.streams.pin(torch.zeros(3)).to(CUDA, non_blocking=True)
    with pytest.raises(RaceError, match="wait for the copy"):
        early + 1


def test_the_program_never_waits_for_the_numbers_of_a_step(make_store, tmp_path):
    options = {
        "preset": "small",
        "head": "linear",
        "batch_size": 50,
        "dim": 8,
        "start": "random",
        "precision": "bfloat16",
    }
    options |= {"held_out": 0, "bank": 0}
    path, waits = make_store(rows=260), []
    for count in (3, 9):
        plan, _ = make_plan([path], {**options, "steps": count})
        run = claim_run(tmp_path / f"{count}", plan.record()).path
        with fake_cuda() as card:
            fit(plan, run, device=CUDA, quiet=True, save_seconds=math.inf)  # on a busy machine, a save may be due
        waits.append(len(card.transfers))
        assert len((run / "metrics.jsonl").read_text().splitlines()) == count
    assert waits[0] == waits[1]  # those of the last save
