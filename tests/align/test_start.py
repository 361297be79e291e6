"""Automatic temperature and bias: positives and negatives of the first step have equal gradient mass."""

import json
import math

import pytest
import torch

from sail_align.align.runs.claim import claim_run
from sail_align.align.train import initial as start
from sail_align.align.train.plan import make_plan
from sail_align.align.train.trainer import fit


def first_step(make_store, tmp_path, **changes):
    options = {"preset": "small", "head": "glu", "dim": 8, "start": "random", "lr": 1e-4, "steps": 1, **changes}
    plan, _ = make_plan([make_store(rows=700, captions={"raw": (), "long": ()})], options)
    run = claim_run(tmp_path / "run", plan.record()).path
    fit(plan, run, device=torch.device("cpu"), quiet=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["kind"] == "train")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"start": "closed-form"}, {"temperature": 40.0}, {"divisor": "batch"}])
@pytest.mark.parametrize("sample", [1_024, 150])
def test_masses_of_the_first_step_are_balanced(make_store, tmp_path, monkeypatch, changes, sample):
    monkeypatch.setattr(start, "SAMPLE_ROWS", sample)
    step = first_step(make_store, tmp_path, **{"temperature": "auto", "bias": "auto", "batch_size": 500, **changes})
    assert 0.6 < step["negative_mass"] / step["positive_mass"] < 1.6
    if "temperature" not in changes:
        assert step["t"] == pytest.approx(2 * math.log(500), rel=0.01)  # one step behind the start


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [50, 500])
def test_bias_of_a_fresh_model_follows_the_formula(make_store, tmp_path, batch_size):
    # Each of the |B| pairs of an image is to have the probability 1 / |B|; at a small t all logits are nearly b.
    step = first_step(make_store, tmp_path, temperature=2.0, bias="auto", batch_size=batch_size, dim=64)
    assert step["b"] == pytest.approx(-math.log(batch_size - 1), abs=0.2)


@pytest.mark.slow
def test_paper_values_are_unbalanced_for_a_small_batch(make_store, tmp_path):
    step = first_step(make_store, tmp_path, batch_size=500, temperature=20.0, bias=-10.0)
    assert not 0.1 < step["negative_mass"] / step["positive_mass"] < 10


def test_automatic_temperature_of_the_papers_batch():
    settings = start.FitSettings(steps=1, temperature="auto", bias="auto")
    assert start._temperature(settings) == pytest.approx(21.03, abs=0.01)
