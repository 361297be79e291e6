"""A checkpoint is loaded as it was written, or rejected with a clear message."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import identity
from interrupted import Killed
from safetensors.torch import load_file, save_file

from sail_align.align.data.sampler import StreamState
from sail_align.align.model.alignment import Architecture
from sail_align.align.runs.checkpoint import Checkpoint, load_run
from sail_align.align.runs.folder import RunFolder
from sail_align.align.settings import FitSettings
from sail_align.align.train.step import make_optimizer
from sail_align.align.train.writer import RunWriter
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


def save(run, model, about=ABOUT, *, step=1, optimizer=None, **more):
    """Write a checkpoint of a step; without an optimiser, of a finished run."""
    state = optimizer and Checkpoint.optimizer_state(model, optimizer)
    folder = RunFolder(run).checkpoint(step)
    Checkpoint.write(folder, model.state_dict(), about, step=step, finished=optimizer is None, optimizer=state, **more)


def open_writer(run, *, done=None, keep=2, log=True):
    """Return a writer of a run, whose log has as many steps as were done; keep the log that there is if not `log`."""
    if log:
        log_of(run, *range(1, (done or 0) + 1))
    plan = SimpleNamespace(checkpoint_record=lambda: ABOUT, settings=FitSettings(steps=9), record=lambda: {})
    stream = SimpleNamespace(bytes_read=0, wait_seconds=0.0)
    bank = SimpleNamespace(complete=lambda weights: (weights, ABOUT.get("architecture", {}), {}))
    chosen = {"bank": bank, "confirm": lambda: None, "done": done, "keep": keep, "quiet": True}
    return RunWriter(plan, run, stream, torch.device("cpu"), **chosen)


def scores(r1):
    return {"r1": r1, "chance": 0.1, "image_rank": 5.0, "text_rank": 5.0}


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "runs" / "a"
    path.mkdir(parents=True)
    (path / "settings.json").write_text("{}")
    return path


def test_saved_model_is_loaded(run):
    saved = model()
    save(run, saved, step=7)
    loaded = load_run(run)
    assert not loaded.model.training
    assert (loaded.image, loaded.text) == (identity("image", dim=6), identity("text", dim=4))
    assert loaded.settings == {"head": "glu"}
    assert (loaded.step, loaded.finished) == (7, True)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    features = torch.randn(5, 6, dtype=torch.float16)
    assert torch.equal(loaded.model.encode_image(features), saved.eval().encode_image(features))


def test_digest_depends_on_weights_and_settings_only(run):
    def digest(weights, about=ABOUT):
        save(run, weights, about, step=7)
        return load_run(run).digest

    first = digest(model())
    assert digest(model()) == first
    assert digest(model(seed=1)) != first
    assert digest(model(), {**ABOUT, "settings": {"head": "glu", "seed": 1}}) != first


@pytest.mark.parametrize("kind", ["lion", "adamw"])
def test_optimiser_state_is_restored_bitwise(run, kind):
    def step(model, optimizer):
        model.train()
        (model.encode_image(torch.randn(5, 6)).sum() * model.log_scale).backward()
        optimizer.step()
        optimizer.zero_grad()

    ours = model()
    optimizer = make_optimizer(ours, FitSettings(optimizer=kind, steps=1, lr=1e-2))
    step(ours, optimizer)
    save(run, ours, step=1, optimizer=optimizer)
    restored = model(seed=1)
    other = make_optimizer(restored, FitSettings(optimizer=kind, steps=1, lr=1e-2))
    Checkpoint.read(run).restore(restored, other)
    for each in ((ours, optimizer), (restored, other)):
        torch.manual_seed(5)
        step(*each)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name


def kept(run):
    return {folder.name: sorted(path.name for path in folder.iterdir()) for folder in (run / "checkpoints").iterdir()}


def best_is(run):
    best = Checkpoint.best(run)
    return best.folder, best.step, best.scores["r1"]


MODEL, WHOLE = ["model.json", "model.safetensors"], ["model.json", "model.safetensors", "optimizer.safetensors"]


def test_writer_keeps_the_last_checkpoints_and_the_best(run):
    ours = model()
    optimizer = make_optimizer(ours, FitSettings(steps=1))
    writer = open_writer(run)
    for step, r1 in enumerate([3.0, 9.0, 4.0, 9.0, 5.0], start=1):
        writer.log_scores(step, scores(r1), ours)
        writer.save(step, StreamState(), ours, optimizer)
    assert kept(run) == {"best-00000002": MODEL, "step-00000004": WHOLE, "step-00000005": WHOLE}
    assert not Checkpoint.read(run).finished
    writer.save(6, StreamState(), ours, None)
    assert kept(run) == {"best-00000002": MODEL, "step-00000005": MODEL, "step-00000006": MODEL}
    assert Checkpoint.read(run).finished
    assert best_is(run) == (run / "checkpoints" / "best-00000002", 2, 9.0)


def test_best_checkpoint_is_not_duplicated_if_it_is_the_last(run):
    ours = model()
    writer = open_writer(run)
    for step, r1 in ((1, 3.0), (2, 5.0)):
        writer.log_scores(step, scores(r1), ours)
        writer.save(step, StreamState(), ours, make_optimizer(ours, FitSettings(steps=1)) if step < 2 else None)
    assert kept(run) == {"step-00000001": MODEL, "step-00000002": MODEL}
    assert best_is(run) == (run / "checkpoints" / "step-00000002", 2, 5.0)


def test_best_weights_between_two_saves_are_kept(run):
    writer = open_writer(run)
    best = model(1)
    writer.log_scores(3, scores(7.0), best)
    last = model(2)
    writer.log_scores(4, scores(6.0), last)
    writer.save(5, StreamState(), last, make_optimizer(last, FitSettings(steps=1)))
    assert kept(run) == {"best-00000003": MODEL, "step-00000005": WHOLE}
    assert Checkpoint.read(run).step == 5
    loaded = load_run(run / "checkpoints" / "best-00000003")
    assert (loaded.path, loaded.step) == (run / "checkpoints" / "best-00000003", 3)
    assert torch.equal(loaded.model.state_dict()["image_head.out.weight"], best.state_dict()["image_head.out.weight"])


def test_writer_removes_checkpoints_after_the_step_to_resume_from(run):
    ours = model()
    save(run, ours, step=4, optimizer=make_optimizer(ours, FitSettings(steps=1)))
    best = RunFolder(run).checkpoint(6, "best")
    Checkpoint.write(best, ours.state_dict(), ABOUT, step=6, finished=False, scores=scores(50.0))
    (run / "checkpoints" / "step-00000005").mkdir()  # killed before its model.json
    assert Checkpoint.read(run).step == 4
    open_writer(run, done=4)
    assert Checkpoint.best(run) is None
    assert kept(run) == {"step-00000004": WHOLE}


@pytest.mark.parametrize("keep", [1, 2])
def test_save_killed_at_any_point_leaves_a_complete_checkpoint(run, monkeypatch, keep):
    ours = model()
    optimizer = make_optimizer(ours, FitSettings(steps=1))
    values = {"loss": 1.0, "t": 20.0, "positive_logit": 0.0, "negative_logit": 0.0}
    writer = open_writer(run, keep=keep)
    writer.log_step(1, values)
    writer.save(1, StreamState(), ours, optimizer)
    reached, whole = {1}, 0
    for left in range(100):
        last = Checkpoint.read(run).step
        writer = open_writer(run, done=last, keep=keep, log=False)
        writer.log_step(last + 1, values)
        writer.log_scores(last + 1, scores(float(last + 1)), ours)
        writer.log_step(last + 2, values)
        with monkeypatch.context() as patch:
            die_at(patch, left)
            try:
                writer.save(last + 2, StreamState(), ours, optimizer)
            except Killed:
                pass
            else:
                whole += 1
        load_run(run)
        Checkpoint.read(run).restore(model(1), make_optimizer(ours, FitSettings(steps=1)))
        assert Checkpoint.read(run).step in (last, last + 2)
        reached.add(Checkpoint.read(run).step)
        if whole == 2:
            break
    assert left > 8
    assert len(reached) > 2


def die_at(patch, left):
    """Raise `Killed` at the n-th opening for writing, renaming or removal of a file."""

    def dying(owner, name):
        original = getattr(owner, name)

        def method(*args, **kwargs):
            nonlocal left
            left -= name != "open" or "wb" in args
            if left < 0:
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(owner, name, method)

    for owner, name in ((Path, "open"), (Path, "replace"), (Path, "unlink"), (Path, "rmdir")):
        dying(owner, name)


def rejection(path):
    with pytest.raises(UserError) as mistake:
        load_run(path)
    return str(mistake.value).replace(str(path), "RUN")


def test_other_weights_are_rejected_with_the_first_difference(run):
    other = Architecture("glu", image_dim=6, text_dim=4, dim=3, expansion=2).build()
    save(run, other, step=1)
    assert rejection(run) == (
        "RUN/checkpoints/step-00000001 does not fit this model: image_head.linear_path.weight is missing in the file "
        "and of shape (3, 6) in the model."
    )


def test_changed_weights_are_rejected(run):
    save(run, model(), step=1)
    weights = run / "checkpoints" / "step-00000001" / "model.safetensors"
    tensors = load_file(weights)
    tensors["bias"] += 1
    save_file(tensors, weights)
    assert rejection(run).startswith(
        "RUN/checkpoints/step-00000001/model.safetensors is damaged: its content is not what was written."
    )


def test_changed_record_is_rejected(run):
    save(run, model(), step=1)
    record = run / "checkpoints" / "step-00000001" / "model.json"
    whole = record.read_text()
    for changed in (whole.replace('"step": 1', '"step": 2'), whole[:100], "[]", "{}", '{"settings": null}', "\udcff"):
        record.write_text(changed, errors="surrogateescape")
        assert rejection(run) == (
            "RUN/checkpoints/step-00000001/model.json is damaged: its content is not what was written. Restore it, or "
            "remove RUN/checkpoints/step-00000001 to resume from the checkpoint before."
        )
        assert RunFolder.newest(run.parent) == run


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_missing_or_changed_file_is_rejected(run, name):
    ours = model()
    optimizer = make_optimizer(ours, FitSettings(steps=1))
    ours.image_head(torch.randn(5, 6)).sum().backward()
    optimizer.step()
    save(run, ours, step=1, optimizer=optimizer)
    saved = Checkpoint.read(run)
    file = saved.folder / name
    content = file.read_bytes()
    for changed in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(changed)
        with pytest.raises(UserError, match=f"{name} is damaged: .* Restore it, or remove {saved.folder} to"):
            saved.restore(ours, optimizer)
    file.unlink()
    with pytest.raises(UserError, match=rf"{name} cannot be read \(No such file or directory\). Restore it, or remove"):
        saved.restore(ours, optimizer)


def test_save_during_load_does_not_mix_checkpoints(run, monkeypatch):
    save(run, model(1), step=1)
    build, later = Architecture.build, model(2)

    def saved_meanwhile(architecture):
        save(run, later, step=2)
        return build(architecture)

    monkeypatch.setattr(Architecture, "build", saved_meanwhile)
    loaded = load_run(run)
    monkeypatch.undo()
    assert loaded.step == 1
    assert torch.equal(loaded.model.state_dict()["image_head.out.weight"], model(1).image_head.out.weight)


def test_copies_of_a_checkpoint_are_ignored_and_kept(run):
    save(run, model(), step=4)
    for name in ("step-00000004-copy", "step-00000005.bak", "best-of-all"):
        shutil.copytree(RunFolder(run).checkpoint(4), run / "checkpoints" / name)
    assert load_run(run).step == 4
    open_writer(run, done=4)
    assert len(kept(run)) == 4


def log_of(run, *steps):
    values = {"loss": 1.0, "positive_logit": 0.0, "negative_logit": 0.0, "t": 1.0}
    lines = [json.dumps({"kind": "train", "step": step, **values}) + "\n" for step in steps]
    (run / "metrics.jsonl").write_text("".join(lines))


def test_log_is_cut_after_the_step_to_resume_from(run):
    log_of(run, 1, 2, 3, 4)
    log, entries = RunFolder(run).open_log(3)
    with log:
        assert [entry["step"] for entry in entries] == [1, 2, 3]
        log.write("appended")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:3]] == [1, 2, 3]
    assert lines[3:] == ["appended"]


@pytest.mark.parametrize("content", ["", "1 2", "1 2 5", b"\xff\xfe", '[1]\n{"step": 2}\n', '{"step": null}\n'])
def test_incomplete_log_is_rejected_and_not_changed(run, content):
    if isinstance(content, str) and content[:1] in ("", "1"):
        log_of(run, *map(int, content.split()))
    else:
        (run / "metrics.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged: .* Restore it, or start again with another --out."):
        RunFolder(run).open_log(3)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_missing_log_is_rejected(run):
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read"):
        RunFolder(run).open_log(3)


def test_folder_without_run_or_checkpoint_is_rejected(run, tmp_path):
    assert rejection(tmp_path) == "RUN is not a run. Train one with `sail-align fit`."
    assert rejection(run) == "RUN has no checkpoint yet. Wait until its `sail-align fit` has saved one."


def test_later_format_is_rejected(run):
    save(run, model(), step=1)
    record = run / "checkpoints" / "step-00000001" / "model.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 3}))
    assert rejection(run) == "RUN/checkpoints/step-00000001 has format 3, this version reads 2. Update sail-align."


def test_newest_run_is_the_one_saved_last(tmp_path, run):
    with pytest.raises(UserError, match="There is no run in"):
        RunFolder.newest(tmp_path / "runs")
    for age, name in enumerate(["b", "a", "c"]):
        path = run.with_name(name)
        path.mkdir(exist_ok=True)
        (path / "settings.json").write_text("{}")
        save(path, model(), step=1)
        os.utime(path / "checkpoints" / "step-00000001" / "model.json", ns=(0, -age))
    (run.with_name("no-run")).mkdir()
    assert RunFolder.newest(tmp_path / "runs").name == "b"
