"""Is a store still what was written, and are the encoders here still the ones that wrote it?"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sail_align.extract.encoders.identity import EncoderChangedError, Identity
from sail_align.extract.encoders.load import load_recorded
from sail_align.extract.errors import UserError
from sail_align.extract.store.store import Store


@dataclass(frozen=True)
class Finding:
    """One line of a verification; `damage` tells a problem from a remark."""

    text: str
    damage: bool = True

    def __str__(self) -> str:
        return self.text


def verify_store(path: Path, *, discard: bool = False) -> Iterator[Finding]:
    """Yield what is wrong with a store: index, every shard of every array, and each encoder's golden vector.

    With `discard`, the markers of damaged shards are taken away, so that the next extraction writes them again.
    """
    store = Store.open(path)
    for file in store.damaged_index_files():
        yield Finding(f"{file}: is not as it was written; the store cannot be trusted, make it again.")
    arrays = store.arrays()
    for lost in sorted(store.committed_paths() - {array.path for array in arrays}):
        yield Finding(f"{lost}: is committed, but the array is gone or damaged; run sail-extract run to do it again.")
    identities: dict[str, Identity] = {}
    for array in arrays:
        identities[array.identity.spec.fingerprint] = array.identity
        if left := array.unwritten:
            yield Finding(
                f"{array.path}: {len(left):,} of {len(array.shards):,} shards are not written yet.", damage=False
            )
        for shard in array.shards:
            if shard in left:
                continue
            if shard not in array.markers:
                yield Finding(f"{array.path} shard {shard}: has a damaged commit; run sail-extract run to do it again.")
                continue
            try:
                changed = array.changed(shard)
            except UserError as unreadable:  # a bad sector, say: the others are looked at all the same
                yield Finding(f"{array.path} shard {shard}: {unreadable}")
                continue
            if changed:
                advice = "its commit is taken back" if discard else "use --discard, then sail-extract run"
                if discard:
                    array.discard(shard)
                yield Finding(f"{array.path} shard {shard}: {changed} are not as they were committed; {advice}.")
    yield from map(_compare_with_encoder, identities.values())


def _compare_with_encoder(recorded: Identity) -> Finding:
    name = f"encoder {recorded.spec.id}"
    try:
        load_recorded(recorded)
    except EncoderChangedError as difference:
        return Finding(f"{name}: {difference}")
    except UserError as unavailable:
        return Finding(f"{name}: not compared: {unavailable}", damage=False)
    return Finding(f"{name}: gives its golden vector.", damage=False)
