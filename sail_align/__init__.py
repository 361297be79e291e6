"""SAIL: a CLIP-like model from frozen vision and language encoders.

Use a model: a run, an exported folder, or a repository on the hub.

    import sail_align

    model = sail_align.load("runs/demo-linear")
    cat = model.encode_image("cat.jpg")  # (1, E), unit-norm
    print(cat @ model.encode_text(["a cat", "a dog"]).T)
    print(model.classify("cat.jpg", ["cat", "dog"]))  # probabilities; see also segment, similarity, heads

Make one: encode a data set into a store of frozen features, train the heads on it, and score them.

    store = sail_align.build_store("demo")  # or a folder of images, a table …; or import_features("img.npy", "txt.npy")
    result = sail_align.fit(store)
    print(result.metrics["r1"], "% R@1 on held-out pairs; chance is", result.metrics["chance"])
    scores = sail_align.score(result, ["demo-retrieval"])
    print(scores)

Look into a store.

    store = sail_align.open_store("features/demo.zarr")
    print(store)  # data set, captions, encoders
    print(len(store), store[0].captions, store[0].image_features.shape)
    dataset = store.torch_dataset("raw")  # pairs of feature vectors for a model of your own

Each function does the same as a command and takes its options as keywords (`--batch-size` is `batch_size`):
`build_store` is `sail-extract run`, `import_features` is `sail-extract import`, `fit` is `sail-align fit`, `score` is
`sail-eval`. A mistake raises `sail_align.UserError` with a message that names the value and what to do. `quiet=True`
prints nothing. docs/python.md has an example of everything.

Names are imported on first use, so `import sail_align` takes milliseconds and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sail_align.align.fit import fit
    from sail_align.align.pretrained import load
    from sail_align.evaluate.score import score
    from sail_align.extract.build import build_store
    from sail_align.extract.errors import UserError as UserError
    from sail_align.extract.exchange.import_features import import_features
    from sail_align.extract.store import open_store

    __version__: str

__all__ = ["__version__", "build_store", "fit", "import_features", "load", "open_store", "score"]

# UserError is public, too. In `__all__`, it would fill the first page of `help(sail_align)` with what it inherits.

_HOMES = {
    "UserError": "extract.errors",
    "build_store": "extract.build",
    "fit": "align.fit",
    "import_features": "extract.exchange.import_features",
    "load": "align.pretrained",
    "open_store": "extract.store",
    "score": "evaluate.score",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes longer to import than all else here

        return version("sail-align")
    if name not in _HOMES:
        raise AttributeError(f"module 'sail_align' has no attribute {name!r}")
    found = getattr(import_module(f"sail_align.{_HOMES[name]}"), name)
    if not isinstance(found, type):
        from sail_align.extract.system.python_calls import python_call

        found = python_call(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "UserError"])
