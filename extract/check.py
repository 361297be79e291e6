"""Check whether a data set is present and complete."""

import os
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sail_align.extract.data import CaptionTables, Sample, Source, UnreadableImageError, describe_left_out
from sail_align.extract.download import Downloaded
from sail_align.extract.errors import UserError
from sail_align.extract.manifest import Manifest
from sail_align.extract.sources.class_names import templates
from sail_align.extract.sources.images import FolderSource
from sail_align.extract.sources.table_files import read_captions
from sail_align.extract.sources.webdataset import WebDatasetConfig
from sail_align.extract.store.index import text_hashes
from sail_align.extract.system.validation import shortened

PROBED_SAMPLES = 32
"""Number of samples, besides the first, whose image, mask and captions are checked."""
PROBED_TARS = 16
"""If there are more tars than this, only the first and as many others are read."""


Finding = tuple[bool, str]
"""Whether something matches the manifest, and a text about it."""


def check(manifest: Manifest, data_root: Path) -> Iterator[Finding]:
    """Yield which files are present and, if none is missing, whether their content matches the manifest.

    An evaluation set must be complete. A downloaded training set has lost some images, so fewer rows than expected and
    single unreadable images count as good there.
    """
    requirements = manifest.requirements(data_root)
    for name, present in requirements.items():
        yield present, name if present else f"{name} is missing"
    if all(requirements.values()):
        try:
            yield from _check_content(manifest, data_root)
        except (UserError, OSError) as problem:
            yield False, " ".join(str(problem).split())


def _check_content(manifest: Manifest, data_root: Path) -> Iterator[Finding]:
    if manifest.task and isinstance(manifest.task.templates, str):
        found = templates(manifest.task.templates)
        yield True, f"{len(found)} templates ({manifest.task.templates})"
    source = manifest.open_source(data_root)
    if manifest.download:
        downloaded = Downloaded.read(data_root / manifest.download.folder)
        if downloaded.listed:
            yield downloaded.tried >= downloaded.listed, f"download: {downloaded}"
    strict = manifest.purpose == "evaluate"
    parts = source.parts()
    has_tars = isinstance(manifest.source, WebDatasetConfig) and manifest.purpose == "train"
    if has_tars and len(parts) > PROBED_TARS:
        some = [parts[0], *random.Random(0).sample(list(parts[1:]), PROBED_TARS)]  # reading all of them takes hours
        samples, rows = _Probe.of(chain.from_iterable(islice(tar.read(), 2) for tar in some)).samples, None
        yield True, f"{len(parts):,} tars, of which some are checked; `run` counts their rows"
    else:
        probe = _Probe.of(source.samples(), source if strict else None)
        samples, rows = probe.samples, probe.rows
        yield from _check_counts(manifest, "rows", probe.rows, manifest.expected_rows)
        yield from _check_counts(manifest, "captions", probe.captions, manifest.expected_captions)
        if strict and source.has_groups:
            several = len(probe.groups) > 1
            yield several, f"{len(probe.groups):,} groups" if several else "one group; intervals need at least two"
        for fault, (count, first) in probe.faults.items():
            yield False, f"{count:,} rows have no {fault}; the first is {shortened(first)}"
        if repeated := probe.repeated_key(source):
            yield False, f"key {shortened(repeated)} occurs more than once; make the keys unique"
    if left_out := describe_left_out(source.left_out):
        yield True, left_out
    if source.classes:
        yield True, f"{len(source.classes)} classes"
    yield _check_images(source, samples, strict, rows)
    yield from _check_captions(source, samples, strict)


@dataclass
class _Probe:
    """Some samples of a source, and what is counted of all of them.

    Attributes:
        samples: The first sample and a random selection, the same each time.
        rows: Number of samples.
        captions: Number of captions.
        faults: What samples lack: of how many, and the key of the first one.
        hashes: 64-bit hash of each key.
        groups: Names of the groups, and rows of samples without one, if the samples must be complete.
    """

    samples: list[Sample] = field(default_factory=list)
    rows: int = 0
    captions: int = 0
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)
    hashes: "array[int]" = field(default_factory=lambda: array("q"))
    groups: set[str | int] = field(default_factory=set)

    @classmethod
    def of(cls, samples: Iterable[Sample], complete: Source | None = None) -> "_Probe":
        """Read samples.

        Args:
            samples: The samples.
            complete: Their source, if each must have a caption and an image. Only images in a folder are looked for.
        """
        folder = complete.folder if isinstance(complete, FolderSource) else None
        has_captions = bool(complete and complete.captions)
        probe, draw = cls(), random.Random(0)
        for sample in samples:
            if len(probe.samples) <= PROBED_SAMPLES:
                probe.samples.append(sample)
            elif (place := draw.randint(1, probe.rows)) <= PROBED_SAMPLES:
                probe.samples[place] = sample
            probe.rows += 1
            probe.captions += len(sample.captions)
            probe.hashes.append(hash(sample.key))
            if complete and complete.has_groups:
                probe.groups.add(sample.group or probe.rows)
            if folder is not None and not os.path.isfile(folder / sample.image):
                probe._count("image file", sample)
            if has_captions and not sample.captions:
                probe._count("caption", sample)
        return probe

    def repeated_key(self, source: Source) -> str | None:
        """Return a key that occurs more than once; None if there is none."""
        hashes = np.sort(np.array(self.hashes, dtype=np.int64))
        repeated = {*hashes[1:][hashes[1:] == hashes[:-1]].tolist()}
        return next((each.key for each in source.samples() if hash(each.key) in repeated), None) if repeated else None

    def _count(self, fault: str, sample: Sample) -> None:
        count, first = self.faults.get(fault, (0, sample.key))
        self.faults[fault] = count + 1, first


def _check_counts(manifest: Manifest, name: str, count: int, expected: int | None) -> Iterator[Finding]:
    if expected is None:
        if count:
            yield True, f"{count:,} {name}"
    elif count == expected:
        yield True, f"{count:,} {name}, as expected"
    else:
        yield manifest.purpose == "train", f"{count:,} {name}; expected {expected:,}"


def _check_images(source: Source, samples: list[Sample], strict: bool, rows: int | None) -> Finding:
    """Open the images of some samples, of `rows` in total, None if that is not known."""
    problems = []
    for sample in samples:
        try:
            source.image(sample.image)
            if sample.mask:
                source.mask(sample.mask)
        except (UnreadableImageError, UserError, OSError) as problem:
            problems.append(" ".join(str(problem).split()))
    readable = len(samples) - len(problems)
    kind = "images with masks" if any(sample.mask for sample in samples) else "images"
    good = readable > 0 and not (strict and problems)
    text = f"{readable} of {len(samples)} checked {kind} are readable"
    if rows != len(samples):
        text += f" (a sample of {f'{rows:,} rows' if rows else 'some tars'}; `run` reads all)"
    if problems:
        text += f"; first problem: {problems[0]}"
    if problems and good:
        text += "; `run` counts such images and leaves them without features"
    return good, text


def _any_joins(source: Source, tables: CaptionTables) -> bool:
    """Return whether any sample finds its captions, reading samples until one does."""
    batches = (rows[tables.column].to_pylist() for file in tables.files for rows in read_captions(file, tables))
    hashes = np.unique(np.concatenate([text_hashes([]), *map(text_hashes, batches)]))
    names = (getattr(sample, tables.field) for sample in source.samples())
    while group := list(islice(names, 8_192)):
        if np.isin(text_hashes([name for name in group if name]), hashes).any():
            return True
    return False


def _check_captions(source: Source, samples: list[Sample], strict: bool) -> Iterator[Finding]:
    if tables := source.recaptions:
        wanted = [getattr(sample, tables.field) for sample in samples]
        found: set[str] = set()
        for table in tables.files:
            for rows in read_captions(table, tables):  # to the end, because `run` stops at any fault
                matches = rows[tables.column].filter(pc.is_in(rows[tables.column], pa.array(wanted, pa.string())))
                found.update(matches.to_pylist())
        joined = sum(value in found for value in wanted if value)
        names = ", ".join(tables.captions)
        text = f"{joined} of these find their {tables.field} in the tables of captions: {names}"
        elsewhere = not joined and not strict and _any_joins(source, tables)
        yield joined > 0 or elsewhere, f"{text}; others do" if elsewhere else text
    if source.captions:
        captioned = sum(bool(sample.captions) for sample in samples)
        good = captioned == len(samples) if strict else captioned > 0
        yield good, f"{captioned} of these have a caption (named {', '.join(source.captions)})"
