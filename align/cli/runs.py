"""sail-align runs: the runs in a folder."""

from pathlib import Path
from typing import Annotated

import typer

from sail_align.extract.system.command_line import Result, with_json


@with_json
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of runs, or a run.")] = Path("runs"),
) -> Result:
    """List runs with their state, steps, held-out recall and scores, newest first.

    The recall is the mean R@1 of both directions. An interrupted run is resumable: its `fit` command continues it.
    Scores are the first metric of each set, in per cent; `sail-eval report RUN…` shows all of them.
    """
    from sail_align.align.runs.listing import list_runs, runs_table

    if folder == Path("runs") and not folder.exists():
        typer.echo("There are no runs in runs/ yet. Train one with `sail-align fit`.")
        return {"runs": []}
    found = list_runs(folder)
    typer.echo(runs_table(found) if found else f"There are no runs in {folder}. Train one with `sail-align fit`.")
    return {"runs": [run.to_dict() for run in found]}
