"""Retrieval both ways: recall@k and ranks over the whole set; the best-ranked right item counts.

As in the COCO and Flickr30k tables: every caption of an image is right for it, each caption asks once, as published:
no prompt, no lower case. A wrong item with the same score is ahead of the right one. Which images and captions make up
the set is the manifest's business (Karpathy's 5k test is one set, val2017 another).
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from sail_align.align.stats.bootstrap import weighted_mean
from sail_align.align.stats.metrics import Ranks, ranks
from sail_align.evaluate.dataset import Embeddings, EvaluationSet
from sail_align.evaluate.results.metric import (
    Example,
    Measure,
    Note,
    Outcomes,
    Picture,
    Result,
    pick_examples,
    summarise,
)
from sail_align.evaluate.tasks.base import Protocol, captions_part
from sail_align.evaluate.tasks.metrics import (
    chance_mean_rank,
    chance_median_rank,
    chance_recall,
    ranking,
    weighted_median,
)
from sail_align.extract.errors import UserError

KS = (1, 5, 10)
SHOWN = 5

Drawn = NDArray[np.float64]


def evaluate(data: EvaluationSet) -> Result:
    """Score recall and ranks, text to image and image to text."""
    images_NE, texts = data.images(), data.texts()
    if not len(texts.rows):
        raise UserError(f"{data.manifest.name} has no caption to retrieve by; give its source 'captions'.")
    image_ranks_N, text_ranks_M = ranks(images_NE, texts.embeddings, texts.rows, data.encoders.device)
    outcomes = {"image_rank": image_ranks_N, "text_rank": text_ranks_M, "owner": texts.rows}
    examples = tuple(
        _example(data, texts.said[text], images_NE @ texts.embeddings[text], int(texts.rows[text]))
        for text in pick_examples(text_ranks_M == 0, each=4)
    )
    metrics = summarise(measures(outcomes), len(images_NE))
    return Result(len(images_NE), metrics, examples, outcomes, {"captions": len(texts.rows)})


def measures(outcomes: Outcomes) -> tuple[Measure, ...]:
    """Return what is measured, of ranks from 0 and the image that owns each caption, `owner` (M,).

    `image_rank` (N,) is that of each image's best caption, `text_rank` (M,) that of each caption's image. An image
    without a caption is there to be found, but does not ask. Intervals resample images, each with all its captions: the
    captions of one image are no independent items.
    """
    image_ranks_N, text_ranks_M, owner_M = (outcomes[name] for name in ("image_rank", "text_rank", "owner"))
    images, captions = len(image_ranks_N), len(owner_M)
    captions_N = np.bincount(owner_M, minlength=images)
    asks_N = captions_N > 0
    one_M = np.ones(captions, dtype=np.int64)
    return (
        *_one_way("t2i", "text→image", text_ranks_M, lambda drawn_N: drawn_N[owner_M], images, one_M),
        *_one_way("i2t", "image→text", image_ranks_N, lambda drawn_N: drawn_N * asks_N, captions, captions_N[asks_N]),
    )


def _one_way(
    way: str,
    label: str,
    ranks_Q: Ranks,
    asked: Callable[[Drawn], Drawn],
    items: int,
    positives: NDArray[np.integer],
) -> Iterator[Measure]:
    """Yield recall and ranks of queries; `asked` says how often each asks, of how often each image was drawn."""

    def recall(k: int) -> Measure:
        hits_Q = (ranks_Q < k).astype(np.float64)
        chance = chance_recall(items, positives, k)
        return Measure(f"{way}_r{k}", f"{label} R@{k}", chance, lambda drawn_N: weighted_mean(hits_Q, asked(drawn_N)))

    order_Q = np.argsort(ranks_Q)
    from_1_Q = ranks_Q + 1.0
    yield from map(recall, KS)
    yield Measure(
        f"{way}_median_rank",
        f"{label} median rank",
        chance_median_rank(items, positives),
        lambda drawn_N: weighted_median(from_1_Q, asked(drawn_N), order_Q),
        "rank",
    )
    yield Measure(
        f"{way}_mean_rank",
        f"{label} mean rank",
        chance_mean_rank(items, positives),
        lambda drawn_N: weighted_mean(from_1_Q, asked(drawn_N)),
        "rank",
    )


def _example(data: EvaluationSet, query: str, scores_N: Embeddings, owner: int) -> Example:
    order = ranking(scores_N, owner).tolist()
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


PROTOCOL = Protocol(
    name="retrieval/any-positive@1", parts=lambda data: (captions_part(data),), evaluate=evaluate, measures=measures
)
