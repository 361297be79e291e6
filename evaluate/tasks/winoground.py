"""Winoground-style pairs: two images and two captions of the same words; which belongs to which?

Thrush et al. 2022, "Winoground". Rows 2k and 2k + 1 of the set are one pair: image 0 with caption 0, image 1 with
caption 1. A sample's label is what the captions swap, where the set says so (object, relation, both).
"""

import numpy as np

from sail_align.align.stats.bootstrap import weighted_mean
from sail_align.evaluate.dataset import Embeddings, EvaluationSet
from sail_align.evaluate.results.metric import Example, Measure, Outcomes, Result, pick_examples, summarise
from sail_align.evaluate.tasks.base import Protocol, captions_part
from sail_align.evaluate.tasks.metrics import pair_hits
from sail_align.evaluate.tasks.pairs import by_label, pair_pictures, pair_scores

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
"""Of four scores in random order: two comparisons right, and both of one diagonal above both of the other."""


def evaluate(data: EvaluationSet) -> Result:
    """Score text, image and group accuracy over the pairs, and by tag."""
    scores_KCI = pair_scores(data)
    outcomes = dict(zip(CHANCE, pair_hits(scores_KCI), strict=True))
    examples = tuple(_example(data, scores_KCI[pair], pair) for pair in pick_examples(outcomes["group"], each=3))
    metrics = summarise(measures(outcomes), len(scores_KCI))
    by_tag = by_label(data, outcomes, measures)
    return Result(len(scores_KCI), metrics, examples, outcomes, {"by_tag": by_tag} if by_tag else {})


def measures(outcomes: Outcomes) -> tuple[Measure, ...]:
    """Return what is measured, of `text`, `image` and `group` hits (K,)."""

    def share(name: str, chance: float) -> Measure:
        return Measure(name, name, chance, lambda drawn_K: weighted_mean(outcomes[name], drawn_K))

    return tuple(share(name, chance) for name, chance in CHANCE.items())


def _example(data: EvaluationSet, scores_CI: Embeddings, pair: int) -> Example:
    chosen_CI = np.arange(2)[:, None] == np.argmax(scores_CI, axis=0)  # each image chooses a caption
    text, image, group = (bool(hit[0]) for hit in pair_hits(scores_CI[None]))
    title = f"text {'right' if text else 'wrong'}, image {'right' if image else 'wrong'}"
    return Example(title, group, pair_pictures(data, scores_CI, pair, chosen_CI))


PROTOCOL = Protocol(
    name="winoground/strict@1", parts=lambda data: (captions_part(data),), evaluate=evaluate, measures=measures
)
