"""Held-out pictures are in no training row, not even under another key."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sail_align.align.data import pairs as pairs_module
from sail_align.align.data.pairs import held_out_pictures, open_pairs
from sail_align.align.runs.folder import differences
from sail_align.align.train.plan import make_plan
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store

OPTIONS = {"steps": 2, "dim": 4}
stores = []


def copy_pictures(path, copies, source=None):
    """Give rows of a store the image features of others: row `to` those of row `copies[to]` of the source."""
    array, theirs = Store.open(path).image(), Store.open(source or path).image().read()[0]
    features, status = array.read()
    for to, row in copies.items():
        features[to] = theirs[row]
    for shard in array.shards:
        span = slice(*array.span(shard))
        array.write(shard, features[span], status[span])


@pytest.mark.slow
def test_copies_of_held_out_pictures_are_not_trained_on(make_store):
    first, second = make_store("a", rows=300), make_store("b", rows=200, first=1_000)
    whole, notes = make_plan([first, second], OPTIONS)
    assert not any("held-out pair" in note for note in notes)
    held = [np.flatnonzero(rows) for rows in whole.held_out]
    free = [np.flatnonzero(rows) for rows in whole.training]
    copy_pictures(first, {free[0][0]: held[0][0], free[0][1]: held[0][0], free[0][2]: free[0][3]})
    copy_pictures(second, {free[1][5]: held[0][1]}, source=first)
    plan, notes = make_plan([first, second], OPTIONS)
    assert "Rows left out of training because their picture is also in a held-out pair: 3." in notes
    dropped = [np.flatnonzero(one & ~other) for one, other in zip(whole.training, plan.training, strict=True)]
    assert [rows.tolist() for rows in dropped] == [free[0][:2].tolist(), [free[1][5]]]
    for before, after in zip(whole.held_out, plan.held_out, strict=True):
        assert np.array_equal(before, after)
    assert plan.training_rows == whole.training_rows - 3


def test_plans_of_one_command_look_for_copies_once(make_store, monkeypatch):
    path, scans = make_store(captions={"raw": (), "long": (), "short": (7,)}), []
    find = pairs_module._find_pictures
    monkeypatch.setattr(pairs_module, "_find_pictures", lambda *given: scans.append(1) or find(*given))
    known = {}
    for captions, expected in (("raw", 1), ("long", 1), ("short", 2), ("raw", 2)):
        plan, _ = make_plan([path], OPTIONS, captions=[captions], known_copies=known)
        alone, _ = make_plan([path], OPTIONS, captions=[captions])
        assert np.array_equal(plan.training, alone.training)
        scans.pop()
        assert len(scans) == expected


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_found_rows_are_those_with_equal_features(make_store, data):
    """Features take few values, so that many rows agree in some of them, and rows of 12 features in the first ones."""
    rows = 20
    if not stores:
        stores.append(make_store(rows=rows, shard_rows=8, chunk_rows=4))
    array = Store.open(stores[0]).image()
    features, status = array.read()
    values = st.lists(st.integers(0, 1), min_size=rows, max_size=rows)
    features[:] = 0
    for column in data.draw(st.sets(st.integers(0, 11), max_size=3)):
        features[:, column] = data.draw(values)
    for shard in array.shards:
        span = slice(*array.span(shard))
        array.write(shard, features[span], status[span])
    held = np.array(data.draw(values), bool)
    chosen = ~held & np.array(data.draw(values), bool)
    (found,) = held_out_pictures(open_pairs(stores), [chosen], [held])
    copies = [any((features[row] == each).all() for each in features[held]) for row in range(rows)]
    expected = (chosen & copies).tolist()
    assert found.tolist() == expected


def test_one_picture_for_all_keys_is_refused(make_store):
    path = make_store(rows=40)
    copy_pictures(path, dict.fromkeys(range(40), 0))
    with pytest.raises(UserError, match=r"has 0 pairs to train on.*its picture is in no held-out pair"):
        make_plan([path], OPTIONS)
    plan, _ = make_plan([path], {**OPTIONS, "held_out": 0.0})
    assert plan.training_rows == 40


def test_fewer_rows_are_a_difference_between_runs(make_store):
    plan, _ = make_plan([make_store()], OPTIONS)
    record = plan.record()
    assert differences({**record, "training_rows": 3}, record) == ("rows used",)
