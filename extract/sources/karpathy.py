"""Source kind `karpathy`: the splits of Karpathy & Fei-Fei 2015, `dataset_coco.json` and `dataset_flickr30k.json`."""

from pathlib import Path

from sail_align.extract.errors import UserError
from sail_align.extract.sources.annotated import AnnotatedImages, numbered, read_json
from sail_align.extract.sources.base import Sample
from sail_align.extract.sources.descriptions import KarpathySource as Description


class KarpathySource(AnnotatedImages):
    """The images of one split, in the file's order, with all their captions: five, some of COCO's six or seven.

    An image lies in its `filepath` (COCO's `val2014`) under the folder of images, or directly there without one.
    """

    def __init__(self, description: Description, data_root: Path):
        root = data_root / description.root
        super().__init__(root / description.annotations, root / description.images)
        self._split = description.split

    def _read(self) -> list[Sample]:
        images = read_json(self._annotations)["images"]
        kept = [image for image in images if image["split"] == self._split]
        if not kept:
            splits = ", ".join(sorted({image["split"] for image in images}))
            raise UserError(f"{self._annotations} has no split {self._split!r}; it has {splits}.")
        samples = []
        for image in kept:
            path = (Path(image.get("filepath", "")) / image["filename"]).as_posix()
            texts = [sentence["raw"].strip() for sentence in image["sentences"]]
            samples.append(Sample(key=path, image=path, captions=numbered(texts)))
        return samples
