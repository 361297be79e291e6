"""MMVP-VLM: pairs of images that look alike to CLIP, each with a statement; does each statement find its image?

Tong et al. 2024, "Eyes Wide Shut?". Rows 2k and 2k + 1 of the set are one pair, a sample's label is its category. The
statements go into the manifest's prompt ("a photo of {}"); a pair counts only if both pick their own image, strictly.
"""

import numpy as np

from sail_align.align.stats.bootstrap import weighted_mean
from sail_align.evaluate.dataset import Embeddings, EvaluationSet
from sail_align.evaluate.results.metric import Example, Measure, Outcomes, Result, pick_examples, summarise
from sail_align.evaluate.tasks.base import Protocol, captions_part
from sail_align.evaluate.tasks.metrics import pair_hits
from sail_align.evaluate.tasks.pairs import by_label, pair_pictures, pair_scores

CHANCE = 1 / 4
"""Two choices between two images."""


def evaluate(data: EvaluationSet) -> Result:
    """Score the share of pairs, and that of each category."""
    scores_KCI = pair_scores(data)
    _, pairs_K, _ = pair_hits(scores_KCI)
    outcomes = {"pairs": pairs_K}
    examples = tuple(_example(data, scores_KCI[pair], pair) for pair in pick_examples(pairs_K, each=3))
    details = {"by_category": by_label(data, outcomes, measures)}
    return Result(len(pairs_K), summarise(measures(outcomes), len(pairs_K)), examples, outcomes, details)


def measures(outcomes: Outcomes) -> tuple[Measure, ...]:
    """Return what is measured, of `pairs` that are right (K,)."""
    return (Measure("pairs", "pairs", CHANCE, lambda drawn_K: weighted_mean(outcomes["pairs"], drawn_K)),)


def _example(data: EvaluationSet, scores_CI: Embeddings, pair: int) -> Example:
    chosen_CI = np.arange(2) == np.argmax(scores_CI, axis=1)[:, None]  # each statement chooses an image
    sample = data.samples[2 * pair]
    title = data.source.classes[sample.label] if sample.label >= 0 else sample.key
    right = bool(pair_hits(scores_CI[None])[1][0])
    return Example(title, right, pair_pictures(data, scores_CI, pair, chosen_CI))


PROTOCOL = Protocol(
    name="mmvp/both-statements@1", parts=lambda data: (captions_part(data),), evaluate=evaluate, measures=measures
)
