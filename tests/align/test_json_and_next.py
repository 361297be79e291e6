"""Every command that prints results: with --json, stdout is one JSON document with the numbers of the text, which goes
to stderr; and the command after `Next:` succeeds.
"""

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import PREPROCESSING, identity

from sail_align.align.cli import main as align
from sail_align.evaluate.cli import main as evaluate
from sail_align.extract.cli import main as extract
from sail_align.extract.cli.options import next_command
from sail_align.extract.data import Status
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.store.store import Store
from sail_align.extract.system.command_line import jsonable

PROGRAMS = {"sail-extract": extract, "sail-align": align, "sail-eval": evaluate}
QUICK = "--steps 3 --dim 8 --batch-size 64 --device cpu --quiet"


@pytest.fixture
def run_line(tmp_path, monkeypatch, capfd):
    """A function that types a command line in an empty folder and returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            PROGRAMS[line.split()[0]]()
        printed = capfd.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


def read(text: str) -> dict:
    """Return a JSON document without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def next_of(text: str) -> str:
    (following,) = re.findall(r"^Next: (.*)$", text, re.MULTILINE)
    return following


def second(like: Identity) -> Identity:
    """Return another encoder of the same dimension."""
    return replace(like, spec=replace(like.spec, id=f"second-{like.spec.modality}"))


def quickly(command: str) -> str:
    return f"{command} {QUICK}" if command.startswith("sail-align fit") else command


@pytest.mark.slow
def test_each_command_prints_one_document_and_the_next_command_works(make_store, run_line):
    image = identity("image", dim=12, preprocessing=PREPROCESSING)
    make_store("photos", image=image)
    make_store("others", rows=200, first=200, image=image)
    commands = {
        "sail-extract status features/photos.zarr": "300 ok",
        "sail-extract status features/photos.zarr --failed": "0 of 300 rows failed",
        "sail-extract verify features/photos.zarr": "no problems found",
        "sail-extract upgrade features/photos.zarr": "already has format",
        "sail-extract doctor features/photos.zarr": "good: the captions belong",
        "sail-extract overlap features/photos.zarr features/others.zarr --out near.txt --quiet": "best matches: half",
        "sail-extract check": "cc12m",
        "sail-extract check demo": "data root:",
        "sail-align measure features/photos.zarr": "mutual k-NN (chance)",
        f"sail-align fit --features features/photos.zarr {QUICK}": "held out (60 pairs): loss",
        f"sail-align probe --features features/photos.zarr {QUICK}": "T2I R@1",
        f"sail-align ladder --features features/photos.zarr --seeds 1 {QUICK}": "paper, CC3M",
        "sail-align runs": "finished",
        "sail-align embed features/photos.zarr --run runs/photos-linear --out embedded": "wrote embedded: 300 rows",
        "sail-align export runs/photos-linear": "wrote exports/photos-linear-hub-folder",
        "sail-extract export features/photos.zarr --out exported": "wrote exported: 300 rows",
    }
    documents, following = {}, set()
    for line, shown in commands.items():
        code, out, err = run_line(f"{line} --json")
        assert code == 0, err
        assert shown in err
        documents[line.split()[1]] = read(out)
        assert read(out)["command"] == " ".join(line.split()[:2])
        if "Next: " in err:
            following.add(next_of(err))
            assert read(out)["next"] == next_of(err)
    assert len(following) == 3  # of measure, overlap and fit
    for command in following:
        code, _, err = run_line(quickly(command))
        assert code == 0 or "exists" in err, err

    fit, (run,) = documents["fit"], documents["runs"]["runs"]
    assert run["held_out"] == fit["metrics"]
    text = run_line(f"sail-align fit --features features/photos.zarr {QUICK}")[1]
    assert f"text→image {fit['metrics']['t2i_r1']:.1f} / " in text
    assert f"loss {fit['metrics']['loss']:.4g}," in text
    assert documents["doctor"]["pairs"][0]["rows"] > 100
    (measured,) = documents["measure"]["measures"]
    assert f"{measured['mutual_knn']:.3f} (" in run_line("sail-align measure features/photos.zarr")[1]
    assert documents["probe"]["ranking"][0]["pairs"] == 60
    assert documents["overlap"]["near_duplicates"] == len(Path("near.txt").read_text().splitlines())


@pytest.mark.slow
def test_next_of_stores_that_need_options_or_cannot_be_fitted(make_store, run_line, tmp_path):
    path = make_store("two", captions={"raw": (), "long": range(20, 300)})
    store = Store.open(path)
    for modality, names in (("image", [""]), ("text", ["raw", "long"])):
        for name in names:
            like = (store.images() if modality == "image" else store.texts(name)).popitem()[1]
            array = store.add(second(identity(modality, dim=like.dim)), name)
            for shard in array.shards:
                span = slice(*array.span(shard))
                features, status = like.read()
                array.write(shard, features[span], status[span])
    make_store("images", captions={})
    make_store("none", rows=40, captions={"raw": range(40)})
    expected = {
        "two": "sail-align fit --features {} --image-encoder fake-image --text-encoder fake-text --positives 1",
        "images": "sail-extract status {}",
        "none": "sail-extract status {}",
    }
    for name, command in expected.items():
        path = f"features/{name}.zarr"
        found = next_command(Store.open(path))
        assert found == command.format(path)
        code, _, err = run_line(quickly(found))
        assert code == 0, err


@pytest.mark.slow
def test_bad_result_is_a_document_and_exit_code_1(make_store, run_line):
    path = make_store("photos")
    array = Store.open(path).text("raw")
    features, status = array.read()
    for shard in array.shards:
        span = slice(*array.span(shard))
        array.write(shard, np.random.default_rng(7).permutation(features)[span], status[span])
    code, out, err = run_line("sail-extract doctor features/photos.zarr --json")
    assert (code, read(out)["verdict"]) == (1, "broken")
    assert read(out)["summary"] in err
    code, out, _ = run_line("sail-extract check cc12m --json")
    assert (code, read(out)["ready"], read(out)["missing"]) == (1, False, True)


def test_mistakes_leave_stdout_empty(run_line):
    code, out, err = run_line("sail-align fit --features no.zarr --json")
    assert (code, out, err) == (2, "", "error: no.zarr is not a feature store. Make one with `sail-extract run`.\n")


def test_values_that_json_lacks():
    values = {
        "nan": np.float32("nan"),
        "inf": [float("inf")],
        "array": np.arange(2),
        "state": Status.OK,
        3: (None, True),
    }
    assert jsonable(values) == {"nan": None, "inf": [None], "array": [0, 1], "state": 0, "3": [None, True]}
