"""sail-eval clip-benchmark: LAION's program on a run."""

from typing import Annotated

import typer

ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}


def clip_benchmark(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, an exported folder, or <owner>/<name>.", show_default=False)
    ],
) -> None:
    """Score a run with LAION's clip-benchmark. What follows RUN goes to `clip_benchmark eval` as it is."""
    from sail_align.evaluate.clip_benchmark import evaluate

    evaluate(model, context.args)
