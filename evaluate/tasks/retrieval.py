"""Retrieval both ways: recall@k and ranks over the whole set, by the best-ranked right item.

As in the COCO and Flickr30k tables, every caption of an image is right for it, and each caption is a query as
published, without a prompt or lower case. A wrong item with the same score ranks before the right one. The manifest
decides which images and captions make up the set (Karpathy's 5k test is one set, val2017 another).

The protocol's similarity is the cosine. Its variant `hub-corrected` ranks by the run's corrected similarity instead,
which is fitted on training items only.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sail_align.align.stats.bootstrap import Statistic, weighted_mean
from sail_align.align.stats.metrics import Ranks, ranks
from sail_align.evaluate.results.metric import Annotation, Example, Metric, Outcomes, Picture, Result, pick_examples
from sail_align.evaluate.tasks.metrics import chance_ranks, ranking
from sail_align.evaluate.tasks.task import EvaluationTask

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import Embeddings, EvaluationSet
    from sail_align.extract.manifest import TaskSettings

KS = (1, 5, 10)
SHOWN = 5
CORRECTED = "hub-corrected"

Drawn = NDArray[np.float64]


class Retrieval(EvaluationTask):
    """The images of each caption, and the captions of each image."""

    def evaluate(self, data: "EvaluationSet") -> Result:
        """Return the ranks of images and captions."""
        corrected = CORRECTED in data.task.variants
        images_NE, texts = data.images(corrected=corrected), data.texts(corrected=corrected)
        image_ranks_N, text_ranks_M = ranks(images_NE, texts.embeddings, texts.rows, data.encoders.device)
        outcomes = {"image_rank": image_ranks_N, "text_rank": text_ranks_M, "owner": texts.rows}
        examples = [
            _example(data, texts.texts[text], images_NE @ texts.embeddings[text], int(texts.rows[text]))
            for text in pick_examples(text_ranks_M == 0, each=4)
        ]
        return Result(len(images_NE), outcomes, examples, {"captions": len(texts.rows)})

    def protocol_parts(self, settings: "TaskSettings") -> list[str]:
        """Return the similarity if it is not the cosine."""
        return [f"similarity={CORRECTED}"] if CORRECTED in settings.variants else []

    def metrics(self, outcomes: Outcomes) -> tuple[Metric, ...]:
        """Return the metrics of ranks from 0 and the image that owns each caption, `owner` (M,).

        `image_rank` (N,) is the rank of each image's best caption, `text_rank` (M,) that of each caption's image. An
        image without a caption is a candidate but not a query. Intervals resample images, each with all its captions,
        because the captions of one image are not independent.
        """
        image_ranks_N, text_ranks_M, owner_M = (outcomes[name] for name in ("image_rank", "text_rank", "owner"))
        images, captions = len(image_ranks_N), len(owner_M)
        captions_N = np.bincount(owner_M, minlength=images)
        is_query_N = captions_N > 0
        one_M, captions_Q = np.ones(captions, dtype=np.int64), captions_N[is_query_N]
        return (
            *_one_way("t2i", "text→image", text_ranks_M, lambda drawn_N: drawn_N[owner_M], images, one_M),
            *_one_way("i2t", "image→text", image_ranks_N, lambda drawn_N: drawn_N * is_query_N, captions, captions_Q),
        )


def _one_way(
    way: str,
    label: str,
    ranks_Q: Ranks,
    query_weights: Callable[[Drawn], Drawn],
    items: int,
    positives: NDArray[np.integer],
) -> Iterator[Metric]:
    """Yield recall and ranks of queries. `query_weights` maps how often images are drawn, (N,), to queries, (Q,)."""
    chance_recalls, chance_median, chance_mean = chance_ranks(items, positives, KS)
    order_Q, from_1_Q = np.argsort(ranks_Q), ranks_Q + 1.0

    def mean(values_Q: NDArray[np.floating]) -> Statistic:
        return lambda drawn_N: weighted_mean(values_Q, query_weights(drawn_N))

    def median(drawn_N: Drawn) -> float:
        upto_Q = np.cumsum(query_weights(drawn_N)[order_Q])
        if not upto_Q[-1]:
            return float("nan")
        middle = (upto_Q[-1] + 1) / 2  # between two ranks if their number is even
        places = np.searchsorted(upto_Q, [np.floor(middle), np.ceil(middle)])
        return float(from_1_Q[order_Q[places]].mean())

    for k, chance in zip(KS, chance_recalls, strict=True):
        yield Metric(f"{way}_r{k}", f"{label} R@{k}", chance, mean((ranks_Q < k).astype(np.float64)))
    yield Metric(f"{way}_median_rank", f"{label} median rank", chance_median, median, "rank")
    yield Metric(f"{way}_mean_rank", f"{label} mean rank", chance_mean, mean(from_1_Q), "rank")


def _example(data: "EvaluationSet", query: str, scores_N: "Embeddings", owner: int) -> Example:
    order = ranking(scores_N, owner).tolist()
    pictures = tuple(
        Picture.of(
            data.source.image(data.samples[row].image),
            alt=next(iter(data.samples[row].captions.values()), data.samples[row].key),
            caption=f"{place}. {scores_N[row]:.3f}",
            mark="right" if row == owner else "",
        )
        for place, row in enumerate(order[:SHOWN], start=1)
    )
    place = order.index(owner) + 1
    missed = (Annotation(f"The right image is number {place} of {len(order)}."),) if place > SHOWN else ()
    return Example(query, place == 1, pictures, missed)


TASK = Retrieval(
    kind="retrieval",
    summary="Retrieval between images and captions. Recall@1, 5 and 10 and ranks, both ways.",
    title="Retrieval, text to image",
    how_to_read="The five images closest to a caption, best first, with their similarity. The right image is framed.",
    protocol="retrieval/any-positive@1",
    needs=frozenset({"captions"}),
    headlines=("i2t_r1", "t2i_r1"),
    variants={CORRECTED: {"variants": [CORRECTED]}},
    corrected=CORRECTED,
)
