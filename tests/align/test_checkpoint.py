"""A checkpoint is loaded whole and as it was written, or refused with a sentence."""

import json
import os

import pytest
import torch
from fakes import identity
from safetensors.torch import load_file, save_file

from sail_align.align import checkpoint
from sail_align.align.checkpoint import load_run, newest_run, read_record, restore, save_checkpoint
from sail_align.align.model import Architecture
from sail_align.align.runs import MetricsLog
from sail_align.align.settings import FitSettings
from sail_align.align.step import make_optimizer
from sail_align.extract.errors import UserError

ARCHITECTURE = Architecture("glu", image_dim=6, text_dim=4, dim=3, expansion=2, linear_path=True)
ABOUT = {
    "architecture": {"head": "glu", "image_dim": 6, "text_dim": 4, "dim": 3, "expansion": 2, "linear_path": True},
    "image": identity("image", dim=6).to_json(),
    "text": identity("text", dim=4).to_json(),
    "settings": {"head": "glu"},
}


def model(seed=0):
    torch.manual_seed(seed)
    return ARCHITECTURE.build()


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "runs" / "a"
    path.mkdir(parents=True)
    (path / "settings.json").write_text("{}")
    return path


def test_what_was_saved_is_loaded(run):
    saved = model()
    save_checkpoint(run, saved, ABOUT, step=7, optimizer=None)
    loaded = load_run(run)
    assert not loaded.model.training
    assert (loaded.image, loaded.text) == (identity("image", dim=6), identity("text", dim=4))
    assert loaded.settings == {"head": "glu"}
    assert (loaded.step, loaded.finished) == (7, True)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    features = torch.randn(5, 6, dtype=torch.float16)
    assert torch.equal(loaded.model.encode_image(features), saved.eval().encode_image(features))


def test_the_digest_changes_with_weights_and_settings_and_with_nothing_else(run):
    def digest(weights, about=ABOUT):
        save_checkpoint(run, weights, about, step=7, optimizer=None)
        return load_run(run).digest

    first = digest(model())
    assert digest(model()) == first
    assert digest(model(seed=1)) != first
    assert digest(model(), {**ABOUT, "settings": {"head": "glu", "seed": 1}}) != first


@pytest.mark.parametrize("kind", ["lion", "adamw"])
def test_an_optimisers_state_is_restored_bitwise(run, kind):
    def step(model, optimizer):
        model.train()
        (model.encode_image(torch.randn(5, 6)).sum() * model.log_scale).backward()
        optimizer.step()
        optimizer.zero_grad()

    ours = model()
    optimizer = make_optimizer(ours, FitSettings(optimizer=kind, steps=1, lr=1e-2))
    step(ours, optimizer)
    save_checkpoint(run, ours, ABOUT, step=1, optimizer=optimizer)
    restored = model(seed=1)
    other = make_optimizer(restored, FitSettings(optimizer=kind, steps=1, lr=1e-2))
    restore(run, restored, other)
    for each in ((ours, optimizer), (restored, other)):
        torch.manual_seed(5)
        step(*each)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name


def test_no_optimiser_state_is_left_in_a_finished_run(run):
    ours = model()
    save_checkpoint(run, ours, ABOUT, step=1, optimizer=make_optimizer(ours, FitSettings(steps=1)))
    assert not read_record(run)["finished"]
    save_checkpoint(run, ours, ABOUT, step=2, optimizer=None)
    assert read_record(run)["finished"]
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == ["model.json", "model.safetensors"]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint", "settings.json"]


@pytest.mark.parametrize("renames_done", [0, 1, 2])
def test_a_save_killed_at_any_rename_leaves_a_whole_checkpoint(run, monkeypatch, renames_done):
    save_checkpoint(run, model(0), ABOUT, step=1, optimizer=None)
    original, calls = checkpoint.Path.rename, []

    def rename(path, target):
        calls.append(path)
        if len(calls) > renames_done:
            raise KeyboardInterrupt
        return original(path, target)

    monkeypatch.setattr(checkpoint.Path, "rename", rename)
    if renames_done < 2:
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(run, model(1), ABOUT, step=2, optimizer=None)
    else:
        save_checkpoint(run, model(1), ABOUT, step=2, optimizer=None)
    monkeypatch.undo()
    assert read_record(run)["step"] == (2 if renames_done == 2 else 1)
    load_run(run)
    save_checkpoint(run, model(2), ABOUT, step=3, optimizer=None)
    assert read_record(run)["step"] == 3


def refused(path):
    with pytest.raises(UserError) as mistake:
        load_run(path)
    return str(mistake.value).replace(str(path), "RUN")


def test_other_weights_are_refused_by_the_first_tensor_that_differs(run):
    other = Architecture("glu", image_dim=6, text_dim=4, dim=3, expansion=2).build()
    save_checkpoint(run, other, ABOUT, step=1, optimizer=None)
    assert refused(run) == (
        "RUN/checkpoint does not fit this model: image_head.linear_path.weight is absent in the file and of shape "
        "(3, 6) in the model."
    )


def test_a_changed_weights_file_is_refused(run):
    save_checkpoint(run, model(), ABOUT, step=1, optimizer=None)
    weights = run / "checkpoint" / "model.safetensors"
    tensors = load_file(weights)
    tensors["bias"] += 1
    save_file(tensors, weights)
    assert refused(run).startswith("RUN/checkpoint/model.safetensors is not what the run wrote")


def test_a_changed_record_is_refused(run):
    save_checkpoint(run, model(), ABOUT, step=1, optimizer=None)
    record = run / "checkpoint" / "model.json"
    whole = record.read_text()
    for changed in (whole.replace('"step": 1', '"step": 2'), whole[:100], "[]"):
        record.write_text(changed)
        assert refused(run) == ("RUN/checkpoint/model.json is not what the run wrote; train again or restore the file.")
        assert newest_run(run.parent) == run


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_missing_or_cut_file_is_refused(run, name):
    ours = model()
    optimizer = make_optimizer(ours, FitSettings(steps=1))
    save_checkpoint(run, ours, ABOUT, step=1, optimizer=optimizer)
    file = run / "checkpoint" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name} is not what the run wrote"):
        restore(run, ours, optimizer)
    file.unlink()
    with pytest.raises(UserError, match=rf"{name} cannot be read \(No such file or directory\); train again"):
        restore(run, ours, optimizer)


def test_a_missing_log_is_refused(run):
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read"):
        MetricsLog(run, 3)


def test_what_is_no_run_or_has_no_checkpoint_is_refused(run, tmp_path):
    assert refused(tmp_path) == "RUN is not a run; make one with `sail-align fit`."
    assert refused(run) == "RUN has no checkpoint yet; let its `sail-align fit` go on."


def test_a_later_format_is_refused(run):
    save_checkpoint(run, model(), ABOUT, step=1, optimizer=None)
    record = run / "checkpoint" / "model.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 2}))
    assert refused(run) == "RUN/checkpoint has format 2, this version reads 1; update sail-align."


def test_the_newest_run_is_the_one_saved_last(tmp_path, run):
    with pytest.raises(UserError, match="There is no run under"):
        newest_run(tmp_path / "runs")
    for age, name in enumerate(["b", "a", "c"]):
        path = run.with_name(name)
        path.mkdir(exist_ok=True)
        (path / "settings.json").write_text("{}")
        save_checkpoint(path, model(), ABOUT, step=1, optimizer=None)
        os.utime(path / "checkpoint" / "model.json", ns=(0, -age))
    (run.with_name("no-run")).mkdir()
    assert newest_run(tmp_path / "runs").name == "b"
