"""Zero-shot classification: the class whose prompts are closest to the image.

Radford et al. 2021 (CLIP), section 3.1: per class, the prompts' unit embeddings are averaged and normalised again;
prediction by cosine. A tie counts as wrong, where an argmax would credit the class that comes first.
"""

import numpy as np
from numpy.typing import NDArray

from sail_align.evaluate.dataset import Embeddings, EvaluationSet
from sail_align.evaluate.metrics import bootstrap_interval, mean_interval, mean_per_class, top_k_hits
from sail_align.evaluate.results import Example, Metric, Note, Picture, Result, mark, pick_examples
from sail_align.extract.errors import UserError

PROTOCOL = "classification/prompt-ensemble@1"


def evaluate(data: EvaluationSet) -> Result:
    """Score top-1, top-5 and mean-per-class accuracy."""
    labels_N = np.array([sample.label for sample in data.samples])
    if (labels_N < 0).any():
        raise UserError(f"{data.manifest.name} has rows without a label; give its source classes, as in class-folder.")
    scores_NC = data.images() @ data.class_embeddings().T
    metrics, hits_N = score(scores_NC, labels_N)
    examples = tuple(_example(data, scores_NC, row) for row in pick_examples(hits_N, each=4))
    return Result(len(labels_N), metrics, examples)


def score(scores_NC: Embeddings, labels_N: NDArray[np.integer]) -> tuple[tuple[Metric, ...], NDArray[np.bool_]]:
    """Return the metrics, and which rows the best class got right."""
    classes = scores_NC.shape[1]
    top1_N, top5_N = top_k_hits(scores_NC, labels_N, 1), top_k_hits(scores_NC, labels_N, 5)
    per_class = bootstrap_interval(lambda drawn_N: mean_per_class(top1_N, labels_N, drawn_N), len(labels_N))
    metrics = (
        Metric.of_fractions("top1", "top-1", float(top1_N.mean()), 1 / classes, mean_interval(top1_N)),
        Metric.of_fractions("top5", "top-5", float(top5_N.mean()), min(5 / classes, 1.0), mean_interval(top5_N)),
        Metric.of_fractions(
            "mean_per_class", "mean per class", mean_per_class(top1_N, labels_N), 1 / classes, per_class
        ),
    )
    return metrics, top1_N


def _example(data: EvaluationSet, scores_NC: Embeddings, row: int) -> Example:
    sample, classes = data.samples[row], data.source.classes
    best = np.argsort(-scores_NC[row], kind="stable")[:3].tolist()
    guesses = tuple(
        Note(classes[label], f"{scores_NC[row, label]:.2f}", mark(label == best[0], label == sample.label))
        for label in best
    )
    name = classes[sample.label]
    picture = Picture(data.source.image(sample.image), alt=name, notes=guesses)
    return Example(name, best[0] == sample.label, (picture,))
