"""Source kind `mmvp`: MMVP-VLM, Tong et al. 2024, as published: `Questions.csv` and a folder of images a category."""

import csv
from pathlib import Path

from sail_align.extract.sources.annotated import AnnotatedImages
from sail_align.extract.sources.base import Sample
from sail_align.extract.sources.descriptions import MmvpSource as Description


class MmvpSource(AnnotatedImages):
    """Rows 2k and 2k + 1 are a pair: two images that look alike to CLIP, and what is said of each.

    The file's columns are question id, category and statement; the image is `<category>/<id>.jpg`, in the folder of the
    pair's first row, as in the authors' own evaluation. A sample's label is its category. The statements stand as they
    are in the file: the protocol's "a photo of" is the task's business.
    """

    def __init__(self, description: Description, data_root: Path):
        root = data_root / description.root
        super().__init__(root / description.questions, root / description.images)

    @property
    def captions(self) -> tuple[str, ...]:
        """One."""
        return ("raw",)

    @property
    def classes(self) -> tuple[str, ...]:
        """The categories, in the file's order."""
        return tuple(dict.fromkeys(str(Path(sample.image).parent) for sample in self._samples))

    def _read(self) -> list[Sample]:
        with self._annotations.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row][1:]
        if len(rows) % 2:
            raise ValueError(f"{len(rows)} rows make no pairs")
        categories = list(dict.fromkeys(category.strip() for _, category, _ in rows[::2]))
        samples = []
        for row, (question, _, statement) in enumerate(rows):
            category = rows[row - row % 2][1].strip()
            image = f"{category}/{int(question)}.jpg"
            label = categories.index(category)
            samples.append(Sample(key=image, image=image, captions={"raw": statement.strip()}, label=label))
        return samples
