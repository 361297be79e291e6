"""Mistakes in the command line are reported before torch, which takes seconds, is imported."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

RUN = """
import importlib, json, os, sys
main = {stage: importlib.import_module(f"sail_align.{stage}.cli").main for stage in ("align", "extract", "evaluate")}
for number, (stage, words) in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = [stage, *words.split()]
        try:
            main[stage]()
        finally:
            print("torch" in sys.modules)
    _, status = os.wait()
    print(os.waitstatus_to_exitcode(status))
"""
"""Runs each command in a fork, and prints its exit code."""
CASES = [
    ("align", "fit --features no.zarr", "no.zarr is not a feature store"),
    ("align", "measure no.zarr", "no.zarr is not a feature store"),
    ("align", "probe --features no.zarr", "no.zarr is not a feature store"),
    ("align", "ladder --features no.zarr", "no.zarr is not a feature store"),
    ("align", "tune no.zarr", "no.zarr is not a feature store"),
    ("align", "export runs/no", "runs/no is not a run"),
    ("align", "search runs/no no.zarr dog", "runs/no is not a run"),
    ("align", "import-released no.pt", "no.pt does not exist"),
    ("extract", "run no.yaml", "no.yaml"),
    ("extract", "run cc3m", "The data of 'cc3m' are not in"),
    ("extract", "status no.zarr", "no.zarr is not a feature store"),
    ("extract", "verify no.zarr", "no.zarr is not a feature store"),
    ("extract", "overlap no.zarr no.zarr", "no.zarr is not a feature store"),
    ("evaluate", "report runs/no --out scores.pdf", "--out scores.pdf is invalid"),
    ("evaluate", "report runs/no", "runs/no does not exist. Name a run"),
    ("evaluate", "compare runs/no runs/none", "runs/no does not exist. Name a run"),
    ("evaluate", "all --run runs/no", "runs/no is not a run"),
    (
        "evaluate",
        "classification demo-objects --protocol opneai-7",
        "Protocol 'opneai-7' of demo-objects",
    ),
    ("evaluate", "clip-benchmark runs/no --dataset wds/coco --dataset_root no", "--dataset_root no does not exist"),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Run all commands; return the exit code, stdout and stderr of each."""
    folder = tmp_path_factory.mktemp("mistakes")
    typed = json.dumps([(stage, words) for stage, words, _ in CASES])
    command = [sys.executable, "-c", RUN, typed]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    texts = [[(folder / f"{number}.{name}").read_text() for name in ("out", "err")] for number in range(len(CASES))]
    return list(zip(map(int, done.stdout.split()), *zip(*texts, strict=True), strict=True))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_mistake_is_reported_without_importing_torch(ended, number):
    code, out, err = ended[number]
    assert (code, out) == (2, "False\n"), err
    assert err.startswith("error: ")
    assert CASES[number][2] in err
    assert err.count("error: ") == 1
