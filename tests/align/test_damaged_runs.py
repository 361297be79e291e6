"""Rerunning a fit notices what was damaged in its run, and removes what a killed process left."""

import errno
import json
import os
import shutil
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interrupted import Killed

from sail_align.align.runs.checkpoint import load_run
from sail_align.align.runs.claim import claim_run
from sail_align.align.runs.folder import RunFolder, parse_entry, read_file
from sail_align.align.train import writer
from sail_align.align.train.collapse import Watch
from sail_align.align.train.plan import make_plan
from sail_align.align.train.trainer import fit
from sail_align.extract.errors import UserError
from sail_align.extract.system.files import file_digest

OPTIONS = {"steps": 4, "dim": 4, "preset": "small", "head": "linear"}


@pytest.fixture
def train(make_store, tmp_path):
    """Trains a run of four steps, saving after each, or reruns it; returns its folder."""
    store = make_store()

    def rerun(**options):
        plan, _ = make_plan([store], OPTIONS)
        run = claim_run(tmp_path / "run", plan.record(), numbered=False).path
        fit(plan, run, device=torch.device("cpu"), quiet=True, save_seconds=0, **options)
        return run

    return rerun


def files(run):
    paths = [path for path in run.rglob("*") if path.is_file() and "lease" not in str(path)]
    return {path.relative_to(run): path.read_bytes() for path in paths}


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_rerun_of_a_finished_run_changes_nothing(train):
    run = train()
    before = files(run)
    assert json.loads((run / "finished.json").read_text())["step"] == 4
    assert files(train()) == before
    (run / "finished.json").unlink()  # as of an older version
    assert files(train()) == before


@pytest.mark.slow
def test_rerun_removes_what_could_not_be_removed_before(train, monkeypatch):
    with monkeypatch.context() as failing:
        failing.setattr("os.rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        run = train()
    folders = set((run / "checkpoints").iterdir())
    whole = {folder for folder in folders if RunFolder(folder).is_checkpoint}
    assert len(folders - whole) >= 2
    train()
    assert set((run / "checkpoints").iterdir()) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: flip(run / "metrics.jsonl", 50), "metrics.jsonl is damaged"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl cannot be read"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl is damaged"),
        (lambda run: flip(RunFolder(run).last / "model.safetensors", -1), "model.safetensors is damaged"),
        (lambda run: (RunFolder(run).last / "model.safetensors").unlink(), "model.safetensors cannot be read"),
        (lambda run: (RunFolder(run).last / "model.json").unlink(), "step-00000004/model.json is damaged"),
        (lambda run: shutil.rmtree(RunFolder(run).last), "step-00000004/model.json is damaged"),
        (lambda run: (run / "finished.json").write_text("[]"), "finished.json is damaged"),
        (lambda run: (run / "finished.json").write_text("{}"), "finished.json is damaged"),
    ],
)
@pytest.mark.parametrize("keep", [1, 2])
def test_damage_of_a_finished_run_is_an_error_and_nothing_is_removed(train, spoil, message, keep):
    run = train(keep=keep)
    spoil(run)
    before = files(run)
    with pytest.raises(UserError, match=message):
        train(keep=keep)
    assert files(run) == before


def test_lost_record_is_noticed_by_every_reader_of_the_run(train):
    run = train()
    (RunFolder(run).last / "model.json").unlink()
    with pytest.raises(UserError, match=r"step-00000004/model.json is damaged.*Restore it"):
        load_run(run)


def kill_after_two_steps(train, monkeypatch):
    original = writer.RunWriter.save

    def die_after_two(self, step, *args):
        original(self, step, *args)
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(writer.RunWriter, "save", die_after_two)
        with pytest.raises(Killed):
            train()


@pytest.mark.slow
@pytest.mark.parametrize("line", ["{\n", '{"kind": "tra', "[]\n", '{"kind": "train", "step": 4}\n', "\x00" * 9])
def test_damaged_line_after_the_last_checkpoint_is_dropped(train, monkeypatch, line):
    run = train()
    whole = files(run)
    shutil.rmtree(run)
    kill_after_two_steps(train, monkeypatch)
    with (run / "metrics.jsonl").open("a") as log:
        log.write(line + '{"kind": "train", "step": 5}\n')
    assert files(train()) == whole


@pytest.mark.slow
def test_changed_number_in_the_log_of_an_unfinished_run_is_noticed(train, tmp_path, monkeypatch):
    kill_after_two_steps(train, monkeypatch)
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1', 1))
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        train()


@pytest.mark.slow
@pytest.mark.parametrize(("allowed", "keep"), [(allowed, 1 + allowed % 2) for allowed in range(8)])
def test_rerun_ends_the_clean_up_of_a_killed_process(train, monkeypatch, allowed, keep):
    run = train(keep=keep)
    whole = files(run)
    shutil.rmtree(run)
    calls = []

    def limited(original):
        def call(*args, **kwargs):
            if (RunFolder(run).checkpoint(4) / "model.json").exists() and "lease" not in str(args[0]):
                calls.append(original)
                if len(calls) > allowed:
                    raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(type(run), "unlink", limited(type(run).unlink))
        patch.setattr(type(run), "rmdir", limited(type(run).rmdir))
        with suppress(Killed):
            train(keep=keep)
    assert files(train(keep=keep)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "train"}', '{"kind": "x", "step": 1}', "\xff"])
def test_replay_of_a_damaged_log_is_an_error(train, content):
    run = train()
    with (run / "metrics.jsonl").open("a") as log:
        log.write(content + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged"):
        Watch.replay(run, 1e-3)


@pytest.mark.slow
@given(st.text() | st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_no_other_text_is_an_entry(text):
    assert parse_entry(text) is None
    assert parse_entry(text + "\n") is None


VALUES = {"t": 1.0, "positive_logit": 0.5, "negative_logit": 0.25}


OTHER_TYPES = st.none() | st.booleans() | st.text() | st.lists(st.none())


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(["kind", "step", *VALUES]), OTHER_TYPES))
def test_entry_with_a_field_of_another_type_is_none(changes):
    entry = {"kind": "train", "step": 3, **VALUES}
    assert parse_entry(json.dumps(entry) + "\n") == entry
    if changes:
        assert parse_entry(json.dumps(entry | changes) + "\n") is None


def test_clean_up_of_a_checkpoint_removes_its_own_files_only(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    for name in ("model.json", "model.safetensors", "notes.txt", f".model.json.{'0' * 32}.tmp", ".model.json.mine.tmp"):
        (folder / name).touch()
    RunFolder(folder).discard()
    assert sorted(path.name for path in folder.iterdir()) == [".model.json.mine.tmp", "notes.txt"]


def test_clean_up_of_a_checkpoint_follows_no_link(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("model.json", "model.safetensors"):
        (precious / name).touch()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-00000009").symlink_to(precious)
    RunFolder(run).discard_after(3)
    assert not list((run / "checkpoints").iterdir())
    assert len(list(precious.iterdir())) == 2
    for name in ("model.json", "model.safetensors"):  # links in place of files
        folder = run / "checkpoints" / "step-00000008"
        folder.mkdir(exist_ok=True)
        (folder / name).symlink_to(precious / name)
    RunFolder(folder).discard()
    assert not folder.exists()
    assert len(list(precious.iterdir())) == 2


@pytest.mark.parametrize("name", ["settings.json", "model.json", "config.json", "model.safetensors"])
def test_fifo_in_a_foreign_run_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} cannot be read \(not a regular file\)"):
        read_file(tmp_path / name, "")
    with pytest.raises(UserError, match=r"cannot be read"):
        file_digest(tmp_path / name)
