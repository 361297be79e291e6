"""The self-test passes where everything works, and each check fails if its component is broken."""

import json
import math
import subprocess
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from lion_pytorch import Lion
from typer.testing import CliRunner

from sail_align.align.analysis.selftest import encoders, fits, rates, training
from sail_align.align.analysis.selftest.lab import Check, Lab, SkippedError
from sail_align.align.analysis.selftest.rates import Rates
from sail_align.align.cli import app
from sail_align.align.data.cache import Cache
from sail_align.align.data.loader import Source
from sail_align.align.model import fused, pair_blocks
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.train import step
from sail_align.extract.encoders import text, vision
from sail_align.extract.encoders.text import TransformersTextEncoder
from sail_align.extract.encoders.vision import VisionEncoder

CHECKS = {each.name: each for each in chain(training.checks(), encoders.checks(), fits.checks())}
COMPILED = ("compiled losses against eager", "compiled heads against eager")
LARGE = [name for name in CHECKS if name.startswith(encoders.PAPER)]
PROCESSES = "loss with a process per card against one"


def lab(folder, device="cpu"):
    return Lab(torch.device(device), folder, math.inf)


@pytest.mark.slow
def test_selftest_on_a_cpu(tmp_path):
    out = tmp_path / "selftest.json"
    ended = CliRunner().invoke(app, ["selftest", "--device", "cpu", "--minutes", "0.1", "--out", str(out)])
    assert ended.exit_code == 0, ended.output
    record = json.loads(out.read_text())
    assert not record["failed"]
    assert record["seconds"] < 5 * 6
    assert {each["verdict"] for each in record["checks"]} <= {"pass", "skipped"}
    assert [each["check"] for each in record["checks"]] == list(CHECKS)
    assert record["checks"][0]["verdict"] == "pass"
    assert {"torch", "python", "sail-align"} <= set(record["versions"])
    assert all(each["check"] in ended.output for each in record["checks"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda:7"], "Device 'cuda:7' is not available"),
        (["--minutes", "0"], "--minutes"),
        (["--out", "no/such.json"], "--out is invalid"),
        (["--out", "."], "--out is invalid"),
    ],
)
def test_bad_input_is_refused(words, message):
    ended = CliRunner().invoke(app, ["selftest", *words])
    assert message in str(ended.exception)


def test_a_check_is_judged_and_its_errors_are_reported(tmp_path):
    def fail(_lab):
        raise RuntimeError("broken\nmore")

    def skip(_lab):
        raise SkippedError("not here")

    here = lab(tmp_path)
    measures = (lambda _: 0.5, lambda _: 2.0, lambda _: math.nan, fail, skip)
    outcomes = [Check("x", 1.0, 1, each).run(here) for each in measures]
    assert [each.verdict for each in outcomes] == ["pass", "FAIL", "FAIL", "FAIL", "skipped"]
    assert [each.note for each in outcomes[3:]] == ["RuntimeError: broken", "not here"]
    late = Check("x", 1.0, 1, lambda _: 0.5).run(Lab(torch.device("cpu"), tmp_path, -math.inf))
    assert (late.verdict, late.note) == ("skipped", "no time left; raise --minutes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("selftest")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in (*COMPILED, *LARGE, PROCESSES)])
def test_each_check_passes_here(name, folder):
    outcome = CHECKS[name].run(lab(folder))
    assert outcome.verdict == "pass" or outcome.note in ("only on a GPU", "not installed"), outcome


def wrong_batches(source, device, state=None):
    """Yield batches on a device, each of which has one wrong value."""
    for batch, after in Source.unbroken(source, device, state):
        batch.images[0, 0] += 1
        yield batch, after


BROKEN = {
    "sigmoid loss and gradients, blockwise against the full matrix": (pair_blocks.PairBlocks, "pull", lambda *_: None),
    "infonce loss and gradients, blockwise against the full matrix": (pair_blocks.PairBlocks, "pull", lambda *_: None),
    "glu head and gradients": (fused, "_gated_backward", fused.Compiled(lambda gate, value, inner: inner * value)),
    "Lion, five updates": (training, "make_optimizer", lambda model, _: Lion(model.parameters(), lr=1e-3)),
    "step in micro-batches, gradients": (step._Pass, "backward", None),
    "step in bfloat16, gradients": (step._Pass, "backward", None),
    "small DINOv2 in float32, features": (VisionEncoder, "forward", None),
    "small GTE in bfloat16, features": (TransformersTextEncoder, "pool", None),
    "batches copied to the device that differ": (Source, "batches_on", wrong_batches),
    "batches cached in memory that differ": (Cache, "_shift", 1),
    "fit stopped and resumed, weights that differ": (Checkpoint, "restore", None),
    PROCESSES: (subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="lost")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_component_fails_its_check(name, folder, tmp_path, monkeypatch):
    owner, attribute, replacement = BROKEN[name]
    original = getattr(owner, attribute, None)
    if owner is step._Pass:
        replacement = lambda self, gradient_NE: original(self, 1.2 * gradient_NE)  # noqa: E731
    elif owner in (VisionEncoder, TransformersTextEncoder):  # the one under test, not the exact one
        replacement = lambda self, *args: original(self, *args).roll(int(self.dtype != torch.float64), dims=1)  # noqa: E731
    elif owner is Checkpoint:
        fresh = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        replacement = lambda self, model, _optimizer: original(self, model, fresh)  # noqa: E731
    elif owner is Source:
        monkeypatch.setattr(Source, "unbroken", original, raising=False)
    elif owner is Cache:
        load = Cache._load
        replacement, attribute = lambda self, quiet: (load(self, quiet), self._images.mul_(2)), "_load"
    monkeypatch.setattr(owner, attribute, replacement)
    outcome = CHECKS[name].run(lab(tmp_path if owner is Checkpoint else folder))
    assert outcome.verdict == "FAIL", outcome


@pytest.mark.thorough
@pytest.mark.slow
def test_checks_and_rates_run_on_a_card(tmp_path, monkeypatch):
    """The card computes nothing, so that results are wrong, but each check reaches one without an error."""
    for module, name, small in ((vision, "GPU_BATCH", 8), (text, "GPU_TOKENS", 512), (training, "STEP_ROWS", 100)):
        monkeypatch.setattr(module, name, small)
    monkeypatch.setitem(fits.OPTIONS, "steps", 4)
    packaged = encoders.PACKAGED
    monkeypatch.setattr(encoders, "PACKAGED", ())
    monkeypatch.setattr(training, "OTHER_BLOCK_SIZE", 64)
    monkeypatch.setattr(rates, "ON_GPU", rates.Size(32, 1 << 10, 64, 16, 8, 8, 512))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with fake_cuda():
        here = lab(tmp_path, CUDA)
        for name, check in CHECKS.items():
            if name not in (*COMPILED, *LARGE) and not name.startswith(packaged):
                outcome = check.run(here)
                assert outcome.result is not None or outcome.note == "this machine has one GPU", outcome
        for rate in Rates(here, 0).measure_all():
            assert rate.value or rate.note == "not downloaded", rate
