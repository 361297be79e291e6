"""What a task is: declared in one file each, as data and the functions that make its numbers."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sail_align.evaluate.dataset import EvaluationSet, digest_of
from sail_align.evaluate.results.metric import Measure, Outcomes, Result
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest
from sail_align.extract.sources import class_names as published


class TooSmallError(UserError):
    """A healthy set of which a task cannot be asked."""


@dataclass(frozen=True)
class Protocol:
    """How a kind of task is measured.

    Args:
        name: The task and the rule that it follows, with a version that rises whenever its numbers would.
        parts: What else decides a set's numbers, read from its manifest: class names, prompts, captions.
        evaluate: Scores one set.
        measures: What is measured, of the outcomes that `evaluate` gives: also of those read again, to compare runs.
        variants: Protocols by name, each as the fields of a manifest's task that it changes: `--protocol NAME`.
    """

    name: str
    parts: Callable[[EvaluationSet], Sequence[str]]
    evaluate: Callable[[EvaluationSet], Result]
    measures: Callable[[Outcomes], Sequence[Measure]]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def id(self, data: EvaluationSet) -> str:
        """Return what says exactly how a set is scored: two scores are comparable if theirs are the same.

        `classification/prompt-ensemble@2/imagenet1k/split=val/classes=open_clip:imagenet:1000/…`.
        """
        return "/".join([self.name, data.manifest.name, *self._split(data.manifest), *self.parts(data)])

    def variant(self, manifest: Manifest, name: str) -> Manifest:
        """Return a manifest under another protocol. Raises `ValueError` if there is none of that name."""
        if name not in self.variants or manifest.task is None:
            raise ValueError(f"{manifest.name} has no protocol {name!r}")
        return manifest.model_copy(update={"task": manifest.task.model_copy(update=dict(self.variants[name]))})

    @staticmethod
    def _split(manifest: Manifest) -> list[str]:
        split = manifest.task and manifest.task.split
        split = split or getattr(manifest.source, "split", None)
        return [f"split={getattr(split, 'keep', split)}"] if split else []


def classes_part(data: EvaluationSet) -> str:
    """Say where the class names come from, how many there are, and which, unless a library publishes them."""
    named, classes = getattr(data.manifest.source, "classes", None), data.source.classes
    origin = named if isinstance(named, str) else "listed" if named else "source"
    is_published = isinstance(named, str) and named.startswith(published.LIBRARIES)
    return f"classes={origin}:{len(classes)}" + ("" if is_published else f":{digest_of(classes)[:8]}")


def templates_part(data: EvaluationSet) -> str:
    """Say which templates make the prompts."""
    named = data.task.templates
    if isinstance(named, str):
        return f"templates={named}"
    return f"templates={_no_spaces(named[0]) if len(named) == 1 else f'listed:{len(named)}:{digest_of(named)[:8]}'}"


def captions_part(data: EvaluationSet) -> str:
    """Say which captions are used, and the prompt that they go into."""
    first = getattr(data.manifest.source, "captions", None)
    names = "+".join(data.task.captions or []) or (f"first-{first}" if isinstance(first, int) else "all")
    return f"captions={names}" + ("" if data.task.prompt == "{}" else f"/prompt={_no_spaces(data.task.prompt)}")


def _no_spaces(text: str) -> str:
    """Return a prompt with hyphens for its spaces, and a digest where another prompt would read the same."""
    hyphened = re.sub(r"[\s/]", "-", text)
    return hyphened if hyphened.replace("-", " ") == text else f"{hyphened}:{digest_of(text)[:8]}"
