"""The feature store: a zarr v3 hierarchy on disk, opened with `open_store` and made by an extraction."""

from sail_align.extract.store.store import Store

open_store = Store.open

__all__ = ["Store", "open_store"]
