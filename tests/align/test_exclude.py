"""Excluded rows are neither served nor held out, and a run resumes only with the same list."""

import numpy as np
import pytest
from typer.testing import CliRunner

from sail_align.align.cli import app
from sail_align.align.data.loader import Stream
from sail_align.align.data.pairs import Exclusions
from sail_align.align.train.plan import make_plan
from sail_align.extract.errors import UserError

QUICK = {"steps": 4, "dim": 8}


@pytest.mark.slow
def test_excluded_rows_are_neither_served_nor_held_out(make_store, tmp_path):
    first, second = make_store("a", rows=300, numbered=True), make_store("b", rows=200, numbered=True, first=300)
    (tmp_path / "one.txt").write_text("key 3\tother key\t0.99\nkey 310\tmore\t0.97\nkey 9999\n\n")
    (tmp_path / "two.txt").write_text("key 3\r\nkey 299\r\nkey 300")
    whole, _ = make_plan([first, second], QUICK)
    plan, notes = make_plan([first, second], QUICK, exclude=[tmp_path / "one.txt", tmp_path / "two.txt"])
    assert "Rows excluded by 5 keys: 4." in notes
    (tmp_path / "other.txt").write_text("a.jpg\nb.jpg\n")
    assert (
        "Nothing is excluded: none of 2 keys is in the stores."
        in make_plan([first, second], QUICK, exclude=[tmp_path / "other.txt"])[1]
    )
    assert whole.training_rows + whole.held_out_rows == 500
    assert plan.training_rows + plan.held_out_rows == 496
    used = [training | held for training, held in zip(plan.training, plan.held_out, strict=True)]
    assert np.flatnonzero(~np.concatenate(used)).tolist() == [3, 299, 300, 310]
    stream = Stream(plan.pairs, plan.training, batch_size=30, seed=0)
    served = np.concatenate([batch.images[:, 0].numpy() for batch in stream.scan()]).astype(int)
    assert len(served) == plan.training_rows
    assert not {3, 299, 300, 310} & set(served.tolist())


def test_read_ignores_a_byte_order_mark(tmp_path):
    (tmp_path / "list.txt").write_text("key 7\t0.9\r\nkey 8\r\n", encoding="utf-8-sig")
    assert Exclusions.read([tmp_path / "list.txt"]).keys.to_pylist() == ["key 7", "key 8"]


def test_settings_identify_the_excluded_keys(make_store, tmp_path):
    store = make_store("a")
    (tmp_path / "one.txt").write_text("key 3\tx\t0.99\nkey 4\n")
    (tmp_path / "same.txt").write_text("key 4\nkey 3\nkey 3\n")
    (tmp_path / "other.txt").write_text("key 4\nkey 5\n")
    names = ("one.txt", "same.txt", "other.txt")
    one, same, other = (make_plan([store], QUICK, exclude=[tmp_path / name])[0].record() for name in names)
    assert one == same
    assert one["excluded_keys"] == other["excluded_keys"] == 2
    assert one["excluded_sha256"] != other["excluded_sha256"]
    assert not {name for name in make_plan([store], QUICK)[0].record() if "excluded" in name}


@pytest.mark.slow
def test_run_resumes_only_with_the_same_list(make_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = make_store("photos")
    (tmp_path / "list.txt").write_text("key 3\n")
    command = ["fit", "--features", str(store), "--quiet", "--steps", "4", "--dim", "8", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr("sail_align.align.train.step.Stepper.step", interrupt)
        assert CliRunner().invoke(app, [*command, "--exclude", "list.txt"]).exit_code == 130
    changed = CliRunner().invoke(app, command).output
    assert "writing runs/photos-linear-2" in changed
    again = CliRunner().invoke(app, [*command, "--exclude", "list.txt"]).output
    assert "note: Rows excluded by 1 keys: 1." in again
    assert "resuming runs/photos-linear:" in again


def interrupt(*_):
    raise KeyboardInterrupt


def test_invalid_lists_are_reported(make_store, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xff")
    for name, reason in (("none.txt", "No such file or directory"), ("bytes.txt", "not UTF-8")):
        with pytest.raises(UserError) as error:
            Exclusions.read([tmp_path / name])
        end = "--exclude needs a text file with one key per line."
        assert str(error.value) == f"{tmp_path / name} cannot be read: {reason}. {end}"
    (tmp_path / "all.txt").write_text("\n".join(f"key {row}" for row in range(299)))
    with pytest.raises(UserError, match=r"has 1 pair to train on, .* captions raw, and is not excluded"):
        make_plan([make_store("a")], QUICK, exclude=[tmp_path / "all.txt"])
