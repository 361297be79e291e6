"""sail-align: train the heads that bring frozen image and text features into one space."""

import typer

from sail_align.align.cli.analyse import ladder, measure, probe
from sail_align.align.cli.exchange import export, import_released
from sail_align.align.cli.fit import fit
from sail_align.extract.errors import run_command
from sail_align.extract.system.memory import wait_without_spinning

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.command()(fit)
app.command("import-released")(import_released)
app.command()(measure)
app.command()(export)
app.command()(probe)
app.command()(ladder)


def main() -> None:
    """Entry point."""
    wait_without_spinning()
    run_command(app)
