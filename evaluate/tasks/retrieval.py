"""Retrieval both ways: recall@k over the whole set, hit if any right item is among the k best.

As in the COCO and Flickr30k tables: no prompt, every caption of an image is right for it, each caption asks once. Which
images and captions make up the set is the manifest's business (Karpathy's 5k test is one set, val2017 another).
"""

import numpy as np
from numpy.typing import NDArray

from sail_align.align.metrics import ranks
from sail_align.evaluate.dataset import Embeddings, EvaluationSet
from sail_align.evaluate.metrics import bootstrap_interval, chance_recall, weighted_mean
from sail_align.evaluate.results import Example, Metric, Note, Picture, Result, pick_examples
from sail_align.extract.errors import UserError

PROTOCOL = "retrieval/any-positive@1"
KS = (1, 5, 10)
SHOWN = 5

Ranks = NDArray[np.integer]


def evaluate(data: EvaluationSet) -> Result:
    """Score recall@1, 5 and 10, text to image and image to text."""
    images_NE = data.images()
    parts = [data.texts(name) for name in data.captions]
    if not any(len(rows_K) for _, rows_K in parts):
        raise UserError(f"{data.manifest.name} has no caption to retrieve by; give its source 'captions'.")
    texts_ME = np.concatenate([embeddings_KE for embeddings_KE, _ in parts])
    owner_M = np.concatenate([rows_K for _, rows_K in parts])
    names_M = [name for name, (_, rows_K) in zip(data.captions, parts, strict=True) for _ in rows_K]
    image_ranks_N, text_ranks_M = ranks(images_NE, texts_ME, owner_M)
    examples = []
    for text in pick_examples(text_ranks_M == 0, each=4):
        query = data.samples[owner_M[text]].captions[names_M[text]]
        examples.append(_example(data, query, images_NE @ texts_ME[text], int(owner_M[text])))
    metrics = score(image_ranks_N, text_ranks_M, owner_M)
    return Result(len(images_NE), metrics, tuple(examples), {"captions": len(texts_ME)})


def score(image_ranks_N: Ranks, text_ranks_M: Ranks, owner_M: Ranks) -> tuple[Metric, ...]:
    """Return recall of each caption's image and of each image's best-ranked caption; 0 is the first rank.

    An image without a caption is there to be found, but does not ask. Intervals resample images, each with all its
    captions: the captions of one image are no independent items.
    """
    images, captions = len(image_ranks_N), len(owner_M)
    captions_N = np.bincount(owner_M, minlength=images)
    asks_N = captions_N > 0

    def text_to_image(k: int) -> Metric:
        hits_M = text_ranks_M < k
        chance = chance_recall(images, np.ones(captions, dtype=np.int64), k)
        interval = bootstrap_interval(lambda drawn_N: weighted_mean(hits_M, drawn_N[owner_M]), images)
        return Metric.of_fractions(f"t2i_r{k}", f"text→image R@{k}", float(hits_M.mean()), chance, interval)

    def image_to_text(k: int) -> Metric:
        hits_N = image_ranks_N < k
        chance = chance_recall(captions, captions_N[asks_N], k)
        interval = bootstrap_interval(lambda drawn_N: weighted_mean(hits_N, drawn_N * asks_N), images)
        return Metric.of_fractions(f"i2t_r{k}", f"image→text R@{k}", float(hits_N[asks_N].mean()), chance, interval)

    return (*map(text_to_image, KS), *map(image_to_text, KS))


def _example(data: EvaluationSet, query: str, scores_N: Embeddings, owner: int) -> Example:
    order = np.argsort(-scores_N, kind="stable").tolist()
    pictures = tuple(
        Picture(
            data.source.image(data.samples[row].image),
            alt=next(iter(data.samples[row].captions.values()), data.samples[row].key),
            caption=f"{place}. {scores_N[row]:.3f}",
            mark="right" if row == owner else "",
        )
        for place, row in enumerate(order[:SHOWN], start=1)
    )
    place = order.index(owner) + 1
    missed = (Note(f"The right image is number {place} of {len(order)}."),) if place > SHOWN else ()
    return Example(query, place == 1, pictures, missed)
