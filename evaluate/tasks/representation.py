"""How alike images and captions lie in their spaces: before the heads, as the encoders give them, and behind the heads.

Mutual k-NN (Huh et al. 2024): the share of a row's k nearest rows, by cosine, that are the same among images and among
captions; k is ten, or half of the others where they are fewer than twenty. CKA (Kornblith et al. 2019) with the
unbiased estimator, of rows of unit length, times 100. Each image counts with its first caption; of a large set, 5,000
images spread evenly over it. It takes no test of its own: any retrieval set will do.
"""

import numpy as np

from sail_align.align.stats.bootstrap import weighted_mean
from sail_align.align.stats.metrics import cka_by_row, mutual_knn, unit_rows
from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.results.metric import Measure, Outcomes, Result, summarise
from sail_align.evaluate.tasks.base import Protocol, TooSmallError, captions_part

K = 10
ROWS = 5_000
LEAST = 5
LABELS = {
    "knn_raw": "raw mutual k-NN",
    "knn_aligned": "aligned mutual k-NN",
    "cka_raw": "raw CKA",
    "cka_aligned": "aligned CKA",
}


def evaluate(data: EvaluationSet) -> Result:
    """Score mutual k-NN and CKA of raw and of aligned features."""
    texts = data.texts()
    with_caption_N, first_N = np.unique(texts.rows, return_index=True)
    if len(with_caption_N) < LEAST:
        raise TooSmallError(
            f"{data.manifest.name} has {len(with_caption_N)} images with a caption; representation takes {LEAST}."
        )
    k = min(K, (len(with_caption_N) - 1) // 2)
    chosen = np.linspace(0, len(with_caption_N) - 1, min(ROWS, len(with_caption_N))).astype(int)
    images, captions = with_caption_N[chosen], first_N[chosen]
    outcomes = {"k": np.array([k])}
    for which, image_ND, text_ND in (
        ("raw", data.image_features()[images], texts.features[captions]),
        ("aligned", data.images()[images], texts.embeddings[captions]),
    ):
        outcomes[f"knn_{which}"] = mutual_knn(image_ND, text_ND, k)
        outcomes[f"cka_{which}"] = cka_by_row(unit_rows(image_ND), unit_rows(text_ND))
    return Result(len(images), summarise(measures(outcomes), len(images)), (), outcomes, {"k": k})


def measures(outcomes: Outcomes) -> tuple[Measure, ...]:
    """Return what is measured, of each row's part in each number, (N,), and `k`."""
    (k,) = outcomes["k"].tolist()

    def mean(name: str) -> Measure:
        values_N = outcomes[name]
        chance = k / (len(values_N) - 1) if name.startswith("knn") else 0.0
        return Measure(name, LABELS[name], chance, lambda drawn_N: weighted_mean(values_N, drawn_N))

    return tuple(map(mean, LABELS))


PROTOCOL = Protocol(
    name="representation/first-caption@1",
    parts=lambda data: (captions_part(data),),
    evaluate=evaluate,
    measures=measures,
)
