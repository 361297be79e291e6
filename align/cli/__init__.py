"""sail-align: train heads that map frozen image and text features into one space."""

from sail_align.align.cli.analyse import ladder, measure, probe
from sail_align.align.cli.embed import embed
from sail_align.align.cli.exchange import export, import_released
from sail_align.align.cli.fit import fit
from sail_align.align.cli.runs import runs
from sail_align.align.cli.search import search
from sail_align.align.cli.selftest import selftest
from sail_align.align.cli.serve import serve
from sail_align.align.cli.tune import tune
from sail_align.extract.system.command_line import GroupedCommand, make_app, run_command

app = make_app(__doc__)
for command in (fit, runs, search, serve, import_released, measure, export, embed, probe, ladder, tune, selftest):
    app.command(command.__name__.replace("_", "-"), cls=GroupedCommand)(command)


def main() -> None:
    """Run the command line."""
    run_command(app)
