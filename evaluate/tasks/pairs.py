"""Tasks on pairs, two images and two captions each: the common part of Winoground and MMVP."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sail_align.evaluate.results.metric import (
    GROUPS,
    Annotation,
    Example,
    Metric,
    Outcomes,
    Picture,
    Result,
    pick_examples,
)
from sail_align.evaluate.tasks.task import EvaluationTask

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import Embeddings, EvaluationSet

Hits = dict[str, NDArray[np.bool_]]

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
"""Four scores in random order: two comparisons are right, and both scores of one diagonal exceed the other two."""
AXES = ("caption", "image")
"""Axes of the scores of a pair."""


@dataclass(frozen=True, kw_only=True)
class PairsTask(EvaluationTask):
    """A task on sets whose rows 2k and 2k + 1 are a pair: image 0 with caption 0, image 1 with caption 1.

    Attributes:
        counted: The metrics by name, each with the kind of hit that it counts. The last one decides whether an example
            is right.
        chosen: What is marked in the examples: the caption that each image prefers, or the image that each caption
            prefers.
    """

    counted: Mapping[str, str]
    chosen: Literal["caption", "image"]

    @abstractmethod
    def describe(self, data: "EvaluationSet", pair: int, hits: Hits) -> str:
        """Return the title of a pair as an example."""

    @abstractmethod
    def details(self, by_label: dict[str, Any]) -> dict[str, Any]:
        """Return the details of a result, given the scores by label, which are empty if the set has no labels."""

    def evaluate(self, data: "EvaluationSet") -> Result:
        """Return the hits of the pairs, and the scores by label."""
        images_NE, texts_NE = data.images(), data.texts().embeddings
        width = images_NE.shape[1]
        scores_KCI = texts_NE.reshape(-1, 2, width) @ images_NE.reshape(-1, 2, width).transpose(0, 2, 1)
        hits = self.hits(scores_KCI)
        outcomes = {name: hits[hit] for name, hit in self.counted.items()}
        *_, right_K = outcomes.values()
        examples = [
            Example(self.describe(data, pair, hits), bool(right_K[pair]), self._pictures(data, scores_KCI[pair], pair))
            for pair in pick_examples(right_K, each=3)
        ]
        rows_K2 = np.arange(len(data.samples)).reshape(-1, 2)
        groups_K = data.groups(rows_K2)
        grouped = outcomes if groups_K is None else {**outcomes, GROUPS: groups_K}
        labels_K = np.array([sample.label for sample in data.samples[::2]])
        by_label: dict[str, Any] = {}
        for label, name in enumerate(data.source.classes):
            selected_K = labels_K == label
            if items := int(selected_K.sum()):
                part = {outcome: values_K[selected_K] for outcome, values_K in grouped.items()}
                scores = self.compute_scores(part, items)
                is_one_group = groups_K is not None and len(np.unique(groups_K[selected_K])) == 1  # has no interval
                values = {
                    score["name"]: [score["value"], *([] if is_one_group else score["interval"])] for score in scores
                }
                by_label[name] = {"items": items, **values}
        return Result(len(scores_KCI), outcomes, examples, self.details(by_label), rows=rows_K2)

    def metrics(self, outcomes: Outcomes) -> tuple[Metric, ...]:
        """Return the metrics of hits (K,)."""
        return tuple(Metric.mean(name, name, CHANCE[hit], outcomes[name]) for name, hit in self.counted.items())

    @staticmethod
    def hits(scores_KCI: NDArray[np.floating]) -> Hits:
        """Return the text, image and group hits of pairs, (K,) each, from scores (K, 2 captions, 2 images).

        Text: each image prefers its own caption. Image: each caption prefers its own image. Group: both. Comparisons
        are strict, as in Thrush et al. 2022, "Winoground", section 3.2.
        """
        c0_i0, c0_i1, c1_i0, c1_i1 = (scores_KCI[:, caption, image] for caption in (0, 1) for image in (0, 1))
        text_K = (c0_i0 > c1_i0) & (c1_i1 > c0_i1)
        image_K = (c0_i0 > c0_i1) & (c1_i1 > c1_i0)
        return {"text": text_K, "image": image_K, "group": text_K & image_K}

    def _pictures(self, data: "EvaluationSet", scores_CI: "Embeddings", pair: int) -> tuple[Picture, ...]:
        """Return both images of a pair, each with both captions and their scores, and marks on chosen captions."""
        samples = data.samples[2 * pair : 2 * pair + 2]
        captions = [sample.captions[data.captions[0]] for sample in samples]
        axis = AXES.index(self.chosen)
        chosen_CI = np.indices((2, 2))[axis] == scores_CI.argmax(axis, keepdims=True)
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
