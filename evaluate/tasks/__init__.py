"""One file a task."""

from sail_align.evaluate.tasks import classification, mmvp, representation, retrieval, segmentation, winoground
from sail_align.evaluate.tasks.base import Protocol
from sail_align.extract.manifest import TaskKind

PROTOCOLS: dict[TaskKind, Protocol] = {
    "classification": classification.PROTOCOL,
    "retrieval": retrieval.PROTOCOL,
    "representation": representation.PROTOCOL,
    "winoground": winoground.PROTOCOL,
    "mmvp": mmvp.PROTOCOL,
    "segmentation": segmentation.PROTOCOL,
}
