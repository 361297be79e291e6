"""Zero-shot classification: the class whose prompts are closest to the image.

Radford et al. 2021 (CLIP), section 3.1: the unit embeddings of a class's prompts are averaged and normalised again, and
the class with the highest cosine is predicted. A tie counts as wrong, except among classes of one name (two of
ImageNet's published names occur twice). There the first class gets all images, as argmax does in published numbers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sail_align.align.stats.metrics import TIE
from sail_align.evaluate.results.metric import Annotation, Example, Metric, Outcomes, Picture, Result, pick_examples
from sail_align.evaluate.tasks.metrics import ranking, top_k_hits
from sail_align.evaluate.tasks.task import EvaluationTask

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import Embeddings, EvaluationSet

CONFUSIONS = 10
"""Number of most frequent confusions in the details."""


class Classification(EvaluationTask):
    """The class of each image, by prompts."""

    def evaluate(self, data: "EvaluationSet") -> Result:
        """Return top-1 and top-5 hits of each image, and the most frequent confusions."""
        labels_N = np.array([sample.label for sample in data.samples])
        classes = data.source.classes
        scores_NC = data.images() @ data.class_embeddings().T
        scores_NC[:, [classes.index(name) < label for label, name in enumerate(classes)]] -= 2 * TIE
        outcomes = {
            "top1": top_k_hits(scores_NC, labels_N, 1),
            "top5": top_k_hits(scores_NC, labels_N, 5),
            "label": labels_N,
            "classes": np.array([len(classes)]),
        }
        details = {
            "classes": len(classes),
            "distinct_class_names": len(set(classes)),
            "confusions": _confusions(classes, labels_N, scores_NC.argmax(axis=1)),
        }
        examples = [_example(data, scores_NC, row) for row in pick_examples(outcomes["top1"], each=4)]
        return Result(len(labels_N), outcomes, examples, details)

    def metrics(self, outcomes: Outcomes) -> tuple[Metric, ...]:
        """Return the metrics of hits `top1` and `top5` (N,), the `label` of each row, and the number of `classes`."""
        top1_N, top5_N, labels_N = (outcomes[name] for name in ("top1", "top5", "label"))
        (classes,) = outcomes["classes"].tolist()

        def mean_per_class(drawn_N: NDArray[np.float64]) -> float:
            rows_C = np.bincount(labels_N, drawn_N)
            right_C = np.bincount(labels_N, drawn_N * top1_N)
            return float((right_C[rows_C > 0] / rows_C[rows_C > 0]).mean())

        return (
            Metric.mean("top1", "top-1", 1 / classes, top1_N),
            Metric.mean("top5", "top-5", min(5 / classes, 1.0), top5_N),
            Metric("mean_per_class", "mean per class", 1 / classes, mean_per_class),
        )


def _confusions(
    classes: Sequence[str], labels_N: NDArray[np.intp], best_N: NDArray[np.intp]
) -> list[dict[str, str | int]]:
    """Return the most frequent pairs of a class and another class predicted for its images, with their counts."""
    images_C = np.bincount(labels_N, minlength=len(classes))
    wrong_2W = np.stack([labels_N, best_N])[:, labels_N != best_N]
    pairs_2P, counts_P = np.unique(wrong_2W, axis=1, return_counts=True)
    most = np.argsort(-counts_P, kind="stable")[:CONFUSIONS]
    return [
        {"truth": classes[label], "taken_for": classes[best], "count": int(count), "of": int(images_C[label])}
        for (label, best), count in zip(pairs_2P.T[most].tolist(), counts_P[most], strict=True)
    ]


def _example(data: "EvaluationSet", scores_NC: "Embeddings", row: int) -> Example:
    sample, classes = data.samples[row], data.source.classes
    best = ranking(scores_NC[row], sample.label)[:3].tolist()
    guesses = tuple(
        Annotation.answer(
            classes[label], f"{scores_NC[row, label]:.2f}", chosen=label == best[0], right=label == sample.label
        )
        for label in best
    )
    name = classes[sample.label]
    picture = Picture.of(data.source.image(sample.image), alt=name, notes=guesses)
    return Example(name, best[0] == sample.label, (picture,))


TASK = Classification(
    kind="classification",
    summary="Zero-shot classification. Top-1, top-5, mean per class.",
    title="Zero-shot classification",
    how_to_read="Below each picture: the three classes whose prompts are closest to it, with their cosine.",
    protocol="classification/prompt-ensemble@2",
    needs=frozenset({"labels"}),
    headlines=("top1",),
    gallery="narrow",
    variants={
        "openai-80": {"templates": "open_clip:imagenet-80"},
        "openai-7": {"templates": "open_clip:imagenet-7"},
        "class-name": {"templates": ["{}"]},
    },
)
