"""A collapse is detected from the log alone, and runs that learn are not stopped."""

import pytest
import torch

from sail_align.align.runs.claim import claim_run
from sail_align.align.train.collapse import Watch
from sail_align.align.train.plan import make_plan
from sail_align.align.train.trainer import fit
from sail_align.extract.errors import UserError

CPU = torch.device("cpu")


def seen(*lines):
    """Return the first message of a watch about (kind, values) lines, one per step."""
    watch = Watch(lr=0.01)
    for step, (kind, values) in enumerate(lines, start=1):
        if message := watch.see(kind, step, values):
            return message
    return None


def train(gap, negative_mass=1.0, t=10.0):
    return "train", {
        "loss": 0.1,
        "t": t,
        "b": -5.0,
        "positive_logit": -5 + t * gap,
        "negative_logit": -5.0,
        "positive_mass": 1.0,
        "negative_mass": negative_mass,
    }


def heldout(r1, image_rank=100.0, text_rank=200.0, chance=0.1):
    return "heldout", {"r1": r1, "chance": chance, "image_rank": image_rank, "text_rank": text_rank}


LOWER = "Lower --lr (now 0.01), lengthen --warmup, or continue with --on-collapse warn."


def test_lost_recall_in_two_scorings_is_a_collapse():
    assert seen(heldout(0.1), heldout(30.0), heldout(0.2), heldout(25.0), heldout(0.3)) is None
    assert seen(heldout(0.1), heldout(30.0), heldout(0.2), heldout(0.3)) == (
        "Training collapsed at step 4: held-out R@1 is 0.3 (chance 0.1), after 30.0 before. " + LOWER
    )
    assert seen(*(heldout(r1) for r1 in (0.1, 30.0, 8.0, 4.0, 4.0))) is None  # overfitted, but not gone


def test_lost_rank_is_a_collapse_only_at_chance():
    fallen = [heldout(0.2, image_rank=rank) for rank in (100.0, 15.0, 9.0)]
    assert "the effective rank of image embeddings is 9.0, after 100.0 before, and held-out R@1 is 0.2" in seen(*fallen)
    assert "of text embeddings" in seen(heldout(0.1), *[heldout(0.1, text_rank=3.0)] * 2)
    assert seen(heldout(0.1), *[heldout(20.0, image_rank=9.0)] * 5) is None
    assert seen(heldout(0.1), *[heldout(0.1, image_rank=45.0)] * 5) is None  # slow, but not lost


def test_dominant_negatives_are_a_collapse_only_at_chance():
    drowned = [train(0.0, negative_mass=300.0, t=1.0), heldout(0.1)] * 2
    assert "negatives outweigh positives 300 times in the gradient, and held-out R@1 is 0.1" in seen(*drowned)
    assert ". Start with --temperature auto (t is now 1 and b -5), or continue" in seen(*drowned)
    assert seen(*[train(0.3, negative_mass=300.0), heldout(5.0)] * 5) is None
    assert seen(*[train(0.0, negative_mass=5.0), heldout(0.1)] * 5) is None


def test_chance_bound_for_few_pairs():
    drowned = train(0.0, negative_mass=159.0)
    assert seen(*[drowned, heldout(41.6, chance=8.3)] * 5) is None
    assert "held-out R@1 is 17.4 (chance 8.3)" in seen(*[drowned, heldout(17.4, chance=8.3)] * 2)


def test_dominant_negatives_in_the_first_batch_are_a_collapse_if_recall_stays_at_chance():
    drowned, balanced = train(0.0, negative_mass=25.0), [train(0.0)] * 9
    at_chance, low, above = ([*balanced, heldout(r1)] for r1 in (0.1, 0.4, 0.6))
    message = seen(drowned, *at_chance * 7)
    assert "collapsed at step 71: negatives outweighed positives 25 times in the first batch, and held-out" in message
    assert ". Start with --temperature auto" in message
    assert seen(drowned, *at_chance * 6, *above, *low * 6) is None
    assert seen(drowned, *[train(0.0), heldout(0.1)] * 24) is None  # too few steps to say
    assert seen(*at_chance * 20) is None


def test_forgetting_is_blamed_on_the_learning_rate():
    drowned = train(0.4, negative_mass=25.0)
    assert seen(drowned, heldout(0.1), heldout(30.0), heldout(0.2), heldout(0.3)).endswith(LOWER)
    assert seen(drowned, *[train(0.01)] * 20).endswith(LOWER)


def test_lost_gap_is_a_collapse_after_some_steps():
    assert seen(*[train(0.4)] * 5, *[train(0.01)] * 19, train(0.3), *[train(0.01)] * 19) is None
    assert seen(*[train(0.4)] * 5, *[train(0.01)] * 20) == (
        "Training collapsed at step 25: the mean cosine of positives exceeds that of negatives by 0.01, after 0.4 "
        "before. " + LOWER
    )
    assert seen(*[train(0.001)] * 100) is None  # a start


@pytest.mark.slow
def test_collapsed_run_stops_saved_and_continues_with_a_warning(make_store, tmp_path, capsys):
    options = {"preset": "small", "dim": 8, "batch_size": 100, "steps": 60, "lr": 0.5}
    plan, _ = make_plan([make_store(rows=700)], options)
    run, whole = (claim_run(tmp_path / name, plan.record()).path for name in ("run", "whole"))
    with pytest.raises(UserError, match="Training collapsed at step") as first:
        fit(plan, run, device=CPU, quiet=True)
    log = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as second:
        fit(plan, run, device=CPU, quiet=True)
    assert str(second.value) == str(first.value)
    assert (run / "metrics.jsonl").read_bytes() == log
    for each in (run, whole):
        fit(plan, each, device=CPU, quiet=True, on_collapse="warn")
        assert capsys.readouterr().err.count("warning: Training collapsed") == 1
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert len((run / "metrics.jsonl").read_bytes()) > len(log)


@pytest.mark.slow
def test_run_that_collapsed_at_its_last_step_raises_when_rerun(make_store, tmp_path):
    options = {"preset": "small", "dim": 8, "batch_size": 100, "steps": 60, "lr": 0.5}
    plan, _ = make_plan([make_store(rows=700)], options)
    run = claim_run(tmp_path / "run", plan.record()).path
    scores = fit(plan, run, device=CPU, quiet=True, on_collapse="warn")
    with pytest.raises(UserError, match="Training collapsed at step"):
        fit(plan, run, device=CPU, quiet=True)
    assert fit(plan, run, device=CPU, quiet=True, on_collapse="warn") == scores
