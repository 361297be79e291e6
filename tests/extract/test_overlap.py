"""Near-duplicates between stores: the nearest evaluation image of each training image, for any block size."""

import numpy as np
import pytest
from fakes import identity
from typer.testing import CliRunner

from sail_align.extract.cli import app
from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.errors import UserError
from sail_align.extract.quality import overlap as module
from sail_align.extract.quality.overlap import Overlap
from sail_align.extract.store.store import Store
from sail_align.extract.system.files import as_path

DIM = 16


def make(path, features_ND, *, missing=(), name="train", key="{}", commit=True, **changes):
    samples = [Sample(key.format(i), "") for i in range(len(features_ND))]
    store = Store.create(path / f"{name}.zarr", dataset=name, manifest={}, parts=[Part.of(samples)], captions=[])
    array = store.add(identity("image", dim=DIM, **changes))
    status = np.zeros(len(features_ND), dtype=np.uint8)
    features_ND = features_ND.astype(np.float16)
    features_ND[list(missing)], status[list(missing)] = np.nan, Status.MISSING
    for shard in array.shards if commit else array.shards[:-1]:
        rows = slice(*array.span(shard))
        array.write(shard, features_ND[rows], status[rows])
    return store


@pytest.fixture
def stores(tmp_path):
    """700 and 300 random rows; training rows 5, 400 and 699 are evaluation rows 200, 0 and 299 with a little noise."""
    random = np.random.default_rng(0)
    train, held = random.normal(size=(700, DIM)), random.normal(size=(300, DIM))
    train[[5, 400, 699]] = 3 * held[[200, 0, 299]] + [[0.5], [0.1], [0.2]] * random.normal(size=(3, DIM))
    missing = {"train": [6, 401], "held": [7]}
    return (
        make(tmp_path, train, missing=missing["train"]),
        make(tmp_path, held, missing=missing["held"], name="held", key="test {}"),
        train.astype(np.float16).astype(np.float64),
        held.astype(np.float16).astype(np.float64),
    )


@pytest.mark.parametrize(("train_rows", "eval_rows"), [(8_192, 32_768), (100, 64)])
def test_best_matches_equal_a_plain_computation(stores, monkeypatch, train_rows, eval_rows):
    monkeypatch.setattr(module, "TRAIN_ROWS", train_rows)
    monkeypatch.setattr(module, "EVAL_ROWS", eval_rows)
    train, held, train_ND, held_MD = stores
    found = Overlap.between(train, held, quiet=True)
    for row in range(700):
        if row in (6, 401):
            assert found.cosines[row] == -1
            continue
        lengths = np.linalg.norm(held_MD, axis=1) * np.linalg.norm(train_ND[row])
        cosines = held_MD @ train_ND[row] / lengths
        cosines[7] = -1
        assert found.matches[row] == cosines.argmax()
        assert found.cosines[row] == pytest.approx(cosines.max(), abs=1e-5)


def test_written_list_has_the_nearest_first(stores, tmp_path):
    train, held, *_ = stores
    found = Overlap.between(train, held, quiet=True)
    rows = found.closest(0.95)
    assert rows.tolist() == [400, 699, 5]
    found.write(tmp_path / "list.txt", rows)
    lines = [line.split("\t") for line in (tmp_path / "list.txt").read_text().splitlines()]
    assert [line[:2] for line in lines] == [["400", "test 0"], ["699", "test 299"], ["5", "test 200"]]
    assert [float(line[2]) for line in lines] == pytest.approx(found.cosines[rows], abs=1e-4)


def test_command_prints_pairs_and_writes_the_list(stores, tmp_path):
    train, held, *_ = stores
    command = ["overlap", str(train.path), str(held.path), "--device", "cpu", "--quiet"]
    done = CliRunner().invoke(app, [*command, "--threshold", "0.95", "--out", str(tmp_path / "x.txt")])
    lines = done.output.splitlines()
    assert lines[0].endswith("  400  test 0")
    assert f"{train.path}: 3 of 700 images are near-duplicates of images of {held.path}" in done.output
    assert lines[-1] == f"Next: sail-extract status {train.path}"  # it has no captions to fit on
    assert "… and" in CliRunner().invoke(app, [*command, "--threshold", "0.1"]).output


@pytest.mark.slow
def test_overlap_rejects_stores_that_cannot_be_compared(stores, tmp_path):
    train, *_ = stores
    few = np.ones((300, DIM))
    with pytest.raises(UserError, match="made with pooling 'mean', got 'cls'"):
        Overlap.between(train, make(tmp_path, few, name="other", pooling="cls"), quiet=True)
    with pytest.raises(UserError, match=r"unfinished\.zarr are incomplete"):
        Overlap.between(train, make(tmp_path, few, name="unfinished", commit=False), quiet=True)
    with pytest.raises(UserError, match="Pass two different stores"):
        Overlap.between(train, train, quiet=True)
    with pytest.raises(UserError, match="expected a cosine between 0 and 1"):
        CliRunner().invoke(app, ["overlap", "a", "b", "--threshold", "95"], catch_exceptions=False)
    odd = make(tmp_path, few, name="odd", key="{}\n")
    found = Overlap.between(odd, train, quiet=True)
    with pytest.raises(UserError, match="contains a tab or a line break"):
        found.write(tmp_path / "x.txt", found.closest(0.0))


@pytest.mark.slow
def test_stores_at_urls(stores):
    pytest.importorskip("upath")
    _, _, train_ND, held_MD = stores
    bucket = as_path("memory://overlap")
    names = [str(make(bucket, values, name=name).path) for name, values in (("a", train_ND), ("b", held_MD))]
    result = CliRunner().invoke(app, ["overlap", *names, "--threshold", "0.95", "--quiet"])
    assert result.exit_code == 0, result.output
    assert f"{names[0]}: 3 of 700 images are near-duplicates of images of {names[1]}" in result.output
