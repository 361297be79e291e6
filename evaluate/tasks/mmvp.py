"""MMVP-VLM: pairs of images that look alike to CLIP, each with a statement; does each statement find its image?

Tong et al. 2024, "Eyes Wide Shut?". Rows 2k and 2k + 1 of the set are one pair, a sample's label is its category. The
statements go into the manifest's prompt ("a photo of {}"); a pair counts only if both pick their own image, strictly.
"""

import numpy as np

from sail_align.evaluate.dataset import Embeddings, EvaluationSet
from sail_align.evaluate.metrics import pair_hits, weighted_mean
from sail_align.evaluate.results import (
    Example,
    Measure,
    Note,
    Outcomes,
    Picture,
    Result,
    mark,
    pick_examples,
    summarise,
)
from sail_align.evaluate.tasks.base import Protocol, captions_part
from sail_align.evaluate.tasks.pairs import by_label, pair_scores

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
    samples = data.samples[2 * pair : 2 * pair + 2]
    statements = [sample.captions[data.captions[0]] for sample in samples]
    chosen = np.argmax(scores_CI, axis=1).tolist()
    pictures = []
    for image, sample in enumerate(samples):
        notes = tuple(
            Note(text, f"{scores_CI[row, image]:.3f}", mark(chosen[row] == image, row == image))
            for row, text in enumerate(statements)
        )
        pictures.append(Picture(data.source.image(sample.image), alt=statements[image], notes=notes))
    right = bool(pair_hits(scores_CI[None])[1][0])
    title = data.source.classes[samples[0].label] if samples[0].label >= 0 else samples[0].key
    return Example(title, right, tuple(pictures))


PROTOCOL = Protocol(
    name="mmvp/both-statements@1", parts=lambda data: (captions_part(data),), evaluate=evaluate, measures=measures
)
