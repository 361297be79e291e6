"""Scenarios of extractions that are killed and stopped, for test_faults.py. Forks, so torch is imported once.

Usage: faulty_runs.py FOLDER SCENARIO, where FOLDER holds pictures.yaml. Prints the result as one line of JSON.
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

import pandas as pd  # noqa: F401 (here, rather than in every fork)
from fakes import FakeChoice

from sail_align.extract.executor.job import Job
from sail_align.extract.executor.local import LocalExecutor
from sail_align.extract.executor.run import run_job
from sail_align.extract.executor.worker import Share
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store import store as store_module
from sail_align.extract.system.command_line import run_command

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
    """Start an extraction in its own process and return the pid."""
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
    finally:  # any other error: its traceback is in the file
        traceback.print_exc()
        os._exit(1)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for(condition: Callable[[], bool], pid: int) -> None:
    """Wait for a condition or the end of a process. If the process hangs, raise with its traceback."""
    deadline = time.monotonic() + 120
    while not condition() and not has_ended(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGABRT)
            exit_code(pid)
            raise TimeoutError((root / "errors.txt").read_text())
        time.sleep(0.001)


def batches() -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def has_encoded(number: int) -> bool:
    return len(batches()) >= number


def committed(name: str) -> int:
    return sum(1 for _ in (root / name / "commits").rglob("*.json"))


def contents(name: str) -> dict[str, bytes]:
    path = root / name
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if not file.is_dir()}


def run_undisturbed() -> dict[str, int]:
    """Create the reference store, and return how often each batch was encoded."""
    assert exit_code(start("whole.zarr", seconds=0)) == 0
    return count_and_clear_batches()


def count_and_clear_batches() -> dict[str, int]:
    lines = batches()
    log.unlink(missing_ok=True)
    return {line: lines.count(line) for line in lines}


def kills() -> dict[str, object]:
    """SIGKILL a run at random moments, also before the index exists, until one run completes."""
    expected = run_undisturbed()
    rng = random.Random(0)
    deaths, wasted, most = 0, 0, 0
    while True:
        before, done = len(batches()), committed("killed.zarr")
        pid = start("killed.zarr")
        wait_for(partial(has_encoded, before + rng.randint(0, 7)), pid)
        time.sleep(rng.uniform(0, 0.03 if done else 0.2))
        if has_ended(pid):
            end = exit_code(pid)
            break
        os.kill(pid, signal.SIGKILL)
        exit_code(pid)
        deaths += 1
        lost = len(batches()) - before - (committed("killed.zarr") - done)
        wasted, most = wasted + lost, max(most, lost)
    times = count_and_clear_batches()
    return {
        "kills": deaths,
        "end": end,
        "identical": contents("killed.zarr") == contents("whole.zarr"),
        "shards": len(expected),
        "same batches": times.keys() == expected.keys(),
        "encoded again": sum(times.values()) - len(times),
        "lost in flight": wasted,
        "most lost in a kill": most,
    }


def two_at_once() -> dict[str, object]:
    """Two simultaneous commands on one store, then two shares of another."""
    expected = run_undisturbed()
    ends = [exit_code(pid) for pid in [start("two.zarr", errors=f"errors{n}.txt") for n in range(2)]]
    times = count_and_clear_batches()
    halves = [start("halves.zarr", share=f"{n}/2", errors=f"errors{n}.txt") for n in (1, 2)]
    ends += [exit_code(pid) for pid in halves]
    by_halves = count_and_clear_batches()
    return {
        "ends": ends,
        "identical": [contents(name) == contents("whole.zarr") for name in ("two.zarr", "halves.zarr")],
        "most often encoded": [max(times.values()), max(by_halves.values())],
        "same batches": times.keys() == by_halves.keys() == expected.keys(),
    }


def signals() -> dict[str, object]:
    """Stop runs by SIGTERM and by Ctrl-C, then resume."""
    run_undisturbed()
    result: dict[str, object] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        shutil.rmtree(root / "stopped.zarr", ignore_errors=True)
        count_and_clear_batches()
        pid = start("stopped.zarr", seconds=0.2)
        wait_for(partial(has_encoded, 5), pid)
        signalled = time.monotonic()
        os.kill(pid, number)
        end = exit_code(pid)
        seconds = time.monotonic() - signalled
        files = contents("stopped.zarr")
        result[number.name] = {
            "end": end,
            "seconds": seconds,
            "stderr": (root / "errors.txt").read_text(),
            "log": json.loads((root / "stopped.zarr.log.jsonl").read_text().splitlines()[-1]),
            "left behind": [name for name in files if name.startswith("leases") or name.endswith(".tmp")],
        }
    result["end"] = exit_code(start("stopped.zarr"))
    times = count_and_clear_batches()
    result["encoded again"] = sum(times.values()) - len(times)
    result["identical"] = contents("stopped.zarr") == contents("whole.zarr")
    return result


def workers() -> dict[str, object]:
    """Kill one of three worker processes. Then stop the parent of two."""
    run_undisturbed()
    pid = start("workers.zarr", seconds=0.05, devices=3)
    wait_for(partial(has_encoded, 10), pid)
    os.kill(worker_pids(pid)[0], signal.SIGKILL)
    result: dict[str, object] = {"end": exit_code(pid), "stderr": (root / "errors.txt").read_text()}
    times = count_and_clear_batches()
    result["identical"] = contents("workers.zarr") == contents("whole.zarr")
    result["encoded again"] = sum(times.values()) - len(times)

    shutil.rmtree(root / "workers.zarr")
    pid = start("workers.zarr", seconds=0.05, devices=2)
    wait_for(partial(has_encoded, 10), pid)
    signalled = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    result["stopped"] = {
        "end": exit_code(pid),
        "seconds": time.monotonic() - signalled,
        "stderr": (root / "errors.txt").read_text(),
    }
    result["left behind"] = [name for name in contents("workers.zarr") if name.startswith("leases")]
    return result


def user_error() -> dict[str, object]:
    """A user error that only worker processes detect."""
    return {
        "end": exit_code(start("s.zarr", devices=2, modality="nothing")),
        "stderr": (root / "errors.txt").read_text(),
        "left behind": [name for name in contents("s.zarr") if name.startswith("leases")],
    }


def ray_stop() -> dict[str, object]:
    """SIGTERM to the driver of a local Ray cluster, in a new process, because Ray hangs in a fork."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, __file__, str(root), ray_driver.__name__]
    with (root / "errors.txt").open("w") as errors:
        pid = subprocess.Popen(command, stderr=errors, env=environment).pid
    wait_for(partial(has_encoded, 5), pid)
    signalled = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    return {
        "end": exit_code(pid),
        "seconds": time.monotonic() - signalled,
        "stderr": (root / "errors.txt").read_text(),
        "left behind": [name for name in contents("ray.zarr") if name.startswith("leases")],
    }


def ray_driver() -> None:
    from sail_align.extract.executor.ray_cluster import RayCluster

    run_command(lambda: run_job(make_job("ray.zarr", 0.2), RayCluster(None, "2", "cpu"), Share(), quiet=True))


def worker_pids(pid: int) -> list[int]:
    """Return the pids of the workers, without multiprocessing's resource tracker."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


if __name__ == "__main__":
    store_module._shard_rows = lambda rows: SHARD_ROWS
    scenarios = [kills, two_at_once, signals, workers, user_error, ray_stop, ray_driver]
    scenario = next(each for each in scenarios if each.__name__ == sys.argv[2])
    print(json.dumps(scenario()))
