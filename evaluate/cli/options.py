"""Options that several commands of sail-eval share, and what they stand for."""

from pathlib import Path
from typing import Annotated

import typer

RunPath = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="A run of sail-align, RUN/checkpoints/STEP, or an exported folder.  [default: the newest in runs/]",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="open_clip:NAME@WEIGHTS",
        help="Instead of a run: a model of OpenCLIP, such as SigLIP, to compare with.",
    ),
]
AllowRemoteCode = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REPO@REVISION",
        help="Let this repository of an encoder run its own code, at this full commit hash. Repeatable.",
    ),
]
VIEWS = "flip|3-crop|5-crop|10-crop"
VIEWS_HELP = "Average each image's embedding over views of it, as a protocol of its own."
Views = Annotated[str | None, typer.Option(metavar=VIEWS, help=VIEWS_HELP)]
FeaturesDir = Annotated[Path, typer.Option(help="Folder of stores. Those of evaluation sets are in its eval/.")]
ScoredRuns = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="Runs, or checkpoints of them, with scores.", show_default=False)
]
