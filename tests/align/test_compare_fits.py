"""The ladder and probe commands: what they train, resuming, and their output."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from fakes import identity
from typer.testing import CliRunner

from sail_align.align.analysis import ablation, trials
from sail_align.align.analysis.ablation import LADDER
from sail_align.align.analysis.trials import Trial, TrialRunner, base_recipe, held_out_by_all
from sail_align.align.cli import app
from sail_align.align.runs.checkpoint import load_run
from sail_align.align.settings import check_options
from sail_align.align.stats.tables import format_table
from sail_align.align.train import trainer
from sail_align.align.train.collapse import Watch
from sail_align.align.train.plan import make_plan
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store

QUICK = ["--quiet", "--steps", "3", "--dim", "8", "--device", "cpu", "--lr", "1e-3", "--batch-size", "64"]


def typed(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def test_rungs_are_the_papers_and_differ_by_one_step():
    assert [rung.paper for rung in LADDER] == [
        (11.1, 13.5), (8.0, 10.7), (11.5, 17.4), (16.1, 22.5), (25.4, 36.0), (26.2, 36.7), (31.4, 44.2), (32.9, 45.4),
    ]  # fmt: skip
    for rung in LADDER:
        check_options(rung.options)
    for before, after in pairwise(LADDER[1:]):
        both = {**before.options, **after.options}
        changed = {key for key in both if before.options.get(key) != after.options.get(key)}
        step = changed - {"divisor"} or changed or {"captions"}
        assert len(step) == 1, after.name
        assert (before.captions == after.captions) == (step != {"captions"})


@pytest.mark.slow
def test_ladder_trains_each_rung_with_each_seed_and_scores_unseen_pairs(make_store, tmp_path):
    path = make_store("photos", captions={"raw": [], "long": range(40)})
    out = tmp_path / "ladder"
    done = typed("ladder", "--features", path, "--out", out, "--seeds", 2, *QUICK)
    assert done.exit_code == 0, done.output
    record = json.loads((out / "ladder.json").read_text())
    assert [rung["name"] for rung in record["rungs"]] == [rung.name for rung in LADDER]
    assert all(len(rung["scores"][caption]["t2i_r1"]) == 2 for rung in record["rungs"] for caption in ("raw", "long"))
    assert record["store_digests"] == [Store.open(path).digest]
    settings = [json.loads(file.read_text()) for file in sorted((out / "runs").glob("*/settings.json"))]
    assert len(settings) == 16
    heads = [file.stat().st_size for file in (out / "runs").rglob("*.safetensors")]
    assert len(heads) == 16  # of each run the last ones only, which are scored
    kept = re.search(r"need up to [\d.]+ .B, of which ([\d.]+) (.)B are kept", done.output)
    assert float(kept[1]) * {"k": 1e3, "M": 1e6}[kept[2]] == pytest.approx(sum(heads), rel=0.1)
    assert {each["seed"] for each in settings} == {0, 1}
    assert {(each["head"], each["expansion"]) for each in settings} >= {("mlp", 4), ("glu", 4), ("glu", 8)}
    assert {tuple(each["captions"]) for each in settings} == {("raw",), ("long",), ("raw", "long")}
    # 300 rows have a raw caption, 260 a long one too; what both kinds of fits keep out is scored.
    plans = [make_plan([path], {}, captions=names)[0] for names in (["raw"], ["raw", "long"])]
    both = np.logical_and(*(plan.held_out[0] for plan in plans))
    assert record["pairs"] == both.sum() < plans[0].held_out_rows
    assert not any(any(rung["collapsed"]) for rung in record["rungs"])
    table = (out / "ladder.md").read_text()
    assert "collapsed" not in table
    assert table in done.output
    assert re.search(r"\| linear, InfoNCE +\| +[\d.]+ ± [\d.]+ \|", table)
    assert f"on {record['pairs']} pairs that no rung was trained on (chance {100 / record['pairs']:.2f})" in table
    drawn = ElementTree.parse(out / "ladder.svg")
    names = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert [name for name in names if name in {rung.name for rung in LADDER}] == [rung.name for rung in LADDER]


@pytest.mark.slow
def test_interrupted_ladder_resumes_and_repeats_no_run(make_store, tmp_path, monkeypatch):
    path = make_store("photos")
    words = ["ladder", "--features", path, "--out", tmp_path / "ladder", "--seeds", 1, *QUICK]
    train, calls = trainer.Training.run, []

    def interrupted(training, saved):
        calls.append(training.plan.settings)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(training, saved)

    monkeypatch.setattr(trainer.Training, "run", interrupted)
    assert typed(*words).exit_code != 0
    done = typed(*words)
    assert done.exit_code == 0, done.output
    assert calls[3] == calls[4]  # the fourth began again, the first three were there
    assert len(calls) == 4 + 3
    assert [line.endswith("(already finished)") for line in done.output.splitlines() if re.match(r"\d/6", line)] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    scores = (tmp_path / "ladder/ladder.json").read_bytes()
    assert typed(*words).exit_code == 0
    assert (tmp_path / "ladder/ladder.json").read_bytes() == scores
    assert len(calls) == 7
    typed(*words, "--weight-decay", "1e-3")
    assert len(calls) == 13  # another recipe: other runs


@pytest.mark.slow
def test_collapsed_runs_are_marked(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "LADDER", LADDER[3:5])
    monkeypatch.setattr(Watch, "replay", lambda run, _: "it has" if "sigmoid" in run.name else None)
    words = ["ladder", "--features", make_store("photos"), "--out", tmp_path / "l", "--seeds", 2, *QUICK]
    done = typed(*words)
    assert re.findall(r"\d/4 (.+), seed (\d): .+, collapsed\n", done.output) == [("+ sigmoid", "0"), ("+ sigmoid", "1")]
    record = json.loads((tmp_path / "l/ladder.json").read_text())
    assert [rung["collapsed"] for rung in record["rungs"]] == [[False, False], [True, True]]
    for name in ("ladder.md", "ladder.svg"):
        assert "+ sigmoid (collapsed 2/2)" in (tmp_path / "l" / name).read_text()
    assert "collapsed runs reflect the recipe, not the rung. Lower --lr." in done.output


def test_collapse_is_detected_in_the_log(make_store, tmp_path):
    plan, _ = make_plan([make_store("photos")], {"preset": "small", "head": "linear", "steps": 2})
    run, _ = TrialRunner(tmp_path, 1, torch.device("cpu"), quiet=True).train(Trial("linear", plan), 0)
    assert Watch.replay(run.path, 1e-3) is None
    log = run.path / "metrics.jsonl"
    *before, last = log.read_text().splitlines()
    lost = {**json.loads(last), "image_rank": 1.0, "r1": 1.0, "chance": 1.0}
    log.write_text("\n".join([*before, json.dumps(lost), json.dumps(lost)]))
    assert "collapsed at step 2" in Watch.replay(run.path, 1e-3)


@pytest.mark.slow
def test_rungs_with_long_captions_are_skipped_if_there_are_none(make_store, tmp_path):
    path = make_store("photos", captions={"c0": [], "c1": []})
    words = ["ladder", "--features", path, "--out", tmp_path / "l", "--seeds", 1, *QUICK]
    missing = typed(*words)
    assert isinstance(missing.exception, UserError)
    assert str(missing.exception) == f"{path} has no features of caption 'raw'. It has c0, c1."
    without = typed(*words, "--raw", "c0")
    assert f"note: {path} has no captions named 'long'; skipping the recipes with long captions." in without.output
    assert "multi-positive" not in without.output
    assert "8/8 + multi-positive, seed 0" in typed(*words, "--raw", "c0", "--long", "c1").output


@pytest.mark.slow
def test_invalid_requests_are_rejected_before_the_first_fit(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "fit", lambda *_, **__: pytest.fail("fitted"))
    path = make_store("photos")
    words = ["--features", path, "--out", tmp_path / "l"]
    assert "--lr is invalid: got 7" in str(typed("ladder", *words, "--lr", 7).exception)
    assert "--held-out is invalid: got 0" in str(typed("probe", *words, "--held-out", 0).exception)
    assert "--epochs has no effect with --steps" in str(typed("ladder", *words, "--steps", 5, "--epochs", 2).exception)
    for option, what, known in (
        ("--captions", "caption", "raw"),
        ("--image-encoder", "image encoder", "fake-image"),
        ("--text-encoder", "text encoder", "fake-text"),
    ):
        message = f"{path} has no features of {what} 'foo'. Available: {known}."
        assert str(typed("probe", *words, option, "foo").exception) == message
    assert "is not a feature store" in str(typed("probe", "--features", "no.zarr").exception)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    assert re.search(r"need up to [\d.]+ MB, 10 kB are free", str(typed("ladder", *words).exception))


def test_base_recipe_adapts_to_few_pairs(make_store, monkeypatch):
    path = make_store("photos")
    assert base_recipe([path], {"steps": 9})["lr"] == trials.COMPARED_FEW["lr"]
    assert "epochs" not in base_recipe([path], {"steps": 9})
    monkeypatch.setattr(trials, "PAPER_ROWS", 300)
    assert base_recipe([path], {"lr": 1e-4}) == {**trials.COMPARED, "lr": 1e-4}


def test_held_out_by_all_rejects_disjoint_rows(make_store):
    plan, _ = make_plan([make_store("photos")], {})
    nothing = replace(plan, held_out=[np.zeros_like(plan.held_out[0])])
    with pytest.raises(UserError, match=r"nothing to score\. Raise --held-out"):
        held_out_by_all([Trial("one", plan), Trial("other", nothing)])


def second_image_encoder(path, noise):
    """Add an encoder with the same features and much noise."""
    store = Store.open(path)
    same = identity("image", dim=12)
    array = store.add(replace(same, spec=replace(same.spec, id="noisy")))
    features, status = store.image("fake-image").read()
    features = features + (noise * np.random.default_rng(5).normal(size=features.shape)).astype(np.float16)
    for shard in array.shards:
        span = slice(*array.span(shard))
        array.write(shard, features[span], status[span])


@pytest.mark.slow
def test_probe_ranks_encoders(make_store, tmp_path):
    path = make_store("photos", rows=500, captions={"raw": [], "long": []})
    second_image_encoder(path, noise=8)
    words = ["probe", "--features", path, "--out", tmp_path / "probe", "--quiet", "--dim", 64, "--device", "cpu"]
    words += ["--steps", 200, "--lr", "1e-2", "--batch-size", 128]
    done = typed(*words)
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "probe/probe.json").read_text())
    ranking = content["ranking"]
    assert [each["image"] for each in ranking] == ["fake-image", "fake-image", "noisy", "noisy"]
    assert {each["caption"] for each in ranking} == {"raw", "long"}
    assert ranking[0]["interval"][0] > ranking[-1]["interval"][1]
    assert ranking[0]["r1"] > 10 * ranking[0]["chance"]
    assert (ranking[0]["pairs"], ranking[0]["chance"]) == (100, 1.0)
    (settings,) = {(s["head"], s["weight_decay"], s["warmup"], s["loss"]) for s in map(json.loads, (
        file.read_text() for file in (tmp_path / "probe/runs").glob("*/settings.json")))}  # fmt: skip
    assert settings == ("linear", 1e-7, 0.1, "sigmoid")
    only = typed(*words, "--image-encoder", "noisy", "--captions", "raw", "--seeds", 2)
    assert "(already finished)" in only.output
    assert "1/2 photos noisy fake-text raw, seed 0" in only.output
    assert re.search(r"[\d.]+ ± [\d.]+ \([\d.]+ – [\d.]+\)", only.output)  # over seeds and over pairs


@pytest.mark.slow
def test_ladder_scores_equal_those_of_the_fits(make_store, tmp_path):
    path = make_store("photos")
    assert typed("ladder", "--features", path, "--out", tmp_path / "l", "--seeds", 1, *QUICK).exit_code == 0
    record = json.loads((tmp_path / "l/ladder.json").read_text())
    for rung in record["rungs"]:
        (run,) = [run for run in (tmp_path / "l/runs").iterdir() if load_run(run).digest == rung["runs"][0]]
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert rung["scores"]["raw"] == {"t2i_r1": [last["t2i_r1"]], "i2t_r1": [last["i2t_r1"]]}


def test_table_pads_columns():
    assert format_table(("name", "n"), [("a", "1"), ("long one", "1,000")]) == (
        "| name     |     n |\n|:---------|------:|\n| a        |     1 |\n| long one | 1,000 |"
    )
