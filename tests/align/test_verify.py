"""A fit compares the features that it reads with their checksums: --verify."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sail_align.align.cli import app
from sail_align.align.data.loader import Stream
from sail_align.align.data.pairs import open_pairs
from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.folder import RunFolder
from sail_align.extract.errors import UserError
from sail_align.extract.store import features
from sail_align.extract.store.store import Store

QUICK = ["--quiet", "--steps", 2, "--dim", 4, "--device", "cpu", "--head", "linear", "--start", "random"]


def fit(path, out, *options):
    return CliRunner().invoke(app, [*map(str, ["fit", "--features", path, "--out", out, *QUICK, *options])])


def flip(path, array, shard=1, place=40):
    """Change a byte of a feature, in place."""
    (file,) = path.glob(f"{array}/features/c/{shard}/0")
    with file.open("r+b") as opened:
        opened.seek(place)
        (byte,) = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte ^ 1]))


@pytest.mark.slow
@pytest.mark.parametrize("array", ["image/*", "text/*/raw"])
def test_fit_refuses_damaged_features_unless_told_not_to_look(make_store, tmp_path, array):
    path = make_store()
    flip(path, array)
    for options in ([], ["--verify", "always"]):
        done = fit(path, tmp_path / "run", *options)
        assert isinstance(done.exception, UserError)
        assert "features/c/1/0 is damaged: its content is not what was committed" in str(done.exception)
    assert fit(path, tmp_path / "run", "--verify", "off").exit_code == 0


@pytest.mark.slow
def test_weights_do_not_depend_on_verification(make_store, tmp_path):
    path = make_store()
    weights = []
    for verify in ("first-epoch", "always", "off"):
        assert fit(path, tmp_path / verify, "--verify", verify).exit_code == 0
        assert RunFolder(tmp_path / verify).settings() == RunFolder(tmp_path / "first-epoch").settings()
        weights.append((Checkpoint.read(tmp_path / verify).folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.parametrize(("verify", "times"), [("first-epoch", 1), ("always", 3), ("off", 0)])
def test_each_chunk_is_compared_once_or_once_an_epoch(make_store, monkeypatch, verify, times):
    counted = []
    checksum = features.checksum
    monkeypatch.setattr(features, "checksum", lambda rows: counted.append(len(rows)) or checksum(rows))
    monkeypatch.setattr("sail_align.align.data.loader.GATHER_THREADS", 1)  # two may compare a chunk at once
    pairs = open_pairs([make_store(rows=160)], verify=verify)
    counted.clear()
    with Stream(pairs, [np.ones(160, bool)], batch_size=160, seed=0) as stream:
        batches = stream.batches()
        for _ in range(3):
            next(batches)
        stream._producer.shutdown()
        stream._gatherers.shutdown()
    chunks = 2 * 160 // 16
    if verify == "always":
        assert chunks * times <= len(counted) <= chunks * (times + 2)  # two batches are prepared in advance
    else:
        assert len(counted) == chunks * times


def test_damage_after_the_first_epoch_is_found_by_always(make_store):
    path = make_store(rows=160)
    for verify in ("first-epoch", "always"):
        pairs = open_pairs([path], verify=verify)
        with Stream(pairs, [np.ones(160, bool)], batch_size=160, seed=0) as stream:
            batches = stream.batches()
            next(batches)
            flip(path, "image/*")
            if verify == "always":
                with pytest.raises(UserError, match="is damaged"):
                    [next(batches) for _ in range(4)]
            else:
                assert all(isinstance(next(batches)[0].images, torch.Tensor) for _ in range(4))
        flip(path, "image/*")
    assert Store.open(path).image().changed(1) is None


def test_note_of_a_store_without_checksums(make_store, monkeypatch):
    path = make_store()
    (pairs,) = open_pairs([path])
    assert not pairs.unchecked
    monkeypatch.setattr(pairs.store, "format", 1)
    assert pairs.unchecked.endswith(
        f"has store format 1: its features cannot be checked. Run `sail-extract upgrade {path}`."
    )
