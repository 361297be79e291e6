"""Options that several commands of sail-extract share."""

from pathlib import Path
from typing import Annotated

import typer

from sail_align.extract.system.files import as_path

StorePath = Annotated[
    Path, typer.Argument(metavar="STORE", help="A feature store.", show_default=False, parser=as_path)
]
