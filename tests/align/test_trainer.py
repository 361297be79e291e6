"""Training learns, and a stopped and resumed run is bitwise equal to an uninterrupted one."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import identity
from safetensors.torch import load_file

from sail_align.align.data.pairs import read_rows
from sail_align.align.model.loss import LossValue
from sail_align.align.runs.checkpoint import Checkpoint, load_run
from sail_align.align.runs.claim import claim_run
from sail_align.align.runs.folder import RunFolder
from sail_align.align.settings import FitSettings
from sail_align.align.train import trainer, writer
from sail_align.align.train.plan import make_plan
from sail_align.align.train.step import Stepper
from sail_align.align.train.trainer import fit
from sail_align.align.train.transfer import Transfer
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store

CPU = torch.device("cpu")
QUICK = {
    "preset": "small",
    "head": "glu",
    "batch_size": 50,
    "lr": 3e-3,
    "dim": 8,
    "expansion": 2,
    "image_dropout": 0.1,
    "start": "random",
}


def options(**changes):
    return {name: value for name, value in {**QUICK, "steps": 60, **changes}.items() if value is not None}


def begin(stores, out: Path, **changes):
    plan, _ = make_plan(stores, options(**changes))
    run, *_ = claim_run(out, plan.record())
    return plan, run


def lines(run, kind=None):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if kind in (None, entry["kind"])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"head": "linear", "expansion": None},
        {"head": "mlp"},
        {"head": "glu"},
        {"head": "glu", "optimizer": "adamw", "lr": 1e-2},
        {"head": "glu", "loss": "infonce"},
        {"head": "glu", "divisor": "batch"},
        {"head": "glu", "start": "closed-form", "lr": 1e-4},
        {"head": "linear", "expansion": None, "start": "closed-form", "lr": 1e-4},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values() if value is not None),
)
def test_every_kind_of_run_learns(make_store, tmp_path, changes):
    plan, run = begin([make_store(rows=500, captions={"raw": (), "long": ()})], tmp_path / "run", **changes)
    scores = fit(plan, run, device=CPU, quiet=True)
    before, after = lines(run, "heldout")[0], lines(run, "heldout")[-1]
    assert (before["step"], after["step"]) == (0, 60)
    logged = {name: value for name, value in scores.items() if not name.startswith("hub_")}
    assert {name: after[name] for name in logged} == logged
    assert {"hub_r1", "hub_beta"} <= scores.keys()
    chance = 10 / plan.held_out_rows * 100
    assert after["t2i_r10"] > 4 * chance
    assert after["i2t_r10"] > 4 * chance
    assert after["loss"] < before["loss"]
    if changes.get("start") != "closed-form":
        assert before["t2i_r10"] < 3 * chance
    assert Checkpoint.read(run).finished
    assert [entry["step"] for entry in lines(run, "train")] == list(range(1, 61))


@pytest.mark.slow
def test_bfloat16_learns_what_float32_learns(make_store, tmp_path):
    store, scores = make_store(rows=500), {}
    for precision in ("float32", "bfloat16"):
        plan, run = begin([store], tmp_path / precision, precision=precision)
        scores[precision] = fit(plan, run, device=CPU, quiet=True)
        assert load_run(run).settings["precision"] == precision
    exact, rounded = scores.values()
    assert rounded != exact
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.05)
    for name in ("t2i_r10", "i2t_r10"):
        assert rounded[name] == pytest.approx(exact[name], abs=5)


@pytest.mark.slow
def test_each_step_has_its_own_random_numbers(make_store, tmp_path, monkeypatch):
    plan, run = begin([make_store()], tmp_path / "run", steps=5)
    step, drawn = Stepper.step, []
    monkeypatch.setattr(Stepper, "step", lambda *given: drawn.append(float(torch.rand(()))) or step(*given))
    fit(plan, run, device=CPU, quiet=True)
    assert len(set(drawn)) == 5


def test_cca_is_a_run_without_steps(make_store, tmp_path):
    plan, _ = make_plan([make_store(rows=500)], {"head": "cca"})
    run, *_ = claim_run(tmp_path / "run", plan.record())
    scores = fit(plan, run, device=CPU, quiet=True)
    assert [entry["kind"] for entry in lines(run)] == ["heldout"]
    assert scores["t2i_r10"] > 40
    loaded = load_run(run)
    assert loaded.settings["head"] == "cca"
    assert loaded.model.image_head.linear_path is None


@pytest.mark.slow
def test_pcca_has_the_cosines_of_the_cca_and_log_likelihood_ratios(make_store, tmp_path):
    store, runs = make_store(rows=500), {}
    for head in ("cca", "pcca"):
        plan, _ = make_plan([store], {"head": head, "ridge": 2, "bank": 0})
        run, *_ = claim_run(tmp_path / head, plan.record())
        fit(plan, run, device=CPU, quiet=True)
        runs[head] = load_run(run).model
    image, text = torch.randn(9, plan.architecture.image_dim), torch.randn(7, plan.architecture.text_dim)
    torch.testing.assert_close(runs["pcca"].encode_image(image), runs["cca"].encode_image(image), atol=1e-5, rtol=0)
    torch.testing.assert_close(runs["pcca"].encode_text(text), runs["cca"].encode_text(text), atol=1e-5, rtol=0)
    assert runs["pcca"].corrected_text(text).shape == (7, plan.architecture.dim + 2)
    assert runs["cca"].correction is None


@pytest.mark.slow
def test_closed_form_start_scores_like_the_closed_form(make_store, tmp_path):
    store = make_store(rows=500)
    first = {}
    for head, form in (("linear", {}), ("wide", {"text_hidden": 20}), ("glu", {})):
        kind = "glu" if head == "glu" else "linear"
        expansion = 2 if head == "glu" else None
        form = {"head": kind, "expansion": expansion, **form}
        plan, run = begin([store], tmp_path / head, **form, start="closed-form", steps=1)
        fit(plan, run, device=CPU, quiet=True)
        first[head] = lines(run, "heldout")[0]
    for name, form in (("cca", {}), ("wide cca", {"text_hidden": 20})):
        plan, _ = make_plan([store], {"head": "cca", "dim": 8, "bank": 0, **form})
        run, *_ = claim_run(tmp_path / name, plan.record())
        first[name] = {"kind": "heldout", "step": 0, **fit(plan, run, device=CPU, quiet=True)}
    assert first["linear"] == first["cca"]
    numbers = [{key: value for key, value in first[name].items() if key != "kind"} for name in ("wide", "wide cca")]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    assert first["glu"] == pytest.approx(first["cca"])


class StoppedError(Exception):
    pass


def stop_after(monkeypatch, step):
    original = Stepper.step
    calls = []

    def train_step(*arguments):
        calls.append(None)
        if len(calls) > step:
            raise StoppedError
        return original(*arguments)

    monkeypatch.setattr(Stepper, "step", train_step)


def content(run):
    folders = [RunFolder(run).last, Checkpoint.best(run).folder]
    files = [run / "metrics.jsonl", run / "settings.json", *(path for folder in folders for path in folder.iterdir())]
    return {file.relative_to(run): file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "stops"), [("lion", [0]), ("adamw", [7]), ("lion", [12, 1, 4])])
def test_stopped_run_ends_like_an_uninterrupted_one(make_store, tmp_path, monkeypatch, optimizer, stops):
    stores = [make_store("one", rows=200), make_store("two", rows=150, first=1000)]
    changes = {"start": "closed-form", "steps": 20, "optimizer": optimizer, "text_dropout": 0.3}
    plan, whole = begin(stores, tmp_path / "whole", **changes)
    fit(plan, whole, device=CPU, quiet=True, save_seconds=0)
    for stop in stops:
        plan, run = begin(stores, tmp_path / "stopped", **changes)
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(StoppedError):
                fit(plan, run, device=CPU, quiet=True, save_seconds=0)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # as a killed process may leave
    plan, same = begin(stores, tmp_path / "stopped", **changes)
    assert same == run
    fit(plan, run, device=CPU, quiet=True, save_seconds=0)
    assert content(run) == content(whole)


@pytest.mark.slow
@pytest.mark.parametrize("bank", [0, 50])
def test_hidden_units_and_item_biases_resume_and_biases_are_dropped(make_store, tmp_path, monkeypatch, bank):
    changes = {"head": "linear", "expansion": None, "start": "closed-form", "steps": 8, "bank": bank}
    changes |= {"text_hidden": 20, "item_bias": "linear", "text_dropout": 0.3}
    stores = [make_store(rows=150)]
    plan, whole = begin(stores, tmp_path / "whole", **changes)
    fit(plan, whole, device=CPU, quiet=True)
    plan, run = begin(stores, tmp_path / "stopped", **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(StoppedError):
            fit(plan, run, device=CPU, quiet=True, save_seconds=0)
    assert any("item_bias" in name for name in load_file(RunFolder(run).last / "model.safetensors"))
    fit(plan, run, device=CPU, quiet=True, save_seconds=0)
    assert content(run) == content(whole)
    for which in ("best", "last"):
        model = load_run(run, which).model
        assert not [name for name in model.state_dict() if "item_bias" in name]
        assert model.text_head.hidden.out_features == 20
        assert (model.correction is None) == (bank == 0)


FORGETS = {"start": "closed-form", "head": "linear", "expansion": None, "lr": 0.03, "steps": 40, "patience": 3}
"""A fit that ends below its start, with a scoring after every second step."""


@pytest.mark.slow
def test_fit_stops_early_and_keeps_its_start(make_store, tmp_path):
    plan, run = begin([make_store(rows=150)], tmp_path / "run", **FORGETS)
    fit(plan, run, device=CPU, quiet=True, on_collapse="warn")
    scored = lines(run, "heldout")
    assert [entry["step"] for entry in scored] == [0, 2, 4, 6]
    assert max(scored, key=lambda entry: entry["mrr"])["step"] == 0
    assert Checkpoint.read(run).finished
    assert (load_run(run, "last").step, load_run(run).step, load_run(run).finished) == (6, 0, True)
    start = load_run(RunFolder(run).checkpoint(0, "best"))
    assert (start.digest, start.finished) == (load_run(run).digest, False)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[1], [3, 2]])
def test_stopped_run_has_the_same_patience(make_store, tmp_path, monkeypatch, stops):
    store = make_store(rows=150)
    plan, whole = begin([store], tmp_path / "whole", **FORGETS)
    fit(plan, whole, device=CPU, quiet=True, save_seconds=0, on_collapse="warn")
    for stop in stops:
        plan, run = begin([store], tmp_path / "stopped", **FORGETS)
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(StoppedError):
                fit(plan, run, device=CPU, quiet=True, save_seconds=0, on_collapse="warn")
    fit(plan, run, device=CPU, quiet=True, save_seconds=0, on_collapse="warn")
    assert content(run) == content(whole)


@pytest.mark.slow
def test_mean_reciprocal_rank_is_that_of_all_scores(make_store, tmp_path):
    plan, run = begin([make_store(rows=150, captions={"raw": (), "long": ()})], tmp_path / "run", steps=1)
    scores = fit(plan, run, device=CPU, quiet=True)
    held_out = read_rows(plan.scored, plan.held_out)
    model = load_run(run, "last").model
    images, texts = (
        encode(torch.from_numpy(features)).detach().double().numpy()
        for encode, features in ((model.encode_image, held_out[0]), (model.encode_text, held_out[1].reshape(-1, 8)))
    )
    similarity, owner = texts @ images.T, np.arange(len(texts)) % len(images)
    own = similarity[np.arange(len(texts)), owner]
    reciprocal = [np.mean(1 / (similarity >= own[:, None]).sum(1))]
    best_own = np.array([own[owner == image].max() for image in range(len(images))])
    reciprocal.append(np.mean(1 / (1 + (similarity > best_own[None]).sum(0))))
    assert scores["mrr"] == pytest.approx(100 * np.mean(reciprocal), abs=0.2)


@pytest.mark.slow
def test_run_resumes_only_if_unfinished_and_with_the_same_settings(make_store, tmp_path):
    store = make_store()
    plan, run = begin([store], tmp_path / "run", steps=2)
    assert run.name == "run"
    assert begin([store], tmp_path / "run", steps=3)[1].name == "run-2"
    assert begin([store], tmp_path / "run", steps=3)[1].name == "run-2"
    assert claim_run(run, plan.record())[:2] == (run, True)
    fit(plan, run, device=CPU, quiet=True)
    assert claim_run(run, plan.record())[:3] == (run, True, True)


def test_resume_rejects_a_checkpoint_with_other_settings(make_store, tmp_path, monkeypatch):
    store = make_store()
    plan, run = begin([store], tmp_path / "run", steps=4, seed=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedError):
            fit(plan, run, device=CPU, quiet=True, save_seconds=0)
    plan, other = begin([store], tmp_path / "other", steps=4, seed=2)
    (other / "settings.json").rename(run / "settings.json")  # as two simultaneous first commands could leave
    with pytest.raises(UserError, match=r"step-00000002 has other settings than .*settings.json"):
        fit(plan, run, device=CPU, quiet=True)


def test_process_whose_run_was_taken_over_stops_writing(make_store, tmp_path, monkeypatch):
    plan, run = begin([make_store()], tmp_path / "run", steps=4)

    def taken_over(*arguments):
        (run / "lease" / "fit.1.json").write_text("{}")  # by another machine, which assumed this process dead
        return train_step(*arguments)

    train_step = Stepper.step
    monkeypatch.setattr(Stepper, "step", taken_over)
    with pytest.raises(UserError, match="was taken over by another process while this one hung"):
        fit(plan, run, device=CPU, quiet=True, save_seconds=0)
    assert RunFolder(run).last is None


def test_other_encoders_start_another_run(make_store, tmp_path):
    path = make_store()
    store = Store.open(path)
    other = store.add(replace(identity("image", dim=12), spec=replace(identity("image", dim=12).spec, id="b")))
    for shard in other.shards:
        other.write(shard, *store.image("fake-image").read(*other.span(shard)))
    names = {}
    for encoder in ("fake-image", "b"):
        plan, _ = make_plan([path], options(), image_encoder=encoder)
        names[encoder] = claim_run(tmp_path / "run", plan.record()).path.name
    assert names == {"fake-image": "run", "b": "run-2"}


@pytest.mark.slow
def test_path_of_a_store_is_not_part_of_a_run(make_store, tmp_path, monkeypatch):
    path = make_store()
    monkeypatch.chdir(path.parent)
    _, run = begin([path], tmp_path / "run", steps=2)
    plan, same = begin([Path(path.name)], tmp_path / "run", steps=2)
    assert same == run
    fit(plan, run, device=CPU, quiet=True)
    plan, other = begin([path], tmp_path / "run", steps=2)
    fit(plan, other, device=CPU, quiet=True)
    assert load_run(run).digest == load_run(other).digest
    assert load_run(run).settings["stores"] == [path.name]


@pytest.mark.slow
def test_run_is_saved_between_scorings(make_store, tmp_path, monkeypatch):
    plan, run = begin([make_store()], tmp_path / "run", steps=60)
    stop_after(monkeypatch, 5)  # it is scored at every third step
    with pytest.raises(StoppedError):
        fit(plan, run, device=CPU, quiet=True, save_seconds=0)
    assert Checkpoint.read(run).step == 5


@pytest.mark.slow
def test_rare_captions_must_be_chosen_explicitly(make_store):
    path = make_store(rows=100, captions={"c0": (), "c1": range(10), "c2": range(70)}, bad=range(60, 100))
    with pytest.raises(UserError) as mistake:
        make_plan([path], {})
    assert str(mistake.value) == (
        "Only 0 of 60 rows with an image have all captions (c0, c1, c2). The rarest is c2, in 30 rows. "
        "Choose captions to train on with --captions, or pass --positives 1 to sample from those that a row has."
    )
    plan, _ = make_plan([path], {}, captions=["c0", "c1"])
    assert plan.training_rows + plan.held_out_rows == 50
    bad_images = make_store("bad", rows=100, captions={"c0": (), "c1": ()}, bad=range(60))
    make_plan([bad_images], {})


def test_too_few_pairs_to_hold_out_are_noted(make_store):
    path = make_store(rows=4)
    note = "4 pairs are too few to hold any out; the run will not be scored."
    assert note in make_plan([path], options())[1]
    assert note not in make_plan([path], options(held_out=0.0))[1]
    for share in (0.0, 0.05):
        with pytest.raises(UserError, match="--patience has no effect without held-out pairs"):
            make_plan([path], options(held_out=share, patience=3))


def test_infinite_loss_stops_the_run(make_store, tmp_path, monkeypatch):
    plan, run = begin([make_store()], tmp_path / "run")
    monkeypatch.setattr(Stepper, "step", lambda *_: LossValue(*torch.full((5,), math.nan)))
    with pytest.raises(UserError, match=r"The loss is nan after 1 steps. Lower --lr \(now 0.003\)"):
        fit(plan, run, device=CPU, quiet=True)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Read the numbers of a step after the next one has begun; return the order of steps and readings."""
    events = []

    def noted(word, original):
        def call(*arguments):
            events.append(word)
            return original(*arguments)

        return call

    monkeypatch.setattr(trainer.Training, "behind", property(lambda _: 1, lambda *_: None), raising=False)
    monkeypatch.setattr(Stepper, "step", noted("step", Stepper.step))
    monkeypatch.setattr(Transfer, "wait", noted("read", Transfer.wait))
    return events


def test_a_gpu_is_never_without_work_while_its_numbers_are_read(make_store, as_on_a_gpu, tmp_path):
    plan, run = begin([make_store(rows=200)], tmp_path / "run", head="linear", expansion=None, steps=5, held_out=0)
    fit(plan, run, device=CPU, quiet=True)
    assert as_on_a_gpu == ["step", *("step", "read") * 4, "read"]
    assert [entry["step"] for entry in lines(run, "train")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, True), (1e9, False)])
def test_time_at_the_rate_of_the_first_steps_is_printed_for_long_runs(
    make_store, tmp_path, monkeypatch, capsys, seconds, shown
):
    monkeypatch.setattr(writer, "SOME_SECONDS", seconds)
    plan, run = begin([make_store(rows=200)], tmp_path / "run", head="linear", expansion=None, steps=12, held_out=0)
    fit(plan, run, device=CPU)
    assert ("At the rate of the first ten steps (" in capsys.readouterr().err) == shown


@pytest.mark.slow
def test_late_numbers_change_neither_weights_nor_log(make_store, request, tmp_path):
    path, found = make_store(), []
    for name in ("at once", "late"):
        plan, run = begin([path], tmp_path / name, steps=50)
        fit(plan, run, device=CPU, quiet=True, save_seconds=0.0)
        files = ("metrics.jsonl", "checkpoints/step-00000050/model.safetensors")
        found.append([(run / file).read_bytes() for file in files])
        request.getfixturevalue("as_on_a_gpu")
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_nan_features_are_distinguished_from_a_high_learning_rate(make_store, poison, tmp_path, request, late):
    if late:
        request.getfixturevalue("as_on_a_gpu")
    path = make_store()
    keys = make_plan([path], {})[0].held_out[0]
    poison(path, ~keys)
    for start, sentence in (
        ("random", "contains NaN or inf in rows marked ok"),
        ("closed-form", "features contain NaN or inf"),
    ):
        plan, run = begin([path], tmp_path / start, start=start, steps=3)
        with pytest.raises(UserError, match=sentence):
            fit(plan, run, device=CPU, quiet=True)
    poison(path, keys)
    plan, run = begin([path], tmp_path / "scored", steps=3)
    with pytest.raises(UserError, match="contains NaN or inf in rows marked ok"):
        fit(plan, run, device=CPU, quiet=True)


@pytest.mark.slow
def test_run_resumes_after_arrays_were_added_to_its_store(make_store, tmp_path):
    path = make_store(captions={"raw": ()})
    plan, run = begin([path], tmp_path / "run", steps=3)
    assert plan.record()["store_digests"] == [Store.open(path).digest]
    before = Store.open(path).digest
    same = identity("image", dim=12)
    second = Store.open(path).add(replace(same, spec=replace(same.spec, id="second")))
    for shard in second.shards:
        first, stop = second.span(shard)
        second.write(shard, np.zeros((stop - first, 12), np.float16), np.zeros(stop - first, np.uint8))
    assert Store.open(path).digest != before
    again, _ = make_plan([path], options(steps=3), image_encoder="fake-image")
    assert claim_run(run, again.record())[:2] == (run, True)


def test_run_without_held_out_pairs_is_not_scored(make_store, tmp_path):
    plan, run = begin([make_store()], tmp_path / "run", held_out=0.0, steps=2)
    assert fit(plan, run, device=CPU, quiet=True) == {}
    assert [entry["kind"] for entry in lines(run)] == ["train", "train"]


def test_held_out_rows_are_not_trained_on(make_store):
    plan, _ = make_plan([make_store(rows=400, bad=[3])], {"held_out": 0.25})
    for training, held in zip(plan.training, plan.held_out, strict=True):
        assert not (training & held).any()
        assert (training.sum(), held.sum()) == (299, 100)


def test_learning_rate_warms_up_and_follows_a_cosine():
    settings = FitSettings(lr=1.0, warmup=0.25, steps=8)
    rates = [settings.learning_rate(step) for step in range(8)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[5] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert FitSettings(lr=1.0, steps=1).learning_rate(0) == 1.0


def test_temperature_stays_in_its_bounds(make_store, tmp_path):
    plan, run = begin([make_store()], tmp_path / "run", lr=1.0, steps=5)
    fit(plan, run, device=CPU, quiet=True)
    assert all(1 <= entry["t"] <= 100.001 for entry in lines(run, "train"))
