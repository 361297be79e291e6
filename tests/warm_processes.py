"""Processes that start warm: forks of one process that has already imported torch and this package.

The imports take seconds of CPU time, which is most of the cost of a small command.
"""

import importlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tqdm import tqdm

PRELOADED = [
    "pandas",  # imported by the first read of an index
    "torch._dynamo",  # imported by the first step of an optimizer
    "torch._inductor.compile_fx",
    "sail_align.align.cli",
    "sail_align.align.train.trainer",
    "sail_align.extract.encoders.timm_models",
    "sail_align.extract.executor.run",
]
COMMANDS = {"sail-extract": "extract", "sail-align": "align", "sail-eval": "evaluate"}


class WarmProcess:
    """A function call in a forked process, with stdout and stderr in the file `output`."""

    def __init__(self, process: ForkServerProcess, output: Path):
        self._process = process
        self._output = output

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    @property
    def has_ended(self) -> bool:
        return self._process.exitcode is not None

    def send(self, signal: int) -> None:
        os.kill(self.pid, signal)

    def wait(self, timeout: float = 300) -> int:
        """Return the exit code, or the negative number of the signal that ended the process."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} is still running after {timeout} s; output: {self.output}")
        return self._process.exitcode

    def wait_until(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        """Wait until a condition holds; fail if the process ends first."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.has_ended or time.monotonic() > deadline:
                raise TimeoutError(f"condition not met, exit code {self._process.exitcode}; output: {self.output}")
            time.sleep(0.002)

    def close(self) -> None:
        """Kill the process if it still runs."""
        self._process.kill()
        self._process.join()


def start(work: Callable[..., object], *arguments: object, output: Path, **environment: str) -> WarmProcess:
    """Call a function in a new process, in this process's folder, with its environment and more variables."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    variables = {**os.environ, **environment}
    process = context.Process(target=_call, args=(work, arguments, output, Path.cwd(), variables))
    process.start()
    return WarmProcess(process, output)


def run_command(program: str, *words: str) -> None:
    """Run a command of this package as if typed: `sail-extract`, `sail-align` or `sail-eval`."""
    sys.argv = [program, *words]
    importlib.import_module(f"sail_align.{COMMANDS[program]}.cli").main()


def _call(
    work: Callable[..., object], arguments: tuple[object, ...], output: Path, folder: Path, variables: Mapping[str, str]
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which a killed process would leak
    work(*arguments)
