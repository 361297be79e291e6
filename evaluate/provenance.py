"""What a run was trained on."""

from pathlib import Path

from sail_align.align.checkpoint import Run
from sail_align.extract.errors import UserError
from sail_align.extract.store import Store


def saw_the_demo(run: Run) -> bool:
    """Whether a run was trained on the demo's drawings, by its stores; one that is gone is known by its name."""
    return any(_dataset(Path(path)) == "demo" for path in run.settings.get("stores", []))


def _dataset(store: Path) -> str:
    try:
        return Store.open(store).dataset
    except UserError:
        return store.stem
