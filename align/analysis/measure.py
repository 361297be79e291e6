"""How alike a store's image and text features are before any training: of a sample of rows, in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sail_align.align.data.pairs import Half, held_out_count, key_hashes, not_finite
from sail_align.align.model.closed_form import LinearMap, Moments, regularised_cca
from sail_align.align.settings import CLOSED_FORM_DIM
from sail_align.align.stats.bootstrap import mean_interval
from sail_align.align.stats.metrics import cka_by_row, mutual_knn, ranks, unit_rows
from sail_align.align.stats.tables import markdown_table
from sail_align.extract.data import Status
from sail_align.extract.errors import UserError
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.store import Store

FORMAT = 1
SPAN_ROWS = 256
MIN_ROWS = 50
HEADER = ("image", "text", "caption", "rows", "mutual k-NN (chance)", "CKA", "CCA T2I R@1", "CCA I2T R@1", "chance")


@dataclass(frozen=True)
class Measure:
    """One image encoder with one caption of one text encoder; recall and its interval in percent.

    `rows` are those of the `drawn` ones that both sides have. `mutual_knn` and `cka` are over all `rows`; the closed
    form is computed from those that are not held out.
    """

    image: str
    text: str
    caption: str
    drawn: int
    rows: int
    mutual_knn: float
    mutual_knn_chance: float
    cka: float
    held_out: int
    t2i_r1: float
    t2i_interval: tuple[float, float]
    i2t_r1: float
    i2t_interval: tuple[float, float]
    chance: float


@dataclass(frozen=True)
class Sample:
    """Stretches of a store's rows, evenly likely anywhere, and the hash of each row's key (n,)."""

    spans: Sequence[tuple[int, int]]
    hashes: NDArray[np.uint64]

    @classmethod
    def draw(cls, store: Store, rows: int, seed: int) -> "Sample":
        """Draw about `rows` rows, in whole stretches; all of a store that has no more."""
        starts = np.arange(0, store.rows, SPAN_ROWS)
        count = min(len(starts), -(-rows // SPAN_ROWS))
        chosen = np.sort(np.random.default_rng(seed).permutation(starts)[:count]).tolist()
        spans = [(start, min(start + SPAN_ROWS, store.rows)) for start in chosen]
        return cls(spans, np.concatenate([key_hashes(store.index(["key"], *span)["key"]) for span in spans]))

    def read(self, array: FeatureArray) -> tuple[Half, NDArray[np.bool_]]:
        """Return the features (n, D) of the rows, and which of them are there."""
        features, status = zip(*(array.read(*span) for span in self.spans), strict=True)
        return np.concatenate(features), np.concatenate(status) == Status.OK


def measure(store: Store, *, rows: int, neighbours: int, held_out: float, seed: int) -> Iterator[Measure]:
    """Yield the measures of every image encoder with every caption of every text encoder.

    Args:
        store: It need not be complete: rows that are not there are left out.
        rows: Of the sample, about: see `Measure.drawn`.
        neighbours: k of the mutual k-NN.
        held_out: Fraction of the sample to score the closed form on. Where the sample is the whole store, they are the
            rows that `sail-align fit --held-out` keeps out too.
        seed: Of the sample.

    Raises:
        UserError: There is nothing to pair, a pair has fewer than 50 rows, or a feature is no number.
    """
    texts = [(name, node, array) for name in store.captions for node, array in store.texts(name).items()]
    if not texts or not store.images():
        raise UserError(f"{store.path} has not both image and text features; make them with `sail-extract run`.")
    sample = Sample.draw(store, rows, seed)
    for image, image_array in store.images().items():
        image_ND, image_there = sample.read(image_array)
        for caption, text, text_array in texts:
            text_ND, text_there = sample.read(text_array)
            both = image_there & text_there
            if both.sum() < (least := max(MIN_ROWS, neighbours + 1)):
                raise UserError(
                    f"{image_array.path} and {text_array.path} of {store.path} have {both.sum()} of {len(both)} rows "
                    f"together, and it takes {least}; see `sail-extract status`, or raise --rows."
                )
            sides = image_ND[both], text_ND[both]
            if not all(np.isfinite(side).all() for side in sides):
                raise not_finite([store])
            found = _measure(*sides, sample.hashes[both], neighbours, held_out)
            yield Measure(image, text, caption, len(both), **found)


def _measure(
    image_ND: Half, text_ND: Half, hash_N: NDArray[np.uint64], neighbours: int, held_out: float
) -> dict[str, Any]:
    rows, count = len(image_ND), held_out_count(len(image_ND), held_out)
    order = np.argsort(hash_N, kind="stable")
    tested, fitted = order[:count], order[count:]
    x_TE, y_TE = _closed_form(image_ND, text_ND, fitted, tested)
    image_ranks, text_ranks = ranks(x_TE, y_TE, np.arange(count))
    overlap_N = mutual_knn(image_ND, text_ND, neighbours)
    found: dict[str, Any] = {
        "rows": rows,
        "mutual_knn": float(overlap_N.mean()),
        "mutual_knn_chance": neighbours / (rows - 1),
        "cka": float(cka_by_row(unit_rows(image_ND), unit_rows(text_ND)).mean()),
        "held_out": count,
        "chance": 100 / count,
    }
    for way, hits in (("t2i", text_ranks == 0), ("i2t", image_ranks == 0)):
        low, high = mean_interval(hits)
        found |= {f"{way}_r1": 100 * float(hits.mean()), f"{way}_interval": (100 * low, 100 * high)}
    return found


def _closed_form(
    image_ND: Half, text_ND: Half, fitted: NDArray[np.int64], tested: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the tested rows' embeddings (T, E) of both sides under the CCA of the fitted rows."""
    moments = Moments(image_ND.shape[1], text_ND.shape[1])
    for start in range(0, len(fitted), 1_024):
        block = fitted[start : start + 1_024]
        moments.add(torch.from_numpy(image_ND[block]), torch.from_numpy(text_ND[block])[None])
    found = regularised_cca(moments, min(CLOSED_FORM_DIM, image_ND.shape[1], text_ND.shape[1]))
    return _embed(found.image, image_ND[tested]), _embed(found.text, text_ND[tested])


def _embed(linear_map: LinearMap, features_ND: Half) -> NDArray[np.float32]:
    features = torch.from_numpy(features_ND).double()
    normed = F.layer_norm(features, features.shape[-1:])
    embedded: NDArray[np.float32] = F.normalize(normed @ linear_map.weight.T + linear_map.bias).float().numpy()
    return embedded


def table(measures: Sequence[Measure]) -> str:
    """Return a table, a line a measure, as they come."""
    lines = [
        (
            each.image,
            each.text,
            each.caption,
            f"{each.rows:,}",
            f"{each.mutual_knn:.3f} ({each.mutual_knn_chance:.3f})",
            f"{each.cka:z.3f}",
            _recall(each.t2i_r1, each.t2i_interval),
            _recall(each.i2t_r1, each.i2t_interval),
            f"{each.chance:.2f}",
        )
        for each in measures
    ]
    return markdown_table(HEADER, lines, words=3)


def report(store: Store, measures: Sequence[Measure], **asked: Any) -> dict[str, Any]:
    """Return the measures as JSON-able data, with how they were asked for and the store they are of."""
    about = {"format": FORMAT, "protocol": "measure-1", "store": str(store.path), "store_digest": store.digest}
    return {**about, **asked, "measures": [asdict(each) for each in measures]}


def _recall(percent: float, interval: tuple[float, float]) -> str:
    return f"{percent:.1f} ({interval[0]:.1f} – {interval[1]:.1f})"
