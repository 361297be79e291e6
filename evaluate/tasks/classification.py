"""Zero-shot classification: the class whose prompts are closest to the image.

Radford et al. 2021 (CLIP), section 3.1: per class, the prompts' unit embeddings are averaged and normalised again;
prediction by cosine. A tie counts as wrong, except among classes of one name (two of ImageNet's published names occur
twice): as with the argmax behind published numbers, the first of them has all their images.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sail_align.align.stats.bootstrap import weighted_mean
from sail_align.align.stats.metrics import TIE
from sail_align.evaluate.dataset import Embeddings, EvaluationSet
from sail_align.evaluate.results.metric import (
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
from sail_align.evaluate.tasks.base import Protocol, classes_part, templates_part
from sail_align.evaluate.tasks.metrics import mean_per_class, ranking, top_k_hits
from sail_align.extract.errors import UserError

CONFUSIONS = 10
"""A record names so many pairs of classes that were mistaken most often."""


def evaluate(data: EvaluationSet) -> Result:
    """Score top-1, top-5 and mean-per-class accuracy."""
    labels_N = np.array([sample.label for sample in data.samples])
    if (labels_N < 0).any():
        raise UserError(f"{data.manifest.name} has rows without a label; give its source classes, as in class-folder.")
    classes = data.source.classes
    scores_NC = data.images() @ data.class_embeddings().T
    scores_NC[:, [classes.index(name) < label for label, name in enumerate(classes)]] -= 2 * TIE
    outcomes = {
        "top1": top_k_hits(scores_NC, labels_N, 1),
        "top5": top_k_hits(scores_NC, labels_N, 5),
        "label": labels_N,
        "classes": np.array([len(classes)]),
    }
    examples = tuple(_example(data, scores_NC, row) for row in pick_examples(outcomes["top1"], each=4))
    details = {
        "classes": len(classes),
        "distinct_class_names": len(set(classes)),
        "confusions": _confusions(classes, labels_N, scores_NC.argmax(axis=1)),
    }
    return Result(len(labels_N), summarise(measures(outcomes), len(labels_N)), examples, outcomes, details)


def measures(outcomes: Outcomes) -> tuple[Measure, ...]:
    """Return what is measured, of hits `top1` and `top5` (N,), each row's `label`, and the number of `classes`."""
    top1_N, top5_N, labels_N = (outcomes[name] for name in ("top1", "top5", "label"))
    (classes,) = outcomes["classes"].tolist()
    return (
        Measure("top1", "top-1", 1 / classes, lambda drawn_N: weighted_mean(top1_N, drawn_N)),
        Measure("top5", "top-5", min(5 / classes, 1.0), lambda drawn_N: weighted_mean(top5_N, drawn_N)),
        Measure(
            "mean_per_class", "mean per class", 1 / classes, lambda drawn_N: mean_per_class(top1_N, labels_N, drawn_N)
        ),
    )


def _confusions(
    classes: Sequence[str], labels_N: NDArray[np.intp], best_N: NDArray[np.intp]
) -> list[dict[str, str | int]]:
    """Return the pairs of a class and another that most of its images were taken for, how many, and of how many."""
    images_C = np.bincount(labels_N, minlength=len(classes))
    wrong_2W = np.stack([labels_N, best_N])[:, labels_N != best_N]
    pairs_2P, counts_P = np.unique(wrong_2W, axis=1, return_counts=True)
    most = np.argsort(-counts_P, kind="stable")[:CONFUSIONS]
    return [
        {
            "truth": classes[label],
            "taken_for": classes[best],
            "count": int(count),
            "of": int(images_C[label]),
        }
        for (label, best), count in zip(pairs_2P.T[most].tolist(), counts_P[most], strict=True)
    ]


def _example(data: EvaluationSet, scores_NC: Embeddings, row: int) -> Example:
    sample, classes = data.samples[row], data.source.classes
    best = ranking(scores_NC[row], sample.label)[:3].tolist()
    guesses = tuple(
        Note(classes[label], f"{scores_NC[row, label]:.2f}", mark(label == best[0], label == sample.label))
        for label in best
    )
    name = classes[sample.label]
    picture = Picture(data.source.image(sample.image), alt=name, notes=guesses)
    return Example(name, best[0] == sample.label, (picture,))


PROTOCOL = Protocol(
    name="classification/prompt-ensemble@2",
    parts=lambda data: (classes_part(data), templates_part(data)),
    evaluate=evaluate,
    measures=measures,
    variants={
        "openai-80": {"templates": "open_clip:imagenet-80"},
        "openai-7": {"templates": "open_clip:imagenet-7"},
        "class-name": {"templates": ["{}"]},
    },
)
