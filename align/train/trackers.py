"""Optional views of a run's log: TensorBoard and Weights & Biases, both usable without a network."""

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sail_align.extract.errors import UserError
from sail_align.extract.system.files import canonical_json


class TensorBoard:
    """Event files in RUN/tensorboard, for `tensorboard --logdir runs`."""

    def __init__(self, run: Path, _settings: Mapping[str, Any], step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # Hide what a killed run wrote after the step from which it resumes.
        purge = None if step is None else step + 1
        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=purge)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add a line of the log."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Write everything out."""
        self._writer.close()


class WeightsAndBiases:
    """A run in the project sail-align of Weights & Biases; with WANDB_MODE=offline in RUN/wandb, for `wandb sync`.

    A resumed run continues the same one there; lines logged before are left as they are.
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
                f"Weights & Biases cannot be used ({problem}). Run `wandb login`, or set WANDB_MODE=offline."
            ) from problem

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add a line of the log."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Write everything out."""
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
"""Trackers by name; each takes the run's folder, its settings, and the step to resume from (None for a new run)."""


def parse_trackers(text: str | None) -> list[str]:
    """Return the names in a comma-separated list. Raises `UserError` if one is unknown or not installed."""
    names = list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track is invalid: got {name!r}, expected {', '.join(TRACKERS)}.")
        if find_spec(name) is None:
            raise UserError(f"--track {name} needs a package that is missing. Run pip install 'sail-align[{name}]'.")
    return names
