"""Checks that a store is still what was written, and that the encoders here are still those that wrote it."""

from collections.abc import Iterator
from pathlib import Path

from sail_align.extract.encoders.identity import EncoderChangedError, Identity
from sail_align.extract.encoders.load import load_recorded
from sail_align.extract.errors import UserError
from sail_align.extract.store.features import FeatureArray
from sail_align.extract.store.store import Store

Result = tuple[str, bool]
"""Text of one result, and whether it is damage."""


def verify_store(path: Path, *, discard: bool = False) -> Iterator[Result]:
    """Yield the results for the index, every shard of every array, and each encoder's golden vector.

    Args:
        path: The store.
        discard: Remove the markers of damaged shards, so that the next extraction writes these again.
    """
    store = Store.open(path)
    for file in store.damaged_index_files():
        yield f"{file}: has changed. The store cannot be trusted; make it again.", True
    try:
        store.recaptions()
    except UserError as changed:
        yield str(changed), True
    damaged = store.damaged_metadata()
    for problem in damaged.values():
        yield problem, True
    paths = store.array_paths()
    for lost in sorted(store.committed_paths() - set(paths)):
        yield f"{lost}: is committed, but the array is missing or damaged. Rerun sail-extract run.", True
    identities: dict[str, Identity] = {}
    for name in paths:
        try:
            array = store.array(name)
        except UserError as problem:
            if str(problem) not in damaged.values():
                yield f"{name}: {problem}", True
            continue
        identities[array.identity.spec.fingerprint] = array.identity
        yield from _verify_array(array, discard)
    yield from map(_compare_with_encoder, identities.values())


def _verify_array(array: FeatureArray, discard: bool) -> Iterator[Result]:
    unwritten = array.unwritten
    if unwritten:
        counts = f"{len(unwritten):,} of {len(array.shards):,}"
        yield f"{array.path}: {counts} shards are not written yet.", False
    for shard in array.shards:
        name = f"{array.path} shard {shard}"
        if shard in array.markers:
            try:
                changed = array.changed(shard) or array.contradicted(shard)
            except UserError as unreadable:  # such as a bad sector: still check the other shards
                yield f"{name}: {unreadable}", True
                continue
            if changed:
                if discard:
                    array.discard(shard)
                advice = "Commit discarded." if discard else "Use --discard, then sail-extract run."
                yield f"{name}: {changed} file has changed since it was committed. {advice}", True
        elif shard not in unwritten:
            yield f"{name}: has a damaged commit. Rerun sail-extract run.", True


def _compare_with_encoder(recorded: Identity) -> Result:
    name = f"encoder {recorded.spec.id}"
    try:
        load_recorded(recorded)
    except EncoderChangedError as difference:
        return f"{name}: {difference}", True
    except UserError as unavailable:
        return f"{name}: not compared: {unavailable}", False
    return f"{name}: reproduces its golden vector.", False
