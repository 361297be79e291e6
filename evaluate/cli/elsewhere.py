"""sail-eval clip-benchmark: score a run with the code of others."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from sail_align.extract.errors import UserError


def clip_benchmark(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, an exported folder, or <owner>/<name>.", show_default=False)
    ],
) -> None:
    """Score a run with LAION's clip-benchmark. All further options are passed to `clip_benchmark eval`."""
    options = dict(pairwise(context.args))
    root = options.get("--dataset_root", "")
    # clip-benchmark creates the folders of its other sets itself
    is_local_tars = options.get("--dataset", "").startswith("wds/") and root and "://" not in root and "{" not in root
    if is_local_tars and not Path(root).is_dir():
        raise UserError(f"--dataset_root {root} does not exist. Name the folder of the set's tars.")

    from sail_align.evaluate.clip_benchmark import evaluate

    evaluate(model, context.args)
