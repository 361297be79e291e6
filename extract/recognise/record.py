"""The manifest of recognised data: its content, a description for the user, and its file."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml
from pydantic import ValidationError

from sail_align.extract.data import Sample, Source, describe_left_out
from sail_align.extract.errors import UserError, command, printable
from sail_align.extract.manifest import Manifest, as_name
from sail_align.extract.recognise.columns import Choices, Understood
from sail_align.extract.recognise.paths import recognise
from sail_align.extract.sources.file_set import is_inside
from sail_align.extract.sources.images import FolderSource
from sail_align.extract.sources.webdataset import WebDatasetSource
from sail_align.extract.system.difference import describe_difference
from sail_align.extract.system.files import report_write_errors, write_atomically
from sail_align.extract.system.validation import describe_mistakes

SHOWN_ROWS = 3
SHOWN_TEXTS = 2
SHOWN_CHARACTERS = 70
MOST_IN_LINE = 8
"""Entries of a list or mapping that are written in one line."""
MOST_LOOKED_FOR = 10_000
"""Images that are looked for, so that missing ones are counted early."""
MOST_TARS = 16
"""If there are more tars than this, only the samples of the first are counted."""
COMPARED = {"name", "purpose", "source", "task"}
"""Fields that recognition decides. The user may edit the others."""
_GENERAL = {
    "captions",
    "caption",
    "metadata",
    "data",
    "train",
    "val",
    "test",
    "annotations",
    "images",
    "index",
    "labels",
}
"""Names of files and folders that do not name a data set."""


@dataclass(frozen=True)
class Recognised:
    """Recognised data.

    Attributes:
        path: The path as the user gave it.
        understood: How to read it.
        content: The manifest, with the absolute path of the data.
        lines: Description for the user.
    """

    path: Path
    understood: Understood
    content: dict[str, Any]
    lines: list[str]

    @classmethod
    def of(cls, path: Path, choices: Choices, encoders: Mapping[str, str | None] | None = None) -> "Recognised":
        """Recognise a path and read its samples.

        Args:
            path: The path.
            choices: What the user decides.
            encoders: Names of the encoders to write to the manifest, by side.

        Raises:
            UserError: It cannot be read, or the user has to pass an option.
        """
        understood = recognise(path, choices)
        source = {"kind": understood.source["kind"], "root": os.path.abspath(understood.root), **understood.source}
        content: dict[str, Any] = {"name": _name(path), "source": source}
        content |= {"task": understood.task} if understood.task else {}
        opened = _validated(path, content).open_source(Path())
        facts = _Facts.of(opened)
        chosen: dict[str, Any] = {side: name for side, name in (encoders or {}).items() if name}
        if kept := facts.usual_captions(opened):
            chosen["captions"] = kept
        if chosen:
            content["encoders"] = chosen
        lines = [f"{path}: {understood.what} (kind: {source['kind']})", f"  {facts.counts(opened)}"]
        lines += [f"    {_describe(sample, opened)}" for sample in facts.first]
        lines += [f"  {note}." for note in understood.notes]
        if left_out := describe_left_out(opened.left_out):
            lines.append(f"  {left_out}.")
        return cls(path, understood, content, [printable(line) for line in lines])

    @property
    def name(self) -> str:
        """The name of the manifest."""
        return str(self.content["name"])

    def write(self, file: Path) -> bool:
        """Write the manifest, unless it is there already. Return whether it was written.

        The data are named by a path relative to the file if both are in the current folder, else by an absolute path.

        Raises:
            UserError: The file exists and is another manifest.
        """
        root = self._root(file.parent)
        if os.path.lexists(file):
            there = Manifest.read(file)
            spelt = getattr(there.source, "root", root)
            if os.path.realpath(file.parent / spelt) == os.path.realpath(self.content["source"]["root"]):
                root = spelt  # from another folder, the same data have another relative path
        content = {**self.content, "source": {**self.content["source"], "root": root}}
        if os.path.lexists(file):
            before, now = (
                each.model_dump(mode="json", include=COMPARED) for each in (there, _validated(file, content))
            )
            if difference := describe_difference(before, now):
                raise UserError(
                    f"{file} exists and differs from what {self.path} looks like now: {difference}. Use it with "
                    f"`{command('sail-extract', 'run', file)}`, or remove it, or pass another --out."
                )
            return False
        with report_write_errors(file):
            write_atomically(file, self._text(content).encode())
        return True

    def _root(self, folder: Path) -> str:
        root, here = self.content["source"]["root"], os.getcwd()
        base = os.path.realpath(folder)
        near = is_inside(Path(here), root) and is_inside(Path(here), base) and not os.environ.get("SAIL_DATA_ROOT")
        return Path(os.path.relpath(root, base)).as_posix() if near else str(root)

    def _text(self, content: dict[str, Any]) -> str:
        name = os.path.basename(os.path.abspath(self.path))
        lines = [f"# From {name}: {self.understood.what}. Edit it as you like; see docs/data.md."]
        for name, value in content.items():
            if not isinstance(value, dict):
                lines.append(_dump(name, value))
                continue
            lines += [f"{name}:", *(f"  {line}" for field in value for line in _dump(field, value[field]).split("\n"))]
            if name == "source":
                lines += [f"  # {hint.strip()}" for hint in self.understood.hints]
        optional = {
            "title": "a description",
            "licence": "CC BY 4.0",
            "encoders": "{image: dinov2-large, text: gte-large}",
        }
        if content["source"].get("captions"):
            optional["task"] = "{kind: retrieval}  # to score on these data instead of training on them"
        lines += [f"# {name}: {value}" for name, value in optional.items() if name not in content]
        return printable("\n".join(lines)) + "\n"


def _name(path: Path) -> str:
    """Return the name of a data set, from that of its folder or file."""
    path = Path(os.path.abspath(path))
    stem = path.name if path.is_dir() else path.stem
    return as_name(f"{path.parent.name}-{stem}" if stem.lower() in _GENERAL else stem)


def _validated(where: Path, content: dict[str, Any]) -> Manifest:
    try:
        return Manifest.model_validate(content)
    except ValidationError as problem:
        mistakes = describe_mistakes(problem, Manifest, content)
        raise UserError(f"{where} cannot be described by a manifest: {mistakes[0]}") from problem


def _dump(name: str, value: object) -> str:
    """Return a field as YAML: in one line, or a line per entry if there are many."""
    is_long = isinstance(value, list | dict) and len(value) > MOST_IN_LINE
    text = yaml.safe_dump(value, default_flow_style=not is_long, allow_unicode=True, sort_keys=False, width=1 << 30)
    text = text.removesuffix("...\n").strip()
    return f"{name}:\n{indent(text, '  ')}" if is_long else f"{name}: {text}"


@dataclass
class _Facts:
    """Counts of samples, and the first of them.

    Attributes:
        rows: Number of samples.
        missing: Number of the first samples whose image file is not there.
        captions: Number of samples by the captions that they have.
        first: The first samples.
        tars: Number of tars that were not read.
    """

    rows: int
    missing: int
    captions: Counter[str]
    first: list[Sample]
    tars: int

    @classmethod
    def of(cls, source: Source) -> "_Facts":
        parts = list(source.parts())
        skipped = len(parts) - 1 if isinstance(source, WebDatasetSource) and len(parts) > MOST_TARS else 0
        samples: Iterable[Sample] = chain.from_iterable(part.read() for part in parts[: len(parts) - skipped])
        facts = cls(0, 0, Counter(), [], skipped)
        folder = source.folder if isinstance(source, FolderSource) else None
        for sample in samples:
            if facts.rows < SHOWN_ROWS:
                facts.first.append(sample)
            if folder is not None and facts.rows < MOST_LOOKED_FOR:
                facts.missing += not os.path.isfile(folder / sample.image)
            facts.rows += 1
            facts.captions.update(sample.captions.keys())
        return facts

    def usual_captions(self, source: Source) -> list[str]:
        """Return those of numbered captions that most images have, if others are rare."""
        if not isinstance(source.caption_origins, str):
            return []
        usual = [name for name in source.captions if 2 * self.captions[name] >= self.captions["c0"]]
        return usual if len(usual) < len(source.captions) else []

    def counts(self, source: Source) -> str:
        """Return the number of images and captions, in words."""
        images = f"{self.rows:,} image{'s' * (self.rows != 1)}"
        if self.tars:
            images += f" in the first tar, and {self.tars:,} more tars"
        if self.missing:
            some = f" of the first {MOST_LOOKED_FOR:,}" if self.rows > MOST_LOOKED_FOR else ""
            images += f" ({self.missing:,}{some} missing)"
        if source.classes:
            images += f", {len(source.classes):,} classes"
        named = (f"{name} ({self.captions[name]:,})" for name in source.captions)
        return f"{images}, captions: {', '.join(named) or 'none'}"


def _describe(sample: Sample, source: Source) -> str:
    texts = [f"{name}: {' '.join(text.split())!r}" for name, text in sample.captions.items()]
    if sample.label >= 0:
        texts.insert(0, f"class: {source.classes[sample.label]!r}")
    more = [f"and {len(texts) - SHOWN_TEXTS} more"] if len(texts) > SHOWN_TEXTS else []
    return f"{sample.key}  {'  '.join([*map(_shortened, texts[:SHOWN_TEXTS]), *more]) or 'no caption'}"


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
