"""Intervals over groups of items, such as the frames of a video: the cluster bootstrap."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from sail_align.align.stats.bootstrap import bootstrap, interval, weighted_mean
from sail_align.evaluate.compare import Comparison, paired_difference
from sail_align.evaluate.evaluator import evaluate_sets
from sail_align.evaluate.report.formats import comma_separated, score_table, text
from sail_align.evaluate.report.overview import Overview
from sail_align.evaluate.report.page import write_report
from sail_align.evaluate.results.metric import GROUPS, Metric
from sail_align.evaluate.results.scores import RunScores
from sail_align.evaluate.tasks.task import all_tasks, find_task
from sail_align.extract.check import check
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import find_manifest

GROUPED = np.random.default_rng(1).integers(5, 25, 90)
HITS = np.random.default_rng(2).random(90) < np.random.default_rng(3).random(30)[GROUPED]


def cluster_draws(values_N, groups_N, resamples=1000):
    """Concatenate the values of drawn groups, as a loop."""
    generator, names = np.random.default_rng(0), sorted(set(groups_N.tolist()))
    for _ in range(resamples):
        drawn = [names[place] for place in generator.integers(len(names), size=len(names))]
        yield np.concatenate([values_N[groups_N == name] for name in drawn])


def test_cluster_bootstrap_equals_a_loop_over_groups():
    means = [values.mean() for values in cluster_draws(HITS.astype(float), GROUPED)]
    found = bootstrap([lambda drawn: weighted_mean(HITS, drawn)], 90, groups_N=GROUPED)
    np.testing.assert_allclose(found[:, 0], means, rtol=1e-12)
    low, high = interval(found[:, 0])
    plain_low, plain_high = interval(bootstrap([lambda drawn: weighted_mean(HITS, drawn)], 90)[:, 0])
    assert high - low > 1.2 * (plain_high - plain_low)


def test_paired_difference_draws_groups_for_both():
    first, second = HITS, np.roll(HITS, 7)
    metrics = [[Metric.mean("hits", "hits", 0.5, hits)] for hits in (first, second)]
    [(bounds, _)] = paired_difference(*metrics, 90, GROUPED)
    differences = [100 * each.mean() for each in cluster_draws(second.astype(float) - first, GROUPED)]
    assert bounds == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))


def outcomes_of(kind):
    """Outcomes of ten items of a task, at random."""
    draw = np.random.default_rng(4)
    hits = lambda: draw.random(10) < 0.5  # noqa: E731
    if kind == "classification":
        return {"top1": hits(), "top5": hits(), "label": draw.integers(0, 3, 10), "classes": np.array([3])}
    if kind == "retrieval":
        ranks = {"image_rank": draw.integers(0, 10, 10), "text_rank": draw.integers(0, 10, 20)}
        return {**ranks, "owner": np.repeat(np.arange(10), 2)}
    if kind == "segmentation":
        truth, predicted = draw.integers(1, 50, (2, 10, 3))
        return {"hits": np.minimum(truth, predicted) // 2, "truth": truth, "predicted": predicted}
    if kind == "representation":
        return {"k": np.array([4]), **{f"{what}_{which}": draw.random(10) for what, which in KINDS_OF_ROWS}}
    return {name: hits() for name in find_task(kind).counted}


KINDS_OF_ROWS = [(what, which) for what in ("knn", "cka") for which in ("raw", "aligned")]


@pytest.mark.parametrize("kind", all_tasks())
def test_items_repeated_within_their_group_change_no_interval(kind):
    """Frames that are copies of each other are worth one: the interval is that of a frame per video."""
    outcomes, copies = outcomes_of(kind), 3
    plain = all_tasks()[kind].compute_scores(outcomes, 10)
    repeated = {
        name: values if name in ("classes", "k") else np.repeat(values, copies, axis=0)
        for name, values in outcomes.items()
    }
    if kind == "retrieval":  # captions 2i and 2i + 1 of each copy of image i
        repeated["owner"] = np.arange(30).repeat(2)
        repeated["text_rank"] = np.repeat(outcomes["text_rank"].reshape(10, 2), copies, axis=0).reshape(-1)
    grouped = all_tasks()[kind].compute_scores({**repeated, GROUPS: np.repeat(np.arange(10), copies)}, 10 * copies)
    for one, other in zip(plain, grouped, strict=True):
        assert other["value"] == pytest.approx(one["value"])
        assert other["interval"] == pytest.approx(one["interval"])
    independent = all_tasks()[kind].compute_scores(repeated, 10 * copies)
    assert [each["interval"] for each in independent] != [each["interval"] for each in plain]


COLOURS = ["red", "green", "blue", "yellow", "pink", "cyan"]


def grouped_set(world, name, groups, kind="retrieval", wrong=(1, 4)):
    """Write a set of squares with a column of groups, some of them with a wrong caption; return its manifest."""
    rows = [(COLOURS[n % 6], COLOURS[(n + (n in wrong)) % 6]) for n in range(len(groups))]
    path = world.squares(name, rows, {"kind": kind}, group="clip")
    with (path.parent / "captions.csv").open("w", newline="") as file:
        lines = [[f"{n:03d}.png", caption, group] for n, ((_, caption), group) in enumerate(zip(rows, groups))]  # noqa: B905
        csv.writer(file).writerows([["image", "caption", "clip"], *lines])
    return path


def score(world, run, path):
    (record,) = evaluate_sets(run, [find_manifest(str(path))], features=world.folder / "features", quiet=True)
    assert "error" not in record, record
    return record


CLIPS = ["a", "a", "b", "b", "", "c"]


def test_records_and_tables_state_the_groups(world, run):
    path = grouped_set(world, "clips", CLIPS)
    record = score(world, run, path)
    assert (record["items"], record["resampled"], record["groups"]) == (6, "groups", 4)
    scores = RunScores.read(run.path)
    assert scores.outcomes(record)[GROUPS].tolist() == [0, 0, 1, 1, 2, 3]
    assert "note: clips: intervals resample 4 groups." in score_table(scores.scored)
    overview = Overview([scores])
    assert ", n = 6 in 4 groups, data " in text(overview)
    assert ",intervals resample 4 groups," in comma_separated(overview)


def test_sets_without_groups_have_the_record_of_earlier_versions(world, run):
    """Groups change no score and no features, but the digest of the data, since they decide the intervals."""
    path = grouped_set(world, "clips", CLIPS)
    grouped = score(world, run, path)
    path.write_text(path.read_text().replace("  group: clip\n", ""))
    plain = score(world, run, path)
    assert not {"resampled", "groups"} & plain.keys()
    assert GROUPS not in RunScores.read(run.path).outcomes(plain)
    assert plain["stores"] == grouped["stores"]
    assert plain["data"]["digest"] != grouped["data"]["digest"]
    values = [[metric["value"] for metric in record["metrics"]] for record in (plain, grouped)]
    intervals = [[metric["interval"] for metric in record["metrics"]] for record in (plain, grouped)]
    assert values[0] == values[1]
    assert intervals[0] != intervals[1]


def test_runs_are_compared_over_groups(world, run):
    path = grouped_set(world, "clips", CLIPS)
    model = type(run.model)()
    model.encode_image = lambda features: run.model.encode_image(features.flip(-1))
    other = replace(run, path=run.path.with_name("colours-other"), model=model, digest="e" * 64)
    other.path.mkdir()
    (other.path / "settings.json").write_bytes((run.path / "settings.json").read_bytes())
    records = [score(world, each, path) for each in (run, other)]
    both = [RunScores.read(each.path) for each in (run, other)]
    metrics = [
        find_task("retrieval").metrics(scores.outcomes(record)) for scores, record in zip(both, records, strict=True)
    ]
    expected = paired_difference(*metrics, 6, np.array([0, 0, 1, 1, 2, 3]))
    found = [(each.interval, each.p) for each in Comparison.between(*both).differences]
    assert found == expected
    assert found != paired_difference(*metrics, 6)


def test_pairs_are_resampled_by_group(world, run):
    record = score(world, run, grouped_set(world, "pairs", ["a", "a", "a", "a", "b", "b"], "winoground"))
    assert (record["items"], record["groups"]) == (3, 2)
    path = grouped_set(world, "kinds", ["a", "a", "b", "b", "b", "b"], "winoground")
    table = path.parent / "captions.csv"
    lines = table.read_text().splitlines()
    kinds = ["kind", "all", "all", "all", "all", "few", "few"]
    table.write_text("".join(f"{line},{kind}\n" for line, kind in zip(lines, kinds, strict=True)))
    path.write_text(path.read_text().replace("  group: clip\n", "  group: clip\n  label: kind\n"))
    details = score(world, run, path)["details"]["by_tag"]
    assert {kind: len(found["group"]) for kind, found in details.items()} == {"all": 3, "few": 1}
    assert " <small>–</small>" in write_report(run.path).read_text()
    data = world.open(grouped_set(world, "torn", ["a", "b", "c", "c"], "mmvp", wrong=()))
    with pytest.raises(UserError, match="torn is invalid: got the groups 'a', 'b' for the images of pair 1, expected"):
        find_task("mmvp").score(data)


def test_one_group_has_no_interval(world):
    path = grouped_set(world, "alone", ["a", "a"])
    with pytest.raises(UserError, match="alone is invalid: got the group 'a' for all its items, expected at least two"):
        find_task("retrieval").score(world.open(path))
    assert not list((world.folder / "features").rglob("*.zarr"))  # before anything is encoded
    assert (False, "one group; intervals need at least two") in check(find_manifest(str(path))[0], path.parent)
    path = grouped_set(world, "clips", CLIPS)
    assert (True, "4 groups") in check(find_manifest(str(path))[0], path.parent)


def test_groups_of_damaged_outcomes_are_refused(world, run):
    score(world, run, grouped_set(world, "clips", CLIPS))
    scores = RunScores.read(run.path)
    torn = replace(scores, content=json.loads(json.dumps(scores.content)))
    for each in torn.content["records"]:
        each["items"] = 5
    with pytest.raises(UserError, match="not both runs have scores of"):
        Comparison.between(torn, torn)
