"""Mistakes in the command line are reported before torch, which takes seconds, is imported."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

RUN = """
import importlib, sys
try:
    importlib.import_module(f"sail_align.{sys.argv[0]}.cli").main()
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
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
    ],
)
def test_mistake_is_reported_without_importing_torch(tmp_path, stage, words, message):
    code = f"import sys; sys.argv = ['{stage}', *{words.split()!r}]\n{RUN}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
