"""Workers on this machine: none outlives its run, and a shard that fails does not stop the others."""

import errno
import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from types import SimpleNamespace

import pytest
import torch
from fakes import FakeChoice, FakeVision

from sail_align.extract.errors import UserError, WorkersFailedError
from sail_align.extract.executor import local
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.local import LocalExecutor
from sail_align.extract.executor.run import run_job
from sail_align.extract.executor.tally import Tally
from sail_align.extract.executor.worker import Share
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store import store as store_module
from sail_align.extract.store.store import Store
from sail_align.extract.system.signals import StoppedError


@dataclass(frozen=True)
class BadBatches:
    """Loads an image encoder that raises an error for these batches of 32 images, counted from 0."""

    batches: frozenset[int]
    problem: Exception
    layers = (-1,)

    def load(self, device):
        encoder, count = FakeVision(), iter(range(10**6))
        encode = encoder.encode

        def encode_or_raise(pixels):
            if next(count) in self.batches:
                raise self.problem
            return encode(pixels)

        encoder.encode = encode_or_raise
        return encoder

    def matches(self, spec):
        return FakeChoice("image").matches(spec)


def make_job(root, image):
    manifest, data_root = find_manifest(str(root / "pictures.yaml"))
    return Job(manifest, data_root, root / "s.zarr", image, None, ())


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store_module, "_shard_rows", lambda rows: 32)  # 19 shards, each a single batch


def test_stop_between_two_worker_starts_leaves_no_worker(pictures, monkeypatch):
    job = make_job(pictures, FakeChoice("image"))
    job.open_store(quiet=True)
    started, start = [], SpawnProcess.start

    def start_one(process):
        if started:
            raise StoppedError(signal.SIGTERM)
        started.append(process)
        start(process)

    monkeypatch.setattr(SpawnProcess, "start", start_one)
    with pytest.raises(StoppedError):
        LocalExecutor(["cpu"] * 3).execute(job, Share(), Tally(600, "s", quiet=True))
    assert started[0].exitcode == -signal.SIGTERM


class InThisProcess:
    """A process that runs in this one when it is started."""

    pid, exitcode = None, 0

    def __init__(self, target, args):
        self.start = lambda: target(*args)


@pytest.mark.parametrize(
    ("workers", "device", "limits"),
    [
        (5, "cuda", {"cuda:0": 0.3, "cuda:1": 0.45}),
        (3, "cuda:1", {"cuda:1": 0.3}),
        (2, "cuda", {}),
        (2, "cpu", {}),
    ],
)
def test_workers_that_share_a_gpu_divide_its_memory(monkeypatch, workers, device, limits):
    found, used = {}, []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: found.update({str(device): share})
    )
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=InThisProcess)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _kind: context)
    monkeypatch.setattr(local.signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _threads: None)
    job = SimpleNamespace(worker=lambda share, device, *_: SimpleNamespace(run=lambda: used.append(device)))
    executor = LocalExecutor.choose(str(workers), device)
    executor._start(job, Share())
    assert used == executor.devices
    assert found == pytest.approx(limits)


@pytest.mark.slow
def test_failed_shard_does_not_stop_the_others(pictures, small_shards, capsys):
    job = make_job(pictures, BadBatches(frozenset({3}), RuntimeError("odd")))
    with pytest.raises(WorkersFailedError, match=r"^image/fake-image shard 3 failed \(RuntimeError: odd\)\.$"):
        run_job(job, LocalExecutor(["cpu"]), Share(), quiet=True)
    array = Store.open(job.store).image()
    assert set(array.shards) - set(array.markers) == {3}
    assert not (job.store / "leases").exists()
    assert "Traceback" in capsys.readouterr().err
    assert run_job(make_job(pictures, FakeChoice("image")), LocalExecutor(["cpu"]), Share(), quiet=True).encoded == 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "tries"), [(RuntimeError("device lost"), 3), (UserError("No tar."), 1), (MemoryError(), 1)]
)
def test_errors_that_concern_all_shards_end_the_run(pictures, small_shards, problem, tries):
    job = make_job(pictures, BadBatches(frozenset(range(5, 600)), problem))
    with pytest.raises(type(problem) if tries == 1 else WorkersFailedError):
        run_job(job, LocalExecutor(["cpu"]), Share(), quiet=True)
    assert set(Store.open(job.store).image().markers) == set(range(5))
    assert not (job.store / "leases").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gone", "empty"])
def test_images_of_an_unmounted_disk_are_not_recorded_as_missing(pictures, small_shards, how):
    images = pictures / "images"

    class Unmounting(BadBatches):
        def load(self, device):
            encoder = FakeVision()
            encode = encoder.encode

            def encode_and_lose(pixels):
                if images.exists():
                    images.rename(pictures / "elsewhere")
                    if how == "empty":
                        images.mkdir()
                return encode(pixels)

            encoder.encode = encode_and_lose
            return encoder

    job = make_job(pictures, Unmounting(frozenset(), RuntimeError()))
    with pytest.raises(UserError, match="images is missing or empty"):
        run_job(job, LocalExecutor(["cpu"]), Share(), quiet=True)
    assert Store.open(job.store).image().counts.get("missing", 0) <= 1  # 7.png, which never existed


def test_read_only_store_is_a_user_error(pictures, monkeypatch):
    job = make_job(pictures, FakeChoice("image"))
    job.open_store(quiet=True)
    link = os.link

    def refuse(source, target):
        if "leases" in str(target):
            raise OSError(errno.EROFS, "Read-only file system", str(target))
        link(source, target)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match=r"leases/.* cannot be written \(Read-only file system\)"):
        run_job(job, LocalExecutor(["cpu"]), Share(), quiet=True)


@pytest.mark.slow
def test_store_of_an_unmounted_disk_is_not_created_again(pictures, small_shards):
    class Unmounting(BadBatches):
        def load(self, device):
            encoder = FakeVision()
            encode = encoder.encode

            def encode_and_lose(pixels):
                if len(list((job.store / "commits").rglob("*.json"))) >= 5:
                    job.store.rename(pictures / "elsewhere")
                return encode(pixels)

            encoder.encode = encode_and_lose
            return encoder

    job = make_job(pictures, Unmounting(frozenset(), RuntimeError()))
    with pytest.raises(UserError, match=r"s\.zarr has disappeared"):
        run_job(job, LocalExecutor(["cpu"]), Share(), quiet=True)
    assert not job.store.exists()
    job = make_job(pictures, FakeChoice("image"))
    (pictures / "elsewhere").rename(job.store)
    shutil.rmtree(job.store / "leases")  # of a process that has ended, where it is not this one
    run_job(job, LocalExecutor(["cpu"]), Share(), quiet=True)
    assert Store.open(job.store).image().complete
