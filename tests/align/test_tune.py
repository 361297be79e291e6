"""The search for settings: its rows, its candidates, its budget, resuming, and what it recommends."""

import json
import shlex
from itertools import islice

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sail_align.align.analysis import tune as module
from sail_align.align.analysis.candidates import Space, make_folds
from sail_align.align.analysis.trials import TrialRunner
from sail_align.align.analysis.tune import Candidate, Score, Search, Tuned
from sail_align.align.cli import app
from sail_align.align.cli.tune import GIVEN, parse_time
from sail_align.align.settings import SETTINGS
from sail_align.align.train.plan import make_plan
from sail_align.extract.errors import UserError

CPU = torch.device("cpu")


def typed(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def space_of(path, **given):
    return Space(make_plan([path], {"held_out": 0.2, **given})[0], given)


@pytest.mark.slow
def test_folds_are_disjoint_and_leave_out_the_final_rows(make_store):
    plan = space_of(make_store(rows=300)).plan
    folds = make_folds(plan, 4)
    chosen = np.stack([fold.chosen_on[0] for fold in folds])
    assert chosen.sum(0).max() == 1
    assert (chosen.sum(1) == plan.training_rows // 5).all()
    for fold in folds:
        assert not (fold.training[0] & fold.chosen_on[0]).any()
        assert not ((fold.training[0] | fold.chosen_on[0]) & plan.held_out[0]).any()
        assert ((fold.training[0] | fold.chosen_on[0]) == plan.training[0]).all()


@pytest.mark.slow
def test_candidates_are_valid_distinct_and_begin_with_the_default(make_store):
    space = space_of(make_store(rows=300))
    (fold,) = make_folds(space.plan, 1)
    first, again = (list(islice(space.candidates(fold, 0), 30)) for _ in range(2))
    assert first == again
    assert first[0] == {}
    plans = [space.planned(options, fold, 0) for options in first]
    assert len({plan.settings for plan in plans}) == len(plans)
    assert {plan.settings.head for plan in plans} == {"linear", "glu", "mlp", "cca"}
    for options in first:
        assert all(value in SETTINGS[name].search for name, value in options.items())
    assert first != list(islice(space.candidates(fold, 1), 30))
    head = space_of(space.plan.pairs[0].store.path, head="linear")
    assert not any({"head", "expansion"} & options.keys() for options in islice(head.candidates(fold, 0), 30))


@pytest.fixture
def planted(make_store, tmp_path, monkeypatch):
    """Return a function that searches with made-up scores: those with an image power of 0.3 gain `gain` or `final`."""
    space = space_of(make_store(rows=300))
    folds = make_folds(space.plan, 4)
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def measure(self, trial, fold):
        clock[0] += 10
        settings = trial.plan.settings
        power = settings.image_power == 0.3
        random = np.random.default_rng(fold)
        chosen, final = random.random(48) / 2, random.random(60) / 2
        return Score(chosen + 0.2 * power + 1e-3 * settings.dim / 1_024, final + measure.final * power, 10)

    monkeypatch.setattr(Search, "_measure", measure)

    def run(final=0.2, trials=40, budget=float("inf")):
        clock[0], measure.final = 0.0, final
        search = Search(space, folds, TrialRunner(tmp_path / "tune", 1, CPU), 0, trials, budget)
        search.run()
        return Tuned(search, ("sail-align", "fit", "--features", "x"))

    return run


@pytest.mark.slow
def test_planted_option_wins_and_the_command_has_it(planted):
    found = planted()
    assert found.best.options["image_power"] == 0.3
    assert found.better
    assert found.comparison()["difference"] == pytest.approx(20)
    words = shlex.split(found.fit_command())
    assert words[words.index("--image-power") + 1] == "0.3"
    assert {len(each.scores) for each in found.search.entered} == {1, 2, 4}
    assert len(found.default.scores) == len(found.best.scores) == 4


@pytest.mark.slow
def test_a_winner_by_chance_is_not_recommended(planted):
    found = planted(final=0.0)
    assert found.best.options["image_power"] == 0.3
    assert not found.better
    assert "--image-power" not in found.fit_command()
    assert "within noise" in found.verdict()
    assert found.record()["recommended"] == {}


@pytest.mark.slow
def test_budget_is_kept_and_a_second_call_goes_on(planted):
    found = planted(budget=300)
    assert found.search.seconds <= 300
    assert len(found.search.entered) == 16  # in 55 % of the time
    assert len(found.best.scores) == 4
    more = planted(budget=300)
    assert more.search.seconds <= 300
    assert more.search.reused >= found.search.trained
    assert len(more.search.entered) > len(found.search.entered)


def test_short_budget_still_scores_the_default(planted):
    found = planted(budget=5)
    assert found.best is found.default
    assert "enough for the default only" in found.verdict()
    assert found.search.trained == 1


@pytest.mark.slow
def test_options_that_fail_are_left_out(make_store, tmp_path, monkeypatch):
    space = space_of(make_store(rows=300))

    def measure(self, trial, fold):
        if trial.plan.settings.head == "glu":
            raise UserError("The loss is nan after 3 steps.")
        return Score(np.ones(48) * (trial.plan.settings.head == "mlp"), np.ones(60), 1)

    monkeypatch.setattr(Search, "_measure", measure)
    search = Search(space, make_folds(space.plan, 4), TrialRunner(tmp_path / "tune", 1, CPU), 0, 5)
    search.run()
    found = Tuned(search, ("sail-align", "fit"))
    assert [each.options for each in search.entered if each.failed] == [{"head": "glu"}]
    assert found.best.options == {"head": "mlp"}
    assert not found.better


@pytest.mark.slow
def test_command_trains_resumes_and_keeps_scores_only(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RUNGS", ((1, 0.5), (2, 1.0)))
    path = make_store("photos", rows=400)
    out = tmp_path / "tune"
    line = ["tune", path, "--out", out, "--trials", 2, "--steps", 3, "--quiet", "--device", "cpu"]
    done = typed(*line)
    assert done.exit_code == 0, done.output
    record = json.loads((out / "tune.json").read_text())
    assert record["protocol"] == "tune-1"
    assert len(record["candidates"]) == 2
    assert record["comparison"]["pairs"] == 80
    assert record["command"].startswith(f"sail-align fit --features {path}")
    assert sorted(each.name for each in out.iterdir()) == ["trials", "tune.json"]
    again = typed(*line)
    assert "0 fits trained" in again.output
    assert json.loads((out / "tune.json").read_text()) == record
    (out / "trials" / next((out / "trials").iterdir()).name).write_text("{")
    assert "is damaged" in str(typed(*line).exception)


def test_label_and_time():
    assert Candidate({"lr": 3e-5, "head": "cca"}).label == "--lr 3e-05 --head cca"
    assert Candidate({}).label == "default"
    assert [parse_time(each) for each in ("90s", "10m", "1.5h")] == [90, 600, 5_400]
    for wrong in ("10", "0s", "m", "-1m", "1d"):
        with pytest.raises(UserError, match="--budget is invalid"):
            parse_time(wrong)


def test_every_searched_setting_can_be_given():
    assert {name for name, each in SETTINGS.items() if each.search} <= set(GIVEN)
