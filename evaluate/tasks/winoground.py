"""Winoground-style pairs: two images and two captions of the same words; which belongs to which?

Thrush et al. 2022, "Winoground". Rows 2k and 2k + 1 of the set are one pair: image 0 with caption 0, image 1 with
caption 1.
"""

import numpy as np

from sail_align.evaluate.dataset import Embeddings, EvaluationSet
from sail_align.evaluate.metrics import mean_interval, pair_hits
from sail_align.evaluate.results import Example, Metric, Note, Picture, Result, mark, pick_examples
from sail_align.extract.errors import UserError

PROTOCOL = "winoground/strict@1"
CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
"""Of four scores in random order: two comparisons right, and both of one diagonal above both of the other."""


def evaluate(data: EvaluationSet) -> Result:
    """Score text, image and group accuracy over the pairs."""
    scores_KCI = _pair_scores(data)
    hits = dict(zip(CHANCE, pair_hits(scores_KCI), strict=True))
    metrics = tuple(
        Metric.of_fractions(name, name, float(hits_K.mean()), CHANCE[name], mean_interval(hits_K))
        for name, hits_K in hits.items()
    )
    examples = tuple(_example(data, scores_KCI[pair], pair) for pair in pick_examples(hits["group"], each=3))
    return Result(len(scores_KCI), metrics, examples)


def _pair_scores(data: EvaluationSet) -> Embeddings:
    """Return cosines (K pairs, 2 captions, 2 images)."""
    if len(data.captions) != 1:
        raise UserError(f"{data.manifest.name} has {len(data.captions)} captions a row; name one in task.captions.")
    images_NE = data.images()
    texts_NE, rows = data.texts(data.captions[0])
    if len(rows) != len(images_NE) or len(rows) % 2:
        raise UserError(f"{data.manifest.name} has {len(images_NE)} images, {len(rows)} captions; pairs need two each.")
    width = images_NE.shape[1]
    return texts_NE.reshape(-1, 2, width) @ images_NE.reshape(-1, 2, width).transpose(0, 2, 1)


def _example(data: EvaluationSet, scores_CI: Embeddings, pair: int) -> Example:
    samples = data.samples[2 * pair : 2 * pair + 2]
    captions = [sample.captions[data.captions[0]] for sample in samples]
    pictures = []
    for image, sample in enumerate(samples):
        chosen = int(np.argmax(scores_CI[:, image]))
        notes = tuple(
            Note(text, f"{scores_CI[caption, image]:.3f}", mark(caption == chosen, caption == image))
            for caption, text in enumerate(captions)
        )
        pictures.append(Picture(data.source.image(sample.image), alt=captions[image], notes=notes))
    verdicts = ["right" if hit[0] else "wrong" for hit in pair_hits(scores_CI[None])]
    return Example(f"text {verdicts[0]}, image {verdicts[1]}", None, tuple(pictures))
