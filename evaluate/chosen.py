"""What `--run` and `--model` name. What can be refused without torch is."""

from pathlib import Path
from typing import TYPE_CHECKING

from sail_align.align.records import is_export, is_run, require_run, run_of
from sail_align.extract.errors import UserError

if TYPE_CHECKING:
    from sail_align.align.checkpoint import Run


def chosen(run: Path | None, model: str | None, device: str) -> "Run":
    """Return what is to be scored: a run, one of its checkpoints, an export, or a model; by default the newest run.

    Raises:
        UserError: It is none of these, not one of them alone, or damaged.
    """
    if run and model:
        raise UserError(f"--run {run} and --model {model} are two things to score; leave one out.")
    if model:
        from sail_align.evaluate.comparison import comparison

        return comparison(model, device=device)
    if run and is_export(run):
        from sail_align.align.hub_folder import read_hub_folder

        return read_hub_folder(run)
    if run:
        require_run(run)
        if not is_run(run_of(run)):
            raise UserError(f"{run} is a checkpoint away from its run; put it back into that run's checkpoints/.")
    from sail_align.align.checkpoint import load_run, newest_run

    return load_run(run or newest_run())
