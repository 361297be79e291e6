"""The fit command: names of runs, resuming, and mistakes with exit code 2."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import identity
from typer.testing import CliRunner

from sail_align.align.cli import app
from sail_align.align.runs.folder import RunFolder, differences
from sail_align.align.train import trainer
from sail_align.align.train.step import Stepper
from sail_align.extract.errors import UserError
from sail_align.extract.system.signals import StoppedError

QUICK = ["--quiet", "--steps", "4", "--dim", "8", "--device", "cpu"]


def run_fit(*words):
    return CliRunner().invoke(app, ["fit", *map(str, words)])


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_run_is_named_after_store_and_head_and_never_overwritten(make_store, tmp_path):
    make_store("photos")
    for seed, expected in enumerate(("photos-linear", "photos-linear-2", "photos-linear-3")):
        result = run_fit("--features", "features/photos.zarr", "--seed", seed, *QUICK)
        assert result.exit_code == 0, result.output
        assert f"wrote runs/{expected} in" in result.output
        assert f"\nNext: sail-align export runs/{expected}\n" in result.output
        assert result.stdout.splitlines()[-1].endswith(f", sail-eval retrieval TEST.yaml --run runs/{expected}")
    assert RunFolder.newest().name == "photos-linear-3"


@pytest.mark.slow
@pytest.mark.parametrize("out", [[], ["--out", "mine"]])
def test_finished_run_is_not_trained_again(make_store, monkeypatch, out):
    words = ["--features", make_store("photos"), *QUICK, *out]
    first = run_fit(*words).output.splitlines()
    monkeypatch.setattr(Stepper, "step", lambda *_: pytest.fail("trained"))
    again = run_fit(*words)
    assert again.exit_code == 0, again.output
    (line,) = [line for line in again.output.splitlines() if "is finished: linear heads" in line]
    assert line.startswith("mine" if out else "runs/photos-linear")
    assert [line for line in first if line.startswith(("held out", "best", "Next"))] == [
        line for line in again.output.splitlines() if line.startswith(("held out", "best", "Next"))
    ]
    assert len(list(Path().glob("runs/*") if not out else Path().glob("mine*"))) == 1


@pytest.mark.slow
def test_stopped_run_prints_how_to_resume_and_resumes(make_store, monkeypatch):
    path = make_store("photos")
    with monkeypatch.context() as patch:
        patch.setattr("sail_align.align.train.step.Stepper.step", interrupt)
        stopped = run_fit("--features", path, *QUICK)
    assert stopped.exit_code == 130
    assert "The same command starts runs/photos-linear again: nothing was saved yet." in stopped.output
    assert (
        "resuming runs/photos-linear: linear heads with closed-form initialisation on 240 pairs"
        in run_fit("--features", path, *QUICK).output
    )


@pytest.mark.slow
def test_other_precision_starts_another_run(make_store, monkeypatch):
    path = make_store("photos")
    with monkeypatch.context() as patch:
        patch.setattr("sail_align.align.train.step.Stepper.step", interrupt)
        run_fit("--features", path, *QUICK)
    other = run_fit("--features", path, *QUICK, "--precision", "bfloat16").output
    note = "note: runs/photos-linear has other settings (--precision: float32, now bfloat16); this is a new run."
    assert f"{note}\nwriting runs/photos-linear-2: " in other
    assert "resuming runs/photos-linear: " in run_fit("--features", path, *QUICK, "--precision", "float32").output
    refused = run_fit("--features", path, *QUICK, "--precision", "float16")
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception) == "--precision is invalid: got 'float16', expected auto, float32, tf32, bfloat16."


def test_stopped_run_prints_the_step_it_resumes_from(make_store, monkeypatch):
    path = make_store("photos")
    step, calls = Stepper.step, []

    def interrupted(*arguments):
        calls.append(None)
        return interrupt() if len(calls) == 3 else step(*arguments)

    monkeypatch.setattr(Stepper, "step", interrupted)
    monkeypatch.setitem(trainer.fit.__kwdefaults__, "save_seconds", 0)
    assert "The same command resumes runs/photos-linear from step 2." in run_fit("--features", path, *QUICK).output


def interrupt(*_):
    raise StoppedError(signal.SIGINT)


@pytest.mark.slow
def test_new_run_lists_its_differences_and_keeps_a_given_name(make_store):
    words = ["--features", make_store("photos"), *QUICK]
    run_fit(*words)
    other = ["--seed", "3", "--weight-decay", "0.1"]
    differing = "(--seed: 0, now 3; --weight-decay: 1e-07, now 0.1)"
    note = f"note: runs/photos-linear has other settings {differing}; this is a new run."
    assert note in run_fit(*words, *other).output
    refused = run_fit(*words, *other, "--out", "runs/photos-linear")
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception) == (
        f"runs/photos-linear is a run with other settings {differing}. Pass another --out."
    )


def test_differences_name_options_and_stores():
    before = {
        "stores": ["a.zarr"],
        "captions": ["raw"],
        "caption_weights": [1.0],
        "image_encoder": "1" * 64,
        "steps": 3,
        "lr": 1e-5,
        "positives": None,
        "features_digests": ["1"],
        "training_rows": 9,
    }
    changes = [
        ({"features_digests": ["2"], "training_rows": 8}, "a.zarr has changed since"),
        (
            {"features_digests": ["2"], "stores": ["b.zarr"], "steps": 4},
            "--features: a.zarr, now b.zarr; --steps or --epochs: 3, now 4",
        ),
        (
            {"features_digests": ["2"], "captions": ["raw", "long"], "caption_weights": [1.0, 0.5]},
            "--captions: raw, now raw,long:0.5",
        ),
        ({"caption_weights": [2.0]}, "--captions: raw, now raw:2"),
        ({"features_digests": ["2"], "image_encoder": "2" * 64}, "image encoder: 11111111, now 22222222"),
        (
            {"excluded_keys": 1200, "excluded_sha256": "3" * 64, "training_rows": 8},
            "--exclude: none, now 1,200 keys (33333333)",
        ),
        ({"lr": 3e-4, "positives": 1}, "--lr: 1e-05, now 0.0003; --positives: none, now 1"),
    ]
    for change, expected in changes:
        assert "; ".join(differences(before, {**before, **change})) == expected


@pytest.mark.slow
def test_folder_of_a_killed_first_write_is_free(make_store, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".settings.json.0123.tmp").write_text("{")
    assert f"wrote {out} in" in run_fit("--features", str(make_store()), "--out", str(out), *QUICK).output


@pytest.mark.slow
def test_store_at_a_url_trains_the_same_weights(make_store, tmp_path):
    pytest.importorskip("upath")
    fsspec = pytest.importorskip("fsspec")
    local = make_store()
    fsspec.filesystem("memory").put(str(local), "/bucket/photos.zarr", recursive=True)
    digests = []
    for features in (str(local), "memory://bucket/photos.zarr"):
        out = tmp_path / f"run-{len(digests)}"
        done = run_fit("--features", features, "--out", str(out), *QUICK)
        assert done.exit_code == 0, done.output
        (file,) = out.glob("checkpoints/step-*/model.safetensors")
        digests.append(file.read_bytes())
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_choices_and_results_are_printed(make_store):
    result = run_fit(
        "--features", make_store("photos", rows=500, bad=[2]), "--quiet", "--steps", "3", "--device", "cpu"
    )
    notes = result.output.splitlines()
    assert notes[0] == "note: Rows left out because an image or a caption is missing: 1."
    assert notes[1] == "note: Using --preset small for 400 pairs; pass --preset paper for the other defaults."
    assert notes[2] == "note: Reduced the batch size from 512 to all 400 pairs."
    assert "held out (99 pairs): loss" in result.output


def mistake(*words):
    result = run_fit(*words)
    assert isinstance(result.exception, UserError), result.output
    assert not Path("runs").exists()
    return str(result.exception)


@pytest.mark.slow
def test_mistakes_raise_and_leave_no_run(make_store, tmp_path):
    good = make_store("good")
    two = make_store("two", captions={"raw": (), "long": ()})
    assert mistake("--features", "no.zarr").startswith("no.zarr is not a feature store. Make one with")
    assert mistake("--features", good, "--captions", "raw,long") == (
        f"{good} has no features of caption 'long'. It has raw."
    )
    assert mistake("--features", two, "--features", good, "--captions", "raw,long") == (
        f"{good} has no features of caption 'long'. It has raw. Use --captions raw, which all stores have, or "
        "--positives 1 to sample from the captions of each store."
    )
    unfinished = make_store("unfinished", commit=False)
    assert mistake("--features", unfinished) == (
        f"{unfinished} is incomplete: 2 of 10 shards are missing. Rerun the `sail-extract run` that made it."
    )
    other = make_store("other", image=identity("image", dim=12, pooling="cls"))
    assert mistake("--features", good, "--features", other).startswith(
        f"Encoder 'fake-image' has changed: {good} was made with pooling 'mean', got 'cls'"
    )
    assert mistake("--features", good, "--device", "cuda:99").startswith(
        "Device 'cuda:99' is not available on this machine."
    )
    tiny = make_store("tiny", rows=1)
    assert mistake("--features", tiny).startswith(f"{tiny} has 1 pair to train on")
    assert (
        mistake("--features", good, "--head", "rnn")
        == "--head is invalid: got 'rnn', expected linear, mlp, glu, cca, pcca."
    )


def test_duplicate_captions_and_stores_raise(make_store):
    two = make_store("two", captions={"raw": (), "long": ()})
    assert mistake("--features", two, "--captions", "raw, long,raw") == (
        "A caption is repeated in raw, long,raw; name each caption once."
    )
    assert mistake("--features", two, "--features", two) == (
        f"{two} holds the same data as {two}. Give each store once."
    )


@pytest.mark.slow
def test_captions_may_be_separated_by_blanks(make_store):
    path = make_store("two", captions={"raw": (), "long": ()})
    assert "captions raw, long;" in run_fit("--features", path, "--captions", "raw, long ", *QUICK).output


@pytest.mark.slow
def test_out_must_be_free_or_a_run(make_store, tmp_path):
    good = make_store("good")
    (tmp_path / "file").write_text("")
    for out in ("features", ".", "file"):
        assert mistake("--features", good, "--out", out).endswith("exists and is not a run. Pass another --out.")
    assert mistake("--features", good, "--out", "file/run") == (
        "file/run cannot be written (Not a directory). Pass another --out."
    )
    (tmp_path / "empty").mkdir()
    assert "wrote empty in" in run_fit("--features", good, "--out", "empty", *QUICK).output


def command(*words):
    return [sys.executable, "-c", "from sail_align.align.cli import main; main()", "fit", *map(str, words)]


@pytest.mark.slow
def test_mistake_exits_2_with_one_line():
    done = subprocess.run(command("--features", "no.zarr"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: no.zarr is not a feature store. Make one with `sail-extract run`.\n"
