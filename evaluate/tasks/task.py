"""The declaration of an evaluation task, and the tasks of this folder."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sail_align.align.stats.bootstrap import bootstrap, interval
from sail_align.evaluate.results.metric import GROUPS, Metric, Outcomes, Result, groups_of
from sail_align.evaluate.results.scores import Record, RunScores
from sail_align.extract.errors import UserError, did_you_mean

if TYPE_CHECKING:  # the commands derive from the declarations, and `--help` does not wait for torch
    from sail_align.align.runs.checkpoint import Run
    from sail_align.evaluate.dataset import EvaluationSet
    from sail_align.extract.manifest import Manifest, TaskSettings

Data = Literal["labels", "captions", "masks", "pairs"]

FIELDS: dict[str, set[Data]] = {
    "templates": {"labels", "masks"},
    "captions": {"captions"},
    "prompt": {"captions"},
    "views": {"labels", "captions"},
    "background": {"masks"},
}
"""Fields of a manifest's `task` that are read only by tasks that need one of these kinds of data."""


class TooSmallError(UserError):
    """A valid set with too few samples for a task."""


@dataclass(frozen=True, kw_only=True)
class EvaluationTask(ABC):
    """One kind of evaluation: its protocol, its metrics, and how the report shows it.

    The command, the tables and the section of the report derive from the attributes. They are read before torch is
    imported, so `evaluate` imports what needs torch.

    Attributes:
        kind: Name of the task in manifests, commands and scores.json.
        summary: Help text of `sail-eval KIND`.
        title: Heading of the task's section in the report.
        how_to_read: Explanation of the examples in that section.
        protocol: Name of the rules, with a version that is raised whenever they would give other numbers.
        needs: Data that a set must have. In "pairs", rows 2k and 2k + 1 belong together.
        headlines: Names of the metrics that papers put into their tables.
        gallery: Width of the examples in the report.
        diagnostic: Whether the task describes the embeddings rather than a use of them. It has no examples then and is
            left out of the radar chart.
        variants: Other protocols by name, each as the fields of the manifest's `task` that it changes.
        corrected: Name of the variant for corrected similarities. A run that has a correction is scored by it too.
        also_scores: Other kinds of task whose sets this task can score.
    """

    kind: str
    summary: str
    title: str
    how_to_read: str
    protocol: str
    needs: frozenset[Data]
    headlines: tuple[str, ...]
    gallery: Literal["narrow", "middle", "wide"] = "wide"
    diagnostic: bool = False
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    corrected: str = ""
    also_scores: tuple[str, ...] = ()

    @abstractmethod
    def evaluate(self, data: "EvaluationSet") -> Result:
        """Return the outcomes and examples of one set."""

    @abstractmethod
    def metrics(self, outcomes: Outcomes) -> Sequence[Metric]:
        """Return the metrics of the outcomes, which may have been read from disk to compare runs."""

    def protocol_parts(self, settings: "TaskSettings") -> Sequence[str]:
        """Return what decides the numbers besides the rules, the class names, prompts and captions."""
        return ()

    def score(self, data: "EvaluationSet") -> Result:
        """Evaluate a set and compute its scores. Their intervals resample the groups of the set, if it has any.

        Raises:
            UserError: The set lacks data that the task needs, or its groups do not fit.
        """
        self._require_data(data)
        result = self.evaluate(data)
        groups_N = data.groups(np.arange(result.items) if result.rows is None else result.rows)
        outcomes = result.outcomes if groups_N is None else {**result.outcomes, GROUPS: groups_N}
        return replace(result, outcomes=outcomes, scores=self.compute_scores(outcomes, result.items))

    def compute_scores(self, outcomes: Outcomes, items: int) -> list[dict[str, Any]]:
        """Return the scores over all items as `scores.json` has them. Their intervals share the bootstrap draws.

        Whole groups are drawn if the outcomes have `GROUPS`.
        """
        metrics = self.metrics(outcomes)
        values_RM = bootstrap([metric.compute for metric in metrics], items, groups_N=groups_of(outcomes, items))
        return [
            {
                "name": metric.name,
                "label": metric.label,
                "value": metric.compute(np.ones(items)) * metric.scale,
                "chance": metric.chance * metric.scale,
                "interval": interval(values_R * metric.scale),
                "unit": metric.unit,
            }
            for metric, values_R in zip(metrics, values_RM.T, strict=True)
        ]

    def check_manifest(self, manifest: "Manifest") -> None:
        """Raise `UserError` if a manifest has fields or variants that this task would ignore."""
        settings = manifest.task
        fields = (
            {name for name in settings.model_fields_set if getattr(settings, name) is not None} if settings else set()
        )
        for name in sorted(fields & FIELDS.keys()):
            if not FIELDS[name] & self.needs or (name == "views" and not self.takes_views):
                raise UserError(
                    f"Field 'task.{name}' of {manifest.name} is invalid: {self.kind} ignores it. Remove it."
                )
        known = [name for changes in self.variants.values() for name in changes.get("variants", ())]
        for name in settings.variants if settings else ():
            if name not in known:
                expected = f"expected {' or '.join(known)}" if known else f"{self.kind} has none"
                raise UserError(f"Field 'task.variants' of {manifest.name} is invalid: got {name!r}, {expected}.")

    def with_views(self, manifest: "Manifest", views: str) -> "Manifest":
        """Return a manifest under its protocol with averages over views.

        Raises:
            UserError: There are no such views, or the task has no use for any.
        """
        from sail_align.extract.encoders.views import VIEWS

        if views not in VIEWS:
            raise UserError(f"--views is invalid: got {views!r}, expected {' or '.join(VIEWS)}.")
        if not self.takes_views or manifest.task is None:
            raise UserError(f"--views has no effect on {manifest.name}: {self.kind} uses no views. Leave it out.")
        return manifest.model_copy(update={"task": manifest.task.model_copy(update={"views": views})})

    def variant(self, manifest: "Manifest", name: str) -> "Manifest":
        """Return a manifest under the protocol of that name.

        Raises:
            UserError: The task has no such protocol.
        """
        if name not in self.variants or manifest.task is None:
            known = f"expected {' or '.join(self.variants)}" if self.variants else f"{self.kind} has no other protocol"
            guess = did_you_mean(name, self.variants)
            raise UserError(f"Protocol {name!r} of {manifest.name} is invalid: {known}. Correct --protocol.{guess}")
        return manifest.model_copy(update={"task": manifest.task.model_copy(update=dict(self.variants[name]))})

    @property
    def takes_views(self) -> bool:
        """Whether embeddings of images can be averaged over views: not of patches, nor where raw features count."""
        return bool(FIELDS["views"] & self.needs) and not self.diagnostic

    def protocols(self, manifest: "Manifest", run: "Run") -> list["Manifest"]:
        """Return a manifest under each protocol that a run is scored by: its own, then the corrected one if any."""
        plain = manifest.task is not None and not manifest.task.variants
        corrected = plain and self.corrected and run.model.correction is not None
        return [manifest, self.variant(manifest, self.corrected)] if corrected else [manifest]

    def protocol_id(self, data: "EvaluationSet") -> str:
        """Return the exact protocol of a set. Two scores are comparable if theirs are equal.

        `classification/prompt-ensemble@2/imagenet1k/split=val/classes=open_clip:imagenet:1000/…`.
        """
        split = data.task.split or getattr(data.manifest.source, "split", None)
        parts = [self.protocol, data.manifest.name]
        parts += [f"split={getattr(split, 'keep', split)}"] if split else []
        parts += self.protocol_parts(data.task)
        parts += [f"views={data.task.views}"] if data.task.views else []
        parts += data.class_parts if self.needs & {"labels", "masks"} else []
        parts += data.caption_parts if "captions" in self.needs else []
        return "/".join(parts)

    def _require_data(self, data: "EvaluationSet") -> None:
        name, samples = data.manifest.name, data.samples
        captions = sum(len(sample.captions) for sample in samples)
        if "labels" in self.needs and any(sample.label < 0 for sample in samples):
            raise UserError(f"{name} has rows without a label. Give its source classes, as in class-folder.")
        if "masks" in self.needs and not all(sample.mask for sample in samples):
            raise UserError(f"{name} has rows without a mask. Give its source masks, as in mask-folder.")
        if "captions" in self.needs and not captions:
            raise UserError(f"{name} has no captions. Give its source 'captions'.")
        if "pairs" in self.needs and len(data.captions) != 1:
            raise UserError(f"{name} has {len(data.captions)} captions per row. Name one in task.captions.")
        if "pairs" in self.needs and (captions != len(samples) or captions % 2):
            raise UserError(f"{name} has {len(samples)} images and {captions} captions. Each pair needs two of both.")
        rows = np.arange(len(samples))
        data.groups(rows.reshape(-1, 2) if "pairs" in self.needs else rows)  # before anything is encoded


@cache
def all_tasks() -> Mapping[str, EvaluationTask]:
    """Return the tasks by kind: the `TASK` of each module in this folder that has one."""
    modules = [
        import_module(f"{__package__}.{each.name}") for each in pkgutil.iter_modules([str(Path(__file__).parent)])
    ]
    tasks: list[EvaluationTask] = [module.TASK for module in modules if hasattr(module, "TASK")]
    return {task.kind: task for task in tasks}


def without_unknown(run: RunScores) -> RunScores:
    """Return the scores of a run with an error in place of each record whose task this version lacks."""
    records: list[Record] = []
    for record in run.records:
        if record.error or record["task"] in all_tasks():
            records.append(record)
        else:
            records.append(Record(record.description, error="this version has no such task. Update sail-align."))
    return replace(run, content={**run.content, "records": records})


def find_task(kind: str) -> EvaluationTask:
    """Return the task of a kind.

    Raises:
        UserError: There is no such task. The message names the most similar one.
    """
    tasks = all_tasks()
    if kind not in tasks:
        raise UserError(f"Task kind {kind!r} is invalid: expected {', '.join(tasks)}.{did_you_mean(kind, tasks)}")
    return tasks[kind]
