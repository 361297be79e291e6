"""Features in memory give the batches, and the weights, of features read from the stores."""

import re
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sail_align.align.data import cache as cache_module
from sail_align.align.data import loader
from sail_align.align.data.cache import Cache
from sail_align.align.data.captions import CaptionPolicy
from sail_align.align.data.loader import Stream
from sail_align.align.data.pairs import open_pairs
from sail_align.align.data.sampler import ALL_ROWS, StreamState
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.claim import claim_run
from sail_align.align.runs.folder import RunFolder, differences
from sail_align.align.train import placement
from sail_align.align.train.distributed import World
from sail_align.align.train.plan import make_plan
from sail_align.align.train.step import Stepper
from sail_align.align.train.trainer import fit
from sail_align.extract.errors import UserError
from sail_align.extract.store.features import FeatureArray

CPU = torch.device("cpu")
PLACES = {"device": CPU, "host": None}


@pytest.fixture
def stores(make_store):
    """Two stores, whose rows lack some images and captions, and of which one lacks a caption."""
    one = make_store("one", 150, {"raw": [3, 70], "long": range(20, 40), "c0": ()}, bad=[5, 149], numbered=True)
    two = make_store("two", 70, {"raw": (), "long": ()}, first=1000, shard_rows=32, chunk_rows=8, numbered=True)
    return [one, two]


def stream_of(paths, positives=None, rows=None, **more):
    pairs = open_pairs(paths, positives=positives)
    names = dict.fromkeys([name for each in pairs for name in each.captions], 1.0)
    policy = CaptionPolicy({**names, "long": 3.0}, positives or len(pairs[0].captions))
    usable = [each.usable(positives) for each in pairs]
    rows = usable if rows is None else [a & b for a, b in zip(usable, rows, strict=True)]
    return Stream(pairs, rows, policy=policy, **{"batch_size": 19, "seed": 3, "buffer_rows": 64, **more})


def served(source, state, count):
    """Return copies of batches, with the states after them."""
    batches = islice(source.batches_on(CPU, state), count)
    return [(batch.images.clone(), batch.texts.clone(), after) for batch, after in batches]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("positives", [None, 1, 2])
@pytest.mark.parametrize("buffer_rows", [64, ALL_ROWS])
def test_batches_are_those_of_the_stream(stores, place, positives, buffer_rows):
    with stream_of(stores, positives, buffer_rows=buffer_rows) as stream, Cache(stream, PLACES[place]) as cache:
        for state in (None, StreamState(0, 4), StreamState(2, stream.batches_per_epoch - 1)):
            for got, expected in zip(served(cache, state, 15), served(stream, state, 15), strict=True):
                assert torch.equal(got[0], expected[0])
                assert torch.equal(got[1], expected[1])
                assert got[2] == expected[2]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("positives", [None, 2])
def test_scan_is_that_of_the_stream(stores, place, positives, monkeypatch):
    for module in (cache_module, loader):
        monkeypatch.setattr(module, "SCAN_ROWS", 32)
    with stream_of(stores, positives) as stream, Cache(stream, PLACES[place]) as cache:
        for got, expected in zip(cache.scan(), stream.scan(), strict=True):
            assert all(map(torch.equal, got, expected))


def test_a_closed_form_is_computed_from_the_cache(stores, tmp_path, monkeypatch):
    scans, scan = [], Stream.scan
    monkeypatch.setattr(Stream, "scan", lambda stream, *rows: scans.append(rows) or scan(stream, *rows))
    train(stores, tmp_path / "run", "host", start="closed-form", ridge=2.0)
    assert len(scans) == 1  # to load it


@pytest.mark.parametrize("place", PLACES)
def test_only_the_chosen_rows_are_loaded(stores, place):
    rows = [np.arange(150) % 3 == 0, np.zeros(70, bool)]
    with stream_of(stores, rows=rows, batch_size=9) as stream, Cache(stream, PLACES[place]) as cache:
        assert len(cache._images) == stream.rows < 50
        assert cache._texts.isfinite().all()
        assert Cache.bytes_of(stream) == 2 * (cache._images.numel() + cache._texts.numel())
        assert {int(row) for images, *_ in served(cache, None, 9) for row in images[:, 0]} <= set(range(0, 150, 3))


QUICK = {"head": "linear", "start": "random", "dim": 4, "batch_size": 20, "steps": 25, "lr": 1e-3}


def train(paths, out, cache, *, exclude=(), steps=None, **options):
    """Train a run, or resume it; stop after `steps` steps, without saving, if that is given."""
    plan, _ = make_plan(paths, {**QUICK, **options}, exclude=exclude)
    run, *_ = claim_run(out, plan.record())
    with pytest.MonkeyPatch.context() as patch:
        if steps:
            step, left = Stepper.step, iter([True] * steps)
            patch.setattr(Stepper, "step", lambda *args: next(left) and step(*args))
        with nullcontext() if steps is None else pytest.raises(StopIteration):
            fit(plan, run, device=CPU, quiet=True, cache=cache, save_seconds=0)
    return run


def content(run):
    """Return the weights, the log and the settings of a run."""
    files = (Checkpoint.read(run).folder / "model.safetensors", run / "metrics.jsonl", run / "settings.json")
    return [file.read_bytes() for file in files]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"positives": 1, "verify": "off", "bank": 0},
        {"start": "closed-form", "ridge": 2.0, "positives": 2, "bias": "auto"},
        {"head": "glu", "expansion": 1, "image_dropout": 0.1, "held_out": 0.2},
        {"positives": 2, "loss": "infonce", "exclude": True},
        {"order": "permuted", "positives": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_weights_are_equal_in_all_places(stores, tmp_path, options):
    (tmp_path / "keys").write_text("".join(f"key {row}\n" for row in range(0, 1_070, 7)))
    options = options | {"exclude": [tmp_path / "keys"] if "exclude" in options else ()}
    places = ["none", "host", "device"][options.get("order") == "permuted" :]
    first, *others = (content(train(stores, tmp_path / place, place, **options)) for place in places)
    assert all(other == first for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["windows", "permuted"])
def test_run_resumes_in_another_place(stores, tmp_path, order):
    """Steps 1 to 25 are epochs of ten batches; the run stops amid the first and the second."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(stores, whole, "host" if order == "permuted" else "none", positives=1, order=order)
    for cache, steps in (("device", 6), ("host", 9), ("auto", None)):
        train(stores, run, cache, steps=steps, positives=1, order=order)
    assert content(run) == content(whole)


@pytest.mark.slow
def test_permuted_order_is_recorded(stores, tmp_path):
    runs = [train(stores, tmp_path / order, "host", order=order) for order in ("windows", "permuted")]
    assert [RunFolder(run).settings().get("order") for run in runs] == [None, "permuted"]
    there, here = (RunFolder(run).settings() for run in runs)
    assert differences(there, here) == ("--order: none, now permuted",)


@pytest.mark.slow
def test_nan_in_memory_ends_the_fit(stores, tmp_path, poison):
    poison(stores[0])
    for cache in ("host", "device"):
        with pytest.raises(UserError, match="contains NaN or inf in rows marked ok"):
            train(stores, tmp_path / cache, cache)


def test_damage_is_found_while_loading(make_store):
    path = make_store()
    (shard,) = path.glob("image/*/features/c/1/0")
    damaged = bytearray(shard.read_bytes())
    damaged[40] ^= 1
    shard.write_bytes(damaged)
    with stream_of([path]) as stream, pytest.raises(UserError, match="1/0 is damaged"):
        Cache(stream, None)


def test_full_gpu_ends_the_fit_with_advice(monkeypatch):
    class Full:
        def __init__(self, *_args, **_options):
            raise torch.OutOfMemoryError

        @staticmethod
        def bytes_of(_stream):
            return 18 * GB

    monkeypatch.setattr(placement, "Cache", Full)
    monkeypatch.setattr(placement, "choose_place", lambda *_args, **_options: ("device", ""))
    stepper = SimpleNamespace(world=World(), device=CPU)
    with pytest.raises(UserError, match="no room for 18 GB of features on the GPU"):
        placement.place_features("device", None, stepper, permuted=False, quiet=True)


GB = 10**9
CARD = "12 kB, beside 2.07 GB for a step, of {} GB free"


def choose(path, asked, device, on_card, in_memory, permuted=False, mapped=True, verify="off"):
    stepper = SimpleNamespace(
        device=torch.device(device), free=lambda: on_card, memory=lambda _rows, _captions: GB, world=World()
    )
    with pytest.MonkeyPatch.context() as patch, stream_of([path], batch_size=100) as stream:
        stream.pairs = [replace(each, verify=verify) for each in stream.pairs]
        patch.setattr(placement, "free_memory", lambda: in_memory)
        patch.setattr(FeatureArray, "mapped", mapped)
        return placement.choose_place(asked, stream, stepper, permuted=permuted)


@pytest.mark.parametrize(
    ("asked", "on_card", "in_memory", "more", "place", "reason"),
    [
        ("auto", None, 30 * GB, {}, "none", "read from the stores, whose files are mapped into memory"),
        ("auto", None, 30 * GB, {"permuted": True}, "host", "in memory (12 kB, of 30 GB free, half of which may be"),
        ("auto", None, 30 * GB, {"mapped": False}, "host", "may be used; the stores cannot be mapped)"),
        ("auto", None, 9_000, {"mapped": False}, "none", "as they do not fit in memory (12 kB, of 9 kB free"),
        ("auto", 4 * GB, 0, {}, "device", f"on the GPU ({CARD.format(4)})"),
        ("auto", 2 * GB, 4 * GB, {}, "host", f"in memory, as they do not fit on the GPU ({CARD.format(2)})"),
        ("auto", 2 * GB, 9_000, {}, "none", "read from the stores, as they do not fit in memory"),
        ("auto", 4 * GB, 4 * GB, {"verify": "always"}, "none", "to compare them with their checksums in every epoch"),
        ("device", 4 * GB, 0, {}, "device", f"on the GPU ({CARD.format(4)})"),
        ("host", 4 * GB, 4 * GB, {}, "host", "in memory (12 kB, of 4 GB free"),
        ("none", 4 * GB, 4 * GB, {}, "none", "read from the stores"),
    ],
)
def test_place_depends_on_the_memory(make_store, asked, on_card, in_memory, more, place, reason):
    chosen, why = choose(make_store(), asked, "cuda" if on_card else "cpu", on_card, in_memory, **more)
    assert chosen == place
    assert reason in why


@pytest.mark.parametrize(
    ("asked", "more", "message"),
    [
        ("device", {}, f"The features do not fit on the GPU ({CARD.format(2)}). Use --cache auto."),
        ("host", {}, "do not fit in memory (12 kB, of 9 kB free, half of which may be used). Use --cache auto."),
        ("auto", {"permuted": True}, "half of which may be used). Use --order windows."),
        ("none", {"permuted": True}, "--order permuted needs the features in memory. Use --cache auto, host or device"),
        ("host", {"verify": "always"}, "--verify always has no effect with --cache host"),
        ("auto", {"verify": "always", "permuted": True}, "--verify always has no effect with --order permuted"),
    ],
)
def test_what_cannot_be_is_refused(make_store, asked, more, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose(make_store(), asked, "cuda", 2 * GB, 9_000, **more)


@pytest.mark.slow
def test_choice_is_printed(make_store, tmp_path, capsys):
    for cache, quiet in (("auto", False), ("auto", True), ("none", False)):
        plan, _ = make_plan([make_store(cache + str(quiet))], {**QUICK, "steps": 1})
        run, *_ = claim_run(tmp_path / f"{cache}-{quiet}", plan.record())
        fit(plan, run, device=CPU, quiet=quiet, cache=cache)
    said = capsys.readouterr().err
    assert said.count("Features: read from the stores, whose files are mapped into memory.\n") == 1
