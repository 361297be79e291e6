"""`sail_align.fit`: the command's function, with numbers as numbers and results as an object."""

import inspect
import os
import signal
import threading
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from typer.testing import CliRunner

import sail_align
from sail_align.align.cli import app
from sail_align.align.fit import FitKeywords
from sail_align.align.runs.folder import RunFolder
from sail_align.align.settings import SETTINGS
from sail_align.align.train.step import Stepper
from sail_align.extract.errors import UserError

QUICK = {"steps": 4, "dim": 8, "device": "cpu", "quiet": True}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_function_and_command_make_the_same_run(make_store):
    path = make_store("two", captions={"raw": (), "long": ()})
    words = ["--captions", "raw,long:0.5", "--lr", "0.001", "--steps", "4", "--dim", "8", "--device", "cpu"]
    done = CliRunner().invoke(app, ["fit", "--features", str(path), "--out", "typed", "--quiet", *words])
    assert done.exit_code == 0, done.output
    store = sail_align.open_store(path)
    options = {"captions": {"raw": 1, "long": 0.5}} | QUICK
    result = sail_align.fit(store, out="called", lr=0.001, **options | {"steps": np.int64(4)})
    weights = [next(Path(run).glob("checkpoints/step-*/model.safetensors")).read_bytes() for run in ("typed", result)]
    assert weights[0] == weights[1]
    printed = done.output.replace("typed", "called").splitlines()
    kinds = ("held out", "corrected", "best", "note: Training")
    assert result.lines() == [line for line in printed if line.startswith(kinds)]


@pytest.mark.slow
def test_result_has_the_scores_of_the_log_and_is_a_path(make_store):
    result = sail_align.fit(str(make_store("photos")), **QUICK)
    _, entries = RunFolder(result.run).read_log(4)
    scored = [entry for entry in entries if entry["kind"] == "heldout"]
    assert os.fspath(result) == "runs/photos-linear"
    assert (result.steps, result.training_rows, result.held_out_rows) == (4, 240, 60)
    logged = {name for name in result.metrics if not name.startswith("hub_")}  # these are known at the end only
    assert {name: result.last_metrics[name] for name in logged} == {name: scored[-1][name] for name in logged}
    best = max(scored, key=lambda entry: (entry["mrr"], -entry["step"]))
    assert result.best_step == best["step"]
    assert {name: result.metrics[name] for name in logged} == {name: best[name] for name in logged}
    assert RunFolder(result.best_checkpoint).is_checkpoint
    assert result.trained
    assert result.to_dict()["metrics"] == dict(result.metrics)
    assert repr(result).startswith("FitResult: runs/photos-linear, 4 steps on 240 pairs\n  held out (60 pairs): loss ")


@pytest.mark.slow
def test_second_call_returns_the_finished_run(make_store, monkeypatch):
    path = make_store("photos")
    first = sail_align.fit(path, **QUICK)
    monkeypatch.setattr(Stepper, "step", lambda *_: pytest.fail("trained"))
    again = sail_align.fit([path], **QUICK)
    assert (again.run, again.metrics, again.trained) == (first.run, first.metrics, False)


@pytest.mark.slow
def test_notes_go_to_stderr_in_pythons_words_unless_quiet(make_store, capfd):
    path = make_store("photos")
    result = sail_align.fit(path, **QUICK | {"quiet": False})
    out, err = capfd.readouterr()
    assert out == ""
    assert "note: Using `preset` small for 240 pairs; pass `preset` paper for the other defaults.\n" in err
    assert "writing runs/photos-linear: " in err
    assert result.notes[0].startswith("Using --preset small")
    sail_align.fit(path, **QUICK)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_stop_saves_and_raises_what_python_expects(make_store, monkeypatch, number, error):
    path, step = make_store("photos"), Stepper.step

    def stopped(*arguments):
        signal.raise_signal(number)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", stopped)
        with pytest.raises(error):
            sail_align.fit(path, **QUICK)
    assert RunFolder(RunFolder(Path("runs/photos-linear")).last).step == 1
    assert sail_align.fit(path, **QUICK).trained


@pytest.mark.slow
def test_fit_works_outside_the_main_thread(make_store):
    path, results = make_store("photos"), []
    thread = threading.Thread(target=lambda: results.append(sail_align.fit(path, **QUICK)))
    thread.start()
    thread.join()
    assert results[0].steps == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 7}, "`lr` is invalid: got 7, expected 1e-09 to 1."),
        ({"batch_size": 2.5}, "`batch_size` is invalid: got 2.5, expected 2 to 1,000,000."),
        ({"steps": True}, "`steps` is invalid: got 'True', expected 1 to 1,000,000,000."),
        ({"steps": [4]}, "`steps` is invalid: got '[4]', expected 1 to 1,000,000,000."),
        ({"head": 3}, "`head` is invalid: got 3, expected linear, mlp, glu, cca, pcca."),
        ({"head": "linear", "expansion": 2}, "`expansion` has no effect with `head` linear. Leave one of them out."),
        ({"captions": {"raw": -1}}, "Caption 'raw:-1' is invalid: expected NAME or NAME:WEIGHT, with a weight from"),
        ({"track": ["paper"]}, "`track` is invalid: got 'paper', expected tensorboard, wandb."),
        ({"out": 3}, "out is invalid: got 3, expected a path or several."),
        ({"features": []}, "features is invalid: got an empty list, expected a path or several."),
        ({"features": None}, "features is invalid: got None, expected a path or several."),
        ({}, "no.zarr is not a feature store. Make one with `sail-extract run`."),
    ],
)
def test_mistakes_name_the_argument(options, message):
    with pytest.raises(UserError) as raised:
        sail_align.fit(**{"features": "no.zarr", **options})
    assert str(raised.value).startswith(message)


def test_unknown_setting_raises_type_error():
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'optimiser'\. Did you mean 'optimizer'\?"):
        sail_align.fit("no.zarr", optimiser="lion")


def test_keywords_have_the_types_of_the_settings():
    declared = {name: setting.hint for name, setting in SETTINGS.items()}
    for name, hint in get_type_hints(FitKeywords).items():
        expected = {each for each in get_args(declared[name]) if each is not type(None)} or {declared[name]}
        if get_origin(declared[name]) is Literal:
            expected = {Literal[SETTINGS[name].choices]}
        assert set(get_args(hint)) - {type(None)} == expected, name
    assert set(get_type_hints(FitKeywords)) == set(SETTINGS)


def test_signature_and_docstring_have_every_setting():
    signature = inspect.signature(sail_align.fit)
    assert set(SETTINGS) < set(signature.parameters)
    for name in signature.parameters:
        assert f"\n    {name}: " in inspect.getdoc(sail_align.fit), name
    assert "--" not in inspect.getdoc(sail_align.fit).replace("`sail-align fit`", "")
