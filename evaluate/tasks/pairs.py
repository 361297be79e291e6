"""Sets of pairs, two images and two captions each: the common part of Winoground and MMVP."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sail_align.evaluate.results.metric import Annotation, Metric, Outcomes, Picture, compute_scores

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import Embeddings, EvaluationSet


def pair_scores(data: "EvaluationSet") -> "Embeddings":
    """Return the cosines of a set whose rows 2k and 2k + 1 are a pair, (K pairs, 2 captions, 2 images)."""
    images_NE, texts_NE = data.images(), data.texts().embeddings
    width = images_NE.shape[1]
    return texts_NE.reshape(-1, 2, width) @ images_NE.reshape(-1, 2, width).transpose(0, 2, 1)


def scores_by_label(
    data: "EvaluationSet", outcomes: Outcomes, metrics: Callable[[Outcomes], Sequence[Metric]]
) -> dict[str, dict[str, object]]:
    """Return the scores of the pairs of each label by its class name. Empty if the set has no labels."""
    labels_K = np.array([sample.label for sample in data.samples[::2]])
    found: dict[str, dict[str, object]] = {}
    for label, name in enumerate(data.source.classes):
        selected_K = labels_K == label
        if items := int(selected_K.sum()):
            part = {outcome: values_K[selected_K] for outcome, values_K in outcomes.items()}
            scores = compute_scores(metrics(part), items)
            found[name] = {"items": items, **{score.name: [score.value, *score.interval] for score in scores}}
    return found


def pair_pictures(
    data: "EvaluationSet", scores_CI: "Embeddings", pair: int, chosen_CI: NDArray[np.bool_]
) -> tuple[Picture, ...]:
    """Return both images of a pair, each with both captions and their scores, and marks on chosen captions."""
    samples = data.samples[2 * pair : 2 * pair + 2]
    captions = [sample.captions[data.captions[0]] for sample in samples]
    return tuple(
        Picture.of(
            data.source.image(sample.image),
            alt=captions[image],
            notes=tuple(
                Annotation.answer(
                    text, f"{scores_CI[row, image]:.3f}", chosen=bool(chosen_CI[row, image]), right=row == image
                )
                for row, text in enumerate(captions)
            ),
        )
        for image, sample in enumerate(samples)
    )
