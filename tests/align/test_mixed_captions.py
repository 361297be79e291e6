"""Training on stores with different captions: each row samples from the captions of its own store."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sail_align.align.data.captions import CaptionPolicy, choose_captions
from sail_align.align.data.loader import Stream
from sail_align.align.data.pairs import open_pairs, read_rows
from sail_align.align.data.sampler import StreamState
from sail_align.align.runs.claim import claim_run
from sail_align.align.train import trainer
from sail_align.align.train.plan import make_plan
from sail_align.align.train.step import Stepper
from sail_align.extract.errors import UserError

WEIGHTS = {"raw": 1.0, "short": 2.0, "long": 4.0}
PATHS = [Path("a.zarr"), Path("b.zarr")]
THERE = [["raw", "short", "long"], ["raw"]]


@pytest.fixture
def mixed(make_store):
    """Rows 0 … 149 with three captions, 500 … 579 with two, 1,000 … 1,089 with one: feature 0 is the row's number."""
    many = make_store("many", rows=150, captions=dict.fromkeys(WEIGHTS, ()), numbered=True, bad=[3])
    two = make_store("two", rows=80, captions={"long": [4], "raw": ()}, numbered=True, first=500, chunk_rows=8)
    return [many, two, make_store("few", rows=90, captions={"raw": [7]}, numbered=True, first=1_000, shard_rows=32)]


def stream_of(pairs, positives, batch_size=20, seed=1, buffer_rows=64, **ranks):
    rows, policy = [each.usable() for each in pairs], CaptionPolicy(WEIGHTS, positives)
    return Stream(pairs, rows, batch_size=batch_size, seed=seed, buffer_rows=buffer_rows, policy=policy, **ranks)


def served(stream, state, count):
    with stream:
        return [(b.images.clone(), b.texts.clone()) for b, _ in itertools.islice(stream.batches(state), count)]


@pytest.mark.parametrize(
    ("there", "asked", "positives", "chosen"),
    [
        (THERE, None, None, [["raw"], ["raw"]]),
        (THERE, None, 1, THERE),
        (THERE, ["long", "raw"], 1, [["long", "raw"], ["raw"]]),
        ([["raw", "long"], ["short", "long"]], None, 2, [["raw", "long"], ["long", "short"]]),
        ([["raw"], ["long"]], None, 1, [["raw"], ["long"]]),
    ],
)
def test_choose_captions_uses_what_each_store_has(there, asked, positives, chosen):
    assert choose_captions(PATHS, there, asked, positives) == chosen


@pytest.mark.parametrize(
    ("there", "asked", "positives", "message"),
    [
        (
            THERE,
            ["raw", "long"],
            None,
            "b.zarr has no features of caption 'long'. It has raw. Use --captions raw, which all stores have, or "
            "--positives 1 to sample from the captions of each store.",
        ),
        (
            [["raw"], ["long"]],
            None,
            None,
            "No caption is in all stores: a.zarr has raw; b.zarr has long. Use --positives 1 to sample from the "
            "captions of each store.",
        ),
        (THERE, ["raw", "wrong"], 1, "a.zarr has no features of caption 'wrong'. It has raw, short, long."),
        (THERE, ["short", "long"], 1, "b.zarr has no features of caption 'short'. It has raw."),
        ([["raw"], []], None, 1, "b.zarr has no text features. Create some with `sail-extract run`."),
    ],
)
def test_choose_captions_rejects_stores_that_do_not_fit(there, asked, positives, message):
    with pytest.raises(UserError) as error:
        choose_captions(PATHS, there, asked, positives)
    assert str(error.value) == message


@pytest.mark.slow
def test_make_plan_rejects_more_positives_than_a_store_has(mixed):
    with pytest.raises(UserError, match=r"got 2, but .*few.zarr has 1 captions \(raw\). Give at most 1"):
        make_plan(mixed, {"positives": 2})


@pytest.mark.slow
def test_notes_name_unused_and_missing_captions(mixed):
    many, _, few = mixed
    plan, notes = make_plan([many, few], {})
    assert plan.record()["captions"] == ["raw"]
    assert f"Left out short, long of {many}, which other stores lack." in notes[1]
    plan, notes = make_plan([many, few], {"positives": 1}, captions=["raw", "long:4"])
    assert (plan.record()["captions"], plan.record()["caption_weights"]) == (["raw", "long"], [1, 4])
    assert notes[1] == f"{few} has no long; sampling from raw."


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    positives=st.sampled_from([1, 2]),
    batch_size=st.integers(3, 90),
    seed=st.integers(0, 99),
    start=st.integers(0, 9),
    buffer_rows=st.sampled_from([16, 50, 400]),
)
def test_batches_do_not_depend_on_start_state_or_ranks(mixed, positives, batch_size, seed, start, buffer_rows):
    pairs = open_pairs(mixed[: 4 - positives], positives=positives)

    def parts(state, **ranks):
        return served(stream_of(pairs, positives, batch_size, seed, buffer_rows, **ranks), state, 3)

    whole = served(stream_of(pairs, positives, batch_size, seed, buffer_rows), None, start + 3)[start:]
    with stream_of(pairs, positives, batch_size) as stream:
        state = StreamState(*json.loads(json.dumps(divmod(start, stream.batches_per_epoch))))
    for world in (1, 2, 3):
        by_rank = (parts(state, rank=rank, world=world) for rank in range(world))
        for *of_ranks, (images, texts) in zip(*by_rank, whole, strict=True):
            assert torch.equal(torch.cat([part[0] for part in of_ranks]), images)
            assert torch.equal(torch.cat([part[1] for part in of_ranks], dim=1), texts)


@pytest.mark.slow
@pytest.mark.parametrize("positives", [1, 2])
def test_epoch_serves_each_row_once_with_its_own_captions(mixed, positives):
    pairs = open_pairs(mixed[: 4 - positives], positives=positives)
    captions_of = {}  # row's number → its store and its captions (C, D)
    for each in pairs:
        texts = np.stack([array.read()[0] for array in each.texts], axis=1)
        numbers, usable = each.image.read()[0][:, 0], each.usable()
        captions_of |= {int(n): (each, text) for n, text in zip(numbers[usable], texts[usable], strict=True)}
    drawn = []
    for images, texts in served(stream_of(pairs, positives, batch_size=1), None, len(captions_of)):
        each, own = captions_of.pop(int(images[0, 0]))
        places = [int(np.flatnonzero((own == text).all(1))[0]) for text in texts[:, 0].numpy()]
        assert len(set(places)) == positives
        drawn.append((len(own), each.captions[places[0]]))
    assert not captions_of
    assert {name for count, name in drawn if count == 1} <= {"raw"}
    assert {name for count, name in drawn if count == 2} == {"raw", "long"}
    assert [name for count, name in drawn if count == 2].count("long") > 79 / 2  # its odds are 4 to 1
    assert {name for count, name in drawn if count == 3} == set(WEIGHTS)


@pytest.mark.slow
def test_scan_yields_all_captions_of_each_store(mixed):
    pairs = open_pairs(mixed, positives=1)
    with stream_of(pairs, 1) as stream:
        blocks = [block.texts[:, :, 0] for block in stream.scan()]
    assert [block.shape for block in blocks] == [(3, 149), (2, 79), (1, 89)]
    assert all((block == block[0]).all() for block in blocks)


@pytest.mark.slow
def test_fit_on_mixed_stores_learns_and_resumes_exactly(make_store, tmp_path, monkeypatch):
    stores = [make_store("many", rows=250, captions={"raw": (), "long": ()}), make_store("one", rows=250, first=1_000)]
    options = {"positives": 1, "head": "linear", "lr": 3e-3, "dim": 8, "batch_size": 50, "steps": 40, "held_out": 0.2}
    runs, step = [], Stepper.step

    def train(steps_before_the_end=None):
        left = iter(range(options["steps"] if steps_before_the_end is None else steps_before_the_end))
        monkeypatch.setattr(Stepper, "step", lambda *given: (next(left), step(*given))[1])
        return trainer.fit(plan, runs[-1], device=torch.device("cpu"), quiet=True, save_seconds=0)

    for stops in ([], [9, 17]):
        plan, _ = make_plan(stores, options)
        runs.append(claim_run(tmp_path / f"stopped {len(stops)} times", plan.record()).path)
        for stop in stops:
            with pytest.raises(StopIteration):
                train(stop)
        scores = train()
    assert plan.scored[0].captions == plan.scored[1].captions == ("raw",)
    assert scores["r1"] > 4 * scores["chance"]
    whole, stopped = ((run / "metrics.jsonl").read_bytes() for run in runs)
    assert whole == stopped


@pytest.mark.slow
def test_held_out_pairs_use_shared_captions_or_else_the_first(mixed, make_store):
    plan, _ = make_plan(mixed, {"positives": 1})
    assert [each.captions for each in plan.scored] == [("raw",)] * 3
    other = make_store("other", rows=50, captions={"short": ()}, first=1_500)
    plan, _ = make_plan([mixed[2], other], {"positives": 1})
    images, texts = read_rows(plan.scored, plan.held_out)
    assert texts.shape == (1, len(images), 8)
    assert [each.captions for each in plan.scored] == [("raw",), ("short",)]
