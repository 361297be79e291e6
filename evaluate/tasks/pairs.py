"""Two images and two captions: what Winoground and MMVP have in common."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sail_align.evaluate.dataset import Embeddings, EvaluationSet
from sail_align.evaluate.results.metric import Measure, Note, Outcomes, Picture, mark, summarise
from sail_align.extract.errors import UserError


def pair_scores(data: EvaluationSet) -> Embeddings:
    """Return cosines (K pairs, 2 captions, 2 images) of a set whose rows 2k and 2k + 1 are a pair.

    Raises:
        UserError: The set has not one caption a row, or an odd number of rows.
    """
    if len(data.captions) != 1:
        raise UserError(f"{data.manifest.name} has {len(data.captions)} captions a row; name one in task.captions.")
    images_NE = data.images()
    texts_NE = data.texts().embeddings
    if len(texts_NE) != len(images_NE) or len(texts_NE) % 2:
        raise UserError(
            f"{data.manifest.name} has {len(images_NE)} images, {len(texts_NE)} captions; pairs need two each."
        )
    width = images_NE.shape[1]
    return texts_NE.reshape(-1, 2, width) @ images_NE.reshape(-1, 2, width).transpose(0, 2, 1)


def by_label(
    data: EvaluationSet, outcomes: Outcomes, measures: Callable[[Outcomes], tuple[Measure, ...]]
) -> dict[str, dict[str, object]]:
    """Return the metrics of the pairs of each kind, by its name; nothing where the set tells no kinds apart."""
    labels_K = np.array([sample.label for sample in data.samples[::2]])
    found: dict[str, dict[str, object]] = {}
    for label, name in enumerate(data.source.classes):
        of_kind_K = labels_K == label
        if items := int(of_kind_K.sum()):
            part = {outcome: values_K[of_kind_K] for outcome, values_K in outcomes.items()}
            metrics = summarise(measures(part), items)
            found[name] = {"items": items, **{each.name: [each.value, *each.interval] for each in metrics}}
    return found


def pair_pictures(
    data: EvaluationSet, scores_CI: Embeddings, pair: int, chosen_CI: NDArray[np.bool_]
) -> tuple[Picture, ...]:
    """Return both images of a pair, each with both captions, their scores, and marks of those that were chosen."""
    samples = data.samples[2 * pair : 2 * pair + 2]
    captions = [sample.captions[data.captions[0]] for sample in samples]
    return tuple(
        Picture(
            data.source.image(sample.image),
            alt=captions[image],
            notes=tuple(
                Note(text, f"{scores_CI[row, image]:.3f}", mark(bool(chosen_CI[row, image]), row == image))
                for row, text in enumerate(captions)
            ),
        )
        for image, sample in enumerate(samples)
    )
