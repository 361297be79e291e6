"""Captions have weights, and a step uses some or all of them as positives."""

import itertools

import numpy as np
import pytest
import torch

from sail_align.align.data.captions import CaptionPolicy, parse_captions
from sail_align.align.data.loader import Stream
from sail_align.align.data.pairs import open_pairs
from sail_align.align.data.sampler import StreamState
from sail_align.align.model.loss import sigmoid_loss
from sail_align.align.train.plan import make_plan
from sail_align.extract.errors import UserError


def test_describe_returns_the_form_of_the_option():
    assert CaptionPolicy({"raw": 1.0, "long": 0.5}, 2).describe() == "raw, long:0.5"


def test_parse_captions_returns_names_and_weights():
    assert parse_captions(["raw", " long:0.5"]) == {"raw": 1.0, "long": 0.5}
    assert parse_captions([]) == {}


@pytest.mark.parametrize(
    "given", ["a:", "a:half", "a:0", "a:-1", "a:nan", "a:inf", "a:1e308", "a:1e-9", ":1", "", "a:1:2"]
)
def test_parse_captions_rejects_an_invalid_caption(given):
    with pytest.raises(UserError, match=r"is invalid: expected NAME or NAME:WEIGHT, with a weight from 0\.001"):
        parse_captions(["raw", given])


def test_parse_captions_rejects_a_repeated_caption():
    with pytest.raises(UserError, match="A caption is repeated in raw,long:2,raw:3; name each caption once"):
        parse_captions(["raw", "long:2", "raw:3"])


def test_draw_samples_without_replacement_by_weight():
    weights = np.array([3.0, 1.0, 2.0])
    policy = CaptionPolicy(dict(zip("abc", weights, strict=True)), 2)
    drawn = policy.draw("abc", 60_000, np.random.default_rng(0))
    assert drawn.shape == (2, 60_000)
    assert (drawn[0] != drawn[1]).all()
    odds = weights / weights.sum()
    for first in range(3):
        share = (drawn[0] == first).mean()
        assert share == pytest.approx(odds[first], abs=0.01)
        left = odds * (np.arange(3) != first)
        then = [(drawn[1][drawn[0] == first] == second).mean() for second in range(3)]
        assert then == pytest.approx(left / left.sum(), abs=0.015)


def stream_of(path, policy, **ranks):
    pairs = open_pairs([path])
    return Stream(pairs, [each.usable() for each in pairs], batch_size=60, seed=1, policy=policy, **ranks)


def served(stream, state, count):
    with stream:
        return [(b.images.clone(), b.texts.clone()) for b, _ in itertools.islice(stream.batches(state), count)]


@pytest.fixture
def three(make_store):
    """Feature 0 of every caption is the row's number, feature 1 tells the captions apart."""
    return make_store(rows=240, captions={"raw": (), "short": (), "long": ()}, numbered=True, shard_rows=128)


def test_sampled_captions_belong_to_their_image_and_change_each_epoch(three):
    array = np.stack([text.read()[0] for text in open_pairs([three])[0].texts])
    policy = CaptionPolicy({"raw": 1.0, "short": 1.0, "long": 4.0}, 2)
    kinds = {}
    for epoch in (0, 1):
        for images, texts in served(stream_of(three, policy), StreamState(epoch, 0), 4):
            assert texts.shape == (2, 60, 8)
            for row, of_row in zip(images[:, 0].long().tolist(), texts.movedim(1, 0), strict=True):
                which = [int(np.flatnonzero((array[:, row] == text.numpy()).all(1))[0]) for text in of_row]
                assert len(set(which)) == 2
                kinds[epoch, row] = which
    first = [kinds[0, row][0] for row in range(240)]
    assert set(first) == {0, 1, 2}
    assert first.count(2) > 120
    assert any(kinds[0, row] != kinds[1, row] for row in range(240))


@pytest.mark.slow
def test_samples_depend_only_on_seed_epoch_and_batch(three):
    policy = CaptionPolicy({"raw": 1.0, "short": 1.0, "long": 4.0}, 1)
    whole = served(stream_of(three, policy), None, 6)
    ranks = [served(stream_of(three, policy, rank=rank, world=2), StreamState(0, 3), 3) for rank in (0, 1)]
    for first, second, (images, texts) in zip(*ranks, whole[3:], strict=True):
        assert torch.equal(torch.cat([first[0], second[0]]), images)
        assert torch.equal(torch.cat([first[1], second[1]], dim=1), texts)


@pytest.mark.slow
def test_weights_multiply_the_losses_if_all_captions_are_used(three):
    images, texts = torch.randn(5, 4), torch.randn(2, 5, 4)
    at = torch.tensor(1.0), torch.tensor(-1.0)
    plan, _ = make_plan([three], {}, captions=["long:0.25", "raw"])
    assert plan.record()["caption_weights"] == [0.25, 1.0]
    alone = [sigmoid_loss(images, text[None], *at).total for text in texts]
    assert plan.loss()(images, texts, *at).total.item() == pytest.approx((0.25 * alone[0] + alone[1]).item())
    for captions, options in ((["long:0.25", "raw"], {"positives": 1}), (["long", "raw"], {})):
        plan, _ = make_plan([three], options, captions=captions)
        assert plan.loss()(images, texts, *at).total.item() == pytest.approx(sum(alone).item())


@pytest.mark.parametrize(
    ("captions", "options", "message"),
    [
        (
            ["raw", "long"],
            {"positives": 3},
            r"--positives is invalid: got 3, but .*photos.zarr has 2 captions \(raw, long\). Give at most 2",
        ),
        (["raw", "long:2"], {"head": "cca"}, "Caption weights have no effect with --head cca"),
        ([], {"head": "cca", "positives": 1}, "--positives has no effect with --head cca"),
        ([], {"positives": 0}, "--positives is invalid: got 0"),
    ],
)
def test_make_plan_rejects_an_impossible_policy(three, captions, options, message):
    with pytest.raises(UserError, match=message):
        make_plan([three], options, captions=captions)
