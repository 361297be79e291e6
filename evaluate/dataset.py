"""An evaluation set as a run sees it: encoded once into a store of its own, embedded by the run's heads."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sail_align.evaluate.encoders import Encoders, RunError
from sail_align.extract import published
from sail_align.extract.encoders.base import require_same
from sail_align.extract.engine import extract
from sail_align.extract.errors import StoreExistsError, UserError
from sail_align.extract.features import FeatureArray
from sail_align.extract.files import canonical_json
from sail_align.extract.manifest import Manifest, Task
from sail_align.extract.sources import open_source
from sail_align.extract.sources.base import Part, Sample
from sail_align.extract.sources.descriptions import DemoSource
from sail_align.extract.status import Status
from sail_align.extract.store import Store

Embeddings = NDArray[np.float32]
HEAD_BATCH = 4096


class EvaluationSet:
    """One evaluation set and one run.

    A store's name depends on the folder of the data, or on the prompts: others are encoded beside. Images that change
    in place, under the same names, are not noticed: their features stay until the store's folder is removed.

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
        samples = [
            replace(sample, captions={name: text for name, text in sample.captions.items() if name in self.captions})
            for sample in self.source.samples()
        ]
        if not samples:
            raise UserError(f"{self.manifest.name} has no samples; correct its files or its split.")
        return samples

    def images(self) -> Embeddings:
        """Return the embeddings of all images, (N, E), rows of unit length.

        Raises:
            UserError: An image cannot be read.
            RunError: The run's head gives no finite numbers.
        """
        store = self._set_store
        features, _ = self._readable(store, store.image(), "image", allowed={Status.OK})
        return self._embed(self.run.model.encode_image, features)

    def texts(self, caption: str) -> tuple[Embeddings, NDArray[np.intp]]:
        """Return the embeddings of one caption, (M, E), and the row of each, (M,): a sample may lack the caption."""
        store = self._set_store
        features, status = self._readable(store, store.text(caption), caption, allowed={Status.OK, Status.MISSING})
        rows = np.flatnonzero(status == Status.OK)
        return self._embed(self.run.model.encode_text, features[rows]), rows

    def class_embeddings(self) -> Embeddings:
        """Return one embedding a class, (C, E): the mean over the templates' unit embeddings, of unit length."""
        named, classes = self.task.templates, self.source.classes
        templates = published.templates(named) if isinstance(named, str) else named
        if not classes:
            raise UserError(f"{self.manifest.name} names no classes; its source needs 'classes'.")
        as_published = isinstance(getattr(self.manifest.source, "classes", None), str)  # two of ImageNet's occur twice
        twice = [name for name in dict.fromkeys(classes) if classes.count(name) > 1]
        if twice and not as_published:
            raise UserError(f"{self.manifest.name} has two classes named {twice[0]!r}; give each its own name.")
        prompts = [
            Sample(key=f"{label}/{number}", image="", captions={"prompt": template.replace("{}", name)})
            for label, name in enumerate(classes)
            for number, template in enumerate(templates)
        ]
        told_apart = _short_digest([self.manifest.rows, [sample.captions["prompt"] for sample in prompts]])
        store = self._encoded("prompts", f"prompts-{told_apart}", prompts, ["prompt"], images=False)
        features, _ = self._readable(store, store.text("prompt"), "prompt", allowed={Status.OK})
        means_CE = self._embed(self.run.model.encode_text, features).reshape(len(classes), len(templates), -1).mean(1)
        return cast(Embeddings, means_CE / np.linalg.norm(means_CE, axis=1, keepdims=True))

    @cached_property
    def _set_store(self) -> Store:
        told_apart = _short_digest(str(self._root)) if self._root else ""
        return self._encoded("set", told_apart, self.samples, self.captions, images=True)

    def _encoded(
        self, name: str, told_apart: str, samples: list[Sample], captions: Sequence[str], *, images: bool
    ) -> Store:
        """Return the complete store of these samples, encoding what is not there yet."""
        image, text = (self.run.image if images else None), (self.run.text if captions else None)
        prints = [identity.spec.fingerprint[:8] for identity in (image, text) if identity]
        path = self._folder / f"{'-'.join(filter(None, [self.manifest.name, told_apart, *prints]))}.zarr"
        if not (path / "zarr.json").exists():
            with suppress(StoreExistsError):  # another process was quicker
                Store.create(
                    path,
                    dataset=self.manifest.name,
                    manifest=self.manifest.rows,
                    parts=[Part.of(samples)],
                    captions=captions,
                )
        store = Store.open(path)
        self._require_reusable(store, samples)
        arrays = store.arrays()
        if len(arrays) < images + len(captions) or not all(array.complete for array in arrays):
            extract(
                store,
                self.source,
                image=self.encoders.image if image else None,
                text=self.encoders.text if text else None,
                captions=captions,
                quiet=self.quiet,
            )
        self.stores[name] = store
        return store

    def _require_reusable(self, store: Store, samples: list[Sample]) -> None:
        """Refuse a store of other samples or of other encoders than this run's."""
        if store.attributes["manifest"] != self.manifest.rows or store.samples(0, store.rows) != samples:
            raise UserError(f"{store.path} holds other samples than {self.manifest.name} has now; remove that folder.")
        for array in store.arrays():
            expected = self.run.image if array.identity.spec.modality == "image" else self.run.text
            require_same(expected, array.identity, where=str(store.path))

    def _readable(
        self, store: Store, array: FeatureArray, what: str, allowed: set[Status]
    ) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Return features and statuses, or refuse: a score over part of a set is the score of another set."""
        features, status = array.read()
        bad = np.flatnonzero(~np.isin(status, list(allowed)))
        if len(bad) == 0:
            return features, status
        key = store.index(["key"])["key"][int(bad[0])].as_py()
        for shard in {int(row) // array.shard_rows for row in bad}:
            array.discard(shard)  # so that the next call reads them again
        raise UserError(
            f"{len(bad)} of {array.rows} rows of {self.manifest.name} have no usable {what}; the first is {key!r} "
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


def _short_digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()[:8]
