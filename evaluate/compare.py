"""Two runs or more on the same items: the difference of each number, drawn on the same bootstrap samples for all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sail_align.align.stats.bootstrap import bootstrap, interval
from sail_align.evaluate.results.metric import Measure, Unit
from sail_align.evaluate.results.scores import Record, load_outcomes, read_scores
from sail_align.extract.errors import UserError

Set = tuple[str, str]
"""Data set and task."""


@dataclass(frozen=True)
class Difference:
    """One number of two runs, in per cent or a rank.

    `interval` is the 95 % paired bootstrap interval of second − first. `p` is twice the smaller share of the draws on
    either side of no difference (at most 1): small where the draws agree on which run is ahead.
    """

    dataset: str
    protocol: str
    label: str
    unit: Unit
    first: float
    second: float
    interval: tuple[float, float]
    p: float


@dataclass(frozen=True)
class Comparison:
    """A run beside the first one: the differences, and sentences on sets that cannot be compared."""

    run: Path
    differences: list[Difference]
    refusals: list[str]


def compare_runs(runs: Sequence[Path]) -> Iterator[Comparison]:
    """Yield the comparison of each further run with the first.

    Raises:
        UserError: A run has no scores or no outcomes, or two runs have no score in common.
    """
    first, *others = runs
    for other in others:
        yield _compare(first, other)


def paired_difference(
    first: Sequence[Measure], second: Sequence[Measure], items: int
) -> list[tuple[tuple[float, float], float]]:
    """Return interval and p of second − first, for each of two runs' measures of the same items."""
    count = len(first)
    values_RM = bootstrap([measure.of for measure in (*first, *second)], items)
    scale_M = np.array([measure.scale for measure in first])
    difference_RM = (values_RM[:, count:] - values_RM[:, :count]) * scale_M
    return [(interval(difference_R), _p(difference_R)) for difference_R in difference_RM.T]


def _p(difference_R: NDArray[np.float64]) -> float:
    smaller_side = min((difference_R <= 0).sum(), (difference_R >= 0).sum())
    with_value = np.count_nonzero(~np.isnan(difference_R))
    return min(1.0, 2 * float(smaller_side + 1) / (with_value + 1))


def _compare(first: Path, second: Path) -> Comparison:
    ours, theirs = _scored(first), _scored(second)
    common = ours.keys() & theirs.keys()
    if not common:
        raise UserError(
            f"{first} (scored on {_names(ours)}) and {second} (on {_names(theirs)}) have no set in common; score both "
            "on one with `sail-eval`."
        )
    differences: list[Difference] = []
    refusals: dict[Set, str] = {}
    for which in dict.fromkeys([*ours, *theirs]):
        pairs = [(mine, other) for mine in ours.get(which, []) for other in theirs.get(which, []) if _same(mine, other)]
        if not pairs:
            refusals[which] = _why_not(which, first, ours.get(which, []), second, theirs.get(which, []))
        for mine, other in pairs:
            differences += _differences(first, mine, second, other)
    if not differences:
        raise UserError(next(sentence for which, sentence in refusals.items() if which in common))
    return Comparison(second, differences, list(refusals.values()))


def _names(scored: dict[Set, list[Record]]) -> str:
    return ", ".join(f"{dataset} ({task})" for dataset, task in scored) or "nothing"


def _scored(run: Path) -> dict[Set, list[Record]]:
    """Return a run's scores by set and task: one for each protocol."""
    found: dict[Set, list[Record]] = {}
    for record in read_scores(run)["records"]:
        if "error" not in record:
            found.setdefault((record["dataset"], record["task"]), []).append(record)
    return found


def _same(first: Record, second: Record) -> bool:
    return bool(first["protocol"] == second["protocol"] and first["data"]["digest"] == second["data"]["digest"])


def _why_not(which: Set, first: Path, ours: list[Record], second: Path, theirs: list[Record]) -> str:
    dataset, task = which
    if not ours or not theirs:
        has, lacks = (first, second) if ours else (second, first)
        return f"{dataset} ({task}) was scored with {has} and not with {lacks}."
    mine, other = ours[-1], theirs[-1]
    if mine["protocol"] != other["protocol"]:
        return (
            f"{dataset} ({task}) was scored by two protocols, {mine['protocol']} for {first} and {other['protocol']} "
            f"for {second}; score both by one."
        )
    rows, digests = ([record["data"][what] for record in (mine, other)] for what in ("rows", "digest"))
    return (
        f"{dataset} ({task}) were other data for {first} ({rows[0]:,} rows, digest {digests[0][:12]}) than for "
        f"{second} ({rows[1]:,}, {digests[1][:12]}); score both on one."
    )


def _differences(first: Path, mine: Record, second: Path, other: Record) -> Iterator[Difference]:
    from sail_align.evaluate.tasks import PROTOCOLS  # with torch, for which a mistake need not wait

    measures = PROTOCOLS[mine["task"]].measures
    our, their = (measures(load_outcomes(run, record)) for run, record in ((first, mine), (second, other)))
    found = paired_difference(our, their, mine["items"])
    for a, b, (bounds, p) in zip(mine["metrics"], other["metrics"], found, strict=True):
        yield Difference(mine["dataset"], mine["protocol"], a["label"], a["unit"], a["value"], b["value"], bounds, p)
