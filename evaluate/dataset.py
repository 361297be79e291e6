"""An evaluation set, encoded once into stores of its own and embedded by the heads of a run."""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sail_align.align.hub.embeddings import embed
from sail_align.evaluate.models import Encoders, RunError
from sail_align.extract.data import Part, Sample, Status
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.encoders.views import OWN, VIEWS, View
from sail_align.extract.errors import StoreExistsError, UserError
from sail_align.extract.executor.run import extract
from sail_align.extract.manifest import Manifest, TaskSettings
from sail_align.extract.sources import class_names
from sail_align.extract.sources.config import FilesConfig
from sail_align.extract.store.joined import StoredFeatures
from sail_align.extract.store.store import Store

Embeddings = NDArray[np.float32]
TEXT = "text"
"""Name of the only caption in a store of texts."""


@dataclass(frozen=True)
class Texts:
    """Captions: encoder features (M, D), embeddings (M, E), the row of the image of each (M,), and the texts."""

    features: NDArray[np.float16]
    embeddings: Embeddings
    rows: NDArray[np.intp]
    texts: list[str]


class ListedSet:
    """An evaluation set without any encoder: its samples, and the digest of what it lists.

    Args:
        manifest: Manifest with the purpose "evaluate".
        data_root: Folder of the manifest's files.
    """

    def __init__(self, manifest: Manifest, data_root: Path):
        self.task: TaskSettings = manifest.require_task()
        self.manifest = manifest
        self.source = manifest.open_source(data_root)

    @property
    def captions(self) -> tuple[str, ...]:
        """Names of the captions in use: those in the task settings, by default all of the source."""
        known = self.source.captions
        names = tuple(self.task.captions or known)
        for name in names:
            if name not in known:
                there = ", ".join(known) or "none"
                raise UserError(f"{self.manifest.name} has no caption {name!r}, only {there}. Correct task.captions.")
        return names

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples of the set, at least one, with the captions in use."""
        names = set(self.captions)
        samples = [
            replace(sample, captions={name: text for name, text in sample.captions.items() if name in names})
            for sample in self.source.samples()
        ]
        if not samples:
            raise UserError(f"{self.manifest.name} has no samples. Correct its files or its split.")
        if duplicate := _first_duplicate(sample.key for sample in samples):
            raise UserError(f"{self.manifest.name} has two samples with the key {duplicate!r}. List each once.")
        return samples

    def describe(self, masks: str) -> dict[str, Any]:
        """Return the digest and counts of the set for its record, and the counts that its manifest expects.

        The digest is the SHA-256 of classes, keys, captions, labels and names of masks, in order. Of pixels, it covers
        those of masks. Groups are listed if there are any, because they decide the intervals.

        Args:
            masks: Digest of the pixels of all masks. Empty if there are none.
        """
        listed = [
            [each.key, dict(each.captions), each.label, each.mask, *([each.group] if each.group else [])]
            for each in self.samples
        ]
        digest = digest_of([self.source.classes, listed])
        return {
            "digest": digest_of([digest, masks]) if masks else digest,
            "rows": len(self.samples),
            "expected_rows": self.manifest.expected_rows,
            "captions": sum(len(sample.captions) for sample in self.samples),
            "expected_captions": self.manifest.expected_captions,
            **({"left_out": dict(left_out)} if (left_out := self.source.left_out) else {}),
        }

    def groups(self, rows: NDArray[np.intp]) -> NDArray[np.intp] | None:
        """Return the number of each item's group, (items,), in the order in which they occur; None without groups.

        A sample without a group is a group of its own.

        Args:
            rows: Row of each item, (items,), or rows of the images of each pair, (items, 2).

        Raises:
            UserError: The images of a pair are of two groups, or all items are of one.
        """
        if not any(sample.group for sample in self.samples):
            return None
        names = [[self.samples[row].group for row in item] for item in rows.reshape(len(rows), -1).tolist()]
        for number, (first, *others) in enumerate(names):
            if any(other != first for other in others):
                raise UserError(
                    f"{self.manifest.name} is invalid: got the groups {', '.join(map(repr, names[number]))} for the "
                    f"images of pair {number + 1}, expected one. Correct its source's 'group'."
                )
        numbers: dict[str | int, int] = {}
        found = [numbers.setdefault(name or place, len(numbers)) for place, (name, *_) in enumerate(names)]
        if len(numbers) < 2:
            raise UserError(
                f"{self.manifest.name} is invalid: got the group {names[0][0]!r} for all its items, expected at least "
                "two. Correct or remove its source's 'group'."
            )
        return np.array(found)

    def mask_digest(self) -> str:
        """Return the digest of the pixels of all masks, which are read. Empty if there are none."""
        digest = hashlib.sha256()
        for sample in self.samples:
            if not sample.mask:
                return ""
            digest.update(mask_bytes(self.source.mask(sample.mask)))
        return digest.hexdigest()


class EvaluationSet(ListedSet):
    """One evaluation set, for one run.

    Images and texts are encoded into stores whose names depend on the encoder and on the folder of the images, or on
    the texts. All runs with the same encoder share them. Images that are changed in place under the same name are not
    noticed: their features are kept until the store is removed.

    Args:
        manifest: Manifest with the purpose "evaluate".
        data_root: Folder of the manifest's files.
        encoders: Encoders of the run.
        folder: Folder of the stores of evaluation sets.
        quiet: Show no progress bars.
    """

    def __init__(self, manifest: Manifest, data_root: Path, encoders: Encoders, folder: Path, quiet: bool = False):
        super().__init__(manifest, data_root)
        self.encoders = encoders
        self.run = encoders.run
        self.stores: dict[str, Store] = {}
        self.encoding_seconds = 0.0
        self._folder = folder
        self._root = (data_root / manifest.source.root).resolve() if isinstance(manifest.source, FilesConfig) else None
        self.quiet = quiet

    @property
    def class_parts(self) -> list[str]:
        """Origin of class names and prompts, as parts of a protocol id. Lists of no library have a digest."""
        classes, templates = self.source.classes, self.task.templates
        named = getattr(self.manifest.source, "classes", None)
        origin = named if isinstance(named, str) else "listed" if named else "source"
        is_published = isinstance(named, str) and named.startswith(class_names.LIBRARIES)
        digest = "" if is_published else f":{digest_of(classes)[:8]}"
        if isinstance(templates, list):
            several = f"listed:{len(templates)}:{digest_of(templates)[:8]}"
            templates = several if len(templates) > 1 else _hyphenate(templates[0])
        return [f"classes={origin}:{len(classes)}{digest}", f"templates={templates}"]

    @property
    def caption_parts(self) -> list[str]:
        """Captions in use, and the prompt that they are put into, as parts of a protocol id."""
        first = getattr(self.manifest.source, "captions", None)
        names = "+".join(self.task.captions or []) or (f"first-{first}" if isinstance(first, int) else "all")
        prompt = self.task.prompt
        return [f"captions={names}", *([f"prompt={_hyphenate(prompt)}"] if prompt != "{}" else [])]

    def image_features(self, view: View = OWN) -> NDArray[np.float16]:
        """Return the encoder features of a view of all images, (N, D), from a store of that view.

        Raises:
            UserError: An image cannot be read.
        """
        folder = f"-{digest_of(str(self._root))[:8]}" if self._root else ""
        name = f"{self.manifest.name}{folder}"
        bare = [replace(sample, captions={}, group="") for sample in self.samples]  # groups do not change features
        rows = self.manifest.rows
        rows["source"].pop("group", None)
        what = "images"
        if view != OWN:
            what, name, rows = f"images, {view.name}", f"{name}-{view.name}", {**rows, "view": view.to_json()}
        return self._encode(what, name, self.manifest.name, rows, bare, self.run.image, view)

    def text_features(self, what: str, texts: dict[str, str], name: str) -> NDArray[np.float16]:
        """Return the encoder features of texts by key, (M, D). `what` is their role, `name` names their store."""
        listed = [Sample(key=key, image="", captions={TEXT: text}) for key, text in texts.items()]
        digest = digest_of(list(texts.items()))[:8]
        return self._encode(what, f"{name}-{digest}", name, {"texts": digest}, listed, self.run.text)

    def images(self, *, corrected: bool = False) -> Embeddings:
        """Return the embeddings of all images, (N, E), with rows of unit length.

        With the task's `views`, this is the mean of the embeddings of the views, of unit length again.

        Args:
            corrected: Return vectors (N, E + 2) of `AlignmentModel.corrected_image` instead, or their mean over views.

        Raises:
            UserError: An image cannot be read, or `corrected` is set and the run has no correction.
            RunError: The embeddings are not finite.
        """
        encode = self.run.model.corrected_image if corrected else self.run.model.encode_image
        if not self.task.views:
            return self._embed(encode, self.image_features())
        views = VIEWS[self.task.views]
        mean_NE = np.mean([self._embed(encode, self.image_features(view)) for view in views], axis=0)
        return cast(Embeddings, mean_NE if corrected else mean_NE / np.linalg.norm(mean_NE, axis=1, keepdims=True))

    def texts(self, *, corrected: bool = False) -> Texts:
        """Return the captions in use: all first captions, then all second ones, and so on. A sample may lack some.

        Args:
            corrected: Give vectors (M, E + 2) of `AlignmentModel.corrected_text` instead of embeddings.
        """
        listed = [
            (row, name, sample.captions[name])
            for name in self.captions
            for row, sample in enumerate(self.samples)
            if name in sample.captions
        ]
        keyed = {f"{self.samples[row].key} {name}": self.task.prompt.replace("{}", text) for row, name, text in listed}
        features = self.text_features("captions", keyed, f"{self.manifest.name}-captions")
        rows_M = np.array([row for row, _, _ in listed], dtype=np.intp)
        model = self.run.model
        embeddings_ME = self._embed(model.corrected_text if corrected else model.encode_text, features)
        return Texts(features, embeddings_ME, rows_M, [text for _, _, text in listed])

    def class_embeddings(self) -> Embeddings:
        """Return the class embeddings, (C, E): the mean of the unit embeddings of the prompts, of unit length."""
        named, classes = self.task.templates, self.source.classes
        templates = class_names.templates(named) if isinstance(named, str) else named
        if not classes:
            raise UserError(f"{self.manifest.name} names no classes. Give its source 'classes'.")
        published = isinstance(getattr(self.manifest.source, "classes", None), str)  # ImageNet's list repeats two names
        if not published and (duplicate := _first_duplicate(classes)):
            raise UserError(f"{self.manifest.name} has two classes named {duplicate!r}. Give each its own name.")
        prompts = {
            f"{label}/{number}": template.replace("{}", name)
            for label, name in enumerate(classes)
            for number, template in enumerate(templates)
        }
        features = self.text_features("prompts", prompts, "prompts")
        means_CE = self._embed(self.run.model.encode_text, features).reshape(len(classes), len(templates), -1).mean(1)
        return cast(Embeddings, means_CE / np.linalg.norm(means_CE, axis=1, keepdims=True))

    def _encode(
        self,
        what: str,
        name: str,
        dataset: str,
        rows: dict[str, Any],
        samples: list[Sample],
        identity: Identity,
        view: View = OWN,
    ) -> NDArray[np.float16]:
        """Return the features of the images or texts of samples from their store, after encoding what is missing."""
        path = self._folder / f"{name}-{identity.spec.fingerprint[:8]}.zarr"
        of_images = identity.spec.modality == "image"
        captions = [] if of_images else [TEXT]
        if not (path / "zarr.json").exists():
            with suppress(StoreExistsError):  # another process was faster
                Store.create(path, dataset=dataset, manifest=rows, parts=[Part.of(samples)], captions=captions)
        try:
            store = Store.open(path)
            same = store.attributes["manifest"] == rows and store.samples(0, store.rows) == samples
            arrays = store.arrays()
        except (UserError, OSError, ValueError, KeyError) as problem:  # what damage to any file may raise
            reason = " ".join(str(problem).split()).rstrip(".")
            raise UserError(f"{path} cannot be used ({reason}). Remove that folder.") from problem
        if not same:
            raise UserError(f"{path} has other samples than {self.manifest.name} now. Remove that folder.")
        for array in arrays:
            found = next((each for each in identity.singles if each.spec.id == array.identity.spec.id), identity)
            found.check_matches(array.identity, where=str(path))
            for shard in [shard for shard in array.markers if array.changed(shard)]:
                array.discard(shard)  # damaged: it is encoded again
        if len(arrays) < len(identity.singles) or not all(array.complete for array in arrays):
            started = time.monotonic()
            image = self.encoders.image if of_images else None
            text = None if of_images else self.encoders.text
            with image.through(view) if image and view != OWN else nullcontext():
                extract(store, self.source, image=image, text=text, captions=captions, quiet=self.quiet)
            self.encoding_seconds += time.monotonic() - started
        else:
            with suppress(OSError):  # a folder that is shared and read-only
                store.tidy()
        self.stores[what] = store
        encoded = store.of(identity, *captions)
        if encoded is None:
            raise UserError(f"{path} has no features of {identity.spec.id}. Remove that folder.")
        return self._read_all(store, encoded)

    def _read_all(self, store: Store, array: StoredFeatures) -> NDArray[np.float16]:
        """Return the features of all rows. A score over part of a set would be the score of another set."""
        features, status = array.read()
        bad = np.flatnonzero(status != Status.OK)
        if len(bad) == 0:
            return features
        key = store.index(["key"])["key"][int(bad[0])].as_py()
        for shard in {int(row) // array.shard_rows for row in bad}:
            for part in array.parts:
                part.discard(shard)  # so that the next call encodes them again
        what = "image" if array.identity.spec.modality == "image" else "text"
        raise UserError(
            f"{len(bad)} of {array.rows} {what}s of {self.manifest.name} cannot be used. The first is {key!r} "
            f"({Status(int(status[bad[0]])).label}). Correct the data and run again."
        )

    def _embed(self, encode: Callable[[Tensor], Tensor], features: NDArray[np.float16]) -> Embeddings:
        embeddings = embed(encode, features, self.encoders.device)
        if not np.isfinite(embeddings).all():
            raise RunError.diverged(self.run)
        return embeddings


def mask_bytes(mask: NDArray[np.uint8]) -> bytes:
    """Return what the digest of masks covers of one: its shape and its pixels."""
    return repr(mask.shape).encode() + mask.tobytes()


def _hyphenate(text: str) -> str:
    """Return a prompt with hyphens for spaces, followed by a digest if another prompt would read the same."""
    hyphenated = re.sub(r"[\s/]", "-", text)
    return hyphenated if hyphenated.replace("-", " ") == text else f"{hyphenated}:{digest_of(text)[:8]}"


def _first_duplicate(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value. Names of files in it need not be valid Unicode."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
