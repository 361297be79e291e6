"""Measures of the alignment of a store's image and text features before training, on a sample of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sail_align.align.data.pairs import Half, held_out_count, key_hashes, not_finite
from sail_align.align.model.closed_form import Moments, normed
from sail_align.align.settings import CLOSED_FORM_DIM
from sail_align.align.stats.bootstrap import mean_interval
from sail_align.align.stats.metrics import cka_by_row, mutual_knn, ranks, unit_rows
from sail_align.align.stats.tables import format_table
from sail_align.extract.data import Status
from sail_align.extract.errors import UserError
from sail_align.extract.store.joined import StoredFeatures
from sail_align.extract.store.store import Store

FORMAT = 1
SPAN_ROWS = 256
MIN_ROWS = 50
WAYS = ("t2i", "i2t")
HEADER = ("image", "text", "caption", "rows", "mutual k-NN (chance)", "CKA", "CCA T2I R@1", "CCA I2T R@1", "chance")


@dataclass(frozen=True)
class RowSample:
    """Spans of a store's rows, drawn uniformly, and the hashes (n,) of the rows' keys."""

    spans: Sequence[tuple[int, int]]
    hashes: NDArray[np.uint64]

    @classmethod
    def draw(cls, store: Store, rows: int, seed: int) -> "RowSample":
        """Draw about `rows` rows in whole spans, or all rows of a smaller store."""
        starts = np.arange(0, store.rows, SPAN_ROWS)
        count = min(len(starts), -(-rows // SPAN_ROWS))
        chosen = np.sort(np.random.default_rng(seed).permutation(starts)[:count]).tolist()
        spans = [(start, min(start + SPAN_ROWS, store.rows)) for start in chosen]
        return cls(spans, np.concatenate([key_hashes(store.index(["key"], *span)["key"]) for span in spans]))

    def read(self, array: StoredFeatures) -> tuple[Half, NDArray[np.bool_]]:
        """Return the features (n, D) of the rows, and a mask of those that exist."""
        features, status = zip(*(array.read(*span) for span in self.spans), strict=True)
        return np.concatenate(features), np.concatenate(status) == Status.OK


def measure_store(
    store: Store,
    *,
    rows: int,
    neighbours: int,
    held_out: float,
    seed: int,
    image_encoders: Sequence[str] = (),
    text_encoders: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the alignment of each image encoder with each caption of each text encoder.

    Args:
        store: Store to measure. It may be incomplete: rows without features are left out.
        rows: Approximate size of the sample.
        neighbours: k of the mutual k-NN.
        held_out: Fraction of the sample to score the closed form on. If the sample is the whole store, these are the
            rows that `sail-align fit --held-out` holds out as well.
        seed: Seed of the sample.
        image_encoders: Image encoders, or several joined as in `a+b`. Default: each of the store.
        text_encoders: Text encoders, likewise.
        captions: Captions. Default: each of the store.

    Returns:
        A record ready for JSON. Each of its `measures` has, for one combination, the number of `rows` with features on
        both sides among the `drawn` ones, `mutual_knn` and `cka` over these rows, and the closed form's recalls with
        their intervals in percent. The closed form is computed from the rows that are not `held_out`.

    Raises:
        UserError: There is nothing to pair, a pair has fewer than 50 rows, or a feature is NaN or inf.
    """
    if not store.images() or not any(store.texts(name) for name in store.captions):
        raise UserError(f"{store.path} needs image and text features. Create the missing ones with `sail-extract run`.")
    texts = [
        (name, text, store.text(name, text))
        for name in captions or store.captions
        for text in text_encoders or store.texts(name)
    ]
    sample, measures = RowSample.draw(store, rows, seed), []
    for image in image_encoders or store.images():
        image_array = store.image(image)
        image_ND, image_ok = sample.read(image_array)
        for caption, text, text_array in texts:
            text_ND, text_ok = sample.read(text_array)
            both = image_ok & text_ok
            if both.sum() < (least := max(MIN_ROWS, neighbours + 1)):
                raise UserError(
                    f"{image_array.path} and {text_array.path} of {store.path} have only {both.sum()} of {len(both)} "
                    f"rows in common; {least} are needed. See `sail-extract status`, or raise --rows."
                )
            sides = image_ND[both], text_ND[both]
            if not all(np.isfinite(side).all() for side in sides):
                raise not_finite([store])
            scores = _scores(*sides, sample.hashes[both], neighbours, held_out)
            measures.append({"image": image, "text": text, "caption": caption, "drawn": len(both), **scores})
    return {
        "format": FORMAT,
        "protocol": "measure-1",
        "store": str(store.path),
        "store_digest": store.digest,
        "rows": len(sample.hashes),
        "neighbours": neighbours,
        "held_out": held_out,
        "seed": seed,
        "measures": measures,
    }


def measures_table(measures: Sequence[Mapping[str, Any]]) -> str:
    """Return the `measures` of a record as a Markdown table with a row per combination, ranked by the mean R@1."""
    rows = []
    for each in sorted(measures, key=lambda each: -sum(each[f"{way}_r1"] for way in WAYS)):
        recalls = ("{:.1f} ({:.1f} – {:.1f})".format(each[f"{way}_r1"], *each[f"{way}_interval"]) for way in WAYS)
        rows.append(
            (
                each["image"],
                each["text"],
                each["caption"],
                f"{each['rows']:,}",
                f"{each['mutual_knn']:.3f} ({each['mutual_knn_chance']:.3f})",
                f"{each['cka']:z.3f}",
                *recalls,
                f"{each['chance']:.2f}",
            )
        )
    return format_table(HEADER, rows, "lll")


def _scores(
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
    }
    for way, hits in zip(WAYS, (text_ranks == 0, image_ranks == 0), strict=True):
        low, high = mean_interval(hits)
        found |= {f"{way}_r1": 100 * float(hits.mean()), f"{way}_interval": (100 * low, 100 * high)}
    return {**found, "chance": 100 / count}


def _closed_form(
    image_ND: Half, text_ND: Half, fitted: NDArray[np.int64], tested: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the embeddings (T, E) of the tested rows of both sides, using the CCA of the fitted rows."""
    moments = Moments(image_ND.shape[1], text_ND.shape[1])
    for start in range(0, len(fitted), 1_024):
        block = fitted[start : start + 1_024]
        moments.add(normed(torch.from_numpy(image_ND[block])), normed(torch.from_numpy(text_ND[block]))[None])
    image_map, text_map, _ = moments.cca(min(CLOSED_FORM_DIM, image_ND.shape[1], text_ND.shape[1]))
    x_TE = F.normalize(image_map(normed(torch.from_numpy(image_ND[tested]))))
    y_TE = F.normalize(text_map(normed(torch.from_numpy(text_ND[tested]))))
    return x_TE.float().numpy(), y_TE.float().numpy()
