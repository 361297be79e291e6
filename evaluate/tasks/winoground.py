"""Winoground-style pairs: two images and two captions of the same words, to be matched.

Thrush et al. 2022, "Winoground". Rows 2k and 2k + 1 of the set are one pair: image 0 with caption 0, image 1 with
caption 1. If a set has labels, they say what the captions swap (object, relation, both).
"""

from typing import TYPE_CHECKING

import numpy as np

from sail_align.evaluate.results.metric import Example, Metric, Outcomes, Result, pick_examples
from sail_align.evaluate.tasks.metrics import pair_hits
from sail_align.evaluate.tasks.pairs import pair_pictures, pair_scores, scores_by_label
from sail_align.evaluate.tasks.task import EvaluationTask

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import Embeddings, EvaluationSet

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
"""Four scores in random order: two comparisons are right, and both scores of one diagonal exceed the other two."""


def evaluate(data: "EvaluationSet") -> Result:
    """Return text, image and group hits of the pairs, and the scores by label."""
    scores_KCI = pair_scores(data)
    outcomes = dict(zip(CHANCE, pair_hits(scores_KCI), strict=True))
    examples = [_example(data, scores_KCI[pair], pair) for pair in pick_examples(outcomes["group"], each=3)]
    by_tag = scores_by_label(data, outcomes, metrics)
    return Result(len(scores_KCI), outcomes, examples, {"by_tag": by_tag} if by_tag else {})


def metrics(outcomes: Outcomes) -> tuple[Metric, ...]:
    """Return the metrics of `text`, `image` and `group` hits (K,)."""
    return tuple(Metric.mean(name, name, chance, outcomes[name]) for name, chance in CHANCE.items())


def _example(data: "EvaluationSet", scores_CI: "Embeddings", pair: int) -> Example:
    chosen_CI = np.arange(2)[:, None] == np.argmax(scores_CI, axis=0)  # each image chooses a caption
    text, image, group = (bool(hit[0]) for hit in pair_hits(scores_CI[None]))
    title = f"text {'right' if text else 'wrong'}, image {'right' if image else 'wrong'}"
    return Example(title, group, pair_pictures(data, scores_CI, pair, chosen_CI))


TASK = EvaluationTask(
    kind="winoground",
    summary="Pairs of images and captions. Text, image and group score.",
    title="Pairs of images and captions",
    how_to_read="Text is right if each image prefers its own caption, image if each caption prefers its own image. A "
    "model that ignores the order of words prefers one caption for both images, so its scores are below chance.",
    protocol="winoground/strict@1",
    needs=frozenset({"captions", "pairs"}),
    evaluate=evaluate,
    metrics=metrics,
    headlines=("text", "image", "group"),
    gallery="middle",
)
