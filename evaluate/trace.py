"""The chain from the scores of a run back to its data: what each file records of the next one, and what is there now.

scores.json → outcomes, evaluation stores and sets; scores.json → checkpoint → weights and settings → training stores →
their indices, manifests and files. Nothing at a URL is opened.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sail_align.align.runs.checkpoint import Checkpoint
from sail_align.align.runs.folder import CONFIG, EXPORT_AGAIN, RunFolder, read_json, record_digest, run_digest
from sail_align.evaluate.dataset import ListedSet
from sail_align.evaluate.models import model_digest
from sail_align.evaluate.results.scores import REMEDY, Record, RunScores
from sail_align.evaluate.tasks.task import all_tasks
from sail_align.extract.data import Part, UnreadableImageError
from sail_align.extract.encoders.identity import Identity
from sail_align.extract.errors import UserError, listing
from sail_align.extract.exchange.record import read_record
from sail_align.extract.manifest import Manifest
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.index import IndexRecord, Stamp
from sail_align.extract.store.store import INDEX, Store
from sail_align.extract.system.difference import describe_difference
from sail_align.extract.system.files import file_digest

SHOWN = 12
"""Digits of a digest that a line shows."""

_FAULTS = (UserError, UnreadableImageError, OSError, ValueError, LookupError, TypeError, AttributeError)
"""Errors of reading a file whose content is not what was written."""

Content = dict[str, Any]
Manifests = Mapping[str, tuple[Manifest, Path]]
"""Manifests with their data roots, by name."""


class State(StrEnum):
    """Result of comparing what is recorded with what is there."""

    OK = "ok"
    CHANGED = "changed"
    ABSENT = "not here"
    UNKNOWN = "not known"
    """An older version recorded nothing to compare with, or the comparison would have to read all samples."""


@dataclass(frozen=True)
class Link:
    """One link of the chain: its state, its name, and what is recorded and found."""

    state: State
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.state:<9}  {self.name}: {self.detail}"

    @classmethod
    def of(cls, name: str, recorded: object, now: object, note: str = "") -> "Link":
        """Return the link for a recorded digest and the present one, which is None if there is no such file."""
        note = note and f"; {note}"
        if not isinstance(recorded, str) or not recorded:
            return cls(State.UNKNOWN, name, f"an older version recorded no digest{note}")
        if now is None:
            return cls(State.ABSENT, name, f"recorded {recorded[:SHOWN]}{note}")
        if recorded != now:
            return cls(State.CHANGED, name, f"recorded {recorded[:SHOWN]}, now {str(now)[:SHOWN]}{note}")
        return cls(State.OK, name, f"{recorded[:SHOWN]}{note}")


def trace(path: Path, manifests: Manifests) -> Iterator[Link]:
    """Yield the links from the scores of a run to its data.

    Args:
        path: A run, a checkpoint, even if removed since, an exported folder, or an OpenCLIP model in runs/.
        manifests: The manifests whose files are compared with what stores and scores record.

    Raises:
        UserError: The path has no scores, or scores of another schema.
    """
    folder = RunFolder(path)
    scores = yield from _scores(folder)
    content: Content = scores.content if scores else {}
    record = (yield from _guard("checkpoint", _checkpoint(folder, content))) or _settings_alone(folder)
    yield from _guard("encoders", _encoders(record, content))
    yield from _guard("settings", _training(record.get("settings", {}), manifests))
    for each in scores.scored if scores else []:
        yield from _guard(each.name, _evaluation(path, each, content, manifests))


def _guard(name: str, links: Generator[Link, None, Content | None]) -> Generator[Link, None, Content | None]:
    """Yield links, and a changed one if damaged content ends them."""
    try:
        return (yield from links)
    except _FAULTS as problem:
        reason = str(problem) if isinstance(problem, UserError) else f"its content is damaged ({problem!r})"
        yield Link(State.CHANGED, name, " ".join(reason.split()))
        return None


def _scores(folder: RunFolder) -> Generator[Link, None, RunScores | None]:
    file = folder.scores / "scores.json"
    try:
        scores = RunScores.read(folder.path)
        digest = read_json(file, REMEDY).get("digest")
    except UserError as problem:
        if "is damaged" not in str(problem):
            raise
        yield Link(State.CHANGED, str(file), str(problem))
        return None
    yield Link.of(str(file), digest, digest, f"sets: {len(scores.scored)}")  # `read` has compared it
    return scores


def _checkpoint(folder: RunFolder, content: Content) -> Generator[Link, None, Content | None]:
    """Yield the links to what was scored. Return its record: settings and both encoders."""
    digest = content.get("run", {}).get("digest")
    if folder.is_export:
        return (yield from _export(folder.path, digest))
    settings = (yield from _guard(str(folder.path / "settings.json"), _settings(folder))) or {}
    if "model" in settings:
        towers = read_json(folder.path / "encoders.json", f"Remove {folder.path}.")
        identities = [Identity.from_json(towers[side]) for side in ("image", "text")]
        yield Link.of(f"model {settings['model']}", digest or model_digest(*identities), model_digest(*identities))
        return {**towers, "settings": settings}
    if folder.is_run:
        return (yield from _run(folder, settings, digest, content.get("run", {}).get("unfinished")))
    return (yield from _named_checkpoint(folder, digest))


def _export(path: Path, digest: str | None) -> Generator[Link, None, Content]:
    record = read_json(path / CONFIG, EXPORT_AGAIN)
    yield Link.of(str(path / CONFIG), record.get("digest"), record_digest(record))
    yield Link.of("exported checkpoint", digest or record.get("run_digest"), record.get("run_digest"))
    yield _weights(path, record)
    return record


def _named_checkpoint(folder: RunFolder, digest: str | None) -> Generator[Link, None, Content | None]:
    """Yield the links of a checkpoint that has its own scores, and of the copy of its record beside them."""
    record: Content | None = None
    copy = folder.scores / "checkpoint.json"
    if copy.is_file():
        record = read_json(copy, REMEDY)
        yield Link.of(str(copy), record.get("digest"), record_digest(record))
        is_of = record.get("run_digest", record.get("digest"))  # of an export, or of a checkpoint
        yield Link.of("scored checkpoint", digest or is_of, is_of)
    if not folder.is_checkpoint:
        yield Link.of(f"checkpoint {folder.path}", digest or "unknown", None)
        return record
    saved = Checkpoint.read(folder.path)
    if saved:
        found = saved.record["digest"]
        yield Link.of(f"checkpoint {folder.path}", digest or found, found, f"step {saved.step:,}")
        yield _weights(folder.path, saved.record)
        return saved.record
    return record


def _settings(folder: RunFolder) -> Generator[Link, None, Content | None]:
    """Read the settings of a run; there is no link to yield."""
    yield from ()
    return folder.settings() if folder.is_run else None


def _run(
    folder: RunFolder, settings: Content, digest: str | None, unfinished: str | None
) -> Generator[Link, None, Content | None]:
    """Yield the links of a run's checkpoint, weights, log and settings."""
    saved = _scored_checkpoint(folder.path, digest)
    if saved is None:
        yield Link.of("checkpoint", digest or "unknown", None)
        return None
    found = saved.record["digest"]
    name = f"checkpoint {saved.folder}"
    if unfinished and digest != found:
        yield Link.of("scored checkpoint", digest, None, f"training has replaced it by step {saved.step:,}")
    else:
        yield Link.of(name, digest or found, found, f"step {saved.step:,}")
        yield _weights(saved.folder, saved.record)
    finished, logged = folder.finished, saved.record.get("log_sha256")
    if finished:
        yield Link.of(str(folder.metrics), finished["metrics_sha256"], file_digest(folder.metrics))
    elif logged and saved.finished:
        yield Link.of(str(folder.metrics), logged, file_digest(folder.metrics))
        yield Link(State.ABSENT, str(folder.path / "finished.json"), "the run had ended; moved or removed")
    if settings:
        file = str(folder.path / "settings.json")
        yield Link.of(file, run_digest(saved.record["settings"]), run_digest(settings))
    return saved.record


def _scored_checkpoint(run: Path, digest: str | None) -> Checkpoint | None:
    """Return the checkpoint of a run with this digest; without one, that which the run stands for.

    Earlier versions scored the last checkpoint of a run. Now it is the best one.
    """
    there = [saved for saved in (Checkpoint.best(run), Checkpoint.read(run)) if saved]
    return next((saved for saved in there if saved.record["digest"] == digest), there[0] if there else None)


def _weights(folder: Path, record: Content) -> Link:
    file = folder / "model.safetensors"
    return Link.of(f"weights {file}", record.get("weights_sha256"), file_digest(file))


def _settings_alone(folder: RunFolder) -> Content:
    """Return the settings of a run whose checkpoint cannot be read."""
    try:
        return {"settings": folder.settings()} if folder.is_run else {}
    except UserError:
        return {}


def _encoders(record: Content, content: Content) -> Generator[Link, None, None]:
    for side, scored in content.get("encoders", {}).items():
        if side in record:
            spec = Identity.from_json(record[side]).spec
            yield Link.of(f"{side} encoder {spec.id}", scored.get("fingerprint"), spec.fingerprint)


def _training(settings: Content, manifests: Manifests) -> Generator[Link, None, None]:
    """Yield the links to the training stores, or to the file from which the heads were imported."""
    if imported := settings.get("imported"):
        yield Link.of(f"heads {imported['file']}", imported["sha256"], None, "they were imported from this file")
    paths = settings.get("stores") or [None] * len(settings.get("store_digests", []))
    digests, used = (settings.get(name) or [None] * len(paths) for name in ("store_digests", "features_digests"))
    for number, (path, digest, features) in enumerate(zip(paths, digests, used, strict=True), start=1):
        if path is None:
            yield Link.of(f"training store {number}", digest, None, "an export does not record its folder")
        elif not _is_store(path):
            yield Link.of(f"training store {path}", digest, None, _where(path))
        else:
            yield from _guard(f"training store {path}", _training_store(path, digest, features, settings, manifests))


def _training_store(
    path: str, digest: str, features: str | None, settings: Content, manifests: Manifests
) -> Generator[Link, None, None]:
    store = Store.open(path)
    name = f"training store {path}"
    if features and store.digest != digest:
        now = store.digest_of(_used_arrays(store, settings))
        yield Link.of(name, features, now, "features used, to which others were added")
    else:
        yield Link.of(name, digest, store.digest)
    yield _index(store)
    yield from _guard(f"data of {path}", _source(store, manifests))


def _used_arrays(store: Store, settings: Content) -> list[FeatureArray]:
    """Return the arrays of a store that training read: those of its encoders, the captions in the settings' order."""
    texts = [store.texts(caption).values() for caption in settings["captions"] if caption in store.captions]
    used = _by(store.images().values(), settings, "image")
    for arrays in texts:
        used += _by(arrays, settings, "text")
    return used


def _by(arrays: Iterable[FeatureArray], settings: Content, side: str) -> list[FeatureArray]:
    """Return the arrays of the encoder of one side, or of those that were joined, in their order."""
    by_fingerprint = {array.identity.spec.fingerprint: array for array in arrays}
    used = settings.get(f"{side}_encoders") or [settings[f"{side}_encoder"]]
    return [by_fingerprint[each] for each in used if each in by_fingerprint]


def _index(store: Store) -> Link:
    damaged = store.damaged_index_files()
    name = f"index of {store.path}"
    if damaged:
        return Link(State.CHANGED, name, f"{', '.join(file.name for file in damaged)} not as recorded")
    return Link(
        State.OK, name, f"{store.rows:,} rows of {store.dataset}, captions {', '.join(store.captions) or 'none'}"
    )


def _source(store: Store, manifests: Manifests) -> Generator[Link, None, None]:
    """Yield the links from a training store to its manifest and to the files that this names."""
    name = f"manifest {store.dataset}"
    if store.is_imported:
        sides = read_record(store)["features"].values()
        recorded = [f"{file} {digest[:12]}" for side in sides for file, digest in side["files"] + side["tables"]]
        shown = listing(dict.fromkeys(recorded), 4)
        yield Link(State.ABSENT, f"imported files of {store.dataset}", f"recorded {shown}")
        return
    if store.dataset not in manifests:
        yield Link(State.ABSENT, name, f"{store.path} records no path of it. Name it with --manifest.")
        return
    manifest, root = manifests[store.dataset]
    if difference := describe_difference(store.attributes["manifest"], manifest.rows):
        yield Link(State.CHANGED, name, difference)
        return
    yield Link(State.OK, name, "its source is the recorded one")
    name = f"files of {store.dataset}"
    if manifest.source.urls or not manifest.is_here(root):
        yield Link(State.ABSENT, name, _where_data(manifest, root))
        return
    before = IndexRecord.read(store.path / INDEX)
    parts = manifest.open_source(root).parts()
    if before is None:
        yield Link(State.UNKNOWN, name, "the store has no record of them")
        return
    files = [file for part in parts for file in part.files or (None,)]
    old, new = ([stamp for part in stamps for stamp in part] for stamps in (before.stamps, _stamps(parts)))
    # The size of a folder means nothing.
    same = [was[:2] == now[:2] or bool(file and file.is_dir()) for was, now, file in zip(old, new, files, strict=False)]
    if len(old) != len(new) or not all(same):
        first = new[same.index(False)][0] if False in same else f"{len(new)} files, recorded {len(old)}"
        yield Link(State.CHANGED, name, f"another size or name: {first}")
    elif old != new:
        yield Link(State.UNKNOWN, name, "other modification times; `sail-extract run` compares the samples")
    else:
        yield Link(State.OK, name, f"{len(new)} of the recorded sizes and times")


def _stamps(parts: Sequence[Part]) -> list[list[Stamp]]:
    return IndexRecord.begin(None, parts).stamps


def _evaluation(path: Path, record: Record, content: Content, manifests: Manifests) -> Generator[Link, None, None]:
    """Yield the links from the scores of one set to its outcomes, to the features that were scored, and to its data."""
    outcomes = record.file(path, "outcomes")
    yield Link.of(f"outcomes of {record.name}", record.get("outcomes_sha256"), file_digest(outcomes))
    yield Link.of(
        f"examples of {record.name}", record.get("examples_sha256"), file_digest(record.file(path, "examples"))
    )
    if record["run"] != content["run"]["digest"]:
        yield Link.of(f"scores of {record.name}", record["run"], content["run"]["digest"], "of another checkpoint")
    for what, stored in record["stores"].items():
        name = f"{what} of {record.name}, {stored['path']}"
        if _is_store(stored["path"]):
            yield from _guard(name, _evaluation_store(name, stored))
        else:
            yield Link.of(name, stored["digest"], None, _where(stored["path"]))
    yield _evaluation_data(record, manifests)


def _evaluation_store(name: str, stored: Content) -> Generator[Link, None, None]:
    store = Store.open(stored["path"])
    changed = [
        f"{array.path} shard {shard}" for array in store.arrays() for shard in array.markers if array.changed(shard)
    ]
    changed += [file.name for file in store.damaged_index_files()]
    if changed and store.digest == stored["digest"]:
        yield Link(State.CHANGED, name, f"{changed[0]} is not what was committed")
    else:
        yield Link.of(name, stored["digest"], store.digest)


def _evaluation_data(record: Record, manifests: Manifests) -> Link:
    name = f"data of {record.name}"
    recorded = record["data"]["digest"]
    task = all_tasks().get(record["task"])
    if record["dataset"] not in manifests or task is None:
        return Link.of(name, recorded, None, "the scores record no path of its manifest. Name it with --manifest")
    manifest, root = manifests[record["dataset"]]
    if manifest.source.urls or not manifest.is_here(root):
        return Link.of(name, recorded, None, _where_data(manifest, root))
    try:
        data = ListedSet(manifest, root)
        masks = data.mask_digest() if "masks" in task.needs else ""
        return Link.of(name, recorded, data.describe(masks)["digest"], f"{len(data.samples):,} rows")
    except (UserError, UnreadableImageError, OSError) as problem:
        return Link(State.CHANGED, name, " ".join(str(problem).split()))


def _is_store(path: str) -> bool:
    return "://" not in path and (Path(path) / "zarr.json").exists()


def _where(path: str) -> str:
    return "at a URL, which is not opened" if "://" in path else "moved or removed"


def _where_data(manifest: Manifest, root: Path) -> str:
    return f"at {manifest.source.urls[0]}, which is not opened" if manifest.source.urls else f"not in {root}"


def describe_chain(links: Sequence[Link]) -> str:
    """Return a line about all links."""
    counts = {state: sum(link.state is state for link in links) for state in State}
    rest = [f"{count} {state}" for state, count in counts.items() if count and state not in (State.OK, State.CHANGED)]
    end = f" ({', '.join(rest)})" if rest else ""
    if changed := counts[State.CHANGED]:
        return f"The chain is broken: {changed} of {len(links)} links have changed{end}."
    return f"The chain holds: {counts[State.OK]} of {len(links)} links are as recorded{end}."
