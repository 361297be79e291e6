"""SAIL: a CLIP-like model from frozen vision and language encoders.

The first five lines:

    import sail_align
    from PIL import Image

    model = sail_align.load("runs/demo-glu")  # a run, an exported folder, or a repository on the hub
    cat = model.encode_image(Image.open("cat.jpg"))
    print(cat @ model.encode_text(["a cat", "a dog"]).T)

`sail_align.open_store("features/demo.zarr")` opens a feature store. Each name is imported on first use, so that
`import sail_align` takes milliseconds and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sail_align.align.pretrained import load
    from sail_align.extract.store import open_store

    __version__: str

__all__ = ["__version__", "load", "open_store"]

_HOMES = {"load": "sail_align.align.pretrained", "open_store": "sail_align.extract.store"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes longer to import than all else here

        return version("sail-align")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sail_align' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
