"""Several processes take the same steps as one, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from saving_fit import fit

from sail_align.align.data.loader import Batch
from sail_align.align.model.alignment import Architecture
from sail_align.align.model.loss import infonce_loss, sigmoid_loss
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.folder import RunFolder
from sail_align.align.settings import FitSettings
from sail_align.align.train import distributed
from sail_align.align.train.distributed import World, joined
from sail_align.align.train.step import Stepper, make_optimizer
from sail_align.extract.errors import UserError

CPU = torch.device("cpu")
ROWS = 23
LOSSES = {"sigmoid": sigmoid_loss, "weighted": partial(sigmoid_loss, weights=(1.0, 0.5)), "infonce": infonce_loss}


def environment(rank, size, port):
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.fixture
def join(start_warm, tmp_path):
    """Start `run(*arguments, path)` in processes that can be joined; return the processes and their paths."""

    def start(run, *arguments, size=2):
        paths, port = [tmp_path / f"{rank}.pt" for rank in range(size)], free_port()
        return [
            (start_warm(run, *arguments, path, output=path.with_suffix(".txt"), **environment(rank, size, port)), path)
            for rank, path in enumerate(paths)
        ]

    return start


@pytest.fixture
def in_processes(join):
    """Run `work(world)` in joined processes; return what each returned, None for one that died."""
    return lambda work, size=2: [
        torch.load(path) if process.wait() == 0 else None for process, path in join(_one, work, size=size)
    ]


def _one(work, path):
    with joined("auto") as (world, device):
        assert device == CPU
        torch.save(work(world), path)


def one_step(world):
    """Take a step with each loss; return its values and all gradients."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(*shape, generator=generator).half() for shape in ((ROWS, 12), (2, ROWS, 8)))
    # As numpy.array_split: the first parts have a row more.
    cuts = [0, *(sum(len(part) for part in images.tensor_split(world.size)[: r + 1]) for r in range(world.size))]
    own = slice(cuts[world.rank], cuts[world.rank + 1])
    found = {}
    for name, loss in LOSSES.items():
        if name == "infonce":
            loss = partial(loss, across=world.log_sum_exp)
        torch.manual_seed(0)
        model = Architecture("glu", 12, 8, 6, expansion=2).build(scale=5.0, bias=-1.0)
        optimizer = make_optimizer(model, FitSettings(steps=1))
        stepper = Stepper(model, loss, optimizer, CPU, in_parts=name != "infonce", micro_batch=5, world=world)
        value = stepper.step(Batch(images[own], texts[:, own]), 1e-3)
        found |= {f"{name} {field}": number for field, number in value._asdict().items()}
        found |= {f"{name} ∂{key}": parameter.grad for key, parameter in model.named_parameters()}
        found |= {f"{name} {key}": tensor.clone() for key, tensor in model.state_dict().items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_gradients_and_values_are_those_of_one_process(in_processes, size):
    expected = one_step(World())
    for rank, found in enumerate(in_processes(one_step, size)):
        for name, value in expected.items():
            if "∂" in name or name.split()[1] in ("total", "positive_logit", "negative_mass"):
                bound = 1e-5 * float(value.abs().max()) + 1e-8
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=bound, msg=f"{rank} {name}")


def messages(world):
    """Use all ways to exchange objects and tensors."""

    def mistaken():
        raise UserError(f"made by {world.rank}")

    def caught(work):
        try:
            work()
        except UserError as mistake:
            return str(mistake)

    own = torch.full((2,), float(world.rank))
    received, total = own.clone(), own.clone()
    world.broadcast(received)
    world.sum(total)
    values = torch.tensor([float(world.rank), -torch.inf, 500.0])
    return {
        "every": world.every(lambda: world.rank * 10),
        "first": world.first(lambda: (world.rank, Path("run"))) == (0, Path("run")),
        "mistake of one": caught(lambda: world.every(lambda: mistaken() if world.rank == 1 else None)),
        "mistake of rank 0": caught(lambda: world.first(mistaken)),
        "collect": world.collect([world.rank, "é" * (1 + 3 * world.rank), None]),
        "spans": [(rows.start, rows.stop) for rows in world.spans(2 + world.rank)],
        "broadcast": received.tolist(),
        "sum": total.tolist(),
        "log-sum-exp": world.log_sum_exp(values),
    }


@pytest.mark.slow
def test_processes_exchange_objects_and_tensors(in_processes):
    for rank, found in enumerate(in_processes(messages)):
        assert found["every"] == 10 * rank
        assert found["first"]
        assert found["mistake of one"] == "made by 1"
        assert found["mistake of rank 0"] == "made by 0"
        assert found["collect"] == [[0, "é", None], [1, "éééé", None]]
        assert found["spans"] == [(0, 2), (2, 5)]
        assert (found["broadcast"], found["sum"]) == ([0, 0], [1, 1])
        expected = torch.logsumexp(torch.tensor([[0.0, -torch.inf, 500.0], [1.0, -torch.inf, 500.0]]), 0)
        torch.testing.assert_close(found["log-sum-exp"], expected)


def moved(world):
    """Pass on rows of batches that are spread over three processes in several ways."""
    batch_BD = torch.arange(33.0).reshape(11, 3).half()
    for ends in ((0, 4, 8), (0, 0, 11), (11, 11, 11), (3, 4, 4), (0, 0, 0)):
        have, want = ([slice(*span) for span in pairwise(cuts)] for cuts in ((0, *ends[:2], 11), (0, 4, 8, 11)))
        rows = want[world.rank]
        out = torch.empty(rows.stop - rows.start, 3).half()
        world.move(batch_BD[have[world.rank]], have, want, out)
        assert torch.equal(out, batch_BD[rows])
    return True


@pytest.mark.slow
def test_processes_pass_on_rows(in_processes):
    assert in_processes(moved, 3) == [True] * 3


@pytest.mark.slow
def test_weights_do_not_depend_on_the_cache(begin, make_store, tmp_path):
    """Two processes, each of which holds its part of the rows, train as if they read the stores."""
    stores = [make_store("one", rows=130, captions={"raw": (3,), "long": ()}), make_store("two", rows=71, first=500)]
    words = [word for store in stores for word in ("--features", store)]
    runs = [tmp_path / cache for cache in ("none", "host", "device")]
    for run in runs:
        processes = begin(2, *words, "--positives", 1, "--steps", 9, "--cache", run.name, "--out", run)
        assert [process.wait() for process in processes] == [0, 0]
    weights, *others = ((Checkpoint.read(run).folder / "model.safetensors").read_bytes() for run in runs)
    assert all(other == weights for other in others)


def test_single_process_needs_no_communication(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as (world, device):
        assert (world, device) == (World(), CPU)
    values = torch.arange(6.0).reshape(3, 2)
    spans = world.spans(3)
    assert torch.equal(world.scatter_sum(world.gather(values, spans), spans), values)
    assert world.first(lambda: 5) == world.every(lambda: 5) == 5
    assert torch.equal(world.log_sum_exp(values), values)


def dropped_out(world):
    """Embed the same rows twice with dropout from one seed."""
    torch.manual_seed(0)
    rows = Batch(torch.randn(4, 12).half(), torch.randn(1, 4, 8).half())
    model = Architecture("glu", 12, 8, 6, image_dropout=0.5).build()
    stepper = Stepper(model, sigmoid_loss, make_optimizer(model, FitSettings(steps=1)), CPU, world=world)
    seen = []
    model.image_head.register_forward_hook(lambda _head, _features, out: seen.append(out.detach()))
    for _ in range(2):
        torch.manual_seed(0)
        stepper.step(rows, 0.0)
    return seen


@pytest.mark.slow
def test_dropout_differs_between_processes_and_is_reproducible(in_processes):
    (one, again), (other, _) = in_processes(dropped_out)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def wait_forever(*_arguments):
    """Wait as NCCL does for a process that has died."""
    time.sleep(600)


def lost_process(world):
    if world.rank == 1:
        os._exit(9)
    world.sum(torch.zeros(1))


def blocked_by_lost_process(world):
    distributed.GRACE_SECONDS = 0.2
    if world.rank == 1:
        os._exit(9)
    wait_forever()


def raised_by_one_process(world):
    dist.destroy_process_group, distributed.END_TIME = wait_forever, timedelta(seconds=1)
    if world.rank == 1:
        raise UserError("Chunk 3 is damaged.")
    world.sum(torch.zeros(1))


def failed_in_one_process(world):
    dist.destroy_process_group, distributed.END_TIME = wait_forever, timedelta(seconds=1)
    if world.rank == 1:
        raise ZeroDivisionError("as a fault would")
    world.sum(torch.zeros(1))


LOST = "error: Process 0 of 2 lost its connection to another ("


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (lost_process, 9, ""),
        (blocked_by_lost_process, 9, ""),
        (raised_by_one_process, 2, "error: Process 1: Chunk 3 is damaged.\n"),
        (failed_in_one_process, 1, "ZeroDivisionError: as a fault would\n"),
    ],
)
def test_each_process_ends_with_a_message_where_nccl_would_wait(join, work, code, said):
    (first, _), (other, _) = join(_one, work)
    assert [first.wait(60), other.wait(60)] == [1, code]
    assert first.output.count(LOST) == 1
    assert other.output.endswith(said)


def raised_by_all_processes(world):
    raise UserError("The loss is nan.")


@pytest.mark.slow
def test_an_error_of_all_processes_is_raised_and_shown_by_the_leader(join):
    (first, _), (other, _) = join(_one, raised_by_all_processes)
    assert [first.wait(60), other.wait(60)] == [1, 2]  # the leader's is that of an uncaught exception
    assert first.output.endswith("UserError: The loss is nan.\n")
    assert other.output == ""


class Card:
    def __init__(self, number):
        self.uuid = f"GPU-{number}"


def _on_cards(device, cards, path):
    """Join with GPUs in name only; `cards` has the numbers of those that each process sees."""
    visible = cards[int(os.environ["RANK"])]
    torch.cuda.is_available, torch.cuda.device_count = lambda: bool(visible), lambda: len(visible)
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_properties = lambda device: Card(visible[device.index])
    distributed.Runtime = SimpleNamespace(of=lambda device, precision: SimpleNamespace(device=torch.device(device)))
    begin = dist.init_process_group
    dist.init_process_group = lambda backend, **options: begin(backend.replace(",cuda:nccl", ""), **options)
    with joined(device) as (world, own):
        torch.save((str(own), world.sharing), path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "cards", "found"),
    [
        ("cuda", [[4, 5], [4, 5]], ["cuda:0", "cuda:1"]),
        ("auto", [[4], [5]], ["cuda:0", "cuda:0"]),  # the launcher shows each process one card
        ("cuda", [[4], [4]], "Processes 0 and 1 share a GPU."),
        ("cuda:0", [[4, 5], [4, 5]], "--device is invalid: got cuda:0, which 2 processes of this machine would share."),
    ],
)
def test_each_process_has_its_own_card(join, device, cards, found):
    started = join(_on_cards, device, cards)
    codes = [process.wait(60) for process, _ in started]
    if isinstance(found, list):
        assert [torch.load(path) for _, path in started] == [(each, 1) for each in found]
        assert codes == [0, 0]
    else:
        assert f"UserError: {found}" in started[0][0].output
        assert codes == [1, 2]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(run):
    """Return the loss of each step."""
    return {entry["step"]: entry["loss"] for entry in metrics(run) if entry["kind"] == "train"}


FIT = ("--quiet", "--device", "cpu", "--dim", "8", "--batch-size", "51", "--lr", "1e-3", "--optimizer", "adamw")
FIT = (*FIT, "--image-dropout", "0", "--text-dropout", "0")


@pytest.fixture
def begin(start_warm, tmp_path):
    """Start a fit that saves after every step, in so many processes."""

    def begin(size, *words):
        port, words = free_port(), [str(word) for word in (*FIT, *words)]
        ranks = [environment(rank, size, port) for rank in range(size)] if size > 1 else [{}]
        return [
            start_warm(fit, words, output=tmp_path / f"{port}-{rank}.txt", **variables)
            for rank, variables in enumerate(ranks)
        ]

    return begin


@pytest.mark.slow
def test_torchrun_trains_like_one_process_which_can_resume(begin, make_store, tmp_path):
    many = make_store("many", rows=200, captions={"raw": (), "short": (), "long": ()})
    few = make_store("few", rows=100, captions={"long": (), "raw": ()}, first=500)
    words = ("--features", many, "--features", few, "--positives", 2, "--loss", "infonce", "--steps", 60)
    words += ("--start", "random")  # which torchrun would take for an option of its own, but for the --
    one, two = tmp_path / "one", tmp_path / "two"

    program = Path(sys.executable).with_name("sail-align")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--"]
    command = [*command, program, "fit", *words, *FIT, "--out", two]
    job = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = two / "metrics.jsonl"
    while not log.exists() or '"step": 5,' not in log.read_text():
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    job.terminate()
    _, said = job.communicate(timeout=300)
    saved = Checkpoint.read(two).step
    assert 5 <= saved < 60
    assert said.count(f"The same command resumes {two} from step {saved}.") == 1

    for run in (one, two):
        (process,) = begin(1, *words, "--out", run)
        assert process.wait() == 0, process.output
        assert f"wrote {run}" in process.output
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_lost_process_ends_the_job_and_any_number_resumes(begin, make_store, tmp_path):
    steps, run = 50, tmp_path / "run"
    words = ("--features", make_store(), "--steps", steps)
    first, other = begin(2, *words, "--out", run)
    first.wait_until(lambda: (folder := RunFolder(run).last) and RunFolder(folder).step >= 10)
    other.send(signal.SIGKILL)
    assert first.wait() not in (0, None)
    assert first.output.count(LOST) == 1

    saved = Checkpoint.read(run).step
    assert 10 <= saved < steps
    (process,) = begin(1, *words, "--out", tmp_path / "whole")
    assert process.wait() == 0
    whole = trained(tmp_path / "whole")
    for size in (1, 3):
        shutil.copytree(run, copy := tmp_path / f"resumed by {size}")
        processes = begin(size, *words, "--out", copy)
        assert [process.wait() for process in processes] == [0] * size
        assert f"resuming {copy}" in processes[0].output
        losses = trained(copy)
        assert list(losses) == list(range(1, steps + 1))
        assert list(losses.values())[:saved] == list(trained(run).values())[:saved]
        assert losses == pytest.approx(whole, rel=1e-3)


@pytest.mark.slow
def test_processes_stop_early_together(begin, make_store, tmp_path):
    words = ("--features", make_store(rows=150), "--head", "linear", "--steps", 40, "--patience", 3)
    processes = begin(2, *words, "--lr", "0.3", "--on-collapse", "warn", "--out", tmp_path / "run")
    assert [process.wait() for process in processes] == [0, 0]
    assert "stopped early, after 6 of 40 steps (--patience)\n" in processes[0].output
    assert "note: Training did not improve on its initial weights" in processes[0].output
    last = Checkpoint.read(tmp_path / "run")
    assert (last.step, last.finished, Checkpoint.best(tmp_path / "run").step) == (6, True, 0)


@pytest.mark.slow
def test_mistake_is_reported_once(begin, make_store):
    store = make_store()
    processes = begin(2, "--features", store, "--out", store, "--steps", 1)
    assert [process.wait() for process in processes] == [2, 2]
    said = "".join(process.output for process in processes)
    assert said.count("error:") == 1
    assert f"error: {store} exists and is not a run. Pass another --out.\n" in said
