"""What shows a run's log elsewhere: TensorBoard and Weights & Biases, both extras that work without a network."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import canonical_json


class Tracker(Protocol):
    """Takes the lines that `metrics.jsonl` gets."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Take a line."""

    def close(self) -> None:
        """Write out what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard, for `tensorboard --logdir runs`."""

    def __init__(self, run: Path, _settings: Mapping[str, Any], step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote behind the step that it goes on from is not shown.
        purge = None if step is None else step + 1
        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=purge)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Take a line."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project sail-align in Weights & Biases; with WANDB_MODE=offline in RUN/wandb, for `wandb sync`.

    A resumed run is the same one there; lines that it has already are left as they are.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any], _step: int | None):
        import wandb

        identity = canonical_json([str(run.resolve()), settings])
        try:
            self._run: Any = wandb.init(
                project="sail-align",
                name=run.name,
                id=hashlib.sha256(identity).hexdigest()[:16],
                dir=str(run),
                config=dict(settings),
                resume="allow",
            )
        except wandb.Error as problem:
            raise UserError(
                f"Weights & Biases cannot be used ({problem}); run `wandb login`, or set WANDB_MODE=offline."
            ) from problem

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Take a line."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Write out what is left."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def parse_trackers(text: str | None) -> list[str]:
    """Return the trackers of a list as typed, each known and installed.

    Raises:
        UserError: One is not.
    """
    names = list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track {name!r} is none of: {', '.join(TRACKERS)}.")
        if find_spec(name) is None:
            raise UserError(f"--track {name} needs a package that is not here; pip install 'sail-align[tracking]'.")
    return names


def open_trackers(names: Sequence[str], run: Path, settings: Mapping[str, Any], step: int | None) -> list[Tracker]:
    """Return the trackers of a run that begins (None) or goes on behind a step."""
    return [TRACKERS[name](run, settings, step) for name in names]
