"""Source kind `coco-captions`: COCO's own captions JSON, such as `captions_val2017.json`."""

from pathlib import Path

from sail_align.extract.sources.annotated import AnnotatedImages, numbered, read_json
from sail_align.extract.sources.base import Sample
from sail_align.extract.sources.descriptions import CocoCaptionsSource as Description


class CocoCaptionsSource(AnnotatedImages):
    """Images by id, each with its first captions by annotation id: the file lists both in no order of its own."""

    def __init__(self, description: Description, data_root: Path):
        root = data_root / description.root
        super().__init__(root / description.annotations, root / description.images)
        self._kept = description.captions

    def _read(self) -> list[Sample]:
        content = read_json(self._annotations)
        texts: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in sorted(content["annotations"], key=lambda each: each["id"]):
            texts[annotation["image_id"]].append(annotation["caption"].strip())
        return [
            Sample(
                key=image["file_name"],
                image=image["file_name"],
                captions=numbered(texts[image["id"]][: self._kept]),
                url=image.get("coco_url", ""),
            )
            for image in sorted(content["images"], key=lambda each: each["id"])
        ]
