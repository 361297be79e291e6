"""One file a protocol."""

from collections.abc import Callable
from dataclasses import dataclass

from sail_align.evaluate.dataset import EvaluationSet
from sail_align.evaluate.results import Result
from sail_align.evaluate.tasks import classification, retrieval, segmentation, winoground
from sail_align.extract.manifest import TaskKind


@dataclass(frozen=True)
class Protocol:
    """How a task kind is measured. `id` changes whenever its numbers can."""

    id: str
    evaluate: Callable[[EvaluationSet], Result]


PROTOCOLS: dict[TaskKind, Protocol] = {
    "classification": Protocol(classification.PROTOCOL, classification.evaluate),
    "retrieval": Protocol(retrieval.PROTOCOL, retrieval.evaluate),
    "winoground": Protocol(winoground.PROTOCOL, winoground.evaluate),
    "segmentation": Protocol(segmentation.PROTOCOL, segmentation.evaluate),
}
