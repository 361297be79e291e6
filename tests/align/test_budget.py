"""The number of steps of a fit that has a budget of time."""

import json

import pytest

import sail_align
from sail_align.align.settings import parse_budget
from sail_align.align.train import budget
from sail_align.extract.errors import UserError

QUICK = {"preset": "small", "dim": 8, "batch_size": 60, "seed": 3, "quiet": True}


@pytest.fixture
def takes(monkeypatch):
    """Let a step take so many seconds, after 100 s of setup."""
    return lambda seconds: monkeypatch.setattr(budget, "_measure", lambda *_: (100.0, seconds))


def settings(run):
    return json.loads((run / "settings.json").read_text())


def test_budget_chooses_the_steps_once(make_store, monkeypatch, tmp_path, takes):
    monkeypatch.chdir(tmp_path)
    path = make_store("photos", rows=300)
    takes(100.0)
    first = sail_align.fit(path, budget="10m", **QUICK)
    assert (settings(first.run)["steps"], settings(first.run)["budget"]) == (4, 600)
    takes(1.0)  # the machine is faster by now
    again = sail_align.fit(path, budget="10m", **QUICK)
    assert (again.run, again.trained) == (first.run, False)
    other = sail_align.fit(path, budget="5m", **QUICK)
    whole = sail_align.fit(path, budget="2h", **QUICK)
    plain = sail_align.fit(path, **QUICK)
    assert len({each.run for each in (first, other, whole, plain)}) == 4
    assert settings(whole.run)["steps"] == settings(plain.run)["steps"] == 100  # 25 epochs of four steps
    assert "budget" not in settings(plain.run)


@pytest.mark.slow
def test_steps_that_are_timed_do_not_change_the_run(make_store, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = make_store("photos", rows=300)
    runs = [sail_align.fit(path, **QUICK, **more).run for more in ({}, {"budget": "2h"})]
    files = [(run / "checkpoints/step-00000100/model.safetensors").read_bytes() for run in runs]
    assert files[0] == files[1]
    assert (runs[0] / "metrics.jsonl").read_bytes() == (runs[1] / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("soon", {}, "--budget is invalid: got 'soon', expected a time such as 90s, 10m or 2h."),
        ("10m", {"steps": 5}, "--budget has no effect with --steps. Leave one of them out."),
        ("10m", {"epochs": 5}, "--budget has no effect with --epochs. Leave one of them out."),
        ("10m", {"head": "cca"}, "--budget has no effect with --head cca. Leave one of them out."),
    ],
)
def test_invalid_budgets(text, options, message):
    with pytest.raises(UserError) as problem:
        parse_budget(text, options)
    assert str(problem.value) == message
