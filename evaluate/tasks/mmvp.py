"""MMVP-VLM: pairs of images that look alike to CLIP, each with a statement that must be matched to its image.

Tong et al. 2024, "Eyes Wide Shut?". Rows 2k and 2k + 1 of the set are one pair, and a label is the pair's category. The
statements are put into the manifest's prompt ("a photo of {}"). A pair is right only if both statements have a strictly
higher score with their own image.
"""

from typing import TYPE_CHECKING

import numpy as np

from sail_align.evaluate.results.metric import Example, Metric, Outcomes, Result, pick_examples
from sail_align.evaluate.tasks.metrics import pair_hits
from sail_align.evaluate.tasks.pairs import pair_pictures, pair_scores, scores_by_label
from sail_align.evaluate.tasks.task import EvaluationTask

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import Embeddings, EvaluationSet

CHANCE = 1 / 4
"""Two choices between two images."""


def evaluate(data: "EvaluationSet") -> Result:
    """Return the hits of the pairs, and the scores by category."""
    scores_KCI = pair_scores(data)
    _, pairs_K, _ = pair_hits(scores_KCI)
    outcomes = {"pairs": pairs_K}
    examples = [_example(data, scores_KCI[pair], pair) for pair in pick_examples(pairs_K, each=3)]
    return Result(len(pairs_K), outcomes, examples, {"by_category": scores_by_label(data, outcomes, metrics)})


def metrics(outcomes: Outcomes) -> tuple[Metric, ...]:
    """Return the metric of the hits `pairs` (K,)."""
    return (Metric.mean("pairs", "pairs", CHANCE, outcomes["pairs"]),)


def _example(data: "EvaluationSet", scores_CI: "Embeddings", pair: int) -> Example:
    chosen_CI = np.arange(2) == np.argmax(scores_CI, axis=1)[:, None]  # each statement chooses an image
    sample = data.samples[2 * pair]
    title = data.source.classes[sample.label] if sample.label >= 0 else sample.key
    right = bool(pair_hits(scores_CI[None])[1][0])
    return Example(title, right, pair_pictures(data, scores_CI, pair, chosen_CI))


TASK = EvaluationTask(
    kind="mmvp",
    summary="Pairs of images that look alike to CLIP. Share of pairs told apart.",
    title="Pairs of images that look alike to CLIP",
    how_to_read="A pair is right if each of its two statements has the higher cosine with its own image.",
    protocol="mmvp/both-statements@1",
    needs=frozenset({"captions", "pairs"}),
    evaluate=evaluate,
    metrics=metrics,
    headlines=("pairs",),
    gallery="middle",
)
