"""Several processes take the same steps as one, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from sail_align.align.data.loader import Batch
from sail_align.align.model.alignment import Architecture
from sail_align.align.model.loss import infonce_loss, sigmoid_loss
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.settings import FitSettings
from sail_align.align.train.distributed import World, joined
from sail_align.align.train.step import Stepper, make_optimizer, train_step
from sail_align.extract.errors import UserError, WorkersFailedError

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


def in_processes(size, work, folder):
    """Run `work(world)` in processes that are joined; return what each returned."""
    context = mp.get_context("spawn")
    port = free_port()
    processes = [context.Process(target=_one, args=(work, folder, rank, size, port)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def _one(work, folder, rank, size, port):
    os.environ.update(environment(rank, size, port))
    torch.set_num_threads(1)
    with joined("auto") as (world, device):
        assert device == CPU
        torch.save(work(world), folder / f"{rank}.pt")


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
        value = train_step(stepper, Batch(images[own], texts[:, own]), 1e-3)
        found |= {f"{name} {field}": number for field, number in value._asdict().items()}
        found |= {f"{name} ∂{key}": parameter.grad for key, parameter in model.named_parameters()}
        found |= {f"{name} {key}": tensor.clone() for key, tensor in model.state_dict().items()}
    return found


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_and_values_are_those_of_one_process(tmp_path, size):
    expected = one_step(World())
    for rank, found in enumerate(in_processes(size, one_step, tmp_path)):
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


def test_processes_exchange_objects_and_tensors(tmp_path):
    for rank, found in enumerate(in_processes(2, messages, tmp_path)):
        assert found["every"] == 10 * rank
        assert found["first"]
        assert found["mistake of one"] == "made by 1"
        assert found["mistake of rank 0"] == "made by 0"
        assert found["collect"] == [[0, "é", None], [1, "éééé", None]]
        assert found["spans"] == [(0, 2), (2, 5)]
        assert (found["broadcast"], found["sum"]) == ([0, 0], [1, 1])
        expected = torch.logsumexp(torch.tensor([[0.0, -torch.inf, 500.0], [1.0, -torch.inf, 500.0]]), 0)
        torch.testing.assert_close(found["log-sum-exp"], expected)


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
        train_step(stepper, rows, 0.0)
    return seen


def test_dropout_differs_between_processes_and_is_reproducible(tmp_path):
    (one, again), (other, _) = in_processes(2, dropped_out, tmp_path)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def leave(world):
    if world.rank == 1:
        os._exit(9)
    try:
        world.sum(torch.zeros(1))
    except WorkersFailedError as lost:
        return str(lost)


def test_remaining_process_reports_the_lost_one(tmp_path):
    with pytest.raises(FileNotFoundError):  # of the one that left
        in_processes(2, leave, tmp_path)
    assert torch.load(tmp_path / "0.pt").startswith("Process 0 of 2 lost its connection to another (")


def torchrun(size, *words):
    """Start `sail-align fit` in so many processes; one is started as typed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size]
    program = [Path(sys.executable).with_name("sail-align"), "fit", *words]
    command = [*(command if size > 1 else command[:1]), *program]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(run):
    """Return the loss of each step."""
    return {entry["step"]: entry["loss"] for entry in metrics(run) if entry["kind"] == "train"}


def wait_for_step(step, run, job):
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or f'"step": {step},' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)


FIT = ("--quiet", "--device", "cpu", "--dim", 8, "--batch-size", 51, "--lr", 1e-3, "--optimizer", "adamw")
FIT = (*FIT, "--image-dropout", 0, "--text-dropout", 0)


def test_torchrun_trains_like_one_process(make_store, tmp_path):
    many = make_store("many", rows=200, captions={"raw": (), "short": (), "long": ()})
    few = make_store("few", rows=100, captions={"long": (), "raw": ()}, first=500)
    stores = ("--features", many, "--features", few)
    ends = {}
    for size in (1, 2):
        run = tmp_path / f"run of {size}"
        words = (*stores, "--out", run, "--positives", 2, *FIT, "--loss", "infonce", "--steps", 6)
        job = torchrun(size, *words)
        said, complained = job.communicate()
        assert job.returncode == 0, complained
        assert said.count(f"wrote {run}") == 1
        ends[size] = metrics(run)
    for one, two in zip(ends[1], ends[2], strict=True):
        assert two.pop("kind") == one.pop("kind")
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_lost_process_ends_the_job_and_any_number_resumes(make_store, tmp_path):
    steps, run = 400, tmp_path / "run"
    words = ("--features", make_store(), *FIT, "--steps", steps)
    job = torchrun(2, *words, "--out", run)
    wait_for_step(20, run, job)
    job.terminate()
    _, said = job.communicate(timeout=60)
    saved = Checkpoint.read(run).step
    assert 20 <= saved < steps
    assert f"The same command resumes {run} from step {saved}." in said

    job = torchrun(2, *words, "--out", run)
    wait_for_step(saved + 20, run, job)
    os.kill(process_of(job, rank=1), signal.SIGKILL)
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0
    assert said.count("error: Process 0 of 2 lost its connection to another (") == 1

    ends = {}
    for size in (1, 3):
        shutil.copytree(run, copy := tmp_path / f"resumed by {size}")
        job = torchrun(size, *words, "--out", copy)
        said, complained = job.communicate(timeout=100)
        assert job.returncode == 0, complained
        assert f"resuming {copy}" in said
        ends[size] = trained(copy)
        assert list(ends[size]) == list(range(1, steps + 1))
        assert [ends[size][step] for step in range(1, saved + 1)] == list(trained(run).values())[:saved]
    whole = torchrun(1, *words, "--out", tmp_path / "whole")
    assert whole.wait(timeout=100) == 0
    for losses in ends.values():
        assert losses == pytest.approx(trained(tmp_path / "whole"), rel=1e-3)


def process_of(job, rank):
    """Return the pid of a process that torchrun started."""
    for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"{job.pid} has no child of rank {rank}")


def test_mistake_is_reported_once(make_store):
    store = make_store()
    job = torchrun(2, "--features", store, "--out", store, *FIT, "--steps", 1)
    _, said = job.communicate()
    assert job.returncode != 0
    assert said.count("error:") == 1
    assert f"error: {store} exists and is not a run. Pass another --out.\n" in said
