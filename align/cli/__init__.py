"""sail-align: train heads that map frozen image and text features into one space."""

import typer

from sail_align.align.cli.analyse import ladder, measure, probe
from sail_align.align.cli.exchange import export, import_released
from sail_align.align.cli.fit import fit
from sail_align.extract.system.command_line import GroupedCommand, run_command

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
for command in (fit, import_released, measure, export, probe, ladder):
    app.command(command.__name__.replace("_", "-"), cls=GroupedCommand)(command)


def main() -> None:
    """Run the command line."""
    run_command(app)
