"""sail-eval clip-benchmark: LAION's program on a run."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from sail_align.extract.errors import UserError

ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}


def clip_benchmark(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, an exported folder, or <owner>/<name>.", show_default=False)
    ],
) -> None:
    """Score a run with LAION's clip-benchmark. What follows RUN goes to `clip_benchmark eval` as it is."""
    _require_tars(context.args)

    from sail_align.evaluate.clip_benchmark import evaluate

    evaluate(model, context.args)


def _require_tars(arguments: Sequence[str]) -> None:
    """Refuse a folder of tars that is not there; folders of its other sets clip-benchmark makes itself.

    Raises:
        UserError: There is no such folder.
    """
    given = dict(pairwise(arguments))
    root = given.get("--dataset_root", "")
    of_tars = given.get("--dataset", "").startswith("wds/") and root and "://" not in root and "{" not in root
    if of_tars and not Path(root).is_dir():
        raise UserError(f"--dataset_root {root} is not there; name the folder of the set's tars.")
