"""What came out by item, beside the scores: enough to draw the same items for two runs and compare them."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sail_align.evaluate.results import Outcomes
from sail_align.evaluate.scores import Record, outcomes_path
from sail_align.extract.errors import UserError
from sail_align.extract.files import write_atomically


def save_outcomes(run: Path, record: Record, outcomes: Outcomes) -> None:
    """Write a record's outcomes into the run, integers in the smallest type that holds them."""
    compact = {name: np.ascontiguousarray(_compact(values)) for name, values in outcomes.items()}
    write_atomically(outcomes_path(run, record), save(compact, _signature(record)))


def load_outcomes(run: Path, record: Record) -> dict[str, NDArray[Any]]:
    """Read the outcomes of a record of the run.

    Raises:
        UserError: They are not there, damaged, or of another evaluation than the record.
    """
    path = outcomes_path(run, record)
    again = f"score {record['dataset']} again with `sail-eval {record['task']} {record['dataset']} --run {run}`."
    try:
        with safe_open(path, framework="numpy") as file:
            if file.metadata() != _signature(record):
                raise UserError(f"{path} is of another evaluation than the scores; {again}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as problem:
        raise UserError(f"{path} is not there, which a comparison needs; {again}") from problem
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{path} cannot be read ({problem}); {again}") from problem


def _signature(record: Record) -> dict[str, str]:
    return {"protocol": record["protocol"], "data": record["data"]["digest"], "run": record["run"]}


def _compact(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind not in "iu" or not values.size:
        return values
    return values.astype(np.result_type(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))
