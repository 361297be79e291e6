"""Extractions in processes that are killed and stopped, for test_faults.py; torch is imported once and forked.

Usage: faulty_runs.py <folder of pictures.yaml> <scenario>; prints what was seen as one line of JSON.
"""

import json
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

import pandas as pd  # noqa: F401 (once, not in every fork)
from fakes import FakeChoice

from sail_align.extract.errors import run_command
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.local import LocalExecutor
from sail_align.extract.executor.run import run_job
from sail_align.extract.executor.worker import Share
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store import store as store_module

SHARD_ROWS = 12  # 50 shards an array, each a single batch

root = Path(sys.argv[1])
log = root / "encoded.log"


def make_job(name: str, seconds: float) -> Job:
    manifest, data_root = find_manifest(str(root / "pictures.yaml"))
    image, text = FakeChoice("image", log, seconds), FakeChoice("text", log, seconds)
    return Job(manifest, data_root, root / name, image, text, ("raw", "long"))


def start(
    name: str,
    *,
    seconds: float = 0.01,
    devices: int = 1,
    share: str = "1/1",
    errors: str = "errors.txt",
    modality: str = "image",
) -> int:
    """Begin an extraction in a process of its own and return its pid."""
    if pid := os.fork():
        return pid
    os.dup2(os.open(root / errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)

    def command() -> None:
        job = replace(make_job(name, seconds), image=FakeChoice(modality, log, seconds))
        run_job(job, LocalExecutor(["cpu"] * devices), Share.parse(share), quiet=True)

    try:
        run_command(command)
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:  # after an error, which pytest shows from the file
        traceback.print_exc()
        os._exit(1)


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for(condition: Callable[[], bool], pid: int) -> None:
    """Wait until something holds or a process is over; of one that hangs, show where."""
    deadline = time.monotonic() + 120
    while not condition() and not is_over(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGABRT)
            end_of(pid)
            raise TimeoutError((root / "errors.txt").read_text())
        time.sleep(0.001)


def batches() -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def have_begun(number: int) -> bool:
    return len(batches()) >= number


def committed(name: str) -> int:
    return sum(1 for _ in (root / name / "commits").rglob("*.json"))


def contents(name: str) -> dict[str, bytes]:
    path = root / name
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if not file.is_dir()}


def whole() -> dict[str, int]:
    """Make the store that others are compared with; return how often each batch was encoded."""
    assert end_of(start("whole.zarr", seconds=0)) == 0
    return counted()


def counted() -> dict[str, int]:
    lines = batches()
    log.unlink(missing_ok=True)
    return {line: lines.count(line) for line in lines}


def kills() -> dict[str, object]:
    """SIGKILL at random moments, from before there is an index on, until one run comes to its end."""
    once = whole()
    moments = random.Random(0)
    deaths, wasted, most = 0, 0, 0
    while True:
        before, done = len(batches()), committed("killed.zarr")
        pid = start("killed.zarr")
        wait_for(partial(have_begun, before + moments.randint(0, 7)), pid)
        time.sleep(moments.uniform(0, 0.03 if done else 0.2))
        if is_over(pid):
            end = end_of(pid)
            break
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
        deaths += 1
        lost = len(batches()) - before - (committed("killed.zarr") - done)
        wasted, most = wasted + lost, max(most, lost)
    times = counted()
    return {
        "kills": deaths,
        "end": end,
        "identical": contents("killed.zarr") == contents("whole.zarr"),
        "shards": len(once),
        "same batches": times.keys() == once.keys(),
        "encoded again": sum(times.values()) - len(times),
        "lost in flight": wasted,
        "most lost in a kill": most,
    }


def two_at_once() -> dict[str, object]:
    """Two commands typed at once on one path, then two shares of another."""
    once = whole()
    ends = [end_of(pid) for pid in [start("two.zarr", errors=f"errors{n}.txt") for n in range(2)]]
    times = counted()
    halves = [start("halves.zarr", share=f"{n}/2", errors=f"errors{n}.txt") for n in (1, 2)]
    ends += [end_of(pid) for pid in halves]
    by_halves = counted()
    return {
        "ends": ends,
        "identical": [contents(name) == contents("whole.zarr") for name in ("two.zarr", "halves.zarr")],
        "most often encoded": [max(times.values()), max(by_halves.values())],
        "same batches": times.keys() == by_halves.keys() == once.keys(),
    }


def signals() -> dict[str, object]:
    """SIGTERM and Ctrl-C in the middle, then on to the end."""
    whole()
    seen: dict[str, object] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        shutil.rmtree(root / "stopped.zarr", ignore_errors=True)
        counted()
        pid = start("stopped.zarr", seconds=0.2)
        wait_for(partial(have_begun, 5), pid)
        told = time.monotonic()
        os.kill(pid, number)
        end = end_of(pid)
        seconds = time.monotonic() - told
        files = contents("stopped.zarr")
        seen[number.name] = {
            "end": end,
            "seconds": seconds,
            "said": (root / "errors.txt").read_text(),
            "log": json.loads((root / "stopped.zarr.log.jsonl").read_text().splitlines()[-1]),
            "left behind": [name for name in files if name.startswith("leases") or name.endswith(".tmp")],
        }
    seen["end"] = end_of(start("stopped.zarr"))
    times = counted()
    seen["encoded again"] = sum(times.values()) - len(times)
    seen["identical"] = contents("stopped.zarr") == contents("whole.zarr")
    return seen


def workers() -> dict[str, object]:
    """Three worker processes; one is killed, the others go on; then all are stopped with their parent."""
    whole()
    pid = start("workers.zarr", seconds=0.05, devices=3)
    wait_for(partial(have_begun, 10), pid)
    os.kill(children_of(pid)[0], signal.SIGKILL)
    seen: dict[str, object] = {"end": end_of(pid), "said": (root / "errors.txt").read_text()}
    times = counted()
    seen["identical"] = contents("workers.zarr") == contents("whole.zarr")
    seen["encoded again"] = sum(times.values()) - len(times)

    shutil.rmtree(root / "workers.zarr")
    pid = start("workers.zarr", seconds=0.05, devices=2)
    wait_for(partial(have_begun, 10), pid)
    told = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    seen["stopped"] = {
        "end": end_of(pid),
        "seconds": time.monotonic() - told,
        "said": (root / "errors.txt").read_text(),
    }
    seen["left behind"] = [name for name in contents("workers.zarr") if name.startswith("leases")]
    return seen


def mistakes() -> dict[str, object]:
    """A mistake that only the worker processes can notice."""
    return {
        "end": end_of(start("s.zarr", devices=2, modality="nothing")),
        "said": (root / "errors.txt").read_text(),
        "left behind": [name for name in contents("s.zarr") if name.startswith("leases")],
    }


def ray_stop() -> dict[str, object]:
    """SIGTERM to the driver of a Ray cluster of this machine: a new process, as Ray's own starts hang in a fork."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, __file__, str(root), ray_driver.__name__]
    with (root / "errors.txt").open("w") as errors:
        pid = subprocess.Popen(command, stderr=errors, env=environment).pid
    wait_for(partial(have_begun, 5), pid)
    told = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    return {
        "end": end_of(pid),
        "seconds": time.monotonic() - told,
        "said": (root / "errors.txt").read_text(),
        "left behind": [name for name in contents("ray.zarr") if name.startswith("leases")],
    }


def ray_driver() -> None:
    from sail_align.extract.executor.ray_cluster import RayCluster

    run_command(lambda: run_job(make_job("ray.zarr", 0.2), RayCluster(None, "2", "cpu"), Share(), quiet=True))


def children_of(pid: int) -> list[int]:
    """Return the pids of the workers; multiprocessing's resource tracker, where there is one, is not one of them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


if __name__ == "__main__":
    store_module._shard_rows = lambda rows: SHARD_ROWS
    scenarios = [kills, two_at_once, signals, workers, mistakes, ray_stop, ray_driver]
    scenario = next(each for each in scenarios if each.__name__ == sys.argv[2])
    print(json.dumps(scenario()))
