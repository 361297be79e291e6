"""MMVP-VLM: pairs of images that look alike to CLIP, each with a statement that must be matched to its image.

Tong et al. 2024, "Eyes Wide Shut?". A label is the category of a pair. The statements are put into the manifest's
prompt ("a photo of {}"). A pair is right only if both statements have a strictly higher score with their own image.
"""

from typing import TYPE_CHECKING, Any

from sail_align.evaluate.tasks.pairs import Hits, PairsTask

if TYPE_CHECKING:
    from sail_align.evaluate.dataset import EvaluationSet


class Mmvp(PairsTask):
    """Share of pairs that are distinguished."""

    def describe(self, data: "EvaluationSet", pair: int, hits: Hits) -> str:
        """Return the category, or the key of the first image."""
        sample = data.samples[2 * pair]
        return data.source.classes[sample.label] if sample.label >= 0 else sample.key

    def details(self, by_label: dict[str, Any]) -> dict[str, Any]:
        """Return the scores by category."""
        return {"by_category": by_label}


TASK = Mmvp(
    kind="mmvp",
    summary="Pairs of images that look alike to CLIP. Share of pairs told apart.",
    title="Pairs of images that look alike to CLIP",
    how_to_read="A pair is right if each of its two statements has the higher cosine with its own image.",
    protocol="mmvp/both-statements@1",
    needs=frozenset({"captions", "pairs"}),
    counted={"pairs": "image"},
    headlines=("pairs",),
    gallery="middle",
    chosen="image",
)
