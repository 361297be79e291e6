"""Extractions that are killed and stopped, for test_faults.py.

A scenario runs in a warm process and forks its extractions, so torch is imported once.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import FakeChoice

from sail_align.extract.executor.job import Job
from sail_align.extract.executor.local import LocalExecutor
from sail_align.extract.executor.run import run_job
from sail_align.extract.executor.worker import Share
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store import store as store_module
from sail_align.extract.system.command_line import run_command

SHARD_ROWS = 24  # 25 shards an array, each a single batch


def play(root: Path, scenario: str) -> None:
    """Run a scenario on the pictures in `root`; write its result to `result.json` there."""
    store_module._shard_rows = lambda rows: SHARD_ROWS
    result = getattr(FaultyRuns(root), scenario)()
    (root / "result.json").write_text(json.dumps(result))


class FaultyRuns:
    """Extractions of the pictures in a folder, whose fake encoders log each batch."""

    def __init__(self, root: Path):
        self.root = root
        self.log = root / "encoded.log"

    def make_job(self, name: str, seconds: float) -> Job:
        manifest, data_root = find_manifest(str(self.root / "pictures.yaml"))
        image, text = FakeChoice("image", self.log, seconds), FakeChoice("text", self.log, seconds)
        return Job(manifest, data_root, self.root / name, image, text, ("raw", "long"))

    def start(
        self,
        name: str,
        *,
        seconds: float = 0.01,
        devices: int = 1,
        share: str = "1/1",
        errors: str = "errors.txt",
        modality: str = "image",
        fork: bool = False,
    ) -> int:
        """Start an extraction in its own process and return the pid. Its workers are forks on request, to save time."""
        if pid := os.fork():
            return pid
        if fork:
            forks = multiprocessing.get_context("fork")
            multiprocessing.get_context = lambda _: forks
        os.dup2(os.open(self.root / errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)

        def command(**_: object) -> None:
            job = replace(self.make_job(name, seconds), image=FakeChoice(modality, self.log, seconds))
            run_job(job, LocalExecutor(["cpu"] * devices), Share.parse(share), quiet=True)

        try:
            run_command(command)
            os._exit(0)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:  # any other error: its traceback is in the file
            traceback.print_exc()
            os._exit(1)

    def wait_for(self, condition: Callable[[], bool], pid: int) -> None:
        """Wait for a condition or the end of a process. If the process hangs, raise with its traceback."""
        deadline = time.monotonic() + 120
        while not condition() and not has_ended(pid):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGABRT)
                exit_code(pid)
                raise TimeoutError((self.root / "errors.txt").read_text())
            time.sleep(0.001)

    def batches(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def has_encoded(self, number: int) -> bool:
        return len(self.batches()) >= number

    def committed(self, name: str) -> int:
        return sum(1 for _ in (self.root / name / "commits").rglob("*.json"))

    def contents(self, name: str) -> dict[str, bytes]:
        path = self.root / name
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if not file.is_dir()}

    def run_undisturbed(self) -> dict[str, int]:
        """Create the reference store, and return how often each batch was encoded."""
        assert exit_code(self.start("whole.zarr", seconds=0)) == 0
        return self.count_and_clear_batches()

    def count_and_clear_batches(self) -> dict[str, int]:
        lines = self.batches()
        self.log.unlink(missing_ok=True)
        return {line: lines.count(line) for line in lines}

    def kills(self) -> dict[str, object]:
        """SIGKILL a run at random moments, also before the index exists, until one run completes."""
        expected = self.run_undisturbed()
        rng = random.Random(0)
        deaths, wasted, most = 0, 0, 0
        while True:
            before, done = len(self.batches()), self.committed("killed.zarr")
            pid = self.start("killed.zarr")
            self.wait_for(partial(self.has_encoded, before + rng.randint(0, 7)), pid)
            time.sleep(rng.uniform(0, 0.03 if done else 0.2))
            if has_ended(pid):
                end = exit_code(pid)
                break
            os.kill(pid, signal.SIGKILL)
            exit_code(pid)
            deaths += 1
            lost = len(self.batches()) - before - (self.committed("killed.zarr") - done)
            wasted, most = wasted + lost, max(most, lost)
        times = self.count_and_clear_batches()
        return {
            "kills": deaths,
            "end": end,
            "identical": self.contents("killed.zarr") == self.contents("whole.zarr"),
            "shards": len(expected),
            "same batches": times.keys() == expected.keys(),
            "encoded again": sum(times.values()) - len(times),
            "lost in flight": wasted,
            "most lost in a kill": most,
        }

    def two_at_once(self) -> dict[str, object]:
        """Two simultaneous commands on one store, then two shares of another."""
        expected = self.run_undisturbed()
        ends = [exit_code(pid) for pid in [self.start("two.zarr", errors=f"errors{n}.txt") for n in range(2)]]
        times = self.count_and_clear_batches()
        halves = [self.start("halves.zarr", share=f"{n}/2", errors=f"errors{n}.txt") for n in (1, 2)]
        ends += [exit_code(pid) for pid in halves]
        by_halves = self.count_and_clear_batches()
        return {
            "ends": ends,
            "identical": [self.contents(name) == self.contents("whole.zarr") for name in ("two.zarr", "halves.zarr")],
            "most often encoded": [max(times.values()), max(by_halves.values())],
            "same batches": times.keys() == by_halves.keys() == expected.keys(),
        }

    def signals(self) -> dict[str, object]:
        """Stop runs by SIGTERM and by Ctrl-C, then resume."""
        self.run_undisturbed()
        result: dict[str, object] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            shutil.rmtree(self.root / "stopped.zarr", ignore_errors=True)
            self.count_and_clear_batches()
            pid = self.start("stopped.zarr", seconds=0.2)
            self.wait_for(partial(self.has_encoded, 5), pid)
            signalled = time.monotonic()
            os.kill(pid, number)
            end = exit_code(pid)
            seconds = time.monotonic() - signalled
            files = self.contents("stopped.zarr")
            result[number.name] = {
                "end": end,
                "seconds": seconds,
                "stderr": (self.root / "errors.txt").read_text(),
                "log": json.loads((self.root / "stopped.zarr.log.jsonl").read_text().splitlines()[-1]),
                "left behind": [name for name in files if name.startswith("leases") or name.endswith(".tmp")],
            }
        result["end"] = exit_code(self.start("stopped.zarr"))
        times = self.count_and_clear_batches()
        result["encoded again"] = sum(times.values()) - len(times)
        result["identical"] = self.contents("stopped.zarr") == self.contents("whole.zarr")
        return result

    def workers(self) -> dict[str, object]:
        """Kill one of three worker processes. Then stop the parent of two."""
        self.run_undisturbed()
        pid = self.start("workers.zarr", seconds=0.05, devices=3, fork=True)
        self.wait_for(partial(self.has_encoded, 10), pid)
        os.kill(worker_pids(pid)[0], signal.SIGKILL)
        result: dict[str, object] = {"end": exit_code(pid), "stderr": (self.root / "errors.txt").read_text()}
        times = self.count_and_clear_batches()
        result["identical"] = self.contents("workers.zarr") == self.contents("whole.zarr")
        result["encoded again"] = sum(times.values()) - len(times)

        shutil.rmtree(self.root / "workers.zarr")
        pid = self.start("workers.zarr", seconds=0.05, devices=2, fork=True)
        self.wait_for(partial(self.has_encoded, 10), pid)
        signalled = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        result["stopped"] = {
            "end": exit_code(pid),
            "seconds": time.monotonic() - signalled,
            "stderr": (self.root / "errors.txt").read_text(),
        }
        result["left behind"] = [name for name in self.contents("workers.zarr") if name.startswith("leases")]
        return result

    def user_error(self) -> dict[str, object]:
        """A user error that only worker processes detect."""
        return {
            "end": exit_code(self.start("s.zarr", devices=2, modality="nothing")),
            "stderr": (self.root / "errors.txt").read_text(),
            "left behind": [name for name in self.contents("s.zarr") if name.startswith("leases")],
        }

    def ray_stop(self) -> dict[str, object]:
        """SIGTERM to the driver of a local Ray cluster, in a new process, because Ray hangs in a fork."""
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONFAULTHANDLER": "1"}
        command = [sys.executable, __file__, str(self.root)]
        with (self.root / "errors.txt").open("w") as errors:
            pid = subprocess.Popen(command, stderr=errors, env=environment).pid
        self.wait_for(partial(self.has_encoded, 5), pid)
        signalled = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        return {
            "end": exit_code(pid),
            "seconds": time.monotonic() - signalled,
            "stderr": (self.root / "errors.txt").read_text(),
            "left behind": [name for name in self.contents("ray.zarr") if name.startswith("leases")],
        }


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def ray_driver(root: Path) -> None:
    from sail_align.extract.executor.ray_cluster import RayCluster

    def command(**_: object) -> None:
        run_job(FaultyRuns(root).make_job("ray.zarr", 0.2), RayCluster(None, "2", "cpu"), Share(), quiet=True)

    run_command(command)


def worker_pids(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


if __name__ == "__main__":
    store_module._shard_rows = lambda rows: SHARD_ROWS
    ray_driver(Path(sys.argv[1]))
