"""sail-extract: encode a data set once with frozen encoders and keep the features in a store."""

import typer

from sail_align.extract.cli.data import check, download
from sail_align.extract.cli.run import run
from sail_align.extract.cli.stores import doctor, overlap, status, upgrade, verify
from sail_align.extract.system.command_line import GroupedCommand, run_command

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
for command in (run, check, download, status, verify, upgrade, doctor, overlap):
    app.command(command.__name__, cls=GroupedCommand)(command)


def main() -> None:
    """Run the command line."""
    run_command(app)
