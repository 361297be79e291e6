"""Converting a store of format 1 to the present format."""

from sail_align.extract.errors import UserError
from sail_align.extract.store.hierarchy import FILE, STORE_FORMAT, group, groups_above, write_document
from sail_align.extract.store.recaptions import RecaptionReport
from sail_align.extract.store.store import INDEX, Store
from sail_align.extract.system.files import report_write_errors
from sail_align.extract.system.leases import Lease, LeaseLostError
from sail_align.extract.system.progress import progress


def upgrade_store(store: Store, *, quiet: bool = False) -> bool:
    """Convert a store of format 1; return False if it has the present format already.

    Every shard is read and compared with its digest. No file of features, statuses or the index is changed. If it is
    stopped, this version reads the store as before, and the next call continues.

    Raises:
        UserError: The index or a shard is damaged, another process may use the store, or the disk is full.
    """
    if store.format == STORE_FORMAT:
        return False
    store.require_index()
    try:
        with report_write_errors(store.path, during_run=True), store.leases.hold(INDEX, waiting=lambda: None) as lease:
            _upgrade(store, lease, quiet)
    except LeaseLostError as problem:
        raise UserError(f"{store.path} is being changed by another process. Rerun this command later.") from problem
    store.tidy()
    return True


def _upgrade(store: Store, lease: Lease, quiet: bool) -> None:
    for name in store.leases.names() - {INDEX}:
        store.leases.remove_dead(name)
    if used := store.leases.names() - {INDEX}:
        raise UserError(
            f"{store.path} is in use: a process of this or another machine holds {min(used)}. When no extraction is "
            f"running, remove {store.leases.folder} and rerun this command."
        )
    arrays = store.arrays()
    if lost := store.committed_paths() - {array.path for array in arrays}:
        raise UserError(f"{store.path} has commits of {min(lost)}, but not that array or caption. Restore its {FILE}.")
    with progress(sum(len(array.markers) for array in arrays), "shards", unit="shard", quiet=quiet) as bar:
        for array in arrays:
            for shard in sorted(array.markers):
                array.upgrade(shard)
                bar.update(1)
    nodes = {node for array in arrays for node in groups_above(array.path)}
    for node in nodes:
        if not (store.path / node / FILE).exists():
            write_document(store.path / node, group({}))
    for array in arrays:
        nodes |= array.name_dimensions()
    store.attributes["recaptions_sha256"] = RecaptionReport.digest(store.path / INDEX)
    store.record(sorted(nodes), lease)
