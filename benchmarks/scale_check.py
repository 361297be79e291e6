"""Compare the simulation of scale_sim.py with real Ray runs on this machine, whose encoder sleeps instead of computing.

Example:
    python benchmarks/scale_check.py --workers 24

Each run uses the package's Ray executor, worker loop, leases and store. There are three: undisturbed, with workers
killed, and with workers killed that count as other machines, so that their leases have to expire. The simulation is
given when each worker started, and the time of a worker alone for a shard; from these it predicts when the last shard
is committed. Times count from the first worker's start.
"""

import argparse
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from scale_sim import Plan, Simulation
from torch import Tensor

from sail_align.extract.data import Part, Sample
from sail_align.extract.encoders.identity import EncoderSpec, Identity
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.ray_cluster import IN_FLIGHT, RayCluster
from sail_align.extract.executor.run import run_job
from sail_align.extract.executor.worker import Share
from sail_align.extract.store.store import Store

ROWS = 8
"""Rows of a shard."""


@dataclass(frozen=True)
class Sleeping:
    """A text encoder, and its own configuration, that sleeps for each shard.

    Attributes:
        seconds: Time for a shard.
        pids: Folder with a file for each process that has encoded.
        apart: Whether each process counts as another machine, so that no other knows whether it is alive.
    """

    seconds: float
    pids: Path
    apart: bool
    layers = (-1,)

    @property
    def identity(self) -> Identity:
        """A made-up identity."""
        return Identity(EncoderSpec("sleeping", "text", {}, "0" * 64, {}, "mean", "float32", 4), [1.0], {})

    def matches(self, spec: EncoderSpec) -> bool:
        """Return whether a spec is its own."""
        return spec == self.identity.spec

    def load(self, device: str) -> "Sleeping":
        """Prepare the worker's process; return itself."""
        if self.apart:
            from sail_align.extract.system import leases

            leases._machine = lambda: f"machine of {os.getpid()}"  # type: ignore[assignment]
        return self

    def encode(self, texts: Sequence[str], advance: Any = None) -> Tensor:
        """Sleep; return zeros (B, 4)."""
        with suppress(FileExistsError):
            (self.pids / str(os.getpid())).touch(exist_ok=False)
        time.sleep(self.seconds)
        if advance is not None:
            advance(len(texts))
        return torch.zeros(len(texts), 4)


class WatchedCluster(RayCluster):
    """The executor, which notes when its workers have started."""

    def execute(self, *args: Any) -> None:
        """Run; see `RayCluster.execute`."""
        self.starts: list[float] = []
        super().execute(*args)

    def _receive(self, *args: Any) -> None:
        ready = len(self._ready)
        super()._receive(*args)
        if len(self._ready) > ready:
            self.starts.append(time.time())


def samples(rows: int) -> Iterator[Sample]:
    """Yield samples with a caption."""
    for row in range(rows):
        yield Sample(key=f"{row}", image=f"{row}.jpg", captions={"raw": f"caption {row}"})


def make_job(folder: Path, shards: int, seconds: float, *, apart: bool) -> Job:
    """Make a store with an index, and return the job of encoding its captions."""
    (folder / "pids").mkdir()
    path, parts = folder / "sleep.zarr", [Part("0", partial(samples, ROWS * shards))]
    Store.create(path, dataset="sleep", manifest={}, parts=parts, captions=["raw"], shard_rows=ROWS, quiet=True)
    encoder: Any = Sleeping(seconds, folder / "pids", apart)
    manifest: Any = SimpleNamespace(rows={})
    return Job(manifest, folder, path, None, encoder, ("raw",))


def last_commit(job: Job) -> float:
    """Return the time of the last marker."""
    return max(file.stat().st_mtime for file in (job.store / "commits").rglob("*.json"))


def calibrate(seconds: float) -> float:
    """Return the time of a worker alone for a shard, with its lease, its files and its marker."""
    shards = 4
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), shards, seconds, apart=False)
        worker = job.worker(Share(), "cpu", 1, lambda event: None)
        began = time.time()
        for shard in worker.pending():
            worker.run_one(shard)
        return (last_commit(job) - began) / shards


def kill_workers(executor: WatchedCluster, pids: Path, kills: Sequence[float]) -> None:
    """Kill worker 0, 1, … in the order of their starts, at these times after the first one's."""
    for number, after in enumerate(kills):
        while not getattr(executor, "starts", None) or time.time() < executor.starts[0] + after:
            time.sleep(0.01)
        started = sorted(pids.iterdir(), key=lambda file: file.stat().st_mtime)
        os.kill(int(started[number].name), signal.SIGKILL)


def check(cluster: Cluster, plan: Plan, seconds: float, *, apart: bool) -> None:
    """Run a plan in reality and in the simulation, and print both times."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(folder, plan.shards, seconds, apart=apart)
        executor = WatchedCluster(cluster.address, str(plan.workers), "cpu")
        threading.Thread(target=kill_workers, args=(executor, folder / "pids", [at for at, _ in plan.kills])).start()
        run_job(job, executor, Share(), quiet=True)
        first = executor.starts[0]
        measured = last_commit(job) - first
    starts = [each - first for each in executor.starts]
    starts, again = starts[: plan.workers], starts[plan.workers :]
    restarts = mean(again) - mean(at for at, _ in plan.kills) if again else None
    takeover = plan.takeover if apart else (0.0, 0.0)
    plan = replace(plan, workers=len(starts), starts=starts, restarts=restarts, takeover=takeover)
    predicted = Simulation(plan).run().now
    what = f"{len(plan.kills)} killed" + (", as other machines" if apart else "")
    print(
        f"| {len(starts)} workers, {plan.shards} shards of {seconds:g} s, {what} | {starts[-1]:.0f} s "
        f"| {measured:.1f} s | {predicted:.1f} s | {predicted / measured:.3f} |",
        flush=True,
    )


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=24)
    parser.add_argument("--shards", type=int, default=360, help="of each run")
    parser.add_argument("--seconds", type=float, default=6.0, help="that the encoder sleeps for a shard")
    parser.add_argument("--killed", type=int, default=4, help="workers that are killed in the second and third run")
    given = parser.parse_args()
    alone = calibrate(given.seconds)
    print(f"A worker alone needs {alone:.3f} s for a shard.")
    print("| run | last start | measured | predicted | predicted / measured |\n|---|---|---|---|---|", flush=True)
    ideal = given.shards * given.seconds / given.workers
    kills = [(ideal * (number + 1) / (given.killed + 1), number) for number in range(given.killed)]
    plan = Plan(given.shards, alone, given.workers, in_flight=IN_FLIGHT)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": given.workers + given.killed})
    try:
        check(cluster, plan, given.seconds, apart=False)
        for apart in (False, True):
            check(cluster, replace(plan, kills=kills), given.seconds, apart=apart)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
