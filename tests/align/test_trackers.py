"""Trackers receive the lines of the log; unknown or missing ones are rejected."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sail_align.align.runs.claim import claim_run
from sail_align.align.train import trackers
from sail_align.align.train.plan import make_plan
from sail_align.align.train.trackers import parse_trackers
from sail_align.align.train.trainer import fit
from sail_align.extract.errors import UserError


@pytest.fixture
def tracked(make_store, tmp_path):
    """Runs a short fit with a tracker; returns the run and its log."""

    def run_fit(track):
        options = {"preset": "small", "dim": 8, "steps": 4, "batch_size": 50}
        plan, _ = make_plan([make_store()], options)
        run = claim_run(tmp_path / "run", plan.record()).path
        fit(plan, run, device=torch.device("cpu"), quiet=True, track=[track])
        return run, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    return run_fit


@pytest.mark.slow
def test_tensorboard_shows_the_log(tracked):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, log = tracked("tensorboard")
    shown = events.EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in shown.Scalars("train/loss")]
    expected = [(line["step"], line["loss"]) for line in log if line["kind"] == "train"]
    assert losses == [(step, pytest.approx(loss)) for step, loss in expected]
    assert [event.step for event in shown.Scalars("heldout/r1")] == [0, 1, 2, 3, 4]


class RefusedError(Exception):
    pass


@pytest.fixture
def wandb(monkeypatch):
    """A module in place of wandb that records its calls."""
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.Error, module.told = RefusedError, []
    run = SimpleNamespace(
        log=lambda values, step: module.told.append((step, values)), finish=lambda: module.told.append("finish")
    )

    def init(**options):
        module.options = options
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.slow
def test_weights_and_biases_receives_the_log_and_recognises_a_resumed_run(tracked, wandb):
    assert parse_trackers("wandb") == ["wandb"]
    run, log = tracked("wandb")
    assert wandb.told[-1] == "finish"
    assert wandb.told[:-1] == [
        (line["step"], {f"{line['kind']}/{name}": line[name] for name in line if name not in ("kind", "step")})
        for line in log
    ]
    options = wandb.options
    assert (options["project"], options["name"], options["resume"]) == ("sail-align", "run", "allow")
    settings = json.loads((run / "settings.json").read_text())
    assert options["config"]["lr"] == settings["lr"]
    trackers.WeightsAndBiases(run, settings, 2)
    assert wandb.options["id"] == options["id"]


def test_error_of_weights_and_biases_is_reported(tracked, wandb):
    def init(**_):
        raise RefusedError("no API key")

    wandb.init = init
    with pytest.raises(UserError, match=r"cannot be used \(no API key\). Run `wandb login`, or set WANDB_MODE=offline"):
        tracked("wandb")


def test_unknown_or_missing_tracker_raises(monkeypatch):
    assert parse_trackers(None) == []
    with pytest.raises(UserError, match=r"--track is invalid: got 'mlflow', expected tensorboard, wandb\."):
        parse_trackers("tensorboard, mlflow")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"--track wandb needs a package that is missing. Run pip install 'sail-align\[wandb\]'"
    ):
        parse_trackers("wandb")
