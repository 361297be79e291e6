"""The feature store: a zarr v3 hierarchy on disk, opened with `open_store` and made by an extraction."""

from sail_align.extract.store.store import Store
from sail_align.extract.system.python_calls import PathLike, one_path

__all__ = ["Store", "open_store"]


def open_store(path: PathLike) -> Store:
    """Open a store of features, to read it.

        len(store), store[0], store[-10:], for row in store     rows: key, captions, features, status …
        store.image().read(0, 1000)                             features (1000, D) float16 and status (1000,) uint8
        store.text("raw").read(0, 1000)                         the same of a caption
        store.to_pandas(features=True)                          a table
        store.torch_dataset("raw")                              pairs for a DataLoader
        print(store)                                            what it contains

    Args:
        path: Folder or URL of the store, such as features/demo.zarr.

    Raises:
        UserError: The path is not a store, has a newer format, or cannot be read.
    """
    return Store.open(one_path(path, "path"))
