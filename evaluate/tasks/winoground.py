"""Winoground-style pairs: two images and two captions of the same words, to be matched.

Thrush et al. 2022, "Winoground". If a set has labels, they say what the captions swap (object, relation, both).
"""

from typing import TYPE_CHECKING, Any

from sail_align.evaluate.tasks.pairs import Hits, PairsTask

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import EvaluationSet


class Winoground(PairsTask):
    """Text, image and group score."""

    def describe(self, data: "EvaluationSet", pair: int, hits: Hits) -> str:
        """Return whether text and image are right."""
        text, image = ("right" if hits[hit][pair] else "wrong" for hit in ("text", "image"))
        return f"text {text}, image {image}"

    def details(self, by_label: dict[str, Any]) -> dict[str, Any]:
        """Return the scores by what the captions swap, if the set has labels."""
        return {"by_tag": by_label} if by_label else {}


TASK = Winoground(
    kind="winoground",
    summary="Pairs of images and captions. Text, image and group score.",
    title="Pairs of images and captions",
    how_to_read="Text is right if each image prefers its own caption, image if each caption prefers its own image. A "
    "model that ignores the order of words prefers one caption for both images, so its scores are below chance.",
    protocol="winoground/strict@1",
    needs=frozenset({"captions", "pairs"}),
    counted={"text": "text", "image": "image", "group": "group"},
    headlines=("text", "image", "group"),
    gallery="middle",
    chosen="caption",
)
