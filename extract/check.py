"""Is a data set here and whole? What is missing, and how is it got?"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from sail_align.extract.data import Part, Sample, Source, UnreadableImageError
from sail_align.extract.download import tally
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest
from sail_align.extract.schema import DemoSource, Files, WebDatasetSource
from sail_align.extract.sources import class_names as published
from sail_align.extract.sources import open_source
from sail_align.extract.sources.demo.drawing import PACKAGES
from sail_align.extract.sources.tabular import read_captions

PROBED = 32
"""Samples, besides the first, whose image, mask and captions are looked at."""
MANY_TARS = 16
"""Of more tars than this, the first and as many others are looked at."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and whether it is as the manifest says."""

    good: bool
    what: str


def look(manifest: Manifest, data_root: Path) -> Iterator[Finding]:
    """Yield what is there and what is missing; if nothing is, what a look inside shows."""
    there = _needed(manifest, data_root)
    for path, is_there in there.items():
        yield Finding(is_there, f"{path}{'' if is_there else ' is missing'}")
    if all(there.values()):
        yield from _inspect(manifest, data_root)


def is_here(manifest: Manifest, data_root: Path) -> bool:
    """Whether all files that a manifest's source needs are there; nothing is opened. The demo needs packages."""
    if isinstance(manifest.source, DemoSource):
        return all(find_spec(package) for package in PACKAGES)
    return all(_needed(manifest, data_root).values())


def _needed(manifest: Manifest, data_root: Path) -> dict[Path, bool]:
    """Return the files and folders (or patterns of them) that a source needs, and whether each is there."""
    described = [part for part in (manifest.source, manifest.recaptions) if isinstance(part, Files)]
    needs = [(data_root / part.root, need) for part in described for need in part.needs]
    return {root / need: _is_there(root, need) for root, need in needs}


def _is_there(root: Path, need: str) -> bool:
    return (root / need).exists() or ("*" in need and any(root.glob(need)))


def _inspect(manifest: Manifest, data_root: Path) -> Iterator[Finding]:
    """Look at lists that the manifest refers to, at counts, and at some samples' content.

    An evaluation set has to be whole. A training set that was downloaded has lost some images: fewer rows than expected
    are no fault there, and neither are single images that cannot be read.
    """
    try:
        if manifest.task and isinstance(manifest.task.templates, str):
            found = published.templates(manifest.task.templates)
            yield Finding(True, f"{len(found)} templates ({manifest.task.templates})")
        source = open_source(manifest, data_root)
        if manifest.download and (done := tally(data_root / manifest.download.folder)):
            yield Finding(done.tried >= done.listed, f"download: {done}")
        parts = source.parts()
        tars = isinstance(manifest.source, WebDatasetSource) and manifest.purpose == "train"
        if tars and len(parts) > MANY_TARS:
            picked = _Picked(_from_some_tars(parts))
            yield Finding(True, f"{len(parts):,} tars, of which some are looked at; `run` counts their rows")
        else:
            picked = _Picked(source.samples())
            yield from _counts(manifest, picked)
        yield from _contents(source, picked.samples, strict=manifest.purpose == "evaluate")
    except (UserError, OSError) as problem:
        yield Finding(False, " ".join(str(problem).split()))


def _from_some_tars(tars: Sequence[Part]) -> Iterator[Sample]:
    """Yield two samples of the first tar, and of some drawn at random: to read all takes hours."""
    for tar in [tars[0], *random.Random(0).sample(list(tars[1:]), MANY_TARS)]:
        yield from islice(tar.read(), 2)


class _Picked:
    """Counts over all samples, and the first of them with some drawn at random (the same ones each time)."""

    def __init__(self, samples: Iterable[Sample]):
        self.rows = self.captions = 0
        self.samples: list[Sample] = []
        draw = random.Random(0)
        for sample in samples:
            if len(self.samples) <= PROBED:
                self.samples.append(sample)
            elif (place := draw.randint(1, self.rows)) <= PROBED:
                self.samples[place] = sample
            self.rows += 1
            self.captions += len(sample.captions)


def _counts(manifest: Manifest, picked: _Picked) -> Iterator[Finding]:
    whole = manifest.purpose == "evaluate"
    for count, expected, what in (
        (picked.rows, manifest.expected_rows, "rows"),
        (picked.captions, manifest.expected_captions, "captions"),
    ):
        compared = ", as expected" if count == expected else f"; {expected:,} are expected" if expected else ""
        if count or expected:
            yield Finding(not compared or count == expected or not whole, f"{count:,} {what}{compared}")


def _contents(source: Source, samples: list[Sample], *, strict: bool) -> Iterator[Finding]:
    """Open the samples' images and masks, and look for captions."""
    if source.classes:
        yield Finding(True, f"{len(source.classes)} classes")
    problems = []
    for sample in samples:
        try:
            source.image(sample.image)
            if sample.mask:
                source.mask(sample.mask)
        except (UnreadableImageError, UserError, OSError, SyntaxError, ValueError) as problem:
            problems.append(" ".join(str(problem).split()))
    readable = len(samples) - len(problems)
    first = f"; the first problem: {problems[0]}" if problems else ""
    kind = "images with masks" if any(sample.mask for sample in samples) else "images"
    yield Finding(
        readable == len(samples) if strict else readable > 0,
        f"{readable} of {len(samples)} {kind} looked at are readable{first}",
    )
    if tables := source.recaptions:
        for table in tables.files:
            next(read_captions(table, tables), None)
        joinable = sum(bool(getattr(sample, tables.field)) for sample in samples)
        names = ", ".join(tables.captions)
        yield Finding(joinable > 0, f"{joinable} of these have a {tables.field}, by which captions join: {names}")
    if source.captions:
        told = sum(bool(sample.captions) for sample in samples)
        yield Finding(
            told == len(samples) if strict else told > 0,
            f"{told} of these have a caption (captions are named {', '.join(source.captions)})",
        )
