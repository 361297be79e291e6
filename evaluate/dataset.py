"""An evaluation set as a run sees it: encoded once into a store of its own, embedded by the run's heads."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sail_align.evaluate.models import Encoders, RunError
from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.encoders.base import Identity, require_same
from sail_align.extract.errors import StoreExistsError, UserError
from sail_align.extract.executor.run import extract
from sail_align.extract.manifest import Manifest, Task
from sail_align.extract.schema import DemoSource
from sail_align.extract.sources import class_names as published
from sail_align.extract.sources import open_source
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.store import Store

Embeddings = NDArray[np.float32]
HEAD_BATCH = 4096
TEXT = "text"
"""The one caption of a store of texts."""


@dataclass(frozen=True)
class Texts:
    """Captions: features of the encoder, (M, D), embeddings, (M, E), the row of each, (M,), and what each says."""

    features: NDArray[np.float16]
    embeddings: Embeddings
    rows: NDArray[np.intp]
    said: list[str]


class EvaluationSet:
    """One evaluation set and one run.

    Images and texts are encoded into stores of their own, whose names depend on the encoder and on the folder of the
    images, or on the texts: others are encoded beside, and all runs with the same encoder share them. Images that
    change in place, under the same names, are not noticed: their features stay until the store's folder is removed.

    Args:
        manifest: Its purpose is to evaluate.
        data_root: Where the manifest's files are.
        encoders: The run's encoders.
        folder: Where the stores of evaluation sets are kept, shared by all runs.
        quiet: No progress bars.
    """

    def __init__(self, manifest: Manifest, data_root: Path, encoders: Encoders, folder: Path, quiet: bool = False):
        if manifest.task is None:
            raise UserError(f"Manifest {manifest.name!r} is for training; give one with purpose 'evaluate'.")
        self.task: Task = manifest.task
        self.manifest = manifest
        self.encoders = encoders
        self.run = encoders.run
        self.source = open_source(manifest, data_root)
        self.stores: dict[str, Store] = {}
        self.encoding_seconds = 0.0
        self._folder = folder
        self._root = None if isinstance(manifest.source, DemoSource) else (data_root / manifest.source.root).resolve()
        self.quiet = quiet

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions that the task names, by default all of the source's."""
        names = tuple(self.task.captions or self.source.captions)
        for name in names:
            if name not in self.source.captions:
                there = ", ".join(self.source.captions) or "none"
                raise UserError(
                    f"{self.manifest.name} has no caption {name!r} (there: {there}); correct task.captions."
                )
        return names

    @cached_property
    def samples(self) -> list[Sample]:
        """The set's samples, one at least, with the captions that the task uses."""
        names = set(self.captions)
        samples = [
            replace(sample, captions={name: text for name, text in sample.captions.items() if name in names})
            for sample in self.source.samples()
        ]
        if not samples:
            raise UserError(f"{self.manifest.name} has no samples; correct its files or its split.")
        if twice := _first_twice(sample.key for sample in samples):
            raise UserError(f"{self.manifest.name} has two samples of the key {twice!r}; list each once.")
        return samples

    @property
    def digest(self) -> str:
        """SHA-256 of what the set lists, in order: classes, keys, captions, labels and masks. Not of pixels."""
        listed = [[each.key, dict(each.captions), each.label, each.mask] for each in self.samples]
        return digest_of([self.source.classes, listed])

    def image_features(self) -> NDArray[np.float16]:
        """Return the encoder's features of all images, (N, D). Raises `UserError` where an image cannot be read."""
        told_apart = digest_of(str(self._root))[:8] if self._root else ""
        name = "-".join(filter(None, [self.manifest.name, told_apart]))
        bare = [replace(sample, captions={}) for sample in self.samples]
        store = self._encoded("images", name, self.manifest.name, self.manifest.rows, bare, self.run.image)
        return self._readable(store, store.image())

    def text_features(self, what: str, texts: dict[str, str], name: str) -> NDArray[np.float16]:
        """Return the encoder's features of texts by key, (M, D); `what` they are, and the `name` of their store."""
        listed = [Sample(key=key, image="", captions={TEXT: text}) for key, text in texts.items()]
        digest = digest_of(list(texts.items()))[:8]
        store = self._encoded(what, f"{name}-{digest}", name, {"texts": digest}, listed, self.run.text)
        return self._readable(store, store.text(TEXT))

    def images(self) -> Embeddings:
        """Return the embeddings of all images, (N, E), rows of unit length.

        Raises:
            UserError: An image cannot be read.
            RunError: The run's head gives no finite numbers.
        """
        return self._embed(self.run.model.encode_image, self.image_features())

    def texts(self) -> Texts:
        """Return the task's captions, all first ones, then all second ones …; a sample may lack some."""
        said = [
            (row, name, sample.captions[name])
            for name in self.captions
            for row, sample in enumerate(self.samples)
            if name in sample.captions
        ]
        if not said:
            none = np.empty((0, 0), dtype=np.float32)
            return Texts(none.astype(np.float16), none, np.empty(0, dtype=np.intp), [])
        keyed = {f"{self.samples[row].key} {name}": self.task.prompt.replace("{}", text) for row, name, text in said}
        features = self.text_features("captions", keyed, f"{self.manifest.name}-captions")
        rows_M = np.array([row for row, _, _ in said], dtype=np.intp)
        embeddings_ME = self._embed(self.run.model.encode_text, features)
        return Texts(features, embeddings_ME, rows_M, [text for _, _, text in said])

    def class_embeddings(self) -> Embeddings:
        """Return one embedding a class, (C, E): the mean over the templates' unit embeddings, of unit length."""
        named, classes = self.task.templates, self.source.classes
        templates = published.templates(named) if isinstance(named, str) else named
        if not classes:
            raise UserError(f"{self.manifest.name} names no classes; its source needs 'classes'.")
        listed = isinstance(getattr(self.manifest.source, "classes", None), str)  # ImageNet's list has two names twice
        if not listed and (twice := _first_twice(classes)):
            raise UserError(f"{self.manifest.name} has two classes named {twice!r}; give each its own name.")
        prompts = {
            f"{label}/{number}": template.replace("{}", name)
            for label, name in enumerate(classes)
            for number, template in enumerate(templates)
        }
        features = self.text_features("prompts", prompts, "prompts")
        means_CE = self._embed(self.run.model.encode_text, features).reshape(len(classes), len(templates), -1).mean(1)
        return cast(Embeddings, means_CE / np.linalg.norm(means_CE, axis=1, keepdims=True))

    def _encoded(
        self, what: str, name: str, dataset: str, rows: dict[str, Any], samples: list[Sample], identity: Identity
    ) -> Store:
        """Return the complete store of these samples' images or texts, encoding what is not there yet."""
        path = self._folder / f"{name}-{identity.spec.fingerprint[:8]}.zarr"
        of_images = identity.spec.modality == "image"
        captions = [] if of_images else [TEXT]
        if not (path / "zarr.json").exists():
            with suppress(StoreExistsError):  # another process was quicker
                Store.create(path, dataset=dataset, manifest=rows, parts=[Part.of(samples)], captions=captions)
        try:
            store = Store.open(path)
            same = store.attributes["manifest"] == rows and store.samples(0, store.rows) == samples
            arrays = store.arrays()
        except (UserError, OSError, ValueError, KeyError) as problem:  # what damage may lead to, wherever it is
            reason = " ".join(str(problem).split()).rstrip(".")
            raise UserError(f"{path} cannot be used ({reason}); remove that folder.") from problem
        if not same:
            raise UserError(f"{path} holds other samples than {self.manifest.name} has now; remove that folder.")
        for array in arrays:
            require_same(identity, array.identity, where=str(path))
            for shard in [shard for shard in array.markers if array.changed(shard)]:
                array.discard(shard)  # not what was committed: it is encoded again
        if not arrays or not all(array.complete for array in arrays):
            started = time.monotonic()
            image = self.encoders.image if of_images else None
            text = None if of_images else self.encoders.text
            extract(store, self.source, image=image, text=text, captions=captions, quiet=self.quiet)
            self.encoding_seconds += time.monotonic() - started
        self.stores[what] = store
        return store

    def _readable(self, store: Store, array: FeatureArray) -> NDArray[np.float16]:
        """Return features, or refuse: a score over part of a set is the score of another set."""
        features, status = array.read()
        bad = np.flatnonzero(status != Status.OK)
        if len(bad) == 0:
            return features
        key = store.index(["key"])["key"][int(bad[0])].as_py()
        for shard in {int(row) // array.shard_rows for row in bad}:
            array.discard(shard)  # so that the next call reads them again
        what = "image" if array.identity.spec.modality == "image" else "text"
        raise UserError(
            f"{len(bad)} of {array.rows} {what}s of {self.manifest.name} cannot be used; the first is {key!r} "
            f"({Status(int(status[bad[0]])).label}); mend the data and run again."
        )

    def _embed(self, encode: Callable[[Tensor], Tensor], features: NDArray[np.float16]) -> Embeddings:
        with torch.inference_mode():
            batches = torch.split(torch.from_numpy(features), HEAD_BATCH)
            parts = [encode(batch.to(self.encoders.device, torch.float32)).float().cpu() for batch in batches]
        embeddings = cast(Embeddings, torch.cat(parts).numpy())
        if not np.isfinite(embeddings).all():
            raise RunError(f"The heads of {self.run.path} give NaN or infinity; its training has diverged.")
        return embeddings


def _first_twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value; names of files need not be valid Unicode."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
