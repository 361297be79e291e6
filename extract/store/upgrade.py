"""Converting a store of format 1 to the present format."""

from sail_align.extract.errors import UserError
from sail_align.extract.store.hierarchy import FILE, STORE_FORMAT, group, groups_above, write_document
from sail_align.extract.store.recaptions import RecaptionReport
from sail_align.extract.store.store import INDEX, Store
from sail_align.extract.system.files import report_write_errors
from sail_align.extract.system.progress import progress


def upgrade_store(store: Store, *, quiet: bool = False) -> bool:
    """Convert a store of format 1; return False if it has the present format already.

    Every shard is read and compared with its digest. No file of features, statuses or the index is changed. If it is
    stopped, the store stays as readable as it was, and the next call continues.

    Raises:
        UserError: The index or a shard is damaged, another process uses the store, or the disk is full.
        LeaseLostError: Another process has taken over, because this one was suspended for too long.
    """
    if store.format == STORE_FORMAT:
        return False
    for file in store.damaged_index_files():
        raise UserError(f"{file} is missing or has changed since the store was made. Make the store again.")
    with report_write_errors(store.path, during_run=True), store.leases.hold(INDEX, waiting=lambda: None) as lease:
        if any(name != INDEX and store.leases.is_held_here(name) for name in store.leases.names()):
            raise UserError(f"{store.path} is in use by another process. Rerun this command when it has ended.")
        arrays = store.arrays()
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
    store.tidy()
    return True
