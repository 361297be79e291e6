"""Is a store still what was written, and are the encoders here still the ones that wrote it?"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sail_align.extract.encoders.base import Identity, require_same
from sail_align.extract.encoders.load import load_unchecked
from sail_align.extract.errors import UserError
from sail_align.extract.store import Store


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
    identities: dict[str, Identity] = {}
    for array in store.arrays():
        identities[array.identity.spec.fingerprint] = array.identity
        for shard in array.shards:
            if shard not in array.markers:
                yield Finding(f"{array.path} shard {shard}: is not committed; run sail-extract run to do it.")
            elif changed := array.changed(shard):
                advice = "its commit is taken back" if discard else "use --discard, then sail-extract run"
                yield Finding(f"{array.path} shard {shard}: {changed} are not as they were committed; {advice}.")
                if discard:
                    array.discard(shard)
    for identity in identities.values():
        yield from _compare_with_encoder(identity, path)


def _compare_with_encoder(recorded: Identity, path: Path) -> Iterator[Finding]:
    try:
        encoder = load_unchecked(recorded.spec)
    except UserError as unavailable:
        yield Finding(f"encoder {recorded.spec.id}: not compared: {unavailable}", damage=False)
        return
    try:
        require_same(encoder.identity, recorded, where=str(path))
    except UserError as difference:
        yield Finding(f"encoder {recorded.spec.id}: {difference}")
    else:
        yield Finding(f"encoder {recorded.spec.id}: gives its golden vector.", damage=False)
