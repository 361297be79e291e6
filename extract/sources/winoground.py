"""Source kind `winoground`: Thrush et al. 2022 as published, `examples.jsonl` and a folder of images."""

import json
from pathlib import Path

from sail_align.extract.sources.annotated import AnnotatedImages
from sail_align.extract.sources.base import Sample
from sail_align.extract.sources.descriptions import WinogroundSource as Description

KINDS = ("Object", "Relation", "Both")
"""What the two captions swap, `collapsed_tag` in the file; a sample's label."""


class WinogroundSource(AnnotatedImages):
    """Rows 2k and 2k + 1 are image 0 with caption 0, and image 1 with caption 1, of example k.

    Keys are `<id>/0` and `<id>/1`.
    """

    def __init__(self, description: Description, data_root: Path):
        root = data_root / description.root
        super().__init__(root / description.examples, root / description.images)

    @property
    def captions(self) -> tuple[str, ...]:
        """One."""
        return ("raw",)

    @property
    def classes(self) -> tuple[str, ...]:
        """What the captions of an example swap."""
        return KINDS

    def _read(self) -> list[Sample]:
        with self._annotations.open(encoding="utf-8") as lines:
            examples = [json.loads(line) for line in lines if line.strip()]
        return [
            Sample(
                key=f"{example['id']}/{side}",
                image=_file_name(example[f"image_{side}"]),
                captions={"raw": example[f"caption_{side}"]},
                label=KINDS.index(example["collapsed_tag"]),
            )
            for example in sorted(examples, key=lambda each: each["id"])
            for side in (0, 1)
        ]


def _file_name(image: str) -> str:
    """The examples name images without their ending."""
    return image if image.endswith(".png") else f"{image}.png"
