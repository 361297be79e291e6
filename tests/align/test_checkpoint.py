"""A checkpoint is loaded whole and as it was written, or refused with a sentence."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from fakes import identity
from interrupted import Killed
from safetensors.torch import load_file, save_file

from sail_align.align.data.sampler import StreamState
from sail_align.align.model.alignment import Architecture
from sail_align.align.runs.checkpoint import (
    Saver,
    best_of,
    checkpoint_folder,
    load_run,
    newest_run,
    read_checkpoint,
    restore,
    save_checkpoint,
    write_checkpoint,
)
from sail_align.align.settings import FitSettings
from sail_align.align.train.journal import MetricsLog
from sail_align.align.train.step import make_optimizer
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
    restore(read_checkpoint(run), restored, other)
    for each in ((ours, optimizer), (restored, other)):
        torch.manual_seed(5)
        step(*each)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name


def kept(run):
    return {folder.name: sorted(path.name for path in folder.iterdir()) for folder in (run / "checkpoints").iterdir()}


MODEL, WHOLE = ["model.json", "model.safetensors"], ["model.json", "model.safetensors", "optimizer.safetensors"]


def test_the_last_few_checkpoints_and_the_best_are_kept_and_a_finished_run_needs_no_optimiser(run):
    ours = model()
    optimizer = make_optimizer(ours, FitSettings(steps=1))
    saver = Saver(run, ABOUT, keep=2)
    for step, r1 in enumerate([3.0, 9.0, 4.0, 9.0, 5.0], start=1):
        saver.scored(ours, step, {"r1": r1})
        saver.save(ours, step, StreamState.start(), optimizer)
    assert kept(run) == {"best-00000002": MODEL, "step-00000004": WHOLE, "step-00000005": WHOLE}
    assert not read_checkpoint(run).record["finished"]
    saver.save(ours, 6, StreamState.start(), None)
    assert kept(run) == {"best-00000002": MODEL, "step-00000005": MODEL, "step-00000006": MODEL}
    assert read_checkpoint(run).record["finished"]
    assert best_of(run) == (run / "checkpoints" / "best-00000002", 2, 9.0)


def test_where_the_best_is_the_last_it_is_there_once(run):
    ours = model()
    saver = Saver(run, ABOUT)
    for step, r1 in ((1, 3.0), (2, 5.0)):
        saver.scored(ours, step, {"r1": r1})
        saver.save(ours, step, StreamState.start(), make_optimizer(ours, FitSettings(steps=1)) if step < 2 else None)
    assert kept(run) == {"step-00000001": MODEL, "step-00000002": MODEL}
    assert best_of(run) == (run / "checkpoints" / "step-00000002", 2, 5.0)


def test_weights_that_scored_best_between_two_saves_are_kept_and_are_not_gone_on_from(run):
    saver = Saver(run, ABOUT)
    best = model(1)
    saver.scored(best, 3, {"r1": 7.0})
    last = model(2)
    saver.scored(last, 4, {"r1": 6.0})
    saver.save(last, 5, StreamState.start(), make_optimizer(last, FitSettings(steps=1)))
    assert kept(run) == {"best-00000003": MODEL, "step-00000005": WHOLE}
    assert read_checkpoint(run).record["step"] == 5
    loaded = load_run(run / "checkpoints" / "best-00000003")
    assert (loaded.path, loaded.step) == (run / "checkpoints" / "best-00000003", 3)
    assert torch.equal(loaded.model.state_dict()["image_head.out.weight"], best.state_dict()["image_head.out.weight"])


def test_what_lies_behind_the_step_that_a_run_goes_on_from_is_removed(run):
    ours = model()
    save_checkpoint(run, ours, ABOUT, step=4, optimizer=make_optimizer(ours, FitSettings(steps=1)))
    record = {**ABOUT, "step": 6, "finished": False, "scores": {"r1": 50.0}}
    write_checkpoint(checkpoint_folder(run, 6, "best"), ours.state_dict(), record, None)
    (run / "checkpoints" / "step-00000005").mkdir()  # killed before its model.json
    assert read_checkpoint(run).record["step"] == 4
    assert Saver(run, ABOUT).best.step == -1
    assert kept(run) == {"step-00000004": WHOLE}


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_killed_at_any_write_or_removal_leaves_a_whole_checkpoint(run, monkeypatch, keep):
    ours = model()
    optimizer = make_optimizer(ours, FitSettings(steps=1))
    Saver(run, ABOUT, keep=keep).save(ours, 1, StreamState.start(), optimizer)
    reached = {1}
    for left in range(100):
        last = read_checkpoint(run).record["step"]
        saver = Saver(run, ABOUT, keep=keep)
        saver.scored(ours, last + 1, {"r1": float(last + 1)})
        with monkeypatch.context() as patch:
            die_at(patch, left)
            try:
                saver.save(ours, last + 2, StreamState.start(), optimizer)
            except Killed:
                pass
            else:
                break
        load_run(run)
        restore(read_checkpoint(run), model(1), make_optimizer(ours, FitSettings(steps=1)))
        assert read_checkpoint(run).record["step"] in (last, last + 2)
        reached.add(read_checkpoint(run).record["step"])
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

    for owner, name in ((Path, "open"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree")):
        dying(owner, name)


def refused(path):
    with pytest.raises(UserError) as mistake:
        load_run(path)
    return str(mistake.value).replace(str(path), "RUN")


def test_other_weights_are_refused_by_the_first_tensor_that_differs(run):
    other = Architecture("glu", image_dim=6, text_dim=4, dim=3, expansion=2).build()
    save_checkpoint(run, other, ABOUT, step=1, optimizer=None)
    assert refused(run) == (
        "RUN/checkpoints/step-00000001 does not fit this model: image_head.linear_path.weight is absent in the file "
        "and of shape (3, 6) in the model."
    )


def test_a_changed_weights_file_is_refused(run):
    save_checkpoint(run, model(), ABOUT, step=1, optimizer=None)
    weights = run / "checkpoints" / "step-00000001" / "model.safetensors"
    tensors = load_file(weights)
    tensors["bias"] += 1
    save_file(tensors, weights)
    assert refused(run).startswith("RUN/checkpoints/step-00000001/model.safetensors is not what was written")


def test_a_changed_record_is_refused(run):
    save_checkpoint(run, model(), ABOUT, step=1, optimizer=None)
    record = run / "checkpoints" / "step-00000001" / "model.json"
    whole = record.read_text()
    for changed in (whole.replace('"step": 1', '"step": 2'), whole[:100], "[]", "{}", '{"settings": null}', "\udcff"):
        record.write_text(changed, errors="surrogateescape")
        assert refused(run) == (
            "RUN/checkpoints/step-00000001/model.json is not what was written; restore it, or remove "
            "RUN/checkpoints/step-00000001: the run's command then goes on from what was saved before."
        )
        assert newest_run(run.parent) == run


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_missing_or_changed_file_is_refused(run, name):
    ours = model()
    optimizer = make_optimizer(ours, FitSettings(steps=1))
    ours.image_head(torch.randn(5, 6)).sum().backward()
    optimizer.step()
    save_checkpoint(run, ours, ABOUT, step=1, optimizer=optimizer)
    saved = read_checkpoint(run)
    file = saved.folder / name
    content = file.read_bytes()
    for changed in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(changed)
        with pytest.raises(UserError, match=f"{name} is not what was written; restore it, or remove {saved.folder}:"):
            restore(saved, ours, optimizer)
    file.unlink()
    with pytest.raises(UserError, match=rf"{name} cannot be read \(No such file or directory\); restore it, or remove"):
        restore(saved, ours, optimizer)


def test_a_run_that_is_saved_while_it_is_loaded_gives_one_checkpoint(run, monkeypatch):
    save_checkpoint(run, model(1), ABOUT, step=1, optimizer=None)
    build, later = Architecture.build, model(2)

    def saved_meanwhile(architecture):
        save_checkpoint(run, later, ABOUT, step=2, optimizer=None)
        return build(architecture)

    monkeypatch.setattr(Architecture, "build", saved_meanwhile)
    loaded = load_run(run)
    monkeypatch.undo()
    assert loaded.step == 1
    assert torch.equal(loaded.model.state_dict()["image_head.out.weight"], model(1).image_head.out.weight)


def test_a_copy_of_a_checkpoint_is_none_and_stays(run):
    save_checkpoint(run, model(), ABOUT, step=4, optimizer=None)
    for name in ("step-00000004-copy", "step-00000005.bak", "best-of-all"):
        shutil.copytree(checkpoint_folder(run, 4), run / "checkpoints" / name)
    assert load_run(run).step == 4
    Saver(run, ABOUT)
    assert len(kept(run)) == 4


def log_of(run, *steps):
    with MetricsLog(run, None) as log:
        for step in steps:
            log.write("train", step, loss=1.0)


def test_a_log_is_cut_behind_the_step_that_a_run_goes_on_from(run):
    log_of(run, 1, 2, 3, 4)
    with MetricsLog(run, 3) as log:
        assert [entry["step"] for entry in log.kept] == [1, 2, 3]
        log.write("train", 4, loss=2.0)
    assert [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 1, 1, 2]


@pytest.mark.parametrize("content", ["", "1 2", "1 2 5", b"\xff\xfe", '[1]\n{"step": 2}\n', '{"step": null}\n'])
def test_a_log_that_lacks_what_was_trained_is_refused_and_left_as_it_is(run, content):
    if isinstance(content, str) and content[:1] in ("", "1"):
        log_of(run, *map(int, content.split()))
    else:
        (run / "metrics.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=r"metrics.jsonl is not what was written; restore it, or begin again with anoth"
    ):
        MetricsLog(run, 3)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_missing_log_is_refused(run):
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read"):
        MetricsLog(run, 3)


def test_what_is_no_run_or_has_no_checkpoint_is_refused(run, tmp_path):
    assert refused(tmp_path) == "RUN is not a run; make one with `sail-align fit`."
    assert refused(run) == "RUN has no checkpoint yet; let its `sail-align fit` go on."


def test_a_later_format_is_refused(run):
    save_checkpoint(run, model(), ABOUT, step=1, optimizer=None)
    record = run / "checkpoints" / "step-00000001" / "model.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 3}))
    assert refused(run) == "RUN/checkpoints/step-00000001 has format 3, this version reads 2; update sail-align."


def test_the_newest_run_is_the_one_saved_last(tmp_path, run):
    with pytest.raises(UserError, match="There is no run under"):
        newest_run(tmp_path / "runs")
    for age, name in enumerate(["b", "a", "c"]):
        path = run.with_name(name)
        path.mkdir(exist_ok=True)
        (path / "settings.json").write_text("{}")
        save_checkpoint(path, model(), ABOUT, step=1, optimizer=None)
        os.utime(path / "checkpoints" / "step-00000001" / "model.json", ns=(0, -age))
    (run.with_name("no-run")).mkdir()
    assert newest_run(tmp_path / "runs").name == "b"
