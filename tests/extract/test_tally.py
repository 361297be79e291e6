"""The progress of a run counts items of the data set, however many arrays they go into."""

import pytest

from sail_align.extract.errors import format_bytes
from sail_align.extract.executor.tally import Event, Shard, Tally


def test_bar_counts_items_and_the_summary_rows():
    tally = Tally(3 * 100, "photos", arrays=3)
    bar = tally._bar
    assert (bar.total, bar.unit) == (100, "item")
    tally.receive(Event("encoded", 100))  # the images
    assert bar.n == 33
    tally.receive(Event("committed", 100, Shard("image/a", 0)))
    tally.receive(Event("found", 100, Shard("text/b/raw", 0)))
    assert (bar.n, bar.initial) == (66, 33)
    for amount in (50, 51, -1):  # one row was counted twice
        tally.receive(Event("encoded", amount))
    assert bar.n == 100
    tally.receive(Event("committed", 100, Shard("text/b/long", 0)))
    summary = tally.summary()
    assert (summary.encoded, summary.left, summary.arrays) == (200, 0, 3)
    assert str(summary).startswith("200 rows of 3 arrays encoded in ")
    tally.close()


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999.6, "1 kB"), (1_544_000, "1.54 MB"), (41e9, "41 GB"), (12_345e9, "12.35 TB")],
)
def test_sizes_have_a_unit_that_fits(size, text):
    assert format_bytes(size) == text
