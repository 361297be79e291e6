"""Similarity of the image and caption spaces, before the heads (raw) and after them (aligned).

Mutual k-NN (Huh et al. 2024) is the share of a row's k nearest rows, by cosine, that are the same among images and
captions. k is 10, or half the number of other rows if there are fewer than 20. CKA (Kornblith et al. 2019) is
computed with the unbiased estimator from rows of unit length, times 100. Each image counts with its first caption. Of a
large set, 5,000 images spread evenly over it are used. The task has no data sets of its own: it scores retrieval sets.
"""

from typing import TYPE_CHECKING

import numpy as np

from sail_align.align.stats.metrics import cka_by_row, mutual_knn, unit_rows
from sail_align.evaluate.results.metric import Metric, Outcomes, Result
from sail_align.evaluate.tasks.task import EvaluationTask, TooSmallError

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import EvaluationSet

K = 10
MAX_ROWS = 5_000
MIN_ROWS = 5
LABELS = {
    "knn_raw": "raw mutual k-NN",
    "knn_aligned": "aligned mutual k-NN",
    "cka_raw": "raw CKA",
    "cka_aligned": "aligned CKA",
}


class Representation(EvaluationTask):
    """The neighbourhoods of images, compared with those of their captions."""

    def evaluate(self, data: "EvaluationSet") -> Result:
        """Return the contribution of each row to mutual k-NN and CKA, of raw and of aligned features."""
        texts = data.texts()
        with_caption_N, first_N = np.unique(texts.rows, return_index=True)
        if len(with_caption_N) < MIN_ROWS:
            name, rows = data.manifest.name, len(with_caption_N)
            raise TooSmallError(f"{name} has {rows} images with a caption. Representation needs {MIN_ROWS}.")
        k = min(K, (len(with_caption_N) - 1) // 2)
        chosen = np.linspace(0, len(with_caption_N) - 1, min(MAX_ROWS, len(with_caption_N))).astype(int)
        images, captions = with_caption_N[chosen], first_N[chosen]
        outcomes = {"k": np.array([k])}
        for which, image_ND, text_ND in (
            ("raw", data.image_features()[images], texts.features[captions]),
            ("aligned", data.images()[images], texts.embeddings[captions]),
        ):
            outcomes[f"knn_{which}"] = mutual_knn(image_ND, text_ND, k)
            outcomes[f"cka_{which}"] = cka_by_row(unit_rows(image_ND), unit_rows(text_ND))
        return Result(len(images), outcomes, details={"k": k}, rows=images)

    def metrics(self, outcomes: Outcomes) -> tuple[Metric, ...]:
        """Return the metrics of each row's contributions (N,) and `k`."""
        (k,) = outcomes["k"].tolist()
        chance = {"knn": k / (len(outcomes["knn_raw"]) - 1), "cka": 0.0}
        return tuple(Metric.mean(name, label, chance[name[:3]], outcomes[name]) for name, label in LABELS.items())


TASK = Representation(
    kind="representation",
    summary="Mutual k-NN and CKA of a retrieval set, before and after the heads.",
    title="Images and captions as spaces",
    how_to_read="The share of an image's neighbourhood that its caption has too, before and after the heads.",
    protocol="representation/first-caption@1",
    needs=frozenset({"captions"}),
    headlines=("knn_aligned", "cka_aligned"),
    diagnostic=True,
    also_scores=("retrieval",),
)
