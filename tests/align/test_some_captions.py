"""Rows with only some of the captions of their store."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sail_align.align.data.captions import CaptionPolicy
from sail_align.align.data.loader import Stream
from sail_align.align.data.pairs import fill_missing, read_rows
from sail_align.align.runs.claim import claim_run
from sail_align.align.train.plan import make_plan
from sail_align.align.train.trainer import fit
from sail_align.extract.data import Status

MISSING = {"raw": range(8), "short": range(4, 12), "long": [*range(6, 17), 40]}
OPTIONS = {"steps": 4, "dim": 4, "preset": "small", "positives": 1}


@pytest.fixture
def store(make_store):
    """60 rows with an image, of which 18 lack a caption and two (6, 7) all of them; feature 0 is the row's number."""
    return make_store(rows=60, captions=MISSING, numbered=True)


def used(plan):
    return np.flatnonzero(plan.training[0] | plan.held_out[0]).tolist()


def test_with_positives_a_row_uses_the_captions_that_it_has(store):
    plan, notes = make_plan([store], OPTIONS)
    assert used(plan) == [row for row in range(60) if row not in (6, 7)]
    assert notes[0] == "Rows left out because an image or a caption is missing: 2."
    two, _ = make_plan([store], {**OPTIONS, "positives": 2})
    assert used(two) == [row for row in range(60) if sum(row in rows for rows in MISSING.values()) <= 1]


def test_without_positives_the_note_says_how_to_keep_rows(store):
    plan, notes = make_plan([store], {"steps": 4})
    assert used(plan) == [*range(17, 40), *range(41, 60)]
    assert notes[0] == (
        "Rows left out because an image or a caption is missing: 18. 16 of them have some captions (raw in 52, short "
        "in 52, long in 48 rows). To keep them, pass --positives 1, which samples from the captions that a row has, or "
        "fewer --captions."
    )


@pytest.mark.slow
def test_stream_serves_only_captions_that_a_row_has(store):
    for positives in (1, 2):
        plan, _ = make_plan([store], {**OPTIONS, "positives": positives})
        seen = set()
        texts = [array.read()[0] for array in plan.pairs[0].texts]
        with Stream(plan.pairs, plan.training, batch_size=20, seed=0, policy=plan.policy) as stream:
            for batch, _ in itertools.islice(stream.batches(), 60):
                for row, served in zip(batch.images[:, 0].int().tolist(), batch.texts.unbind(1), strict=True):
                    which = [
                        next(number for number, text_ND in enumerate(texts) if np.array_equal(text_ND[row], each_D))
                        for each_D in served.numpy()
                    ]
                    assert len(set(which)) == positives
                    seen |= {(row, number) for number in which}
        has = plan.pairs[0].present() & plan.training[0]
        assert seen == {(row, number) for number, row in np.argwhere(has).tolist()}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"start": "closed-form"}])
def test_fit_and_its_scores_are_finite(store, tmp_path, options):
    plan, _ = make_plan([store], {**OPTIONS, **options})
    run = claim_run(tmp_path / "run", plan.record()).path
    scores = fit(plan, run, device=torch.device("cpu"), quiet=True)
    assert all(np.isfinite(value) for value in scores.values())


def test_missing_captions_are_scored_as_the_first_one_that_a_row_has(store):
    plan, _ = make_plan([store], {**OPTIONS, "held_out": 0.5})
    _, text_CND = read_rows(plan.scored, plan.held_out)
    stored = [array.read() for array in plan.pairs[0].texts]
    for place, row in enumerate(np.flatnonzero(plan.held_out[0])):
        own = [features[row] if status[row] == Status.OK else None for features, status in stored]
        spare = next(each for each in own if each is not None)
        for found, expected in zip(text_CND[:, place], own, strict=True):
            assert np.array_equal(found, spare if expected is None else expected)


@given(st.integers(1, 5), st.integers(1, 9), st.randoms(use_true_random=False))
def test_fill_missing_leaves_what_is_there(captions, rows, random):
    present = np.array([[random.random() < 0.5 for _ in range(rows)] for _ in range(captions)])
    present[random.randrange(captions)] = True
    values = np.arange(captions * rows * 2, dtype=np.float16).reshape(captions, rows, 2)
    filled = np.where(present[..., None], values, np.float16(np.nan))
    fill_missing(filled, present)
    assert np.array_equal(filled[present], values[present])
    for row in range(rows):
        first = int(np.flatnonzero(present[:, row])[0])
        assert all(np.array_equal(filled[c, row], values[first, row]) for c in np.flatnonzero(~present[:, row]))


@given(st.integers(0, 2**32), st.integers(1, 3))
def test_draws_of_complete_rows_do_not_depend_on_others(seed, positives):
    policy = CaptionPolicy({"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.0}, positives)
    present = np.random.default_rng(seed).random((4, 30)) < 0.7
    present[:, present.sum(axis=0) < positives] = True
    drawn, plain = (policy.draw("abcd", 30, np.random.default_rng(seed), each) for each in (present, None))
    assert np.take_along_axis(present, drawn, axis=0).all()
    complete = present.all(axis=0)
    assert np.array_equal(drawn[:, complete], plain[:, complete])
