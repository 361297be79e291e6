"""Comparison of runs on the same items: the difference of each score, over bootstrap draws that both runs share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sail_align.align.stats.bootstrap import bootstrap, interval
from sail_align.align.stats.tables import format_interval, format_table, number, one_line
from sail_align.evaluate.results.metric import Metric, Unit, groups_of
from sail_align.evaluate.results.scores import Record, RunScores
from sail_align.evaluate.tasks.task import all_tasks, find_task, without_unknown
from sail_align.extract.errors import UserError


@dataclass(frozen=True)
class Difference:
    """One score of two runs, in per cent or a rank.

    Attributes:
        dataset: Name of the set.
        protocol: Id of the protocol.
        label: Label of the metric.
        unit: Unit of the values.
        first: Score of the first run.
        second: Score of the second run.
        interval: 95 % paired bootstrap interval of second − first.
        p: Twice the smaller share of the draws on either side of no difference, at most 1. It is small if the draws
            agree on which run is better.
        variants: Variants of the protocol, such as `hub-corrected`.
    """

    dataset: str
    protocol: str
    label: str
    unit: Unit
    first: float
    second: float
    interval: tuple[float, float]
    p: float
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The differences between two runs, and messages on sets that cannot be compared."""

    differences: list[Difference]
    refusals: list[str]

    @classmethod
    def between(cls, first: RunScores, second: RunScores) -> "Comparison":
        """Compare two runs on all sets and protocols that both have.

        Raises:
            UserError: Outcomes are missing, or nothing can be compared.
        """
        first, second = without_unknown(first), without_unknown(second)
        names = [dict.fromkeys(record.name for record in run.scored) for run in (first, second)]
        # Earlier versions named no variants, so that the same protocol and data can have two names.
        pairs = [
            (one, other)
            for one in first.scored
            for other in second.scored
            if (one["dataset"], one.key) == (other["dataset"], other.key)
        ]
        if not pairs and not names[0].keys() & names[1].keys():
            ours, theirs = (", ".join(each) or "nothing" for each in names)
            raise UserError(
                f"{first.path} (scored on {ours}) and {second.path} (on {theirs}) have no set in common. Score both on "
                "one with `sail-eval`."
            )
        differences: list[Difference] = []
        refusals: dict[str, str] = {}
        for one, other in pairs:
            found, unmatched = _compare_records(first, one, second, other)
            differences += found
            if unmatched:
                message = f"{one.name}: not both runs have scores of {', '.join(unmatched)}. Score both again."
                refusals[one.name] = message
        compared = {record.name for pair in pairs for record in pair}
        for name in (name for name in names[0] | names[1] if name not in compared):
            mine, others = ([record for record in run.scored if record.name == name] for run in (first, second))
            refusals[name] = _explain_refusal(first, mine, second, others)
        if not differences:
            everywhere = (message for name, message in refusals.items() if all(name in each for each in names))
            raise UserError(next(everywhere, next(iter(refusals.values()))))
        unknown = [record for run in (first, second) for record in run.records if record["task"] not in all_tasks()]
        left_out = [f"{record.name} is not compared: {record.error}" for record in unknown]
        return cls(differences, list(dict.fromkeys([*refusals.values(), *left_out])))

    def table(self) -> str:
        """Return a table with one line per metric, and messages on sets that cannot be compared below it."""
        rows = []
        protocol = ""
        for each in self.differences:
            difference = each.second - each.first
            values = (number(each.first), number(each.second), number(difference, sign="+"))
            bounds = format_interval(each.interval, difference, sign="+")
            label = each.label + (" (less is better)" if each.unit == "rank" else "")
            name = ", ".join([each.dataset, *each.variants]) if each.protocol != protocol else ""
            rows.append((name, label, *values, bounds, f"{each.p:.3f}"))
            protocol = each.protocol
        header = ("data set", "metric", "first", "second", "difference", "95% interval", "p")
        return "\n".join([format_table(header, rows, "ll", style="simple"), *map(one_line, self.refusals)])


def _compare_records(
    first: RunScores, one: Record, second: RunScores, other: Record
) -> tuple[list[Difference], list[str]]:
    """Return the differences of the metrics that both records and their outcomes have, and the names of the others."""
    task = find_task(one["task"])
    groups_N = None
    try:
        outcomes = [run.outcomes(record) for run, record in ((first, one), (second, other))]
        computed = [{metric.name: metric for metric in task.metrics(each)} for each in outcomes]
        groups_N = groups_of(outcomes[0], one["items"])  # the data digest of both records covers the groups
    except (KeyError, ValueError, IndexError):  # the outcomes are those of another version of the task
        computed = [{}, {}]
    recorded = [{metric["name"]: metric for metric in record["metrics"]} for record in (one, other)]
    everywhere = [name for name in recorded[0] if all(name in each for each in (recorded[1], *computed))]
    mine, theirs = ([each[name] for name in everywhere] for each in computed)
    found = paired_difference(mine, theirs, one["items"], groups_N)
    differences = []
    for name, (bounds, p) in zip(everywhere, found, strict=True):
        a, b = (each[name] for each in recorded)
        about = (one["dataset"], one["protocol"], a["label"], a["unit"])
        differences.append(Difference(*about, a["value"], b["value"], bounds, p, tuple(one.get("variants", ()))))
    return differences, [name for name in {**recorded[0], **recorded[1]} if name not in everywhere]


def paired_difference(
    first: Sequence[Metric], second: Sequence[Metric], items: int, groups_N: NDArray[np.integer] | None = None
) -> list[tuple[tuple[float, float], float]]:
    """Return the interval and p of second − first, for each of two runs' metrics of the same items, or groups."""
    values_RM = bootstrap([metric.compute for metric in (*first, *second)], items, groups_N=groups_N)
    found = []
    for metric, first_R, second_R in zip(first, values_RM.T[: len(first)], values_RM.T[len(first) :], strict=True):
        difference_R = (second_R - first_R) * metric.scale
        smaller_side = min((difference_R <= 0).sum(), (difference_R >= 0).sum())
        with_value = np.count_nonzero(~np.isnan(difference_R))
        p = min(1.0, 2 * float(smaller_side + 1) / (with_value + 1))
        found.append((interval(difference_R), p))
    return found


def _explain_refusal(first: RunScores, ours: list[Record], second: RunScores, theirs: list[Record]) -> str:
    name = (ours or theirs)[-1].name
    if not ours or not theirs:
        has, lacks = (first, second) if ours else (second, first)
        return f"{name} was scored with {has.path} and not with {lacks.path}."
    mine, other = ours[-1], theirs[-1]
    if mine["protocol"] != other["protocol"]:
        return (
            f"{name} was scored by two protocols, {mine['protocol']} for {first.path} and {other['protocol']} for "
            f"{second.path}. Score both by one."
        )
    rows, digests = ([record["data"][what] for record in (mine, other)] for what in ("rows", "digest"))
    return (
        f"{name} had other data for {first.path} ({rows[0]:,} rows, digest {digests[0][:12]}) than for {second.path} "
        f"({rows[1]:,}, {digests[1][:12]}). Score both on one."
    )
